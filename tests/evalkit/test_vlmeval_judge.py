"""How answers are scored in VLMEvalKit, observed; and runs that go on. With the real one: test_vlmeval_checkout.py."""

import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdlm_evalkit.vlmeval_judge import FAILURE, JudgeLog, outcome_of
from pdlm_evalkit.vlmeval_report import again, problem_of
from pdlm_evalkit.vlmeval_resume import Attempts, go_on, is_reusable, write_whole

NUMBER = {"index": 1, "question_type": "free_form", "answer_type": "integer", "choices": "[]"}
OPTION = {"index": 1, "question_type": "multi_choice", "answer_type": "text", "choices": "['red', 'dark blue']"}


class Harness:
    """What VLMEvalKit does with a judge, and the log that observes it."""

    def __init__(self, path, replies):
        self.log, self.replies, self.asked = JudgeLog(path), dict(replies), []
        self.log._subject = ("M", "D")
        self.generate = self.log._generate(self._reply)
        self.new_func = self.log._scoring(lambda number, function, inputs: (number, function(**inputs)))
        space = {"__name__": "vlmeval.dataset.utils.multiple_choice"}
        exec("def draw(choice):\n    return choice('AB')", space)
        self.draw = lambda: space["draw"](self.log._choice(random.choice))

    def _reply(self, model, message):
        self.asked.append(message)
        said = self.replies.get(message, FAILURE)
        return said.pop(0) if isinstance(said, list) else said

    def letter(self, item):
        """As `extract_answer_from_item`: three tries, then a draw."""
        if item["prediction"] in "AB":
            return {"opt": item["prediction"], "log": item["prediction"]}
        for _ in range(3):
            said = self.generate(SimpleNamespace(model="m"), f"Q{item['index']}: {item['prediction']}")
            if said in ("A", "B", "Z"):
                return {"opt": said, "log": said}
        return {"opt": self.draw(), "log": "Failed to predict, thus randomly generate one. "}

    def score(self, *predictions):
        for index, prediction in enumerate(predictions):
            self.new_func(index, self.letter, {"item": {"index": index, "prediction": prediction}})
        return self.log.counts("M", "D", len(predictions))


def test_draws_and_failures_are_asked_again_and_nothing_else(tmp_path):
    path = tmp_path / "judge.sqlite"
    first = Harness(path, {"Q1: red": "A", "Q2: blue": "teapot", "Q4: any": "Z"})
    counts = {"rules": 1, "unparsed": 0, "judge": 2, "random": 2, "failed": 0, "requests": 8}
    assert first.score("A", "red", "blue", "green", "any") == counts
    again = Harness(path, {"Q2: blue": ["?", "B"], "Q3: green": "A"})
    assert again.score("A", "red", "blue", "green", "any") == counts | {"judge": 4, "random": 0, "requests": 3}
    assert again.asked == ["Q2: blue", "Q2: blue", "Q3: green"]
    third = Harness(path, {})
    assert third.score("A", "red", "blue", "green", "any")["judge"] == 4 and not third.asked


def test_a_group_of_answers_is_counted_by_its_prompts(tmp_path):
    """A circular evaluation scores four answers at once."""
    pandas = pytest.importorskip("pandas")
    harness = Harness(tmp_path / "judge.sqlite", {"Q0: red": "A"})
    table = pandas.DataFrame([{"index": 0, "prediction": "red"}, {"index": 1000000, "prediction": "odd"}])
    harness.new_func(0, lambda sub_data: [harness.letter(row) for _, row in sub_data.iterrows()], {"sub_data": table})
    assert harness.log.counts("M", "D", 8) == {
        "rules": 6, "unparsed": 0, "judge": 1, "random": 1, "failed": 0, "requests": 4,
    }  # fmt: skip


def test_a_judge_that_is_asked_outside_any_pool(tmp_path):
    harness = Harness(tmp_path / "judge.sqlite", {"a": "A", "b": FAILURE})
    for message in ("a", "b", "hello"):
        harness.generate(SimpleNamespace(model="m"), message)
    harness.draw()
    assert harness.log.counts("M", "D", 5) == {
        "rules": 2, "unparsed": 0, "judge": 1, "random": 1, "failed": 1, "requests": 2,
    }  # fmt: skip


def test_an_answer_that_is_scored_in_two_steps_counts_once_as_the_worse(tmp_path):
    harness = Harness(tmp_path / "judge.sqlite", {"extract": "7", "score": "maybe"})
    for step, result in (("extract", {"log_extract": "Succeed"}), ("score", {"log_score": "All 5 retries failed.\n"})):
        line = {"index": 5, "step": step}
        ask = lambda line, result=result: harness.generate(SimpleNamespace(model="m"), line["step"]) and result  # noqa: E731
        harness.new_func(0, ask, {"line": line})
    assert harness.log.counts("M", "D", 1) == {
        "rules": 0, "unparsed": 0, "judge": 0, "random": 0, "failed": 1, "requests": 2,
    }  # fmt: skip


def test_draws_outside_the_scoring_are_not_counted(tmp_path):
    harness = Harness(tmp_path / "judge.sqlite", {})
    harness.log._choice(random.choice)("AB")
    assert harness.log.counts("M", "D", 1)["random"] == 0


