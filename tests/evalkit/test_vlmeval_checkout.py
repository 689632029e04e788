"""The wrapper with the real VLMEvalKit. Run in an environment that has it installed from a checkout:

VLMEVALKIT=path/to/VLMEvalKit python -m pytest tests/evalkit/test_vlmeval_checkout.py
"""

import base64
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdlm_hf.shapes.evaluate_base import held_out_question

CHECKOUT = os.environ.get("VLMEVALKIT")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="VLMEVALKIT names no checkout")
ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A multiple-choice data set of drawn shapes, in VLMEvalKit's form, under a name of the paper's."""
    folder = tmp_path_factory.mktemp("lmu")
    with (folder / "MMStar_shapes.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", "image", "question", *"ABCD", "answer", "category"], delimiter="\t")
        writer.writeheader()
        for index in range(ROWS):
            image, question = held_out_question(11, index, "choice")
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            text, *options, _ = question.text.split("\n")
            row = {"index": index, "question": text, "answer": question.answer, "category": "shapes"}
            row |= {"image": base64.b64encode(buffer.getvalue()).decode()}
            writer.writerow(row | {option[0]: option[3:] for option in options})
    return folder


def run(data: Path, work: Path, *arguments: str, launcher: tuple[str, ...] = ()):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    environment |= {"LMUData": str(data), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher, "pdlm_evalkit.vlmeval_run", *arguments, "--work-dir", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
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
