"""The one place that knows how the supported versions of transformers differ. Travels with checkpoints."""

from dataclasses import fields

from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

# What models, masks and outputs call the key-value cache: `past_key_values` until 5.23, `cache` from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def _unchanged(forward):
    return forward


# Decorator of a `forward` with both names: from 5.24 on, whoever gives the older one is told, as by any model there.
accepts_old_cache_name = (
    deprecate_kwarg("past_key_values", "5.40.0", new_name="cache") if CACHE == "cache" else _unchanged
)
# The name in models and `TrainingArguments` of recomputing activations in the backward pass; since 5.23 the older
# one warns; it will go with version 6. The methods of models are this name and `_enable`, `_disable`.
_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"
