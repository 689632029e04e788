"""The README and docs/scaling.md quote what the result files say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    pages = [page.read_text(encoding="utf-8") for page in report["PAGES"]]
    for page in pages:
        assert report["write"](page) == page, "python benchmarks/report.py --write brings the pages up to date"
    for name, table in report["tables"]().items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in "".join(pages)
