"""Registration with transformers' Auto classes, at no cost before one of them is used.

Our classes and transformers' Auto classes take seconds to import, and transformers imports its Auto modules while it
defines model classes, ours among them. So `announce` only leaves names in the mappings, as transformers does for its
own models; whoever looks one up gets the class, and `register` has been called by then.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

CONFIGS = {"pdmllm": "PdlmConfig", "dmllm": "PdlmBaseConfig"}
# A reference checkpoint names the reference's classes in its `processor_config.json`.
PROCESSORS = ("PdlmProcessor", "PDMLLMProcessor", "DMLLMProcessor")

_registered = False


def announce() -> None:
    """Leave our names in transformers' Auto modules, each as soon as it is imported."""
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
        # A processor must find the class itself.
        _after_registration.append(lambda: module.IMAGE_PROCESSOR_MAPPING._extra_content.pop(key))


def _import_pipeline(module: ModuleType) -> None:
    """The pipeline registers itself at its end, also where its own import is what led here."""
    importlib.import_module(f"{__package__}.pipeline")


_after_registration: list[Callable[[], Any]] = []


def _stand_in(name: str, target: str) -> type:
    """A class that transformers finds by its name, and that loads with ours."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return getattr(sys.modules[__package__.partition(".")[0]], target).from_pretrained(*args, **kwargs)

    return type(name, (), {"from_pretrained": classmethod(from_pretrained)})


def register() -> None:
    """Register "pdmllm" (regions) and "dmllm" (base) with all Auto classes now. Harmless when repeated."""
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
        # Each gives the class that generates: that is what users of the reference call.
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
            auto_class.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": PdlmImageProcessorPil}, exist_ok=True)
        AutoProcessor.register(config, PdlmProcessor, exist_ok=True)
    while _after_registration:
        _after_registration.pop()()
