"""Forward passes by fused kernels, those over the canvas alone replayed from CUDA graphs.

A graph is captured once for every shape and replayed with new contents: the first pass of an image writes the prompt's
keys and values to where the graph reads them.
"""

import weakref
from collections import OrderedDict
from contextlib import suppress
from threading import Lock

import torch
from transformers.utils import logging

from .fused_pdlm import CanvasCache, FusedNetwork

logger = logging.get_logger(__name__)

WIDTH_MULTIPLE = 256  # room for prompts is a multiple of it: images of as many tiles share a graph
MAX_SHAPES = 4  # each keeps the prompts' keys and values of one batch
MAX_SHARE = 0.25  # of the device's memory that they may keep together
MAX_TRIES = 3  # captures of one shape that may fail: the memory of another batch may be free the next time


_CAPTURE = Lock()  # one at a time in a process
_FREE_STREAMS: list[torch.cuda.Stream] = []  # of graphs that are gone


class FusedPasses:
    """Forward passes of one shape: a cache in a fixed place, and a graph of the pass over the canvas.

    A graph has a stream of its own as long as it lives. With the stream goes cuBLAS's workspace, which some releases
    of torch free when any graph of the stream is dropped; and torch has 32 streams, which it hands out in turn.

    Args:
        key (`tuple`): shape, data type and weights.
        network (`FusedNetwork`)
        cache (`CanvasCache`)
    """

    def __init__(self, key: tuple, network: FusedNetwork, cache: CanvasCache):
        self.key, self.network, self.cache = key, network, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.given_back: torch.cuda.Event | None = None
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
        with _CAPTURE, torch.cuda.device(self.embeds.device):
            if self.stream is None:
                self.stream = _free_stream(self.embeds.device)
                weakref.finalize(self, _FREE_STREAMS.append, self.stream).atexit = False
            current, stream = torch.cuda.current_stream(), self.stream
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(
                    stream
                ):  # kernels are compiled, and choose their workspaces, before the capture
                    for _ in range(2):
                        self.network(self.embeds, self.positions, self.cache)
            finally:
                current.wait_stream(stream)
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            try:
                # other threads, a data loader's for one, may use the device meanwhile
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    self.hidden = self.network(self.embeds, self.positions, self.cache)
            except BaseException:
                torch.cuda.set_stream(current)
                _end_capture(pool)
                raise
            self.graph = graph


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no graph has."""
    for place, stream in enumerate(_FREE_STREAMS):
        if stream.device == device:
            return _FREE_STREAMS.pop(place)
    return torch.cuda.Stream(device)


def _end_capture(pool: tuple[int, int]) -> None:
    """Let the allocator free memory again, where a capture broke off without telling it that it is over.

    If it was told, the first call raises, and the pool is the graph's to release: twice would end the process.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class CanvasGraphs:
    """Forward passes of a model by shape, those that were used last. In use they are taken out: whoever else decodes
    meanwhile, in another thread, has others.

    Args:
        language_model (`PdlmTextModel`)
    """

    def __init__(self, language_model):
        self.language_model = language_model
        self.passes: OrderedDict[tuple, FusedPasses] = OrderedDict()
        self._lock = Lock()  # of several threads that decode

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
        weights = self._weights()
        key = (weights, self._adapters(), like.dtype, like.device, torch.is_inference_mode_enabled(), *shape)
        with self._lock:
            for other in [known for known in self.passes if known[0] != weights]:  # they hold the weights of before
                del self.passes[other]
            found = self.passes.pop(key, None)
            if found is None:
                self._make_room(like.device)
        if found is not None and found.given_back is not None:
            torch.cuda.current_stream(like.device).wait_event(found.given_back)
        if found is None:
            found = FusedPasses(key, network, CanvasCache(self.language_model.config, like, *shape))
        return found

    def give_back(self, passes: FusedPasses) -> None:
        """Keep passes that are not in use any more, once the device has done them."""
        if passes.cache.layers[0].is_cuda:
            passes.given_back = torch.cuda.current_stream(passes.cache.layers[0].device).record_event()
        with self._lock:
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
        """What a captured graph reads: the addresses of the weights."""
        addresses = []
        for each in self.language_model.parameters():
            parts = [getattr(each, name, None) for name in ("qdata", "scale")]  # torchao's have no address themselves
            addresses += [part.data_ptr() for part in parts if isinstance(part, torch.Tensor)] or [each.data_ptr()]
        return hash(tuple(addresses))

    def _adapters(self) -> int:
        """What else a captured graph depends on: the active adapters and their scaling."""
        return hash(
            tuple(
                (
                    tuple(module.active_adapters),
                    module.disable_adapters,
                    tuple(module.merged_adapters),
                    tuple(sorted(getattr(module, "scaling", {}).items())),
                )
                for module in self.language_model.modules()
                if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")  # PEFT's tuner layers
            )
        )
