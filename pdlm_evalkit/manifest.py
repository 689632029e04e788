"""What lmms-eval finds of this package: its entry point, and the folder of our tasks."""

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
