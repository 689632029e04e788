import copy

import pytest
import torch
from tiny import lively_model, make_image
from transformers import AutoModelForImageTextToText

from pdlm_hf.masking_pdlm import caption_canvas
from pdlm_hf.tiling_pdlm import num_tiles
from pdlm_hf.versions_pdlm import CHECKPOINTING
from pdlm_hf.vision_pdlm import pixel_unshuffle, roi_align, roi_align_tiles, tile_places

FORWARD = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grids",
    "region_masks",
    "region_boxes",
    "original_sizes",
)


def full_inputs(model, processor, num_masks=(2,), num_slots=4, seed=0):
    """Prompt and canvas of a batch, on its left padding, with random tokens in the slots."""
    config = model.config
    ends = (config.mask_token_id, config.newline_token_id, config.eot_token_id)
    generator = torch.Generator().manual_seed(seed)
    rows, slots = [], []
    for k, count in enumerate(num_masks):
        image, masks = make_image(seed + k, 64 + 70 * k, 64, count)
        row = processor(images=image, segmentation_maps=masks)
        canvas = torch.tensor(caption_canvas(count, num_slots, config.caption_token_ids, *ends))
        place = canvas == config.mask_token_id
        canvas[place] = torch.randint(0, 200, (int(place.sum()),), generator=generator)
        visual = {n: row[n] for n in FORWARD if n not in ("input_ids", "attention_mask")}
        rows.append({"input_ids": row.input_ids[0].tolist() + canvas.tolist(), **visual})
        slots.append(place)
    return processor.pad(rows, "left"), slots


def answers(logits, slots):
    """Logits of the slots of every row of a left-padded batch."""
    return [row[-len(place) :][place] for row, place in zip(logits, slots, strict=True)]


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefix_attention", ["full", "isolated"])
def test_attention_implementations_agree(processor, prefix_attention, implementation):
    model = lively_model(processor, prefix_attention)
    assert model.config._attn_implementation == "sdpa"
    inputs, slots = full_inputs(model, processor, (3, 1))
    assert inputs["attention_mask"].min() == 0
    with torch.no_grad():
        expected = answers(model(**inputs).logits, slots)
        model.model.language_model.set_attn_implementation(implementation)
        assert model.model.language_model.config._attn_implementation == implementation
        got = answers(model(**inputs).logits, slots)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_argument(golden_regions, implementation):
    model = AutoModelForImageTextToText.from_pretrained(golden_regions, attn_implementation=implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    assert model.model.vision_tower.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "implementation",
    [
        "flash_attention_2",
        "flash_attention_3",
        "kernels-community/flash-attn2",
        {"text_config": "flash_attention_2", "vision_config": "sdpa"},
    ],
)
def test_flash_attention_is_refused_with_the_reason(golden_regions, implementation):
    message = "cannot express the region mask of PerceptionDLM's language model"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(golden_regions, attn_implementation=implementation)
    model = AutoModelForImageTextToText.from_pretrained(golden_regions)
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(implementation)


def test_flash_attention_is_allowed_in_the_vision_tower(golden_regions):
    parts = {"vision_config": "flash_attention_2"}
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="(?i)flash") as error:
            AutoModelForImageTextToText.from_pretrained(golden_regions, attn_implementation=parts)
        assert "region mask" not in str(error.value)
        return
    model = AutoModelForImageTextToText.from_pretrained(golden_regions, attn_implementation=parts)
    assert model.model.vision_tower.config._attn_implementation == "flash_attention_2"
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_attention_is_bidirectional(model, processor):
    inputs, _ = full_inputs(model, processor, (1,))
    changed = inputs["input_ids"].clone()
    changed[0, -2] = 7
    with torch.no_grad():
        difference = model(**inputs).logits - model(**inputs | {"input_ids": changed}).logits
    assert difference[0, 0].abs().max() > 1e-4


