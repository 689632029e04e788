"""Fixtures of the vLLM tests. Everything that needs vLLM itself runs in its own environment (`make test-vllm`)."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# A server of two processes instead of three: a start takes two thirds of the time. `make test-full` uses three.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).parent))

WITHOUT_VLLM = ("test_layout.py", "test_plan.py")
if importlib.util.find_spec("vllm") is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in WITHOUT_VLLM]


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory):
    """The embedded checkpoint as the reference would have saved it: other switches, other layout."""
    from reference_layout import write_reference

    from pdlm_hf import CHECKPOINT

    return write_reference(CHECKPOINT, tmp_path_factory.mktemp("reference") / "checkpoint")


@pytest.fixture(scope="session")
def captioner():
    """transformers, on the embedded checkpoint."""
    from pdlm_hf import RegionCaptioner

    return RegionCaptioner.from_pretrained(device="cpu")


@pytest.fixture(scope="session")
def reference_captioner(reference_folder):
    """transformers, on the checkpoint in the reference's layout."""
    from pdlm_hf import RegionCaptioner

    found = RegionCaptioner.from_pretrained(reference_folder, device="cpu")
    assert (found.model.config.roi_replay, found.model.config.prefix_attention) == ("reference", "full")
    return found


@pytest.fixture(scope="session", params=["shapes", "reference"])
def both(request, captioner, reference_folder, reference_captioner):
    """An engine and transformers on the same checkpoint."""
    from engines import engine

    from pdlm_hf import CHECKPOINT

    model, plain = {"shapes": (CHECKPOINT, captioner), "reference": (reference_folder, reference_captioner)}[
        request.param
    ]
    with engine(model) as llm:
        yield llm, plain


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server with the embedded checkpoint, and a cache so small that requests lose their places under load."""
    from server import serve

    from pdlm_hf import CHECKPOINT

    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ["--num-gpu-blocks-override", "400", "--additional-config", '{"max_regions": 60}']
    options += ["--enable-log-requests", "--enable-log-outputs", "--enable-server-load-tracking"]
    with serve(CHECKPOINT, log, "--served-model-name", "shapes", *options) as running:
        yield running
