"""Fine-tuning PerceptionDLM on your own region data: check it, convert it, train by a recipe, merge the adapter."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
