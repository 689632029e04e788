"""Clients: for OpenAI-compatible servers, and for the region route of pdlm_vllm."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
