"""Runs of lmms-eval need its environment (`make test-lmms`)."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "evalkit")]
# read when the harness is imported
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf")

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
