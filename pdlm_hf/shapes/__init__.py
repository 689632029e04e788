"""The shapes data set: synthetic scenes, captions, questions, and the evaluation of the embedded checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
