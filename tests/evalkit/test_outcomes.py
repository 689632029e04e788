"""Confidence intervals: points of questions in files of the real harnesses, and the bootstrap."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pdlm_evalkit import outcomes
from pdlm_evalkit.benchmarks import BENCHMARKS
from pdlm_evalkit.bootstrap import limits, resample
from pdlm_evalkit.report import collect

RESULTS = Path(__file__).parent / "results"
NAMED = {benchmark.name: benchmark for benchmark in BENCHMARKS}


class TestBootstrap:
    def test_a_share_has_the_binomial_interval(self):
        """700 of 1,000 questions: the standard error is sqrt(0.7 * 0.3 / 1000) = 1.449 points."""
        units = np.array([[1.0, 1.0]] * 700 + [[0.0, 1.0]] * 300)
        drawn = resample(units)
        assert drawn.shape == (2000, 1, 2) and (drawn[..., 1] == 1000).all()
        low, high = limits(drawn[:, 0, 0] / 1000)
        assert (low, high) == pytest.approx((0.7 - 1.96 * 0.01449, 0.7 + 1.96 * 0.01449), abs=0.002)

    def test_the_order_of_units_does_not_matter(self):
        units = np.random.default_rng(1).random((40, 2))
        assert (resample(units) == resample(units[::-1])).all()

    def test_strata_keep_their_sizes(self):
        units = np.array([[k, 1.0] for k in range(7)])
        drawn = resample(units, ["b", "a", "a", "b", "a", "a", "a"])
        assert drawn.shape == (2000, 2, 2)
        assert (drawn[:, 0, 1] == 5).all() and (drawn[:, 1, 1] == 2).all()
        assert set(drawn[:, 1, 0]) == {0, 3, 6}  # two of the units 0 and 3


@pytest.mark.parametrize("kind", ["plain", "split", "rules"])
def test_all_sixteen_of_vlmevalkit(kind):
    """The points give the score of the harness: every benchmark has an interval, which holds its score."""
    rows = collect([RESULTS / kind])
    assert len(rows) == (14 if kind == "rules" else 16)
    for row in rows:
        assert row.no_interval == "" and row.interval is not None, row
        low, high = row.interval
        assert 0 <= low <= row.score <= high <= 100, row.benchmark


@pytest.mark.parametrize("change, said", [
    (None, "no file *_AI2D_TEST_*_result with points of questions"),
    (("hit", "right"), "not the points of AI2D (KeyError"),
    (('"0"\t"Match', '"1"\t"Match'), "the points of the questions give"),
    (('"0"\t"Match', '"x"\t"Match'), "not the points of AI2D (ValueError"),
])  # fmt: skip
def test_no_interval_without_the_very_points(change, said, tmp_path):
    shutil.copytree(RESULTS / "split", tmp_path / "run")
    (path,) = (tmp_path / "run").glob("*AI2D*")
    if change is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(*change))
    row = next(row for row in collect([tmp_path]) if row.benchmark == "AI2D")
    assert row.score is not None and row.interval is None and said in row.no_interval


def test_a_withheld_score_has_no_interval():
    assert all(row.interval is None for row in collect([RESULTS / "judge_died"]) if row.score is None)


def test_hallusionbench_draws_sets():
    """Two sets of 2 figures and 2 questions; one is right, the other has one wrong answer of four."""
    names = [(name, figure, question) for name in "ab" for figure in "01" for question in "01"]
    found = outcomes.hallusion(names, [1, 1, 1, 1, 1, 1, 1, 0])
    assert found.sums.tolist() == [[[4, 4], [2, 2], [2, 2]], [[3, 4], [1, 2], [1, 2]]]
    assert found.score == pytest.approx(100 * (7 / 8 + 3 / 4 + 3 / 4) / 3)
    assert found.interval() == pytest.approx((100 * (3 / 4 + 1 / 2 + 1 / 2) / 3, 100))


def test_sources_weigh_the_same():
    """As in CV-Bench-2D: 1 of 4 and 1 of 1 are 62.5 %, and a source with one question is always drawn once."""
    found = outcomes._questions([1, 0, 0, 0, 1], ["ADE20K"] * 4 + ["COCO"])
    assert found.score == 62.5 and found.interval() == (50, 87.5)


def test_pairs_are_drawn_together():
    assert outcomes._clusters([1, 1, 0, 0], [0, 0, 1, 1]).interval() == (0, 100)


@pytest.mark.parametrize("cells, right", [
    (("multi_choice", "text", "['red', 'blue']", "B", "(B) blue"), True),
    (("multi_choice", "text", "['red', 'blue']", "B", "it is blue"), True),
    (("multi_choice", "text", "['red', 'blue']", "B", "A"), False),
    (("free_form", "integer", "[]", "7", 7), True),
    (("free_form", "integer", "[]", "7", "seven"), False),
    (("free_form", "float", "[]", "1.5", "1.50"), True),
    (("free_form", "list", "[]", "[1, 2]", "[1, 2]"), False),  # VLMEvalKit compares nothing with it
])  # fmt: skip
def test_mathvista(cells, right):
    row = dict(zip(("question_type", "answer_type", "choices", "answer", "res"), cells, strict=True))
    assert outcomes._mathvista_is_right(row | {"answer_option": row["answer"]}) is right


def lmms_row(benchmark, number, right):
    """What the task of lmms-eval 0.7.3 writes of a question."""
    return {
        "MMStar": {"score": float(right), "l2_category": "ab"[number % 2]},
        "SeedBench": {"pred": "A" if right else "B", "answer": "a", "question_id": number},
        "MMMU": {"question_type": "multiple-choice", "answer": "A", "parsed_pred": ["A" if right else "B"]},
        "MathVista": {"true_false": right},
        "MathVerse Vision-Only": int(right),
        "V*": {"score": float(right), "category": "a"},
        "MMVP": {"is_correct": right, "pair_index": number // 2},
        "BLINK": {"is_correct": right},
        "CV-Bench-2D": {"is_correct": right},
    }.get(benchmark.name, float(right))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_lmms_eval(benchmark, tmp_path):
    """6 of 8 right; of MMStar 3 of 4 in each category, and of BLINK 3 of 4 in each task of the group."""
    unit = 100 if benchmark.lmms_percent else 1
    tasks = ["blink_counting", "blink_jigsaw"] if benchmark.name == "BLINK" else [benchmark.lmms]
    scores = {f"{name},none": 0.75 * unit for name in benchmark.lmms_metric.split("+")}
    content = {"results": {benchmark.lmms: scores}}
    if benchmark.name == "BLINK":
        content |= {
            "results": {"blink_counting": scores},
            "groups": {"blink": scores},
            "group_subtasks": {"blink": tasks},
        }
    (tmp_path / "1_results.json").write_text(json.dumps(content))
    for part, task in enumerate(tasks):
        rows = [(k, k not in (2, 5)) for k in range(8)][part :: len(tasks)]
        lines = [json.dumps({benchmark.lmms_metric: lmms_row(benchmark, k, right)}) for k, right in rows]
        (tmp_path / f"1_samples_{task}.jsonl").write_text("\n".join(lines))
    (row,) = collect([tmp_path])
    assert row.score == 75 and row.questions == 8
    if benchmark.name in ("MMBench", "HallusionBench"):
        assert row.interval is None and row.no_interval == "lmms-eval keeps no verdict of single questions"
    else:
        low, high = row.interval
        assert row.no_interval == "" and 30 <= low <= 50 and high == 100


def test_the_strict_judge(tmp_path):
    strict = {"benchmark": "ChartQA", "accuracy": 0.5, "n_rows": 2, "judge": "q", "n_failed": 0, "n_unparsed": 0}
    (tmp_path / "x_strict.json").write_text(json.dumps(strict))
    (row,) = collect([tmp_path])
    assert row.interval is None and "x_strict.jsonl: no verdicts" in row.no_interval
    (tmp_path / "x_strict.jsonl").write_text('{"verdict": "CORRECT"}\n{"verdict": "INCORRECT"}\n')
    assert collect([tmp_path])[0].interval == (0, 100)
