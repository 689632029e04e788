"""Runs of lmms-eval need its environment (`make test-lmms`)."""

import importlib.util

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore = ["test_lmms.py"]
