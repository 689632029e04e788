"""The denoising of all running requests inside vLLM's model runner: rows of a step, cache slots, and attention.

One engine request is one image with its regions (or one chat answer). vLLM schedules its prompt once and then its
canvas at every step, as it does for every diffusion model; the canvas is never accepted until it is finished.
"""

from math import ceil
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.lora.layers.utils import LoRAMapping
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from pdlm_hf.masking_pdlm import SHARED, region_layout

from .blocks import MAX_BLOCKS
from .config import block_room
from .layout import CanvasLayout
from .plan import make_plan, served_defaults
from .rows import Rows, StepBuffers
from .running import News, Running
from .sampler import DenoisingSampler


class PdlmModelState(ModelState):
    """vLLM's hooks around the forward pass, for PerceptionDLM."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = self.model_config.hf_config
        self.room = vllm_config.diffusion_config.canvas_length
        self.defaults, self.block_room = served_defaults(self.model_config), block_room(vllm_config)
        self.running: dict[int, Running] = {}
        self.index: dict[str, int] = {}
        self.news = News(behind=int(bool(vllm_config.scheduler_config.async_scheduling)))
        self.waiting: set[int] = set()  # requests that had to sit this step out
        self.rows: Rows | None = None
        self.blocks = max(1, self.config.num_region_prompts)  # sequences of a canvas, at most
        self.buffers: StepBuffers  # once there is a cache
        self.count = self.asked = 0  # rows of a step after padding, and those vLLM wants back
        self.embeddings: tuple | None = None
        self.sampler: DenoisingSampler  # once vLLM has asked for it

    # ------------------------------------------------------------ requests

    def get_supported_generation_tasks(self):
        """Captions and answers."""
        return ("generate",)

    def initialize_kv_cache(self, kv_cache_config, block_tables) -> None:
        """Allocate what every step reads."""
        pages = block_tables.input_block_tables[0].shape[1]
        self.buffers = StepBuffers(
            self.max_num_tokens,
            self.max_num_reqs * (max(self.blocks, MAX_BLOCKS) + 1),  # every block, and the prompt
            pages,
            block_tables.block_sizes[0],
            # vLLM's own, which it does not use for us, unless there are no images
            self.encoder_runner.inputs_embeds
            if self.supports_mm_inputs
            else self.dummy_inputs_embeds(self.max_num_tokens),
        )

    def get_additional_cg_support(self):
        """Which steps vLLM may replay as one CUDA graph.

        It chooses by the rows it has scheduled. A step over a prompt has more; steps of canvases that all have the
        served width have those (and no chat answer is as wide, see [`plan.chat_room`]).
        """
        if self.config.cuda_graphs:
            return AttentionCGSupport.UNIFORM_BATCH, "pdlm"
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
        plan = make_plan(
            self.config, self.defaults, prompt, params.extra_args, params.max_tokens, room, self.block_room
        )
        codes = torch.full((len(prompt),), SHARED)
        if plan.num_regions:
            ids = torch.tensor([prompt])
            codes = region_layout(ids, self.config.region_token_ids, self.config.caption_token_ids)[0]
        self.index[new_req_data.req_id] = req_index
        layout = plan.layout(codes, self.buffers.page)
        lora = new_req_data.lora_request.lora_int_id if new_req_data.lora_request else 0
        self.running[req_index] = Running(plan, layout, req_index, lora)
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
        buffers, rows = self.buffers, Rows()
        self.rows, self.waiting = rows, set()
        self.news.read()
        requests = [self.running.get(int(index)) for index in input_batch.idx_mapping_np[: input_batch.num_reqs]]
        dummy = for_capture or all(request is None for request in requests)
        starts = input_batch.query_start_loc_np
        logits = np.diff(input_batch.cu_num_logits_np)
        budget = self.max_num_tokens - int(starts[input_batch.num_reqs])
        for request, count in zip(requests, logits.tolist(), strict=False):
            if request is not None and not count:
                budget -= len(request.layout.copied)
        for i, request in enumerate(requests):
            here = np.arange(starts[i], starts[i + 1])
            if request is None:
                self._dummy(rows, i, here)
            elif not logits[i]:
                self._prompt(rows, request, i, here)
            else:
                # a graph has a fixed shape
                budget = self._canvas(rows, request, i, here, budget, cudagraph_mode != CUDAGraphMode.FULL)
        count, sequences = rows.count, len(rows.queries)
        if cudagraph_mode == CUDAGraphMode.FULL:
            count, sequences = input_batch.num_tokens_after_padding, input_batch.num_reqs_after_padding * self.blocks
        ends = buffers.place(rows, block_tables[0], count, sequences, self.sampler.hidden)
        if dummy:
            buffers.slots[:count] = slot_mappings[0, :count]
        self.asked = input_batch.num_tokens + count - rows.count
        if self.vllm_config.lora_config is not None and not dummy:
            self._adapt(rows, [request.lora if request else 0 for request in requests])
        self.count = count
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=sequences,
            num_tokens=count,
            query_start_loc_gpu=buffers.starts[: sequences + 1],
            query_start_loc_cpu=ends,
            max_query_len=self.room if cudagraph_mode == CUDAGraphMode.FULL else max(rows.queries),
            seq_lens=buffers.lengths[:sequences],
            max_seq_len=self.max_model_len,
            block_tables=(buffers.tables[:sequences],),
            slot_mappings=buffers.slots[None, :count],
            kv_cache_config=kv_cache_config,
            for_cudagraph_capture=for_capture,
            causal=False,
        )

    def _dummy(self, rows: Rows, i: int, here: np.ndarray) -> None:
        """A request of vLLM's own, for measuring and warming up."""
        place = np.arange(len(here))
        pages = np.arange(ceil(min(len(here), self.max_model_len) / self.buffers.page))
        rows.sequence(i, here, place, 0 * place, min(len(here), self.max_model_len), pages, place)

    def _prompt(self, rows: Rows, request: Running, i: int, here: np.ndarray) -> None:
        """The prompt, seeing itself; and its rows once more for each private area."""
        self._whole(rows, request.layout, i, here, len(here), np.arange(len(here)))

    def _whole(
        self, rows: Rows, layout: CanvasLayout, i: int, source: np.ndarray, keys: int, asked: np.ndarray
    ) -> None:
        """All rows of a prompt and those its private areas repeat."""
        place = np.arange(len(source))
        rows.sequence(
            i,
            np.concatenate([source, source[layout.copied]]),
            np.concatenate([place, layout.copied]),
            np.concatenate([place, layout.copies]),
            keys,
            np.arange(layout.natural_pages),
            asked,
        )

    def _canvas(self, rows: Rows, request: Running, i: int, here: np.ndarray, budget: int, leaving: bool) -> int:
        """The canvas; and before it the prompt, where this step computes it again. Returns the rows left.

        With `leaving`, rows that cannot change a caption any more are left out.
        """
        plan, layout, prompt = request.plan, request.layout, request.layout.prompt_length
        place = prompt + plan.offsets
        embedded = request.prompt if plan.whole(request.step) else None
        if embedded is not None:
            more = prompt + len(layout.copied) + (plan.seen if plan.blocks > 1 else 0)
            if more > budget and rows.kept:
                self.waiting.add(i)  # there is no room for its prompt in this step
                embedded = None
            else:
                budget -= more
                self._whole(rows, layout, i, rows.keep(embedded), prompt + plan.seen, np.arange(0))
        alone = not plan.refreshes(request.step)
        leaving = leaving and alone and bool(request.open.any())
        for k, (first, stop) in enumerate(layout.bounds):
            needed = request.rows_needed(k) if leaving else np.ones(stop - first, dtype=bool)
            if not needed.any():
                rows.leave_out(stop - first)
                continue
            block = np.arange(first, stop)[needed]
            parts = [(here[block], place[block], layout.canvas[block])]
            if embedded is not None and len(layout.copied) and stop <= plan.seen:
                # once more for the natural area, where prompt rows see it
                parts.append((here[block], place[block], prompt + block))
            source, positions, addresses = (np.concatenate(part) for part in zip(*parts, strict=True))
            asked = np.where(needed, needed.cumsum() - 1, 0)
            hides = request.place * self.blocks + k if plan.trim and alone else -1
            rows.sequence(i, source, positions, addresses, layout.lengths[k], layout.pages[k], asked, hides)
        return budget

    def _adapt(self, rows: Rows, adapters: list[int]) -> None:
        """Tell the LoRA layers whose the rows are: vLLM has told them about those it scheduled."""
        adapter = np.asarray(adapters)
        every = adapter[np.repeat(rows.owners, rows.queries)]
        mapping = LoRAMapping(tuple(every.tolist()), tuple(adapters), is_prefill=True)
        self.model.lora_manager.set_adapter_mapping(mapping)

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
        self.buffers.embed(embeds, rows.prompts)
        return self.buffers.inputs(self.count, self.asked)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Inputs of a dummy run, from which a graph is captured."""
        return self.buffers.inputs(num_tokens, num_tokens)

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor:
        """Embeddings of a dummy run."""
        return torch.zeros(num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=self.device)
