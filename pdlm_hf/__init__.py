"""PerceptionDLM for transformers. Importing it registers the models with the Auto classes."""

from typing import Any

import lazy_loader

from .captioning.registration import announce, register

__version__ = "0.1.0"

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    value = _lazy(name)
    if name.startswith("Pdlm"):  # a class of the model
        register()
    return value


announce()
