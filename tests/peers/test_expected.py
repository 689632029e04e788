"""expected.json, what `make test-peers` compares with: few failures, each with its reason, and the docs' table."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
DOCS = (HERE.parents[1] / "docs" / "transformers.md").read_text()

_spec = importlib.util.spec_from_file_location("run_peers", HERE / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


def counts(mixin: str) -> list[int]:
    """Passed, failed, skipped."""
    listed = EXPECTED[mixin]
    return [listed["passed"], len(listed["failures"]), sum(map(len, listed["skips"].values()))]


@pytest.mark.parametrize("mixin", run.MIXINS)
def test_few_failures_each_with_a_reason(mixin):
    failures = EXPECTED[mixin]["failures"]
    assert EXPECTED[mixin]["passed"] > 0
    assert len(failures) <= run.LIMITS[mixin]
    for name, reason in failures.items():
        assert len(reason.split()) >= 6, name
        assert not re.match(r"\w*(Error|Exception)\b", reason), f"{name}: write why, not what it raised"


@pytest.mark.parametrize("mixin", run.MIXINS)
def test_a_test_is_listed_once(mixin):
    skipped = [name for names in EXPECTED[mixin]["skips"].values() for name in names]
    names = skipped + list(EXPECTED[mixin]["failures"])
    assert len(names) == len(set(names))
    assert all(EXPECTED[mixin]["skips"])  # every skip has transformers' reason


def test_table_of_the_docs():
    assert EXPECTED["transformers"] in DOCS
    rows = {mixin: list(map(int, numbers)) for mixin, *numbers in run.ROW.findall(DOCS)}
    assert rows == {mixin: counts(mixin) for mixin in run.MIXINS}


def test_compare_finds_what_differs():
    listed = {"failures": {"a": "why", "b": "why", "gone": "why"}, "skips": {"needs a GPU": ["c"]}}
    outcomes = {name: ("failed", "boom") for name in "ad"} | {name: ("skipped", "no GPU") for name in "ce"}
    faults = run.compare(outcomes | {"b": ("passed", ""), "f": ("passed", "")}, listed)
    assert faults == [
        "d failed, which is not in the list: boom",
        "e skipped, which is not in the list: no GPU",
        "b is in the list of failures, but passed",
        "gone is in the list of failures, but is no test",
    ]


def test_outcomes_of_a_report(tmp_path):
    """A test that fails in one of its subtests has failed."""
    cases = [
        '<testcase classname="tests.models.T" name="test_a"/>',
        '<testcase classname="tests.models.T" name="test_b"><skipped message="test is slow"/></testcase>',
        '<testcase classname="tests.models.T" name="test_c"><failure message="One&#10;Two"/></testcase>',
        '<testcase classname="tests.models.T" name="test_c"/>',
        '<testcase classname="tests.models.T" name="test_d"/>',
        '<testcase classname="tests.models.T" name="test_d"><error message="Broken"/></testcase>',
    ]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert run.read_report(report) == {
        "T.test_a": ("passed", ""),
        "T.test_b": ("skipped", "test is slow"),
        "T.test_c": ("failed", "One"),
        "T.test_d": ("failed", "Broken"),
    }
