"""The VLMEvalKit wrapper against a stand-in for a checkout: registration, prompts, ranks, exit codes."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from fake_vlmeval import make
from forked import call
from judge_server import JudgeServer

from pdlm_evalkit.benchmarks import LETTER, SUFFIX
from pdlm_evalkit.benchmarks import find_benchmark as find
from pdlm_evalkit.manifests import read_logs
from pdlm_evalkit.report import collect
from pdlm_evalkit.vlmeval_report import answer_costs, problem_of
from pdlm_evalkit.vlmeval_resume import log_of, logs_of
from pdlm_evalkit.vlmeval_run import find_run_py, parse, settings_from
from pdlm_hf.regions.files import FileLock
from pdlm_hf.shapes.evaluate_base import held_out_question

ROWS = 4


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("checkout"))
    rows = []
    for index in range(ROWS):
        image, question = held_out_question(11, index, "choice")
        path = folder / f"{index}.png"
        image.save(path)
        text, *options, _ = question.text.split("\n")
        rows.append({"question": text, "answer": question.answer, "image_path": [str(path)]})
        rows[-1] |= {option[0]: option[3:] for option in options}
    for number in (1, ROWS):
        (folder / f"{number}_rows.json").write_text(json.dumps(rows[:number]))
    return folder


def run(
    checkout: Path, work: Path, *arguments: str, rows: int = 1, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """`python -m pdlm_evalkit.vlmeval_run`, in a process that has its imports done unless there is a launcher."""
    environment = {"PYTHONPATH": f"{checkout}{os.pathsep}{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"}
    environment |= {"FAKE_ROWS": str(checkout / f"{rows}_rows.json"), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    arguments = (*arguments, "--work-dir", str(work))
    if not launcher:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "output.log"
            code = call("vlmeval", list(arguments), environment, log)
            return subprocess.CompletedProcess(arguments, code, stderr=log.read_text())
    command = [sys.executable, "-m", *launcher, "pdlm_evalkit.vlmeval_run", *arguments]
    without_keys = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    return subprocess.run(command, env=without_keys | environment, capture_output=True, text=True, timeout=300)


OPTIONS = ("--data", "MMStar", "--model", "PerceptionDLM-Base", "--pretrained", "shapes_base")
OPTIONS += ("--judge", "exact_matching")


def report_of(work: Path, model: str = "PerceptionDLM-Base") -> list[dict]:
    return json.loads((work / model / "T1" / "pdlm_report.json").read_text())


@pytest.fixture(scope="module")
def finished(checkout, tmp_path_factory):
    """A run of one process."""
    work = tmp_path_factory.mktemp("finished")
    done = run(checkout, work, *OPTIONS, rows=ROWS)
    assert done.returncode == 0, done.stderr
    return work


def test_a_run_has_settings_costs_and_exit_code(finished):
    report = report_of(finished)
    assert report[0]["paper_settings"]["max_new_tokens"] == 2
    assert report[0]["pretrained"] == "shapes_base"
    costs = report[0]["answers"]
    assert (costs["questions"], costs["num_forwards"], costs["slots"]) == (ROWS, 2 * ROWS, 2 * ROWS)
    log = [json.loads(line) for line in next(finished.glob("pdlm_answers_*.jsonl")).read_text().splitlines()]
    assert [row["settings"]["block_length"] for row in log] == [2] * ROWS
    measured = collect([finished])
    assert [(m.benchmark, m.paper, m.tokens_per_forward) for m in measured] == [("MMStar", 63.7, 1.0)]
    assert measured[0].score == 100 * report[0]["primary_metric_value"]


def test_a_run_has_a_manifest(finished):
    (row,) = report_of(finished)
    found = row["manifest"]
    assert found["checkpoint"]["name"] == "shapes_base" and len(found["checkpoint"]["sha256"]) == 64
    settings = {"batch_size": 1, "block_length": 2, "max_denoising_steps": 2, "remasking": "low_confidence"}
    assert settings.items() <= found["settings"].items()
    assert found["prompts"]["distinct"] == ROWS and found["judge"] is None and found["data"]["name"] == "MMStar"
    assert {n: found["attempts"][n] for n in ("number", "answers", "num_forwards")} == {
        "number": 1, "answers": ROWS, "num_forwards": 2 * ROWS,
    }  # fmt: skip
    (measured,) = collect([finished])
    assert measured.manifest == found
    size = found["checkpoint"]["parameters"] / 1e6
    rules = "scored by rules; the paper's judge: chatgpt-0125 or gpt-5.2"
    assert measured.not_comparable == [f"a model of {size:.1f} M parameters", rules]


@pytest.mark.slow
def test_every_family_has_its_settings(checkout, tmp_path):
    """Letters, yes or no, documents in one block, reasoning in autoregressive order: one run, one judge."""
    families = {"MMStar": (2, 2, 2), "HallusionBench": (2, 2, 2), "ChartQA_TEST": (128,) * 3}
    families |= {"MathVista_MINI": (256, 1, 256)}
    with JudgeServer(model="m", key="k") as server:
        done = run(
            checkout, tmp_path, "--data", *families, "--model", "PerceptionDLM-Base", "--pretrained", "shapes_base",
            "--judge", "m", "--judge-base-url", server.url, "--judge-key", "k",
        )  # fmt: skip
        assert server.probes == 1
    assert done.returncode == 0, done.stderr
    rows = report_of(tmp_path)
    names = ("max_new_tokens", "block_length", "max_denoising_steps")
    assert {row["benchmark"]: tuple(row["paper_settings"][name] for name in names) for row in rows} == families
    for row in rows:
        slots, _, steps = families[row["benchmark"]]
        assert (row["answers"]["slots"], row["answers"]["num_forwards"]) == (slots, steps)


@pytest.mark.slow
def test_two_ranks_without_cuda(checkout, finished, tmp_path):
    """run.py asks for NCCL; the wrapper gives it gloo."""
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=29671", "-m")
    both = run(checkout, tmp_path, *OPTIONS, rows=ROWS, launcher=torchrun)
    assert both.returncode == 0, both.stderr
    (one,), (two,) = report_of(finished), report_of(tmp_path)
    assert one["primary_metric_value"] == two["primary_metric_value"]
    assert two["answers"]["questions"] == ROWS
    assert all(one["manifest"][name] == two["manifest"][name] for name in ("prompts", "settings", "checkpoint"))
    assert len(list(tmp_path.glob("pdlm_answers_*.jsonl"))) == 2


def test_config_knows_the_class(checkout, tmp_path):
    model = {"mine": {"class": "PerceptionDLM", "pretrained": "shapes_base", "block_length": 1}}
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "data": {"MMStar": {}}}))
    done = run(checkout, tmp_path, "--config", str(tmp_path / "config.json"), "--judge", "exact_matching")
    assert done.returncode == 0, done.stderr
    (row,) = report_of(tmp_path, "mine")
    assert (row["pretrained"], row["settings"]) == ("shapes_base", {"block_length": 1})
    assert row["paper_settings"]["block_length"] == 2 and row["answers"]["questions"] == 1
    assert "block_length 1 instead of 2" in collect([tmp_path])[0].not_comparable


def test_each_model_of_a_config_has_its_own_settings_and_costs(checkout, tmp_path):
    models = {
        "plain": {"class": "PerceptionDLM", "pretrained": "shapes_base", "presets": "none", "max_new_tokens": 8},
        "paper": {"class": "PerceptionDLM", "pretrained": "shapes_base"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model": models, "data": {"MMStar": {}}}))
    arguments = ("--config", str(tmp_path / "config.json"), "--judge", "exact_matching", "--mode", "all")
    done = run(checkout, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    plain, paper = (report_of(tmp_path, name)[0] for name in models)
    assert plain["paper_settings"] is None and plain["settings"] == {"max_new_tokens": 8}
    assert paper["paper_settings"]["max_new_tokens"] == 2 and paper["settings"] == {}
    assert (plain["answers"]["slots"], paper["answers"]["slots"]) == (8, 2)


def test_answers_of_another_run_cost_nothing(tmp_path):
    log = log_of(tmp_path / "pdlm_answers_20260101_000000.0.jsonl", "M")
    row = {"dataset": "MMStar", "num_forwards": 2, "slots": 2, "output_tokens": 1, "seconds": 0.5, "text": "a\u2028b"}
    log.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    second = log_of(tmp_path / "pdlm_answers_20260101_000000.1.jsonl", "M")
    second.write_bytes(log.read_bytes() + b'{"cut sho')
    changed = log.stat().st_mtime
    assert logs_of(tmp_path, "M", [changed + 1]) == logs_of(tmp_path, "N", [changed]) == []
    assert logs_of(tmp_path, "M", [changed]) == [log, second]
    _, answers = read_logs([log, second])
    costs = answer_costs(answers)
    assert (costs["questions"], costs["num_forwards"], costs["seconds"]) == (2, 4, 1.0)
    assert answer_costs([])["questions"] == 0


def test_a_second_process_on_the_same_model_is_refused(checkout, tmp_path):
    with FileLock(tmp_path / "PerceptionDLM-Base" / "pdlm_run.lock", "x"):
        done = run(checkout, tmp_path, *OPTIONS)
        assert done.returncode != 0 and f"process {os.getpid()} on " in done.stderr and "--work-dir" in done.stderr


def test_data_sets_without_result_are_named(checkout, tmp_path):
    done = run(
        checkout, tmp_path, "--data", "MMStar", "Broken", "Vanishes", "--model", "PerceptionDLM", "--pretrained",
        "shapes_base", "--judge", "exact_matching",
    )  # fmt: skip
    assert done.returncode == 1
    assert "PerceptionDLM on Broken: no such column" in done.stderr
    assert "PerceptionDLM on Vanishes: no result was written" in done.stderr
    assert "on MMStar" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "MMStar", "--model", "PerceptionDLM"), "MMStar: gpt-4o-mini-2024-07-18 has no key"),
        (("--data", "MathVista_MINI", "--model", "M", "--judge", "exact_matching"), "without a language model"),
        (("--data", "MMStar"), "No model or no data set"),
        (("--data", "A", "--model", "M", "--settings", "steps"), "expected key=value"),
        (("--config", "nowhere.json"), "nowhere.json: expected JSON"),
    ],
)
def test_calls_that_cannot_work_end_before_the_start(checkout, tmp_path, arguments, message):
    done = run(checkout, tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_settings_from():
    assert settings_from("steps=4,remasking=random,temperature=0.5") == {
        "steps": 4,
        "remasking": "random",
        "temperature": 0.5,
    }
    assert settings_from(None) == {}


def test_options_may_come_in_any_order():
    options, rest = parse(["--data", "A", "B", "--pretrained", "X", "--model", "M", "--judge", "j", "--verbose"])
    assert (options.data, options.model, options.pretrained, options.judge) == (["A", "B"], ["M"], "X", "j")
    assert rest == ["--data", "A", "B", "--model", "M", "--judge", "j", "--verbose"]


@pytest.mark.parametrize(
    ("row", "mode", "problem"),
    [
        ({"primary_metric_value": 0.5, "infer_total": 4}, "all", None),
        ({"primary_metric_value": 0.0, "infer_total": 4}, "all", None),
        ({"primary_metric_value": None}, "all", "no score was written"),
        ({"skip_reason": "mode_infer", "infer_total": 4}, "infer", None),
        ({"skip_reason": "mode_infer", "infer_total": 0}, "infer", "no answers were written"),
        ({"skip_reason": "evaluate_returned_none"}, "all", "not scored (evaluate_returned_none)"),
        (
            {"primary_metric_value": 0.5, "judge_failed": 2, "judge_total": 4},
            "all",
            "the judge failed on 2 of 4 answers",
        ),
        ({"primary_metric_value": 0.5, "infer_failed": 1, "infer_total": 4}, "all", "1 of 4 questions got no answer"),
        ({"eval_error": "boom", "primary_metric_value": 0.5}, "all", "boom"),
    ],
)
def test_problem_of(row, mode, problem):
    assert problem_of(row, mode) == problem


def test_without_vlmevalkit(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed here"):
        find_run_py()


def test_question_text(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout))
    from pdlm_evalkit.vlmeval_model import question_text

    nan = float("nan")
    row = {"question": "Which?", "hint": "Look.", "A": "x", "B": 2, "C": nan, "D": None}
    assert question_text(row, "MCQ", find("MMStar")) == "Look.\nWhich?\nA. x\nB. 2" + LETTER
    assert question_text({"question": "Which?", "hint": nan}, "MCQ", None) == "Which?\nAnswer the question directly."
    assert question_text({"question": "哪个?", "A": "红"}, "MCQ", None) == "哪个?\nA. 红\n请直接回答选项字母。"
    assert question_text({"question": "Is it?"}, "Y/N", find("HallusionBench")) == "Is it?" + SUFFIX["yes_no"]
    assert question_text({"question": "How?"}, "VQA", find("ChartQA_TEST")) == "How?" + SUFFIX["document"]
    assert (
        question_text({"question": "How?"}, "VQA", find("MathVista_MINI")) == "How?\n\n\nPlease reason step by step."
    )
    assert question_text({"question": "How?"}, "VQA", None) == "How?" + SUFFIX["free"]
    assert question_text({"question": "Is it?"}, "Y/N", None) == "Is it?"
    other = replace(find("MMStar"), prompt_suffix=" Say it.")
    assert question_text({"question": "哪个?", "A": "红"}, "MCQ", other) == "哪个?\nA. 红 Say it."