@pytest.mark.parametrize(("prefix_attention", "independent"), [("isolated", True), ("full", False)])
def test_a_caption_depends_on_other_captions_only_through_a_full_prefix(processor, prefix_attention, independent):
    model = lively_model(processor, prefix_attention)
    inputs, slots = full_inputs(model, processor, (3,))
    length, place = len(slots[0]), slots[0].nonzero()[:, 0].view(3, -1)
    changed = inputs["input_ids"].clone()
    changed[0, changed.shape[1] - length + place[1]] = torch.tensor([11, 12, 13, 14])
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**inputs | {"input_ids": changed}).logits)[0].abs().amax(-1)
    prefix, canvas = difference[:-length], difference[-length:]
    assert canvas[place[1]].max() > 0.1
    if independent:
        assert canvas[place[0]].max() < 1e-5 and canvas[place[2]].max() < 1e-5
        assert prefix.max() < 1e-5
    else:
        assert canvas[place[0]].max() > 1e-3 and canvas[place[2]].max() > 1e-3
        assert prefix.max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fixture", ["model", "isolated_model"])
def test_padding_changes_nothing(request, processor, fixture, side):
    model = request.getfixturevalue(fixture)
    inputs, _ = full_inputs(model, processor, (2,))
    length, padding = inputs["input_ids"].shape[1], 5
    where = slice(padding, None) if side == "left" else slice(length)
    padded = dict(inputs)
    for name, fill in (("input_ids", model.config.eot_token_id), ("attention_mask", 0)):
        padded[name] = torch.full((1, length + padding), fill)
        padded[name][:, where] = inputs[name]
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, where], model(**inputs).logits, atol=1e-3, rtol=1e-4)


def test_batch_equals_single(model, processor):
    inputs, slots = full_inputs(model, processor, (3, 1, 2))
    with torch.no_grad():
        batched = answers(model(**inputs).logits, slots)
        for k, count in enumerate((3, 1, 2)):
            tiles = [num_tiles(*grid) for grid in inputs["image_grids"].tolist()]
            first = slice(sum(tiles[:k]), sum(tiles[: k + 1]))
            single = {n: inputs[n][k : k + 1] for n in ("image_grids", "region_boxes", "original_sizes")}
            single |= {n: inputs[n][first] for n in ("pixel_values", "region_masks")}
            keep = inputs["attention_mask"][k].bool()
            logits = model(input_ids=inputs["input_ids"][k, keep][None], **single).logits
            assert int((single["region_boxes"][..., 0] >= 0).sum()) == count
            torch.testing.assert_close(answers(logits, slots[k : k + 1])[0], batched[k], atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------- regions


def test_region_prompts_reach_only_marked_patches(model):
    tower, side = model.model.vision_tower, model.config.patch_grid
    pixels = torch.zeros(1, 3, 64, 64)
    masks = torch.zeros(1, 6, side, side)
    masks[0, 2, 1, 3] = masks[0, 4, 1, 3] = 1  # two prompts on one patch add up
    seen = []
    hook = tower.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model.get_image_features(pixels)
        model.model.get_image_features(pixels, masks)
    hook.remove()
    difference = (seen[1] - seen[0])[0]
    expected = torch.zeros_like(difference)
    expected[1 * side + 3] = model.model.region_embedding.weight[[2, 4]].sum(0)
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)


