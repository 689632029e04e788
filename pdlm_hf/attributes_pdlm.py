"""Typed attributes of regions: `read_attributes`, which reads every attribute of every region in one forward pass.

The canvas of an image holds any number of blocks for a region. A block sees what a caption sees, the image, the
question and the RoI tokens of its region, and of the other blocks nothing, so that their number and order do not
matter. Fixed words of a template stand in a block, and the places of attributes are open; see `templates_pdlm`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from .caching_pdlm import PrefixCache
from .canvas_pdlm import as_bias
from .configuration_pdlm import PdlmConfig
from .errors_pdlm import RegionError
from .generation_config_pdlm import PdlmGenerationConfig
from .generation_pdlm import rows_of
from .masking_pdlm import PREFIX_ONLY, SHARED
from .templates_pdlm import AttributePlan, Block, Read
from .versions_pdlm import CACHE

# Token positions of a row's canvas in one forward pass, unless one block is longer: bounds the attention mask.
MOST_COLUMNS = 4096
_MAX_LOGITS = 2**26  # positions x vocabulary scored at a time

_T = TypeVar("_T")


@dataclass
class AttributeReading:
    """The attributes of one region.

    Args:
        probabilities (`dict[str, list[float]]`): of the choices of every attribute with choices, in their order.
        support (`dict[str, float]`): the share of the model's probability that fell on the choices at all, at the
            first token of the attribute: near 0 if it would rather write something else.
        texts (`dict[str, list[int]]`): tokens of every free text.
        text_scores (`dict[str, float]`): mean probability of those tokens, each as of the pass that wrote it.
    """

    probabilities: dict[str, list[float]] = field(default_factory=dict)
    support: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)
    text_scores: dict[str, float] = field(default_factory=dict)


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


@dataclass
class _Placed:
    """A block of a region.

    Args:
        row (`int`): of the batch.
        region (`int`): of the row, in the model's order; None: a block without a region.
        block (`Block`): its tokens.
        column (`int`): of its first token position in the row's canvas, once it has one.
    """

    row: int
    region: int | None
    block: Block
    column: int = 0


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
        left = partial(pad_sequence, batch_first=True, padding_side="left")
        self.prompt = left([row[keep] for row, keep in zip(embedded, real, strict=True)])
        ids = [row[keep] for row, keep in zip(inputs["input_ids"], real, strict=True)]
        self.layout = model.model.region_layout(left(ids, padding_value=self.config.eot_token_id))
        self.lengths = real.sum(1).tolist()
        width = self.prompt.shape[1]
        self.present = torch.arange(width, device=self.device) >= width - real.sum(1)[:, None]
        self.cache: PrefixCache | None = None
        self.num_forwards = 0

    def read(
        self, blocks: list[_Placed], places: list[tuple[int, int]], take: Callable[[int, torch.Tensor], _T]
    ) -> list[_T]:
        """What `take` makes of the log-probabilities of all tokens at some places.

        Args:
            blocks (`list[_Placed]`): all of one logical pass; more than fit at a time take several forward passes.
            places (`list[tuple[int, int]]`): number of the block, and position in it, block by block.
            take: gets the number of the place, and its log-probabilities, float32 `(vocab_size,)`, of which no more
                exist than fit in memory.
        """
        found: list[_T] = []
        done = 0
        at_once = max(1, _MAX_LOGITS // self.config.text_config.vocab_size)
        for part in self._parts(blocks):
            hidden = self._forward(part, whole=self.cache is None or (self.refresh and done == 0))
            here = [(part[n - done], at) for n, at in places if done <= n < done + len(part)]
            rows, columns = [placed.row for placed, _ in here], [placed.column + at for placed, at in here]
            for states in hidden[rows, columns].split(at_once) if here else ():
                logs = self.model.lm_head(states).float().log_softmax(-1)
                found += [take(len(found) + k, row) for k, row in enumerate(logs)]
            done += len(part)
        return found

    def _parts(self, blocks: list[_Placed]) -> list[list[_Placed]]:
        """The blocks, as many at a time as a row's canvas may hold; sets their columns."""
        parts: list[list[_Placed]] = [[]]
        used = [0] * len(self.counts)
        for placed in blocks:
            size = len(placed.block.tokens) + 2
            if used[placed.row] and used[placed.row] + size > MOST_COLUMNS:
                parts.append([])
                used = [0] * len(self.counts)
            placed.column = used[placed.row] + 1
            used[placed.row] += size
            parts[-1].append(placed)
        return parts

    def _forward(self, blocks: list[_Placed], whole: bool) -> torch.Tensor:
        """Hidden states of the canvas `(rows, columns, hidden_size)`."""
        self.num_forwards += 1
        ids, positions, codes, numbers = self._canvas(blocks)
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
        return hidden

    def _canvas(self, blocks: list[_Placed]) -> tuple[torch.Tensor, ...]:
        """Token ids, positions, codes of regions (see `region_layout`) and numbers of blocks, each `(rows, columns)`.

        A block stands where it would stand if every region had this one: its positions do not depend on the others.
        """
        config = self.config
        rows: list[list[tuple[int, int, int, int]]] = [[] for _ in self.counts]
        for number, placed in enumerate(blocks):
            region, count = placed.region or 0, self.counts[placed.row]
            close = config.eot_token_id if region == count - 1 else config.newline_token_id
            tokens = [config.caption_token_ids[region], *placed.block.tokens, close]
            start = self.lengths[placed.row] + region * len(tokens)
            code = 2 * (len(config.caption_token_ids) if placed.region is None else region) + 1
            rows[placed.row] += [(token, start + k, code, number) for k, token in enumerate(tokens)]
        width = max(map(len, rows))
        filler = (config.eot_token_id, 0, PREFIX_ONLY, -1)
        canvas = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=self.device)
        return tuple(canvas.unbind(-1))

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


