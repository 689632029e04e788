"""Parameter names of the reference's checkpoints <-> ours.

Imported by the modeling file, not by the package, so that it also holds where a checkpoint brings its own code.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

# reference prefix -> our prefix
PARAMETER_PREFIXES = {
    "vision_model.vision_model.": "model.vision_tower.",
    "vision_abstractor.projection.0.": "model.multi_modal_projector.linear_1.",
    "vision_abstractor.projection.2.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "mask_id_embedding.": "model.region_embedding.",
}


def register_conversion() -> None:
    """Tell transformers how to read (and write) the reference's parameter names. Harmless when repeated."""
    for model_type in ("pdmllm", "dmllm"):
        renamings: list[WeightConverter | WeightRenaming] = [
            WeightRenaming("^" + theirs.replace(".", r"\."), ours) for theirs, ours in PARAMETER_PREFIXES.items()
        ]
        register_checkpoint_conversion_mapping(model_type, renamings, overwrite=True)


register_conversion()
