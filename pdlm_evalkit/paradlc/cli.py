"""The commands `pdlm-eval paradlc caption | judge | score | report`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pdlm_hf.cli.errors import exit_on_error
from pdlm_hf.cli.options import check_positive, is_given, note_embedded
from pdlm_hf.client import ChatClient, key_in, public_url
from pdlm_hf.errors_pdlm import DataError, ServerError, SettingError
from pdlm_hf.regions.files import FileLock, load_json, replacing, write_json

from ..manifests import describe_model
from ..terminal import progress
from .data import check_images, load_benchmark, load_questions, read_captions

app = typer.Typer(
    help="ParaDLC-Bench and DLC-Bench: caption the masks, ask a judge, score, and report.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Annotations = Annotated[
    Path, typer.Option(help="Folder with annotations.json, qa.json and class_names.json.", show_default=False)
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images; default: images in the annotations.")]
Form = Annotated[str | None, typer.Option("--benchmark", help="paradlc or dlc; default: by the form of the files.")]
Reader = Annotated[str, typer.Option("--parser", help="Parser of the replies: robust or reference.")]
KeyEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")]
Extra = Annotated[
    list[str] | None,
    typer.Option("--setting", help="NAME=JSON: a field of every request; null removes a field."),
]
Retries = Annotated[int, typer.Option(help="Further attempts for a request.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the server.")]


# Options of `caption` that only some sources of captions have; those of `generate` are for all but a file.
_OF_SERVER = ("server_style", "api_key_env", "setting", "concurrency", "retries", "timeout")
_OF_MODEL = ("device", "dtype", "batch_size")
_OF_FILE = ("allow_missing",)
_OF_REGIONS = (
    *("steps", "fast", "acceptance_threshold", "entropy_bound", "prefix_refresh_interval", "temperature"),
    *("remasking", "seed", "masks_per_pass"),
)
_MADE = ("prompt", "max_new_tokens", *_OF_REGIONS)


def _check_options(context: typer.Context, server: str | None, style: str, captions: Path | None) -> None:
    """Raises: SettingError: an option is given that this source of captions does not have."""
    unused: dict[str, str] = {}
    if server is None:
        unused |= dict.fromkeys(_OF_SERVER, "is about a server; give --server, or leave it out.")
    elif style == "crops":
        reason = "is not sent with --server-style crops; leave it out, or give --setting NAME=JSON."
        unused |= dict.fromkeys(_OF_REGIONS, reason)
    if server is not None or captions is not None:
        unused |= dict.fromkeys(_OF_MODEL, "is about a model in this process; leave it out.")
    if captions is None:
        unused |= dict.fromkeys(_OF_FILE, "is about captions of a file; give --captions, or leave it out.")
    else:
        reason = "is about captions that are made, not about those of a file; leave it out."
        unused |= dict.fromkeys(_MADE, reason)
    for option, reason in unused.items():
        if is_given(context, option):
            raise SettingError(f"--{option.replace('_', '-')}: {reason}")


def _settings(base: dict[str, Any], extra: list[str] | None) -> dict[str, Any]:
    """The fields of every request, with those given as NAME=JSON. Raises: SettingError: a text has another form."""
    settings = dict(base)
    for text in extra or []:
        name, equals, value = text.partition("=")
        try:
            if not name or not equals:
                raise SettingError
            settings[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise SettingError(f"--setting {text}: expected NAME=JSON, for example --setting temperature=0.") from None
    return {name: value for name, value in settings.items() if value is not None}


@app.command()
@exit_on_error("pdlm-eval")
def caption(
    context: typer.Context,
    annotations: Annotations,
    out: Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.", show_default=False)],
    images: Images = None,
    benchmark: Form = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Question; default: that of the reference.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token positions; default 32 (crops: 512).")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps at most.")] = 32,
    fast: Annotated[bool, typer.Option("--fast", help="Accept certain tokens early: fewer forward passes.")] = False,
    acceptance_threshold: Annotated[float | None, typer.Option(help="As in generate.")] = None,
    entropy_bound: Annotated[float | None, typer.Option(help="As in generate.")] = None,
    prefix_refresh_interval: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="As in generate; default 0, greedy.")] = None,
    remasking: Annotated[str | None, typer.Option(help="As in generate.")] = None,
    seed: Annotated[int | None, typer.Option(help="As in generate.")] = None,
    batch_size: Annotated[int, typer.Option(help="Passes in a batch.")] = 1,
    masks_per_pass: Annotated[
        int | None, typer.Option(help="Most masks in a pass; default: as trained, or 1.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    server: Annotated[str | None, typer.Option(help="OpenAI-compatible server, instead of --model.")] = None,
    server_model: Annotated[str | None, typer.Option(help="Name of the model at the server.")] = None,
    server_style: Annotated[str, typer.Option(help="regions: our server; crops: any other model.")] = "regions",
    api_key_env: KeyEnv = None,
    setting: Extra = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time; above 1, the seconds measure throughput.")] = 1,
    retries: Retries = 4,
    timeout: Timeout = 300.0,
    captions: Annotated[Path | None, typer.Option(help="Captions of another system: {mask_id: caption}.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="With --captions: masks may have none; they score 0.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model in reports.")] = None,
) -> None:
    """Caption a benchmark by our model or a server, or import the captions of another system."""
    from .captioning import MASKS_PER_PASS, Job, caption_into, locked

    if sum(value is not None for value in (model, server, captions)) > 1:
        raise SettingError("Give one of --model, --server and --captions.")
    if (server is None) != (server_model is None):
        raise SettingError("--server and --server-model go together.")
    if fast and server is not None:
        raise SettingError("--fast needs --model; for a server give settings, for example --acceptance-threshold.")
    check_positive({"--steps": steps, "--batch-size": batch_size, "--concurrency": concurrency})
    optional = {"--max-new-tokens": max_new_tokens, "--masks-per-pass": masks_per_pass}
    check_positive({option: value for option, value in optional.items() if value is not None})
    _check_options(context, server, server_style, captions)
    data = load_benchmark(annotations, images, benchmark)
    if captions is None:  # another system has seen the images
        check_images(data)
    generation = {
        "max_new_tokens": max_new_tokens or (512 if server and server_style == "crops" else 32),
        "max_denoising_steps": steps,
        "acceptance_threshold": acceptance_threshold,
        "entropy_bound": entropy_bound,
        "prefix_refresh_interval": prefix_refresh_interval,
        "temperature": temperature,
        "remasking": remasking,
        "seed": seed,
    }
    generation = {key: value for key, value in generation.items() if value is not None}
    job = Job(data, annotations, out, name, prompt, masks_per_pass or MASKS_PER_PASS[data.name], generation)
    failed: list[str] = []
    with locked(out):  # before a model is loaded
        if captions is not None:
            run, lines, described = _from_file(job, captions, allow_missing)
        elif server is not None and server_model is not None:  # always both
            options: dict[str, Any] = {"api_key": key_in(api_key_env), "concurrency": concurrency}
            options |= {"retries": retries, "timeout": timeout}
            run, lines, described = _from_server(job, server, server_model, server_style, setting, options, failed)
        else:
            run, lines, described = _from_model(job, model, "fast" if fast else "default", device, dtype, batch_size)
        with progress("captions") as show:
            caption_into(run, lines, show)
        record = run.finish(described)
    _say_captioned(out, record["totals"], len(data.order))
    if not record["finished"]:
        why = f"{len(failed)} requests failed: {failed[0]}" if failed else "not all masks have a caption."
        typer.echo(f"pdlm-eval: {why} Run the same command to try again.", err=True)
        raise typer.Exit(1)


def _from_file(job: Any, path: Path, allow_missing: bool) -> tuple:
    """The run, lines and description (none) of imported captions."""
    from .judging import captions_hash

    captions = read_captions(path, job.benchmark.order, allow_missing)
    settings = {"source": "file", "captions": captions_hash(captions), "allow_missing": allow_missing}
    run = job.run(settings | {"name": job.name or path.stem})
    return run, iter([] if run.lines else [{"captions": captions}]), {}


def _from_model(job: Any, model: str | None, mode: str, device: str | None, dtype: str, batch_size: int) -> tuple:
    """The run, lines and description of our model."""
    from . import captioning

    captioner = captioning.load_captioner(model, mode, device, dtype)
    trained = captioner.model.config.num_region_prompts
    limit = min(job.limit or trained, trained)
    prompt = job.prompt if job.prompt is not None else captioning.PROMPTS[job.benchmark.name]
    settings = {
        "name": job.name,
        "prompt": prompt,
        **job.generation,
        "batch_size": batch_size,
        "masks_per_pass": limit,
    }
    effective = captioning.effective(captioner, job.generation)
    run = job.run(captioning.model_settings(captioner, model, **settings), effective)
    passes = captioning.passes_of(job.benchmark, limit)
    note_embedded(model, program="pdlm-eval")
    lines = captioning.model_lines(captioner, passes, batch_size, prompt, job.generation, run)
    return run, lines, describe_model(captioner.model, model or "shapes (embedded)")


def _from_server(
    job: Any, url: str, model: str, style: str, extra: list[str] | None, options: dict[str, Any], failed: list[str]
) -> tuple:
    """The run, lines and description (unknown) of a server."""
    from pdlm_hf.regions.crops import CROPS_PROMPT

    from . import server as serving
    from .captioning import PROMPTS, passes_of

    if style not in serving.STYLES:
        raise SettingError(f"--server-style must be one of {', '.join(serving.STYLES)}, got {style!r}.")
    slots = job.generation["max_new_tokens"]
    if style == "crops":
        fields, limit, usual = {"temperature": 0, "max_tokens": slots}, 1, CROPS_PROMPT
    else:
        fields, usual = job.generation, PROMPTS[job.benchmark.name]
        limit = min(job.limit or serving.MAX_REGIONS, serving.MAX_REGIONS)
    fields = _settings(fields, extra)
    prompt = usual if job.prompt is None else job.prompt
    settings = {"source": "server", "style": style, "server": public_url(url), "model": model, "name": job.name}
    shape = {"prompt": prompt, "masks_per_pass": limit, "concurrency": options["concurrency"], **fields}
    run = job.run(settings | shape)
    client = ChatClient(model, url, settings=fields, **options)
    lines = serving.server_lines(client, style, passes_of(job.benchmark, limit), prompt, slots, run, failed)
    return run, lines, {}


def _say_captioned(out: Path, totals: dict[str, Any], masks: int) -> None:
    parts = [f"{out}: {totals['n_masks']} of {masks} masks captioned"]
    if totals["num_forwards"]:
        parts.append(
            f"{totals['num_forwards']} forward passes, {totals['tokens_per_forward']:.2f} tokens per pass "
            f"({totals['text_tokens_per_forward']:.2f} of them text)"
        )
    if totals["seconds"]:
        parts.append(f"{totals['seconds']:.1f} s, {totals['regions_per_second']:.1f} regions/s")
    typer.echo("; ".join(parts))


@app.command()
@exit_on_error("pdlm-eval")
def judge(
    captions: Annotated[Path, typer.Argument(help="Run folder, or file {mask_id: caption}.")],
    annotations: Annotations,
    judge: Annotated[
        str, typer.Option(help="gpt-5.2, gemini-3.1-pro, qwen3.5-27b, llama-3.1-8b, or a model's name at --base-url.")
    ],
    images: Images = None,
    benchmark: Form = None,
    base_url: Annotated[str | None, typer.Option(help="Address of the server, which ends in /v1.")] = None,
    api_key_env: KeyEnv = None,
    with_images: Annotated[
        bool | None,
        typer.Option("--with-images/--text-only", help="Whether the judge sees the region; default: ParaDLC-Bench."),
    ] = None,
    setting: Extra = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 10,
    retries: Retries = 4,
    timeout: Timeout = 120.0,
    cache: Annotated[Path | None, typer.Option(help="File of replies; default: beside the answers.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Stop after so many requests; run again to continue.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the answers; default: that of the captions.")] = None,
) -> None:
    """Ask a judge the questions of the benchmark; write answers.json and judge.json."""
    from . import judging

    preset = judging.preset_of(judge, base_url, api_key_env)
    key = key_in(preset.key_env)
    data = load_benchmark(annotations, images, benchmark)
    run = captions if captions.is_dir() else None
    path = captions if run is None else captions / "captions.json"
    if run is not None and not path.exists():
        raise DataError(f"{path}: no such file; run `pdlm-eval paradlc caption` to its end first.")
    texts = read_captions(path, data.order, allow_missing=True)
    if not texts:
        raise DataError(f"{path}: the file has no captions.")
    if missing := len(data.order) - len(texts):
        typer.echo(f"pdlm-eval: {missing} of {len(data.order)} masks have no caption; they score 0.", err=True)
    shown = data.name == "paradlc" if with_images is None else with_images
    if shown:
        check_images(data)
    folder = out or path.parent
    number = judging.count_requests(data, texts)
    with FileLock(folder / "answers.lock", folder / "answers.json", "give another --out"):
        client = ChatClient(
            preset.model,
            preset.base_url,
            key,
            _settings(preset.settings, setting),
            cache=cache or folder / "judge_cache.sqlite",
            concurrency=concurrency,
            retries=retries,
            timeout=timeout,
            max_calls=max_calls,
        )
        try:
            answers, counts = _ask(client, data, texts, shown, number)
            judging.write_answers(folder, run, judge, client, data, texts, shown, answers, counts)
        finally:
            client.close()
    typer.echo(
        f"{folder / 'answers.json'}: {number} questions; {counts['n_calls']} replies received, {counts['n_cached']} "
        f"from the cache, {counts['n_failed']} requests failed; {counts['prompt_tokens']} tokens read, "
        f"{counts['completion_tokens']} written"
    )
    if counts["n_failed"]:
        typer.echo("pdlm-eval: some requests failed and score 0; run the same command to repeat them.", err=True)
        raise typer.Exit(1)


def _ask(client: ChatClient, data: Any, texts: dict[str, str], shown: bool, number: int) -> tuple:
    """The answers of a judge, and their counts. If it fails after some answers: exit code 1, the call was right."""
    from .judging import judge_captions

    seen = 0
    try:
        with progress("replies") as show:

            def note(done: int, _: Any) -> None:
                nonlocal seen
                seen = done
                show(done, number)

            return judge_captions(client, data, texts, shown, note)
    except ServerError as error:
        if not seen:
            raise
        answered = f"{seen} of {number} questions are answered; run the same command to go on."
        typer.echo(f"pdlm-eval: {error} {answered}", err=True)
        raise typer.Exit(1) from None


@app.command()
@exit_on_error("pdlm-eval")
def score(
    annotations: Annotations,
    answers: Annotated[Path, typer.Option(help="File of replies: {mask_id: [recognition, question 1, ...]}.")],
    parser: Reader = "robust",
    benchmark: Form = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    per_mask: Annotated[Path | None, typer.Option(help="Write the score of every mask to this JSON file.")] = None,
) -> None:
    """Score recorded replies, without a model, a judge or images."""
    from . import scoring
    from .data import form_of

    scoring.choose_parser(parser, benchmark or "paradlc")
    questions = load_questions(annotations)
    path = annotations / "annotations.json"
    if benchmark is None and path.exists():
        benchmark = form_of(load_json(path), path)
    scores = scoring.score_answers(questions, scoring.read_answers(answers, questions), parser, benchmark or "paradlc")
    totals = scoring.totals(scores)
    if per_mask is not None:
        per_mask.parent.mkdir(parents=True, exist_ok=True)
        write_json(per_mask, {found.id: found.as_dict() for found in scores})
    if as_json:
        typer.echo(json.dumps(totals))
    else:
        for name, value in totals.items():
            typer.echo(f"{name:<16} {value:>9}" if isinstance(value, int) else f"{name:<16} {value:>9.6f}")
    _check_judged({answers: totals["n_failed"]})


def _check_judged(failed: dict[Path, int]) -> None:
    """Exit code 1 if the judge gave no reply to some questions, which score 0 without having been judged."""
    if lost := {path: count for path, count in failed.items() if count}:
        counts = ", ".join(f"{path}: {count} questions" for path, count in lost.items())
        typer.echo(f"pdlm-eval: {counts} got no reply from the judge; `pdlm-eval paradlc judge` asks again.", err=True)
        raise typer.Exit(1)


@app.command()
@exit_on_error("pdlm-eval")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Judged run folders.")],
    annotations: Annotated[Path | None, typer.Option(help="Folder of the benchmark; default: as recorded.")] = None,
    parser: Reader = "robust",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the report to this Markdown file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the report to this image file.")] = None,
) -> None:
    """Compare the scores and costs of runs with each other and with the paper."""
    from ..plot import check_target
    from . import plot as plotting
    from . import report as reporting

    if plot is not None:
        check_target(plot)
    reports = [reporting.report_run(run, annotations, parser) for run in runs]
    notes = reporting.notes_of(reports)
    if as_json:
        paper = [{"table": title, "rows": rows} for title, rows in reporting.paper_beside(reports)]
        typer.echo(json.dumps({"runs": reports, "paper": paper, "notes": notes}))
    else:
        console = Console()
        for table in reporting.tables_of(reports):
            console.print(table.rich())
        for note in notes:
            console.print(f"- {note}", markup=False, highlight=False)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        with replacing(markdown) as file:
            file.write(reporting.markdown_of(reports))
    if plot is not None:
        plotting.save_plot(plot, reports)
    _check_judged({run: report["n_failed"] for run, report in zip(runs, reports, strict=True)})


if __name__ == "__main__":
    app()
