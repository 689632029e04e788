"""The README quotes what the result files say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    assert report["write"](readme) == readme, "python benchmarks/report.py --write brings the README up to date"
    for name, table in report["tables"]().items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in readme
