"""What the judges of lmms-eval's own tasks do is counted, from its own code against a local server."""

import importlib
import json
import os
import random
import time

import pytest
import requests
from judge_server import JudgeServer, text_of
from openai.resources.chat.completions import AsyncCompletions, Completions

os.environ.setdefault("OPENAI_API_KEY", "none")  # read when the tasks are imported

from pdlm_evalkit.lmms_judge import TaskJudges, judged_beside  # noqa: E402
from pdlm_evalkit.lmms_run import name_what_failed  # noqa: E402
from pdlm_evalkit.report import collect  # noqa: E402

OBSERVED = ((requests, "post"), (Completions, "create"), (AsyncCompletions, "create"))
OBSERVED += ((random, "choice"), (random, "randint"))


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """A function that begins a run: observes the judges, with the replies that earlier runs kept."""
    originals = [(place, name, getattr(place, name)) for place, name in OBSERVED]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def observe():
        for place, name, original in originals:
            monkeypatch.setattr(place, name, original)
        found = TaskJudges(tmp_path / "judge.sqlite")
        found.install()
        return found

    return observe


@pytest.fixture
def judges(begin):
    return begin()


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
    assert name_what_failed(judges.counts())


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


def mmbench(server, version, rows):
    module = importlib.import_module("lmms_eval.tasks.mmbench.mmbench_evals")
    evaluator = module.MMBench_Evaluator(API_KEY="k", API_URL=server.url + "/chat/completions", model_version=version)
    items = [dict(zip("ABCD", "wxyz", strict=True), question="Which?", prediction=said) for said in rows]
    return [evaluator.extract_answer_from_item(item)[0] for item in items]


def test_a_second_run_asks_only_where_the_first_got_no_option(begin):
    """By `requests`: rows that failed, or whose replies were of no use, are asked again; a duplicate row is not."""
    rows = ("red", "red", "blue", "odd")

    def reply(body):
        return "teapot" if "odd" in text_of(body) else "A"

    with JudgeServer(reply, fails) as server:
        first = begin()
        mmbench(server, "m", rows)
        asked = len(server.bodies)
        assert first.counts() == {"mmbench": {"judge": 2, "failed": 1, "random": 2}}
        server.reply, server.faults = (lambda body: "B"), None
        second = begin()
        assert mmbench(server, "m", rows) == ["A", "A", "B", "B"]
        assert sorted("odd" in text_of(body) for body in server.bodies[asked:]) == [False, True]
        assert second.counts() == {"mmbench": {"judge": 3, "failed": 0, "random": 0}}
        third = begin()
        assert mmbench(server, "m", rows) == ["A", "A", "B", "B"] and len(server.bodies) == asked + 2
        assert third.counts() == second.counts()
        assert mmbench(server, "another judge", ("red",)) == ["B"] and len(server.bodies) == asked + 3


def test_kept_replies_of_the_openai_package(begin, monkeypatch):
    from lmms_eval.llm_judge.providers.openai import OpenAIProvider

    module = importlib.import_module("lmms_eval.tasks.mathverse.mathverse_evals")
    evaluator = object.__new__(module.MathVerseEvaluator)
    with JudgeServer(lambda body: "1", fails) as server:
        evaluator.server = OpenAIProvider()
        evaluator.server.client = evaluator.server.client.with_options(base_url=server.url, max_retries=0)
        for faults in (fails, None):
            server.faults, server.bodies = faults, []
            judges = begin()
            assert evaluator.score_answer("How many?", "7", "seven")
            scored = evaluator.score_answer("How many?", "7", "blue")
        assert scored and [text_of(body).count("blue") > 0 for body in server.bodies] == [True]
    assert judges.counts() == {"mathverse": {"judge": 2, "failed": 0, "random": 0}}


def test_kept_replies_of_an_asynchronous_judge(begin, tmp_path):
    """Called by the code of a task, whose name is in the file name."""
    code = (
        "import asyncio, openai\n"
        "def ask(url):\n"
        "    async def reply():\n"
        "        client = openai.AsyncOpenAI(api_key='k', base_url=url)\n"
        "        messages = [{'role': 'user', 'content': 'Q'}]\n"
        "        return await client.chat.completions.create(model='m', messages=messages)\n"
        "    return asyncio.run(reply()).choices[0].message.content\n"
    )
    space = {}
    exec(compile(code, "/x/lmms_eval/tasks/some_task/utils.py", "exec"), space)
    with JudgeServer(lambda body: "A") as server:
        for _ in range(2):
            judges = begin()
            assert space["ask"](server.url) == "A"
        assert len(server.bodies) == 1
    assert judges.counts() == {"some_task": {"judge": 1, "failed": 0, "random": 0}}


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
