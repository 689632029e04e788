"""The command `pdlm`."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from ..bench.decode import decode
from ..errors_pdlm import MissingPackageError
from ..render.text import pluralize
from . import errors

app = typer.Typer(
    help="PerceptionDLM: captions for many regions of a picture, written together.", no_args_is_help=True
)
errors.add_version(app, "pdlm")

_fail = partial(errors.fail, "pdlm")
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
bench.command()(decode)
bench.callback()(lambda: None)  # keeps `decode` a subcommand
app.add_typer(bench, name="bench")


def _box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise ValueError(f"--box {text}: expected X,Y,WIDTH,HEIGHT in pixels, for example --box 10,20,100,80.")
    return numbers


@app.command()
def caption(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    mask: Annotated[
        list[Path] | None, typer.Option(help="Mask picture of a region, white inside. Repeatable.")
    ] = None,
    box: Annotated[list[str] | None, typer.Option(help="Box X,Y,WIDTH,HEIGHT in pixels. Repeatable.")] = None,
    regions: Annotated[Path | None, typer.Option(help="COCO, JSON list, LabelMe, YOLO .txt, label map .png.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Slots per caption.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps at most.")] = 32,
    question: Annotated[str | None, typer.Option(help="Instead of the default question.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Commit what is certain early: fewer passes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Write a picture of the regions with their captions.")] = None,
    watch: Annotated[bool, typer.Option(help="Show the captions sharpen, step by step.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write that as a page (.html) or a .gif.")] = None,
) -> None:
    """Describe regions of a picture: masks, boxes, or a file of them."""
    from ..regions.images import load_image
    from ..regions.readers import read_region_file
    from ..regions.region import parse_regions
    from ..render.drawing import check_target, save_drawing
    from ..render.recording import check_recording, save_recording

    try:  # everything the user can get wrong, before the model is loaded
        values = [*(mask or []), *(_box(text) for text in box or [])]
        if not values and regions is None:
            raise ValueError("No regions: give --mask, --box or --regions.")
        picture = load_image(image)
        if regions is not None:
            values += read_region_file(regions, image.name, *picture.size)
        found = parse_regions(values, *picture.size)
        if record is not None:
            check_recording(record)
        if draw is not None:
            check_target(draw)
        settings = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps}
        found_captions, report, drafts = _run(picture, found, model, question, watch, record, fast, settings)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from None
    rows = [{"id": c.id, "caption": c.text, "score": round(c.score, 4), "bbox": c.bbox} for c in found_captions]
    if as_json:
        typer.echo(json.dumps({"model": report.pop("model"), "image": str(image), "regions": rows} | report))
    else:
        for number, row in enumerate(rows, 1):
            typer.echo(f"{number}  {' '.join(row['caption'].split())}  ({row['score']:.2f})")
        passes = pluralize(report["num_forwards"], "forward pass", "es")
        typer.echo(
            f"{pluralize(len(rows), 'caption')} in {passes}, "
            f"{report['tokens_per_forward']:.1f} tokens a pass, {report['seconds']:.2f} s",
            err=True,
        )
    try:  # last: what was computed is printed, whatever happens to the files
        if draw is not None:
            save_drawing(draw, picture, found, found_captions)
            typer.echo(f"drawn to {draw}", err=True)
        if record is not None:
            save_recording(record, picture, found, drafts)
            typer.echo(f"recorded to {record}", err=True)
    except OSError as error:
        raise _fail(error) from None
    if not all(row["caption"] for row in rows):
        typer.echo("pdlm: a region got no caption", err=True)
        raise typer.Exit(1)


@app.command()
def batch(
    data: Annotated[Path, typer.Argument(help="COCO file, or folder with regions named like the pictures.")],
    out: Annotated[Path, typer.Option(help="OUT.jsonl: one row a region.", show_default=False)],
    images: Annotated[str | None, typer.Option(help="Folder of the pictures; default: where DATA is.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a forward.")] = 8,
    engine: Annotated[str, typer.Option(help="local; or ray: a cluster, and --images may be s3://... too.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Captioners of the cluster; default: one a GPU.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only the i-th of n parts, to OUT.i-of-n.jsonl.")] = None,
    server: Annotated[str | None, typer.Option(help="Ask this server of ours; --model: a name it has.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Slots per caption.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps at most.")] = 32,
    question: Annotated[str | None, typer.Option(help="Instead of the default question.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Commit what is certain early: fewer passes.")] = False,
) -> None:
    """Describe every region of a data set; the same command goes on after any stop."""
    from ..batch.dataset import open_data
    from ..batch.run import BatchFiles, BatchProgress, parse_shard, run_batch
    from ..errors_pdlm import ServerError
    from ..generation_pdlm import PdlmGenerationConfig

    generation = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps}
    try:
        part = parse_shard(shard)
        PdlmGenerationConfig(**generation)  # says what is out of range
        if batch_size < 1:
            raise ValueError(f"--batch-size must be positive, got {batch_size}.")
        _check_engine(engine, workers, server, images)
        if server is not None and fast:
            raise ValueError("--server: --fast is not served; leave it out.")
        found = open_data(data.absolute(), images)
        asked = None if server is None else _region_server(server, model, key_env, concurrency, question, generation)
        name = str(model or "shapes (embedded)") if asked is None else asked.model
        files = BatchFiles(out, {"model": name, "question": question, "fast": fast, **generation}, part)

        def open_engine():
            if engine == "ray":
                return _ray_engine(model, fast, batch_size, question, generation, workers, images)
            return _engine(asked, model, fast, batch_size, question, generation)

        with BatchProgress(len(found.entries[part[0] - 1 :: part[1]] if part else found.entries)) as progress:
            counts = run_batch(found, open_engine, files, part, progress)
    except (ValueError, OSError, ImportError, ServerError) as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        typer.echo("pdlm: stopped. What is done is kept; the same command goes on.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{counts}. Rows: {files.out}", err=True)
    if not counts.whole:
        typer.echo(f"pdlm: not every region has a caption; {files.faults_path} says why", err=True)
        raise typer.Exit(1)


def _region_server(url, model, key_env, concurrency, question, generation):
    """A server of ours. Raises: ServerError if it cannot be reached."""
    from ..client.captions import CaptionClient
    from ..client.chat import key_in

    settings = generation if question is None else {**generation, "question": question}
    return CaptionClient(url, model, api_key=key_in(key_env), settings=settings, concurrency=concurrency)


def _engine(server, model, fast, batch_size, question, generation):
    """What writes the captions of a data set."""
    from ..batch.engines import LocalEngine
    from ..batch.server_engine import ServerEngine

    if server is not None:
        return ServerEngine(server)
    return LocalEngine(_captioner(model, fast), batch_size, question, **generation)


def _check_engine(engine, workers, server, images):
    """Raises: ValueError for options that do not go together, ImportError if Ray is not there."""
    from ..batch.dataset import is_url
    from ..client.chat import public_url

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine {engine}: there are local and ray.")
    if engine == "ray":
        if server is not None:
            raise ValueError("--engine ray and --server: give one of them.")
        if workers is not None and workers < 1:
            raise ValueError(f"--workers must be positive, got {workers}.")
        if not all(map(find_spec, ("ray", "pyarrow"))):
            raise MissingPackageError("Ray", "ray")
    elif workers is not None:
        raise ValueError("--workers: of --engine ray; give that too.")
    elif is_url(images):
        raise ValueError(f"--images {public_url(images)}: from object storage with --engine ray only.")


def _ray_engine(model, fast, batch_size, question, generation, workers, images):
    """What writes the captions of a data set on a Ray cluster."""
    from ..batch.dataset import is_url
    from ..batch.ray_engine import CaptionerSettings, RayEngine

    def build(model):
        settings = CaptionerSettings(model, "fast" if fast else "default", batch_size, question, generation)
        return RayEngine(settings, workers, images if is_url(images) else None)

    return _load(build, model)


def _load(read: Callable, model: str | None, *args: Any, **kwargs: Any):
    """Load a checkpoint. Raises: ValueError, whatever a damaged one made the readers raise."""
    try:
        return read(model, *args, **kwargs)
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{model}: the checkpoint cannot be loaded, it may be damaged ({reason[0]}).") from error


def _captioner(model: str | None, fast: bool):
    """A captioner from a checkpoint, without transformers' own progress bar."""
    from transformers.utils.logging import disable_progress_bar

    from ..captioning.captioner import RegionCaptioner

    disable_progress_bar()
    return _load(RegionCaptioner.from_pretrained, model, mode="fast" if fast else "default")


