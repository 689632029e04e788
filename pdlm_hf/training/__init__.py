"""Train this model with a transformers `Trainer`: batches with noise from regions or conversations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
