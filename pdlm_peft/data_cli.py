"""The commands `pdlm-peft validate | convert | split`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pdlm_hf.errors_pdlm import SettingError

from .options import Data, Images, exit_on_error, fail

SHOWN = 50  # faults printed unless asked otherwise
SAMPLES = 4


@exit_on_error
def validate(
    data: Data,
    images: Images = None,
    chat: Annotated[bool, typer.Option("--chat", help="Check conversations in LLaVA's format.")] = False,
    model: Annotated[str | None, typer.Option(help="Checkpoint to train; default: the embedded one.")] = None,
    max_caption_tokens: Annotated[int, typer.Option(help="A longer caption or answer is a fault; 0: no limit.")] = 512,
    max_regions: Annotated[int | None, typer.Option(help="More regions in a row are a fault.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="Attributes that regions may have, and their choices; see pdlm attributes.")
    ] = None,
    open_images: Annotated[
        bool,
        typer.Option(
            "--open-images/--no-images", help="Decode every image; without, the sizes in the file are trusted."
        ),
    ] = True,
    max_faults: Annotated[int, typer.Option(help="Number of faults to print; 0: all. All are counted.")] = SHOWN,
    draw: Annotated[Path | None, typer.Option(help="Draw the first sound rows into a .png file or a folder.")] = None,
    samples: Annotated[int, typer.Option(help="Number of rows to draw.")] = SAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check region data or conversations. Prints all faults and a summary; the exit code is 1 if there are faults."""
    from transformers import AutoProcessor

    from pdlm_hf.attributes.schema import read_schema_file
    from pdlm_hf.captioning.checkpoints import BASE_CHECKPOINT, CHECKPOINT, checkpoint_name

    from .chat_validation import validate_chat
    from .sources import find_source
    from .validation import Validator, draw_samples

    if max_caption_tokens < 0 or max_faults < 0 or samples < 1:
        raise SettingError("--max-caption-tokens and --max-faults must not be negative, --samples must be positive.")
    if chat and (draw is not None or max_regions is not None or schema is not None):
        raise SettingError("--draw, --max-regions and --schema are for region data, not for --chat.")
    checked = None if schema is None else read_schema_file(schema)
    source = find_source(data, images)
    if draw is not None and not draw.is_dir():
        from pdlm_hf.render.drawing import check_target

        check_target(draw)
    own = BASE_CHECKPOINT if chat else CHECKPOINT
    processor = AutoProcessor.from_pretrained(checkpoint_name(own if model is None else model))
    if chat:
        report = validate_chat(source, processor, open_images, max_caption_tokens or None)
    else:
        limits = max_caption_tokens or None, max_regions
        validator = Validator(processor, open_images, *limits, samples if draw else 0, checked)
        report = validator.validate(source)
    shown = report.faults[: max_faults or None]
    if as_json:
        found = {"data": data, "faults": [vars(fault) for fault in shown], "n_faults": len(report.faults)}
        typer.echo(json.dumps(found | {"counts": report.counts, "summary": report.summary}))
    else:
        for fault in shown:
            typer.echo(str(fault))
        if hidden := len(report.faults) - len(shown):
            typer.echo(f"... and {hidden} more (--max-faults 0 prints all)")
        _print_summary(report)
    if draw is not None and report.samples:
        paths = draw_samples(report.samples, source.folder, draw)
        typer.echo(f"drawn: {', '.join(map(str, paths))}", err=True)
    if report.faults:
        raise typer.Exit(1)


def _print_summary(report: Any) -> None:
    summary = report.summary
    regions = f", {summary['regions']} regions" if "regions" in summary else ""
    typer.echo(f"{summary['rows']} rows, {summary['images']} images{regions}")
    names = {
        "regions_per_row": ("regions per row", "{:g}"),
        "area_share": ("area of a region", "{:.2%}"),
        "caption_tokens": ("tokens per caption", "{:g}"),
        "images_per_row": ("images per row", "{:g}"),
        "turns": ("turns per row", "{:g}"),
        "answer_tokens": ("tokens per answer", "{:g}"),
    }
    for name, (label, form) in names.items():
        if spread := summary.get(name):
            values = ", ".join(f"{key} {form.format(value)}" for key, value in spread.items())
            typer.echo(f"{label}: {values}")
    for name, found in summary.get("attributes", {}).items():
        typer.echo(f"attribute {name!r:.60}: {found['values']} values, {found['regions']} regions")
    if "regions" in summary:
        groups, prompts = summary["rows_in_several_groups"], summary["region_prompts"]
        typer.echo(f"{groups} rows have more regions than region prompts ({prompts}); training splits them")
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    typer.echo(f"faults: {counts or 'none'}")


@exit_on_error
def convert(
    source: Annotated[str, typer.Argument(help="The annotation file, or a saved table or folder.")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    form: Annotated[
        str,
        typer.Option(
            "--from", help="coco-instances, coco-panoptic, dam, gar, reference, label-studio, cvat or fiftyone."
        ),
    ],
    images: Images = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="COCO: CSV or JSONL with id (or annotation_id), caption, optionally image_id."),
    ] = None,
    category_captions: Annotated[
        str | None, typer.Option(help="COCO: caption with {} in place of the category's name.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="COCO panoptic: folder of the PNG files.")] = None,
    crowds: Annotated[bool, typer.Option("--crowds", help="COCO: also convert crowd regions.")] = False,
) -> None:
    """Convert other annotation files into region data (JSONL)."""
    from . import conversion

    if captions is not None and category_captions is not None:
        raise SettingError("Give only one of --captions and --category-captions.")
    texts = None
    if captions is not None:
        texts = conversion.read_captions(captions)
    elif category_captions is not None:
        texts = conversion.category_captions(category_captions)
    counts = conversion.convert(source, out, form, images, texts, masks, crowds)
    _print_counts(out, counts)
    if not counts["rows"]:
        raise fail("No row was written.", 1)


@exit_on_error
def split(
    data: Data,
    train: Annotated[Path, typer.Argument(help="JSONL file to write, for training.")],
    held_out: Annotated[Path, typer.Argument(help="JSONL file to write, held out.")],
    share: Annotated[float, typer.Option("--held-out", help="Share of the images to hold out.")] = 0.05,
    seed: Annotated[int, typer.Option(help="The same seed and images give the same split.")] = 0,
    images: Images = None,
) -> None:
    """Split region data into two files without a common image."""
    from .splitting import split as split_rows

    for out, counts in zip((train, held_out), split_rows(data, train, held_out, share, seed, images), strict=True):
        _print_counts(out, counts)


def _print_counts(out: Path, counts: Any) -> None:
    left = [f"{count} {name} left out" for name, count in counts.items() if name not in ("rows", "regions", "images")]
    images = [f"{counts['images']} images"] * ("images" in counts)
    typer.echo("; ".join([f"{out}: {counts['rows']} rows", f"{counts['regions']} regions", *images, *left]))
