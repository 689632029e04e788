"""`pdlm batch` and `pdlm report`: caption a data set, and look at the captions."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors_pdlm import MissingPackageError, SettingError
from .finding import (
    DetectorName,
    Everything,
    Find,
    MaxRegions,
    Parts,
    SegmenterDevice,
    SegmenterName,
    Select,
    default_segmenter,
    is_asked,
    open_finder,
    read_settings,
)
from .options import (
    Fast,
    Format,
    KeyEnv,
    Length,
    Model,
    Question,
    Schema,
    Server,
    Steps,
    caption_client,
    check_captioner,
    check_positive,
    check_served,
    exit_on_error,
    is_given,
    load,
    load_captioner,
    note_embedded,
)

_SHOWN = 20  # messages about damaged lines


@exit_on_error
def batch(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(help="COCO file; folder with regions named like the images; or of images to find them in."),
    ],
    out: Annotated[Path, typer.Option(help="OUT.jsonl: one row per region.", show_default=False)],
    images: Annotated[str | None, typer.Option(help="Folder of the images; default: where DATA is.")] = None,
    format: Format = None,
    everything: Everything = False,
    find: Find = None,
    segmenter: SegmenterName = None,
    detector: DetectorName = None,
    segmenter_device: SegmenterDevice = None,
    parts: Parts = False,
    max_regions: MaxRegions = None,
    select: Select = None,
    model: Model = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a cluster, with images also in object storage (s3://...).")
    ] = "local",
    workers: Annotated[int | None, typer.Option(help="Captioners of the cluster; default: one per GPU.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only the i-th of n parts, to OUT.i-of-n.jsonl.")] = None,
    server: Server = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    key_env: KeyEnv = None,
    max_new_tokens: Length = 32,
    steps: Steps = 32,
    question: Question = None,
    fast: Fast = False,
    schema: Schema = None,
) -> None:
    """Describe every region of a data set, or of images whose regions are found first; the same command continues
    after any stop."""
    from ..attributes.schema import read_schema_file
    from ..batch.dataset import open_data
    from ..batch.run import BatchFiles, BatchProgress, parse_shard, run_batch
    from ..batch.tables import attributes_fault, check_table, write_table

    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps}
    check_positive({"--max-new-tokens": max_new_tokens, "--steps": steps, "--batch-size": batch_size})
    check_positive({"--concurrency": concurrency} | ({} if workers is None else {"--workers": workers}))
    part = parse_shard(shard)
    _check_engine(engine, workers, server, images)
    check_served(context, server)
    checked = None if schema is None else read_schema_file(schema)
    if checked is not None:
        generation = {}
        _check_schema_alone(context)
    if server is not None and fast:
        raise SettingError("--server: --fast is not served; leave it out.")
    embedded = model is None and server is None
    options = everything, find, segmenter, detector, segmenter_device, parts, max_regions, select, embedded
    finding = _finding(options, shard, images, format)
    found = None if finding else open_data(data.absolute(), images, format)
    asked = None
    if server is not None:
        settings = generation if question is None else {**generation, "question": question}
        asked = caption_client(server, model, key_env, concurrency, settings, checked)
    name = str(model or "shapes (embedded)") if asked is None else asked.model
    kept = {"model": name, "question": question, "fast": fast, "format": format, **generation, **finding}
    if checked is None:
        files = BatchFiles(out, kept, part, source=data)
    else:
        kept["schema"] = checked.to_text()
        check_table(out)
        files = BatchFiles(out, kept, part, attributes_fault(checked.attributes), data)
    _show_damaged(files.damaged)

    def open_engine():
        if engine == "ray":
            return _ray_engine(model, fast, batch_size, question, generation, checked, workers, images)
        return make_engine(asked, model, fast, batch_size, question, generation, checked)

    if asked is None:
        note_embedded(model)
    if found is None:

        def ready_finder():  # what would fail after hours of finding regions fails now
            if asked is None:
                check_captioner(model, checked)
            return open_finder(*options)

        found = _find_regions(data.absolute(), ready_finder, finding, files)
        _say_where_nothing_is(found.coco)
    with BatchProgress(len(found.entries[part[0] - 1 :: part[1]] if part else found.entries)) as progress:
        counts = run_batch(found, open_engine, files, part, progress)
    if checked is not None:
        write_table(files.out, checked.attributes)
    typer.echo(f"{counts}. Rows: {files.out}", err=True)
    if not counts.whole:
        typer.echo(f"pdlm: not every region has a caption; {files.faults_path} says why", err=True)
        raise typer.Exit(1)


def _finding(options: tuple, shard: str | None, images: str | None, format: str | None) -> dict[str, Any]:
    """What the found regions depend on; nothing where none are to be found.

    Raises:
        SettingError: options exclude each other.
    """
    everything, names, segmenter, detector, _, parts, max_regions, select, embedded = options
    if not is_asked(everything, names, detector):
        open_finder(*options)  # says which option is of no use
        return {}
    for option, value in (("--shard", shard), ("--images", images), ("--format", format)):
        if value is not None:
            raise SettingError(f"{option}: not where regions are found; give the folder of the images as DATA.")
    source = {"find": names or None, "segmenter": default_segmenter(segmenter, detector, embedded)}
    return source | {"detector": detector} | read_settings(parts, max_regions, select).model_dump()


def _find_regions(folder: Path, ready_finder: Any, settings: dict[str, Any], files: Any) -> Any:
    """The data set of the regions that are found in a folder of images."""
    from rich.console import Console
    from rich.progress import Progress

    from ..batch.found import find_data

    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("finding regions", total=None)
            return find_data(
                folder,
                ready_finder,
                settings,
                files.out,
                lambda done, of: bar.update(task, completed=done, total=of),
                files.rows,
            )
    except BaseException:
        files.close()
        raise


def _say_where_nothing_is(coco: dict[str, Any]) -> None:
    """Name on stderr how many images no regions were found in."""
    used = {annotation["image_id"] for annotation in coco["annotations"]}
    if empty := [image["file_name"] for image in coco["images"] if image["id"] not in used]:
        count = f"{len(empty)} of {len(coco['images'])} images"
        typer.echo(f"pdlm: nothing was found in {count}, {empty[0]} for example; see --select", err=True)


def _show_damaged(messages: list[str]) -> None:
    """Name the first damaged lines of results on stderr, and their number if there are more."""
    for message in messages[:_SHOWN]:
        typer.echo(f"pdlm: {message}", err=True)
    if (more := len(messages) - _SHOWN) > 0:
        typer.echo(f"pdlm: and {more} more damaged lines", err=True)


def _check_schema_alone(context: typer.Context) -> None:
    """Raises: SettingError: an option of captions is given, where attributes are read."""
    for option in ("max_new_tokens", "steps", "fast"):
        if is_given(context, option):
            raise SettingError(f"--{option.replace('_', '-')} is for captions; with --schema leave it out.")


def make_engine(client, model, fast, batch_size, question, generation, schema=None):
    """The engine that writes the captions of a data set, in this process or through a server."""
    from ..batch.engines import LocalEngine
    from ..batch.server_engine import ServerEngine

    if client is not None:
        return ServerEngine(client)
    captioner = load_captioner(model, fast)
    if schema is not None:
        from ..captioning.attributes import SchemaCaptioner

        captioner = SchemaCaptioner(captioner, schema)
    return LocalEngine(captioner, batch_size, question, **generation)


def _check_engine(engine: str, workers: int | None, server: str | None, images: str | None) -> None:
    """Raises: SettingError for options that exclude each other, MissingPackageError if Ray is not installed."""
    from ..batch.dataset import is_url
    from ..client.server import public_url

    if engine not in ("local", "ray"):
        raise SettingError(f"--engine {engine}: expected local or ray.")
    if engine == "ray":
        if server is not None:
            raise SettingError("--engine ray and --server exclude each other: give one of them.")
        if not all(map(find_spec, ("ray", "pyarrow"))):
            raise MissingPackageError("Ray", "ray")
    elif workers is not None:
        raise SettingError("--workers is for --engine ray; give that too.")
    elif is_url(images):
        raise SettingError(f"--images {public_url(images)}: object storage is read by --engine ray only.")


def _ray_engine(model, fast, batch_size, question, generation, schema, workers, images) -> Any:
    """The engine that writes the captions of a data set on a Ray cluster."""
    from ..batch.dataset import is_url
    from ..batch.ray_engine import CaptionerSettings, RayEngine

    def build(model):
        settings = CaptionerSettings(model, "fast" if fast else "default", batch_size, question, generation, schema)
        return RayEngine(settings, workers, images if is_url(images) else None)

    return load(build, model)


@exit_on_error
def report(
    rows: Annotated[Path, typer.Argument(help="OUT.jsonl of pdlm batch.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Page to write, .html; or a contact sheet, .png.", show_default=False)],
    limit: Annotated[
        int | None, typer.Option(help="Number of images, lowest scores first; default: 500, on a contact sheet 48.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page; default: the name of ROWS.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels of the longer side of an image in the page.")] = 640,
) -> None:
    """Show the captions: one page to search, filter and sort, or a contact sheet."""
    from ..render.drawing import check_target
    from ..render.report import write_report
    from ..render.text import pluralize

    check_positive({"--image-size": image_size})
    if out.suffix.lower() != ".html":
        check_target(out, "--out")
    damaged: dict[int, str] = {}
    shown, total, unread = write_report(rows, images, out, limit, damaged.__setitem__, title, image_size)
    _show_damaged([f"{rows}: line {number} {fault}; left out." for number, fault in damaged.items()])
    typer.echo(f"{out}: {shown} of {total} images", err=True)
    if unread:
        typer.echo(f"pdlm: {pluralize(len(unread), 'image')} cannot be read: {unread[0]}", err=True)
    if unread or damaged:
        raise typer.Exit(1)


@exit_on_error
def convert(
    rows: Annotated[Path, typer.Argument(help="OUT.jsonl of pdlm batch.")],
    out: Annotated[Path, typer.Argument(help="File to write: .json for Label Studio, .xml for CVAT; or a folder.")],
    form: Annotated[str, typer.Option("--to", help="label-studio, cvat or fiftyone.", show_default=False)],
    address: Annotated[
        str | None,
        typer.Option(help="Label Studio: address of the images, before their names; default: its local files."),
    ] = None,
) -> None:
    """Write captions or attributes for an annotation tool, in which a person corrects them.

    `pdlm-peft convert` reads them again.
    """
    from ..regions.exports import LOCAL_FILES, export_captions
    from ..render.text import pluralize

    if address is not None and form != "label-studio":
        raise SettingError("--address is for --to label-studio; leave it out.")
    damaged: dict[int, str] = {}
    images, regions, files = export_captions(rows, out, form, address or LOCAL_FILES, damaged.__setitem__)
    _show_damaged([f"{rows}: line {number} {fault}; left out." for number, fault in damaged.items()])
    counts = f"{pluralize(images, 'image')}, {pluralize(regions, 'region')}"
    typer.echo(f"{counts}: {', '.join(map(str, files))}", err=True)
    if damaged:
        raise typer.Exit(1)
