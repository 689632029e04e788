from .collator import PdlmCollator as PdlmCollator
from .collator import partition_regions as partition_regions
from .collator import region_rows as region_rows
from .trainer import Clock as Clock
from .trainer import InOrderTrainer as InOrderTrainer
