"""What `make test-peers` may find, and the table of it in the documentation."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((ROOT / "tests/peers/expected.json").read_text())


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("peers_run", ROOT / "tests/peers/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failures_are_few_and_have_a_reason(runner):
    assert {*runner.MIXINS, "transformers"} == set(EXPECTED)
    for mixin, limit in runner.LIMITS.items():
        failures = EXPECTED[mixin]["failures"]
        assert len(failures) <= limit
        for name, reason in failures.items():
            assert re.fullmatch(r"[A-Za-z].{40,300}\.", reason) and "Error" not in reason, name


def test_the_table_of_the_documentation(runner):
    page = (ROOT / "docs/transformers.md").read_text()
    assert f"with transformers {EXPECTED['transformers']}:" in page
    for mixin in runner.MIXINS:
        listed = EXPECTED[mixin]
        skipped = sum(map(len, listed["skips"].values()))
        assert f"| {mixin} | {listed['passed']} | {len(listed['failures'])} | {skipped} |" in page
