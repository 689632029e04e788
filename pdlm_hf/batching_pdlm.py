"""The arguments of a processor as lists, and the rows it builds as one batch."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature

from .errors_pdlm import RegionError, SettingError


def list_of_masks(masks: Any) -> list:
    """Masks of one image: a list, a stack (N, H, W), or a single mask."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return [masks] if masks.ndim == 2 else list(masks)
    return list(masks) if isinstance(masks, (list, tuple)) else [masks]


def as_lists(images: Any, maps: Any, text: Any) -> tuple[list, list, list]:
    """One image with its masks, or a batch of them, as lists of the same length; and a question for each.

    Args:
        images, maps, text: `images`, `segmentation_maps` and `text` of a call of the processor.

    Raises:
        RegionError: masks without images, or for another number of images.
        SettingError: another number of questions.
    """
    if images is None:
        raise RegionError("`segmentation_maps` without `images`: pass the image the masks belong to.")
    if isinstance(images, (list, tuple)):
        images = [image[0] if isinstance(image, (list, tuple)) and len(image) == 1 else image for image in images]
        maps = list(maps)
        if len(images) == 1 and (len(maps) != 1 or not _is_stack(maps[0])):
            maps = [maps]
    else:
        images, maps = [images], [maps]
    if len(images) != len(maps):
        raise RegionError(
            f"{len(images)} images, but masks for {len(maps)}. For a batch `segmentation_maps` is a list with one "
            "list of masks per image."
        )
    questions = list(text) if isinstance(text, (list, tuple)) else [text] * len(images)
    if len(questions) != len(images):
        raise SettingError(f"{len(images)} images, but {len(questions)} questions.")
    return images, maps, questions


def _is_stack(masks: Any) -> bool:
    """Whether this holds the masks of an image, not a mask itself."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return masks.ndim == 3
    return isinstance(masks, (list, tuple)) and not (len(masks) and np.isscalar(masks[0]))


def images_of_each(images: Any, count: int, batched: bool) -> list[list]:
    """The list of images of every text.

    Args:
        images: None, or one image or list of images for each text.
        count (`int`): texts.
        batched (`bool`): whether the texts were given as a list.

    Raises:
        SettingError: images for another number of texts.
    """
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not batched:
        nested = len(images) == 1 and isinstance(images[0], (list, tuple))
        return [list(images[0] if nested else images)]
    if len(images) != count:
        raise SettingError(f"{count} texts, but images for {len(images)}.")
    return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]


def padded_length(counts: list[int], settings: dict[str, Any], most: int) -> int | None:
    """Tokens of every row of a padded batch; None where the rows are not padded.

    Args:
        counts (`list[int]`): tokens of each row.
        settings (`dict`): `padding`, `max_length`, `truncation`, `pad_to_multiple_of` and `return_tensors`, as of a
            tokenizer.
        most (`int`): tokens a row may have if `truncation` is set without `max_length`.

    Raises:
        SettingError: a row is longer than it may be, or the rows differ and may not be padded.
    """
    padding, limit, longest = settings.get("padding"), settings.get("max_length"), max(counts)
    allowed = limit or most
    if settings.get("truncation") not in (None, False, "do_not_truncate") and longest > allowed:
        raise SettingError(
            f"A prompt has {longest} tokens, more than the {allowed} of `max_length`. It is not cut, since that would "
            "drop image or region tokens, or the end of the question: raise `max_length`, shorten the question, or "
            "let an image take fewer tiles (`max_tiles`)."
        )
    if padding in (None, False, "do_not_pad"):
        if settings.get("return_tensors") is not None and len(set(counts)) > 1:
            raise SettingError(f"Prompts of {counts} tokens make no tensor: set `padding=True`.")
        return None
    if padding == "max_length":
        if limit is None:
            raise SettingError('`padding="max_length"` needs `max_length`, the number of tokens to pad to.')
        longest = max(longest, limit)
    multiple = settings.get("pad_to_multiple_of") or 1
    return -(-longest // multiple) * multiple


def pad_rows(rows: list[Any], fill: int, side: str, length: int | None = None) -> torch.Tensor:
    """Rows of ids as one tensor.

    Args:
        rows: lists or tensors of integers.
        fill (`int`): value of the padding.
        side (`str`): "left" or "right".
        length (`int`, *optional*): columns of the tensor; default: those of the longest row.

    Returns:
        `torch.LongTensor` of shape `(rows, length)`.
    """
    tensors = [torch.as_tensor(row) for row in rows]
    batch = pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
    more = (length or batch.shape[1]) - batch.shape[1]
    return F.pad(batch, (more, 0) if side == "left" else (0, more), value=fill)


def pad_embeds(rows: list[torch.Tensor]) -> torch.Tensor:
    """Embedded prompts, padded on the left with ones.

    Nobody sees the padding. But it is computed too, and zeros have no scale: layers that scale each row of their
    input, as torchao's FP8 does, make NaN of them, which attention spreads even where it does not look.

    Args:
        rows (`list[torch.Tensor]`): of shape `(length, hidden_size)`.

    Returns:
        `torch.Tensor` of shape `(rows, longest, hidden_size)`.
    """
    return pad_sequence(rows, batch_first=True, padding_value=1.0, padding_side="left")


def as_kind(batch: dict[str, Any], kind: Any) -> BatchFeature:
    """Tensors as `return_tensors` asks for them: "pt", "np", or None for lists.

    Raises:
        SettingError: another kind.
    """
    kind = getattr(kind, "value", kind)
    if kind == "np":
        batch = {name: value.numpy() if torch.is_tensor(value) else value for name, value in batch.items()}
    elif kind is None:
        batch = {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()}
    elif kind != "pt":
        raise SettingError(f'`return_tensors` must be "pt", "np" or None, got {kind!r}.')
    return BatchFeature(batch)
