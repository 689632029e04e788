"""The arithmetic: on a benchmark small enough to compute by hand, and on the recorded results of the original."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlm_evalkit.paradlc.cli import app
from pdlm_evalkit.paradlc.data import Question, load_questions
from pdlm_evalkit.paradlc.scoring import PARSERS, read_answers, score_answers, score_mask, totals

FOUR = Question("?", ("right", "nothing", "wrong", "half"), (1, 0, -1, 0.5), "positive")
TWO = Question("?", ("there", "absent"), (-1, 1), "negative")
QUESTIONS = {"a": (FOUR, FOUR, TWO), "b": (TWO, TWO), "c": (FOUR,), "d": (FOUR, TWO)}
REFERENCE = os.environ.get("PDLM_PARADLC")


def total(answers, parser="robust", benchmark="paradlc"):
    return totals(score_answers(QUESTIONS, answers, parser, benchmark))


def test_a_benchmark_by_hand():
    """pos: (1 + 0.5) / 2, 0 (none), -1, 1; neg: 1, (1 - 1) / 2, none, 1; score: 2.5 / 3, 0, -1, 1."""
    answers = {"a": ["Yes", "A", "D", "B"], "b": ["A", "B", "A"], "c": ["yes", "C"], "d": ["Yes", "right", "absent"]}
    for parser in PARSERS:
        assert total(answers, parser) == {
            "avg_pos": (0.75 + 0 - 1 + 1) / 4,
            "avg_neg": (1 + 0 + 1) / 3,
            "avg": ((0.75 + 0 - 1 + 1) / 4 + 2 / 3) / 2,
            "mean_mask_score": (2.5 / 3 + 0 - 1 + 1) / 4,
            "n_masks": 4,
            "n_recognised": 4,
            "n_unparsed": 0,
            "n_missing": 0,
            "n_failed": 0,
            "n_no_positive": 1,
        }


def test_what_is_not_recognised_scores_at_most_nothing():
    found = score_mask("a", QUESTIONS["a"], ["No", "A", "C", "B"], "reference", "paradlc")
    assert (found.score_pos, found.score_neg, found.score) == (-0.5, 0, -1 / 3)
    assert found.recognised is False


def test_nothing_leaves_a_denominator():
    """a: one failed, one unparsed, one short; b: no caption; c: failed recognition; d: whole."""
    answers = {"a": ["Yes", None, "(?)"], "c": [None, "A"], "d": ["Yes", "A", "B"]}
    found = total(answers)
    assert (found["n_missing"], found["n_failed"], found["n_unparsed"], found["n_recognised"]) == (1, 3, 1, 2)
    assert found["avg_pos"] == 1 / 4 and found["avg_neg"] == 1 / 3 and found["mean_mask_score"] == 1 / 4
    assert total(answers, "reference")["avg_pos"] == 2 / 4  # it does not clip what it cannot read


@pytest.mark.parametrize("parser, score", [("robust", 0), ("reference", 1)])
@pytest.mark.parametrize("recognition", ["(hm)", "C", None])
def test_a_recognition_that_cannot_be_read(parser, score, recognition):
    found = score_mask("c", QUESTIONS["c"], [recognition, "A"], parser, "paradlc")
    assert found.recognised is None and found.score == score
    assert (found.num_failed, found.num_unparsed) == ((1, 0) if recognition is None else (0, 1))


def test_the_two_scripts_read_nothing_differently():
    assert total({"c": ["", "A"]}, "reference")["n_recognised"] == 1
    assert total({"c": ["", "A"]}, "reference", "dlc") | {"avg": 0} == total({"c": ["?", "A"]}, "reference") | {
        "avg": 0
    }


@pytest.mark.parametrize(
    "answers, said",
    [
        ({"x": ["Yes"]}, "1 masks are not in the benchmark: x"),
        ({"c": ["Yes", "A", "B"]}, "c has 3 replies to 2 questions"),
        ({"c": "Yes"}, "c: expected a list of replies"),
        ({"c": ["Yes", 1]}, "c: expected a list of replies"),
        (["Yes"], "expected an object"),
    ],
)
def test_answers_of_another_form(answers, said, tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=said):
        read_answers(path, QUESTIONS)


def test_unknown_names():
    with pytest.raises(ValueError, match="parser must be one of"):
        score_answers(QUESTIONS, {}, "strict")


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE:
        pytest.skip("PDLM_PARADLC names no folder with annotations/ and golden/")
    return Path(REFERENCE)


def test_the_original_scorers_results(reference, tmp_path):
    """Totals and masks of every recorded profile, to the last bit."""
    questions = load_questions(reference / "annotations")
    recorded = json.loads((reference / "golden" / "scores.json").read_text())
    for profile, expected in recorded.items():
        answers = read_answers(reference / "golden" / f"answers_{profile}.json", questions)
        scores = score_answers(questions, answers, "reference")
        found = totals(scores)
        assert {k: v for k, v in expected.items() if k != "per_mask"} == {k: found[k] for k in expected if k in found}
        for score in scores:
            ours = score.as_dict()
            assert {name: ours[name] for name in expected["per_mask"][score.id]} == expected["per_mask"][score.id]


def test_the_command(reference, tmp_path):
    golden = reference / "golden"
    command = ["score", "--annotations", str(reference / "annotations"), "--parser", "reference", "--json"]
    command += ["--answers", str(golden / "answers_random.json"), "--per-mask", str(tmp_path / "masks.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    expected = json.loads((golden / "scores.json").read_text())["random"]
    found = json.loads(result.stdout)
    assert all(found[name] == expected[name] for name in ("avg_pos", "avg_neg", "avg", "mean_mask_score"))
    assert len(json.loads((tmp_path / "masks.json").read_text())) == 299
