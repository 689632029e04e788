"""tools/: what `make constraints` and `make test-newest` write."""

import re
import runpy
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def test_constraints_are_exact_and_portable():
    constraints = runpy.run_path(str(TOOLS / "constraints.py"))["constraints"]
    listed = [
        {"name": "torch", "version": "2.13.0+cpu"},
        {"name": "pip", "version": "23.2.1"},
        {"name": "perceptiondlm", "version": "0.1.0", "editable_project_location": "/somewhere"},
        {"name": "nvidia-cublas", "version": "13.0.0"},
        {"name": "triton", "version": "3.7.0"},
        {"name": "Jinja2", "version": "3.1.6"},
    ]
    head, *lines = constraints(listed, "2026-11-27").splitlines()
    assert re.match(r"# 2026-11-27, Python 3\.\d+\.\d+: ", head)
    assert lines == ["Jinja2==3.1.6", "torch==2.13.0"]


def test_newest_asks_for_everything_without_upper_bounds():
    without_upper_bounds = runpy.run_path(str(TOOLS / "newest.py"))["without_upper_bounds"]
    lines = [
        "transformers<5.25,>=5.19",
        "numpy",
        "gradio<6.32,>=6.31; extra == 'demo'",
        'ray[data]>=2.60; extra == "ray"',
        "perceptiondlm[demo,ray]; extra == 'test'",
        "pytest>=8; extra == 'test'",
        "perceptiondlm[docs]; (python_version >= '3.11') and extra == 'dev'",
        "mkdocs-material==9.8.*; extra == 'docs'",
    ]
    assert without_upper_bounds(lines, "test") == {
        "transformers": "transformers>=5.19",
        "numpy": "numpy",
        "gradio": "gradio>=6.31",
        "ray": "ray[data]>=2.60",
        "pytest": "pytest>=8",
    }


def test_newest_counts_what_passed_and_names_what_failed(tmp_path):
    result = runpy.run_path(str(TOOLS / "newest.py"))["result"]
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="4">'
        '<testcase classname="tests.hf.test_a" name="test_one"/>'
        '<testcase classname="tests.hf.test_a" name="test_two[3]"><failure message="no">...</failure></testcase>'
        '<testcase classname="tests.hf.test_b" name="test_three"><error message="no">...</error></testcase>'
        '<testcase classname="tests.hf.test_b" name="test_four"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = result(report, ["transformers", "pytest"], {"transformers": "5.24.0", "pytest": "9.2.0"}.__getitem__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.pop("date")) and found.pop("python")
    assert found == {
        "versions": {"pytest": "9.2.0", "transformers": "5.24.0"},
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.hf.test_a::test_two[3]", "tests.hf.test_b::test_three"],
    }
