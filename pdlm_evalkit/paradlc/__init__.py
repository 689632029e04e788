"""ParaDLC-Bench and DLC-Bench: captions of masked regions, questions about the captions, and a judge who answers them.

A caption is never compared with a text. For every mask the benchmark has multiple-choice questions: positive ones ask
whether a detail is stated and right, negative ones whether something is stated that is not there. A judge model reads
the caption (in ParaDLC-Bench it sees the region too) and chooses; every choice has a score.

`data` reads a benchmark, `captioning` captions it, `judging` asks the judge, `parsing` reads its replies, `scoring`
adds up, `report` shows. `make_example` writes the small made-up benchmark in `example/` and is the description of the
file formats.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
