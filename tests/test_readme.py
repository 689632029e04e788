"""The README quotes what the result files say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = list(runpy.run_path(str(ROOT / "benchmarks" / "report.py"))["tables"]())
    assert len(tables) >= 4
    for table in tables:
        assert table in readme, f"python benchmarks/report.py prints a table that the README lacks:\n{table}"
