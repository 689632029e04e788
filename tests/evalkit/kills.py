"""Commands that are killed at random moments and run again until they end, and what two results have in common.

PDLM_KILLS is the number of kills of each test (default 3); PDLM_KILLS_RECORD names a folder that gets their counts.
"""

import json
import os
import random
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from forked import call, kill, start

KILLS = int(os.environ.get("PDLM_KILLS", 3))
PER_CHAIN = 5  # kills of one run, before it may end
# What differs between two runs that were never killed, and what counts attempts
ASIDE = {"seconds", "regions_per_second", "date", "when", "started", "attempts", "n_calls", "n_cached", "requests"}
ASIDE |= {"source", "source_run", "annotations", "run_dir", "eval_id", "base_url"}


class Command:
    """A command of [`forked.start`] that may be killed.

    Args:
        command (`str`), arguments, environment: as there.
        log (`Path`): gets what the last attempt prints.
    """

    def __init__(self, command: str, arguments: list[Any], environment: dict[str, str], log: Path):
        self.parts = (command, [str(argument) for argument in arguments], environment, log)
        self.log = log

    def finish(self) -> float:
        """Run it to its end. Returns: the seconds it took."""
        _prepare(os.devnull)
        begin = time.perf_counter()
        code = call(*self.parts)
        assert code == 0, self.log.read_text()[-3000:]
        return time.perf_counter() - begin

    def kill_and_finish(self, moments: random.Random, seconds: float, most: int) -> int:
        """Kill it at random moments of its run time, and run it to its end.

        Args:
            moments (`random.Random`): draws the moments.
            seconds (`float`): its run time.
            most (`int`): kills.

        Returns:
            the number of kills; fewer than `most` if it ended before.
        """
        for number in range(most):
            process = start(*self.parts)
            process.join(moments.uniform(0.02, 1) * seconds)
            if not process.is_alive():
                assert process.exitcode == 0, self.log.read_text()[-3000:]
                return number
            kill(process)
        self.finish()
        return most


@lru_cache(maxsize=1)
def _prepare(log: str) -> None:
    """Start the prepared process, whose imports are no part of the run time of a command."""
    assert call("pdlm-eval", ["--version"], {}, log) == 0


def bare(value: Any, folder: Path) -> Any:
    """A result without times, attempts, and the folder that it is in."""
    if isinstance(value, dict):
        return {name: bare(part, folder) for name, part in value.items() if name not in ASIDE}
    if isinstance(value, list):
        return [bare(part, folder) for part in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def bytes_of(value: Any, folder: Path) -> bytes:
    """A result as bytes, to compare."""
    return json.dumps(bare(value, folder), ensure_ascii=False, indent=1).encode()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(name: str, **counts: Any) -> None:
    """Note how many kills there were, for the documentation."""
    if folder := os.environ.get("PDLM_KILLS_RECORD"):
        Path(folder, f"{name}.json").write_text(json.dumps({"name": name, **counts}) + "\n")
