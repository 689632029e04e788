"""The command `pdlm-eval`."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pdlm_hf.cli import errors
from pdlm_hf.client.chat import ChatClient
from pdlm_hf.client.server import key_in, public_url
from pdlm_hf.errors_pdlm import ServerError, SettingError

from . import LMMS_TASKS
from .benchmarks import BENCHMARKS, choose
from .paradlc.cli import app as paradlc
from .paradlc.data import write_json
from .strict import BASE_URL, MODEL, SETTINGS, judge_results, read_results

app = errors.make_app("pdlm-eval", "Evaluation of PerceptionDLM.")
app.add_typer(paradlc, name="paradlc")

_fail = partial(errors.fail, "pdlm-eval")
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("list")
def list_benchmarks(
    names: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, prompt suffixes included.")] = False,
) -> None:
    """Show the paper's benchmarks with both harness names, settings, judge and score."""
    from .report import list_table

    try:
        chosen = choose(names)
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps([b.as_dict() for b in chosen], indent=1))
    else:
        Console(width=None if Console().is_terminal else 160).print(list_table(chosen))


@app.command()
def tasks() -> None:
    """Print the folder of our lmms-eval tasks, for `lmms-eval --include_path $(pdlm-eval tasks)`."""
    typer.echo(str(LMMS_TASKS))


@app.command(context_settings=_PASSED_ON)
def lmms(context: typer.Context) -> None:
    """Run lmms-eval with PerceptionDLM and our tasks; options are lmms-eval's. Exit code 1: a result is missing."""
    from .lmms_run import run

    _run_harness(run, context.args)


@app.command(context_settings=_PASSED_ON)
def vlmeval(context: typer.Context) -> None:
    """Run VLMEvalKit. Ours: --pretrained, --device, --dtype, --presets, --settings, --no-check; the rest: run.py's."""
    from .vlmeval_run import run

    _run_harness(run, context.args)


def _run_harness(run, arguments: list[str]) -> None:
    try:
        code = run(arguments)
    except (ValueError, ImportError) as error:
        raise _fail(error) from None
    raise typer.Exit(code)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default: all 16.")] = None,
    harness: Annotated[str, typer.Option(help="vlmeval or lmms.")] = "vlmeval",
    pretrained: Annotated[str | None, typer.Option(help="Also load this checkpoint.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model; exact_matching for VLMEvalKit's rules only.")] = None,
    judge_base_url: Annotated[str | None, typer.Option(help="Default: OPENAI_API_BASE, or _URL for lmms.")] = None,
    judge_key_env: Annotated[str, typer.Option(help="Variable with the judge's key.")] = "OPENAI_API_KEY",
    data: Annotated[bool, typer.Option(help="Look for the data.")] = True,
) -> None:
    """Before any GPU minute: is the data there, is a judge needed and does it answer, does the model load."""
    from .check import Finding, check_data, check_judge, check_model, load_vlmeval_environment

    try:
        if harness not in ("vlmeval", "lmms"):
            raise SettingError(f"--harness must be vlmeval or lmms, got {harness}.")
        chosen = choose(names)
    except ValueError as error:
        raise _fail(error) from None
    findings: list[Finding] = []
    if harness == "vlmeval":
        load_vlmeval_environment()
    for benchmark in chosen:
        if data:
            findings.append(check_data(benchmark, harness))
        findings.append(check_judge(benchmark, judge, judge_base_url, os.environ.get(judge_key_env), harness))
    if pretrained:
        findings.append(check_model(pretrained))
    table = Table("", "what", "subject", "finding")
    for finding in findings:
        table.add_row(
            "FAIL" if finding.problem else "ok", finding.what, finding.subject, finding.problem or finding.note
        )
    Console(width=None if Console().is_terminal else 160).print(table)
    failed = [finding for finding in findings if finding.problem]
    if failed:
        raise _fail(f"{len(failed)} of {len(findings)} checks failed", 1)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files or folders of either harness.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Put measured scores beside the paper's."""
    from .report import as_rows, as_table, collect

    try:
        measured = collect(results)
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(as_rows(measured), indent=1))
    else:
        Console(width=None if Console().is_terminal else 160).print(as_table(measured))


@app.command()
@errors.exit_on_error("pdlm-eval")
def strict(
    results: Annotated[Path, typer.Argument(help="Predictions of VLMEvalKit or samples of lmms-eval.")],
    benchmark: Annotated[str | None, typer.Option(help="Default: the one in the file's name.")] = None,
    judge: Annotated[str, typer.Option(help="Model name at the server.")] = MODEL,
    base_url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = BASE_URL,
    api_key_env: Annotated[str | None, typer.Option(help="Variable with the key, if one is needed.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    retries: Annotated[int, typer.Option(help="Further attempts of a failed call.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Default: beside the results, *_strict.json.")] = None,
) -> None:
    """Score ChartQA, DocVQA or InfoVQA as the paper does: Qwen3-8B as a strict judge. Goes on where it stopped."""
    rows = read_results(results)
    name = benchmark or _benchmark_in(results.name)
    out = out or results.with_name(f"{results.stem}_strict.json")
    if out.suffix != ".json":
        raise SettingError(f"--out {out}: must end in .json; the verdicts go beside it, in .jsonl.")
    server = ChatClient(
        judge,
        base_url,
        key_in(api_key_env),
        SETTINGS,
        cache=out.with_suffix(".sqlite"),
        concurrency=concurrency,
        retries=retries,
        timeout=timeout,
    )
    try:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("judging", total=len(rows))
            score, verdicts = judge_results(rows, server, lambda done, _: bar.update(task, completed=done))
    except ServerError as error:
        raise _fail(error, 1) from None
    finally:
        server.close()
    score |= {"benchmark": name, "judge": judge, "base_url": public_url(base_url), "settings": SETTINGS}
    score |= {"results": results.name, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    lines = [json.dumps(row, ensure_ascii=False) for row in verdicts]
    out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out, score)
    typer.echo(json.dumps({key: score[key] for key in score if key.startswith(("accuracy", "n_"))}))
    if score["n_failed"]:
        raise _fail(f"{score['n_failed']} rows got no verdict and count as wrong; run again to ask for them", 1)


def _benchmark_in(name: str) -> str:
    """The paper's benchmark a result file's name speaks of. Raises: SettingError if it speaks of none."""
    for benchmark in BENCHMARKS:
        if benchmark.vlmeval in name or benchmark.lmms in name:
            return benchmark.name
    raise SettingError(f"{name}: which benchmark is it of? Give --benchmark, for example --benchmark ChartQA.")


if __name__ == "__main__":
    app()