def _run(picture, found, model, question, watch, record, fast, settings):
    """Load the model and caption. Returns: captions, what they cost, and the drafts of every step."""
    from ..captioning.streaming import LiveView, RegionStreamer

    captioner = _captioner(model, fast)
    streamer = RegionStreamer(captioner.processor) if watch or record else None
    start = time.perf_counter()
    with ExitStack() as stack:
        if streamer is not None and watch:
            names = [str(region.id) for region in found]
            streamer.on_step = stack.enter_context(LiveView(names, Console(stderr=True))).show
        captions, output = captioner.generate([(picture, found)], question, streamer=streamer, **settings)
    report = {
        "model": model or "shapes (embedded)",
        "num_forwards": output.num_forwards,
        "tokens_per_forward": round(output.tokens_per_forward, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return captions[0], report, [step[0] for step in streamer.steps] if streamer is not None and record else []


@app.command()
def report(
    rows: Annotated[Path, typer.Argument(help="OUT.jsonl of pdlm batch.")],
    images: Annotated[Path, typer.Option(help="Folder of the pictures.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Page to write, .html; or a contact sheet, .png.", show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Pictures, lowest scores first; default 500, sheets 48.")] = None,
) -> None:
    """Show what was captioned: one page to search and sort, or a contact sheet."""
    from ..render.drawing import check_target
    from ..render.report import write_report

    try:
        if out.suffix.lower() != ".html":
            check_target(out, "--out")
        shown, there, unread = write_report(rows, images, out, limit)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    typer.echo(f"{out}: {shown} of {there} pictures", err=True)
    if unread:
        raise _fail(f"{pluralize(len(unread), 'picture')} cannot be read: {unread[0]}", 1)


@app.command()
def chat(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Slots; default: the checkpoint's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: one per slot.")] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Answer block by block; 1 = autoregressive order. Default: one block.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask about a whole picture."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    from ..captioning.captioner import checkpoint_name
    from ..captioning.checkpoints import BASE_CHECKPOINT
    from ..regions.images import load_image

    disable_progress_bar()
    settings = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps, "block_length": block_length}
    settings = {name: value for name, value in settings.items() if value is not None}
    try:  # the picture first: the model takes longer
        picture, path = load_image(image), checkpoint_name(model or BASE_CHECKPOINT)
        processor = _load(AutoProcessor.from_pretrained, path)
        network = _load(AutoModelForImageTextToText.from_pretrained, path, dtype="auto").eval()
        network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        inputs = processor(images=picture, text=question).to(network.device)
        start = time.perf_counter()
        output = network.generate(**inputs, **settings, return_dict_in_generate=True)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from None
    answer = processor.post_process_answers(output.sequences)[0]
    report = {"num_forwards": output.num_forwards, "seconds": round(time.perf_counter() - start, 3)}
    if as_json:
        name = model or "shapes base (embedded)"
        typer.echo(json.dumps({"model": name, "image": str(image), "question": question, "answer": answer} | report))
    else:
        typer.echo(answer)
        passes = pluralize(report["num_forwards"], "forward pass", "es")
        typer.echo(f"{passes}, {report['seconds']:.2f} s", err=True)
    if not answer:
        typer.echo("pdlm: no answer", err=True)
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")] = None,
    server: Annotated[str | None, typer.Option(help="Ask this server of ours; --model: a name it has.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")] = None,
    sam: Annotated[str | None, typer.Option(help="SAM 2, folder or hub id: regions by clicking.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: everybody in the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free one.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(help="Slots per caption.")] = 32,
) -> None:
    """Open a page: mark regions of a picture, press once, watch all captions emerge."""
    from ..errors_pdlm import ServerError
    from ..generation_pdlm import PdlmGenerationConfig

    try:
        PdlmGenerationConfig(max_new_tokens=max_new_tokens)
        try:
            from ..demo.page import build_page, serve
        except ImportError as error:
            raise MissingPackageError(f"Gradio ({error})", "demo") from error
        writer, threshold = _writer(server, model, key_env, max_new_tokens)
        segmenter = None if sam is None else _segmenter(sam)
        serve(
            build_page(writer, segmenter, threshold), host, port, lambda url: typer.echo(f"Open {url} (Ctrl-C ends)")
        )
    except (ValueError, OSError, ImportError, ServerError) as error:
        raise _fail(error) from None
    except KeyboardInterrupt:  # how it is ended
        pass


def _writer(server, model, key_env, max_new_tokens):
    """What writes the captions of the page, and the threshold it starts with, if any."""
    from ..demo.backend import LocalBackend, ServerBackend

    if server is not None:
        return ServerBackend(_region_server(server, model, key_env, 8, None, {}), max_new_tokens), None
    captioner = _captioner(model, fast=False)
    writer = LocalBackend(captioner, model or "shapes (embedded)", max_new_tokens)
    return writer, captioner.model.generation_config.acceptance_threshold


def _segmenter(path):
    """SAM 2 for clicks. Raises: ValueError."""
    from ..regions.sam import Segmenter

    return _load(Segmenter.from_pretrained, path)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, ours or the reference's.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
) -> None:
    """Write a self-contained checkpoint folder with its code (trust_remote_code)."""
    from ..captioning.export import export_checkpoint

    try:
        files = _load(export_checkpoint, model, out)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    typer.echo(f"{out}: {', '.join(files)}")


if __name__ == "__main__":
    app()
