"""CUDA graphs of the forward pass over the canvas.

With a prefix cache, a forward pass over the canvas of an 8B keeps an H100 busy for 12 ms; launching its 1,751 kernels
one by one takes Python 25 ms and more. A graph is captured once for every shape and replayed with new contents.
"""

from collections import Counter, OrderedDict
from functools import partial

import torch
from transformers.utils import logging

from .split_attention_pdlm import SplitCache, split_pass

logger = logging.get_logger(__name__)

WIDTH_MULTIPLE = 256  # shared prompt rows are padded to it: images of as many tiles share a graph
MAX_GRAPHS = 4  # each holds the prompts' keys and values of one batch
MAX_TRIES = 3  # captures of one shape that may fail: the memory of another batch may be free the next time


class CanvasGraph:
    """One forward pass over a canvas of fixed shape.

    Args:
        language_model (`PdlmTextModel`)
        embeds, positions (`torch.Tensor`): first contents.
        cache (`SplitCache`): first contents; kept, and overwritten by later images.
    """

    def __init__(self, language_model, embeds: torch.Tensor, positions: torch.Tensor, cache: SplitCache):
        self.embeds, self.positions, self.cache = embeds.clone(), positions.clone(), cache
        self._pass = partial(split_pass, language_model, self.embeds, self.positions, self.cache)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden = self.run()
        if embeds.is_cuda:
            with torch.cuda.device(embeds.device):
                self._capture()

    def run(self) -> torch.Tensor:
        """The pass itself. Autocast's copies of weights die with it, so that a graph must make its own."""
        device = self.embeds.device.type
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=autocast, cache_enabled=False):
            return self._pass()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels choose their workspaces before the capture
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = self.graph = torch.cuda.CUDAGraph()
        # other threads, a data loader's for one, may use the device meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.hidden = self.run()

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states for these inputs; overwritten by the next call."""
        self.embeds.copy_(embeds)
        self.positions.copy_(positions)
        if self.graph is None:
            self.hidden = self.run()
        else:
            with torch.cuda.device(embeds.device):
                self.graph.replay()
        return self.hidden


class CanvasGraphs:
    """The graphs of a model, the most recently used ones.

    Args:
        language_model (`PdlmTextModel`)
    """

    def __init__(self, language_model):
        self.language_model = language_model
        self.graphs: OrderedDict[tuple, CanvasGraph] = OrderedDict()
        self.failures: Counter[tuple] = Counter()

    def __reduce__(self):
        """Copies and pickles have no graphs, because graphs belong to this process and these weights."""
        return CanvasGraphs, (self.language_model,)

    def load(self, embeds: torch.Tensor, positions: torch.Tensor, cache: SplitCache) -> CanvasGraph | None:
        """The graph for these shapes with this cache in it; None, with a logged reason, if it cannot be captured."""
        device = embeds.device.type
        state = (
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )
        shape = (*embeds.shape[:2], cache.get_seq_length(), cache.block, cache.num_roi_tokens)
        key = (self._network(), embeds.dtype, embeds.device, *state, *shape)
        if key in self.graphs:
            self.graphs[key].cache.copy_(cache)
        elif self.failures[key] >= MAX_TRIES:
            return None
        else:
            while len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)
            try:
                self.graphs[key] = CanvasGraph(self.language_model, embeds, positions, cache)
            except RuntimeError as error:
                self.failures[key] += 1
                logger.warning("Decoding without a CUDA graph, because the capture failed: %s", error)
                return None
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _network(self) -> int:
        """Key of a captured graph: the addresses of the weights, and the active adapters."""
        weights = [parameter.data_ptr() for parameter in self.language_model.parameters()]
        adapters = [
            (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
            for module in self.language_model.modules()
            if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")  # PEFT's tuner layers
        ]
        return hash((tuple(weights), tuple(adapters)))
