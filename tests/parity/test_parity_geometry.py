"""Tiling, pixel unshuffle, tile merging and RoI replay."""

import math
import re

import torch
from parity_golden import (
    ROUNDING,
    assert_close,
    each,
    load,
    matches,
    normalised,
    put_together,
    record,
    stems,
    subset_holds,
    tensors,
)
from PIL import Image

from pdlm_hf import PdlmConfig, PdlmImageProcessorPil, PdlmModel
from pdlm_hf.masking_pdlm import region_layout
from pdlm_hf.tiling_pdlm import best_grid, tile, tile_grids
from pdlm_hf.vision_pdlm import pixel_unshuffle, roi_align, tile_places

GRIDS = [key for key in record("tiling_grids") if re.fullmatch(r"S\d+_max\d+", key)]
CANDIDATES = [key for key in record("tiling_grids") if re.fullmatch(r"target_ratios_max\d+", key)]
IMAGES = matches("tiling", r"(img\d+)\.tiles_u8")
IMAGE_RECORDS = {f"img{entry['index']}": entry for entry in record("tiling")}
PIXELS = matches("tiling", r"(img\d+\.pixel_values\w*)")
SHUFFLES = matches("pixel_shuffle", r"(\w+)\.in")
MERGES = matches("merge_tiles", r"(out_ncw\d+_nch\d+)")
SCALES = matches("roi_align_raw", r"out_scale_(\w+)")
REPLAYS = [
    (name, case["tag"], path)
    for name in stems("roi_real_geometry*.json")
    for case in record(name)["cases"]
    for path in ("infer", "train")
    if f"{case['tag']}.roi_tokens_{path}" in tensors(name)
]


def test_found():
    subset_holds(grids=GRIDS, candidates=CANDIDATES, images=IMAGES, pixels=PIXELS)
    subset_holds(shuffles=SHUFFLES, merges=MERGES, scales=SCALES, replays=REPLAYS)


@each("key", CANDIDATES)
def test_candidate_order(key):
    limit = int(key.removeprefix("target_ratios_max"))
    assert [list(grid) for grid in tile_grids(1, limit)] == record("tiling_grids")[key]


@each("key", GRIDS)
def test_best_grid(key):
    size, limit = map(int, re.findall(r"\d+", key))
    theirs = record("tiling_grids")[key]
    assert [[w, h, *best_grid(w, h, size, 1, limit)] for w, h, _, _ in theirs] == theirs


def _image_processor(image: str) -> PdlmImageProcessorPil:
    kind = stems("checkpoint_*")[-1].removeprefix("checkpoint_")
    size, limit = tensors("tiling")[f"{image}.tiles_u8"].shape[1], load(kind).processor.image_processor.max_tiles
    return PdlmImageProcessorPil(size={"height": size, "width": size}, max_tiles=limit)


@each("image", IMAGES)
def test_tiles(image):
    theirs, pixels_u8 = tensors("tiling")[f"{image}.tiles_u8"], tensors("tiling")[f"{image}.image_u8"].numpy()
    size, entry = theirs.shape[1], IMAGE_RECORDS[image]
    processor = _image_processor(image)
    assert [entry["height"], entry["width"]] == list(pixels_u8.shape[:2])
    grid = best_grid(entry["width"], entry["height"], size, 1, processor.max_tiles)
    assert list(grid) == entry["grid"]
    ours = torch.tensor(tile(Image.fromarray(pixels_u8), grid, size))
    assert len(ours) == entry["n_tiles"]
    # of some images only the thumbnail is recorded; it comes last
    assert torch.equal(ours[-len(theirs) :], theirs)
    pixels = processor.preprocess(pixels_u8, return_tensors="pt")
    assert pixels["image_grids"].tolist() == [entry["grid"]]
    assert torch.equal(pixels["pixel_values"], normalised(ours))
    total = pixels["pixel_values"].double()
    # sums over up to 1e6 float32 values, accumulated by the reference in float32
    assert math.isclose(total.abs().sum(), entry["pixel_values_abs_sum"], rel_tol=1e-5)
    assert math.isclose(total.sum(), entry["pixel_values_sum"], abs_tol=1e-5 * entry["pixel_values_abs_sum"])


