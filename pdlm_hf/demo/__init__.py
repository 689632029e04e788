"""`pdlm demo`: a web page on which users mark regions of an image and watch their captions emerge."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
