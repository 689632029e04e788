"""A stand-in for CUDA graphs on a CPU: a step is computed from what the first step of its shape was given.

A captured graph runs with the addresses of its capture and with the numbers that lie there now. Here the model is
called with the tensors and the attention metadata of the first step with as many rows and sequences; a step that hands
over anything new would be computed with old numbers. The back end's own schedule of a step is no input of ours.
"""

from dataclasses import replace

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context


class Replay:
    """Takes the places of a runner's model, and of its model state's `prepare_attn` and `prepare_inputs`.

    Args:
        runner (`GPUModelRunner`): in this process.
    """

    def __init__(self, runner):
        self.runner, self.state, self.model = runner, runner.model_state, runner.model
        self.captured: dict[tuple, tuple] = {}
        self.replayed = self.padded = 0
        self.addresses: set[tuple[int, ...]] = set()
        self.prepare_attn, self.prepare_inputs = self.state.prepare_attn, self.state.prepare_inputs
        self.state.prepare_attn, self.state.prepare_inputs = self._attention, self._inputs
        runner.model = self
        self.batch, self.rows = None, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def _attention(self, batch, mode, tables, slot_mappings, *rest, **options):
        """Canvases that all have the served width are padded to the next power of two, as vLLM pads for a graph."""
        logits = batch.cu_num_logits_np[1:] - batch.cu_num_logits_np[:-1]
        width = self.state.room
        if (logits[: batch.num_reqs] == width).all():
            requests = 1 << (batch.num_reqs - 1).bit_length()
            batch = replace(batch, num_reqs_after_padding=requests, num_tokens_after_padding=requests * width)
            mode = CUDAGraphMode.FULL
            self.padded += requests > batch.num_reqs
        found = self.prepare_attn(batch, mode, tables, slot_mappings, *rest, **options)
        self.batch, self.rows = batch, batch.num_tokens if mode == CUDAGraphMode.FULL else self.state.count
        return found

    def _inputs(self, batch, requests):
        found = self.prepare_inputs(self.batch, requests)
        self.state.buffers.embeds[self.rows :] = torch.nan  # what a padding row holds must not matter
        return found

    def __call__(self, **inputs):
        context = get_forward_context()
        metadata = context.attn_metadata
        if metadata is None:
            return self.model(**inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        first = next(iter(metadata.values()))
        read = [*tensors.values(), first.query_start_loc, first.seq_lens, first.block_table, first.slot_mapping]
        key = tuple(tuple(tensor.shape) for tensor in read)
        self.addresses.add(tuple(tensor.data_ptr() for tensor in read))
        if key in self.captured:
            inputs, old = self.captured[key]
            for name, one in old.items():
                one.scheduler_metadata = metadata[name].scheduler_metadata
                one.max_query_len = metadata[name].max_query_len
            context.attn_metadata = old
            self.replayed += 1
        else:
            self.captured[key] = (inputs, metadata)
        return self.model(**inputs)
