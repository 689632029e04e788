"""Real runs of lmms-eval, in its own environment: scores equal to our own evaluation, ranks, cache, exit codes.

LMMS_QUESTIONS is how many questions of each task are asked (default 24; the full load is 400).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import call, start
from judge_server import JudgeServer

import pdlm_evalkit
import pdlm_hf
from pdlm_evalkit.paradlc.data import load_benchmark
from pdlm_hf.shapes.evaluate import evaluate as evaluate_regions
from pdlm_hf.shapes.evaluate_base import evaluate as evaluate_questions

QUESTIONS = int(os.environ.get("LMMS_QUESTIONS", 24))
SEED = 11  # of the tasks
BIN = Path(sys.executable).parent
EXAMPLE = Path(pdlm_evalkit.__file__).parent / "paradlc" / "example"


class Run:
    """A finished run: exit code, printed text, results, samples, what the model was asked."""

    def __init__(self, folder: Path, code: int, text: str):
        self.code, self.text = code, text
        files = sorted(folder.rglob("*_results.json"))
        self.content = json.loads(files[-1].read_text()) if files else {}
        self.samples = {
            path.name.split("_samples_")[1].removesuffix(".jsonl"): [
                json.loads(line) for line in path.read_text().splitlines()
            ]
            for path in folder.rglob("*_samples_*.jsonl")
        }
        log = folder / "model.log"
        self.calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def score(self, task: str, metric: str) -> float:
        return self.content["results"][task][f"{metric},none"]


def run(folder: Path, command: list, *arguments: str, **environment: str) -> Run:
    """Run a command: the harness' own and ours by name, in a prepared process; any other as it is."""
    folder.mkdir(exist_ok=True)
    environment = {"PDLM_EVAL_LOG": str(folder / "model.log")} | environment
    arguments = [*map(str, command[1:]), *arguments, "--output_path", str(folder), "--log_samples"]
    if command[0] in ("lmms-eval", "pdlm-eval"):
        log = folder / "output.log"
        code = call(command[0], arguments, environment, log)
        return Run(folder, code, log.read_text())
    done = subprocess.run(
        [str(command[0]), *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    return Run(folder, done.returncode, done.stdout + done.stderr)


def arguments_for(task: str, pretrained: str, **more: str) -> list[str]:
    given = {"tasks": task, "model_args": f"pretrained={pretrained}", "batch_size": "8", "limit": str(QUESTIONS)}
    return [part for name, value in (given | more).items() for part in (f"--{name}", value)]


def manifest_of(folder: Path) -> dict:
    (path,) = folder.rglob("*_manifest.json")
    return json.loads(path.read_text())


LMMS_EVAL = ["lmms-eval", "--model", "pdlm", "--include_path", pdlm_evalkit.LMMS_TASKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def regions(folder):
    """lmms-eval's own command, no path of ours on it but that of the tasks."""
    cache = str(folder / "cache")
    command = [BIN / LMMS_EVAL[0], *LMMS_EVAL[1:]]
    return run(folder / "regions", command, *arguments_for("pdlm_shapes_regions", "shapes", use_cache=cache))


@pytest.fixture(scope="module")
def choice(folder):
    return run(folder / "choice", LMMS_EVAL, *arguments_for("pdlm_shapes_choice", "shapes_base"))


def test_regions_score_what_our_own_evaluation_says(regions):
    assert regions.code == 0, regions.text
    captioner = pdlm_hf.RegionCaptioner.from_pretrained()
    with torch.inference_mode():
        own = evaluate_regions(captioner.model, captioner.processor, SEED, QUESTIONS)
    assert regions.score("pdlm_shapes_regions", "exact") == pytest.approx(own["exact"], abs=6e-5)  # own is rounded
    assert regions.score("pdlm_shapes_regions", "well_formed") == pytest.approx(own["well_formed"], abs=6e-5)
    assert own["exact"] > 0.9


def test_choices_score_what_our_own_evaluation_says(choice):
    assert choice.code == 0, choice.text
    answerer = pdlm_hf.PdlmBaseForConditionalGeneration.from_pretrained(pdlm_hf.BASE_CHECKPOINT).eval()
    processor = pdlm_hf.PdlmProcessor.from_pretrained(pdlm_hf.BASE_CHECKPOINT)
    with torch.inference_mode():
        own = evaluate_questions(answerer, processor, SEED, QUESTIONS, kinds=["choice"])
    assert choice.score("pdlm_shapes_choice", "right") == pytest.approx(own["by_kind"]["choice"], abs=6e-5)
    assert own["by_kind"]["choice"] > 0.9


def test_samples_say_what_an_answer_cost(regions, choice):
    counts = [row["token_counts"][0] for row in choice.samples["pdlm_shapes_choice"]]
    assert {(c["slots"], c["num_forwards"], c["output_tokens"]) for c in counts} == {(2, 2, 1)}
    assert all(c["input_tokens"] > 30 and c["settings"]["block_length"] == 2 for c in counts)
    row = regions.samples["pdlm_shapes_regions"][0]
    captions = json.loads(
        row["filtered_resps"] if isinstance(row["filtered_resps"], str) else row["filtered_resps"][0]
    )
    assert row["token_counts"][0]["slots"] == 32 * len(captions)
    assert choice.content["throughput"]["avg_num_forwards"] == 2 * QUESTIONS


def test_batches_are_real(choice):
    """One call with all questions; eight a forward."""
    assert [call["requests"] if "requests" in call else call["total_requests"] for call in choice.calls] == [QUESTIONS]
    assert choice.calls[0]["batch_size"] == 8


def test_a_second_run_comes_from_the_cache(folder, regions):
    again = run(
        folder / "again", LMMS_EVAL,
        *arguments_for("pdlm_shapes_regions", "shapes", use_cache=str(folder / "cache")),
    )  # fmt: skip
    assert again.score("pdlm_shapes_regions", "exact") == regions.score("pdlm_shapes_regions", "exact")
    assert sum(call["total_requests"] for call in regions.calls) == QUESTIONS
    assert sum(call["total_requests"] for call in again.calls) == 0
    counts, kept = ([row["token_counts"] for row in run.samples["pdlm_shapes_regions"]] for run in (regions, again))
    assert kept == counts and all(row[0]["num_forwards"] > 0 for row in kept)


def test_what_was_answered_before_a_kill_is_kept(folder):
    """lmms-eval asks for all answers at once; they come, and go into its cache, a few at a time."""
    cache, place = folder / "cache_killed", folder / "killed"
    arguments = arguments_for("pdlm_shapes_open", "shapes_base,block_length=1", use_cache=str(cache), batch_size="1")
    arguments[arguments.index("--limit") + 1] = "64"

    def kill() -> int:
        place.mkdir()
        command = ["lmms", *arguments, "--output_path", str(place), "--log_samples"]
        process = start("pdlm-eval", command, {}, place / "killed.log")
        while process.is_alive() and not kept():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return kept()

    def kept() -> int:
        return sum(len(path.read_text().splitlines()) for path in cache.rglob("rank_*.jsonl"))

    before = kill()
    assert before
    again = run(place, ["pdlm-eval", "lmms"], *arguments)
    assert again.code == 0, again.text
    assert 64 - before - 1 <= sum(call["total_requests"] for call in again.calls) <= 64 - before
    counts = [row["token_counts"][0] for row in again.samples["pdlm_shapes_open"]]
    assert len(counts) == 64 and all(count["num_forwards"] == 8 for count in counts)  # of both attempts
    judged = json.loads(max(place.rglob("*_judged.json")).read_text())
    assert judged == {"attempts": 2}
    found = manifest_of(place)["pdlm_shapes_open"]
    assert found["attempts"]["number"] == 2 and found["attempts"]["answers"] == 64 and not found["mixed"]
    assert found["prompts"]["distinct"] > 1 and found["settings"]["block_length"] == 1 and found["judge"] is None
    assert found["checkpoint"]["name"] == "shapes_base" and found["data"]["limit"] == 64


def run_two(folder: Path, *arguments: str) -> Run:
    """`torchrun --nproc-per-node=2 -m pdlm_evalkit.lmms_run`, its two processes forked."""
    folder.mkdir()
    ranks = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29672", "ACCELERATE_USE_CPU": "true"}
        environment |= {"PDLM_EVAL_LOG": str(folder / "model.log")}
        command = ["lmms", *arguments, "--output_path", str(folder), "--log_samples"]
        ranks.append(start("pdlm-eval", command, environment, folder / f"{rank}.log"))
    for process in ranks:
        process.join()
    text = "".join((folder / f"{rank}.log").read_text() for rank in (0, 1))
    return Run(folder, max(process.exitcode for process in ranks), text)


@pytest.mark.parametrize("task, metric, pretrained", [
    ("pdlm_shapes_regions", "exact", "shapes"),
    pytest.param("pdlm_shapes_choice", "right", "shapes_base", marks=pytest.mark.slow),
])  # fmt: skip
def test_two_ranks(folder, request, task, metric, pretrained):
    place, arguments = folder / f"two_{task}", arguments_for(task, pretrained)
    if metric == "exact":
        both = run_two(place, *arguments)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29672"]
        both = run(place, [*torchrun, "-m", "pdlm_evalkit.lmms_run"], *arguments, ACCELERATE_USE_CPU="true")
    assert both.code == 0, both.text
    one = request.getfixturevalue("regions" if metric == "exact" else "choice")
    assert both.score(task, metric) == one.score(task, metric)
    assert sorted((call["rank"], call["total_requests"]) for call in both.calls) == [
        (0, QUESTIONS - QUESTIONS // 2),
        (1, QUESTIONS - QUESTIONS // 2),  # padded to the same number
    ]


def test_the_simple_interface_says_the_same(folder, choice):
    simple = run(
        folder / "simple", [*LMMS_EVAL, "--force_simple"], *arguments_for("pdlm_shapes_choice", "shapes_base")
    )
    assert simple.score("pdlm_shapes_choice", "right") == choice.score("pdlm_shapes_choice", "right")


def test_model_args_go_before_the_task(folder):
    asked = arguments_for("pdlm_shapes_open", "shapes_base,block_length=1", limit="2")
    order = run(folder / "order", LMMS_EVAL, *asked)
    settings = [row["token_counts"][0]["settings"] for row in order.samples["pdlm_shapes_open"]]
    assert [s["block_length"] for s in settings] == [1, 1]


@pytest.mark.parametrize("arguments", [
    arguments_for("no_such_task", "shapes"),
    pytest.param(arguments_for("pdlm_shapes_choice", "nowhere"), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_without_result_does_not_end_with_zero(folder, arguments):
    stock = run(folder / "stock", LMMS_EVAL, *arguments)
    ours = run(folder / "ours", ["pdlm-eval", "lmms"], *arguments)
    assert stock.code == 0  # which is why there is a wrapper
    assert ours.code == 1
    assert "no result was written" in ours.text


def test_paradlc_bench_with_a_judge(folder):
    """An image is one request, a question is asked once, and the score is that of our own command."""
    with JudgeServer() as server:
        judged = run(
            folder / "paradlc", ["pdlm-eval", "lmms"], "--tasks", "pdlm_paradlc_bench", "--model_args",
            "pretrained=shapes", PDLM_PARADLC=str(EXAMPLE), PDLM_JUDGE="m", PDLM_JUDGE_URL=server.url,
            PDLM_JUDGE_CACHE=str(folder / "judge.sqlite"),
        )  # fmt: skip
        asked = len(server.bodies)
    assert judged.code == 0, judged.text
    benchmark = load_benchmark(EXAMPLE)
    assert asked == len(set(server.answered)) <= sum(1 + len(mask.questions) for mask in benchmark.masks.values())
    captions = {}
    for row in judged.samples["pdlm_paradlc_bench"]:
        said = row["filtered_resps"] if isinstance(row["filtered_resps"], str) else row["filtered_resps"][0]
        captions |= dict(zip(row["avg"][0], json.loads(said), strict=True))
    (folder / "captions.json").write_text(json.dumps(captions))
    log = folder / "paradlc.log"
    with JudgeServer() as server:
        options = ["--annotations", EXAMPLE, "--judge", "m", "--base-url", server.url, "--out", folder / "judged"]
        command = ["paradlc", "judge", folder / "captions.json", *options]
        assert call("pdlm-eval", list(map(str, command)), {}, log) == 0, log.read_text()
    answers = next((folder / "judged").rglob("answers.json"))
    command = ["paradlc", "score", "--annotations", EXAMPLE, "--answers", answers, "--json"]
    assert call("pdlm-eval", list(map(str, command)), {}, log) == 0, log.read_text()
    own = json.loads(log.read_text())
    for metric in ("avg", "avg_pos", "avg_neg", "mean_mask_score", "n_missing"):
        assert judged.score("pdlm_paradlc_bench", metric) == pytest.approx(own[metric], abs=1e-9)
    assert own["avg"] > 0.8


def test_dlc_bench_has_one_mask_a_request_and_a_judge_that_gives_up_costs_no_caption(folder):
    place = folder / "dlc_bench"
    shutil.copytree(EXAMPLE / "dlc", place)
    shutil.copytree(EXAMPLE / "images", place / "images")
    cache = folder / "dlc_judge" / "judge.sqlite"
    cache.parent.mkdir()
    command = ["pdlm-eval", "lmms"]
    asked = ["--tasks", "pdlm_dlc_bench", "--model_args", "pretrained=shapes"]
    with JudgeServer(faults=lambda number, _: None if number < 5 else "401") as server:
        environment = {"PDLM_DLC": str(place), "PDLM_JUDGE": "m", "PDLM_JUDGE_URL": server.url}
        environment["PDLM_JUDGE_CACHE"] = str(cache)
        failed = run(folder / "dlc_failed", command, *asked, **environment)
    assert failed.code == 1 and "pdlm_dlc_captions.json" in failed.text
    benchmark = load_benchmark(place)
    captions = json.loads((cache.parent / "pdlm_dlc_captions.json").read_text())
    assert captions.keys() == benchmark.masks.keys()
    with JudgeServer() as server:
        judged = run(folder / "dlc", command, *asked, **environment | {"PDLM_JUDGE_URL": server.url})
    assert judged.code == 0, judged.text
    assert {len(row["avg"][0]) for row in judged.samples["pdlm_dlc_bench"]} == {1}
    assert len(judged.samples["pdlm_dlc_bench"]) == len(benchmark.masks)


def test_without_a_judge_nothing_is_captioned(folder):
    refused = run(
        folder / "refused", ["pdlm-eval", "lmms"], "--tasks", "pdlm_paradlc_bench", "--model_args",
        "pretrained=shapes", PDLM_PARADLC=str(EXAMPLE),
    )  # fmt: skip
    assert refused.code == 1
    assert "Set PDLM_JUDGE" in refused.text
    assert not refused.calls
