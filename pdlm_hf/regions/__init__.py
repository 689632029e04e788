"""A region in any form: masks, boxes, polygons, RLE, and the files of other tools."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
