"""`pdlm caption`: describe regions of an image."""

import json
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors_pdlm import RegionError, SettingError
from .options import (
    Fast,
    Format,
    Length,
    Model,
    Question,
    Steps,
    check_positive,
    embedded_note,
    exit_on_error,
    load_captioner,
    note_embedded,
)


class RepeatedOptions(TyperCommand):
    """A command whose `--mask` takes all files that follow it, as a shell writes them for `--mask *.png`."""

    repeated = ("--mask",)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its files; the image has to come before them."""
        options = [p for p in self.params if p.param_type_name == "option"]
        take_value = {name for p in options if not getattr(p, "is_flag", False) for name in p.opts}
        out: list[str] = []
        repeat, has_image = "", False
        tokens = iter(args)
        for token in tokens:
            if token in take_value:
                out += [token, *islice(tokens, 1)]
                repeat = token if token in self.repeated and has_image else ""
            elif token.startswith("-"):
                out.append(token)
                repeat = ""
            else:
                out += [repeat, token] if repeat else [token]
                has_image = True
        return super().parse_args(ctx, out)


@exit_on_error
def caption(
    image: Annotated[str, typer.Argument(help="The image.")],
    mask: Annotated[
        list[Path] | None, typer.Option(help="Mask images, white inside the region: one or several files. Repeatable.")
    ] = None,
    box: Annotated[list[str] | None, typer.Option(help="Box X,Y,WIDTH,HEIGHT in pixels. Repeatable.")] = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="COCO, LabelMe, VIA, Label Studio, CVAT, VOC, YOLO, label map, mask folder."),
    ] = None,
    format: Format = None,
    image_name: Annotated[
        str | None, typer.Option(help="Name of the image in the file of --regions, if it has another.")
    ] = None,
    orientation: Annotated[
        str | None, typer.Option(help="Regions are of the image as shown, or stored: before its EXIF orientation.")
    ] = None,
    model: Model = None,
    max_new_tokens: Length = 32,
    steps: Steps = 32,
    question: Question = None,
    fast: Fast = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Write an image of the regions with their captions.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the captions emerge, step by step.")] = False,
    record: Annotated[Path | None, typer.Option(help="Record the steps as a page (.html) or a .gif.")] = None,
) -> None:
    """Describe regions of an image: masks, boxes, or a file of them."""
    from ..regions.images import load_image
    from ..render.drawing import check_target, save_drawing
    from ..render.recording import check_recording, save_recording
    from ..render.text import pluralize

    # everything the user can get wrong, before the model is loaded
    check_positive({"--max-new-tokens": max_new_tokens, "--steps": steps})
    if not mask and not box and regions is None:
        raise SettingError("No regions: give --mask, --box or --regions.")
    opened = load_image(image)
    turn = _read_orientation(orientation, image)
    found = _read_regions(mask or [], box or [], *opened.size, turn)
    if regions is not None:
        found += _read_file(regions, format, image, image_name, opened.size, turn, len(found))
    _print_hints(image, found, mask or [], orientation is None)
    if record is not None:
        check_recording(record)
    if draw is not None:
        check_target(draw)
    note_embedded(model)
    settings = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps}
    captions, costs, drafts = _run(opened, found, model, question, watch, record is not None, fast, settings)
    rows = [caption.to_row() for caption in captions]
    if as_json:
        note = {} if model else {"note": embedded_note()}
        name = model or "shapes (embedded)"
        typer.echo(json.dumps({"model": name, "image": image, "regions": rows} | costs | note))
    else:
        for number, row in enumerate(rows, 1):
            cut = f" [cut at {max_new_tokens} tokens]" if "truncated" in row else ""
            typer.echo(f"{number}  {' '.join(row['caption'].split())}{cut}  ({row['score']:.2f})")
        passes = pluralize(costs["num_forwards"], "forward pass", "es")
        typer.echo(
            f"{pluralize(len(rows), 'caption')} in {passes}, {costs['tokens_per_forward']:.1f} tokens per forward "
            f"pass, {costs['seconds']:.2f} s",
            err=True,
        )
    # last: what was computed is printed, whatever happens to the files
    if draw is not None:
        save_drawing(draw, opened, found, captions)
        typer.echo(f"drawn to {draw}", err=True)
    if record is not None:
        save_recording(record, opened, found, drafts)
        typer.echo(f"recorded to {record}", err=True)
    if not all(row["caption"] for row in rows):
        typer.echo("pdlm: a region got no caption", err=True)
        raise typer.Exit(1)


def _read_orientation(orientation: str | None, image: str) -> int:
    """The EXIF orientation by which regions are turned. Raises: SettingError: the option has no such value."""
    from ..regions.images import orientation_of

    if orientation not in (None, "shown", "stored"):
        raise SettingError(f"--orientation {orientation}: expected shown or stored.")
    return orientation_of(image) if orientation == "stored" else 1


def _read_regions(masks: list[Path], boxes: list[str], width: int, height: int, turn: int) -> list[Any]:
    """Regions as the options give them. Raises: RegionError, which names the file or the box."""
    from ..regions.region import parse_region

    found = [parse_region(mask, width, height, k, turn) for k, mask in enumerate(masks)]
    for text in boxes:
        try:
            found.append(parse_region(_box(text), width, height, len(found), turn))
        except RegionError as error:
            raise RegionError(f"--box {text}: {str(error).partition(': ')[2]}") from None
    return found


def _read_file(
    file: Path, format: str | None, image: str, image_name: str | None, size: tuple[int, int], turn: int, start: int
) -> list[Any]:
    """Regions of a file, numbered from `start` where they have no id. Raises: RegionError, which names the file."""
    from ..regions.readers import read_region_file, region_id
    from ..regions.region import parse_region

    stored = size[::-1] if turn > 4 else size
    found = read_region_file(file, image_name or image, *stored, format, Path(image).stat().st_size)
    try:
        return [parse_region(value, *size, region_id(value, start + k), turn) for k, value in enumerate(found)]
    except RegionError as error:
        raise RegionError(f"{file}: {error}") from None


def _print_hints(image: str, regions: list[Any], masks: list[Path], unsettled: bool) -> None:
    """Say on stderr where regions may not be what was meant; the first regions are those of the mask files."""
    from ..regions.hints import hint_all_inside, hint_turned

    hints = [hint_all_inside(region, str(mask)) for region, mask in zip(regions, masks, strict=False)]
    if unsettled:
        hints.append(hint_turned(image, regions[0].mask.shape))
    for hint in filter(None, hints):
        typer.echo(f"pdlm: {hint}", err=True)


def _box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise RegionError("box: expected X,Y,WIDTH,HEIGHT in pixels, for example --box 10,20,100,80.")
    return numbers


def _run(image, found, model, question, watch, record, fast, settings):
    """Load the model and caption. Returns: captions, their costs, and the drafts of every step."""
    from rich.console import Console

    from ..captioning.streaming import LiveView, RegionStreamer

    captioner = load_captioner(model, fast)
    streamer = RegionStreamer(captioner.processor) if watch or record else None
    start = time.perf_counter()
    with ExitStack() as stack:
        if streamer is not None and watch:
            names = [str(region.id) for region in found]
            streamer.on_step = stack.enter_context(LiveView(names, Console(stderr=True))).show
        captions, output = captioner.generate([(image, found)], question, streamer=streamer, **settings)
    costs = {
        "num_forwards": output.num_forwards,
        "tokens_per_forward": round(output.tokens_per_forward, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return captions[0], costs, [step[0] for step in streamer.steps] if streamer is not None and record else []
