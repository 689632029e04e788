"""Weights of torchao, which `make .torchao/ready` installs beside the other packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_captions_with_small_weights():
    """int8 gives the words of float32; FP8 by kernels those of torchao's own layers, whose products are equal."""
    installed = ROOT / ".torchao"
    assert (installed / "torchao").is_dir(), "run: make .torchao/ready"
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("torchao_weights.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["one product"] is True and row["captions"] > 30
    assert row["int8"] >= 0.98 and row["FP8 by kernels"] >= 0.9 and row["FP8"] >= 0.6
