"""Runs what stands on a page of the documentation, from its first line to its last.

Fences must say what they are. `python` is executed, page by page in one namespace; `bash` line by line in this
process; `text` is what the one before it prints (fractions aside); `json` and `yaml` must parse; `bibtex` is left to
the page's test. What cannot run here is named by that test, with the test that runs it and the reason. Anything else
fails.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAMS = {"pdlm": "pdlm_hf.cli.main", "pdlm-eval": "pdlm_evalkit.cli", "pdlm-peft": "pdlm_peft.cli"}


@dataclass
class Fence:
    """A fenced block: language, text, line on the page."""

    language: str
    text: str
    line: int


@dataclass
class Ran:
    """A command (or Python block) that ran, and what it printed."""

    command: str
    stdout: str
    stderr: str = ""


def fences(text: str) -> list[Fence]:
    """All fenced blocks of a page. Raises: ValueError for a block that is only indented, or has no end."""
    found, start = [], None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        mark = re.fullmatch(r" *```(\w*).*", line)
        if mark and start is None:
            start, language = number, mark[1]
        elif mark:
            found.append(Fence(language, "\n".join(lines[start : number - 1]) + "\n", start))
            start = None
        elif start is None and line.startswith("    ") and number > 1 and not lines[number - 2].strip():
            raise ValueError(f"line {number}: an indented block; put it into a fence that says what it is")
    if start is not None:
        raise ValueError(f"line {start}: a fence without end")
    return found


def commands(fence: Fence) -> list[str]:
    """Lines of a bash fence, without comments; a line that ends with a backslash goes on."""
    lines = [" ".join(line.split()) for line in re.sub(r"\\\n", " ", fence.text).splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if line and not line.startswith("#")]


class Page:
    """A page of docs/.

    Args:
        name: file in docs/.
        elsewhere: start of a command, or first line of a Python block -> "tests/FILE.py::TEST: why not here".
    """

    def __init__(self, name: str, elsewhere: dict[str, str] | None = None):
        self.name, self.elsewhere = name, elsewhere or {}
        self.text = (DOCS / name).read_text(encoding="utf-8")
        self.fences = fences(self.text)

    def run(self, change: Callable[[str], str] = lambda text: text) -> list[Ran]:
        """Run the page in the current folder.

        Args:
            change: gets every command and Python block before it runs: other addresses, smaller settings.
        """
        self.unused = set(self.elsewhere)
        ran, namespace = [], {"__name__": "page"}
        for fence in self.fences:
            where = f"docs/{self.name}:{fence.line}"
            if fence.language == "python":
                if not self._is_elsewhere(fence.text.splitlines()[0]):
                    ran.append(run_python(change(fence.text), namespace))
                compile(fence.text, where, "exec")
            elif fence.language == "bash":
                todo = [line for line in commands(fence) if not self._is_elsewhere(line)]
                ran += [run_command(change(line), where) for line in todo]
            elif fence.language == "text":
                assert ran and fractions_aside(ran[-1].stdout) == fractions_aside(fence.text), (
                    f"{where}: {ran[-1].stdout}"
                )
            elif fence.language == "jsonl":
                for line in fence.text.splitlines():
                    json.loads(line)
            elif fence.language in ("json", "yaml"):
                (json.loads if fence.language == "json" else yaml.safe_load)(fence.text)
            elif fence.language not in ("bibtex", "diff"):  # the diff: test_vlmeval_plugin.py
                raise AssertionError(f"{where}: {fence.language or 'no language'}; expected one that can be checked")
        assert not self.unused, f"not on the page: {self.unused}"
        for words in re.findall(r"`((?:pdlm|pdlm-eval|pdlm-peft) [^`]+)`", self.text):
            check_options(words)
        return ran

    def _is_elsewhere(self, line: str) -> bool:
        for start, reason in self.elsewhere.items():
            if line.startswith(start):
                check_test_exists(reason)
                check_options(line)
                self.unused.discard(start)
                return True
        return False


def fractions_aside(text: str) -> str:
    """Text without its fractions, which may differ a little between machines."""
    return re.sub(r"\d+\.\d+", "0.0", text.strip())


def check_test_exists(reason: str) -> None:
    """`tests/FILE.py::TEST: why`: the test is there, and the reason is said."""
    file, name, why = re.fullmatch(r"(tests/[\w/]+\.py)::(\w+): (.+)", reason).groups()
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), reason


def check_options(line: str) -> None:
    """A command of ours that is not run here: its subcommands and options exist."""
    program, *words = line.replace("\\|", "|").split()
    if program not in PROGRAMS:
        return
    command = get_command(import_module(PROGRAMS[program]).app)
    while words and hasattr(command, "commands"):
        word = words.pop(0)
        assert word.startswith("-") or word in command.commands, f"no such command: {line}"
        command = command.commands.get(word, command)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"--help"}
    passes_on = command.context_settings.get("ignore_unknown_options")
    assert passes_on or options <= known, f"{line}: {options - known}"


def run_python(text: str, namespace: dict) -> Ran:
    """The page's own words."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text, namespace)
    return Ran(text, out.getvalue())


def run_command(line: str, where: str = "") -> Ran:
    """A command of ours; of `pip install` and `make` that what they name exists, since `make test` runs those."""
    program, *arguments = shlex.split(line)
    if program == "pip":
        known = re.findall(r"^(\w+) = \[", section_of_extras(), re.MULTILINE)
        asked = [extra for match in re.findall(r"\[([\w,]+)\]", line) for extra in match.split(",")]
        assert set(asked) <= set(known), f"{where}: {line}"
        return Ran(line, "")
    if program == "make":
        makefile = ROOT / "Makefile"
        assert all(f"\n{target}:" in makefile.read_text() for target in arguments), f"{where}: {line}"
        return Ran(line, "")
    assert program in PROGRAMS, f"{where}: no test runs this command: {line}"
    result = CliRunner().invoke(import_module(PROGRAMS[program]).app, arguments)
    assert result.exit_code == 0, f"{where}: {line}\n{result.output}\n{result.exception!r}"
    return Ran(line, result.stdout, result.stderr)


def section_of_extras() -> str:
    """The optional dependencies of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split("[project.optional-dependencies]")[1].split("\n[")[0]