def test_vision_tower_is_siglip_without_its_last_layer(golden_regions):
    from transformers import SiglipVisionModel

    tower = AutoModelForImageTextToText.from_pretrained(golden_regions).model.vision_tower
    stock = SiglipVisionModel(tower.config)
    missing = stock.load_state_dict(tower.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock.eval()(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_pixel_unshuffle_order():
    side, channels = 4, 3
    features = torch.arange(2 * side * side * channels).float().view(2, side, side, channels)
    out = pixel_unshuffle(features, 2)
    for t in range(2):
        for r in range(2):
            for c in range(2):
                parts = [features[t, 2 * r + dr, 2 * c + dc] for dr in (0, 1) for dc in (0, 1)]
                assert torch.equal(out[t, r, c], torch.cat(parts))


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_tile_places(columns, rows):
    """Two images of this grid around one of a single tile."""
    grids = torch.tensor([[columns, rows], [1, 1], [columns, rows]])
    grid = [[c, r] for r in range(rows) for c in range(columns)]
    none = [[-1, -1]] if len(grid) > 1 else []
    image, places = tile_places(grids, 2 * len(grid + none) + 1, "aligned")
    assert image.tolist() == [0] * len(grid + none) + [1] + [2] * len(grid + none)
    assert places.tolist() == grid + none + [[0, 0]] + grid + none
    places = tile_places(grids, 2 * len(grid + none) + 1, "reference")[1]
    assert places.tolist() == none + grid + [[0, 0]] + none + grid


def slow_roi_align(features, box, output_size, scale):
    """The Mask R-CNN kernel with loops: aligned, two samples per bin and axis."""
    height, width, channels = features.shape
    x0, y0, x1, y1 = [float(v) * scale - 0.5 for v in box]
    rows, columns = output_size
    out = torch.zeros(rows, columns, channels)

    def corners(coordinate, size):
        if coordinate < -1 or coordinate > size:
            return None
        coordinate = max(coordinate, 0.0)
        low = int(coordinate)
        if low >= size - 1:
            return size - 1, size - 1, 0.0
        return low, low + 1, coordinate - low

    for i in range(rows):
        for j in range(columns):
            for si in range(2):
                for sj in range(2):
                    y = corners(y0 + (y1 - y0) / rows * (i + (si + 0.5) / 2), height)
                    x = corners(x0 + (x1 - x0) / columns * (j + (sj + 0.5) / 2), width)
                    if y is None or x is None:
                        continue
                    top = features[y[0], x[0]] * (1 - x[2]) + features[y[0], x[1]] * x[2]
                    bottom = features[y[1], x[0]] * (1 - x[2]) + features[y[1], x[1]] * x[2]
                    out[i, j] += (top * (1 - y[2]) + bottom * y[2]) / 4
    return out.view(rows * columns, channels)


@pytest.mark.parametrize("scale", [1.0, 1 / 32])
@pytest.mark.parametrize("output_size", [[4, 4], [2, 3], [1, 1]])
def test_roi_align_equals_a_loop(output_size, scale):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, 5, generator=generator)
    boxes = torch.rand(20, 4, generator=generator) * 8
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) - 1
    special = torch.tensor([[0.0, 0, 9, 7], [-5, -5, -4, -4], [20, 20, 30, 30], [3, 3, 3, 3], [8, 6, 9, 7]])
    boxes = torch.cat([boxes, special]) / scale
    got = roi_align(features, boxes, output_size, scale)
    expected = torch.stack([slow_roi_align(features, box, output_size, scale) for box in boxes])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_roi_align_of_tiles_equals_roi_align_of_their_map():
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor([3, 2])
    tiles = torch.randn(7, 4, 4, 5, generator=generator)
    places = tile_places(grid[None], 7, "aligned")[1]
    whole = tiles[:6].unflatten(0, (2, 3)).permute(0, 2, 1, 3, 4).reshape(8, 12, 5)
    boxes = torch.tensor([[0.0, 0, 12, 8], [3.3, 1.2, 9.7, 4.1], [-2, -2, 1, 1], [11, 7, 14, 9], [4, 4, 8, 8]])
    parts = roi_align_tiles(tiles, boxes.expand(7, -1, -1), grid.expand(7, 2), places, [4, 3])
    torch.testing.assert_close(parts.sum(0), roi_align(whole, boxes, [4, 3]), atol=1e-6, rtol=1e-5)
    assert not parts[6].any()


@pytest.fixture(scope="module")
def roi_model(processor):
    return lively_model(processor, roi_output_size=2)


def ramp_tiles(columns: int, rows: int, cells: int = 4) -> torch.Tensor:
    """Tiles whose features are the cell's own (x, y) in the whole image; a thumbnail of nonsense last."""
    y, x = torch.meshgrid(torch.arange(rows * cells), torch.arange(columns * cells), indexing="ij")
    whole = torch.stack([x, y], -1).float()
    tiles = whole.view(rows, cells, columns, cells, 2).transpose(1, 2).reshape(rows * columns, cells, cells, 2)
    return tiles if len(tiles) == 1 else torch.cat([tiles, torch.full_like(tiles[:1], 1e6)])


