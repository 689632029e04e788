"""`vllm serve` with every flag that is refused, in forks of this process, which imports vLLM once.

Prints an object of JSON: for each flag the exit code and the output.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import flags
import vllm.entrypoints.cli.serve  # noqa: F401
import vllm.v1.engine.async_llm  # noqa: F401
from vllm.entrypoints.cli.main import main

from pdlm_hf import CHECKPOINT

fork = multiprocessing.get_context("fork")


def serve(arguments: list[str], output: Path) -> None:
    """The command `vllm serve`; its output goes to the file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["vllm", "serve", str(CHECKPOINT), *arguments]
    main()


def started(flag: str, values: list[str], folder: Path) -> tuple[int | None, str]:
    """Exit code, or None if it serves, and output."""
    output = folder / "output.log"
    output.write_text("")
    process = fork.Process(target=serve, args=(flags.command({flag: values}, CHECKPOINT), output))
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode, output.read_text(errors="replace")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        refused = {**flags.REFUSED, **flags.REFUSED_VALUES}
        sys.stdout.write(json.dumps({flag: started(flag, given[0], Path(made)) for flag, given in refused.items()}))
