"""ParaDLC-Bench and DLC-Bench: captions of masked regions, scored by a judge that answers questions about them.

There are no reference captions. For every mask the benchmark has multiple-choice questions: positive questions ask
whether the caption states a detail correctly, negative questions whether it states something that is not in the image.
The judge, a language model, reads the caption (in ParaDLC-Bench it also sees the region) and chooses; each choice has
a score.

`data` reads a benchmark, `captioning` captions it, `judging` asks the judge, `parsing` reads its replies, `scoring`
computes the scores, and `report` compares runs. `make_example` writes the small invented benchmark in `example/` and
describes the file formats.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
