"""Weights of torchao, which `make .torchao/ready` installs beside the other packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".torchao"
pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """What a Python process prints that finds torchao."""
    assert (INSTALLED / "torchao").is_dir(), "run: make .torchao/ready"
    paths = [str(INSTALLED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_captions_with_small_weights():
    """int8 gives the words of float32; FP8 by kernels those of torchao's own layers, whose products are equal."""
    row = json.loads(run(Path(__file__).with_name("torchao_weights.py")).splitlines()[-1])
    assert row["one product"] is True and row["captions"] > 30
    assert row["int8"] >= 0.98 and row["FP8 by kernels"] >= 0.95 and row["FP8"] >= 0.95


def test_the_gpu_benchmark_of_fp8(tmp_path):
    """Rehearsed: passes and decodes before and after, at the shape of the tests."""
    settings = ("--device", "cpu", "--shape", "tiny", "--slots", "2", "--repeats", "1")
    run("-m", "benchmarks.gpu", "fp8", *settings, "--out", tmp_path)
    stage = json.loads((tmp_path / "gpu.json").read_text())["stages"]["fp8"]
    assert stage["state"] == "done" and stage["rows"]["quantising"]["same_drafts"] > 0.5
    for weights in ("bfloat16", "FP8"):
        assert stage["rows"][f"{weights}: kernels, captured, 4 regions, batch 1"]["canvas_ms"] > 0
        for decode in ("exact, 2 steps", "cached, 11 steps", "cached, 1 steps"):
            assert stage["rows"][f"{weights}, {decode}"]["ratio_to_reference"] > 0
