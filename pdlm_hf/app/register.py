"""Registration with transformers' Auto classes."""

import contextlib

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from ..configuration_pdlm import PdlmBaseConfig, PdlmConfig
from ..conversion_pdlm import register_conversion
from ..image_processing_pdlm import PdlmImageProcessorPil
from ..modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from ..processing_pdlm import PdlmProcessor
from .pipeline import TASK, RegionCaptioningPipeline

# Every one gives the class that generates: that is what users of the reference call.
MODEL_AUTO_CLASSES = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)


def _reference_alias(name: str, config: type) -> None:
    """Let a reference folder find our processor by the class name in its `processor_config.json`.

    transformers looks the name up among registered processors before it asks for remote code. The key of such an entry
    is a config class that no checkpoint has.
    """

    class Alias(PdlmProcessor):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return PdlmProcessor.from_pretrained(*args, **kwargs)

    Alias.__name__ = Alias.__qualname__ = name
    AutoProcessor.register(type(name + "Config", (config,), {"model_type": name.lower()}), Alias, exist_ok=True)


def register() -> None:
    """Register "pdmllm" (regions) and "dmllm" (base). Harmless when repeated."""
    for config, model in (
        (PdlmConfig, PdlmForConditionalGeneration),
        (PdlmBaseConfig, PdlmBaseForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class in MODEL_AUTO_CLASSES:
            auto_class.register(config, model, exist_ok=True)
        with contextlib.suppress(ImportError):  # up to transformers 5.17 this Auto class needs torchvision
            AutoImageProcessor.register(config, image_processor_classes={"pil": PdlmImageProcessorPil}, exist_ok=True)
        AutoProcessor.register(config, PdlmProcessor, exist_ok=True)
        # save_pretrained then writes the code beside the weights (trust_remote_code)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModelForImageTextToText")
    PdlmImageProcessorPil.register_for_auto_class()
    PdlmProcessor.register_for_auto_class()
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=RegionCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
        )
    if not any(getattr(p, "__name__", "") == "PDMLLMProcessor" for p in PROCESSOR_MAPPING._extra_content.values()):
        _reference_alias("PDMLLMProcessor", PdlmConfig)
        _reference_alias("DMLLMProcessor", PdlmBaseConfig)
    register_conversion()
