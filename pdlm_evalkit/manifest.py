"""What the harnesses find of this package: entry points, and the folder of our tasks for lmms-eval."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LMMS_TASKS = Path(__file__).parent / "lmms_tasks"


def lmms_manifest() -> Any:
    """Entry point `lmms_eval.models`: names and classes of the model, as lmms-eval's `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="pdlm",
        chat_class_path="pdlm_evalkit.lmms.PdlmChat",
        simple_class_path="pdlm_evalkit.lmms.PdlmSimple",
        aliases=("perceptiondlm",),
    )


def vlmeval_models() -> dict[str, Callable]:
    """Entry point `vlmeval.models`: by name, functions that build a model of VLMEvalKit.

    Today's VLMEvalKit reads no entry points; docs/evaluation.md has the lines that would let it.
    """
    from .vlmeval_run import HUB, build

    world = os.environ.get("WORLD_SIZE")
    return {name: partial(build, world, pretrained=hub_id) for name, hub_id in HUB.items()}
