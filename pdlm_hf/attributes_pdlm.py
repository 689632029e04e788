"""Typed attributes of regions: `read_attributes`, which reads every attribute of every region in one forward pass.

The canvas of an image holds any number of blocks for a region. A block sees what a caption sees, the image, the
question and the RoI tokens of its region, and of the other blocks nothing, so that their number and order do not
matter. Fixed words of a template stand in a block, and the places of attributes are open; see `templates_pdlm`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from .batching_pdlm import pad_embeds, pad_rows
from .caching_pdlm import PrefixCache
from .canvas_pdlm import as_bias
from .configuration_pdlm import PdlmConfig
from .errors_pdlm import RegionError, SettingError
from .generation_config_pdlm import PdlmGenerationConfig
from .generation_pdlm import rows_of
from .masking_pdlm import PREFIX_ONLY, SHARED
from .readings_pdlm import Answer, AttributeReader, AttributeReading, PlacedBlock, Question, answer_place, frame_block
from .templates_pdlm import AttributePlan
from .versions_pdlm import CACHE

# Token positions of a row's canvas in one forward pass, unless one block is longer: bounds the attention mask.
MOST_COLUMNS = 4096
_MAX_LOGITS = 2**26  # positions x vocabulary scored at a time
_SETTINGS = ("max_batch_tokens", "prefix_refresh_interval")  # of `generate`


@dataclass
class PdlmAttributesOutput(ModelOutput):
    """
    What `read_attributes` returns.

    Args:
        readings (`list[list[AttributeReading]]`):
            For every image its regions, in the order in which their masks were given.
        num_forwards (`int`):
            Forward passes through the language model.
    """

    readings: list[list[AttributeReading]] | None = None
    num_forwards: int | None = None


class BlockCanvas:
    """Forward passes over any number of blocks of the regions of a batch.

    Args:
        model (`PdlmForConditionalGeneration`)
        inputs (`dict`): of `generate`, for some rows.
        counts (`list[int]`): regions of every row.
        refresh (`bool`): compute the prompts in every pass anew, as the reference does; else their keys and values
            are those of the first pass. Only with `prefix_attention` "full" there is a difference.
    """

    def __init__(self, model, inputs: dict[str, Any], counts: list[int], refresh: bool):
        self.model, self.config, self.counts, self.refresh = model, model.config, counts, refresh
        real = inputs["attention_mask"]
        self.device = real.device
        visual = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        embedded = model.model.embed(inputs["input_ids"], **visual)
        self.prompt = pad_embeds([row[keep] for row, keep in zip(embedded, real, strict=True)])
        ids = [row[keep] for row, keep in zip(inputs["input_ids"], real, strict=True)]
        self.layout = model.model.region_layout(pad_rows(ids, self.config.eot_token_id, "left"))
        self.lengths = real.sum(1).tolist()
        width = self.prompt.shape[1]
        self.present = torch.arange(width, device=self.device) >= width - real.sum(1)[:, None]
        self.cache: PrefixCache | None = None
        self.num_forwards = 0

    def run(self, reader: AttributeReader) -> dict[tuple[int, int], AttributeReading]:
        """Answer a reader until it has read the attributes of every region, by row and region."""
        asking = reader.read()
        try:
            asked = next(asking)
            while True:
                asked = asking.send(self.answer(asked))
        except StopIteration as done:
            return done.value

    def answer(self, asked: Question) -> Answer:
        """Compute a logical pass. More blocks than fit at a time take several forward passes."""
        found: list[Any] = []
        done = 0
        at_once = max(1, _MAX_LOGITS // self.config.text_config.vocab_size)
        for part in self._parts(asked.blocks):
            hidden, columns = self._forward(part, whole=self.cache is None or (self.refresh and done == 0))
            here = [place for place in asked.places if done <= place.block < done + len(part)]
            for places in (here[k : k + at_once] for k in range(0, len(here), at_once)):
                rows = [part[place.block - done].row for place in places]
                states = hidden[rows, [columns[place.block - done] + place.position for place in places]]
                logs = self.model.lm_head(states).float().log_softmax(-1)
                mask = self.config.mask_token_id
                found += [answer_place(row, place.tokens, mask) for row, place in zip(logs, places, strict=True)]
            done += len(part)
        return found

    def _parts(self, blocks: list[PlacedBlock]) -> list[list[PlacedBlock]]:
        """The blocks, as many at a time as a row's canvas may hold."""
        parts: list[list[PlacedBlock]] = [[]]
        used = [0] * len(self.counts)
        for placed in blocks:
            size = len(placed.block.tokens) + 2
            if used[placed.row] and used[placed.row] + size > MOST_COLUMNS:
                parts.append([])
                used = [0] * len(self.counts)
            used[placed.row] += size
            parts[-1].append(placed)
        return parts

    def _forward(self, blocks: list[PlacedBlock], whole: bool) -> tuple[torch.Tensor, list[int]]:
        """Hidden states of the canvas `(rows, columns, hidden_size)`, and the column of each block's first token."""
        self.num_forwards += 1
        (ids, positions, codes, numbers), columns = self._canvas(blocks)
        embeds = self.model.get_input_embeddings()(ids).to(self.prompt.dtype)
        if whole:
            embeds = torch.cat([self.prompt, embeds], 1)
            positions = torch.cat([(self.present.cumsum(1) - 1).clamp_min(0), positions], 1)
            self.cache = PrefixCache()
        elif self.cache is not None:
            self.cache.make_room(embeds.shape[1])
        frozen = None if whole else self.cache
        mask = create_bidirectional_mask(
            config=self.model.model.language_model.config,
            inputs_embeds=embeds,
            attention_mask=torch.cat([self.present, codes != PREFIX_ONLY], 1).long(),
            and_mask_function=self._attention(codes, numbers),
            **{CACHE: frozen},
        )
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            mask = as_bias(mask, embeds.dtype)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: self.cache}
        ).last_hidden_state
        if whole and self.cache is not None:
            self.cache.freeze(self.prompt.shape[1])
            hidden = hidden[:, self.prompt.shape[1] :]
        return hidden, columns

    def _canvas(self, blocks: list[PlacedBlock]) -> tuple[tuple[torch.Tensor, ...], list[int]]:
        """Token ids, positions, codes of regions (see `region_layout`) and numbers of blocks, each `(rows, columns)`;
        and the column of each block's first token.
        """
        config, firsts = self.config, []
        rows: list[list[tuple[int, int, int, int]]] = [[] for _ in self.counts]
        for number, placed in enumerate(blocks):
            firsts.append(len(rows[placed.row]) + 1)
            tokens, first = frame_block(config, placed, self.counts[placed.row])
            start = self.lengths[placed.row] + first
            code = 2 * (len(config.caption_token_ids) if placed.region is None else placed.region) + 1
            rows[placed.row] += [(token, start + k, code, number) for k, token in enumerate(tokens)]
        width = max(map(len, rows))
        filler = (config.eot_token_id, 0, PREFIX_ONLY, -1)
        canvas = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=self.device)
        return tuple(canvas.unbind(-1)), firsts

    def _attention(self, codes: torch.Tensor, numbers: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The region mask, as [`~masking_pdlm.region_attention`], with any number of blocks for a region.

        With "full" a prompt row sees the first block of every region, as it sees its caption.
        """
        layout = torch.cat([self.layout, codes], 1)
        number = torch.cat([torch.full_like(self.layout, -1), numbers], 1)
        visible = number < 0
        if self.config.prefix_attention != "isolated":
            earlier = (codes[:, :, None] == codes[:, None]) & (numbers[:, None] < numbers[:, :, None])
            visible = visible | torch.cat([torch.zeros_like(self.layout, dtype=torch.bool), ~earlier.any(-1)], 1)

        def allowed(batch_idx, head_idx, q_idx, kv_idx):
            query, key = layout[batch_idx, q_idx], layout[batch_idx, kv_idx]
            same = number[batch_idx, q_idx] == number[batch_idx, kv_idx]
            seen = (key == SHARED) | (key == query - 1) | same
            return torch.where(number[batch_idx, q_idx] >= 0, seen, visible[batch_idx, kv_idx])

        return allowed


class PdlmAttributesMixin:
    """`read_attributes` of PerceptionDLM, beside `generate`."""

    config: PdlmConfig
    generation_config: PdlmGenerationConfig
    _settings: Callable[..., PdlmGenerationConfig]
    _check_length: Callable[[int, str, str], None]

    @torch.no_grad()
    def read_attributes(
        self,
        input_ids: torch.LongTensor,
        plan: AttributePlan,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_boxes: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        region_order: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        jointly: bool = False,
        calibrate: bool = False,
        generation_config: PdlmGenerationConfig | None = None,
        **kwargs: Any,
    ) -> PdlmAttributesOutput:
        """Read typed attributes of all regions together.

        Args:
            input_ids, attention_mask, pixel_values, image_grids: from the processor.
            region_masks, region_boxes, original_sizes, region_order, image_index: likewise.
            plan (`AttributePlan`): from the processor's `attribute_plan`.
            jointly (`bool`): the most certain attribute of a region is fixed and the others are read again, one pass
                an attribute, for attributes that depend on each other.
            calibrate (`bool`): divide the probabilities by those of a block that sees the image, but no region.
            generation_config (`PdlmGenerationConfig`, *optional*): of which `max_batch_tokens` and
                `prefix_refresh_interval` count; nothing is drawn at random.
            **kwargs: these two settings.

        Raises:
            RegionError: the inputs have no regions.
            SettingError: the blocks are longer than the checkpoint allows, or a setting is unknown or of captions.
        """
        if region_order is None or image_index is None:
            raise RegionError("`read_attributes` needs regions: pass `segmentation_maps` to the processor.")
        settings = self._settings(generation_config, kwargs)
        if useless := kwargs.keys() - {*_SETTINGS}:
            raise SettingError(f"`{min(useless)}` is for captions; for attributes there are {', '.join(_SETTINGS)}.")
        counts = (region_order >= 0).sum(1).tolist()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask.bool(),
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "region_masks": region_masks,
            "region_boxes": region_boxes,
            "original_sizes": original_sizes,
        }
        lengths = mask.sum(1).tolist()
        self._check_blocks(plan, max(lengths), max(counts))
        interval = settings.prefix_refresh_interval
        refresh = self.config.prefix_attention == "full" and interval != 0
        images: list[list[AttributeReading]] = [[] for _ in range(int(image_index.max()) + 1)]
        for index, order in zip(image_index.tolist(), region_order.tolist(), strict=True):
            images[index] += [AttributeReading() for k in order if k >= 0]
        forwards, threshold = 0, self.generation_config.acceptance_threshold
        for rows in _row_chunks(lengths, counts, plan, settings.max_batch_tokens):
            canvas = BlockCanvas(self, rows_of(inputs, rows), counts[rows], refresh)
            reader = AttributeReader(plan, counts[rows], jointly, calibrate, threshold)
            for (row, k), reading in canvas.run(reader).items():
                at = rows.start + row
                images[int(image_index[at])][int(region_order[at, k])] = reading
            forwards += canvas.num_forwards
        return PdlmAttributesOutput(readings=images, num_forwards=forwards)

    def _check_blocks(self, plan: AttributePlan, prompt: int, most: int) -> None:
        """Raises: SettingError if a block is longer than the checkpoint has positions for."""
        rows = prompt + most * (plan.longest + 2)
        advice = "Give a shorter template or shorter free texts, or ask for less"
        self._check_length(rows, f"The prompt and blocks of {plan.longest} tokens", advice)


def _row_chunks(lengths: Sequence[int], counts: Sequence[int], plan: AttributePlan, limit: int | None) -> list[slice]:
    """Rows to take at a time, so that rows x longest row stays within `limit` tokens; at least one."""
    size = plan.rows
    sizes = [n + min(MOST_COLUMNS, count * size) for n, count in zip(lengths, counts, strict=True)]
    chunks, first = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or (limit and max(sizes[first : stop + 1]) * (stop + 1 - first) > limit):
            chunks.append(slice(first, stop))
            first = stop
    return chunks
