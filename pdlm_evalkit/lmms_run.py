"""`pdlm-eval lmms`: lmms-eval with our tasks included, and exit code 1 if a task has no result.

    pdlm-eval lmms --tasks mmstar,pdlm_shapes_choice --model_args pretrained=DIR --batch_size 8
    torchrun --nproc-per-node=8 -m pdlm_evalkit.lmms_run --tasks ...

`lmms-eval --model pdlm` works as well, but its exit code is 0 even after a failure.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import typer

from pdlm_hf.cli.errors import fail
from pdlm_hf.errors_pdlm import MissingPackageError, PdlmError, SettingError
from pdlm_hf.regions.files import load_json, write_json

from .lmms_judge import JUDGED, TaskJudges
from .lmms_manifests import name_models, write_manifests
from .lmms_resume import RUN_NAME, cache_folder, hold, unfinished_run
from .manifest import LMMS_TASKS
from .settings import REFERENCE_NAMES, SETTINGS


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises: SettingError."""
        raise SettingError(f"{message}.")


def find_harness() -> None:
    """See whether lmms-eval is installed. Raises: MissingPackageError: it is not."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise MissingPackageError("lmms-eval (in an environment of its own)", "lmms")


def arguments_for(argv: list[str]) -> tuple[list[str], argparse.Namespace]:
    """Complete the arguments of lmms-eval.

    Returns:
        the arguments; and the values of those that this module needs.

    Raises:
        SettingError: no task is given, or `--gen_kwargs` has settings that the response cache ignores.
    """
    parser = OptionParser(add_help=False, allow_abbrev=False)
    for name in ("--tasks", "--model", "--output_path", "--include_path", "--gen_kwargs"):
        parser.add_argument(name)
    parser.add_argument("--use_cache", "-c")
    parser.add_argument("--no-check", dest="check", action="store_false")  # ours: skips the check of the judge
    known, _ = parser.parse_known_args(argv)
    if not known.tasks:
        raise SettingError("No tasks: give --tasks NAME,NAME (`pdlm-eval list` shows the paper's).")
    overlooked = (set(SETTINGS) | set(REFERENCE_NAMES)) - {"temperature", "max_new_tokens"}
    given = {pair.split("=")[0].strip() for pair in (known.gen_kwargs or "").split(",")} & overlooked
    if known.use_cache and given:
        raise SettingError(
            f"lmms-eval's response cache ignores {sorted(given)} in --gen_kwargs and would return answers of other "
            "settings. Give them in --model_args, which the cache compares."
        )
    completed = [argument for argument in argv if argument != "--no-check"]
    if not known.model:
        completed += ["--model", "pdlm"]
    if not known.include_path:
        completed += ["--include_path", str(LMMS_TASKS)]
    if not known.output_path:
        known.output_path = "outputs/lmms"
        completed += ["--output_path", known.output_path]
    if "--log_samples" not in completed:
        completed.append("--log_samples")  # tokens and passes are in the samples
    return completed, known


def missing_results(tasks: list[str], files: list[Path]) -> list[str]:
    """The tasks (or groups, or tags) without a score in the result files.

    Args:
        tasks (`list[str]`): the tasks of `--tasks`.
        files (`list[Path]`): the *_results.json of this run.
    """
    found: set[str] = set()
    for path in files:
        content: dict[str, Any] = load_json(path)
        scored = {
            name for name, row in content.get("results", {}).items() if any(_is_score(*pair) for pair in row.items())
        }
        found |= scored
        found |= {group for group, members in content.get("group_subtasks", {}).items() if scored & set(members)}
        for name in scored:
            tag = content.get("configs", {}).get(name, {}).get("tag") or []
            found |= {tag} if isinstance(tag, str) else set(tag)
    return [task for task in tasks if task not in found]


def _is_score(name: str, value: Any) -> bool:
    """Whether an entry of a task's results is a score: `metric,filter` with a number, or with a number per group."""
    if isinstance(value, dict):
        return any(_is_score(name, part) for part in value.values())
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    captions_only = os.environ.get("PDLM_JUDGE") == "none"  # their score is NaN
    return "," in name and "_stderr," not in name and number and (captions_only or math.isfinite(value))


def run(argv: list[str]) -> int:
    """Run lmms-eval and name the tasks without a result on stderr.

    Args:
        argv (`list[str]`): options of lmms-eval, and `--no-check`.

    Returns:
        the exit code: 1 if a task has no result.

    Raises:
        SettingError: an option is wrong; lmms-eval was not started.
        MissingPackageError: lmms-eval is not installed.
    """
    completed, known = arguments_for(argv)
    find_harness()
    if known.use_cache and not os.environ.get(RUN_NAME):
        os.environ[RUN_NAME] = unfinished_run(known.use_cache, completed)
    output, cache = Path(known.output_path), cache_folder(known.use_cache) if known.use_cache else None
    models = name_models(cache or output, completed)
    sys.argv = ["lmms-eval", *completed]
    if int(os.environ.get("RANK", 0)):
        return int(name_what_failed(evaluate(output)))
    tasks = [name.strip() for name in known.tasks.split(",")]
    if known.check:
        from .check import check_lmms_judge

        check_lmms_judge(tasks)
    with ExitStack() as held:
        attempt = hold(held, output, cache, os.environ.get(RUN_NAME, ""))
        if attempt > 1:
            typer.echo(f"pdlm-eval: attempt {attempt}; answers of earlier ones are in {cache}.", err=True)
        before = set(output.rglob("*_results.json"))
        counts = evaluate(output)
        new = sorted(set(output.rglob("*_results.json")) - before)
        missing = missing_results(tasks, new)
        for path in new:
            write_manifests(path, models, cached=cache is not None)
            write_json(path.with_name(path.name.replace("_results.json", JUDGED)), counts | {"attempts": attempt})
    for task in missing:
        typer.echo(f"pdlm-eval: {task}: no result was written; the output of lmms-eval above says why.", err=True)
    return 1 if name_what_failed(counts) or missing else 0


def evaluate(output: Path) -> dict[str, dict[str, int]]:
    """Run lmms-eval with the arguments of this process. Returns: how its judges did, see [`TaskJudges.counts`]."""
    try:
        from lmms_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"lmms-eval is installed, but cannot be imported ({error}).") from error
    output.mkdir(parents=True, exist_ok=True)
    judges = TaskJudges(output / "pdlm_judge.sqlite")
    judges.install()
    cli_evaluate()
    return judges.counts()


def name_what_failed(counts: dict[str, dict[str, int]]) -> bool:
    """Name the tasks with answers that were not scored.

    Args:
        counts (`dict`): counts by folder of the task, see [`TaskJudges.counts`].

    Returns:
        whether there are any.
    """
    lost = {folder: found for folder, found in counts.items() if found["failed"] or found["random"]}
    for folder, found in lost.items():
        asked = found["failed"] + found["judge"]
        typer.echo(
            f"pdlm-eval: {folder}: the judge failed on {found['failed']} of {asked} requests, and {found['random']} "
            "options were drawn at random. Run again: the judge is asked about these only, and with --use_cache the "
            "model is not asked.",
            err=True,
        )
    return bool(lost)


def as_command(run: Callable[[list[str]], int]) -> None:
    """Run with the arguments of this process, as torchrun starts it: `torchrun -m pdlm_evalkit.lmms_run ...`."""
    try:
        sys.exit(run(sys.argv[1:]))
    except (PdlmError, ImportError) as error:
        sys.exit(fail("pdlm-eval", error).exit_code)


if __name__ == "__main__":
    as_command(run)
