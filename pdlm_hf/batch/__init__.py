"""Captions for data sets: rows in, rows out, and a run that was stopped continues."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
