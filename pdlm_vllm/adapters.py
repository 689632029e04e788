"""LoRA adapters at run time: which ones a server can take.

vLLM adds adapters to the linear layers of the language model. What `pdlm-peft` may train beside them (the projector,
the region embedding, the vision tower, the vocabulary) belongs to every image and every request of a server; an
adapter that has any of it is to be merged.
"""

import json
from functools import cache
from pathlib import Path

from safetensors import safe_open

from pdlm_hf.errors_pdlm import CheckpointError


@cache
def check_adapter(folder: str) -> None:
    """Raises: CheckpointError if the adapter has more than LoRA matrices of the language model's layers.

    Args:
        folder (`str`): PEFT's, with adapter_config.json and adapter_model.safetensors.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}") from error
    more = set(config.get("modules_to_save") or [])
    more |= {name for name in names if ".language_model.layers." not in name}
    if more:
        raise CheckpointError(
            f"The adapter in {folder} cannot be added at run time: it also changes {', '.join(sorted(more)[:3])}. "
            "Merge it (`pdlm-peft merge`) and serve the result, or train one with adapter.train_in_full=[] and "
            "adapter.vision=false."
        )
