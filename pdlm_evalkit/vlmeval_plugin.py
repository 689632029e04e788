"""The models as an entry point for VLMEvalKit, which reads none yet; docs/evaluation.md has the lines that would.

Nothing here imports torch or VLMEvalKit before a model is built.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

HUB = {"PerceptionDLM-Base": "MSALab/PerceptionDLM-Base", "PerceptionDLM": "MSALab/PerceptionDLM"}


def is_ours(name: str, settings: dict[str, Any] | None) -> bool:
    """Whether a model of a `--config`, by its name and settings, is of our class."""
    return (settings or {}).get("class", name) in ("PerceptionDLM", *HUB)


def build(world: str | None, **settings: Any) -> Any:
    """Build a model of VLMEvalKit.

    Args:
        world (`str`, *optional*): WORLD_SIZE. run.py hides it from models, and forgets it if a `--config` names one
            without its class; each rank would then answer all questions.
        **settings: arguments of [`vlmeval_model.PerceptionDLM`].
    """
    from .vlmeval_model import PerceptionDLM

    model = PerceptionDLM(**settings)
    if world is not None:
        os.environ["WORLD_SIZE"] = world
    return model


def vlmeval_models() -> dict[str, Callable]:
    """Entry point `vlmeval.models`: by name, functions that build a model."""
    world = os.environ.get("WORLD_SIZE")
    return {name: partial(build, world, pretrained=hub_id) for name, hub_id in HUB.items()}
