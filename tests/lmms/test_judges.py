"""What the judges of lmms-eval's own tasks do is counted, from its own code against a local server."""

import importlib
import json
import os
import random
import time

import pytest
import requests
from judge_server import JudgeServer, text_of
from openai.resources.chat.completions import Completions

os.environ.setdefault("OPENAI_API_KEY", "none")  # read when the tasks are imported

from pdlm_evalkit.lmms_judge import TaskJudges, judged_beside  # noqa: E402
from pdlm_evalkit.lmms_run import name_what_failed  # noqa: E402
from pdlm_evalkit.report import collect  # noqa: E402


@pytest.fixture
def judges(monkeypatch):
    for place, name in ((requests, "post"), (Completions, "create"), (random, "choice"), (random, "randint")):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back afterwards
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    found = TaskJudges()
    found.install()
    return found


def fails(number, body):
    return "500" if "blue" in text_of(body) else None


def test_hallusion_bench_reuses_the_reply_before_a_failed_one(judges, monkeypatch, tmp_path):
    module = importlib.import_module("lmms_eval.tasks.hallusion_bench.utils")
    rows = [{"question": "Is it red?", "gt_answer_details": said, "said": said} for said in ("red", "blue", "red too")]
    with JudgeServer(lambda body: "correct", lambda *request: fails(*request) and "drop") as server:
        monkeypatch.setattr(module, "API_URL", server.url + "/chat/completions")
        kept = tmp_path / "gpt_response" / "hallusion_output_vd_model.json"
        kept.parent.mkdir()
        scored = module.evaluate_by_chatgpt(rows, "said", "check", save_json_path=str(kept))
    assert [row["check"] for row in scored] == ["1", "1", "1"]  # which is why they are counted
    assert judges.counts() == {"hallusion_bench": {"judge": 2, "failed": 1, "random": 0}}
    assert name_what_failed(judges.counts(), tmp_path) and not kept.exists()


def test_mmbench_draws_an_option(judges, monkeypatch):
    module = importlib.import_module("lmms_eval.tasks.mmbench.mmbench_evals")
    with JudgeServer(lambda body: "A", fails) as server:
        evaluator = module.MMBench_Evaluator(API_KEY="k", API_URL=server.url + "/chat/completions", model_version="m")
        rows = [
            dict(zip("ABCD", "wxyz", strict=True), question="Which?", prediction=said) for said in ("red", "blue", "B")
        ]
        assert [evaluator.extract_answer_from_item(row)[0] in "ABCDE" for row in rows] == [True] * 3
    assert judges.counts() == {"mmbench": {"judge": 1, "failed": 1, "random": 1}}


def test_mmmu_draws_an_option_in_code_that_several_tasks_share(judges):
    module = importlib.import_module("lmms_eval.tasks.mmmu.utils")
    doc = {"question_type": "multiple-choice", "options": "['red', 'blue']", "answer": "A", "id": "validation_Art_1"}
    for said in ("A", "teapot"):
        module.mmmu_process_results(doc, [said])
    assert judges.counts() == {"mmmu": {"judge": 0, "failed": 0, "random": 1}}


def test_mathverse_asks_through_openai(judges, monkeypatch):
    from lmms_eval.llm_judge.providers.openai import OpenAIProvider

    module = importlib.import_module("lmms_eval.tasks.mathverse.mathverse_evals")
    with JudgeServer(lambda body: "1", fails) as server:
        monkeypatch.setenv("OPENAI_API_URL", server.url)
        evaluator = object.__new__(module.MathVerseEvaluator)
        evaluator.server = OpenAIProvider()
        evaluator.server.client = evaluator.server.client.with_options(base_url=server.url, max_retries=0)
        assert evaluator.score_answer("How many?", "7", "seven")
        evaluator.score_answer("How many?", "7", "blue")
    assert judges.counts() == {"mathverse": {"judge": 1, "failed": 1, "random": 0}}


def test_calls_of_other_code_are_not_counted(judges):
    random.choice("AB")
    # tasks/__init__.py is in the stack of every task that is loaded
    exec(compile("import random\nrandom.choice('AB')", "/x/lmms_eval/tasks/__init__.py", "exec"), {})
    with JudgeServer(lambda body: "A") as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "Q"}]}
        assert requests.post(server.url + "/chat/completions", json=body).ok
    assert judges.counts() == {}


def test_the_report_reads_the_counts(tmp_path):
    results = tmp_path / "1_results.json"
    scores = {
        "mmbench_en_dev": {"gpt_eval_score,none": 80.0},
        "mathverse_testmini_vision_only": {"gpt_eval_score,none": 0.5},
    }
    results.write_text(json.dumps({"results": scores}))
    assert {row.note for row in collect([tmp_path])} == {
        "not run by pdlm-eval lmms: whether the judge answered is unknown"
    }
    counts = {"mmbench": {"judge": 5, "failed": 0, "random": 2}, "mathverse": {"judge": 4, "failed": 0, "random": 0}}
    (tmp_path / "1_judged.json").write_text(json.dumps(counts))
    assert judged_beside(results, "mmbench_en_dev") == counts["mmbench"]
    assert [(row.score, row.problem) for row in collect([tmp_path])] == [
        (None, "2 answers were scored by options drawn at random"), (50.0, ""),
    ]  # fmt: skip