class AttributeReader:
    """Reads the attributes of the regions of some rows.

    Args:
        canvas (`BlockCanvas`)
        plan (`AttributePlan`)
        calibrate (`bool`): divide by the probabilities of a block without a region.
    """

    def __init__(self, canvas: BlockCanvas, plan: AttributePlan, calibrate: bool):
        self.canvas, self.plan, self.calibrate = canvas, plan, calibrate
        self.regions = [(row, k) for row, count in enumerate(canvas.counts) for k in range(count)]
        self.readings = {region: AttributeReading() for region in self.regions}

    def read(self, jointly: bool) -> dict[tuple[int, int], AttributeReading]:
        """Read every attribute: all at once, or with `jointly` the most certain first; then free texts."""
        names = self.plan.with_choices
        fixed: dict[tuple[int, int], dict[str, int]] = {region: {} for region in self.regions}
        for _ in range(len(names) if jointly else min(1, len(names))):
            for region, found in self._pass(fixed).items():
                best = {name: max(values) for name, (values, _) in found.items()}
                certain = max(best, key=best.__getitem__)
                for name in [certain] if jointly else names:
                    values, support = found[name]
                    self.readings[region].probabilities[name] = values
                    self.readings[region].support[name] = support
                    fixed[region][name] = values.index(max(values))
        if self.plan.texts:
            self._write_texts(fixed)
        return self.readings

    def _pass(self, fixed: dict[tuple[int, int], dict[str, int]]):
        """Probabilities of the choices, and support, of every attribute that is not fixed, for every region."""
        blocks: list[_Placed] = []
        places: list[tuple[int, int]] = []
        reads: list[tuple[tuple[int, int | None], int, Read]] = []  # region, template, what to read
        for region in self._asked(fixed):
            for template, own in enumerate(self.plan.blocks(fixed.get(region, {}))):
                for block in own:
                    places += [(len(blocks), read.position) for read in block.reads]
                    reads += [(region, template, read) for read in block.reads]
                    blocks.append(_Placed(region[0], region[1], block))
        options_of = self.canvas.read(blocks, places, lambda k, row: row[reads[k][2].tokens])
        scores: dict[tuple, torch.Tensor] = {}
        support: dict[tuple, list[float]] = {}
        for (region, template, read), options in zip(reads, options_of, strict=True):
            total = options.logsumexp(0)
            key = (region, read.name, template)
            if key not in scores:
                scores[key] = torch.zeros(len(self.plan.choices[read.name]), device=options.device)
            for score, choices in zip(options - total, read.choices, strict=True):
                scores[key][choices] += score
            if read.is_first:
                support.setdefault((region, read.name), []).append(float(total.exp().clamp_max(1)))
        return self._normalised(scores, support)

    def _asked(self, fixed) -> list[tuple[int, Any]]:
        """The regions to read, and with `calibrate` one block without a region for every row."""
        nothing = [(row, None) for row in range(len(self.canvas.counts))] if self.calibrate else []
        return [*self.regions, *nothing]

    def _normalised(self, scores: dict[tuple, torch.Tensor], support: dict[tuple, list[float]]):
        """Means over the templates, as `{region: {name: (probabilities, support)}}`."""
        found: dict[tuple[int, int], dict[str, tuple[list[float], float]]] = {region: {} for region in self.regions}
        templates = range(max(1, len(self.plan.templates)))
        for region, name in support:
            if region[1] is None:
                continue
            parts = []
            for template in templates:
                score = scores[region, name, template]
                if self.calibrate and ((region[0], None), name, template) in scores:
                    score = score - scores[(region[0], None), name, template]
                parts.append(score.softmax(0))
            mean = torch.stack(parts).double().mean(0)
            values = support[region, name]
            found[region][name] = ((mean / mean.sum()).tolist(), sum(values) / len(values))
        return found

    def _write_texts(self, fixed: dict[tuple[int, int], dict[str, int]]) -> None:
        """Fill the free texts of all regions together; a pass accepts certain tokens, and one of each at least."""
        mask, threshold = self.plan.mask_id, self.canvas.model.generation_config.acceptance_threshold or 0.8
        writing = {
            (region, name): (self.plan.text_block(name, fixed[region]), self.plan.lengths[name])
            for region in self.regions
            for name in self.plan.texts
        }
        written: dict[tuple, dict[int, float]] = {key: {} for key in writing}
        active = list(writing)
        while active:
            blocks = [_Placed(*region, writing[region, name][0]) for region, name in active]
            places = [(n, at) for n, b in enumerate(blocks) for at, t in enumerate(b.block.tokens) if t == mask]
            open_places = [(n, at) for n, at in places if at >= len(blocks[n].block.tokens) - writing[active[n]][1]]
            drafts = self.canvas.read(blocks, open_places, partial(_draft, mask))
            for n, key in enumerate(active):
                mine = [k for k, (number, _) in enumerate(open_places) if number == n]
                top = max(mine, key=lambda k: drafts[k][0])
                for k in mine:
                    if k == top or drafts[k][0] > threshold:
                        written[key][open_places[k][1]], writing[key][0].tokens[open_places[k][1]] = drafts[k]
            active = [key for key in active if self._is_open(*writing[key], key[1])]
        for (region, name), (block, length) in writing.items():
            tokens = block.tokens[-length:]
            stop = self._end(tokens, name)
            first = len(block.tokens) - length
            scores = [written[region, name][first + k] for k in range(min(stop + 1, length))]
            self.readings[region].texts[name] = tokens[:stop]
            self.readings[region].text_scores[name] = sum(scores) / len(scores)

    def _end(self, tokens: list[int], name: str) -> int:
        ends = self.plan.ends_of(name)
        return next((k for k, token in enumerate(tokens) if token in ends), len(tokens))

    def _is_open(self, block: Block, length: int, name: str) -> bool:
        """Whether a free text has an open position before its end."""
        tokens = block.tokens[-length:]
        return self.plan.mask_id in tokens[: self._end(tokens, name)]


