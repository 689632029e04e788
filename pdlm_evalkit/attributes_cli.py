"""The command `pdlm-eval attributes`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pdlm_hf.cli.batch import make_engine
from pdlm_hf.cli.errors import exit_on_error, fail
from pdlm_hf.cli.options import (
    KeyEnv,
    Model,
    Question,
    Schema,
    Server,
    caption_client,
    check_positive,
    check_served,
    note_embedded,
)
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import read_rows
from pdlm_hf.render.text import pluralize

from .terminal import progress, show_table

SHAPES = "shapes"


@exit_on_error("pdlm-eval")
def attributes(
    context: typer.Context,
    labels: Annotated[
        str, typer.Argument(help="Table with image, x, y, width, height and a column per attribute; or shapes.")
    ],
    out: Annotated[Path, typer.Option(help="ANSWERS.jsonl; a stopped run is resumed from it.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder of the images; default: that of the table.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="Column that is an attribute; default: all. Repeatable.")
    ] = None,
    schema: Schema = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Sentence with a {name} place for every attribute. Repeatable.")
    ] = None,
    jointly: Annotated[bool | None, typer.Option("--jointly", help="As in pdlm attributes.")] = None,
    calibrate: Annotated[bool | None, typer.Option("--calibrate", help="As in pdlm attributes.")] = None,
    unknown_below: Annotated[float | None, typer.Option(help="As in pdlm attributes.")] = None,
    seed: Annotated[int | None, typer.Option(help="shapes: seed of the images; default: 11.")] = None,
    count: Annotated[int | None, typer.Option(help="shapes: number of images; default: 300.")] = None,
    model: Model = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    server: Server = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    key_env: KeyEnv = None,
    question: Question = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score attributes on labelled regions: accuracy, calibration and confusions; the same command resumes a run."""
    from pdlm_hf.attributes.schema import parse_schema, read_schema_file
    from pdlm_hf.batch.run import BatchFiles, run_batch
    from pdlm_hf.batch.tables import attributes_fault

    from .attribute_scores import score_rows, tables_of
    from .labels import labelled_shapes, read_labels

    numbers = {"--batch-size": batch_size, "--concurrency": concurrency, "--count": count}
    check_positive({option: number for option, number in numbers.items() if number is not None})
    check_served(context, server)
    if labels == SHAPES:
        for option, value in (("--images", images), ("--attribute", attribute), ("--schema", schema)):
            if value is not None:
                raise SettingError(f"{option}: not for shapes, whose images and attributes are drawn.")
        found = labelled_shapes(11 if seed is None else seed, count or 300)
    else:
        for option, number in (("--seed", seed), ("--count", count)):
            if number is not None:
                raise SettingError(f"{option}: is about drawn images; for {SHAPES} only.")
        given = None if schema is None else read_schema_file(schema)
        found = read_labels(Path(labels), images, attribute or (), given)
    how: dict[str, Any] = {"template": template or None, "jointly": jointly, "calibrate": calibrate}
    asked = parse_schema(found.schema, **how, unknown_below=unknown_below)
    client = None
    if server is None:
        note_embedded(model, program="pdlm-eval")
    else:
        settings = {} if question is None else {"question": question}
        client = caption_client(server, model, key_env, concurrency, settings, asked)
    name = str(model or "shapes (embedded)") if client is None else client.model
    kept = {"benchmark": found.name, "fingerprint": found.fingerprint, "model": name, "question": question}
    files = BatchFiles(out, kept | {"schema": asked.to_text()}, row_fault=attributes_fault(asked.attributes))
    with progress("images") as show:
        run_batch(
            found.data,
            lambda: make_engine(client, model, False, batch_size, question, {}, asked),
            files,
            progress=lambda done, _: show(done, len(found.data.entries)),
        )
    scores = score_rows(found, read_rows(out)) | {"model": name, "schema": asked.to_json()}
    if as_json:
        typer.echo(json.dumps(scores))
    else:
        show_table(tables_of(scores))
    if scores["n_missing"]:
        missing = pluralize(scores["n_missing"], "region")
        raise fail("pdlm-eval", f"no answer about {missing}, which count as wrong; {files.faults_path} says why", 1)
