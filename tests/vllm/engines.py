"""Engines of vLLM without a server, and how many images they are given."""

import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm import LLM, envs

from pdlm_hf import CHECKPOINT

# Of several images with one to eight regions: some in the fast tests, all in the slow ones.
SOME = pytest.mark.parametrize(
    "some", [slice(None, None, 3), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["some", "all"]
)


@contextmanager
def started(processes: int = 1, **options):
    """An engine with these options of [`LLM`], ended afterwards; with two processes it is not in this one."""
    gc.freeze()  # a start collects garbage ten times: not in all that was imported
    envs.disable_envs_cache()  # of an engine before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(processes - 1))
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
