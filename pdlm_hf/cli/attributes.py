"""`pdlm attributes`: read typed attributes of regions of an image."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from ..errors_pdlm import SettingError
from .options import (
    Format,
    KeyEnv,
    Model,
    Question,
    Schema,
    Server,
    caption_client,
    check_captioner,
    check_served,
    embedded_note,
    exit_on_error,
    load_captioner,
    note_embedded,
)
from .regions import Boxes, ImageName, Masks, Orientation, RegionFile, read_regions

_REQUESTS = 8  # at a time, to a server
_Reader = Callable[[Any, list[Any]], tuple[list[Any], int]]  # image and regions: attributes and forward passes


@exit_on_error
def attributes(
    context: typer.Context,
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
    server: Server = None,
    key_env: KeyEnv = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table, one row per region.")] = False,
) -> None:
    """Read attributes of regions by a schema: a value and its probability for each."""
    from ..attributes.results import csv_fields, csv_row, write_csv
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
    check_served(context, server)
    opened, found = read_regions(image, mask, box, regions, format, image_name, orientation)
    open_reader = _local if server is None else partial(_served, server, key_env)
    name, read = open_reader(model, question, checked)
    start = time.perf_counter()
    rows, forwards = read(opened, found)
    seconds = round(time.perf_counter() - start, 3)
    if as_json:
        answer = {"model": name, "image": image, "regions": [row.to_row() for row in rows]}
        note = {} if model or server else {"note": embedded_note()}
        typer.echo(json.dumps(answer | {"num_forwards": forwards, "seconds": seconds} | note))
    elif as_csv:
        write_csv(sys.stdout, [csv_fields(checked.attributes), *(csv_row(image, row) for row in rows)])
    else:
        for number, row in enumerate(rows, 1):
            values = (f"{name} {shown(value.value)} ({value.probability:.2f})" for name, value in row.items())
            typer.echo(f"{number}  {'  '.join(values)}")
    passes = pluralize(forwards, "forward pass", "es")
    typer.echo(f"{pluralize(len(rows), 'region')} in {passes}, {seconds:.2f} s", err=True)


def _local(model: str | None, question: str | None, schema: Any) -> tuple[str, _Reader]:
    """Name of the model in this process, and what reads the attributes of regions with it."""
    note_embedded(model)
    check_captioner(model, schema)
    captioner = load_captioner(model)

    def read(image: Any, regions: list[Any]) -> tuple[list[Any], int]:
        images, output = captioner.read_attributes([(image, regions)], schema, question)
        return images[0], output.num_forwards or 0

    return model or "shapes (embedded)", read


def _served(
    server: str, key_env: str | None, model: str | None, question: str | None, schema: Any
) -> tuple[str, _Reader]:
    """The same of a server's model."""
    settings = {} if question is None else {"question": question}
    client = caption_client(server, model, key_env, _REQUESTS, settings, schema)
    return client.model, client.attributes


def shown(value: object) -> str:
    """A value in one line; a boolean as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else " ".join(str(value).split()) or '""'
