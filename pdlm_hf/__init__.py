"""PerceptionDLM for transformers. Importing it registers the models with the Auto classes."""

from .configuration_pdlm import PdlmBaseConfig, PdlmConfig, PdlmTextConfig
from .generation_pdlm import PdlmGenerationConfig, PdlmGenerationOutput
from .image_processing_pdlm import PdlmImageProcessorPil
from .modeling_pdlm import (
    PdlmBaseForConditionalGeneration,
    PdlmForConditionalGeneration,
    PdlmModel,
    PdlmPreTrainedModel,
)
from .processing_pdlm import PdlmProcessor, RegionCaption
from .register import register

__version__ = "0.1.0"

register()
