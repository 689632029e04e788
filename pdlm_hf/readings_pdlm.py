"""How attributes of regions are read: which blocks a model is to compute, and what follows from its answers.

A reader computes nothing itself. It asks for log-probabilities in blocks of tokens, one question a forward pass, and
whoever has a model answers: `read_attributes` of transformers, and the vLLM plugin.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import torch

from .configuration_pdlm import PdlmConfig
from .templates_pdlm import AttributePlan, Block, Read


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
class PlacedBlock:
    """A block of a region.

    Args:
        row (`int`): of the batch.
        region (`int`): of the row, in the model's order; None: a block without a region.
        block (`Block`): its tokens.
    """

    row: int
    region: int | None
    block: Block


@dataclass
class Place:
    """What to read at one position.

    Args:
        block (`int`): number of the block, among those of the question.
        position (`int`): in the block.
        tokens (`list[int]`, *optional*): whose log-probabilities are wanted, among all tokens; None: the most probable
            token that is not the mask.
    """

    block: int
    position: int
    tokens: list[int] | None = None


@dataclass
class Question:
    """What one logical forward pass is to answer.

    Args:
        blocks (`list[PlacedBlock]`): in the order of rows and regions.
        places (`list[Place]`): block by block.
    """

    blocks: list[PlacedBlock]
    places: list[Place]


# Of every place: log-probabilities, float32 `(tokens,)`; without tokens, the most probable one's, and that token.
Answer = Sequence[Any]
Regions = tuple[int, int]  # row, region


def answer_place(log_probs: torch.Tensor, tokens: list[int] | None, mask_id: int) -> Any:
    """The answer for a place.

    Args:
        log_probs (`torch.FloatTensor` of shape `(vocab_size,)`): changed in place.
        tokens (`list[int]`, *optional*), mask_id (`int`): see [`Place`].
    """
    if tokens is not None:
        return log_probs[tokens]
    log_probs[mask_id] = -torch.inf
    best, token = log_probs.max(0)
    return float(best), int(token)


def frame_block(config: PdlmConfig, placed: PlacedBlock, count: int) -> tuple[list[int], int]:
    """Tokens of a block as it stands in the canvas, and the position of the first of them behind the prompt.

    A block stands where it would stand if every region had this one: its positions do not depend on the others.

    Args:
        config (`PdlmConfig`)
        placed (`PlacedBlock`)
        count (`int`): regions of the row.
    """
    region = placed.region or 0
    close = config.eot_token_id if region == count - 1 else config.newline_token_id
    tokens = [config.caption_token_ids[region], *placed.block.tokens, close]
    return tokens, region * len(tokens)


class AttributeReader:
    """Reads the attributes of the regions of some rows.

    Args:
        plan (`AttributePlan`)
        counts (`list[int]`): regions of every row.
        jointly (`bool`): the most certain attribute of a region first, and the others given it.
        calibrate (`bool`): divide by the probabilities of a block without a region.
        threshold (`float`): free texts accept tokens with a higher probability.
    """

    def __init__(
        self, plan: AttributePlan, counts: Sequence[int], jointly: bool, calibrate: bool, threshold: float | None
    ):
        self.plan, self.counts, self.jointly, self.calibrate = plan, counts, jointly, calibrate
        self.threshold = threshold or 0.8
        self.regions = [(row, k) for row, count in enumerate(counts) for k in range(count)]
        self.readings = {region: AttributeReading() for region in self.regions}

    def read(self) -> Generator[Question, Any, dict[Regions, AttributeReading]]:
        """Yields a question for each logical pass, is sent its answer, and returns the attributes of every region."""
        names = self.plan.with_choices
        fixed: dict[Regions, dict[str, int]] = {region: {} for region in self.regions}
        for _ in range(len(names) if self.jointly else min(1, len(names))):
            found = yield from self._pass(fixed)
            for region, values_of in found.items():
                best = {name: max(values) for name, (values, _) in values_of.items()}
                certain = max(best, key=best.__getitem__)
                for name in [certain] if self.jointly else names:
                    values, support = values_of[name]
                    self.readings[region].probabilities[name] = values
                    self.readings[region].support[name] = support
                    fixed[region][name] = values.index(max(values))
        if self.plan.texts:
            yield from self._write_texts(fixed)
        return self.readings

    def _pass(self, fixed: dict[Regions, dict[str, int]]) -> Generator[Question, Any, dict[Regions, Any]]:
        """Probabilities of the choices, and support, of every attribute that is not fixed, for every region."""
        asked = Question([], [])
        reads: list[tuple[tuple[int, int | None], int, Read]] = []  # region, template, what to read
        for region in self._asked(fixed):
            for template, own in enumerate(self.plan.blocks(fixed.get(region, {}))):
                for block in own:
                    asked.places += [Place(len(asked.blocks), read.position, read.tokens) for read in block.reads]
                    reads += [(region, template, read) for read in block.reads]
                    asked.blocks.append(PlacedBlock(region[0], region[1], block))
        scores: dict[tuple, torch.Tensor] = {}
        support: dict[tuple, list[float]] = {}
        for (region, template, read), options in zip(reads, (yield asked), strict=True):
            total, last = options.logsumexp(0), len(read.choices) - 1
            if len(options) > len(read.choices):  # several tokens end the same choice
                options = torch.cat([options[:last], options[last:].logsumexp(0, keepdim=True)])
            key = (region, read.name, template)
            if key not in scores:
                scores[key] = torch.zeros(len(self.plan.choices[read.name]), device=options.device)
            numbers = [number for choices in read.choices for number in choices]
            scores[key][numbers] += (options - total)[[k for k, choices in enumerate(read.choices) for _ in choices]]
            if read.is_first:
                support.setdefault((region, read.name), []).append(float(total.exp().clamp_max(1)))
        return self._normalised(scores, support)

    def _asked(self, fixed: dict[Regions, dict[str, int]]) -> list[tuple[int, Any]]:
        """The regions to read, and with `calibrate` one block without a region for every row."""
        nothing = [(row, None) for row in range(len(self.counts))] if self.calibrate else []
        return [*self.regions, *nothing]

    def _normalised(self, scores: dict[tuple, torch.Tensor], support: dict[tuple, list[float]]) -> dict[Regions, Any]:
        """Means over the templates, as `{region: {name: (probabilities, support)}}`."""
        found: dict[Regions, dict[str, tuple[list[float], float]]] = {region: {} for region in self.regions}
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

    def _write_texts(self, fixed: dict[Regions, dict[str, int]]) -> Generator[Question, Any, None]:
        """Fill the free texts of all regions together; a pass accepts certain tokens, and one of each at least."""
        writing = {
            (region, name): (self.plan.text_block(name, fixed[region]), self.plan.lengths[name])
            for region in self.regions
            for name in self.plan.texts
        }
        written: dict[tuple, dict[int, float]] = {key: {} for key in writing}
        active = list(writing)
        while active:
            asked = Question([PlacedBlock(*region, writing[region, name][0]) for region, name in active], [])
            for n, (key, placed) in enumerate(zip(active, asked.blocks, strict=True)):
                tokens, length = placed.block.tokens, writing[key][1]
                still = (at for at in range(len(tokens) - length, len(tokens)) if tokens[at] == self.plan.mask_id)
                asked.places += [Place(n, at) for at in still]
            drafts: dict[int, list[tuple[float, int, int]]] = {}
            for place, (log_prob, token) in zip(asked.places, (yield asked), strict=True):
                drafts.setdefault(place.block, []).append((exp(log_prob), token, place.position))
            for n, key in enumerate(active):
                top = max(drafts[n], key=lambda draft: draft[0])
                for draft in drafts[n]:
                    if draft is top or draft[0] > self.threshold:
                        probability, token, at = draft
                        written[key][at], writing[key][0].tokens[at] = probability, token
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
