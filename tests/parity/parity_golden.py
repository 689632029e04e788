"""Where the recorded values of the reference are, and how near to them we have to be.

The folder is `PDLM_GOLDEN`, or the committed subset (made by make_subset.py). Nothing here or in the tests knows
sizes, ids or counts: whatever a folder holds is found by name, and a test whose fixture is absent does not exist.
"""

import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # noqa: F401  (registers the Auto classes)
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES
from pdlm_hf.masking_pdlm import caption_canvas, region_attention

SUBSET = Path(__file__).resolve().parent / "golden"
FOLDER = Path(os.environ.get("PDLM_GOLDEN") or SUBSET).resolve()

# Tolerances: the README of the fixtures gives them for float32 (absolute, logits are about 10 in size). Tokens, masks,
# ids, grids and uint8 tiles have no tolerance. All argmax margins and confidence gaps in the recorded trajectories are
# above 1.5e-3 (`min_*` in the json files), so float32 noise cannot change a token.
VISION = 2e-4
LOGITS = 2e-3
CONFIDENCE = 2e-4
LOSS = 1e-3
GRADIENT = 1e-3  # relative
# Not in the README: pure functions of a few float32 operations on values of order 1.
ROUNDING = 1e-5


def stems(pattern: str) -> list[str]:
    """Names of the fixtures, without ending."""
    return sorted({path.stem for path in FOLDER.glob(pattern)})


@functools.cache
def record(name: str) -> dict | list:
    """The json part of a fixture; empty if there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@functools.cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a fixture; empty if there are none."""
    path = FOLDER / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


def matches(name: str, pattern: str) -> list[str]:
    """First group of `pattern`, for every tensor name of the fixture that fits it as a whole."""
    return sorted(m[1] for m in (re.fullmatch(pattern, key) for key in tensors(name)) if m)


def each(names: str, values: list, ids: list[str] | None = None):
    """`parametrize`, except that a test without values does not exist (instead of being skipped)."""
    if not values:
        return lambda test: None
    if ids is None:
        ids = ["-".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
    return pytest.mark.parametrize(names, values, ids=ids)


def subset_holds(**found) -> None:
    """The committed subset has every kind of fixture, so an empty list means that a test has silently gone."""
    if FOLDER == SUBSET:
        assert [name for name, values in found.items() if not values] == []


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=tolerance)


@functools.cache
def load(kind: str) -> SimpleNamespace:
    """Model and processor of checkpoint_{kind}."""
    path = FOLDER / f"checkpoint_{kind}"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return SimpleNamespace(model=model, processor=AutoProcessor.from_pretrained(path), config=model.config, path=path)


def normalised(tiles_u8: torch.Tensor) -> torch.Tensor:
    """uint8 tiles (..., 3) -> pixel_values, by the formula in the README of the fixtures."""
    return (((tiles_u8.double() / 255).float() - 0.5) / 0.5).permute(0, 3, 1, 2)


def put_together(tiles: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The map `(rows * cells, columns * cells, channels)` that tiles `(tiles, cells, cells, channels)` form."""
    columns, rows = (places.amax(0) + 1).tolist()
    whole = tiles.new_full((rows, tiles.shape[1], columns, *tiles.shape[2:]), torch.nan)
    for tile, (column, row) in zip(tiles, places.tolist(), strict=True):
        if column >= 0:
            whole[row, :, column] = tile
    return whole.flatten(0, 1).flatten(1, 2)


def our_name(reference_name: str) -> str | None:
    """Name of a parameter in our models; None where the reference's name has no counterpart."""
    for theirs, ours in PARAMETER_PREFIXES.items():
        if reference_name.startswith(theirs):
            return ours + reference_name.removeprefix(theirs)
    return None


def dense(layout: torch.Tensor, prefix_attention: str = "full") -> torch.Tensor:
    """The region mask of a layout (1, L), written out (L, L)."""
    position = torch.arange(layout.shape[1])
    return region_attention(layout, prefix_attention)(0, 0, position[:, None], position[None])


def expanded(ids: list[int], loaded: SimpleNamespace) -> list[int]:
    """The reference's ids have one placeholder per region, ours one per RoI token."""
    regions = set(loaded.config.region_token_ids)
    return [i for token in ids for i in [token] * (loaded.config.num_roi_tokens if token in regions else 1)]


@functools.cache
def region_case(name: str) -> SimpleNamespace:
    """A recorded region case with our inputs for it.

    The reference sorts regions by area, and so are its tensors; `order[k]` is the input position of sorted region k.
    """
    loaded, recorded, data = load("pdmllm"), record(name), tensors(name)
    masks = [data[f"input_mask_{k}"].numpy() for k in range(len(matches(name, r"input_mask_(\d+)")))]
    inputs = loaded.processor(data["image_u8"].numpy(), text=recorded["prompt"], segmentation_maps=masks)
    config, slots = loaded.config, recorded["gen_len"]
    canvas = caption_canvas(
        len(masks), slots, config.caption_token_ids, config.mask_token_id, config.newline_token_id, config.eot_token_id
    )
    ids = torch.cat([inputs["input_ids"], torch.tensor([canvas])], 1)
    visual = ("pixel_values", "image_grids", "region_masks", "region_boxes", "original_sizes")
    return SimpleNamespace(
        name=name,
        model=loaded.model,
        processor=loaded.processor,
        config=config,
        record=recorded,
        tensors=data,
        masks=masks,
        inputs=inputs,
        visual={key: inputs[key] for key in visual},
        ids=ids,
        order=recorded["sorted_order"],
        slots=slots,
    )


@functools.cache
def region_output(name: str, steps: int):
    """Our `generate` on a recorded case, with every step."""
    case = region_case(name)
    return case.model.generate(
        **case.inputs, max_new_tokens=case.slots, max_denoising_steps=steps, output_history=True
    )


class Seen:
    """What the language model is really given: embeddings, position ids and attention mask of every pass."""

    def __init__(self, model):
        text = model.model.language_model
        self.embeds, self.positions, self.masks = [], [], []
        self._handles = [
            text.register_forward_pre_hook(self._text, with_kwargs=True),
            text.rotary_emb.register_forward_pre_hook(self._rotary, with_kwargs=True),
            text.layers[0].self_attn.register_forward_pre_hook(self._attention, with_kwargs=True),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _text(self, module, args, kwargs):
        self.embeds.append(kwargs["inputs_embeds"].detach().clone())

    def _rotary(self, module, args, kwargs):
        self.positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    def _attention(self, module, args, kwargs):
        self.masks.append(kwargs["attention_mask"])

    def allowed(self, index: int = 0) -> torch.Tensor:
        """(rows, L, L) bool; no mask at all means everything is visible."""
        mask, (rows, length, _) = self.masks[index], self.embeds[index].shape
        if mask is None:
            return torch.ones(rows, length, length, dtype=torch.bool)
        mask = mask if mask.dtype == torch.bool else mask == 0
        return mask.expand(rows, 1, length, length)[:, 0]
