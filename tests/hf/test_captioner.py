import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import make_image

from pdlm_hf import Region, RegionCaption, RegionCaptioner
from pdlm_hf.captioning.captioner import MODES
from pdlm_hf.captioning.streaming import LiveView, RegionStreamer
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.render.drawing import COLOURS, draw_captions, save_drawing

SETTINGS = {"max_new_tokens": 6, "max_denoising_steps": 3}


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    return RegionCaptioner.from_pretrained(tiny_checkpoint)


def pair(seed: int, num_masks: int = 2):
    image, masks = make_image(seed, 64 + 40 * (seed % 3), 64, num_masks)
    return Image.fromarray(image), masks


def same(left, right):
    return [(c.text, c.id, c.bbox, c.token_ids) for c in left] == [(c.text, c.id, c.bbox, c.token_ids) for c in right]


# ---------------------------------------------------------------- captioner


def test_caption_in_the_order_of_the_regions(captioner):
    image, masks = pair(1, 3)
    box = [5, 6, 20, 30]
    captions = captioner.caption(image, [masks[0], {"id": "dog", "bbox": box}, masks[1]], **SETTINGS)
    assert all(isinstance(caption, RegionCaption) for caption in captions)
    assert [caption.id for caption in captions] == [0, "dog", 2]
    assert captions[1].bbox == box
    assert captions[0].bbox == Region(0, masks[0]).bbox
    turned = captioner.caption(image, [masks[1], {"id": "dog", "bbox": box}, masks[0]], **SETTINGS)
    assert [c.text for c in turned] == [c.text for c in captions[::-1]]
    assert len({caption.text for caption in captions}) == 3


def test_captions_are_those_of_generate(captioner):
    image, masks = pair(2)
    inputs = captioner.processor(images=image, segmentation_maps=masks)
    output = captioner.model.generate(**inputs, **SETTINGS)
    expected = captioner.processor.post_process_region_captions(output)[0]
    got = captioner.caption(image, masks, **SETTINGS)
    assert [c.text for c in got] == [c.text for c in expected]
    assert [c.score for c in got] == [c.score for c in expected]


