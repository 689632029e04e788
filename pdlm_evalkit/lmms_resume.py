"""A run of lmms-eval that was stopped goes on with the same command.

lmms-eval stores answers by run, gives runs random names (or a job's, and a job that is started again has another), and
reads only runs that were finished. It stores the text of an answer without its cost, and what a kill leaves in its
folders stays in the way of the next run.
"""

import hashlib
import json
import os
import socket
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import typer

from pdlm_hf.regions.files import FileLock, write_json

from .lmms_judge import JUDGED

RUN_NAME = "LMMS_CACHE_RUN_ID"  # where lmms-eval finds the name of a run


def unfinished_run(cache: str, arguments: list[str]) -> str:
    """Name of the run in lmms-eval's response cache that this command continues, or begins.

    Args:
        cache (`str`): the folder of `--use_cache`.
        arguments (`list[str]`): all arguments of lmms-eval.
    """
    digest = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:16]
    runs = cache_folder(cache) / "runs"
    return next(f"{digest}-{k}" for k in count() if not (runs / f"{digest}-{k}" / ".merged").exists())


def cache_folder(cache: str) -> Path:
    """The folder of `--use_cache`, which may name a file in it."""
    return Path(cache).absolute().parent if cache.endswith(".db") else Path(cache).absolute()


def hold(held: ExitStack, output: Path, cache: Path | None, run_name: str) -> int:
    """Lock the folders of a run until the process ends, and clear away what a killed run left in them.

    Args:
        held (`ExitStack`): gets the locks.
        output (`Path`): the folder of `--output_path`.
        cache (`Path`, *optional*): the folder of the response cache.
        run_name (`str`): the name of the run in the cache.

    Returns:
        the number of this attempt, from 1.

    Raises:
        SettingError: another process writes one of the folders.
    """
    lock = held.enter_context(FileLock(output / "pdlm_run.lock", output, "give another --output_path"))
    if lock.died is not None:
        set_aside(output, lock.died)
    for path in output.rglob("gpt_response/hallusion_output_*.json"):
        path.unlink()  # verdicts by position, which HallusionBench would take for those of other answers
    if cache is None:
        return 1
    run = cache / "runs" / run_name
    held.enter_context(FileLock(run / "pdlm_run.lock", run, "give another --use_cache"))
    free_merge_lock(cache / "runs" / ".merge.lock")
    return _note_attempt(run / "pdlm_run.json")


def set_aside(output: Path, since: float) -> None:
    """Rename result files that a killed run began: they may be cut short, and how they were scored is unknown.

    Args:
        output (`Path`): the folder of `--output_path`.
        since (`float`): start of the killed run, in seconds since the epoch.
    """
    for path in sorted(output.rglob("*_results.json")):
        if path.stat().st_mtime >= since and not path.with_name(path.name.replace("_results.json", JUDGED)).exists():
            left = path.with_name(f"{path.name}.unfinished")
            path.rename(left)
            typer.echo(f"pdlm-eval: {left}: left by a run that was killed.", err=True)


def free_merge_lock(lock: Path) -> None:
    """Remove the lock that lmms-eval takes while it merges answers, if its process is dead; others would wait for it.

    Args:
        lock (`Path`): the folder that is the lock.
    """
    owner = lock / "owner.json"
    try:
        content = json.loads(owner.read_text(encoding="utf-8"))
        dead = content["hostname"] == socket.gethostname() and not _is_alive(int(content["pid"]))
    except (OSError, ValueError, KeyError, TypeError):  # killed before it wrote its name, or there is no lock
        dead = lock.is_dir() and time.time() - lock.stat().st_mtime > 60
    if dead:
        owner.unlink(missing_ok=True)
        lock.rmdir()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _note_attempt(path: Path) -> int:
    try:
        started = json.loads(path.read_text(encoding="utf-8"))["started"]
    except (OSError, ValueError, KeyError, TypeError):
        started = []
    write_json(path, {"started": [*started, time.time()]})
    return len(started) + 1


def keep_costs(kind: Any) -> None:
    """Let lmms-eval's response cache keep the token counts and the cost of our answers, and return them with the text.

    The cache is asked with the name and arguments of the model, so that no other model reads these entries.

    Args:
        kind (`type`): the class of our token counts.
    """
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.caching.response_cache import ResponseCache

    extract, lookup = ResponseCache._extract_cacheable, ResponseCache._lookup
    if extract.__module__ == __name__:
        return

    def cacheable(response: Any) -> Any:
        if isinstance(response, GenerationResult) and isinstance(response.token_counts, kind):
            return {"text": response.text, "counts": response.token_counts.to_dict()}
        return extract(response)

    def found(cache: Any, key: str) -> Any:
        kept = lookup(cache, key)
        if isinstance(kept, dict) and kept.keys() == {"text", "counts"}:
            return GenerationResult(kept["text"], kind(**kept["counts"]))
        return kept

    ResponseCache._extract_cacheable, ResponseCache._lookup = staticmethod(cacheable), found