@pytest.mark.parametrize("reply, drawn, result, row, outcome", [
    ("A", False, {"hit": 1, "log": "Match Log: A. "}, None, "judge"),
    (FAILURE + ".", False, {"res": "", "log": "All 5 retries failed.\n"}, None, "failed"),
    (FAILURE, True, {"hit": 1}, None, "random"),
    ("teapot", True, {"hit": 1}, None, "random"),
    ("  ", False, None, None, "failed"),
    ("Unknown", False, "Unknown", None, "judge"),  # yes or no: the prompt allows this word
    ("teapot", False, "Unknown", None, "failed"),
    ("Yes", False, "Yes", None, "judge"),
    ("7", False, {"log": "Try 0: output is x, failed to parse.\nSucceed", "res": "7"}, NUMBER, "judge"),
    ("teapot", False, {"log": "Succeed", "res": "teapot"}, NUMBER, "failed"),
    ("None", False, {"log": "Succeed", "res": "None"}, NUMBER, "judge"),  # there is no number in the answer
    ("B", False, {"log": "Succeed"}, OPTION, "judge"),
    ("dark blue", False, {"log": "Succeed"}, OPTION, "judge"),
    ("teapot", False, {"log": "Succeed"}, OPTION, "failed"),
    ("teapot", False, {"log": "Succeed"}, OPTION | {"question_type": "free_form"}, "judge"),  # any text may be right
])  # fmt: skip
def test_outcome_of(reply, drawn, result, row, outcome):
    assert outcome_of(reply, drawn, result, row) == outcome


class TestGoOn:
    def run(self, tmp_path, name, settings, rows=None):
        folder = tmp_path / "M" / name
        folder.mkdir(parents=True)
        (folder / "pdlm_run.json").write_text(json.dumps({"settings": settings, "started": [1.0]}))
        if rows is not None:
            (folder / "pdlm_report.json").write_text(json.dumps(rows))
        os.utime(folder, (int(name[1:]),) * 2)

    def attempts(self, tmp_path, settings, asked=False):
        return len(go_on(tmp_path, "M", settings, ["MMStar"], asked, problem_of).started)

    def test_a_run_without_end_or_with_a_fault_goes_on(self, tmp_path):
        row = {"benchmark": "MMStar", "primary_metric_value": 0.5, "infer_total": 4}
        assert self.attempts(tmp_path, {"steps": 2}) == 1
        self.run(tmp_path, "T10", {"steps": 2})
        assert self.attempts(tmp_path, {"steps": 2}) == 2
        assert self.attempts(tmp_path, {"steps": 4}) == 1
        self.run(tmp_path, "T20", {"steps": 2}, [row])
        assert self.attempts(tmp_path, {"steps": 2}) == 1 and self.attempts(tmp_path, {"steps": 2}, asked=True) == 2
        self.run(tmp_path, "T30", {"steps": 2}, [row | {"judged": {"random": 1}}])
        assert self.attempts(tmp_path, {"steps": 2}) == 2

    def test_a_model_that_goes_on_does_so_beside_one_that_begins(self, tmp_path):
        """`--reuse` is for all models: right if the other one has nothing to reuse, wrong if it has other settings."""
        self.run(tmp_path, "T10", {"steps": 2})
        goes_on = go_on(tmp_path, "M", {"steps": 2}, ["MMStar"], False, problem_of)
        assert is_reusable(tmp_path, "M", goes_on) and is_reusable(tmp_path, "New", Attempts({}))
        assert not is_reusable(tmp_path, "M", go_on(tmp_path, "M", {"steps": 4}, ["MMStar"], False, problem_of))

    def test_other_settings_are_refused_by_name(self, tmp_path):
        self.run(tmp_path, "T10", {"steps": 2, "presets": "paper"})
        with pytest.raises(ValueError, match="T10: the predictions to reuse were made with steps 2 instead of 4. Use"):
            self.attempts(tmp_path, {"steps": 4, "presets": "paper"}, asked=True)

    def test_folders_of_vlmevalkit_itself(self, tmp_path):
        (tmp_path / "M" / "T10").mkdir(parents=True)
        (tmp_path / "M" / "T10" / "status.json").write_text("{}")
        assert self.attempts(tmp_path, {}) == 1 and self.attempts(tmp_path, {}, asked=True) == 1


def test_files_of_vlmevalkit_are_whole_or_missing(tmp_path, monkeypatch):
    """Whatever ends the function that writes them; VLMEvalKit's own changes the form if one cannot be written."""

    def dump(rows, path):
        place = Path(path)
        place.write_text(rows[0])
        if rows[1:] == ["fails"]:
            raise KeyboardInterrupt
        if rows[1:]:
            place.rename(place.with_suffix(".pkl"))

    module = SimpleNamespace(dump=dump)
    monkeypatch.setitem(sys.modules, "vlmeval.inference", module)
    write_whole()
    module.dump(["old"], str(tmp_path / "a.xlsx"))
    with pytest.raises(KeyboardInterrupt):
        module.dump(["cut", "fails"], str(tmp_path / "a.xlsx"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.xlsx"] and (tmp_path / "a.xlsx").read_text() == "old"
    module.dump(["new", "form"], str(tmp_path / "b.xlsx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.xlsx", "b.pkl"]


def test_the_settings_of_an_attempt_start_with_now():
    assert len(Attempts({}).started) == 1


def test_the_command_that_judges_again_has_no_key():
    given = ["--data", "A", "--judge-key", "secret", "--reuse", "--reuse-aux", "infer", "--work-dir", "my runs"]
    assert again(given) == "pdlm-eval vlmeval --data A --judge-key KEY --work-dir 'my runs' --mode eval"
