"""PerceptionDLM for vLLM: an out-of-tree model, found by vLLM through entry points.

Nothing here imports vLLM at the top: the entry points are loaded in every process of every vLLM installation that has
this package beside it, whatever model it serves.
"""

import os
from importlib import metadata
from typing import Any

ARCHITECTURES = {  # name in config.json -> base model?
    "PdlmForConditionalGeneration": False,
    "PdlmBaseForConditionalGeneration": True,
    "PDMLLM": False,  # the reference's names
    "DMLLM": True,
}
SUPPORTED = ("0.32", "0.33")
ENDPOINT = "pdlm_http"
_LAZY = {
    "attributes_many": ".attributes",
    "caption_many": ".offline",
    "region_requests": ".requests",
    "read_captions": ".requests",
}

__all__ = ["ARCHITECTURES", "attributes_many", "caption_many", "read_captions", "region_requests", "register"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version_problem(version: str) -> str | None:
    """The reason why this version of vLLM cannot be used; None if it can."""
    if version.startswith(tuple(f"{known}." for known in SUPPORTED)):
        return None
    return (
        f"pdlm_vllm works with vLLM {' and '.join(SUPPORTED)}, but {version} is installed: PerceptionDLM is not "
        "registered. Install vllm==0.32.* to serve it."
    )


def _allow_endpoint() -> None:
    """Let vLLM load our HTTP routes.

    vLLM loads endpoint plugins only if VLLM_PLUGINS names them, and that variable is one allow-list for all kinds of
    plugins. If the user has set none, the list becomes: every plugin that would be loaded anyway, and our routes.
    """
    if os.environ.get("VLLM_PLUGINS") is not None:
        return
    groups = ("general_plugins", "io_processor_plugins", "platform_plugins", "stat_logger_plugins")
    names = {entry.name for group in groups for entry in metadata.entry_points(group=f"vllm.{group}")}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {ENDPOINT}))


def register() -> None:
    """Entry point `vllm.general_plugins`. Harmless when repeated."""
    import vllm

    if problem := version_problem(vllm.__version__):
        from vllm.logger import init_logger

        init_logger("vllm.plugins.pdlm").error(problem)  # not an exception: this vLLM may serve other models
        return
    _allow_endpoint()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from .cpu import allow_model_runner

        allow_model_runner()

    import pdlm_hf  # noqa: F401  registers the configurations with transformers

    from .config import PdlmVerify

    known = ModelRegistry.get_supported_archs()
    for name, base in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, f"pdlm_vllm.model:{'PdlmBaseForVllm' if base else 'PdlmForVllm'}")
        MODELS_CONFIG_MAP[name] = PdlmVerify