def region_features(model, tiles, grid, boxes, size):
    slots = torch.full((1, 6, 4), -1)
    slots[0, : len(boxes)] = torch.tensor(boxes)
    return model.model.get_region_features(tiles, torch.tensor([grid]), slots, torch.tensor([size]))


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_aligned_replay_of_a_ramp(roi_model, grid):
    columns, rows = grid
    width, height, cells = 40 * columns, 40 * rows, 4  # 10 pixels a cell
    assert roi_model.config.roi_output_size == [2, 2]
    boxes = [[0, 0, width, height], [10, 10, 30, 30], [width - 30, height - 20, width - 10, height]]
    got = region_features(roi_model, ramp_tiles(*grid), grid, boxes, (height, width)).view(-1, 2, 2, 2)
    for box, tokens in zip(boxes[:2], got[:2], strict=True):
        x0, y0, x1, y1 = [v / 10 for v in box]
        for i in range(2):
            for j in range(2):
                expected = [x0 + (x1 - x0) * (j + 0.5) / 2 - 0.5, y0 + (y1 - y0) * (i + 0.5) / 2 - 0.5]
                assert tokens[i, j].tolist() == pytest.approx(expected, abs=1e-4)
    # the full, half-open box covers the map symmetrically
    assert got[0, :, :, 0].sum(1).tolist() == pytest.approx([columns * cells - 1] * 2, abs=1e-4)
    assert got[0, :, :, 1].sum(0).tolist() == pytest.approx([rows * cells - 1] * 2, abs=1e-4)
    # samples beyond the last cell's centre repeat its value
    bottom = rows * cells - 1
    assert got[2, 1, 0, 1].item() == pytest.approx((bottom - 0.25 + bottom) / 2, abs=1e-4)


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (3, 2)])
def test_aligned_replay_finds_every_tile_in_its_place(roi_model, grid):
    columns, rows = grid
    tiles = torch.arange(columns * rows + 1).float()[:, None, None, None].expand(-1, 4, 4, 1)
    for index in range(columns * rows):
        row, column = divmod(index, columns)
        box = [column * 64 + 16, row * 64 + 16, column * 64 + 48, row * 64 + 48]
        got = region_features(roi_model, tiles, grid, [box], (64 * rows, 64 * columns))
        assert got.flatten().tolist() == [index] * 4


def test_reference_replay_drops_the_first_tile_and_scales_twice(golden_regions):
    model = AutoModelForImageTextToText.from_pretrained(golden_regions)
    tiles = torch.arange(3).float()[:, None, None, None].expand(-1, 4, 4, 1)
    for box in ([0, 0, 256, 128], [200, 100, 250, 120]):
        assert region_features(model, tiles, (2, 1), [box], (128, 256)).unique().tolist() == [1.0]


def test_replay_of_a_batch_is_that_of_its_images(roi_model):
    tiles = torch.cat([ramp_tiles(1, 1), ramp_tiles(2, 1)])
    grids, sizes = torch.tensor([[1, 1], [2, 1]]), torch.tensor([[40, 40], [40, 80]])
    boxes = torch.full((2, 6, 4), -1)
    boxes[0, 0], boxes[1, 0], boxes[1, 1] = torch.tensor([[0, 0, 20, 20], [40, 0, 80, 40], [0, 0, 80, 40]])
    got = roi_model.model.get_region_features(tiles, grids, boxes, sizes).view(3, 4, 2)
    first = region_features(roi_model, ramp_tiles(1, 1), (1, 1), [[0, 0, 20, 20]], (40, 40))
    second = region_features(roi_model, ramp_tiles(2, 1), (2, 1), [[40, 0, 80, 40], [0, 0, 80, 40]], (40, 80))
    assert torch.equal(got, torch.cat([first, second]).view(3, 4, 2))


@pytest.mark.parametrize("kind", ["image", "region"])
def test_placeholders_must_fit_the_features(model, processor, kind):
    inputs, _ = full_inputs(model, processor, (2,))
    token = model.config.image_token_id if kind == "image" else model.config.region_token_ids[1]
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == token).nonzero()[0, 0]] = 5
    with pytest.raises(ValueError, match=f"placeholders, but the {kind} features fill"):
        model(**inputs | {"input_ids": ids})


# ---------------------------------------------------------------- loss


def noisy_inputs(model, processor, num_masks=(2, 1)):
    inputs, slots = full_inputs(model, processor, num_masks)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, place in enumerate(slots):
        at = (labels.shape[1] - len(place) + place.nonzero())[:, 0]
        labels[row, at] = inputs["input_ids"][row, at]
    noise = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.6) & (labels != -100)
    assert 0 < noise.sum() < (labels != -100).sum()
    probability = torch.tensor([0.3, 0.8])[: len(labels)]
    return inputs, {"labels": labels, "noise_mask": noise, "mask_probability": probability}


