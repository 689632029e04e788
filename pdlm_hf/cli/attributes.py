"""`pdlm attributes`: read typed attributes of regions of an image."""

import csv
import json
import sys
import time
from typing import Annotated

import typer

from ..errors_pdlm import SettingError
from .options import Format, Model, Question, Schema, embedded_note, exit_on_error, load_captioner, note_embedded
from .regions import Boxes, ImageName, Masks, Orientation, RegionFile, read_regions


@exit_on_error
def attributes(
    image: Annotated[str, typer.Argument(help="The image.")],
    schema: Schema = None,
    mask: Masks = None,
    box: Boxes = None,
    regions: RegionFile = None,
    format: Format = None,
    image_name: ImageName = None,
    orientation: Orientation = None,
    model: Model = None,
    question: Question = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Sentence with a {name} place for every attribute. Repeatable: readings are averaged."),
    ] = None,
    jointly: Annotated[
        bool | None, typer.Option("--jointly", help="Read the most certain attribute first, the others given it.")
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option("--calibrate", help="Divide by what is read without a region.")
    ] = None,
    unknown_below: Annotated[
        float | None, typer.Option(help="A value is unknown if its probability is lower, from 0 to 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table, one row per region.")] = False,
) -> None:
    """Read attributes of regions by a schema: a value and its probability for each."""
    from ..attributes.results import csv_fields, csv_row
    from ..attributes.schema import parse_schema, read_schema_file
    from ..render.text import pluralize

    if schema is None:
        raise SettingError('No schema: give --schema FILE.json, for example with {"colour": ["red", "blue"]}.')
    if as_json and as_csv:
        raise SettingError("--json and --csv exclude each other: give one of them.")
    checked = parse_schema(
        read_schema_file(schema),
        template=template or None,
        jointly=jointly,
        calibrate=calibrate,
        unknown_below=unknown_below,
    )
    opened, found = read_regions(image, mask, box, regions, format, image_name, orientation)
    note_embedded(model)
    captioner = load_captioner(model)
    start = time.perf_counter()
    read, output = captioner.read_attributes([(opened, found)], checked, question)
    seconds = round(time.perf_counter() - start, 3)
    if as_json:
        answer = {"model": model or "shapes (embedded)", "image": image, "regions": [row.to_row() for row in read[0]]}
        note = {} if model else {"note": embedded_note()}
        typer.echo(json.dumps(answer | {"num_forwards": output.num_forwards, "seconds": seconds} | note))
    elif as_csv:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(csv_fields(checked.attributes))
        table.writerows(csv_row(image, row) for row in read[0])
    else:
        for number, row in enumerate(read[0], 1):
            values = (f"{name} {shown(value.value)} ({value.probability:.2f})" for name, value in row.items())
            typer.echo(f"{number}  {'  '.join(values)}")
    passes = pluralize(output.num_forwards or 0, "forward pass", "es")
    typer.echo(f"{pluralize(len(read[0]), 'region')} in {passes}, {seconds:.2f} s", err=True)


def shown(value: object) -> str:
    """A value in one line; a boolean as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else " ".join(str(value).split()) or '""'
