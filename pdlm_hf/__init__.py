"""PerceptionDLM for transformers. Importing it registers the models with the Auto classes."""

from .app.captioner import RegionCaptioner
from .app.regions import Region
from .app.register import register
from .configuration_pdlm import PdlmBaseConfig, PdlmConfig, PdlmTextConfig
from .generation_config_pdlm import PdlmGenerationConfig
from .generation_pdlm import PdlmGenerationOutput
from .image_processing_pdlm import PdlmImageProcessorPil
from .modeling_pdlm import (
    PdlmBaseForConditionalGeneration,
    PdlmForConditionalGeneration,
    PdlmModel,
    PdlmPreTrainedModel,
)
from .processing_pdlm import PdlmProcessor, RegionCaption
from .shapes import BASE_CHECKPOINT, CHECKPOINT

__version__ = "0.1.0"

register()

__all__ = [
    "BASE_CHECKPOINT",
    "CHECKPOINT",
    "PdlmBaseConfig",
    "PdlmBaseForConditionalGeneration",
    "PdlmConfig",
    "PdlmForConditionalGeneration",
    "PdlmGenerationConfig",
    "PdlmGenerationOutput",
    "PdlmImageProcessorPil",
    "PdlmModel",
    "PdlmPreTrainedModel",
    "PdlmProcessor",
    "PdlmTextConfig",
    "Region",
    "RegionCaption",
    "RegionCaptioner",
    "register",
]