def test_question_and_path(captioner, tmp_path):
    image, masks = pair(2)
    image.save(tmp_path / "a.png")
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    expected = captioner.caption(image, masks[:1], **SETTINGS)
    assert same(captioner.caption(tmp_path / "a.png", [tmp_path / "mask.png"], **SETTINGS), expected)
    assert same(captioner.caption(str(tmp_path / "a.png"), str(tmp_path / "mask.png"), **SETTINGS), expected)
    assert not same(captioner.caption(image, masks[:1], "What is this thing?", **SETTINGS), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_caption_many_equals_one_by_one(captioner, batch_size):
    pairs = [pair(seed, 1 + seed) for seed in range(5)]
    many = list(captioner.caption_many(pairs, batch_size=batch_size, **SETTINGS))
    assert len(many) == 5
    for (image, masks), captions in zip(pairs, many, strict=True):
        assert same(captions, captioner.caption(image, masks, **SETTINGS))


def test_caption_many_reads_as_needed(captioner):
    read = []

    def endless():
        seed = 0
        while True:
            read.append(seed)
            yield pair(seed, 1)
            seed += 1

    captions = captioner.caption_many(endless(), batch_size=2, **SETTINGS)
    assert read == []
    next(captions)
    assert read == [0, 1]
    next(captions), next(captions)
    assert read == [0, 1, 2, 3]
    assert list(captioner.caption_many([], **SETTINGS)) == []


@pytest.mark.parametrize(
    ("regions", "settings", "message"),
    [
        ([], {}, "No regions given"),
        ([np.zeros((64, 64))], {}, "region 0: is empty"),
        ([[0, 0, 5, 5]], {"temprature": 1}, r"Unknown generation settings \['temprature'\]"),
        ([[0, 0, 5, 5]], {"question": "<|eot_id|>"}, "special tokens"),
    ],
)
def test_wrong_calls(captioner, regions, settings, message):
    with pytest.raises(ValueError, match=message):
        captioner.caption(np.zeros((64, 64, 3), np.uint8), regions, **settings)


def test_wrong_batch_size(captioner):
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        list(captioner.caption_many([], batch_size=0))


def test_base_checkpoint_is_refused(golden_base):
    with pytest.raises(ValueError, match="PerceptionDLM-Base checkpoint"):
        RegionCaptioner.from_pretrained(golden_base)


def test_load_options(tiny_checkpoint, golden_regions):
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    assert captioner.model.dtype == torch.bfloat16
    assert len(captioner.caption(*pair(1), **SETTINGS)) == 2
    mapped = RegionCaptioner.from_pretrained(golden_regions, device_map="cpu")
    image, masks = make_image(0, 130, 120, 2)
    assert len(mapped.caption(image, masks, **SETTINGS)) == 2


# ---------------------------------------------------------------- streaming


def test_region_streamer(captioner):
    heard = []
    streamer = RegionStreamer(captioner.processor, lambda step, drafts: heard.append((step, drafts)))
    pairs = [pair(1, 3), pair(2, 1)]
    captions, output = captioner.generate(pairs, streamer=streamer, **SETTINGS)
    assert [step for step, _ in heard] == [1, 2, 3] == list(range(1, output.num_forwards + 1))
    assert [drafts for _, drafts in heard] == streamer.steps
    assert all([len(image) for image in drafts] == [3, 1] for drafts in streamer.steps)
    texts = [[caption.text for caption in image] for image in captions]
    assert streamer.captions == texts == streamer.steps[-1]
    assert streamer.steps[0] != texts


def test_streamer_without_callback(captioner):
    streamer = RegionStreamer(captioner.processor)
    captioner.generate([pair(1)], streamer=streamer, **SETTINGS)
    assert len(streamer.steps) == 3


def test_live_view_shows_every_step():
    file = io.StringIO()
    with LiveView(["dog", "7"], Console(file=file, force_terminal=True, width=80)) as view:
        view.show(1, [["a first draft", "other"]])
        view.show(2, [["a second draft", "other"]])
    text = file.getvalue()
    for part in ("denoising step 1", "denoising step 2", "a first draft", "a second draft", "dog", "7"):
        assert part in text


def test_drafts_stay_with_their_regions_when_a_image_takes_two_portions(captioner):
    """8 regions and 6 prompts: regions 6 and 7 come in the second pass, after the others."""
    image, masks = pair(2, 8)
    streamer = RegionStreamer(captioner.processor)
    captions, output = captioner.generate([(image, masks)], streamer=streamer, max_batch_tokens=1, **SETTINGS)
    assert len(streamer.steps) == output.num_forwards == 6
    assert [len(step[0]) for step in streamer.steps] == [6, 6, 6, 8, 8, 8]
    assert streamer.steps[-1][0] == [caption.text for caption in captions[0]]
    captioner.generate([pair(1)], streamer=streamer, **SETTINGS)  # another image: no draft of the last one is left
    assert [len(step[0]) for step in streamer.steps[6:]] == [2, 2, 2]
    file = io.StringIO()
    with LiveView([f"name {k}" for k in range(8)], Console(file=file, force_terminal=True, width=80)) as view:
        view.show(1, streamer.steps[0])
    assert "name 7" in file.getvalue()


# ---------------------------------------------------------------- drawing


@pytest.fixture
def drawing():
    image, masks = pair(1, 3)
    regions = parse_regions(masks, *image.size)
    captions = [RegionCaption("a caption " * k, 0.5) for k in (1, 12, 0)]
    return image, regions, captions


def test_drawing_holds_image_and_legend(drawing):
    image, regions, captions = drawing
    factor = round(480 / max(image.size))
    drawn = draw_captions(image, regions, captions)
    assert drawn.mode == "RGB"
    assert drawn.width == max(480, image.width * factor)
    assert drawn.height > image.height * factor + 3 * 24
    pixels = {pixel for _, pixel in drawn.getcolors(drawn.width * drawn.height)}
    for colour in COLOURS[:3]:  # in the legend
        assert tuple(bytes.fromhex(colour[1:])) in pixels
    assert tuple(bytes.fromhex(COLOURS[3][1:])) not in pixels


def test_drawing_outlines_the_regions_and_keeps_their_colours(drawing):
    image, regions, captions = drawing
    drawn = np.asarray(draw_captions(image, regions[:1], captions[:1])).astype(int)
    factor = round(480 / max(image.size))
    original = np.asarray(image).repeat(factor, 0).repeat(factor, 1).astype(int)
    changed = (drawn[: len(original), : original.shape[1]] != original).any(-1)
    inside = regions[0].mask.repeat(factor, 0).repeat(factor, 1)
    assert 0 < changed[inside].mean() < 0.05  # its number
    assert 0 < changed[~inside].mean() < 0.05  # its outline


def test_drawing_is_deterministic_and_leaves_the_image_alone(drawing):
    image, regions, captions = drawing
    before = image.tobytes()
    assert draw_captions(image, regions, captions).tobytes() == draw_captions(image, regions, captions).tobytes()
    assert image.tobytes() == before


def test_longer_captions_need_more_room(drawing):
    image, regions, captions = drawing
    short = draw_captions(image, regions, [RegionCaption("x", 1.0)] * 3)
    assert draw_captions(image, regions, captions).height > short.height


def test_save_drawing(drawing, tmp_path):
    save_drawing(tmp_path / "out.png", *drawing)
    with Image.open(tmp_path / "out.png") as written:
        assert written.tobytes() == draw_captions(*drawing).tobytes()


def test_large_image_and_many_regions(tmp_path):
    image = Image.new("RGB", (1000, 700))
    regions = parse_regions([[90 * k, 10, 60, 60] for k in range(11)], 1000, 700)
    drawn = draw_captions(image, regions, [RegionCaption(f"number {k}", 1.0) for k in range(11)])
    assert drawn.width == 1000


def test_fast_mode_uses_fewer_passes_and_calls_override_it(isolated_model, processor, scenes):
    pairs = [(image.image, image.masks) for image in scenes]
    fast = RegionCaptioner(isolated_model, processor, mode="fast")
    assert fast.settings({}) == MODES["fast"]
    settings = {"max_new_tokens": 8, "max_denoising_steps": 8}
    _, slow_output = RegionCaptioner(isolated_model, processor).generate(pairs, **settings)
    _, output = fast.generate(pairs, acceptance_threshold=0.2, **settings)
    assert slow_output.num_forwards == 8
    assert output.region_steps.float().mean() < 8
    with pytest.raises(ValueError, match="must be one of"):
        RegionCaptioner(isolated_model, processor, mode="quick")


def test_fast_mode_keeps_the_rule_of_a_checkpoint_that_has_one():
    fast = RegionCaptioner.from_pretrained(mode="fast")
    assert fast.model.generation_config.acceptance_threshold == 0.8
    assert fast.settings({}) == {"prefix_refresh_interval": 0}


def test_a_rule_takes_the_place_of_the_fast_one(captioner):
    fast = RegionCaptioner(captioner.model, captioner.processor, mode="fast")
    (image, masks) = pair(1)
    assert len(fast.caption(image, masks, entropy_bound=1e6, max_new_tokens=4)) == 2
    assert fast.generate([(image, masks)], acceptance_threshold=1e-9, max_new_tokens=4)[1].num_forwards == 1
    assert len(fast.caption(image, masks, remasking="random", seed=1, max_new_tokens=4)) == 2
    with pytest.raises(ValueError, match="leave out `acceptance_threshold`"):
        fast.caption(image, masks, entropy_bound=0.1, acceptance_threshold=0.9)


@pytest.mark.parametrize(("pairs", "message"), [([], "No images given"), ([(None, 5)], "expected")])
def test_nothing_to_caption(captioner, pairs, message):
    image = pair(1)[0]
    with pytest.raises(ValueError, match=message):
        captioner.generate([(image, regions) for _, regions in pairs])
