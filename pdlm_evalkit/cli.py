"""The command `pdlm-eval`."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pdlm_hf.cli import errors
from pdlm_hf.client import ChatClient, key_in, public_url
from pdlm_hf.errors_pdlm import PdlmError, SettingError
from pdlm_hf.regions.files import FileLock, replacing, write_json

from .attributes_cli import attributes
from .benchmarks import BENCHMARKS, choose_benchmarks
from .manifest import LMMS_TASKS
from .paradlc.cli import app as paradlc
from .strict import BASE_URL, MODEL, SETTINGS, Verdicts, judge_results, manifest_of, read_results
from .terminal import progress, show_table

app = errors.make_app("pdlm-eval", "Evaluate PerceptionDLM on the paper's benchmarks and compare with its scores.")
app.add_typer(paradlc, name="paradlc")
app.command()(attributes)


class HarnessCommand(TyperCommand):
    """A command that hands its options to a harness; its help ends with what is missing of that harness."""

    def get_help(self, ctx: Any) -> str:
        """The help; it needs no harness."""
        from .lmms_run import find_harness
        from .vlmeval_run import find_run_py

        try:
            if self.name == "lmms":
                find_harness()
            else:
                find_run_py()
        except PdlmError as error:
            return f"{super().get_help(ctx)}\n\nNot to be run yet: {error}"
        return super().get_help(ctx)


_fail = partial(errors.fail, "pdlm-eval")
_exit_on_error = errors.exit_on_error("pdlm-eval")
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
@_exit_on_error
def list_benchmarks(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to show; default: all 16.")] = None,
    as_json: Json = False,
) -> None:
    """Show the benchmarks with their names in both harnesses, settings, judges and the paper's scores."""
    from .report import list_table

    chosen = choose_benchmarks(names)
    if as_json:
        typer.echo(json.dumps([benchmark.as_dict() for benchmark in chosen], indent=1))
    else:
        show_table(list_table(chosen))


@app.command()
def tasks() -> None:
    """Print the folder of our lmms-eval tasks, for `lmms-eval --include_path $(pdlm-eval tasks)`."""
    typer.echo(str(LMMS_TASKS))


@app.command(cls=HarnessCommand, context_settings=_PASSED_ON)
def lmms(context: typer.Context) -> None:
    """Run lmms-eval with PerceptionDLM as the model.

    All options are passed to lmms-eval, for example --tasks, --model_args, --batch_size, --limit, --use_cache; its
    own help, `lmms-eval --help`, lists them. Our tasks are included, samples are logged, and the results go to
    outputs/lmms unless --output_path names another.

    \b
    Ours:
      --no-check  start without asking the judge first

    The exit code is 1 if a task has no result.
    """

    def run(arguments: list[str]) -> int:
        from .lmms_run import run

        return run(arguments)

    _run_harness(context, run)


@app.command(cls=HarnessCommand, context_settings=_PASSED_ON)
def vlmeval(context: typer.Context) -> None:
    """Run VLMEvalKit with PerceptionDLM as the model.

    All options but ours are passed to VLMEvalKit's run.py, for example --data, --model, --judge, --work-dir; its own
    help, `python run.py --help` in the checkout of VLMEvalKit, lists them.

    \b
    Ours:
      --pretrained NAME         checkpoint folder, hub id, shapes or shapes_base
      --device, --dtype         where and in which precision the model runs
      --presets paper|none      none: the reference's general settings
      --settings KEY=VALUE,...  settings of `generate`, before the paper's
      --no-check                start without asking the judge first

    The exit code is 1 if a data set has no result.
    """

    def run(arguments: list[str]) -> int:
        from .vlmeval_run import run

        return run(arguments)

    _run_harness(context, run)


def _run_harness(context: typer.Context, run: Callable[[list[str]], int]) -> None:
    """Run a harness with the arguments of a command; without arguments, show the help of the command."""
    if not context.args:
        typer.echo(context.get_help())
        raise typer.Exit()
    try:
        code = run(context.args)
    except (PdlmError, ImportError) as error:  # other errors are the harness' own, and keep their traceback
        raise _fail(error) from None
    raise typer.Exit(code)


