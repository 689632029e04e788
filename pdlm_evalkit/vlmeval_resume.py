"""A run of VLMEvalKit that was stopped, or whose judge failed, goes on with the same command.

VLMEvalKit starts over unless `--reuse` is given, and `--reuse` takes the newest predictions of the model, whatever the
settings were. Here every run folder gets a `pdlm_run.json` with its settings and attempts; a run goes on where the
newest one with the same settings stopped, and other settings are refused by name.
"""

import json
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
        problem_of: finds the fault in a row of `pdlm_report.json`, see [`vlmeval_run.problem_of`].

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


def remember(attempts: dict[str, Attempts]) -> None:
    """Let VLMEvalKit write `pdlm_run.json` into each run folder as soon as it makes one."""
    import vlmeval.smp

    original = vlmeval.smp.upsert_run_status

    def upsert_run_status(folder: Any, **fields: Any) -> Any:
        status = original(folder, **fields)
        if (own := attempts.get(fields.get("model_name") or Path(folder).parent.name)) is not None:
            write_json(Path(folder) / RUN, vars(own))
        return status

    vlmeval.smp.upsert_run_status = upsert_run_status
