"""Forward passes by fused kernels, those over the canvas alone replayed from CUDA graphs.

A graph is captured once for every shape and replayed with new contents: the first pass of an image writes the prompt's
keys and values to where the graph reads them.
"""

from collections import OrderedDict

import torch
from transformers.utils import logging

from .fused_pdlm import CanvasCache, FusedNetwork

logger = logging.get_logger(__name__)

WIDTH_MULTIPLE = 256  # room for prompts is a multiple of it: images of as many tiles share a graph
MAX_SHAPES = 4  # each keeps the prompts' keys and values of one batch
MAX_SHARE = 0.25  # of the device's memory that they may keep together
MAX_TRIES = 3  # captures of one shape that may fail: the memory of another batch may be free the next time


class FusedPasses:
    """Forward passes of one shape: a cache in a fixed place, and a graph of the pass over the canvas.

    Args:
        key (`tuple`): shape, data type and weights.
        network (`FusedNetwork`)
        cache (`CanvasCache`)
    """

    def __init__(self, key: tuple, network: FusedNetwork, cache: CanvasCache):
        self.key, self.network, self.cache = key, network, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.embeds = self.positions = self.hidden = torch.empty(0)
        self.failures = 0

    def whole(self, embeds: torch.Tensor, positions: torch.Tensor, isolated: bool, real: torch.Tensor | None):
        """Hidden states of the canvas, from prompts and canvas; see [`FusedNetwork`]. Fills the cache."""
        return self.network(embeds, positions, self.cache, isolated, real)

    def canvas(self, embeds: torch.Tensor, positions: torch.Tensor, captured: bool) -> torch.Tensor:
        """Hidden states of the canvas on cached prompts; those of a graph are overwritten by its next replay."""
        if captured and self.graph is None and self.failures < MAX_TRIES and embeds.is_cuda:
            self._try_to_capture(embeds, positions)
        if not captured or self.graph is None:
            return self.network(embeds, positions, self.cache)
        self.embeds.copy_(embeds)
        self.positions.copy_(positions)
        with torch.cuda.device(embeds.device):
            self.graph.replay()
        return self.hidden

    def _try_to_capture(self, embeds: torch.Tensor, positions: torch.Tensor) -> None:
        self.embeds, self.positions = embeds.clone(), positions.clone()
        try:
            self._capture()
        except RuntimeError as error:
            self.failures += 1
            logger.warning("Decoding without a CUDA graph, because the capture failed: %s", error)

    def _capture(self) -> None:
        def run():
            return self.network(self.embeds, self.positions, self.cache)

        with torch.cuda.device(self.embeds.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled, and choose their workspaces, before the capture
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads, a data loader's for one, may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.hidden = run()
            self.graph = graph


class CanvasGraphs:
    """Forward passes of a model by shape, those that were used last. In use they are taken out: whoever else decodes
    meanwhile, in another thread, has others.

    Args:
        language_model (`PdlmTextModel`)
    """

    def __init__(self, language_model):
        self.language_model = language_model
        self.passes: OrderedDict[tuple, FusedPasses] = OrderedDict()

    def __reduce__(self):
        """Copies and pickles have none, because graphs belong to this process and these weights."""
        return CanvasGraphs, (self.language_model,)

    def take(
        self, like: torch.Tensor, rows: int, width: int, blocks: int, block: int, num_roi_tokens: int
    ) -> FusedPasses:
        """The passes for this shape; their cache holds other prompts, or none.

        Args:
            like (`torch.Tensor`): type and device of hidden states.
            rows, width (`int`): prompts, and columns of the longest.
            blocks, block, num_roi_tokens (`int`): see [`CanvasCache`].
        """
        network = FusedNetwork(self.language_model)  # puts weights together, so that their addresses stay
        shape = (rows, WIDTH_MULTIPLE * -(-width // WIDTH_MULTIPLE), blocks, block, num_roi_tokens)
        key = (self._weights(), like.dtype, like.device, torch.is_inference_mode_enabled(), *shape)
        found = self.passes.pop(key, None)
        if found is None:
            self._make_room(like.device)
            found = FusedPasses(key, network, CanvasCache(self.language_model.config, like, *shape))
        return found

    def give_back(self, passes: FusedPasses) -> None:
        """Keep passes that are not in use any more."""
        self.passes[passes.key] = passes

    def _make_room(self, device: torch.device) -> None:
        """Forget what was not used for longest."""
        while len(self.passes) >= MAX_SHAPES or (self.passes and self._kept() > self._limit(device)):
            self.passes.popitem(last=False)

    def _kept(self) -> int:
        return sum(layer.nbytes for passes in self.passes.values() for layer in passes.cache.layers)

    def _limit(self, device: torch.device) -> float:
        if device.type != "cuda":
            return float("inf")
        return MAX_SHARE * torch.cuda.get_device_properties(device).total_memory

    def _weights(self) -> int:
        """Key of a captured graph: the addresses of the weights, and the active adapters."""
        # weights of torchao have no address of their own
        weights = [getattr(each, "qdata", each).data_ptr() for each in self.language_model.parameters()]
        adapters = [
            (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
            for module in self.language_model.modules()
            if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")  # PEFT's tuner layers
        ]
        return hash((tuple(weights), tuple(adapters)))