@app.command()
@_exit_on_error
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to check; default: all 16.")] = None,
    harness: Annotated[str, typer.Option(help="vlmeval or lmms.")] = "vlmeval",
    pretrained: Annotated[str | None, typer.Option(help="Also load this checkpoint.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Model that scores; exact_matching: the rules of VLMEvalKit only.")
    ] = None,
    judge_base_url: Annotated[
        str | None, typer.Option(help="Server of the judge; default: OPENAI_API_BASE, for lmms OPENAI_API_URL.")
    ] = None,
    judge_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the judge's key.")
    ] = "OPENAI_API_KEY",
    data: Annotated[bool, typer.Option(help="Look for the data.")] = True,
) -> None:
    """Check before a run: is the data on this machine, does the judge answer, does the model load."""
    from .check import check_all, findings_table

    if harness not in ("vlmeval", "lmms"):
        raise SettingError(f"--harness must be vlmeval or lmms, got {harness}.")
    chosen = choose_benchmarks(names)
    findings = check_all(chosen, harness, pretrained, judge, judge_base_url, judge_key_env, data)
    show_table(findings_table(findings))
    if failed := sum(finding.problem is not None for finding in findings):
        raise _fail(f"{failed} of {len(findings)} checks failed", 1)


@app.command()
@_exit_on_error
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files or folders of either harness.")],
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the scores to this image file.")] = None,
) -> None:
    """Compare measured scores with the paper's. The exit code is 1 if a score is withheld."""
    from .report import as_rows, as_table, collect

    if plot is not None:
        from .plot import check_target, save_scores

        check_target(plot)
    measured = collect(results)
    if plot is not None:
        save_scores(plot, measured)
    if as_json:
        typer.echo(json.dumps(as_rows(measured), indent=1))
    else:
        show_table(as_table(measured))
    if withheld := [row for row in measured if row.score is None]:
        reasons = "; ".join(f"{row.benchmark} ({row.harness}): {row.problem}" for row in withheld)
        raise _fail(f"scores withheld: {reasons}", 1)


@app.command()
@_exit_on_error
def strict(
    results: Annotated[Path, typer.Argument(help="Predictions of VLMEvalKit or samples of lmms-eval.")],
    benchmark: Annotated[str | None, typer.Option(help="Default: the benchmark named in the file name.")] = None,
    judge: Annotated[str, typer.Option(help="Name of the judge model at the server.")] = MODEL,
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible server.")] = BASE_URL,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    retries: Annotated[int, typer.Option(help="Further attempts of a failed request.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Default: beside the results, *_strict.json.")] = None,
) -> None:
    """Score ChartQA, DocVQA or InfoVQA as the paper does, by Qwen3-8B; the same command continues after a stop."""
    rows = read_results(results)
    name = _strict_benchmark(benchmark, results.name)
    out = out or results.with_name(f"{results.stem}_strict.json")
    if out.suffix != ".json":
        raise SettingError(f"--out {out}: the name must end in .json; the verdicts go beside it, in .jsonl.")
    options: dict[str, Any] = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    with FileLock(out.with_suffix(".lock"), out, "give another --out"):
        client = ChatClient(judge, base_url, key_in(api_key_env), SETTINGS, **options)
        client.cache = Verdicts(out.with_suffix(".sqlite"))
        try:
            with progress("verdicts") as show:
                score, verdicts = judge_results(rows, client, lambda done, _: show(done, len(rows)))
        finally:
            client.close()
        score |= {"benchmark": name, "judge": judge, "base_url": public_url(base_url), "settings": SETTINGS}
        score["manifest"] = manifest_of(results, name, judge, base_url)
        score |= {"results": results.name, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        with replacing(out.with_suffix(".jsonl")) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in verdicts)
        write_json(out, score)
    typer.echo(json.dumps({key: score[key] for key in score if key.startswith(("accuracy", "n_"))}))
    if lost := score["n_failed"] + score["n_unparsed"]:
        raise _fail(f"{lost} rows got no verdict and count as wrong; run again to ask for them", 1)


def _strict_benchmark(given: str | None, file_name: str) -> str:
    """The benchmark that `--benchmark` or the file name names.

    Raises:
        SettingError: neither names one that the paper scores by the strict judge.
    """
    strict = [benchmark for benchmark in BENCHMARKS if benchmark.kind == "document"]
    names = ", ".join(benchmark.name for benchmark in strict)
    if given is not None:
        (benchmark,) = choose_benchmarks([given])
        if benchmark not in strict:
            raise SettingError(f"--benchmark {given}: the paper scores only {names} by the strict judge.")
        return benchmark.name
    for benchmark in strict:
        if any(name in file_name for name in (benchmark.name, benchmark.vlmeval, benchmark.lmms)):
            return benchmark.name
    raise SettingError(
        f"{file_name}: the file name does not say which of {names} this is; give --benchmark, for example "
        "--benchmark ChartQA."
    )


if __name__ == "__main__":
    app()
