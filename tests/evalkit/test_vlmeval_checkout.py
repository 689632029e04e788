"""The wrapper with the real VLMEvalKit. Run in an environment that has it installed from a checkout:

VLMEVALKIT=path/to/VLMEvalKit python -m pytest tests/evalkit/test_vlmeval_checkout.py
"""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import JudgeServer, text_of
from local_rows import write_shapes_table
from prompt_rows import PROMPTS

from pdlm_evalkit.report import collect

CHECKOUT = os.environ.get("VLMEVALKIT")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="VLMEVALKIT names no checkout")
ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A multiple-choice data set of drawn shapes, in VLMEvalKit's form, under a name of the paper's."""
    folder = tmp_path_factory.mktemp("lmu")
    write_shapes_table(folder, ROWS)
    return folder


def environment(data: Path, **more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    return own | {"LMUData": str(data), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def command(work: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", *launcher, "pdlm_evalkit.vlmeval_run", *arguments, "--work-dir", str(work)]


def run(data: Path, work: Path, *arguments: str, launcher: tuple[str, ...] = (), **more: str):
    words = command(work, *arguments, launcher=launcher)
    done = subprocess.run(
        words, env=environment(data, **more), capture_output=True, text=True, timeout=600, check=False
    )
    reports = sorted(work.rglob("pdlm_report.json"))
    return done, json.loads(reports[-1].read_text()) if reports else None


OPTIONS = ("--data", "MMStar_shapes", "--model", "PerceptionDLM-Base", "--pretrained", "shapes_base")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("one"), *OPTIONS, "--judge", "exact_matching")


def test_a_run_scores_what_our_own_evaluation_says(alone):
    import torch

    import pdlm_hf
    from pdlm_hf.shapes.evaluate_base import evaluate

    done, report = alone
    assert done.returncode == 0, done.stderr[-3000:]
    model = pdlm_hf.PdlmBaseForConditionalGeneration.from_pretrained(pdlm_hf.BASE_CHECKPOINT).eval()
    processor = pdlm_hf.PdlmProcessor.from_pretrained(pdlm_hf.BASE_CHECKPOINT)
    with torch.inference_mode():
        own = evaluate(model, processor, 11, ROWS, kinds=["choice"])
    assert report[0]["primary_metric_value"] == pytest.approx(own["right"], abs=6e-5)
    assert report[0]["paper_settings"]["max_new_tokens"] == 2
    assert report[0]["answers"]["num_forwards"] == 2 * ROWS


def test_prompts_of_all_sixteen():
    """Those of VLMEvalKit's InternVL wrapper, whose copy the reference is, but for the reference's own ends."""
    script = "import json, prompt_rows; print(json.dumps(prompt_rows.vlmeval_prompts()))"
    own = environment(Path("none"), PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(PROMPTS.read_text())["vlmeval"]


def predict(data: Path, work: Path, names: tuple[str, ...], unread: int) -> None:
    """Answers of our model, of which no rule can read the first ones."""
    done, _ = run(data, work, "--data", *names, *OPTIONS[2:], "--mode", "infer", PRED_FORMAT="tsv")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        (path,) = work.glob(f"PerceptionDLM-Base/T*/PerceptionDLM-Base_{name}.tsv")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        for row in rows[:unread]:
            row["prediction"] = f"It shows no such thing, number {row['index']}"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)


def asked(server: JudgeServer) -> list[str]:
    return [text_of(body) for body in server.bodies if "hello" not in text_of(body)]


def test_a_judge_that_dies_is_counted_and_only_its_rows_are_judged_again(data, tmp_path):
    """In a benchmark of the paper, and in a data set that is none."""
    names = ("MMStar_shapes", "Others")
    shutil.copy(data / "MMStar_shapes.tsv", data / "Others.tsv")
    predict(data, tmp_path, names, 4)
    options = ("--data", *names, *OPTIONS[2:], "--mode", "eval", "--judge", "m", "--judge-retry", "1")

    def judge(faults):
        with JudgeServer(lambda body: "A", faults) as server:
            arguments = ("--judge-base-url", server.url, "--judge-key", "secret")
            done, report = run(data, tmp_path, *options, *arguments, PRED_FORMAT="tsv", NO_PROXY="127.0.0.1")
        return done, {row["benchmark"]: row["judged"] for row in report}, asked(server)

    def dies(number, body):
        return None if "hello" in text_of(body) or "number 2" in text_of(body) else "400"

    done, judged, _ = judge(dies)
    counts = {"rules": ROWS - 4, "unparsed": 0, "judge": 1, "random": 3, "failed": 0}
    assert done.returncode == 1
    for name in names:
        assert {key: judged[name][key] for key in counts} == counts
        assert f"on {name}: 3 of {ROWS} answers were scored by options drawn at random" in done.stderr
    assert "judge only these answers again: pdlm-eval vlmeval --data MMStar_shapes Others" in done.stderr
    assert "secret" not in done.stderr and done.stderr.rstrip().splitlines()[-1].endswith("--mode eval")
    done, judged, questions = judge(None)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(questions) == 6 and not any("number 2" in question for question in questions)
    counts |= {"judge": 4, "random": 0}
    assert all({key: judged[name][key] for key in counts} == counts for name in names)
    done, judged, questions = judge(None)
    assert done.returncode == 0 and not questions and judged[names[0]]["judge"] == 4
    (row,) = collect([tmp_path])  # the newest of four runs with the same answers
    assert row.score is not None and row.judged["judge"] == 4


def test_a_judge_that_stops_before_the_first_row_is_no_scoring_by_rules(data, tmp_path):
    predict(data, tmp_path, ("Others",), 2)
    with JudgeServer(lambda body: "A", lambda number, body: "500") as server:
        options = ("--data", "Others", *OPTIONS[2:], "--mode", "eval", "--judge", "m", "--judge-retry", "1")
        options += ("--judge-base-url", server.url, "--judge-key", "k")
        done, report = run(data, tmp_path, *options, PRED_FORMAT="tsv", NO_PROXY="127.0.0.1")
    assert done.returncode == 1 and report[0]["primary_metric_value"] is None
    assert "on Others: the judge does not answer" in done.stderr


def test_the_same_command_goes_on_after_a_kill(data, tmp_path):
    """VLMEvalKit writes its answers ten at a time; ours are kept at once. Costs are those of all attempts."""
    rows = 60
    with (data / "MMStar_shapes.tsv").open(newline="") as file:
        first = list(csv.DictReader(file, delimiter="\t"))
    with (data / "MMStar_long.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(first[k % ROWS] | {"index": k} for k in range(rows))
    options = ("--data", "MMStar_long", *OPTIONS[2:], "--judge", "exact_matching")
    process = subprocess.Popen(command(tmp_path, *options), env=environment(data), stderr=subprocess.DEVNULL)

    def answers() -> int:
        return sum(len(path.read_text().splitlines()) for path in tmp_path.glob("pdlm_answers_*.jsonl"))

    while process.poll() is None and answers() < 25:
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = answers()
    assert 25 <= before < rows
    done, _ = run(data, tmp_path, *options, "--settings", "block_length=1", "--reuse")
    assert done.returncode == 2 and "made with block_length None instead of 1" in done.stderr
    done, report = run(data, tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on with" in done.stderr and report[0]["attempts"] == 2
    assert report[0]["answers"]["questions"] == answers() == rows  # some have the same image and text
    assert report[0]["answers"]["num_forwards"] == 2 * rows
    killed = report[0]["manifest"]
    assert killed["attempts"]["number"] == 2 and killed["prompts"]["distinct"] == ROWS and not killed["mixed"]
    assert killed["data"]["md5"] == {
        "MMStar_long.tsv": hashlib.md5((data / "MMStar_long.tsv").read_bytes()).hexdigest()
    }
    done, report = run(data, tmp_path, *options)  # finished: a new run, from the start
    assert {**report[0]["manifest"], "attempts": 0} == {**killed, "attempts": 0}
    assert report[0]["attempts"] == 1 and report[0]["answers"]["questions"] == rows


def test_two_ranks(data, alone, tmp_path):
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=29673", "-m")
    done, report = run(data, tmp_path, *OPTIONS, "--judge", "exact_matching", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    assert report[0]["primary_metric_value"] == alone[1][0]["primary_metric_value"]
    assert report[0]["answers"]["questions"] == ROWS


def test_config_with_our_class(data, tmp_path):
    config = {
        "model": {"mine": {"class": "PerceptionDLM", "pretrained": "shapes_base", "block_length": 1}},
        "data": {"MMStar_shapes": {"class": "CustomMCQDataset", "dataset": "MMStar_shapes"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done, report = run(data, tmp_path, "--config", str(tmp_path / "config.json"), "--judge", "exact_matching")
    assert done.returncode == 0, done.stderr[-3000:]
    assert report[0]["benchmark"] == "MMStar_shapes"


def test_a_data_set_that_is_not_there(data, tmp_path):
    asked = ("--data", "NoSuchData", "--model", "PerceptionDLM", "--pretrained", "shapes", "--judge", "exact_matching")
    done, _ = run(data, tmp_path, *asked)
    assert done.returncode == 1
    assert "PerceptionDLM on NoSuchData: " in done.stderr


def test_every_family_has_its_settings(data, tmp_path):
    """Under names that begin as the paper's; VLMEvalKit scores no free text of data sets that are not its own."""
    names = ("HallusionBench_shapes", "ChartQA_TEST_shapes", "MathVista_MINI_shapes")
    with (data / "MMStar_shapes.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:2]
    for name in names:
        with (data / f"{name}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["index", "image", "question", "answer"], "", "ignore", delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    options = ("--model", "PerceptionDLM-Base", "--pretrained", "shapes_base", "--mode", "infer")
    done, report = run(data, tmp_path, "--data", *names, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["benchmark"]: row["answers"]["num_forwards"] for row in report} == {
        "HallusionBench_shapes": 4,
        "ChartQA_TEST_shapes": 256,
        "MathVista_MINI_shapes": 512,
    }


def test_only_answers(data, tmp_path):
    done, report = run(data, tmp_path, *OPTIONS, "--mode", "infer")
    assert done.returncode == 0, done.stderr[-3000:]
    assert report[0]["infer_total"] == ROWS and report[0]["skip_reason"] == "mode_infer"
