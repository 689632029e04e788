"""Register our classes with transformers' Auto classes, without importing any of them before they are used.

Our classes and transformers' Auto classes take seconds to import, and transformers imports its Auto modules while it
defines model classes, ours among them. Therefore `announce` only puts names into the mappings, as transformers does
for its own models; `register` runs when a name is first resolved to its class.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

CONFIGS = {"pdmllm": "PdlmConfig", "dmllm": "PdlmBaseConfig"}
# Checkpoints of the reference have the reference's class names in `processor_config.json`.
PROCESSORS = ("PdlmProcessor", "PDMLLMProcessor", "DMLLMProcessor")

_registered = False


def announce() -> None:
    """Put our names into each of transformers' Auto modules as soon as it is imported."""
    auto = "transformers.models.auto"
    hooks: dict[str, Callable[[ModuleType], None]] = {
        f"{auto}.configuration_auto": _announce_configs,
        f"{auto}.processing_auto": _announce_processors,
        f"{auto}.image_processing_auto": _announce_image_processor,
        "transformers.pipelines": _import_pipeline,
    }
    for name, hook in hooks.items():
        wrapt.register_post_import_hook(hook, name)


def _announce_configs(module: ModuleType) -> None:
    module.CONFIG_MAPPING_NAMES.update(CONFIGS)
    module.CONFIG_MAPPING._modules.update(dict.fromkeys(CONFIGS, sys.modules[__package__.partition(".")[0]]))


def _announce_processors(module: ModuleType) -> None:
    for name in PROCESSORS:
        module.PROCESSOR_MAPPING.register(type(f"{name}Key", (), {}), _stand_in(name, "PdlmProcessor"))


def _announce_image_processor(module: ModuleType) -> None:
    if not _registered:
        key, name = type("PdlmImageProcessorKey", (), {}), "PdlmImageProcessorPil"
        module.IMAGE_PROCESSOR_MAPPING.register(key, {"pil": _stand_in(name, name)})
        # Later a processor must find the class, not this stand-in.
        _after_registration.append(lambda: module.IMAGE_PROCESSOR_MAPPING._extra_content.pop(key))


def _import_pipeline(module: ModuleType) -> None:
    """Import our pipeline, which registers itself; harmless if its own import caused this call."""
    importlib.import_module(f"{__package__}.pipeline")


_after_registration: list[Callable[[], Any]] = []


def _stand_in(name: str, target: str) -> type:
    """Make a class that transformers finds by its name, and whose `from_pretrained` is that of our class."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return getattr(sys.modules[__package__.partition(".")[0]], target).from_pretrained(*args, **kwargs)

    return type(name, (), {"from_pretrained": classmethod(from_pretrained)})


def register() -> None:
    """Register "pdmllm" (regions) and "dmllm" (base) with all Auto classes now; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from ..configuration_pdlm import PdlmBaseConfig, PdlmConfig
    from ..image_processing_pdlm import PdlmImageProcessorPil
    from ..modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
    from ..processing_pdlm import PdlmProcessor

    for config, model in (
        (PdlmConfig, PdlmForConditionalGeneration),
        (PdlmBaseConfig, PdlmBaseForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        # All give the class that generates: users of the reference call any of them.
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
            auto_class.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": PdlmImageProcessorPil}, exist_ok=True)
        AutoProcessor.register(config, PdlmProcessor, exist_ok=True)
    while _after_registration:
        _after_registration.pop()()
