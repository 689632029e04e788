"""docs/evaluation.md: what needs no harness runs; the rest is named with the test that runs it."""

import json

import pytest
from judge_server import JudgeServer, text_of, truthful
from pages import Page

LMMS = "tests/lmms/test_lmms.py::"
VLMEVAL = "tests/evalkit/test_vlmeval.py::"
ELSEWHERE = {
    "pdlm-eval check": "tests/evalkit/test_check_report.py::test_all_is_well: needs the benchmarks' data",
    "pdlm-eval lmms": LMMS + "test_paradlc_bench_with_a_judge: lmms-eval's environment",
    "lmms-eval --model pdlm --model_args": LMMS + "test_regions_score_what_our_own_evaluation_says: its environment",
    "lmms-eval --model pdlm --include_path": LMMS + "test_choices_score_what_our_own_evaluation_says: its environment",
    "torchrun --nproc-per-node=8 -m pdlm_evalkit.lmms_run": LMMS + "test_two_ranks: lmms-eval's environment",
    "pdlm-eval vlmeval": VLMEVAL + "test_a_run_has_settings_costs_and_exit_code: needs VLMEvalKit, there a stand-in",
    "torchrun --nproc-per-node=8 -m pdlm_evalkit.vlmeval_run": VLMEVAL + "test_two_ranks_without_cuda: the same",
    "vllm serve": "tests/vllm/test_server.py::test_a_benchmark_is_captioned_through_the_server: vLLM's environment",
}


def reply(body):
    """A judge that finds every answer right, and reads captions truthfully."""
    return "CORRECT" if "Ground Truth" in text_of(body) else truthful(body)


def test_the_page(here):
    pandas = pytest.importorskip("pandas")
    rows = [{"index": 1, "question": "When?", "answer": "12:30", "prediction": "At 12:30"}]
    pandas.DataFrame(rows).to_excel(here / "PerceptionDLM-Base_ChartQA_TEST.xlsx", index=False)
    strict = {"benchmark": "ChartQA", "accuracy": 0.9, "n_rows": 10, "judge": "q", "n_failed": 0, "n_unparsed": 0}
    (here / "outputs").mkdir()
    (here / "outputs" / "ChartQA_strict.json").write_text(json.dumps(strict))
    with JudgeServer(reply) as server:
        judged = ("pdlm-eval strict", "pdlm-eval paradlc judge")
        ran = Page("evaluation.md", ELSEWHERE).run(
            lambda text: f"{text} --base-url {server.url}" if text.startswith(judged) else text
        )
    said = {r.command.split(" --")[0]: r.stdout for r in ran if "--plot scores.png" not in r.command}
    assert json.loads(said["pdlm-eval strict PerceptionDLM-Base_ChartQA_TEST.xlsx"])["accuracy"] == 1
    assert json.loads(said["pdlm-eval report outputs/"])[0]["score"] == 90
    scores = json.loads(next(r.stdout for r in ran if "--parser reference" in r.command))
    assert scores["n_masks"] == len(json.loads((here / "pdlm_evalkit/paradlc/example/qa.json").read_text()))
    assert (here / "report.md").stat().st_size > 500 and (here / "report.png").stat().st_size > 5000
