"""Scores in files that the real VLMEvalKit wrote (tests/evalkit/results), for all 16 benchmarks."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlm_evalkit.benchmarks import BENCHMARKS
from pdlm_evalkit.cli import app
from pdlm_evalkit.report import collect
from pdlm_evalkit.vlmeval_judge import counted_in

RESULTS = Path(__file__).parent / "results"
SCORES = json.loads((RESULTS / "scores.json").read_text())
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def wanted(benchmark, kind):
    # of data without a column `split` VLMEvalKit's score is that of all rows: 3 of 6 instead of 3 of 4
    return 50.0 if benchmark.name == "MMMU" and kind == "plain" else SCORES[benchmark.vlmeval]


@pytest.mark.parametrize("kind", ["plain", "split"])
@pytest.mark.parametrize("file", ["pdlm_report.json", "status.json", "primary"])
def test_all_sixteen(kind, file, tmp_path):
    """From our report, from VLMEvalKit's own status, and from the main scores alone."""
    if file == "primary":
        rows = json.loads((RESULTS / kind / "pdlm_report.json").read_text())
        (tmp_path / "pdlm_report.json").write_text(json.dumps([row | {"metrics": None} for row in rows]))
    else:
        shutil.copy(RESULTS / kind / file, tmp_path)
    found = {BY_NAME[row.benchmark]: row.score for row in collect([tmp_path])}
    # the main scores of MMVP (pairs) and HallusionBench (a third of it) are not the paper's
    missing = {"MMVP", "HallusionBench"} if file == "primary" else set()
    assert {b.name: score for b, score in found.items()} == {
        b.name: wanted(b, kind) for b in BENCHMARKS if b.name not in missing
    }


def test_mmmu_without_a_split_says_what_it_counts():
    note = next(row.note for row in collect([RESULTS / "plain"]) if row.benchmark == "MMMU")
    assert "all rows count" in note


@pytest.mark.parametrize("change, said", [
    ({"metrics": {"split=none|Overall": 63.7}}, "MMStar has the score 6370"),
    ({"metrics": None, "primary_metric": "Overall Acc", "primary_metric_value": 10000.0}, "the score 10000"),
    ({"metrics": {"split=none|Overall": -0.5}}, "the score -50"),
])  # fmt: skip
def test_a_score_that_is_no_percentage_names_its_file(change, said, tmp_path):
    row = next(r for r in json.loads((RESULTS / "plain/pdlm_report.json").read_text()) if r["benchmark"] == "MMStar")
    (tmp_path / "pdlm_report.json").write_text(json.dumps([row | change]))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and said in done.stderr and str(tmp_path / "pdlm_report.json") in done.stderr


def test_scores_of_other_splits_only_are_none(tmp_path):
    metrics = {"split=a|Overall": 0.5, "split=b|Overall": 0.6}
    (tmp_path / "pdlm_report.json").write_text(json.dumps([{"benchmark": "AI2D_TEST", "metrics": metrics}]))
    (row,) = collect([tmp_path])
    assert row.score is None and row.problem == "VLMEvalKit wrote no Overall of all questions or of the split test"
    metrics["split=test|Overall"] = 0.7
    (tmp_path / "pdlm_report.json").write_text(json.dumps([{"benchmark": "AI2D_TEST", "metrics": metrics}]))
    assert [row.score for row in collect([tmp_path])] == [70.0]


LETTER = {b.vlmeval for b in BENCHMARKS if b.kind == "letter"}
JUDGED = dict.fromkeys([*LETTER, "HallusionBench"], 1) | {"MathVista_MINI": 3, "MathVerse_MINI_Vision_Only": 6}
DIED = {name: {"random": 1, "failed": 0} for name in LETTER}
DIED |= {"MathVista_MINI": {"random": 0, "failed": 3}, "MathVerse_MINI_Vision_Only": {"random": 0, "failed": 6}}
DIED |= {"HallusionBench": {"random": 0, "failed": 1}}


@pytest.mark.parametrize("file", ["pdlm_report.json", "status.json"])
def test_a_judge_that_died(file, tmp_path):
    """What was drawn at random or failed is counted, also from VLMEvalKit's own files, and the score is withheld."""
    shutil.copytree(RESULTS / "judge_died", tmp_path / "PerceptionDLM-Base" / "T1")
    if file == "status.json":
        (tmp_path / "PerceptionDLM-Base/T1/pdlm_report.json").unlink()
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert done.exit_code == 1
    rows = {BY_NAME[row["benchmark"]].vlmeval: row for row in json.loads(done.stdout)}
    assert len(rows) == 16
    for name, row in rows.items():
        if name in DIED:
            assert row["score"] is None and {k: row["judged"][k] for k in ("random", "failed")} == DIED[name], name
            assert "judge failed" in row["problem"] or "at random" in row["problem"]
        else:
            assert row["score"] == SCORES[name], name
    assert "withheld" in CliRunner().invoke(app, ["report", str(tmp_path)]).stdout


def test_a_run_whose_answers_were_scored_again_is_left_out(tmp_path):
    for name, kind, source in (("T1", "judge_died", None), ("T2", "judge_died", "T1"), ("T3", "split", "T2")):
        rows = json.loads((RESULTS / kind / "pdlm_report.json").read_text())
        (tmp_path / "M" / name).mkdir(parents=True)
        (tmp_path / "M" / name / "pdlm_report.json").write_text(json.dumps([r | {"source_run": source} for r in rows]))
    found = collect([tmp_path])
    assert len(found) == 16 and all("T3" in row.source and row.score is not None for row in found)


def test_a_healthy_judge_is_counted():
    for row in collect([RESULTS / "split"]):
        name = BY_NAME[row.benchmark].vlmeval
        judged = JUDGED.get(name, 0)
        assert row.judged["judge"] == judged and row.judged["rules"] == row.questions - judged, name
        assert not row.judged["random"] + row.judged["failed"] + row.judged["unparsed"]


def test_rules_alone_count_what_they_cannot_read():
    for row in collect([RESULTS / "rules"]):
        name = BY_NAME[row.benchmark].vlmeval
        unread = 1 if name in {*LETTER, "HallusionBench"} else 0
        assert row.judged["unparsed"] == unread and row.judged["rules"] == row.questions - unread, name
        assert counted_in(RESULTS / "rules", "PerceptionDLM-Base", name, "exact_matching")["unparsed"] == unread
        assert row.score is not None
