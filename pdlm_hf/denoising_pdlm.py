"""Denoising of regions: all captions of a picture together.

A row is one pass over one picture. Its sequence is prompt + canvas, the canvas being all its caption blocks. Prompts
stand left-padded in the first columns and canvases behind them, so that the keys and values of all prompts can be kept
while only the canvases run through the model (`prefix_refresh_interval`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.masking_utils import create_bidirectional_mask

from .diffusion_pdlm import (
    accept_bounded,
    accept_confident,
    gumbel_perturb,
    lowest_mask,
    masks_left,
    token_entropy,
    token_log_odds,
)
from .graphs_pdlm import WIDTH_MULTIPLE, CanvasGraph, CanvasGraphs, graphs_usable
from .masking_pdlm import region_attention
from .split_attention_pdlm import NAME as REGION_SPLIT
from .split_attention_pdlm import SplitCache, split_pass

# Slots x vocabulary scored at a time: bounds the float32 logits to 256 MB.
_MAX_LOGITS = 2**26


@dataclass
class DenoisingStep:
    """One step. With regions all tensors are `(batch_size, num_regions, max_new_tokens)` in input order, in chat
    `(batch_size, max_new_tokens)`.

    Args:
        tokens: before the step, the mask token where a slot is open; -1 where there is no region.
        masked: slots open before the step.
        draft: the token the model would put there; -1 where none was computed.
        probability: of the draft.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    draft: torch.Tensor
    probability: torch.Tensor


