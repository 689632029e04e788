"""The one place that knows how the supported versions of transformers differ. Travels with checkpoints."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

# What models, masks and outputs call the key-value cache: `past_key_values` until 5.23, `cache` from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
