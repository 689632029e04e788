"""Evaluation of PerceptionDLM: the paper's 16 benchmarks in VLMEvalKit and lmms-eval, ParaDLC-Bench and DLC-Bench."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
