"""The face of the package and the look of `pdlm-eval`."""

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import pdlm_evalkit
from pdlm_evalkit import lmms_run, paradlc, vlmeval_run
from pdlm_evalkit.cli import app


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("package", [pdlm_evalkit, paradlc])
def test_every_public_name_is_there(package):
    assert {"Benchmark", "Question"} <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name if callable(getattr(package, name)) else True


def test_entry_points_and_their_cost():
    """lmms-eval reads the manifest of every model whenever it starts."""
    script = """
import sys
from pdlm_evalkit import LMMS_TASKS, BENCHMARKS, lmms_manifest
print(LMMS_TASKS.name, len(BENCHMARKS), callable(lmms_manifest), {"torch", "transformers"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "lmms_tasks 16 True set()\n"


@pytest.mark.parametrize("command, own", [("lmms", "--no-check"), ("vlmeval", "--pretrained NAME")])
@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_help_of_a_harness_needs_no_harness(monkeypatch, command, own, arguments):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call(command, *arguments)
    assert done.exit_code == 0, done.output
    assert f"{command} [OPTIONS]" in done.stdout.splitlines()[0] and own in done.stdout
    assert {"lmms": "lmms-eval --help", "vlmeval": "run.py --help"}[command] in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", [(), ("paradlc",), ("check",), ("paradlc", "caption")])
def test_all_help_has_one_look(command):
    lines = call(*command, "--help").stdout.splitlines()
    assert lines[0].startswith("Usage: ") and not any(mark in line for mark in "╭│╰" for line in lines)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("lmms", "--batch_size", "4"), "No tasks: give --tasks"),
        (("lmms", "--tasks"), "argument --tasks: expected one argument."),
        (("vlmeval", "--data", "MMStar"), "give --model and --data"),
        (("vlmeval", "--presets", "mine"), "argument --presets: invalid choice: 'mine'"),
        (("vlmeval", "--data", "A", "--model", "M", "--settings", "steps"), "expected key=value"),
        (("list", "MMStarr"), "MMStarr"),
        (("check", "--harness", "other"), "--harness must be vlmeval or lmms, got other."),
        (("report", "nowhere"), "nowhere: no such file or folder."),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, arguments, said):
    monkeypatch.setattr(vlmeval_run, "find_run_py", lambda: None)
    done = call(*arguments)
    assert done.exit_code == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("pdlm-eval: ")


def test_a_crash_of_a_harness_keeps_its_traceback(monkeypatch):
    def crash(arguments):
        raise ValueError("inside the harness")

    monkeypatch.setattr(lmms_run, "run", crash)
    assert repr(call("lmms", "--tasks", "a").exception) == "ValueError('inside the harness')"
