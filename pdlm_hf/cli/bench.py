"""`pdlm bench decode`: time the reference's loop, ours and an autoregressive one."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors_pdlm import SettingError
from .options import check_positive, exit_on_error


@exit_on_error
def decode(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[str, typer.Option(help="tiny, small or 8b.")] = "small",
    regions: Annotated[str, typer.Option(help="Numbers of regions, comma separated.")] = "4",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma separated.")] = "1,8",
    slots: Annotated[int, typer.Option(help="Token positions per caption.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 32,
    caption_tokens: Annotated[
        int, typer.Option(help="Tokens of a caption: of the autoregressive row, and where trimmed captions end.")
    ] = 20,
    repeats: Annotated[int, typer.Option(help="Measured runs of each setting, taken in turn.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    scaling: Annotated[bool, typer.Option("--scaling", help="Also vary regions, passes and batch size.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scaling run here (needs the extra viz).")] = None,
) -> None:
    """Time the reference's loop, ours and an autoregressive one on random weights, for fixed numbers of steps."""
    numbers = {"--slots": slots, "--steps": steps, "--caption-tokens": caption_tokens, "--repeats": repeats}
    check_positive(numbers | {"--threads": threads})
    counts, batches = _integers(regions, "--regions"), _integers(batch, "--batch")
    from ..bench.decode import decode as run

    run(device, shape, counts, batches, slots, steps, repeats, caption_tokens, threads, scaling, json_file, plot)


def _integers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise SettingError(f"{name}: expected positive integers like 1,4,8, got {text!r}.")
    return numbers
