"""Denoising: `generate` for regions (all captions together) and for chat (block by block)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from .canvas_path_pdlm import warn_of_slow_bfloat16
from .chat_denoising_pdlm import denoise_blocks
from .configuration_pdlm import HUB_ARGUMENTS, PdlmConfig
from .denoising_pdlm import DenoisingStep, GenerationTask, cut_at_stops, denoise_regions
from .diffusion_pdlm import before_end, caption_scores
from .errors_pdlm import RegionError, SettingError
from .generation_config_pdlm import CAPTIONS_ONLY, PdlmGenerationConfig, our_names, replaced_rules
from .graphs_pdlm import CanvasGraphs
from .tiling_pdlm import num_tiles


@dataclass
class PdlmGenerationOutput(ModelOutput):
    """
    What `generate` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(rows or batch, sequence_length)`):
            Prompt and generated part, padded on the left with regions and on the right in chat.
        region_tokens (`torch.LongTensor` of shape `(batch_size, num_regions, max_new_tokens)`, *optional*):
            Tokens of every caption, regions in the order in which their masks were given; -1 where an image has fewer.
        region_scores (`torch.FloatTensor` of shape `(batch_size, num_regions)`, *optional*):
            Mean probability of a caption's tokens up to its end, each as of the step that wrote it.
        num_forwards (`int`):
            Forward passes through the language model.
        tokens_per_forward (`float`):
            Generated token positions of all regions and images (padding included) per forward pass.
        tokens_per_forward_per_region (`float`):
            The same, per region.
        text_tokens_per_forward (`float`, *optional*):
            As tokens_per_forward, counting only tokens before the end of each caption.
        region_steps (`torch.LongTensor` of shape `(batch_size, num_regions)`, *optional*):
            Steps until each caption was complete; smaller than num_forwards in adaptive decoding.
        history (`list[DenoisingStep]`, *optional*):
            Every step, if `output_history=True`.
    """

    sequences: torch.Tensor | None = None
    region_tokens: torch.Tensor | None = None
    region_scores: torch.Tensor | None = None
    num_forwards: int | None = None
    tokens_per_forward: float | None = None
    tokens_per_forward_per_region: float | None = None
    text_tokens_per_forward: float | None = None
    region_steps: torch.Tensor | None = None
    history: list | None = None


class PdlmGenerationMixin:
    """`generate` of PerceptionDLM. Not transformers' autoregressive GenerationMixin, but with its conventions."""

    config: PdlmConfig
    model: Any  # PdlmModel, whose module imports this one
    generation_config: PdlmGenerationConfig
    generation_config_class: type[PdlmGenerationConfig]
    _canvas_graphs: CanvasGraphs | None = None

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Called by `from_pretrained`: loads `generation_config.json` as [`PdlmGenerationConfig`]."""
        given = {**dict(zip(HUB_ARGUMENTS, args, strict=False)), **kwargs}
        kwargs = {name: value for name, value in given.items() if name in HUB_ARGUMENTS}
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        if pretrained_model_name_or_path is None:  # from a configuration and a state dict
            self.generation_config = self.generation_config_class()
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, **kwargs
            )
        except OSError:  # reference checkpoints have none
            self.generation_config = self.generation_config_class()

    def canvas_graphs(self) -> CanvasGraphs:
        """The CUDA graphs of this model's forward passes over the canvas."""
        if self._canvas_graphs is None:
            self._canvas_graphs = CanvasGraphs(self.model.language_model)
        return self._canvas_graphs

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
        region_order: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        generation_config: PdlmGenerationConfig | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **kwargs,
    ) -> PdlmGenerationOutput | torch.Tensor:
        """Write the captions of all regions together, or a chat answer block by block.

        With regions (paper section 3.3; docs/quirks.md#q17), for all slots of an image together:
            a. draft every slot by the most probable token (or a sample);
            b. fill the open slots with their drafts;
            c. re-open the k slots whose current draft is least certain, k falling linearly over the steps.
        In chat (docs/quirks.md#q18), within the current block:
            a. draft; b. write the k most certain drafts, which are final.

        Args:
            input_ids, attention_mask: from the processor, as are pixel_values, image_grids, region_masks,
                region_boxes, original_sizes, region_order, image_index. For the base model the ids and pixels do.
            generation_config (`PdlmGenerationConfig`, *optional*): replaces the model's.
            streamer (*optional*): its `put_draft(tokens)` gets every step's draft: `(batch_size, num_regions,
                max_new_tokens)` with -1 where there is no region, or `(batch_size, max_new_tokens)` in chat; then
                `put(tokens)` the final ones and `end()`.
            tokenizer (*optional*): for `stop_strings` and `generation_suffix`; default: the checkpoint's own.
            **kwargs: any field of [`PdlmGenerationConfig`].

        Raises:
            SettingError: unknown or invalid settings, or settings that do not fit the task.

        Returns:
            [`PdlmGenerationOutput`] with regions; in chat the token tensor (prompt and answer) unless
            `return_dict_in_generate=True`.
        """
        if input_ids is None:
            raise SettingError("`generate` needs `input_ids`; build them with the processor.")
        settings = self._settings(generation_config, kwargs, chat=region_order is None and region_boxes is None)
        warn_of_slow_bfloat16(input_ids.device, self.model.dtype)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask.bool(),
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "region_masks": region_masks,
            "region_boxes": region_boxes,
            "original_sizes": original_sizes,
        }
        self._check_region_inputs(input_ids, region_order, region_boxes, region_masks)
        if region_order is None and region_boxes is not None:
            count = (region_boxes[..., 0] >= 0).sum(1, keepdim=True)
            slots = torch.arange(region_boxes.shape[1], device=region_boxes.device)
            region_order = torch.where(slots < count, slots, -1)
        if region_order is None:
            return self._generate_chat(inputs, settings, streamer, tokenizer)
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        return self._generate_captions(inputs, settings, region_order, image_index, streamer, tokenizer)

    def _check_region_inputs(self, input_ids, region_order, region_boxes, region_masks) -> None:
        """A prompt with places for regions must come with them; it would be answered as chat. Raises: SettingError."""
        if region_order is not None or not self.config.num_region_prompts:
            return
        places = torch.isin(input_ids, torch.tensor(self.config.region_token_ids, device=input_ids.device)).any()
        if places and (region_boxes is None or region_masks is None):
            raise SettingError(
                "The prompt has places for regions, but `region_boxes` or `region_masks` is missing. Pass everything "
                "the processor returned: `generate(**inputs)`."
            )

    def _settings(self, generation_config: PdlmGenerationConfig | None, kwargs: dict[str, Any], chat: bool = False):
        """The model's settings (or those given), overridden by the keyword arguments of the call.

        In chat a region checkpoint's own defaults do not count where they are for captions; given ones are refused
        later. A rule of adaptive decoding in the call takes the place of the other one among the defaults.
        """
        if generation_config is not None and not isinstance(generation_config, PdlmGenerationConfig):
            raise SettingError(
                f"`generation_config` must be a PdlmGenerationConfig, got {type(generation_config).__name__}, most of "
                "whose settings mean nothing here."
            )
        base = (generation_config or self.generation_config).to_dict()
        given = our_names(kwargs)
        if given.get("eos_token_id") not in (None, base.get("eos_token_id")):
            raise SettingError(
                "`eos_token_id` would change nothing: the checkpoint's own ends are taken. To end texts elsewhere, "
                "use `stop_strings`."
            )
        dropped = {*replaced_rules(given)}
        if chat and generation_config is None:
            dropped |= {*CAPTIONS_ONLY}
            if self.config.num_region_prompts:  # lengths of captions, not of answers
                dropped |= {"max_new_tokens", "max_denoising_steps"}
        known = {
            k: v for k, v in base.items() if k in PdlmGenerationConfig._FIELDS and v is not None and k not in dropped
        }
        return PdlmGenerationConfig(**{**known, **given})

    def _generate_captions(self, inputs, settings, region_order, image_index, streamer, tokenizer):
        for name in ("block_length", "generation_suffix"):
            if getattr(settings, name) is not None:
                raise SettingError(f"`{name}` is for chat; with regions every caption is one block. Leave it out.")
        if (settings.guidance_scale or 1) != 1:
            raise SettingError("`guidance_scale` is for chat; it is not defined for region captions. Leave it out.")
        counts = (region_order >= 0).sum(1).tolist()
        if len(counts) != len(inputs["input_ids"]) or min(counts) == 0:
            raise RegionError(f"Every prompt needs a region; got {counts} for {len(inputs['input_ids'])} prompts.")
        num_slots = settings.max_new_tokens or 32
        longest, most = max(
            (length + count * (num_slots + 2), count)
            for length, count in zip(inputs["attention_mask"].sum(1).tolist(), counts, strict=True)
        )
        self._check_length(longest, f"The prompt and {most} captions of {num_slots} token positions")
        images, regions = int(image_index.max()) + 1, int(region_order.max()) + 1
        parts, first = [], 0
        for size in _chunks(inputs["attention_mask"].sum(1).tolist(), counts, num_slots, settings.max_batch_tokens):
            rows = slice(first, first + size)
            order, index = region_order[rows, : max(counts[rows])], image_index[rows]

            def by_image(values, fill, order=order, index=index):
                """Rows and area ranks -> images and input order."""
                out = values.new_full((images, regions, *values.shape[2:]), fill)
                known = order >= 0
                out[index[:, None].expand_as(order)[known], order[known]] = values[known]
                return out

            part = rows_of(inputs, rows)
            task = GenerationTask(self, settings, part["input_ids"], part["attention_mask"], streamer, tokenizer)
            parts.append(self._caption_rows(task, part, counts[rows], by_image))
            first += size
        return self._join(parts, sum(counts) * num_slots, num_slots, streamer)

    def _check_length(self, length: int, what: str, advice: str = "Lower `max_new_tokens`, or ask for less") -> None:
        """Raises: SettingError if the checkpoint has no position embeddings for so many tokens."""
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise SettingError(
                f"{what} make {length} tokens, more than the {limit} positions of the checkpoint. "
                f"{advice} at a time: fewer regions, fewer images."
            )

    def _caption_rows(self, task: GenerationTask, inputs, counts, by_image) -> dict[str, Any]:
        """One chunk of a batch."""
        stops = task.stops()
        visual = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        prompt = self.model.embed(inputs["input_ids"], **visual)
        canvas = denoise_regions(task, prompt, counts, by_image)
        tokens = canvas.tokens
        if stops:
            tokens = cut_at_stops(tokens, stops, canvas.end)
        text = before_end(tokens, self.config.closing_token_ids) & canvas.exists[..., None]
        blocks = canvas.blocks(tokens)
        sequences = [
            torch.cat([ids[keep], row[:count].flatten()])
            for ids, keep, row, count in zip(canvas.prompt_ids, canvas.prompt_mask, blocks, counts, strict=True)
        ]
        return {
            "sequences": sequences,
            "tokens": by_image(tokens, -1),
            "scores": by_image(caption_scores(canvas.written.sigmoid(), text, self.config.score_temperature), 0.0),
            "steps": by_image(canvas.steps, 0),
            "text": int(text.sum()),
            "forwards": task.num_forwards,
            "history": task.history,
        }

    def _join(self, parts: list[dict[str, Any]], total: int, num_slots: int, streamer) -> PdlmGenerationOutput:
        """Chunks of a batch as one output; each region is in exactly one of them."""
        forwards = sum(part["forwards"] for part in parts)
        tokens = torch.stack([part["tokens"] for part in parts]).amax(0)
        if streamer is not None:
            streamer.put(tokens.cpu())
            streamer.end()
        return PdlmGenerationOutput(
            sequences=pad_sequence(
                [row for part in parts for row in part["sequences"]],
                batch_first=True,
                padding_value=self.config.eot_token_id,
                padding_side="left",
            ),
            region_tokens=tokens,
            region_scores=torch.stack([part["scores"] for part in parts]).amax(0),
            num_forwards=forwards,
            tokens_per_forward=total / forwards,
            tokens_per_forward_per_region=num_slots * len(parts) / forwards,
            text_tokens_per_forward=sum(part["text"] for part in parts) / forwards,
            region_steps=torch.stack([part["steps"] for part in parts]).amax(0),
            history=None if parts[0]["history"] is None else [step for part in parts for step in part["history"]],
        )

    def _generate_chat(self, inputs, settings, streamer, tokenizer) -> PdlmGenerationOutput | torch.Tensor:
        for name in CAPTIONS_ONLY:
            if getattr(settings, name) is not None:
                raise SettingError(f"`{name}` is for region captions at present. Leave it out in chat.")
        num_slots = settings.max_new_tokens or 64
        block_length = min(settings.block_length or num_slots, num_slots)
        if num_slots % block_length:
            raise SettingError(
                f"`max_new_tokens` ({num_slots}) must be a multiple of `block_length` ({block_length})."
            )
        num_blocks = num_slots // block_length
        num_steps = settings.max_denoising_steps or num_slots
        if num_steps % num_blocks:
            raise SettingError(
                f"`max_denoising_steps` ({num_steps}) must be a multiple of the number of blocks ({num_blocks}), "
                f"so that every block of {block_length} tokens gets as many steps."
            )
        task = GenerationTask(self, settings, inputs["input_ids"], inputs["attention_mask"], streamer, tokenizer)
        suffix = task.token_ids(settings.generation_suffix or [])
        length = int(inputs["attention_mask"].sum(1).max()) + num_slots + len(suffix)
        self._check_length(length, f"The prompt and an answer of {num_slots} token positions")
        prompt = self.model.embed(inputs["input_ids"], inputs["pixel_values"])
        answers = denoise_blocks(task, prompt, num_slots, block_length, num_steps, suffix)
        # Padding goes to the left, wherever it was: on the right it would stand between a question and its answer.
        order = inputs["attention_mask"].int().argsort(dim=1, stable=True)
        sequences = torch.cat([inputs["input_ids"].gather(1, order), answers], 1)
        task.stream(answers, final=True)
        if not settings.return_dict_in_generate:
            return sequences
        return PdlmGenerationOutput(
            sequences=sequences,
            num_forwards=task.num_forwards,
            tokens_per_forward=len(answers) * num_slots / task.num_forwards,
            history=task.history,
        )


def _chunks(prompts: list[int], counts: list[int], num_slots: int, limit: int | None) -> list[int]:
    """How many rows to take at a time, so that rows x longest row stays within `limit` tokens; at least one."""
    if limit is None:
        return [len(prompts)]
    sizes, width, height = [0], 0, 0
    for prompt, count in zip(prompts, counts, strict=True):
        width, height = max(width, prompt), max(height, count * (num_slots + 2))
        if sizes[-1] and (sizes[-1] + 1) * (width + height) > limit:
            sizes.append(0)
            width, height = prompt, count * (num_slots + 2)
        sizes[-1] += 1
    return sizes


def rows_of(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch, with their tiles."""
    tiles = slice(None)
    if inputs["image_grids"] is not None:
        ends = num_tiles(*inputs["image_grids"].unbind(-1)).cumsum(0).tolist()
        stop = min(rows.stop, len(ends))
        tiles = slice(0 if rows.start == 0 else ends[rows.start - 1], ends[stop - 1])
    per_tile = ("pixel_values", "region_masks")
    return {k: None if v is None else v[tiles if k in per_tile else rows] for k, v in inputs.items()}


__all__ = ["DenoisingStep", "PdlmGenerationConfig", "PdlmGenerationOutput"]
