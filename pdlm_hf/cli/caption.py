"""`pdlm caption`: describe regions of an image."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from .finding import (
    DetectorName,
    Everything,
    Find,
    MaxRegions,
    Parts,
    SegmenterDevice,
    SegmenterName,
    Select,
    check_alone,
    find_in,
    is_asked,
    open_finder,
)
from .options import (
    Fast,
    Format,
    Length,
    Model,
    Question,
    Steps,
    check_captioner,
    check_positive,
    embedded_note,
    exit_on_error,
    load_captioner,
    note_embedded,
)
from .regions import Boxes, ImageName, Masks, Orientation, RegionFile, read_regions


@exit_on_error
def caption(
    image: Annotated[str, typer.Argument(help="The image.")],
    mask: Masks = None,
    box: Boxes = None,
    regions: RegionFile = None,
    format: Format = None,
    image_name: ImageName = None,
    orientation: Orientation = None,
    everything: Everything = False,
    find: Find = None,
    segmenter: SegmenterName = None,
    detector: DetectorName = None,
    segmenter_device: SegmenterDevice = None,
    parts: Parts = False,
    max_regions: MaxRegions = None,
    select: Select = None,
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
    """Describe regions of an image: masks, boxes, a file of them, everything, or what you name."""
    from ..captioning.found import FoundCaption
    from ..regions.images import load_image
    from ..render.drawing import check_target, save_drawing
    from ..render.recording import check_recording, save_recording
    from ..render.text import pluralize

    # everything the user can get wrong, before the model is loaded
    check_positive({"--max-new-tokens": max_new_tokens, "--steps": steps})
    if record is not None:
        check_recording(record)
    if draw is not None:
        check_target(draw)
    if is_asked(everything, find, detector):
        about_given = {"--format": format, "--image-name": image_name, "--orientation": orientation}
        check_alone(mask or box or regions, about_given)
        check_captioner(model)
        opened = load_image(image)
    finder = open_finder(
        everything, find, segmenter, detector, segmenter_device, parts, max_regions, select, model is None
    )
    proposed: list[Any] | None = None
    if finder is None:
        opened, found = read_regions(image, mask, box, regions, format, image_name, orientation)
    else:
        proposed = find_in(image, opened, finder)
        found = [region.as_region(k) for k, region in enumerate(proposed)]
    note_embedded(model)
    settings = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps}
    captions, costs, drafts = _run(opened, found, model, question, watch, record is not None, fast, settings)
    if proposed is not None:
        captions = list(map(FoundCaption.of, captions, proposed))
    rows = [caption.to_row() for caption in captions]
    if as_json:
        note = {} if model else {"note": embedded_note()}
        name = model or "shapes (embedded)"
        typer.echo(json.dumps({"model": name, "image": image, "regions": rows} | costs | note))
    else:
        for number, row in enumerate(rows, 1):
            cut = f" [cut at {max_new_tokens} tokens]" if "truncated" in row else ""
            name = f"{row['name']}: " if "name" in row else ""
            typer.echo(f"{number}  {name}{' '.join(row['caption'].split())}{cut}  ({row['score']:.2f})")
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
        save_recording(record, opened, found, drafts, [caption.score for caption in captions], Path(image).name)
        typer.echo(f"recorded to {record}", err=True)
    if not all(row["caption"] for row in rows):
        typer.echo("pdlm: a region got no caption", err=True)
        raise typer.Exit(1)


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
