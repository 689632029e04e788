"""Commands of the harnesses in processes that have the imports done: those take five seconds, of lmms-eval fifteen."""

import multiprocessing
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

PRELOAD = [
    "openai",
    "pdlm_evalkit.answering",
    "pdlm_evalkit.cli",
    "pdlm_evalkit.paradlc.server",
    "pdlm_evalkit.lmms_run",
    "pdlm_evalkit.vlmeval_run",
    "pdlm_hf.modeling_pdlm",
    "pdlm_hf.processing_pdlm",
]
if find_spec("lmms_eval") is not None:
    PRELOAD += ["lmms_eval.__main__", "lmms_eval.evaluator", "pdlm_evalkit.lmms"]
if os.environ.get("VLMEVALKIT"):
    PRELOAD += ["vlmeval.config", "vlmeval.dataset", "vlmeval.inference", "vlmeval.smp", "vlmeval.vlm"]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PRELOAD)


def start(command: str, arguments: list[str], environment: dict[str, str], log: Path) -> multiprocessing.Process:
    """Start a command in a fork of the prepared process.

    Args:
        command (`str`): "lmms-eval", "pdlm-eval", or "vlmeval", which is `python -m pdlm_evalkit.vlmeval_run`.
        arguments (`list[str]`): its arguments.
        environment (`dict`): variables to add; those of `PYTHONPATH` are added to the path.
        log (`Path`): gets what it prints.
    """
    process = _processes.Process(target=_run, args=(command, arguments, environment, str(log)))
    process.start()
    return process


def call(command: str, arguments: list[str], environment: dict[str, str], log: Path, timeout: float = 900) -> int:
    """Run a command to its end, at most `timeout` seconds; see [`start`]. Returns: the exit code."""
    process = start(command, arguments, environment, log)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{command} {arguments}: not finished within {timeout} seconds.")
    return process.exitcode


def kill(process: multiprocessing.Process) -> None:
    """End a command and all its processes as `kill -9` does."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        process.kill()
    process.join()


def _run(command: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setpgrp()
    if "PYTHONPATH" in environment:  # of a stand-in for VLMEvalKit, where the real one may be imported already
        for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
            del sys.modules[name]
    for name in [name for name in os.environ if name.startswith("OPENAI")]:
        del os.environ[name]  # keys of whoever runs the tests
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored
    sys.argv = [command, *arguments]
    torch.set_num_threads(1)
    if command == "lmms-eval":
        from lmms_eval.__main__ import cli_evaluate

        cli_evaluate()
    elif command == "pdlm-eval":
        from pdlm_evalkit.cli import app

        app()
    else:
        from pdlm_evalkit import vlmeval_run
        from pdlm_evalkit.lmms_run import as_command

        as_command(vlmeval_run.run)