def _draft(mask: int, number: int, log_probs: torch.Tensor) -> tuple[float, int]:
    """Probability of the most probable token, and the token, which is not the mask."""
    log_probs[mask] = -torch.inf
    best, token = log_probs.max(0)
    return float(best.exp()), int(token)


class PdlmAttributesMixin:
    """`read_attributes` of PerceptionDLM, beside `generate`."""

    config: PdlmConfig
    _settings: Callable[..., PdlmGenerationConfig]
    _check_length: Callable[[int, str], None]

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
            generation_config, **kwargs: of these settings of `generate` `max_batch_tokens` and
                `prefix_refresh_interval` count; nothing is drawn at random.

        Raises:
            RegionError: the inputs have no regions.
            SettingError: the blocks are longer than the checkpoint allows.
        """
        if region_order is None or image_index is None:
            raise RegionError("`read_attributes` needs regions: pass `segmentation_maps` to the processor.")
        settings = self._settings(generation_config, kwargs)
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
        forwards = 0
        for rows in _row_chunks(lengths, counts, plan, settings.max_batch_tokens):
            canvas = BlockCanvas(self, rows_of(inputs, rows), counts[rows], refresh)
            readings = AttributeReader(canvas, plan, calibrate).read(jointly)
            for (row, k), reading in readings.items():
                at = rows.start + row
                images[int(image_index[at])][int(region_order[at, k])] = reading
            forwards += canvas.num_forwards
        return PdlmAttributesOutput(readings=images, num_forwards=forwards)

    def _check_blocks(self, plan: AttributePlan, prompt: int, most: int) -> None:
        """Raises: SettingError if a block is longer than the checkpoint has positions for."""
        blocks = [block for template in plan.blocks({}) for block in template]
        longest = max([len(block.tokens) for block in blocks] + list(plan.lengths.values()))
        self._check_length(prompt + most * (longest + 2), f"The prompt and templates of {longest} tokens")


def _row_chunks(lengths: Sequence[int], counts: Sequence[int], plan: AttributePlan, limit: int | None) -> list[slice]:
    """Rows to take at a time, so that rows x longest row stays within `limit` tokens; at least one."""
    size = sum(len(block.tokens) + 2 for template in plan.blocks({}) for block in template)
    sizes = [n + min(MOST_COLUMNS, count * size) for n, count in zip(lengths, counts, strict=True)]
    chunks, first = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or (limit and max(sizes[first : stop + 1]) * (stop + 1 - first) > limit):
            chunks.append(slice(first, stop))
            first = stop
    return chunks