@pytest.mark.parametrize("given", [{}, {"noise_mask"}, {"mask_probability"}])
def test_labels_without_noise_raise(model, processor, given):
    inputs, noise = noisy_inputs(model, processor)
    with pytest.raises(ValueError, match="`labels` need `noise_mask` and `mask_probability`"):
        model(**inputs, labels=noise["labels"], **{name: noise[name] for name in given})


def test_loss_by_hand(model, processor):
    inputs, noise = noisy_inputs(model, processor)
    labels, masked = noise["labels"], noise["noise_mask"]
    with torch.no_grad():
        output = model(**inputs, **noise)
        noisy = torch.where(masked, model.config.mask_token_id, inputs["input_ids"])
        logits = model(**inputs | {"input_ids": noisy}).logits.double()
    expected = 0.0
    for row in range(len(labels)):
        length = int((labels[row] != -100).sum())
        for at in masked[row].nonzero()[:, 0].tolist():
            nll = torch.logsumexp(logits[row, at], 0) - logits[row, at, labels[row, at]]
            expected += nll.item() / noise["mask_probability"][row].item() / length / len(labels)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("noise", [{}, {"noise_mask": torch.ones(1, 3, dtype=torch.bool)}])
def test_a_pass_without_ids_or_embeddings_raises(model, noise):
    with pytest.raises(ValueError, match="needs `input_ids` or `inputs_embeds`"):
        model(**noise)


def test_a_pass_from_embeddings_finds_its_images_also_when_the_layout_is_given(model, processor):
    inputs, _ = full_inputs(model, processor)
    ids = inputs.pop("input_ids")
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "layout": model.model.region_layout(ids)}
    with torch.no_grad():
        assert torch.equal(model(**inputs, **given).logits, model(input_ids=ids, **inputs).logits)


def test_noise_outside_the_labels_is_ignored(model, processor):
    inputs, noise = noisy_inputs(model, processor)
    everywhere = noise["noise_mask"] | (noise["labels"] == -100)
    with torch.no_grad():
        assert model(**inputs, **noise).loss == model(**inputs, **noise | {"noise_mask": everywhere}).loss


def test_nothing_masked_gives_zero_loss(model, processor):
    inputs, noise = noisy_inputs(model, processor)
    nothing = torch.zeros_like(noise["noise_mask"])
    assert model(**inputs, **noise | {"noise_mask": nothing}).loss.item() == 0


def test_replacement_noise_by_hand(model, processor):
    model = copy.deepcopy(model)
    model.config.replacement_noise_mode = True
    inputs, noise = noisy_inputs(model, processor)
    labels, masked = noise["labels"], noise["noise_mask"]
    # one masked slot gets a text token, one a placeholder of the image, which must not be filled with features
    replacement = torch.full_like(labels, -1)
    first, second = masked[0].nonzero()[:2, 0].tolist()
    replacement[0, first], replacement[0, second] = 42, model.config.image_token_id
    with torch.no_grad():
        loss = model(**inputs, **noise, replacement_ids=replacement).loss
        embeds = model.model.embed(**{n: v for n, v in inputs.items() if n != "attention_mask"})
        noisy = torch.where(masked, model.config.mask_token_id, inputs["input_ids"])
        noisy = torch.where(masked & (replacement >= 0), replacement, noisy)
        embeds = torch.where(masked[..., None], model.get_input_embeddings()(noisy), embeds)
        layout = model.model.region_layout(inputs["input_ids"])
        logits = model(inputs_embeds=embeds, layout=layout, attention_mask=inputs["attention_mask"]).logits
    answer = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[answer], labels[answer])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def gradients(model, inputs, noise):
    model.zero_grad()
    loss = model(**inputs, **noise).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(processor):
    model = lively_model(processor).train()
    inputs, noise = noisy_inputs(model, processor)
    loss, expected = gradients(model, inputs, noise)
    assert len(expected) == len(list(model.parameters()))
    getattr(model, f"{CHECKPOINTING}_enable")()
    again, got = gradients(model, inputs, noise)
    assert again == pytest.approx(loss, rel=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


def test_text_only_forward(model, processor):
    ids = torch.tensor([processor.tokenizer("Hello there")["input_ids"]])
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.text_config.vocab_size)
