"""Parity with the reference: every recorded value is a test. See parity_golden.py for where they come from."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parity_golden import FOLDER, load  # noqa: E402


def pytest_report_header(config):
    return f"golden fixtures: {FOLDER}"


@pytest.fixture(scope="session")
def pdmllm():
    """The region checkpoint: model, processor, config, path."""
    return load("pdmllm")


@pytest.fixture(scope="session")
def dmllm():
    """The base checkpoint."""
    return load("dmllm")
