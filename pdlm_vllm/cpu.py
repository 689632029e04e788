"""vLLM's model runner V2 on a CPU: torch in place of the few Triton kernels a diffusion request launches.

For tests and trials on a machine without a GPU; not imported on a GPU. PyPI has no
Triton back end for CPUs, and vLLM refuses the V2 runner without Triton.
"""

import os
from functools import cache
from typing import Any

import torch


def allow_model_runner() -> None:
    """Choose the V2 runner, the only one with diffusion models, and let it start without Triton."""
    import vllm.config.vllm

    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        vllm.config.vllm.HAS_TRITON = True


def apply_write(self) -> None:
    """`StagedWriteTensor.apply_write`."""
    start = 0
    for row, first, end in zip(
        self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens, strict=True
    ):
        values = torch.tensor(self._staged_write_contents[start:end], dtype=self.dtype)
        if self.gpu.dim() > 1:
            self.gpu[row, first : first + end - start] = values
        else:
            self.gpu[row : row + end - start] = values
        start = end
    self.clear_staged_writes()


def gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None):
    """`BlockTables.gather_block_tables`."""
    tables = tuple(self.input_block_tables) if out is None else out
    for group, table in enumerate(tables):
        table[:num_reqs_padded].zero_()
        for i, row in enumerate(idx_mapping.tolist()):
            count = int(self.num_blocks.np[group, row])
            table[i, :count] = self.block_tables[group].gpu[row, :count]
    return tuple(table[:num_reqs_padded] for table in tables)


def compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out=None):
    """`BlockTables.compute_slot_mappings`."""
    mappings = self.slot_mappings if out is None else out
    mappings.fill_(-1)
    bounds = query_start_loc.tolist()
    for group, size in enumerate(self.block_sizes):
        for i, row in enumerate(idx_mapping.tolist()):
            part = positions[bounds[i] : bounds[i + 1]]
            pages = self.block_tables[group].gpu[row][part // size].long()
            mappings[group, bounds[i] : bounds[i + 1]] = pages * size + part % size
    return mappings[:, :num_tokens_padded]


def prepare_prefill_inputs(
    input_ids, next_prefill_tokens, idx_mapping, query_start_loc, all_token_ids, prefill_len, num_computed_tokens
):
    """Prompt tokens into the input buffer."""
    bounds = query_start_loc.tolist()
    for i, row in enumerate(idx_mapping.tolist()):
        done = int(num_computed_tokens[row])
        if done < int(prefill_len[row]):
            count = bounds[i + 1] - bounds[i]
            input_ids[bounds[i] : bounds[i + 1]] = all_token_ids[row, done : done + count]


def prepare_pos_seq_lens(idx_mapping, query_start_loc, num_computed_tokens, pos, seq_lens):
    """Positions and lengths of the scheduled rows."""
    bounds = query_start_loc.tolist()
    seq_lens[len(idx_mapping) :] = 0
    for i, row in enumerate(idx_mapping.tolist()):
        done, count = int(num_computed_tokens[row]), bounds[i + 1] - bounds[i]
        seq_lens[i] = done + count
        pos[bounds[i] : bounds[i + 1]] = torch.arange(done, done + count)


def combine_sampled_and_draft_tokens(
    input_ids,
    idx_mapping,
    last_sampled_tokens,
    query_start_loc,
    seq_lens,
    prefill_len,
    draft_tokens,
    cu_num_logits,
    num_logits,
    num_new_sampled_tokens=1,
):
    """Canvas tokens into the input buffer; rows whose logits are wanted."""
    rows = torch.empty(num_logits, dtype=torch.int64)
    ends, bounds = query_start_loc.tolist(), cu_num_logits.tolist()
    for i, request in enumerate(idx_mapping.tolist()):
        first, last = bounds[i], bounds[i + 1]
        count, end = last - first, ends[i + 1]
        rows[first:last] = torch.arange(end - count, end)
        if int(seq_lens[i]) <= int(prefill_len[request]):
            continue
        if num_new_sampled_tokens and int(seq_lens[i]) - count >= int(prefill_len[request]):
            input_ids[end - count] = last_sampled_tokens[request].reshape(-1)[0]
        drafts = count - num_new_sampled_tokens
        if drafts > 0:
            input_ids[end - drafts : end] = draft_tokens[request, :drafts]
    return rows


def post_update(
    idx_mapping,
    num_computed_tokens,
    last_sampled_tokens,
    output_bin_counts,
    sampled_tokens,
    num_sampled,
    num_rejected,
    query_start_loc,
    all_token_ids,
    total_len,
):
    """Record the tokens that a step has produced."""
    ends = None if query_start_loc is None else query_start_loc.tolist()
    for i, row in enumerate(idx_mapping.tolist()):
        if row < 0:
            continue
        count = int(num_sampled[i])
        if count > 0:
            start = int(total_len[row])
            all_token_ids[row, start : start + count] = sampled_tokens[i, :count]
            last_sampled_tokens[row] = sampled_tokens[i, count - 1]
            total_len[row] = start + count
        scheduled = 0 if ends is None else ends[i + 1] - ends[i]
        num_computed_tokens[row] += scheduled - int(num_rejected[i])


def expand_idx_mapping(idx_mapping, total_num_logits, cu_num_logits, max_expand_len):
    """Request of every logits row, and its place there."""
    counts = (cu_num_logits[1:] - cu_num_logits[:-1]).tolist()
    places = [torch.arange(count, dtype=torch.int32) for count in counts]
    return (
        idx_mapping.repeat_interleave(torch.tensor(counts)),
        torch.cat(places) if places else torch.empty(0, dtype=torch.int32),
    )


def _mend_adapters() -> None:
    """A row without an adapter, number -1, gets none; vLLM's torch operations give it that of the last slot."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs, weights, output, indices, scaling=1.0):
        shrink(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def install() -> None:
    """Put the functions above in the places of the kernels, if Triton cannot run here."""
    from vllm.triton_utils import HAS_TRITON

    _mend_adapters()
    if HAS_TRITON:
        return
    from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch, model_runner

    buffer_utils.StagedWriteTensor.apply_write = apply_write
    block_table.BlockTables.gather_block_tables = gather_block_tables
    block_table.BlockTables.compute_slot_mappings = compute_slot_mappings
    for function in (
        prepare_prefill_inputs,
        prepare_pos_seq_lens,
        combine_sampled_and_draft_tokens,
        post_update,
        expand_idx_mapping,
    ):
        for module in (input_batch, model_runner):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


@cache
def _worker() -> type:
    from vllm.v1.worker.cpu_worker import CPUWorker

    install()
    return type("PdlmCPUWorker", (CPUWorker,), {"__doc__": "vLLM's CPU worker, after the kernels were replaced."})


def __getattr__(name: str) -> Any:
    # vLLM names the worker class by its path; until then nothing of its workers is imported
    if name == "PdlmCPUWorker":
        return _worker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
