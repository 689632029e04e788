"""Measure the decoding speed of the reference's loop and ours side by side (`pdlm bench`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
