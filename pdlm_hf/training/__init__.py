"""What a transformers `Trainer` needs to train this model on regions or conversations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
