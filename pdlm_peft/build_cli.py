"""The commands `pdlm-peft build caption | check | remask | filter`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdlm_hf.cli.options import is_given
from pdlm_hf.client.chat import ChatClient
from pdlm_hf.client.server import key_in, public_url
from pdlm_hf.errors_pdlm import SettingError

from .options import Data, Images, exit_on_error, fail

if TYPE_CHECKING:
    from .build import Decide

app = typer.Typer(
    help="Build captioned region data in steps, each of which reads rows and writes rows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Argument(help="JSONL file to write; the same command resumes a step that was stopped.")]
Server = Annotated[str, typer.Option(help="Address of an OpenAI-compatible server, with /v1.", show_default=False)]
ServerModel = Annotated[str, typer.Option(help="Name of the model on the server.", show_default=False)]
KeyEnv = Annotated[str | None, typer.Option(help="Environment variable with the API key of the server.")]
Concurrency = Annotated[int, typer.Option(help="Number of simultaneous requests.")]
Retries = Annotated[int, typer.Option(help="Number of further attempts if a request fails.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for a reply.")]
MaxTokens = Annotated[int, typer.Option(help="Largest number of tokens in a reply.")]


def _server(out: Path, url: str, model: str, key_env: str | None, settings: dict, **options: Any) -> ChatClient:
    """A client of the server, which caches replies beside `out`.

    Raises:
        SettingError: the environment variable of the key is not set.
    """
    key = key_in(key_env)
    return ChatClient(model, url, key, settings, cache=out.with_suffix(".replies.sqlite"), **options)


def _run(
    data: str,
    images: Path | None,
    out: Path,
    step: Callable[[], "Decide"],
    settings: dict[str, Any],
    captions: bool = True,
    writes: Collection[str] = (),
    adds: Collection[str] = (),
) -> None:
    """Make a step, once data and file are known to be right, run it and print its counts.

    Exit code 1 if some regions could not be decided.
    """
    from .build import StepRun, run_step
    from .sources import find_source

    source = find_source(data, images)
    if source.path is not None and source.path.resolve() == out.resolve():
        raise SettingError(f"{out}: the step would read the file that it writes; choose another file.")
    counts = run_step(source, StepRun(out, settings, writes, adds), step(), captions)
    known = ("kept", "dropped", "failed", "before")
    reasons = ", ".join(f"{count} {name}" for name, count in counts.most_common() if name not in known)
    before = f", {counts['before']} decided by an earlier run" * bool(counts["before"])
    typer.echo(
        f"{out}: {counts['kept']} regions kept, {counts['dropped']} dropped{f' ({reasons})' * bool(reasons)}{before}"
    )
    if counts["failed"]:
        raise fail(f"{counts['failed']} regions could not be decided; run the same command to try again.", 1)


@app.command()
@exit_on_error
def caption(
    context: typer.Context,
    data: Data,
    out: Out,
    server: Server,
    server_model: ServerModel,
    images: Images = None,
    server_style: Annotated[
        str, typer.Option(help="crops (any model), or regions (a server with the region route).")
    ] = "crops",
    prompt: Annotated[str | None, typer.Option(help="Question; default: one for the style.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Also caption regions that have a caption.")] = False,
    max_tokens: MaxTokens = 512,
    api_key_env: KeyEnv = None,
    concurrency: Concurrency = 8,
    retries: Retries = 4,
    timeout: Timeout = 300.0,
) -> None:
    """Caption regions by a vision-language model on a server."""
    from pdlm_hf.prompts_pdlm import DEFAULT_QUESTION
    from pdlm_hf.regions.crops import CROPS_PROMPT

    from .build_steps import caption_step

    if server_style == "regions" and is_given(context, "max_tokens"):
        raise SettingError(
            "--max-tokens: a server with the region route sets the length of its captions; leave it out."
        )
    question = prompt or (CROPS_PROMPT if server_style == "crops" else DEFAULT_QUESTION)
    request = {"temperature": 0, "max_tokens": max_tokens} if server_style == "crops" else {}
    options = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    client = _server(out, server, server_model, api_key_env, request, **options)
    step = caption_step(client, question, server_style, replace)
    server_settings = {"server": public_url(server), "model": server_model, "style": server_style, **request}
    settings = {"step": "caption", **server_settings, "prompt": question, "replace": replace}
    _run(
        data,
        images,
        out,
        lambda: step,
        settings,
        captions=False,
        writes=["caption"] if replace else (),
        adds=["caption"],
    )


@app.command()
@exit_on_error
def check(
    data: Data,
    out: Out,
    server: Server,
    server_model: ServerModel,
    images: Images = None,
    max_tokens: MaxTokens = 2048,
    api_key_env: KeyEnv = None,
    concurrency: Concurrency = 16,
    retries: Retries = 4,
    timeout: Timeout = 120.0,
) -> None:
    """Drop regions whose caption does not agree with their `category`, according to a language model on a server."""
    from .build_steps import check_step

    request = {"temperature": 0, "max_tokens": max_tokens}
    options = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    client = _server(out, server, server_model, api_key_env, request, **options)
    settings = {"step": "check", "server": public_url(server), "model": server_model, **request}
    _run(data, images, out, lambda: check_step(client), settings)


@app.command()
@exit_on_error
def remask(
    data: Data,
    out: Out,
    sam: Annotated[str, typer.Option(help="Folder or hub id of a SAM model for transformers.", show_default=False)],
    images: Images = None,
    min_iou: Annotated[
        float, typer.Option(min=0, max=1, help="Least intersection over union of the two masks.")
    ] = 0.5,
    replace: Annotated[bool, typer.Option("--replace", help="Write SAM's mask instead of the region's own.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
) -> None:
    """Drop regions whose mask does not agree with the one that SAM finds in its box."""
    from pdlm_hf.regions.sam import Segmenter

    from .build_steps import remask_step

    def step() -> "Decide":
        return remask_step(Segmenter.from_pretrained(sam, device), min_iou, replace)

    settings = {"step": "remask", "sam": sam, "min_iou": min_iou, "replace": replace}
    _run(data, images, out, step, settings, captions=False, writes=["segmentation"] if replace else ())


@app.command("filter")
@exit_on_error
def filter_captions(
    data: Data,
    out: Out,
    images: Images = None,
    min_words: Annotated[int, typer.Option(help="A shorter caption is dropped.")] = 3,
    max_words: Annotated[int, typer.Option(help="A longer caption is dropped.")] = 200,
    max_repetition: Annotated[float, typer.Option(help="Largest share of repeated groups of three words.")] = 0.2,
) -> None:
    """Drop regions whose caption is too short, too long or repetitive."""
    from .build_steps import filter_step

    step = filter_step(min_words, max_words, max_repetition)
    settings = {"min_words": min_words, "max_words": max_words, "max_repetition": max_repetition}
    _run(data, images, out, lambda: step, {"step": "filter", **settings})