class RandomRows:
    """Random numbers, one generator a row and the same seed for each: a row draws what it would draw alone.

    Args:
        rows (`int`): rows of the batch.
        seed (`int`, *optional*): default: a new one.
        device (`torch.device`)
    """

    def __init__(self, rows: int, seed: int | None, device: torch.device):
        seed = torch.seed() if seed is None else seed
        self.generators = [torch.Generator(device).manual_seed(seed % 2**63) for _ in range(rows)]
        self.device = device

    def uniform(self, rows: list[int], counts: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers in (0, 1) of shape `(len(rows), *shape)`; row i draws for its first `counts[i]` entries only."""
        out = torch.full((len(rows), *shape), 0.5, device=self.device)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            out[i, :count] = torch.rand((count, *shape[1:]), generator=self.generators[row], device=self.device)
        return out.clamp_(1e-20, 1 - 1e-7)


class PrefixCache(DynamicCache):
    """Keys and values of the prompts, kept while canvases come and go.

    The first pass fills it with prompt and canvas. Once frozen at the prompts' width, a canvas is written behind them
    in place of the last one, and nothing of the prompts is copied.
    """

    prefix_length: int | None = None

    def freeze(self, prefix_length: int) -> None:
        """Keep the first `prefix_length` columns from now on."""
        self.prefix_length = prefix_length

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        for layer in self.layers:
            layer.keys, layer.values = (states[rows.to(states.device)] for states in (layer.keys, layer.values))

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keys and values of prompts and canvas."""
        if self.prefix_length is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        end = self.prefix_length + key_states.shape[-2]
        layer.keys[:, :, self.prefix_length : end] = key_states
        layer.values[:, :, self.prefix_length : end] = value_states
        return layer.keys[:, :, :end], layer.values[:, :, :end]

    def get_seq_length(self, *args, **kwargs) -> int:
        """Width of the prompts, once frozen."""
        return super().get_seq_length(*args, **kwargs) if self.prefix_length is None else self.prefix_length

    def get_mask_sizes(self, query_length, *args, **kwargs) -> tuple[int, int]:
        """Keys a query of this length sees, and their offset."""
        return self.get_seq_length() + int(query_length), 0


class GenerationTask:
    """One call of `generate`: its settings, the prompts, and what it has cost so far.

    Args:
        model (`PdlmForConditionalGeneration`)
        settings (`PdlmGenerationConfig`): checked.
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, prompt_length)`)
        streamer, tokenizer: see `generate`.
    """

    def __init__(self, model, settings, input_ids, attention_mask, streamer=None, tokenizer=None):
        self.model, self.config, self.settings = model, model.config, settings
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.streamer, self._tokenizer = streamer, tokenizer
        self.device = input_ids.device
        self.temperature = settings.temperature or 0.0
        self.random_remasking = settings.remasking == "random"
        self.random = None
        if self.temperature > 0 or self.random_remasking:
            self.random = RandomRows(len(input_ids), settings.seed, self.device)
        self.history: list[DenoisingStep] | None = [] if settings.output_history else None
        self.num_forwards = 0

    def token_ids(self, text: str | list[int]) -> list[int]:
        """Ids of a stop string or suffix. Raises: ValueError if there is no tokenizer to be found."""
        if not isinstance(text, str):
            return list(text)
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)
            except (OSError, ValueError) as error:
                raise ValueError(
                    "`stop_strings` and `generation_suffix` need a tokenizer: pass `tokenizer=processor.tokenizer`."
                ) from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def stop_ids(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return [self.token_ids(stop) for stop in as_list(self.settings.stop_strings)]

    def score(
        self,
        hidden: torch.Tensor,
        rows: list[int],
        counts: list[int],
        banned: list[int] | None = None,
        unconditional: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draft token, log odds of its probability and entropy of every slot; logits exist a few rows at a time.

        Args:
            hidden (`torch.FloatTensor` of shape `(rows, slots, hidden_size)`)
            rows (`list[int]`): their numbers in the batch, for their random numbers.
            counts (`list[int]`): slots that each row really has.
            banned (`list[int]`, *optional*): tokens never to be drafted; they get no probability either.
            unconditional (`torch.FloatTensor`, *optional*): hidden states without the prompt, for guidance.

        Returns:
            tokens `(rows, slots)`, log odds and entropies (None unless `entropy_bound` is set), float32.
        """
        head, guidance = self.model.lm_head, self.settings.guidance_scale
        at_once = max(1, _MAX_LOGITS // (hidden.shape[1] * self.config.text_config.vocab_size))
        tokens, odds, entropies = [], [], []
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            logits = head(hidden[part]).float()
            if unconditional is not None:
                base = head(unconditional[part]).float()
                logits = base + guidance * (logits - base)
            if banned:
                logits[..., banned] = -torch.inf
            noisy = logits
            if self.temperature > 0:
                uniform = self.random.uniform(rows[part], counts[part], logits.shape[1:])
                noisy = gumbel_perturb(logits, self.temperature, uniform)
            tokens.append(noisy.argmax(-1))
            if self.settings.entropy_bound is not None:
                entropies.append(token_entropy(logits))
            odds.append(token_log_odds(logits, tokens[-1]))
        # the head may be on another device than the inputs
        found = (torch.cat(tokens), torch.cat(odds), torch.cat(entropies) if entropies else None)
        return tuple(None if values is None else values.to(self.device) for values in found)

    def ranking(self, log_odds: torch.Tensor, rows: list[int], counts: list[int]) -> torch.Tensor:
        """What ranks the drafts `(rows, slots)`: their log odds, or noise for random remasking."""
        if not self.random_remasking:
            return log_odds
        return torch.special.logit(self.random.uniform(rows, counts, log_odds.shape[1:]))

    def stream(self, tokens: torch.Tensor, final: bool = False) -> None:
        """Hand a draft, or the result, to the streamer."""
        if self.streamer is None:
            return
        if final:
            self.streamer.put(tokens.cpu())
            self.streamer.end()
        elif hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens.cpu())


def left_pad(rows: list[torch.Tensor], fill: Any) -> torch.Tensor:
    """Tensors of different lengths as one batch, padded on the left."""
    length = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        out[i, length - len(row) :] = row
    return out


@dataclass
class _View:
    """The blocks that take part in a pass: of some rows, some regions, packed to the left.

    Args:
        rows: numbers of the rows, `(R,)`.
        blocks: region in each place, `(R, K)`.
        present: places that hold a region, `(R, K)`.
        row_of, region_of, place: the same as indices, for each present block: its row and region in the batch, and its
            place in `(R * K,)`.
        counts: slots of each row, in Python.
        positions: of the canvas rows in their sequences, `(R, K * block length)`.
        masks: attention mask of a pass over prompts and canvas (True) and over the canvas alone (False), once built.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    present: torch.Tensor
    row_of: torch.Tensor
    region_of: torch.Tensor
    place: torch.Tensor
    counts: list[int]
    positions: torch.Tensor | None = None
    masks: dict[bool, Any] = field(default_factory=dict)


class RegionCanvas:
    """All caption blocks of a batch, and the passes through the model that fill them.

    Args:
        task (`GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`): embedded prompts.
        counts (`list[int]`): regions of every row.
        num_slots (`int`): tokens to write per caption.
    """

    def __init__(self, task: GenerationTask, prompt: torch.Tensor, counts: list[int], num_slots: int):
        self.task, self.model, self.counts, self.num_slots = task, task.model, counts, num_slots
        config, device = task.config, task.device
        self.mask_id, self.end = config.mask_token_id, config.eot_token_id
        real = task.attention_mask
        self.prompt_ids = left_pad([ids[keep] for ids, keep in zip(task.input_ids, real, strict=True)], self.end)
        self.prompt = left_pad([row[keep] for row, keep in zip(prompt, real, strict=True)], 0)
        self.lengths = real.sum(1)
        width = self.prompt.shape[1]
        self.prompt_mask = torch.arange(width, device=device) >= width - self.lengths[:, None]

        rows, most = len(counts), max(counts)
        region = torch.arange(most, device=device)
        self.exists = region < torch.tensor(counts, device=device)[:, None]  # (rows, regions)
        self.tokens = torch.full((rows, most, num_slots), self.mask_id, device=device)
        self.masked = self.exists[..., None].expand(-1, -1, num_slots).clone()
        self.written = torch.full(self.tokens.shape, -torch.inf, device=device)  # log odds when it was written
        self.steps = torch.zeros(self.exists.shape, dtype=torch.long, device=device)

        self.opening = torch.tensor(config.caption_token_ids, device=device)[:most].expand(rows, -1)
        last = region == torch.tensor(counts, device=device)[:, None] - 1
        self.closing = torch.where(last, self.end, config.newline_token_id)
        ids = torch.cat([self.prompt_ids, self.blocks(self.tokens).flatten(1)], 1)
        layout = self.model.model.region_layout(ids)
        self.prompt_layout = layout[:, :width]
        self.block_layout = layout[:, width:].view(rows, most, num_slots + 2)
        self.cache: PrefixCache | SplitCache | None = None
        self.cached_rows: torch.Tensor | None = None
        self.shown: _View | None = None  # the view that a split cache has room for
        self.graphs: CanvasGraphs | None = None
        self.graph: CanvasGraph | None = None

    def blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        """Caption token, slots and closing newline (or end of turn) of every region, `(rows, regions, slots + 2)`."""
        return torch.cat([self.opening[..., None], tokens, self.closing[..., None]], -1)

    def view(self, active: torch.Tensor) -> _View:
        """The blocks where `active` `(rows, regions)` is true."""
        rows = active.any(1).nonzero()[:, 0]
        active = active[rows]
        counts = active.sum(1)
        most = int(counts.max())
        blocks = (~active).int().argsort(dim=1, stable=True)[:, :most]
        present = torch.arange(most, device=active.device) < counts[:, None]
        place = present.flatten().nonzero()[:, 0]
        row_of, column = place // most, place % most
        view = _View(
            rows, blocks, present, rows[row_of], blocks[row_of, column], place, (counts * self.num_slots).tolist()
        )
        offset = torch.arange(self.num_slots + 2, device=active.device)
        positions = self.lengths[rows, None, None] + blocks[..., None] * (self.num_slots + 2) + offset
        view.positions = positions.flatten(1)
        return view

    def forward(self, view: _View, whole: bool, keep: bool = False) -> torch.Tensor:
        """One pass; hidden states of the slots, `(R, K, num_slots, hidden_size)`.

        Args:
            view (`_View`): blocks that take part.
            whole (`bool`): prompts and canvas; else the canvas alone, on the cached prompts.
            keep (`bool`): with `whole`: keep the prompts' keys and values.
        """
        self.task.num_forwards += 1
        rows, size = view.rows, self.num_slots + 2
        shown = torch.where(self.masked, self.mask_id, self.tokens)
        ids = self.blocks(shown)[rows[:, None], view.blocks].flatten(1)
        embeds = self.model.get_input_embeddings()(ids).to(self.prompt.dtype)
        positions, cache = view.positions, None
        if whole:
            prompt_positions = (self.prompt_mask[rows].cumsum(1) - 1).clamp_min(0)
            embeds = torch.cat([self.prompt[rows], embeds], 1)
            positions = torch.cat([prompt_positions, positions], 1)
            cache = PrefixCache() if keep else None
        else:
            cache = self._cache_of(rows)
        if isinstance(cache, SplitCache):
            hidden = self._split_pass(view, embeds, positions, cache)
            return hidden.view(*view.blocks.shape, size, -1)[:, :, 1:-1]
        if whole not in view.masks:
            view.masks[whole] = self._mask(view, embeds, cache, size)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=view.masks[whole],
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        if whole and keep:
            self._keep(cache, rows)
        if whole:
            hidden = hidden[:, self.prompt.shape[1] :]
        return hidden.view(*view.blocks.shape, size, -1)[:, :, 1:-1]

    def _keep(self, cache: PrefixCache, rows: torch.Tensor) -> None:
        """Keep the prompts' keys and values of a pass over prompts and canvas."""
        width = self.prompt.shape[1]
        self.cached_rows, self.shown = rows, None
        if self.model.config.text_config._attn_implementation != REGION_SPLIT:
            cache.freeze(width)
            self.cache = cache
            return
        self.cache = SplitCache(
            [(layer.keys, layer.values) for layer in cache.layers],
            self.prompt_layout[rows],
            self.prompt_mask[rows],
            self.exists.shape[1],
            self.model.config.num_roi_tokens,
            self.num_slots + 2,
            1 if self.graphs is None else WIDTH_MULTIPLE,
        )

    def _split_pass(self, view: _View, embeds: torch.Tensor, positions: torch.Tensor, cache: SplitCache):
        """A canvas pass without a mask; replayed from a CUDA graph where there is one."""
        if view is not self.shown:
            cache.show(view.blocks)
            self.shown = view
            if self.graphs is not None:
                self.graph = self.graphs.load(embeds, positions, cache)
        if self.graph is not None:
            return self.graph(embeds, positions)
        return split_pass(self.model.model.language_model, embeds, positions, cache)

    def _mask(self, view: _View, embeds: torch.Tensor, cache: PrefixCache | None, size: int) -> Any:
        """Attention of this view's queries over the prompts and its own blocks."""
        rows = view.rows
        blocks = self.block_layout[rows[:, None], view.blocks].flatten(1)
        layout = torch.cat([self.prompt_layout[rows], blocks], 1)
        present = view.present[..., None].expand(-1, -1, size).flatten(1)
        return create_bidirectional_mask(
            config=self.model.model.language_model.config,
            inputs_embeds=embeds,
            attention_mask=torch.cat([self.prompt_mask[rows], present], 1).long(),
            past_key_values=cache if cache is not None and cache.prefix_length is not None else None,
            and_mask_function=region_attention(layout, self.task.config.prefix_attention),
        )

    def _cache_of(self, rows: torch.Tensor) -> PrefixCache:
        """The cache, cut down to these rows once others have finished; frees their memory."""
        if len(rows) != len(self.cached_rows):
            self.cache.select(torch.searchsorted(self.cached_rows, rows))
            self.cached_rows = rows
        return self.cache


def denoise_regions(task: GenerationTask, prompt: torch.Tensor, counts: list[int], by_image) -> RegionCanvas:
    """Fill the captions of all regions of all rows.

    Args:
        task (`GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`)
        counts (`list[int]`): regions of every row.
        by_image: turns `(rows, regions, ...)` in the model's order into pictures in input order, for streamer and
            history.

    Returns:
        the canvas, filled.
    """
    settings = task.settings
    num_steps = settings.max_denoising_steps or 32
    canvas = RegionCanvas(task, prompt, counts, settings.max_new_tokens or 32)
    interval = settings.prefix_refresh_interval
    if interval is None:
        interval = 1 if task.config.prefix_attention == "full" else 0
    caching = interval != 1 and num_steps > 1
    if settings.cuda_graphs and graphs_usable(task.device, caching, task.config.text_config._attn_implementation):
        canvas.graphs = task.model.canvas_graphs()
    adaptive = settings.acceptance_threshold is not None or settings.entropy_bound is not None
    everything = view = canvas.view(canvas.exists)
    for step in range(num_steps):
        whole = step == 0 or (interval > 0 and step % interval == 0)
        # Finished regions stay for passes that also compute the prompts, which may see them.
        current = everything if whole else view
        hidden = canvas.forward(current, whole, keep=caching)
        draft, log_odds, ranking, entropy = _score_view(task, canvas, current, hidden)
        if task.history is not None:
            shown = torch.where(canvas.masked, canvas.mask_id, canvas.tokens)
            task.history.append(
                DenoisingStep(
                    by_image(shown, -1),
                    by_image(canvas.masked, False),
                    by_image(draft, -1),
                    by_image(log_odds.double().sigmoid(), 0.0),
                )
            )
        canvas.steps += canvas.masked.any(-1)
        if not adaptive:
            _commit_by_schedule(canvas, draft, log_odds, ranking, step, num_steps)
        else:
            if step == num_steps - 1:
                accepted = canvas.masked
            elif settings.entropy_bound is not None:
                accepted = accept_bounded(entropy, canvas.masked, settings.entropy_bound)
            else:
                accepted = accept_confident(ranking.sigmoid(), canvas.masked, settings.acceptance_threshold)
            _commit_accepted(canvas, draft, log_odds, accepted)
        if task.streamer is not None:
            task.stream(by_image(torch.where(canvas.masked, draft, canvas.tokens), -1))
        if adaptive:
            active = canvas.masked.any(-1)
            if not active.any():
                break
            # A graph has a fixed shape, and finished regions cost it nearly nothing.
            if caching and canvas.graphs is None and int(active.sum()) < len(view.place):
                view = canvas.view(active)
        elif all(masks_left(n * canvas.num_slots, step, num_steps) == 0 for n in counts):
            break
    return canvas


def _score_view(task: GenerationTask, canvas: RegionCanvas, view: _View, hidden: torch.Tensor):
    """Drafts, log odds, ranking and entropies of a view's slots, put in their places among all rows and regions."""
    rows = view.rows.tolist() if task.random is not None else [0] * len(view.rows)
    slots = hidden.flatten(1, 2)
    draft, log_odds, entropy = task.score(slots, rows, view.counts)
    ranking = task.ranking(log_odds, rows, view.counts)

    def spread(values: torch.Tensor, fill: Any) -> torch.Tensor:
        out = values.new_full(canvas.tokens.shape, fill)
        out[view.row_of, view.region_of] = values.view(-1, canvas.num_slots)[view.place]
        return out

    return (
        spread(draft, -1),
        spread(log_odds, torch.inf),
        spread(ranking, torch.inf),
        None if entropy is None else spread(entropy, torch.inf),
    )


def _commit_by_schedule(canvas: RegionCanvas, draft, log_odds, ranking, step: int, num_steps: int) -> None:
    """The reference's step: fill the open slots, re-open those whose current draft is least certain."""
    canvas.tokens = torch.where(canvas.masked, draft, canvas.tokens)
    canvas.written = torch.where(canvas.masked, log_odds, canvas.written)
    left = [masks_left(n * canvas.num_slots, step, num_steps) for n in canvas.counts]
    score = ranking.masked_fill(~canvas.exists[..., None], torch.inf).flatten(1)
    canvas.masked = lowest_mask(score, torch.tensor(left, device=score.device)).view_as(canvas.masked)


def _commit_accepted(canvas: RegionCanvas, draft, log_odds, accepted) -> None:
    """An adaptive step: commit what was accepted, for good; an end-of-turn closes the slots behind it."""
    canvas.tokens = torch.where(accepted, draft, canvas.tokens)
    canvas.written = torch.where(accepted, log_odds, canvas.written)
    canvas.masked = canvas.masked & ~accepted
    closed = ((canvas.tokens == canvas.end) & ~canvas.masked).cumsum(-1) > 0
    canvas.written = torch.where(closed & canvas.masked, torch.inf, canvas.written)
    canvas.tokens = torch.where(closed & canvas.masked, canvas.end, canvas.tokens)
    canvas.masked = canvas.masked & ~closed


def find(tokens: list[int], pattern: list[int]) -> int | None:
    """First position of `pattern` in `tokens`, None if it does not occur."""
    return next((i for i in range(len(tokens) - len(pattern) + 1) if tokens[i : i + len(pattern)] == pattern), None)


def as_list(value: Any) -> list:
    """None, a value or a list, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def cut_at_stop(tokens: torch.Tensor, stop: list[int], end: int) -> torch.Tensor:
    """Captions with everything from the stop sequence on replaced by end-of-turn."""
    tokens = tokens.clone()
    for caption in tokens.view(-1, tokens.shape[-1]):
        if (at := find(caption.tolist(), stop)) is not None:
            caption[at:] = end
    return tokens
