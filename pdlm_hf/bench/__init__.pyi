from .decode import compare as compare
from .decode import decode as decode
from .model import SHAPES as SHAPES
from .model import Bench as Bench
