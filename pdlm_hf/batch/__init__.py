"""Caption whole data sets into JSONL, by this process, a server or Ray; a stopped run is resumed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
