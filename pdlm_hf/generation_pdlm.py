"""Denoising: `generate` for regions (all captions together) and for chat (block by block)."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import ModelOutput, logging

from .diffusion_pdlm import (
    accept_confident,
    gumbel_perturb,
    lowest_mask,
    masks_left,
    token_log_odds,
    transfer_schedule,
)
from .masking_pdlm import caption_canvas

logger = logging.get_logger(__name__)

# Slots x vocabulary scored at a time: bounds the float32 logits to 256 MB.
_MAX_LOGITS = 2**26
# Names the reference uses -> ours
_REFERENCE_NAMES = {"steps": "max_denoising_steps", "gen_length": "max_new_tokens", "gen_len": "max_new_tokens"}


def _our_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the reference's names replaced. Raises: ValueError if one is given under both names."""
    settings = dict(settings)
    for old, new in _REFERENCE_NAMES.items():
        if old in settings:
            if new in settings:
                raise ValueError(
                    f"`{old}` is the reference's name for `{new}`, which is given too; leave `{old}` out."
                )
            warnings.warn(f"`{old}` is the reference's name for `{new}`; use `{new}`.", FutureWarning, stacklevel=4)
            settings[new] = settings.pop(old)
    return settings


class PdlmGenerationConfig(GenerationConfig):
    """Settings of [`PdlmGenerationMixin.generate`]; saved as `generation_config.json`. Unknown names raise.

    Args:
        max_new_tokens (`int`): slots per caption, or length of a chat answer. Default 32 with regions, 64 in chat.
        max_denoising_steps (`int`): forward passes at most. Default 32 with regions, one per token in chat.
        block_length (`int`): chat only: the answer is written block by block; 1 = autoregressive order. Default: one
            block.
        temperature (`float`): 0 = greedy (default); otherwise tokens are drawn by Gumbel noise.
        remasking (`str`): which drafted tokens to keep: "low_confidence" keeps the most probable, "random" any.
        acceptance_threshold (`float`): adaptive decoding: every step commits all tokens more probable than this, and
            at least one per region. None (default) = the reference's fixed schedule.
        prefix_refresh_interval (`int`): how often the prompt's keys and values are recomputed: 1 = at every step, k =
            every k steps, 0 = never. Default 1 for `prefix_attention` "full", 0 for "isolated". At present every value
            recomputes at every step, which is exact.
        guidance_scale (`float`): classifier-free guidance, chat only; 1 (default) = off. Reference: cfg_scale + 1.
        generation_suffix (`str` or `list[int]`): chat only: text fixed behind the answer, seen while it is written.
        stop_strings (`str` or `list`): the answer (or caption) ends before the first of these.
        seed (`int`): makes temperature > 0 and random remasking repeatable, whatever else is in the batch.
        return_dict_in_generate (`bool`): chat: return [`PdlmGenerationOutput`] instead of the token tensor.
        output_history (`bool`): keep every step in `history`.
    """

    _FIELDS = (
        "max_new_tokens",
        "max_denoising_steps",
        "block_length",
        "temperature",
        "remasking",
        "acceptance_threshold",
        "prefix_refresh_interval",
        "guidance_scale",
        "generation_suffix",
        "stop_strings",
        "seed",
        "return_dict_in_generate",
        "output_history",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    _METADATA = ("_commit_hash", "_from_model_config", "transformers_version", "_original_object_hash")

    def __init__(self, **kwargs):
        # Not GenerationConfig's __init__: most of its fields mean nothing here and would be accepted silently.
        kwargs = _our_names(kwargs)
        for name in (*self._FIELDS, *self._METADATA):
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise ValueError(f"Unknown generation settings {sorted(kwargs)}. Known: {', '.join(self._FIELDS)}.")
        self.validate()

    def validate(self, **unused):
        """Check every value. Raises: ValueError, with the name, the value and the rule."""
        for name in ("max_new_tokens", "max_denoising_steps", "block_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        interval = self.prefix_refresh_interval
        if interval is not None and (not isinstance(interval, int) or isinstance(interval, bool) or interval < 0):
            raise ValueError(f"`prefix_refresh_interval` must be 0 or a positive integer, got {interval!r}.")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"`temperature` must be 0 (greedy) or positive, got {self.temperature!r}.")
        if self.remasking not in (None, "low_confidence", "random"):
            raise ValueError(f'`remasking` must be "low_confidence" or "random", got {self.remasking!r}.')
        if self.acceptance_threshold is not None and not 0 < self.acceptance_threshold <= 1:
            raise ValueError(f"`acceptance_threshold` must be in (0, 1], got {self.acceptance_threshold!r}.")
        if self.guidance_scale is not None and not self.guidance_scale >= 1:
            raise ValueError(f"`guidance_scale` must be at least 1 (1 = off), got {self.guidance_scale!r}.")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be an integer, got {self.seed!r}.")

    def to_diff_dict(self) -> dict[str, Any]:
        """What is set, for `generation_config.json`."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    @classmethod
    def from_model_config(cls, model_config):
        """Not defined; transformers then starts from this class's defaults."""
        raise NotImplementedError("PerceptionDLM has no generation settings in its model config.")

    def get_generation_mode(self, assistant_model=None):
        """Not defined: there are no autoregressive modes here."""
        raise NotImplementedError("PerceptionDLM decodes by denoising only.")


@dataclass
class PdlmGenerationOutput(ModelOutput):
    """
    What `generate` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(passes or batch, sequence_length)`):
            Prompt and generated part, padded on the left with regions and on the right in chat.
        region_tokens (`torch.LongTensor` of shape `(batch_size, num_regions, max_new_tokens)`, *optional*):
            Tokens of every caption, regions in the order in which their masks were given; -1 where an image has fewer.
        region_scores (`torch.FloatTensor` of shape `(batch_size, num_regions)`, *optional*):
            Mean probability of a caption's tokens up to its end, each as of the step that wrote it.
        num_forwards (`int`):
            Passes through the language model.
        tokens_per_forward (`float`):
            Generated slots of all regions and images (padding included) per forward.
        tokens_per_forward_per_region (`float`):
            The same, per region.
        history (`list[DenoisingStep]`, *optional*):
            Every step, if `output_history=True`.
    """

    sequences: torch.LongTensor | None = None
    region_tokens: torch.LongTensor | None = None
    region_scores: torch.FloatTensor | None = None
    num_forwards: int | None = None
    tokens_per_forward: float | None = None
    tokens_per_forward_per_region: float | None = None
    history: list | None = None


@dataclass
class DenoisingStep:
    """One step. With regions all tensors are `(batch_size, num_regions, max_new_tokens)` in input order, in chat
    `(batch_size, max_new_tokens)`.

    Args:
        tokens: before the step, the mask token where a slot is open; -1 where there is no region.
        masked: slots open before the step.
        draft: the token the model would put there (chat: -1 outside the current block).
        probability: of the draft.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    draft: torch.Tensor
    probability: torch.Tensor


class _Draw:
    """Random numbers, one generator a row and the same seed for each: a row draws what it would draw alone."""

    def __init__(self, rows: int, seed: int | None, device: torch.device):
        seed = torch.seed() if seed is None else seed
        self.generators = [torch.Generator(device).manual_seed(seed % 2**63) for _ in range(rows)]
        self.device = device
        self.counts: list[int] | None = None  # slots that each row has, where some rows have fewer than others

    def uniform(self, row: int, shape: tuple[int, ...]) -> torch.Tensor:
        u = torch.full(shape, 0.5, device=self.device)
        count = shape[0] if self.counts is None else self.counts[row]
        u[:count] = torch.rand((count, *shape[1:]), generator=self.generators[row], device=self.device)
        return u.clamp_(1e-20, 1 - 1e-7)


class PdlmGenerationMixin:
    """`generate` of PerceptionDLM. Not transformers' autoregressive GenerationMixin, but with its conventions."""

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Called by `from_pretrained`: loads `generation_config.json` as [`PdlmGenerationConfig`]."""
        download = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        kwargs = {k: v for k, v in {**dict(zip(download, args, strict=False)), **kwargs}.items() if k in download}
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, **kwargs
            )
        except OSError:  # reference checkpoints have none
            self.generation_config = self.generation_config_class()

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_boxes: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        region_order: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        generation_config: PdlmGenerationConfig | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **kwargs,
    ) -> "PdlmGenerationOutput | torch.LongTensor":
        """Write the captions of all regions together, or a chat answer block by block.

        With regions (paper section 3.3, reference-spec section 8), for all slots of an image together:
            a. draft every slot by the most probable token (or a sample);
            b. fill the open slots with their drafts;
            c. re-open the k slots whose current draft is least certain, k falling linearly over the steps.
        In chat (reference-spec section 9), within the current block:
            a. draft; b. commit the k most certain open slots for good.

        Args:
            input_ids, attention_mask, pixel_values, image_grids, region_masks, region_boxes, original_sizes,
                region_order, image_index: from the processor. For the base model `input_ids` and `pixel_values` do.
            generation_config (`PdlmGenerationConfig`, *optional*): replaces the model's.
            streamer (*optional*): its `put_draft(tokens)` gets every step's draft: `(batch_size, num_regions,
                max_new_tokens)` with -1 where there is no region, or `(batch_size, max_new_tokens)` in chat; then
                `put(tokens)` the final ones and `end()`.
            tokenizer (*optional*): for `stop_strings` and `generation_suffix`; default: the checkpoint's own.
            **kwargs: any field of [`PdlmGenerationConfig`].

        Raises:
            ValueError: unknown or invalid settings, or settings that do not fit the task.

        Returns:
            [`PdlmGenerationOutput`] with regions; in chat the token tensor (prompt and answer) unless
            `return_dict_in_generate=True`.
        """
        if input_ids is None:
            raise ValueError("`generate` needs `input_ids`; build them with the processor.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        task = _Task(self, generation_config, kwargs, input_ids, attention_mask.bool(), streamer, tokenizer)
        prompt = self.model.embed(input_ids, pixel_values, image_grids, region_masks, region_boxes, original_sizes)
        if region_boxes is not None and region_order is None:
            count = (region_boxes[..., 0] >= 0).sum(1, keepdim=True)
            slots = torch.arange(region_boxes.shape[1], device=region_boxes.device)
            region_order = torch.where(slots < count, slots, -1)
        if region_order is not None:
            if image_index is None:
                image_index = torch.arange(len(input_ids), device=input_ids.device)
            return _denoise_regions(task, prompt, region_order, image_index)
        return _denoise_blocks(task, prompt)

    def score_slots(
        self, hidden: torch.Tensor, temperature: float, draw: "_Draw | None", banned: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft token and its log odds for every slot, from hidden states; logits exist a few rows at a time.

        Args:
            hidden (`torch.FloatTensor` of shape `(rows, slots, hidden_size)`)
            temperature (`float`): 0 = the most probable token.
            draw: random numbers for temperature > 0.
            banned (`list[int]`, *optional*): tokens never to be drafted; they get no probability either.

        Returns:
            tokens `(rows, slots)` and log odds of their probability, float32.
        """
        return self._score(hidden, None, 1.0, temperature, draw, banned)

    def _score(self, hidden, unconditional, guidance, temperature, draw, banned):
        rows_at_once = max(1, _MAX_LOGITS // (hidden.shape[1] * self.config.text_config.vocab_size))
        tokens, odds = [], []
        for start in range(0, len(hidden), rows_at_once):
            rows = slice(start, start + rows_at_once)
            logits = self.lm_head(hidden[rows]).float()
            if unconditional is not None:
                base = self.lm_head(unconditional[rows]).float()
                logits = base + guidance * (logits - base)
            if banned:
                logits[..., banned] = -torch.inf
            noisy = logits
            if temperature > 0:
                uniform = torch.stack([draw.uniform(start + i, logits.shape[1:]) for i in range(len(logits))])
                noisy = gumbel_perturb(logits, temperature, uniform)
            tokens.append(noisy.argmax(-1))
            odds.append(token_log_odds(logits, tokens[-1]))
        return torch.cat(tokens), torch.cat(odds)


class _Task:
    """One call of `generate`: its settings, checked and with defaults filled in, and the prompts."""

    def __init__(self, model, generation_config, kwargs, input_ids, attention_mask, streamer, tokenizer):
        settings = generation_config or model.generation_config
        settings = {k: v for k, v in settings.to_dict().items() if k in PdlmGenerationConfig._FIELDS and v is not None}
        self.settings = PdlmGenerationConfig(**{**settings, **_our_names(kwargs)})
        self.model = model
        self.config = model.config
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.streamer = streamer
        self._tokenizer = tokenizer
        self.device = input_ids.device
        self.temperature = self.settings.temperature or 0.0
        self.random_remasking = self.settings.remasking == "random"
        self.draw = None
        if self.temperature > 0 or self.random_remasking:
            self.draw = _Draw(len(input_ids), self.settings.seed, self.device)
        self.history = [] if self.settings.output_history else None
        self.num_forwards = 0

    def token_ids(self, text: str | list[int]) -> list[int]:
        """Ids of a stop string or suffix."""
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
        stops = self.settings.stop_strings or []
        stops = [stops] if isinstance(stops, str) else stops
        return [self.token_ids(stop) for stop in stops]

    def forward(self, embeds: torch.Tensor, attention_mask: torch.Tensor, layout: torch.Tensor | None) -> torch.Tensor:
        """Hidden states of one pass."""
        self.num_forwards += 1
        return self.model.model(
            inputs_embeds=embeds, attention_mask=attention_mask.long(), layout=layout
        ).last_hidden_state

    def confidence(self, log_odds: torch.Tensor) -> torch.Tensor:
        """What ranks the drafts: their log odds, or noise for random remasking."""
        if not self.random_remasking:
            return log_odds
        return torch.stack([self.draw.uniform(row, log_odds.shape[1:]) for row in range(len(log_odds))])

    def stream(self, tokens: torch.Tensor, final: bool = False) -> None:
        if self.streamer is None:
            return
        if not final:
            if hasattr(self.streamer, "put_draft"):
                self.streamer.put_draft(tokens.cpu())
            return
        self.streamer.put(tokens.cpu())
        self.streamer.end()


def _left_padded(prompts: list[torch.Tensor], tails: list[torch.Tensor], fill: Any) -> torch.Tensor:
    """Rows prompt + tail of different lengths as one tensor, padded on the left."""
    rows = [torch.cat(parts) for parts in zip(prompts, tails, strict=True)]
    length = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        out[i, length - len(row) :] = row
    return out


def _denoise_regions(
    task: _Task, prompt: torch.Tensor, region_order: torch.Tensor, image_index: torch.Tensor
) -> PdlmGenerationOutput:
    """Captions of all regions of all images. One row is one pass: an image, or a part of its regions."""
    model, config, settings, device = task.model, task.config, task.settings, task.device
    for name in ("block_length", "generation_suffix"):
        if getattr(settings, name) is not None:
            raise ValueError(f"`{name}` is for chat; with regions every caption is one block. Leave it out.")
    if (settings.guidance_scale or 1) != 1:
        raise ValueError("`guidance_scale` is for chat; it is not defined for region captions. Leave it out.")
    num_slots = settings.max_new_tokens or 32
    num_steps = settings.max_denoising_steps or 32
    stops = task.stop_ids()

    # 1. One canvas a row behind its prompt.
    counts = (region_order >= 0).sum(1).tolist()
    if min(counts) == 0 or len(counts) != len(task.input_ids):
        raise ValueError(f"Every prompt needs at least one region, got {counts} for {len(task.input_ids)} prompts.")
    newline, end, mask_id = config.newline_token_id, config.eot_token_id, config.mask_token_id
    canvases = [
        torch.tensor(caption_canvas(n, num_slots, config.caption_token_ids, mask_id, newline, end), device=device)
        for n in counts
    ]
    real = task.attention_mask
    ids = _left_padded([row[keep] for row, keep in zip(task.input_ids, real, strict=True)], canvases, end)
    lookup = model.get_input_embeddings()
    tails = [lookup(canvas) for canvas in canvases]
    embeds = _left_padded([row[keep] for row, keep in zip(prompt, real, strict=True)], tails, 0)
    lengths = torch.tensor([int(keep.sum()) + len(c) for keep, c in zip(real, canvases, strict=True)], device=device)
    length = ids.shape[1]
    position = torch.arange(length, device=device)
    attention_mask = position >= length - lengths[:, None]
    layout = model.model.region_layout(ids)

    # 2. Where the slots are: (rows, regions, slots); rows with fewer regions repeat position 0 and are never masked.
    regions, most = torch.tensor(counts, device=device), max(counts)
    region = torch.arange(most, device=device)
    exists = region < regions[:, None]  # (rows, regions)
    start = length - (regions[:, None] - region) * (num_slots + 2) + 1
    slot = torch.where(exists, start, 0)[..., None] + torch.arange(num_slots, device=device) * exists[..., None]
    flat = slot.flatten(1)  # (rows, regions * slots)
    row = torch.arange(len(ids), device=device)[:, None]
    exists = exists[..., None].expand(-1, -1, num_slots)

    def by_image(values: torch.Tensor, fill: Any) -> torch.Tensor:
        """Per pass and area rank -> per image and input order."""
        order = region_order[:, :most]
        out = values.new_full((int(image_index.max()) + 1, int(order.max()) + 1, *values.shape[2:]), fill)
        known = order >= 0
        out[image_index[:, None].expand_as(order)[known], order[known]] = values[known]
        return out

    # 3. Denoise.
    masked = exists.clone()
    tokens = torch.full_like(slot, mask_id)
    written = torch.full(slot.shape, -torch.inf, device=device)  # log odds of each token when it was written
    total = regions * num_slots
    if task.draw is not None:
        task.draw.counts = total.tolist()
    for step in range(num_steps):
        hidden = task.forward(embeds, attention_mask, layout)
        draft, log_odds = model.score_slots(hidden[row, flat], task.temperature, task.draw)
        ranking = task.confidence(log_odds).view_as(slot)
        draft, log_odds = draft.view_as(slot), log_odds.view_as(slot)
        if task.history is not None:
            task.history.append(
                DenoisingStep(
                    by_image(torch.where(masked, mask_id, tokens), -1),
                    by_image(masked, False),
                    by_image(draft, -1),
                    by_image(log_odds.double().sigmoid(), 0.0),
                )
            )
        if settings.acceptance_threshold is None:
            tokens = torch.where(masked, draft, tokens)
            written = torch.where(masked, log_odds, written)
            left = [masks_left(n, step, num_steps) for n in total.tolist()]
            open_score = ranking.masked_fill(~exists, torch.inf).flatten(1)
            masked = lowest_mask(open_score, torch.tensor(left, device=device)).view_as(slot)
        else:
            probability = ranking if task.random_remasking else ranking.sigmoid()
            accepted = accept_confident(probability, masked, settings.acceptance_threshold)
            if step == num_steps - 1:
                accepted = masked
            tokens = torch.where(accepted, draft, tokens)
            written = torch.where(accepted, log_odds, written)
            masked = masked & ~accepted
            # An end-of-turn closes the slots behind it.
            closed = ((tokens == end) & ~masked).cumsum(-1) > 0
            written = torch.where(closed & masked, torch.inf, written)
            tokens = torch.where(closed & masked, end, tokens)
            masked = masked & ~closed
        shown = torch.where(masked, mask_id, tokens)
        task.stream(by_image(torch.where(masked, draft, tokens), -1))
        if not masked.any():
            break
        # in place of the slots only; absent slots point at position 0 and are left alone
        here = exists.flatten(1)
        embeds[row.expand_as(flat)[here], flat[here]] = lookup(shown.flatten(1)[here]).to(embeds.dtype)

    # 4. Hand out in input order.
    for stop in stops:
        tokens = _cut_at_stop(tokens, stop, end)
    ids[row.expand_as(flat)[exists.flatten(1)], flat[exists.flatten(1)]] = tokens[exists]
    region_tokens = by_image(torch.where(exists, tokens, -1), -1)
    closing = torch.tensor([end, *_as_list(config.eos_token_id)], device=device)
    text = ~(torch.isin(tokens, closing).cumsum(-1) > 0)
    text[..., 0] = True  # an empty caption is scored by its end token
    scores = (written.sigmoid() * text).sum(-1) / text.sum(-1)
    task.stream(region_tokens, final=True)
    return PdlmGenerationOutput(
        sequences=ids,
        region_tokens=region_tokens,
        region_scores=by_image(scores, 0.0),
        num_forwards=task.num_forwards,
        tokens_per_forward=int(total.sum()) / task.num_forwards,
        tokens_per_forward_per_region=num_slots / task.num_forwards,
        history=task.history,
    )


def _as_list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _find(tokens: list[int], pattern: list[int]) -> int | None:
    """First position of `pattern` in `tokens`."""
    return next((i for i in range(len(tokens) - len(pattern) + 1) if tokens[i : i + len(pattern)] == pattern), None)


def _cut_at_stop(tokens: torch.Tensor, stop: list[int], end: int) -> torch.Tensor:
    """Captions with everything from the stop sequence on replaced by end-of-turn."""
    tokens = tokens.clone()
    for caption in tokens.view(-1, tokens.shape[-1]):
        if (at := _find(caption.tolist(), stop)) is not None:
            caption[at:] = end
    return tokens


def _denoise_blocks(task: _Task, prompt: torch.Tensor) -> "PdlmGenerationOutput | torch.LongTensor":
    """Chat answers: block after block from left to right, any order within a block."""
    model, config, settings, device = task.model, task.config, task.settings, task.device
    if settings.acceptance_threshold is not None:
        raise ValueError("`acceptance_threshold` is for region captions at present. Leave it out in chat.")
    num_slots = settings.max_new_tokens or 64
    block_length = min(settings.block_length or num_slots, num_slots)
    if num_slots % block_length:
        raise ValueError(f"`max_new_tokens` ({num_slots}) must be a multiple of `block_length` ({block_length}).")
    num_blocks = num_slots // block_length
    num_steps = settings.max_denoising_steps or num_slots
    if num_steps % num_blocks:
        raise ValueError(
            f"`max_denoising_steps` ({num_steps}) must be a multiple of the number of blocks ({num_blocks}), "
            f"so that every block of {block_length} tokens gets as many steps."
        )
    schedule = [k for k in transfer_schedule(block_length, num_steps // num_blocks) if k]
    stops = task.stop_ids()
    suffix = task.token_ids(settings.generation_suffix or [])
    guidance = settings.guidance_scale or 1.0
    banned = [config.mask_token_id, config.start_header_token_id, config.end_header_token_id, config.bos_token_id]
    banned = [token for token in [*banned, *_as_list(config.eos_token_id)] if token is not None]

    # 1. prompt | answer | suffix, padded on the left so that the answer stands at the same place in every row
    real = task.attention_mask
    rows = len(real)
    lookup = model.get_input_embeddings()
    tail = torch.tensor([config.mask_token_id] * num_slots + suffix, device=device)
    embeds = _left_padded([row[keep] for row, keep in zip(prompt, real, strict=True)], [lookup(tail)] * rows, 0)
    lengths = real.sum(1, keepdim=True) + len(tail)
    attention_mask = torch.arange(embeds.shape[1], device=device) >= embeds.shape[1] - lengths
    first = embeds.shape[1] - len(tail)
    layout = None
    blank = None
    if guidance != 1:
        blank = embeds.clone()
        blank[:, :first] = lookup(tail[0])

    # 2. Denoise.
    tokens = torch.full((rows, num_slots), config.mask_token_id, device=device)
    end_of_answer = torch.full((rows,), num_slots, device=device)  # stop position, found so far
    position = torch.arange(num_slots, device=device)
    for block in range(num_blocks):
        inside = slice(block * block_length, (block + 1) * block_length)
        for count in schedule:
            masked = tokens == config.mask_token_id
            wanted = masked & (position < end_of_answer[:, None])
            if not wanted[:, inside].any():
                break
            window = slice(first + inside.start, first + inside.stop)
            hidden = task.forward(embeds, attention_mask, layout)[:, window]
            plain = None if blank is None else task.forward(blank, attention_mask, layout)[:, window]
            draft, log_odds = model._score(hidden, plain, guidance, task.temperature, task.draw, banned)
            ranking = task.confidence(log_odds)
            if task.history is not None:
                task.history.append(_chat_step(tokens, masked, draft, log_odds, inside))
            score = ranking.masked_fill(~wanted[:, inside], -torch.inf)
            commit = lowest_mask(-score, torch.full((rows,), count, device=device)) & wanted[:, inside]
            tokens[:, inside] = torch.where(commit, draft, tokens[:, inside])
            for i in range(rows if stops else 0):
                end_of_answer[i] = _stop_position(tokens[i].tolist(), stops, int(end_of_answer[i]))
            embeds[:, window] = lookup(tokens[:, inside]).to(embeds.dtype)
            if blank is not None:
                blank[:, window] = embeds[:, window]
            shown = tokens.clone()
            shown[:, inside] = torch.where(wanted[:, inside], draft, shown[:, inside])
            task.stream(torch.where(position < end_of_answer[:, None], shown, config.eot_token_id))

    # 3. Prompt, answer up to its stop, suffix.
    answers = [torch.cat([row[:n], tail[num_slots:]]) for row, n in zip(tokens, end_of_answer.tolist(), strict=True)]
    width = max(len(answer) for answer in answers)
    padded = torch.full((rows, width), config.eot_token_id, device=device)
    for i, answer in enumerate(answers):
        padded[i, : len(answer)] = answer
    sequences = torch.cat([task.input_ids, padded], 1)
    task.stream(padded, final=True)
    if not settings.return_dict_in_generate:
        return sequences
    return PdlmGenerationOutput(
        sequences=sequences,
        num_forwards=task.num_forwards,
        tokens_per_forward=rows * num_slots / task.num_forwards,
        history=task.history,
    )


def _chat_step(tokens, masked, draft, log_odds, inside) -> DenoisingStep:
    full_draft = torch.full_like(tokens, -1)
    full_draft[:, inside] = draft
    probability = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    probability[:, inside] = log_odds.double().sigmoid()
    return DenoisingStep(tokens.clone(), masked, full_draft, probability)


def _stop_position(tokens: list[int], stops: list[list[int]], known: int) -> int:
    """Where the answer ends: the first stop in list order that occurs counts, the earliest position seen is kept."""
    for stop in stops:
        if (at := _find(tokens, stop)) is not None:
            return min(at, known)
    return known


__all__ = ["DenoisingStep", "PdlmGenerationConfig", "PdlmGenerationOutput"]
