"""Make training batches with noise from images with captioned regions, or from conversations."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..diffusion_pdlm import NOISE_FLOOR, noise_probability
from ..errors_pdlm import DataError, SettingError
from ..image_processing_pdlm import to_rgb
from ..processing_pdlm import PdlmProcessor, area_order
from ..prompts_pdlm import CAPTION, END_OF_TURN
from ..templates_pdlm import AttributePlan
from ..tiling_pdlm import num_tiles

Content = str | tuple[list[int], list[int]]  # a caption, or the token ids and labels of a block


def partition_regions(num_regions: int, num_prompts: int, index: int, epoch: int) -> list[list[int]]:
    """Split the regions of an image into groups that fit one forward pass, as the reference does: shuffled, of nearly
    equal size.

    Args:
        num_regions (`int`): number of regions of the image.
        num_prompts (`int`): number P of region prompts; groups hold about (1 + P) / 2 regions.
        index (`int`): position of the image in the data set.
        epoch (`int`): number of the epoch; the groups change with it.

    Returns:
        `list[list[int]]`: positions of the regions of every group.
    """
    num_groups = max(1, math.ceil(num_regions / ((1 + num_prompts) / 2)))
    order = list(range(num_regions))
    random.Random(index * 100003 + epoch * 999983).shuffle(order)
    base, extra = divmod(num_regions, num_groups)
    groups, start = [], 0
    for group in range(num_groups):
        size = base + (group < extra)
        groups.append(order[start : start + size])
        start += size
    return groups


class PdlmCollator:
    """Makes a batch with labels and noise from rows, as the reference does (docs/quirks.md#q7, docs/quirks.md#q16).

    A row is `{"image": image, "regions": [{"mask": (H, W), "caption": str}, ...], "question": str (optional)}` for
    regions, or `{"images": [...], "messages": [{"role", "content"}, ...]}` for the base model. In place of its caption
    a region may have a "block", the token ids and labels of its token positions; beside it or in its place
    "attributes", the texts of its values by name.

    Random numbers are drawn in the reference's order: t per sample, then one uniform number per token (in replacement
    mode the same again, and the replacement tokens). If every row has a "seed", the noise, slots and prompt ids of a
    row depend on its seed only, not on earlier batches or on the other rows of its batch: a resumed run draws the same
    numbers, and so do several processes that share the rows of one. Such a row may have a "mask_probability", which
    then replaces the drawn one.

    Args:
        processor (`PdlmProcessor`): the checkpoint's processor.
        num_slots (`int` or `tuple[int, int]`, *optional*): write every caption into this many token positions (slots),
            padded with end-of-turn, as at inference; only the slots are labelled. A pair is a range, from which every
            batch draws, or every row if rows have seeds. None: the reference's layout, in which captions have their
            own length and everything behind the assistant header is labelled.
        noise_floor (`float`): lowest masking probability; 1e-3 in the reference.
        prompt_ids (`str`): "random": any of the P region prompts, as the reference trains; "ordered": 0, 1, 2, ... as
            at inference.
        at_least_one (`bool`, *optional*): mask at least one labelled token of every row, or a row teaches nothing: an
            answer of n tokens has none with a chance of 1 / (n + 1). `mask_probability` is then the probability that a
            token is masked in either way, so that the expectation of the loss stays the same. None: only with
            `num_slots`, which is not the reference's layout; the reference has rows without a masked token.
        replacement_noise (`bool`): also draw `replacement_ids` (for `replacement_noise_mode`).
        vocab_size (`int`, *optional*): rows of the embedding; needed for replacement noise.
        generator (`torch.Generator`, *optional*): for repeatable noise.
        attributes (`AttributePlan`, *optional*): the attributes to teach, from the processor's `attribute_plan`. A row
            teaches the captions of its regions, or one of the blocks that their attributes are read from, with their
            values as labels.
        attribute_share (`float`): share of the rows that teach attributes, of those that have captions, too.

    Raises:
        SettingError: `prompt_ids` has another value, or replacement noise is asked for without `vocab_size`.
    """

    def __init__(
        self,
        processor: PdlmProcessor,
        num_slots: int | tuple[int, int] | None = None,
        noise_floor: float = NOISE_FLOOR,
        prompt_ids: str = "random",
        at_least_one: bool | None = None,
        replacement_noise: bool = False,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        attributes: AttributePlan | None = None,
        attribute_share: float = 0.5,
    ):
        if prompt_ids not in ("random", "ordered"):
            raise SettingError(f'`prompt_ids` must be "random" or "ordered", got {prompt_ids!r}.')
        if replacement_noise and vocab_size is None:
            raise SettingError("`replacement_noise` needs `vocab_size`.")
        self.processor = processor
        self.num_slots = num_slots
        self.noise_floor = noise_floor
        self.prompt_ids = prompt_ids
        self.at_least_one = num_slots is not None if at_least_one is None else at_least_one
        self.replacement_noise = replacement_noise
        self.vocab_size = vocab_size
        self.generator = generator
        self.attributes = attributes
        self.attribute_share = attribute_share

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Encode rows, pad them on the right and draw their noise.

        Raises:
            DataError: a row has too many regions, or a caption does not fit.
            RegionError: a mask is empty or has another size than its image.
            SettingError: a caption has special tokens.
        """
        generators = None
        if all("seed" in row for row in rows):
            generators = [torch.Generator().manual_seed(row["seed"]) for row in rows]
        slots = [self.slots(g) for g in generators] if generators else [self.slots(self.generator)] * len(rows)
        encode = {True: self.encode_regions, False: self.encode_chat}
        encoded = [encode["regions" in r](r, r.get("num_slots", n)) for r, n in zip(rows, slots, strict=True)]
        batch = self.processor.pad(encoded, "right")
        return batch | (self._row_noise(rows, encoded, generators) if generators else self.noise(batch["labels"]))

    def _row_noise(
        self, rows: Sequence[dict[str, Any]], encoded: list[dict[str, Any]], generators: list[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """Draw the [`noise`] of each row separately, over its own length, so that it does not depend on padding."""
        labels = [torch.tensor([row["labels"]]) for row in encoded]
        levels = [row.get("mask_probability") for row in rows]
        drawn = [self.noise(*row) for row in zip(labels, generators, levels, strict=True)]
        noise = {"mask_probability": torch.cat([row["mask_probability"] for row in drawn])}
        for name, padding in (("noise_mask", False), ("replacement_ids", -1)):
            if name in drawn[0]:
                tokens = [row[name][0] for row in drawn]
                noise[name] = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding)
        return noise

    def slots(self, generator: torch.Generator | None) -> int | None:
        """Return the number of token positions of a caption: the setting, or a number drawn from its range."""
        if not isinstance(self.num_slots, tuple):
            return self.num_slots
        low, high = self.num_slots
        return int(torch.randint(low, high + 1, (), generator=generator))

    def encode_regions(self, row: dict[str, Any], num_slots: int | None = None) -> dict[str, Any]:
        """Encode one image with captioned regions, without noise.

        Args:
            row (`dict`): see [`PdlmCollator`].
            num_slots (`int`, *optional*): token positions per caption.

        Raises:
            DataError: there are too many regions, or a caption does not fit.
            RegionError: a mask is empty or has another size than the image.
            SettingError: a caption has special tokens.
        """
        image = to_rgb(row["image"])
        masks = self.processor.binary_masks(image, [region["mask"] for region in row["regions"]])
        limit = self.processor.image_processor.num_region_prompts
        if len(masks) > limit:
            raise DataError(
                f"{len(masks)} regions, but the checkpoint has {limit} region prompts. Split them with "
                "`partition_regions`."
            )
        order = area_order(masks)
        contents = self._contents(row, order)
        prompts = list(range(limit))
        if self.prompt_ids == "random":
            (random.Random(row["seed"]) if "seed" in row else random).shuffle(prompts)
        answer, labels = self.answer(contents, num_slots)
        encoded = self.processor.region_row(
            image, [masks[k] for k in order], row.get("question"), prompts[: len(masks)], answer
        )
        encoded["labels"] = [-100] * (len(encoded["input_ids"]) - len(labels)) + labels
        return encoded

    def _contents(self, row: dict[str, Any], order: Sequence[int]) -> list[Content]:
        """What the regions of a row teach, in this order: captions, or one block of attributes, the same for all."""
        regions = [row["regions"][k] for k in order]
        contents = [region.get("block") or region.get("caption") for region in regions]
        if self.attributes is not None:
            self._put_attributes(self.attributes, row, regions, contents)
        for k, content in zip(order, contents, strict=True):
            if content is None:
                raise DataError(f"region {k} has no caption, and none of the attributes that are taught.")
        return contents

    def _put_attributes(
        self, plan: AttributePlan, row: dict[str, Any], regions: list[dict[str, Any]], contents: list[Any]
    ) -> None:
        """Put blocks of attributes in place of captions, if the row is to teach them or a region has no caption."""
        rng = random.Random(f"attributes {row['seed']}") if "seed" in row else random
        taught = rng.random() < self.attribute_share
        template = rng.randrange(max(1, len(plan.templates)))
        known = [{n: v for n, v in (r.get("attributes") or {}).items() if n in plan.choices} for r in regions]
        names = plan.lessons(name for values in known for name in values)
        common = rng.choice(names) if names else ""
        for k, values in enumerate(known):
            if values and (taught or contents[k] is None):
                try:
                    contents[k] = plan.lesson(common, values, template)
                    if set(contents[k][1]) == {-100}:  # nothing that the others teach is known of this region
                        contents[k] = plan.lesson(rng.choice(plan.lessons(values)), values, template)
                except SettingError as error:
                    raise DataError(f"region {regions[k].get('id', k)!r}: {error}") from None

    def answer(self, contents: Sequence[Content], num_slots: int | None) -> tuple[list[int], list[int]]:
        """Encode captions, in the order of the regions.

        Args:
            contents (`Sequence`): the captions, or the token ids and labels of their blocks.
            num_slots (`int`, *optional*): token positions per caption.

        Returns:
            ids and labels of the caption blocks.

        Raises:
            DataError: a caption has more tokens than positions.
            SettingError: a caption has special tokens.
        """
        tokenizer = self.processor.tokenizer
        end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        labels: list[int] = []
        for k, content in enumerate(contents):
            is_last = k == len(contents) - 1
            if isinstance(content, str):
                self.processor.refuse_specials(content, f"caption of region {k}")
                if num_slots is None:  # all is labelled
                    text = CAPTION.format(k) + content + (END_OF_TURN if is_last else "\n")
                    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                    ids, labels = ids + tokens, labels + tokens
                    continue
                content = self._block(k, content, num_slots, end)
            close = [end] if is_last else newline
            ids += [tokenizer.convert_tokens_to_ids(CAPTION.format(k)), *content[0], *close]
            labels += [-100, *content[1], *[-100] * len(close)]
        return ids, labels

    def _block(self, k: int, caption: str, num_slots: int, end: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a caption, padded with end-of-turn. Raises: DataError: it has too many tokens."""
        tokens = self.processor.tokenizer(caption, add_special_tokens=False)["input_ids"]
        if len(tokens) > num_slots:
            raise DataError(
                f"caption of region {k} has {len(tokens)} tokens, more than the {num_slots} positions. Shorten it "
                f"or raise `num_slots`: {caption[:60]!r}"
            )
        tokens = tokens + [end] * (num_slots - len(tokens))
        return tokens, list(tokens)

    def encode_chat(self, row: dict[str, Any], num_slots: int | None = None) -> dict[str, Any]:
        """Encode one conversation, without noise. The assistant's turns and their end-of-turn tokens are labelled.

        Args:
            row (`dict`): see [`PdlmCollator`].
            num_slots (`int`, *optional*): the prompt is then that of inference, and the last answer takes at least
                this many token positions, padded with end-of-turn.
        """
        processor = self.processor
        images = [to_rgb(image) for image in row.get("images", [])]
        visual, tiles = {}, []
        if images:
            visual = processor.image_processor.preprocess(
                images, max_tiles=1 if len(images) > 1 else None, return_tensors="pt"
            )
            tiles = [num_tiles(*grid) for grid in visual["image_grids"].tolist()]
        if num_slots is not None:
            *conversation, last = row["messages"]
            prompt = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            ids = processor.encode_prompt(prompt, tiles)
            answer = processor.tokenizer(last["content"] + END_OF_TURN, add_special_tokens=False)["input_ids"]
            answer += answer[-1:] * (num_slots - len(answer))
            return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer, **visual}
        ids, labels = self.conversation(row["messages"], tiles)
        return {"input_ids": ids, "labels": labels, **visual}

    def conversation(self, messages: list[dict[str, Any]], tiles: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation; only the assistant's turns have labels.

        Args:
            messages (`list[dict]`): see [`PdlmCollator`].
            tiles (`list[int]`): tiles of every image in it.
        """
        processor = self.processor
        ids, labels, done, used = [], [], "", 0
        for turn, message in enumerate(messages):
            answering = message["role"] == "assistant"
            so_far = messages[: turn + 1]
            # everything up to the answer, then the answer with its end-of-turn
            pieces = [(so_far[:-1], True, False), (so_far, False, True)] if answering else [(so_far, False, False)]
            for part, header, labelled in pieces:
                text = processor.apply_chat_template(part, tokenize=False, add_generation_prompt=header, training=True)
                piece, done = text[len(done) :], text
                count = piece.count("<IMG_CONTEXT>")
                tokens = processor.encode_prompt(piece, tiles[used : used + count])
                used += count
                ids += tokens
                labels += tokens if labelled else [-100] * len(tokens)
        return ids, labels

    def noise(
        self, labels: torch.Tensor, generator: torch.Generator | None = None, level: float | None = None
    ) -> dict[str, torch.Tensor]:
        """Draw a noise level per row and mask labelled tokens with its probability.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 for tokens without label.
            generator (`torch.Generator`, *optional*): default: the collator's.
            level (`float`, *optional*): the masking probability, instead of a drawn one; 1 = an empty canvas.

        Returns:
            noise_mask (bool, same shape) and mask_probability `(batch_size,)`; replacement_ids in replacement mode.
        """
        generator = generator or self.generator
        probability = noise_probability(torch.rand(len(labels), generator=generator), self.noise_floor)
        if level is not None:
            probability = torch.full_like(probability, level)
        uniform = torch.rand(labels.shape, generator=generator)
        labelled = labels != -100
        masked = (uniform < probability[:, None]) & labelled
        if self.at_least_one:
            # the token with the lowest number, so that nothing more is drawn
            masked |= labelled & (uniform == uniform.masked_fill(~labelled, 2).amin(1, keepdim=True))
            count = labelled.sum(1).clamp_min(1)
            probability = probability + (1 - probability) ** count / count
        out = {"noise_mask": masked, "mask_probability": probability}
        if self.replacement_noise and self.vocab_size is not None:
            torch.rand(len(labels), generator=generator)  # drawn and unused in the reference, docs/quirks.md#q25
            replaced = torch.rand(labels.shape, generator=generator) < probability[:, None]
            ids = torch.randint(0, self.vocab_size, labels.shape, generator=generator)
            out["replacement_ids"] = torch.where(masked & replaced, ids, -1)
        return out


def region_rows(image: Any, masks: list[np.ndarray], captions: list[str]) -> dict[str, Any]:
    """Make a row for [`PdlmCollator`].

    Args:
        image: PIL image, array or tensor.
        masks (`list[np.ndarray]`): masks of shape (H, W).
        captions (`list[str]`): the captions, in the same order.
    """
    regions = [{"mask": mask, "caption": caption} for mask, caption in zip(masks, captions, strict=True)]
    return {"image": image, "regions": regions}
