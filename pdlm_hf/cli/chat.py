"""`pdlm chat` and `pdlm export`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors_pdlm import CheckpointError
from .options import RELEASED_BASE, Model, check_positive, embedded_note, exit_on_error, load, note_embedded


@exit_on_error
def chat(
    image: Annotated[str, typer.Argument(help="The image.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Model = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token positions; default: the checkpoint's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: one per token position.")] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Answer block by block; 1 = autoregressive order. Default: one block.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask about a whole image."""
    given = {"--max-new-tokens": max_new_tokens, "--steps": steps, "--block-length": block_length}
    check_positive({name: value for name, value in given.items() if value is not None})
    from ..regions.images import load_image

    opened = load_image(image)  # the image first: the model takes longer
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..captioning.checkpoints import BASE_CHECKPOINT
    from ..captioning.loading import load_checkpoint
    from ..render.text import pluralize

    disable_progress_bar()
    note_embedded(model, RELEASED_BASE)
    settings = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps, "block_length": block_length}
    settings = {name: value for name, value in settings.items() if value is not None}
    network, processor = load(load_checkpoint, str(BASE_CHECKPOINT) if model is None else model)
    if network.config.num_region_prompts:
        raise CheckpointError(
            f"{model}: a region checkpoint, which captions regions (`pdlm caption`). For chat give a base checkpoint, "
            f"{RELEASED_BASE} for example."
        )
    network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = processor(images=opened, text=question).to(network.device)
    start = time.perf_counter()
    output = network.generate(**inputs, **settings, return_dict_in_generate=True)
    answer = processor.post_process_answers(output.sequences)[0]
    costs = {"num_forwards": output.num_forwards, "seconds": round(time.perf_counter() - start, 3)}
    if as_json:
        name = model or "shapes base (embedded)"
        note = {} if model else {"note": embedded_note(RELEASED_BASE)}
        typer.echo(json.dumps({"model": name, "image": image, "question": question, "answer": answer} | costs | note))
    else:
        typer.echo(answer)
        passes = pluralize(costs["num_forwards"], "forward pass", "es")
        typer.echo(f"{passes}, {costs['seconds']:.2f} s", err=True)
    if not answer:
        typer.echo("pdlm: no answer", err=True)
        raise typer.Exit(1)


@exit_on_error
def export(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, ours or the reference's.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
) -> None:
    """Write a self-contained checkpoint folder with its code (trust_remote_code)."""
    from ..captioning.export import export_checkpoint

    files = load(export_checkpoint, model, out)
    typer.echo(f"{out}: {', '.join(files)}")
