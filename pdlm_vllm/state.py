"""The denoising of all running requests inside vLLM's model runner: rows of a step, cache slots, and attention.

One engine request is one image with its regions (or one chat answer). vLLM schedules its prompt once and then its
canvas at every step, as it does for every diffusion model; the canvas is never accepted until it is finished.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from pdlm_hf.masking_pdlm import SHARED, region_layout

from .layout import CanvasLayout, slots
from .plan import Plan, defaults_of, make_plan
from .sampler import DenoisingSampler


@dataclass
class Running:
    """One request in flight.

    Args:
        plan (`Plan`), layout (`CanvasLayout`)
        step (`int`): denoising steps done.
        prompt (`torch.FloatTensor`, *optional*): embedded prompt, where steps compute it again.
    """

    plan: Plan
    layout: CanvasLayout
    step: int = 0
    prompt: torch.Tensor | None = None


@dataclass
class Rows:
    """Rows of one forward pass, put together request by request.

    Args:
        queries, lengths: rows and keys of each virtual sequence; tables: its pages.
        slot_mapping: where the keys of every row go.
        source: for every row the scheduled row it repeats, or -1 - n for row n of the embedded prompts.
        scheduled: for every scheduled row where it is.
    """

    queries: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: list[torch.Tensor] = field(default_factory=list)
    slot_mapping: list[torch.Tensor] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    scheduled: list[np.ndarray] = field(default_factory=list)
    prompts: list[torch.Tensor] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    count: int = 0
    kept: int = 0

    def sequence(self, rows: np.ndarray, position: np.ndarray, keys: int, table: torch.Tensor) -> None:
        """Rows that see the same keys."""
        self.queries.append(len(rows))
        self.lengths.append(keys)
        self.tables.append(table)
        self.source.append(rows)
        self.positions.append(position)
        self.count += len(rows)


class PdlmModelState(ModelState):
    """vLLM's hooks around the forward pass, for PerceptionDLM."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = self.model_config.hf_config
        self.room = vllm_config.diffusion_config.canvas_length
        self.defaults = defaults_of(self.model_config.model, self.model_config.revision)
        self.running: dict[int, Running] = {}
        self.index: dict[str, int] = {}
        self.waiting: set[int] = set()  # requests that had to sit this step out
        self.rows: Rows | None = None
        self.page = 0
        self.embeddings: tuple | None = None
        self.sampler: DenoisingSampler  # once vLLM has asked for it

    # ------------------------------------------------------------ requests

    def get_supported_generation_tasks(self):
        """Captions and answers."""
        return ("generate",)

    def initialize_kv_cache(self, kv_cache_config, block_tables) -> None:
        """Remember the page size."""
        self.page = block_tables.block_sizes[0]

    def get_additional_cg_support(self):
        """No full CUDA graphs: a step has more sequences than requests."""
        return AttentionCGSupport.NEVER, "pdlm"

    def custom_sampler(self, sampler):
        """Ours instead of vLLM's."""
        self.sampler = DenoisingSampler(sampler, self)
        return self.sampler, None

    def add_request(self, req_index: int, new_req_data) -> None:
        """A request enters, or comes back after preemption: it starts from an empty canvas."""
        params = new_req_data.sampling_params
        if params is None or "diffusion_max_steps" not in (params.extra_args or {}):
            return  # vLLM's warm-up, which has not been through our scheduler
        prompt = new_req_data.prompt_token_ids
        room = min(self.room, self.max_model_len - len(prompt))
        plan = make_plan(self.config, self.defaults, prompt, params.extra_args, params.max_tokens, room)
        codes = torch.full((len(prompt),), SHARED)
        if plan.num_regions:
            ids = torch.tensor([prompt])
            codes = region_layout(ids, self.config.region_token_ids, self.config.caption_token_ids)[0]
        self.index[new_req_data.req_id] = req_index
        layout = CanvasLayout(codes, plan.blocks, plan.rows, self.page).to(self.device)
        self.running[req_index] = Running(plan, layout)
        self.sampler.begin(req_index, plan)

    def remove_request(self, req_id: str) -> None:
        """A request has left."""
        index = self.index.pop(req_id, None)
        if index is not None:
            self.running.pop(index, None)

    # ------------------------------------------------------------ a step

    def prepare_attn(
        self,
        input_batch,
        cudagraph_mode,
        block_tables,
        slot_mappings,
        attn_groups,
        kv_cache_config,
        for_capture=False,
        ubatch_idx=0,
    ) -> dict[str, Any]:
        """Attention metadata of a step, one sequence for everything that sees the same keys."""
        table = block_tables[0]
        rows = self.rows = Rows()
        self.waiting = set()
        starts = input_batch.query_start_loc_np
        logits = np.diff(input_batch.cu_num_logits_np)
        budget = self.max_num_tokens - int(starts[input_batch.num_reqs])
        for index, count in zip(input_batch.idx_mapping_np.tolist(), logits.tolist(), strict=False):
            if not count and index in self.running:
                budget -= self.running[index].layout.copied.numel()
        for i in range(input_batch.num_reqs):
            first, last = int(starts[i]), int(starts[i + 1])
            request = self.running.get(int(input_batch.idx_mapping_np[i]))
            if request is None or not self.page:  # a dummy run
                rows.scheduled.append(np.arange(rows.count, rows.count + last - first))
                rows.slot_mapping.append(slot_mappings[0, first:last])
                done = int(input_batch.num_computed_tokens_np[i])
                keys = min(last - first, self.max_model_len)
                rows.sequence(np.arange(first, last), np.arange(done, done + last - first), keys, table[i])
            elif not logits[i]:
                self._prompt(rows, request, first, last, table[i])
            else:
                budget = self._canvas(rows, request, i, first, last, table[i], budget)
        self.slot_mapping = torch.cat(rows.slot_mapping)
        tables = torch.zeros(len(rows.tables), table.shape[1], dtype=table.dtype, device=table.device)
        for row, pages in zip(tables, rows.tables, strict=True):
            row[: len(pages)] = pages
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(rows.queries)]).astype(np.int32))
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=len(rows.queries),
            num_tokens=rows.count,
            query_start_loc_gpu=ends.to(self.device, non_blocking=True),
            query_start_loc_cpu=ends,
            max_query_len=max(rows.queries),
            seq_lens=torch.tensor(rows.lengths, dtype=torch.int32).to(self.device, non_blocking=True),
            max_seq_len=self.max_model_len,
            block_tables=(tables,),
            slot_mappings=self.slot_mapping[None],
            kv_cache_config=kv_cache_config,
            causal=False,
        )

    def _slots(self, addresses: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return slots(addresses.to(self.device, non_blocking=True), table, self.page)

    def _prompt(self, rows: Rows, request: Running, first: int, last: int, table: torch.Tensor) -> None:
        """The prompt, seeing itself; and its rows once more for each private area."""
        layout = request.layout
        here, place = np.arange(first, last), np.arange(last - first)
        rows.scheduled.append(rows.count + place)
        rows.slot_mapping.append(self._slots(torch.from_numpy(place), table))
        rows.sequence(here, place, len(here), table)
        self._copies(rows, layout, here, len(here), table)

    def _copies(self, rows: Rows, layout: CanvasLayout, source: np.ndarray, keys: int, table: torch.Tensor) -> None:
        for copied, addresses in zip(layout.copied, layout.copies, strict=True):
            if len(copied):
                rows.slot_mapping.append(self._slots(addresses, table))
                rows.sequence(source[copied.numpy()], copied.numpy(), keys, table)

    def _canvas(self, rows: Rows, request: Running, i: int, first: int, last: int, table, budget: int) -> int:
        """The canvas; and before it the prompt, where this step computes it again. Returns the rows left."""
        plan, layout, prompt = request.plan, request.layout, request.layout.prompt_length
        here, place = np.arange(first, last), np.arange(prompt, prompt + last - first)
        embedded = request.prompt if plan.whole(request.step) else None
        if embedded is not None:
            more = prompt + layout.copied.numel() + (len(here) if plan.blocks > 1 else 0)
            if more > budget and rows.kept:
                self.waiting.add(i)  # there is no room for its prompt in this step
                embedded = None
            else:
                budget -= more
        if embedded is not None:
            kept = -1 - np.arange(rows.kept, rows.kept + prompt)
            rows.prompts.append(embedded)
            rows.kept += prompt
            rows.slot_mapping.append(self._slots(torch.arange(prompt), table))
            rows.sequence(kept, np.arange(prompt), prompt + len(here), table)
            self._copies(rows, layout, kept, prompt + len(here), table)
        private = self._slots(layout.canvas, table)
        pages = table[layout.pages]
        natural = None
        if embedded is not None and plan.blocks > 1:
            natural = self._slots(torch.from_numpy(place), table)
        for k in range(plan.blocks):
            block = slice(k * plan.rows, (k + 1) * plan.rows)
            rows.scheduled.append(np.arange(rows.count, rows.count + plan.rows))
            rows.slot_mapping.append(private[block])
            if natural is None:
                rows.sequence(here[block], place[block], layout.length, pages[k])
            else:  # once more for the natural area, where prompt rows see it
                rows.slot_mapping.append(natural[block])
                both = np.concatenate([here[block], here[block]])
                rows.sequence(both, np.concatenate([place[block], place[block]]), layout.length, pages[k])
        return budget

    def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
        """Run the vision tower for new images; the embeddings are merged in [`prepare_inputs`]."""
        if self.supports_mm_inputs:
            self.execute_mm_encoder(scheduled_encoder_inputs)
            found, places = self.gather_mm_embeddings(input_batch)
            self.embeddings = (found, places) if found else None
        return None

    def prepare_inputs(self, input_batch, req_states) -> dict[str, Any]:
        """Embeddings and positions of all rows of a step."""
        count = input_batch.num_tokens
        found, places = self.embeddings or (None, None)
        self.embeddings = None
        embeds = self.model.embed_input_ids(input_batch.input_ids[:count], found, is_multimodal=places)
        rows, self.rows = self.rows, None
        if rows is None:  # a dummy run without attention
            return {"input_ids": None, "inputs_embeds": embeds}
        starts, logits = input_batch.query_start_loc_np, np.diff(input_batch.cu_num_logits_np)
        for i in range(input_batch.num_reqs):
            request = self.running.get(int(input_batch.idx_mapping_np[i]))
            if request is not None and not logits[i] and request.plan.joint:
                request.prompt = embeds[int(starts[i]) : int(starts[i + 1])].clone()
        order = np.concatenate(rows.source)
        order = np.where(order < 0, count - 1 - order, order)
        source = torch.from_numpy(order).to(self.device, non_blocking=True)
        positions = torch.from_numpy(np.concatenate(rows.positions)).to(self.device, non_blocking=True)
        return {
            "input_ids": None,
            "inputs_embeds": torch.cat([embeds, *rows.prompts])[source],
            "positions": positions,
            "slot_mapping": self.slot_mapping,
            "scheduled": torch.from_numpy(np.concatenate(rows.scheduled)).to(self.device, non_blocking=True),
        }

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Inputs of a dummy run."""
        return {}

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor | None:
        """Embeddings of a dummy run."""
        return torch.zeros(num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=self.device)