@each("key", PIXELS)
def test_pixel_values(key):
    image, kind = key.split(".")
    pixels_u8, theirs = tensors("tiling")[f"{image}.image_u8"].numpy(), tensors("tiling")[key]
    ours = _image_processor(image).preprocess(pixels_u8, return_tensors="pt")["pixel_values"]
    if kind == "pixel_values_tile0_row0":
        ours = ours[0, :, 0]
    assert_close(ours, theirs, 1e-6)  # one float32 rounding of a value in [-1, 1]


@each("name", SHUFFLES)
def test_pixel_unshuffle(name):
    data = tensors("pixel_shuffle")
    features, theirs = data[f"{name}.in"], data[f"{name}.out"]
    assert torch.equal(pixel_unshuffle(features, features.shape[1] // theirs.shape[1]), theirs)


@each("name", MERGES)
def test_tile_places(name):
    columns, rows = map(int, re.findall(r"\d+", name))
    tiles = tensors("merge_tiles")["in"][0].permute(0, 2, 3, 1)  # (tiles, h, w, channels)
    image, places = tile_places(torch.tensor([[columns, rows]]), len(tiles), "aligned")
    assert image.tolist() == [0] * len(tiles)
    assert torch.equal(put_together(tiles, places).permute(2, 0, 1), tensors("merge_tiles")[name][0])


@each("scale", SCALES)
def test_roi_align(scale):
    data = tensors("roi_align_raw")
    numerator, _, denominator = scale.partition("_")
    theirs = data[f"out_scale_{scale}"]
    for box, out in zip(data["boxes_xyxy"], theirs, strict=True):
        features = data["features"][int(box[0])].permute(1, 2, 0)
        ours = roi_align(features, box[None, 1:], list(out.shape[1:]), int(numerator) / int(denominator or 1))
        assert_close(ours[0].T.view_as(out), out, ROUNDING)


def _replay_model(cells: int, channels: int, tokens: int) -> PdlmModel:
    """Only its config counts: RoI replay has no weights."""
    side = math.isqrt(tokens)
    text = {"hidden_size": channels, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return PdlmModel(
        PdlmConfig(
            text_config={**text, "vocab_size": 8},
            vision_config={**vision, "image_size": 2 * cells * 16, "patch_size": 16},
            roi_output_size=[side, tokens // side],
        )
    )


@each("name, tag, path", REPLAYS)
def test_roi_replay_at_real_geometry(name, tag, path):
    data, recorded = tensors(name), record(name)
    case = next(case for case in recorded["cases"] if case["tag"] == tag)
    theirs = data[f"{tag}.roi_tokens_{path}"]
    embeds = data["vision_embeds_f16"].float()[: case["n_tiles"]]
    cells = math.isqrt(embeds.shape[1])
    model = _replay_model(cells, embeds.shape[2], theirs.shape[1])
    # The recorded boxes are normalised and end with the last pixel inside; a fine enough raster puts them on pixels.
    pixels = 10**9
    boxes = torch.tensor([recorded["boxes_xyxy_normalised"][str(k)] for k, _, _ in case["spans"]], dtype=torch.double)
    boxes = (boxes * pixels).round().long() + torch.tensor([0, 0, 1, 1])
    ours = model.get_region_features(
        embeds.view(len(embeds), cells, cells, -1),
        torch.tensor([[case["ncw"], case["nch"]]]),
        boxes[None],
        torch.tensor([[pixels, pixels]]),
        training_geometry=path == "train",
    )
    assert_close(ours, theirs, ROUNDING)


@each("name, tag", sorted({(name, tag) for name, tag, _ in REPLAYS if f"{tag}.expanded_tail_ids" in tensors(name)}))
def test_spans_at_real_geometry(name, tag):
    case = next(case for case in record(name)["cases"] if case["tag"] == tag)
    config, tail = load("pdmllm").config, tensors(name)[f"{tag}.expanded_tail_ids"]
    offset = case["spans"][0][1] - tail.tolist().index(config.region_token_ids[case["spans"][0][0]])
    layout = region_layout(tail[None], config.region_token_ids, config.caption_token_ids)[0]
    for k, start, end in case["spans"]:
        assert (layout == 2 * k).nonzero().flatten().tolist() == list(range(start - offset, end - offset))
