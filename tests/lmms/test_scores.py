"""The unit of each score of lmms-eval, from its own aggregation: 3 of 4 right are 75 %."""

import json
import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("OPENAI_API_KEY", "none")  # MathVista of lmms-eval wants one when it is imported

import lmms_eval.api.metrics  # noqa: E402, F401 - registers "mean"
from lmms_eval.api.registry import get_aggregation  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_eval.utils import load_yaml_config  # noqa: E402

from pdlm_evalkit.benchmarks import BENCHMARKS, find_benchmark  # noqa: E402
from pdlm_evalkit.report import collect  # noqa: E402

RIGHT = (True, True, True, False)
MATH = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
RESULTS = {
    "MMStar": [{"score": float(right), "l2_category": "a"} for right in RIGHT],
    "SeedBench": [{"pred": "A" if right else "B", "answer": "A", "question_id": 1} for right in RIGHT],
    "MMBench": [],
    "MMMU": [{"id": k, "subdomain": "Art", "question_type": "multiple-choice", "answer": "A",
              "parsed_pred": ["A" if right else "B"]} for k, right in enumerate(RIGHT)],
    "MathVista": [{"question_id": k, "true_false": right, "metadata": {"split": "testmini"} | dict.fromkeys(MATH, "a")}
                  for k, right in enumerate(RIGHT)],
    "MathVerse Vision-Only": [int(right) for right in RIGHT],
    "HallusionBench": [{"category": "VD", "subcategory": "a", "set_id": k, "figure_id": 0, "question_id": 0,
                        "gpt4v_output_gpt_check": str(int(right))} for k, right in enumerate(RIGHT)],
    "V*": [{"category": "a", "score": float(right)} for right in RIGHT],
} | {name: [{"is_correct": right} for right in RIGHT] for name in ("MMVP", "BLINK", "CV-Bench-2D")}  # fmt: skip
RESULTS |= {
    name: [float(right) for right in RIGHT] for name in ("AI2D", "ChartQA", "DocVQA", "InfoVQA", "RealWorldQA")
}


@pytest.fixture(scope="module")
def tasks():
    return TaskManager("ERROR").task_index


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_unit(benchmark, tasks, tmp_path, monkeypatch):
    task = "blink_relative_depth" if benchmark.name == "BLINK" else benchmark.lmms
    listed = load_yaml_config(tasks[task]["yaml_path"], mode="full")["metric_list"]
    scores = {}
    for name in benchmark.lmms_metric.split("+"):
        aggregate = next(metric["aggregation"] for metric in listed if metric["metric"] == name)
        aggregate = get_aggregation(aggregate) if isinstance(aggregate, str) else aggregate
        space = getattr(aggregate, "__globals__", {})
        if benchmark.name == "HallusionBench":  # the judge has found these
            monkeypatch.setitem(space, "evaluate_by_chatgpt", lambda data, **_: data)
        if benchmark.name == "MMBench":
            monkeypatch.setattr(space["mmbench_evaluator"], "eval_result", lambda *_, **__: (0.75, {}, {}))
        rows = [row.copy() if isinstance(row, dict) else row for row in RESULTS[benchmark.name]]
        args = (SimpleNamespace(output_path=str(tmp_path)),) if "args" in aggregate.__code__.co_varnames else ()
        scores[f"{name},none"] = aggregate(rows, *args)
    (tmp_path / "1_results.json").write_text(json.dumps({"results": {benchmark.lmms: scores}}))
    assert find_benchmark(benchmark.lmms) == benchmark
    assert [(row.benchmark, row.score) for row in collect([tmp_path])] == [(benchmark.name, 75.0)]
