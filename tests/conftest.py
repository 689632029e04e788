"""Shared fixtures: tiny models with random weights, the reference-format checkpoints, drawn images."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU; read where they are defined

import pdlm_hf  # noqa: E402, F401  (registers the Auto classes)
from pdlm_hf.shapes.scenes import draw_scene  # noqa: E402
from tools.shapes.model import build_processor  # noqa: E402

for _helpers in ("hf", "evalkit", "peft", "fuzz", "formats"):
    sys.path.insert(0, str(Path(__file__).parent / _helpers))

from tiny import lively_model, make_image  # noqa: E402

GOLDEN = Path(__file__).parent / "parity" / "golden"


@pytest.fixture(scope="session")
def golden_regions() -> Path:
    """A tiny checkpoint of the region model in the reference's own format."""
    return GOLDEN / "checkpoint_pdmllm"


@pytest.fixture(scope="session")
def golden_base() -> Path:
    """A tiny checkpoint of the base model in the reference's own format."""
    return GOLDEN / "checkpoint_dmllm"


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def model(processor):
    """prefix_attention "full", roi_replay "aligned". Not to be changed by a test."""
    return lively_model(processor)


@pytest.fixture(scope="session")
def isolated_model(processor):
    return lively_model(processor, "isolated")


@pytest.fixture(scope="session")
def tiny_checkpoint(model, processor, tmp_path_factory) -> Path:
    """The tiny region model as a checkpoint folder of ours."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes():
    """Drawn images with different numbers of regions and tiles."""
    return [draw_scene(np.random.default_rng(seed)) for seed in range(4)]


@pytest.fixture
def image():
    return make_image(0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to run a page of the documentation in, with the folders of the repository that pages name."""
    package = Path(pdlm_hf.__file__).parent
    for folder in (Path(__file__).parents[1] / "examples", package, package.parent / "pdlm_evalkit"):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path
