"""Captions to look at: drawings, contact sheets, HTML reports and recordings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
