"""A run of VLMEvalKit that was stopped, or whose judge failed, goes on with the same command.

VLMEvalKit starts over unless `--reuse` is given, and `--reuse` takes the newest predictions of the model, whatever the
settings were. Here every run folder gets a `pdlm_run.json` with its settings and attempts; a run goes on where the
newest one with the same settings stopped, and other settings are refused by name. VLMEvalKit writes its answers ten at
a time, and a kill can cut its files short; our models log each answer at once and take those of earlier attempts from
their logs.
"""

import glob
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import write_json

RUN, REPORT = "pdlm_run.json", "pdlm_report.json"


@dataclass
class Attempts:
    """One model's run: its settings, and when its attempts started.

    Args:
        settings (`dict`): everything that changes answers.
        started (`list[float]`): starts of all attempts, in seconds since the epoch; the last one is this one's.
    """

    settings: dict[str, Any]
    started: list[float] = field(default_factory=lambda: [time.time()])


def newest_run(work_dir: Path, model: str) -> Path | None:
    """The newest run folder of a model, from which VLMEvalKit would reuse predictions."""
    runs = [path for path in (work_dir / model).glob("T*") if path.is_dir() and any(path.iterdir())]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def earlier_attempts(run: Path | None) -> Attempts | None:
    """Settings and attempts of a run folder; None if our command did not make it."""
    try:
        content = json.loads((run / RUN).read_text(encoding="utf-8")) if run is not None else None
        return content and Attempts(content["settings"], content["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_finished(run: Path, data: list[str], problem_of: Callable[[dict[str, Any]], str | None]) -> bool:
    """Whether a run folder has a faultless result of each of these data sets."""
    try:
        rows = {row["benchmark"]: row for row in json.loads((run / REPORT).read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(name in rows and problem_of(rows[name]) is None for name in data)


def go_on(
    work_dir: Path,
    model: str,
    settings: dict[str, Any],
    data: list[str],
    asked: bool,
    problem_of: Callable[[dict[str, Any]], str | None],
) -> Attempts:
    """Decide whether a run goes on with the newest one of its model; it does if there is more than one attempt.

    Args:
        work_dir (`Path`): the folder of `--work-dir`.
        model (`str`): the name of the model.
        settings (`dict`): everything that changes answers.
        data (`list[str]`): the data sets of the run.
        asked (`bool`): whether `--reuse` or `--mode eval` was given.
        problem_of: finds the fault in a row of `pdlm_report.json`, see [`vlmeval_report.problem_of`].

    Raises:
        SettingError: `--reuse` was given, and the newest predictions were made with other settings.
    """
    run = newest_run(work_dir, model)
    earlier = earlier_attempts(run)
    if run is None or earlier is None:
        return Attempts(settings)
    differing = {name for name in settings | earlier.settings if settings.get(name) != earlier.settings.get(name)}
    if asked and differing:
        changed = ", ".join(
            f"{n} {earlier.settings.get(n)!r} instead of {settings.get(n)!r}" for n in sorted(differing)
        )
        raise SettingError(f"{run}: the predictions to reuse were made with {changed}. Use another --work-dir.")
    if differing or (not asked and is_finished(run, data, problem_of)):
        return Attempts(settings)
    return Attempts(settings, [*earlier.started, time.time()])


def is_reusable(work_dir: Path, model: str, attempts: Attempts) -> bool:
    """Whether `--reuse`, which is for all models, is right for this one: it goes on, or has nothing to reuse."""
    return len(attempts.started) > 1 or newest_run(work_dir, model) is None


def log_of(log: Path, model: str) -> Path:
    """The file of answers of one model."""
    return log.with_name(f"{log.stem}.{model.replace(os.sep, '_')}{log.suffix}")


def logs_of(work_dir: Path, model: str, started: list[float]) -> list[Path]:
    """The files of a model's answers, of all processes of some attempts.

    Args:
        work_dir (`Path`): the folder of `--work-dir`.
        model (`str`): the name of the model.
        started (`list[float]`): start of each attempt in seconds since the epoch; the log of a process is the first
            one that was written after it.
    """
    by_rank: dict[str, list[Path]] = {}
    for path in sorted(work_dir.glob(log_of(Path("pdlm_answers_*.jsonl"), glob.escape(model)).name)):
        by_rank.setdefault(path.name.split(".")[1], []).append(path)
    return sorted({path for paths in by_rank.values() for start in started for path in _since(paths, start)[:1]})


def logging_of(attempts: dict[str, Attempts], work_dir: Path, rank: int) -> dict[str, dict[str, Any]]:
    """By model, its arguments that name files of answers: `log` of this attempt, and `kept` of earlier ones."""
    log = work_dir / f"pdlm_answers_{time.strftime('%Y%m%d_%H%M%S')}.{rank}.jsonl"
    return {
        model: {
            "log": str(log_of(log, model)),
            "kept": [str(path) for path in logs_of(work_dir, model, found.started[:-1])],
        }
        for model, found in attempts.items()
    }


def _since(paths: list[Path], start: float) -> list[Path]:
    return [path for path in paths if path.stat().st_mtime >= start]


def remember(attempts: dict[str, Attempts]) -> None:
    """Let VLMEvalKit write `pdlm_run.json` into each run folder as soon as it makes one."""
    import vlmeval.smp

    original = vlmeval.smp.upsert_run_status

    def upsert_run_status(folder: Any, **fields: Any) -> Any:
        if (own := attempts.get(fields.get("model_name") or Path(folder).parent.name)) is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_json(Path(folder) / RUN, vars(own))  # before anything else: a folder without it is another's
        return original(folder, **fields)

    vlmeval.smp.upsert_run_status = upsert_run_status


def write_whole() -> None:
    """Let VLMEvalKit write predictions, and images of its data sets, so that a kill leaves a whole file or none."""
    places = {"dump": "vlmeval.inference", "copy_prediction_file": "vlmeval.smp.file"}
    places |= {"decode_base64_to_image_file": "vlmeval."}
    for name, prefix in places.items():
        for module in [module for key, module in sys.modules.items() if key.startswith(prefix)]:
            if (original := getattr(module, name, None)) is not None:
                setattr(module, name, _whole(original))


def _whole(original: Callable) -> Callable:
    """A function that writes the file named by its second argument: it writes beside it, and moves the file there."""

    def write(source: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pdlm_") as part:
            result = original(source, os.path.join(part, target.name), *args, **kwargs)
            for file in Path(part).iterdir():  # the name may have changed: VLMEvalKit takes .pkl if another form fails
                os.replace(file, target.parent / file.name)
        return result

    return write
