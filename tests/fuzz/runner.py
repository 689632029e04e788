"""Run a family of inputs in a process of its own, whose memory and time are bounded."""

import os
import pickle
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pdlm_hf.errors_pdlm import PdlmError

MEMORY = 2 << 30  # bytes that an input may take
SECONDS = 20  # of the CPU that an input may take


@dataclass
class Family:
    """A kind of input.

    Args:
        name (`str`): its name.
        inputs: the strategy.
        run (`Callable[[Any, Path], str]`): uses an input, with an empty folder for files, and asserts that what comes
            of it is right. A PdlmError must hold the text that `names` gives.
        names (`Callable[[Any], tuple[str, ...]]`): texts for an input, of which an error must hold one.
        share (`float`): part of all inputs.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    run: Callable[[Any, Path], Any]
    names: Callable[[Any], tuple[str, ...]]
    share: float


@dataclass
class Outcome:
    """What came of a family.

    Args:
        inputs, right (`int`): number of inputs, and of those without an error.
        findings (`dict[str, str]`): for each kind of failure the first input.
        slowest, memory (`float`): CPU seconds of the slowest input; MiB that the process grew by.
    """

    inputs: int = 0
    right: int = 0
    findings: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    memory: float = 0.0


def run_family(family: Family, count: int, folder: Path, number: int | None = None) -> Outcome:
    """Run a family in a fork of this process.

    Args:
        family (`Family`), count (`int`): what to run, and the number of inputs.
        folder (`Path`): for files.
        number (`int`, *optional*): seed of hypothesis; default: always the same inputs.
    """
    result, last = folder / "outcome.pickle", folder / "last_input.txt"
    child = os.fork()
    if not child:
        try:
            _bound_memory()
            os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT), 2)
            result.write_bytes(pickle.dumps(_run(family, count, folder / "work", last, number)))
        except BaseException:
            (folder / "broken.txt").write_text(traceback.format_exc())
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if result.exists():
        return pickle.loads(result.read_bytes())
    if (folder / "broken.txt").exists():
        raise RuntimeError((folder / "broken.txt").read_text())
    kind = f"more than {SECONDS} s" if -status == signal.SIGPROF else f"the process died ({status})"
    return Outcome(findings={kind: last.read_text(errors="backslashreplace")})


def _bound_memory() -> None:
    """Let this process grow by [`MEMORY`]: then an allocation fails with MemoryError, which is a finding."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _run(family: Family, count: int, work: Path, last: Path, number: int | None) -> Outcome:
    outcome = Outcome()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also within a library

    def once(value: Any) -> None:
        for old in work.glob("*") if work.exists() else ():
            old.unlink()
        work.mkdir(exist_ok=True)
        last.write_text(shown(value), errors="backslashreplace")
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        kind = problem(family, value, work)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome.inputs += 1
        outcome.right += kind == ""
        outcome.slowest = max(outcome.slowest, time.process_time() - start)
        if kind:
            outcome.findings.setdefault(kind, shown(value))

    def problem(family: Family, value: Any, work: Path) -> str | None:
        try:
            family.run(value, work)
            return ""
        except PdlmError as error:
            if any(name in str(error) for name in family.names(value)):
                return None
            return f"unnamed {type(error).__name__}: {re.sub(r'[0-9]+', '0', str(error)):.90}"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "/pdlm_" in frame.filename] or frames
            place = f"{own[-1].filename.rpartition('/pdlm_')[2]}:{own[-1].lineno}"
            return f"{type(error).__name__} at pdlm_{place}"

    test = settings(
        max_examples=count,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(family.inputs)(once))
    (test if number is None else seed(number)(test))()
    outcome.memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return outcome


def shown(value: Any) -> str:
    """An input in one line, long ones shortened in the middle."""
    try:
        text = repr(value)
    except RecursionError:
        text = "nested too deeply to be shown"
    return text if len(text) < 3000 else f"{text[:1500]} ... {text[-1500:]}"
