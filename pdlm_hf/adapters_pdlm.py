"""Adapters: methods that PEFT and transformers' PEFT integration expect of a model, and checks of their settings."""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

from .errors_pdlm import CheckpointError, SettingError, reading

BASE_FILE = "pdlm_base.json"  # beside an adapter: its base, and what the recipe changed besides the weights
# PEFT's methods that put virtual tokens before or between those of the input
VIRTUAL_TOKENS = frozenset(
    "PROMPT_TUNING PREFIX_TUNING P_TUNING MULTITASK_PROMPT_TUNING CPT CARTRIDGE ADAPTION_PROMPT".split()
)


def refuse_virtual_tokens(method: str) -> None:
    """Raises: SettingError: `method` adds virtual tokens, which cannot work here; the message has an alternative."""
    raise SettingError(
        f"PerceptionDLM cannot be adapted by {method}: virtual tokens would shift the positions at which the image, "
        "the regions and the captions are found, and denoising has no place for them. Use LoRA (LoraConfig, also with "
        "DoRA or rsLoRA), IA3, OFT, LoKr or LoHa; to train single tokens, `trainable_token_indices` of LoraConfig."
    )


def adapter_base(folder: str | os.PathLike) -> str:
    """Base checkpoint of an adapter folder that `pdlm-peft train` wrote.

    A path in [`BASE_FILE`] starts from the folder, so that both can be moved together. The checkpoints embedded in
    this package are found wherever the package is.

    Args:
        folder (`str` or `os.PathLike`): adapter folder.

    Raises:
        CheckpointError: the base that the adapter names does not exist, or the file that names it is damaged.

    Returns:
        `str`: path of the base, or its hub id.
    """
    with reading(folder, BASE_FILE):
        noted = json.loads(Path(folder, BASE_FILE).read_text(encoding="utf-8"))
        base = noted["base"]
        places = [Path(folder, base), Path(base)]  # the second: written from the working directory, as it was once
        if noted.get("embedded"):
            places.append(Path(__file__).parent / "shapes" / noted["embedded"])
    for place in places:
        if place.is_dir():
            return str(place)
    if base.startswith((".", os.sep)) or base.count("/") > 1:
        raise CheckpointError(
            f"The base of the adapter {folder} is not at {base}. Give its folder or hub id: `pdlm-peft merge {folder} "
            f"OUT --base BASE`; in Python load the base and call its `load_adapter({str(folder)!r})`."
        )
    return base


class PdlmAdapterMixin(PreTrainedModel):
    """Loading of adapters, and refusals of those that cannot work."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint, or an adapter folder with its base, which [`adapter_base`] finds."""
        folder = pretrained_model_name_or_path
        is_path = isinstance(folder, (str, os.PathLike))
        if is_path and all(os.path.isfile(os.path.join(folder, name)) for name in (BASE_FILE, "adapter_config.json")):
            given = kwargs.get("adapter_kwargs") or {}
            kwargs["adapter_kwargs"] = given | {"_adapter_model_path": str(folder)}
            pretrained_model_name_or_path = adapter_base(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """Add a fresh adapter. Raises: SettingError for a method with virtual tokens."""
        if (method := getattr(adapter_config, "peft_type", None)) in VIRTUAL_TOKENS:
            refuse_virtual_tokens(f"{method.value} ({type(adapter_config).__name__})")
        super().add_adapter(adapter_config, adapter_name)

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """Load an adapter, DoRA's magnitudes included, and the switches and generation settings noted beside it.

        Raises:
            SettingError: the adapter has virtual tokens.
            CheckpointError: the adapter has weights that find no place in the model.
        """
        load_config = kwargs.get("load_config")
        known = load_config.weight_mapping if load_config is not None else None
        # PEFT's files have `lora_magnitude_vector`, its modules `lora_magnitude_vector.NAME.weight`; transformers adds
        # the name of the adapter, but not `weight`, and DoRA would lose what it learned.
        dora = WeightRenaming(r"(lora_magnitude_vector\.[^.]+)$", r"\1.weight")
        kwargs["weight_mapping"] = [*(known or get_model_conversion_mapping(self)), dora]
        try:
            info = super().load_adapter(peft_model_id, *args, **kwargs)
        except ValueError as error:
            if "prompt learning" in str(error):  # PEFT's own words name no method
                refuse_virtual_tokens("the virtual tokens of this adapter")
            raise
        if info.unexpected_keys:
            lost = sorted(info.unexpected_keys)
            raise CheckpointError(
                f"{len(lost)} weights of the adapter {peft_model_id or ''} find no place in the model, {lost[0]} for "
                "example: it would not be the model that was trained. Load it with PeftModel.from_pretrained, or with "
                "other versions of transformers and peft."
            )
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        path = peft_model_id and cached_file(str(peft_model_id), BASE_FILE, **quietly)
        if path:
            noted = json.loads(Path(path).read_text(encoding="utf-8"))
            for name, value in noted["switches"].items():
                setattr(self.config, name, value)
            self.generation_config.update(**noted["generation"])
        return info

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed. PEFT asks by this older name, of which transformers would warn."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def get_submodule(self, target: str):
        """The submodule at a dotted path.

        Raises:
            SettingError: PEFT looks for word embeddings, to put virtual tokens before them.
        """
        if target == "embeddings.word_embeddings":  # whatever the task type, the first that it asks of a model
            refuse_virtual_tokens(
                "methods with virtual tokens (prompt tuning, prefix tuning, p-tuning, multitask prompt tuning, CPT)"
            )
        return super().get_submodule(target)
