"""Engines of vLLM in the process of the tests, and how many images they are given."""

import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm import LLM

from pdlm_hf import CHECKPOINT

# Of several images with one to eight regions: some in the fast tests, all in the slow ones.
SOME = pytest.mark.parametrize(
    "some", [slice(None, None, 3), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["some", "all"]
)


@contextmanager
def started(**options):
    """An engine with these options of [`LLM`], ended afterwards."""
    gc.freeze()  # a start collects garbage ten times: not in all that was imported
    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def engine(model: str | Path = CHECKPOINT, **options):
    """An engine in float32 with a cache for some thirty requests: a larger one takes a second to fill with zeros."""
    usual = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, "num_gpu_blocks_override": 2048}
    return started(model=str(model), **usual | options)


def runner(llm: LLM):
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def preemptions(llm: LLM) -> int:
    """How often requests have lost their places in the cache."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
