import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT, PdlmGenerationOutput, PdlmProcessor, RegionCaption
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.processing_pdlm import area_order
from pdlm_hf.prompts_pdlm import CHAT_TEMPLATE
from pdlm_hf.tiling_pdlm import num_tiles

SYSTEM = "<|start_header_id|>system<|end_header_id|>\nYou are a helpful assistant.<|eot_id|>\n"
USER = "<|start_header_id|>user<|end_header_id|>\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n"


@pytest.fixture(scope="module")
def base(golden_base):
    return AutoProcessor.from_pretrained(golden_base)


def prompts(processor, batch):
    """The prompt of every row, placeholders shortened to one per group."""
    texts = []
    for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = processor.tokenizer.decode(ids[real.bool()])
        for token in ("<IMG_CONTEXT>", *(f"<|reserved_token_{k}|>" for k in range(6))):
            while token * 2 in text:
                text = text.replace(token * 2, token)
        texts.append(text)
    return texts


# ---------------------------------------------------------------- area order


@pytest.mark.parametrize(
    ("areas", "order"),
    [
        ([3], [0]),
        ([1, 2, 3], [2, 1, 0]),
        ([5, 5, 5], [2, 1, 0]),  # of equal areas the later mask comes first, as np.argsort(areas)[::-1]
        ([2, 7, 2, 7], [3, 1, 2, 0]),
    ],
)
def test_area_order(areas, order):
    masks = [np.arange(10) < area for area in areas]
    assert area_order(masks) == order
    assert area_order(masks) == np.argsort(areas)[::-1].tolist()


# ---------------------------------------------------------------- regions


def test_prompt_with_regions(processor):
    image, masks = make_image(0, 64, 64, 2)
    batch = processor(images=image, segmentation_maps=masks)
    question = "Describe each masked region in detail."
    regions = "<|reserved_token_0|>\n<|reserved_token_1|>\n"
    expected = f"{SYSTEM}{USER}<img><IMG_CONTEXT></img>{regions}{question}<|eot_id|>\n{ASSISTANT}"
    assert prompts(processor, batch) == [expected]
    ids = batch["input_ids"][0].tolist()
    token = processor.tokenizer.convert_tokens_to_ids
    assert ids.count(token("<IMG_CONTEXT>")) == processor.tokens_per_tile
    assert ids.count(token("<|reserved_token_1|>")) == processor.tokens_per_region
    smaller_first = int(masks[0].sum() < masks[1].sum())
    assert batch["region_order"].tolist() == [[smaller_first, 1 - smaller_first, -1, -1, -1, -1]]
    assert batch["image_index"].tolist() == [0]


def test_text_overrides_the_question(processor):
    image, masks = make_image(0, 64, 64, 1)
    text = prompts(processor, processor(images=image, segmentation_maps=masks, text="What is this?"))[0]
    assert "\nWhat is this?<|eot_id|>" in text and "Describe" not in text
    images, maps = [image, image], [masks, masks]
    texts = prompts(processor, processor(images=images, segmentation_maps=maps, text=["One?", "Two?"]))
    assert ["One?" in texts[0], "Two?" in texts[1]] == [True, True]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda masks: masks, 2),
        (tuple, 2),
        (np.stack, 2),
        (lambda masks: torch.from_numpy(np.stack(masks)), 2),
        (lambda masks: masks[0], 1),
        (lambda masks: [Image.fromarray(mask) for mask in masks], 2),
        (lambda masks: Image.fromarray(masks[0]), 1),
        (lambda masks: [torch.from_numpy(mask)[None] for mask in masks], 2),
    ],
    ids=["list", "tuple", "array", "tensor", "single", "PIL", "single PIL", "tensors"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_forms_of_the_masks_of_a_image(processor, change, count, wrapped):
    image, masks = make_image(0, 64, 64, 2)
    maps = change(masks)
    if wrapped:
        batch = processor(images=[image], segmentation_maps=[maps])
    else:
        batch = processor(images=image, segmentation_maps=maps)
    expected = processor(images=image, segmentation_maps=masks[:count])
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_in_a_list_with_its_masks_flat(processor, count):
    image, masks = make_image(0, 64, 64, count)
    batch = processor(images=[image], segmentation_maps=masks)
    assert torch.equal(batch["region_order"], processor(images=image, segmentation_maps=masks)["region_order"])


def test_batch_shapes(processor, scenes):
    images, maps = [p.image for p in scenes], [p.masks for p in scenes]
    batch = processor(images=images, segmentation_maps=maps)
    rows, limit = len(images), processor.image_processor.num_region_prompts
    tiles = [num_tiles(*grid) for grid in batch["image_grids"].tolist()]
    size, side = processor.image_processor.size["height"], 64 // processor.image_processor.patch_size
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (sum(tiles), 3, size, size)
    assert batch["region_masks"].shape == (sum(tiles), limit, side, side)
    assert batch["region_boxes"].shape == (rows, limit, 4)
    assert batch["original_sizes"].tolist() == [[i.height, i.width] for i in images]
    assert batch["region_order"].shape == (rows, limit)
    assert batch["attention_mask"][:, -1].all()  # padded on the left
    assert (batch["region_order"] >= 0).sum(1).tolist() == [len(masks) for masks in maps]
    for k, (image, masks) in enumerate(zip(images, maps, strict=True)):
        single = processor(images=image, segmentation_maps=masks)
        real = batch["attention_mask"][k].bool()
        assert torch.equal(batch["input_ids"][k][real], single["input_ids"][0])


@pytest.mark.parametrize(("count", "passes"), [(6, [6]), (7, [6, 1]), (14, [6, 6, 2])])
def test_more_regions_than_prompts_are_split_into_passes(processor, count, passes):
    image, masks = make_image(3, 120, 130, count)
    batch = processor(images=[image, image], segmentation_maps=[masks, masks[:1]])
    assert (batch["region_order"] >= 0).sum(1).tolist() == [*passes, 1]
    assert batch["image_index"].tolist() == [0] * len(passes) + [1]
    order = batch["region_order"][: len(passes)].flatten().tolist()
    assert sorted(k for k in order if k >= 0) == list(range(count))
    for row in batch["region_order"].tolist():
        areas = [int(masks[k].sum()) for k in row if k >= 0]
        assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"segmentation_map": []}, TypeError, r"unknown arguments \['segmentation_map'\]"),
        ({"masks": [], "text": "Hi"}, TypeError, r"unknown arguments \['masks'\]"),
        ({}, ValueError, "No regions: pass `segmentation_maps`"),
        ({"segmentation_maps": []}, ValueError, "image 0: no regions"),
        ({"segmentation_maps": np.zeros((0, 64, 64))}, ValueError, "image 0: no regions"),
        ({"segmentation_maps": [np.zeros((64, 64))]}, ValueError, "image 0, mask 0: is empty"),
        (
            {"segmentation_maps": [np.ones((64, 64)), np.ones((64, 63))]},
            ValueError,
            "image 0, mask 1: has size 63 x 64",
        ),
        ({"segmentation_maps": [np.ones((64, 64))], "images": None}, ValueError, "without `images`"),
        (
            {"segmentation_maps": [[np.ones((64, 64))]] * 3, "images": [0, 0]},
            ValueError,
            "2 images, but masks for 3",
        ),
        ({"segmentation_maps": [np.ones((64, 64))], "text": ["a", "b"]}, ValueError, "1 images, but 2 questions"),
        (
            {"segmentation_maps": [np.ones((64, 64))], "text": 5},
            ValueError,
            "the question: expected a string, got int",
        ),
        ({"segmentation_maps": [np.ones((64, 64))], "images": "a.png"}, ValueError, "image 0: expected a PIL image"),
        ({"segmentation_maps": [np.ones((64, 64))], "return_tensors": "tf"}, ValueError, 'must be "pt", "np" or None'),
        ({"text": "Hi", "videos": [1]}, ValueError, "images only, not videos"),
        ({"text": "Hi", "audio": [1]}, ValueError, "images only, not videos or audio"),
    ],
)
def test_wrong_calls(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**{"images": np.zeros((64, 64, 3), np.uint8)} | arguments)


@pytest.mark.parametrize(
    "token", ["<|reserved_token_0|>", "<|mdm_mask|>", "<|eot_id|>", "<IMG_CONTEXT>", "<|Mask_Cap_1|>"]
)
def test_special_tokens_in_the_question_are_refused(processor, base, token):
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="special tokens of the model"):
        processor(images=image, segmentation_maps=[np.ones((64, 64))], text=f"What is {token}?")
    with pytest.raises(ValueError, match="text 0 holds special tokens"):
        base(images=image, text=f"What is {token}?")


def test_a_question_that_is_no_unicode_is_refused(processor, base):
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(SettingError, match="the question has half of a character, or bytes that are no UTF-8"):
        processor(images=image, segmentation_maps=[np.ones((64, 64))], text="Wei\udcdf?")
    with pytest.raises(SettingError, match="text 0 has half of a character"):
        base(images=image, text="\ud83d?")


@pytest.mark.parametrize("kind", ["np", None])
def test_return_tensors(processor, kind):
    image, masks = make_image(0, 64, 64, 2)
    expected = processor(images=image, segmentation_maps=masks)
    got = processor(images=image, segmentation_maps=masks, return_tensors=kind)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert isinstance(value, np.ndarray if kind == "np" else list)
        assert torch.equal(torch.as_tensor(np.array(value)), expected[name]), name


def test_base_checkpoint_refuses_regions(base):
    with pytest.raises(ValueError, match="PerceptionDLM-Base checkpoint"):
        base(images=np.zeros((64, 64, 3), np.uint8), segmentation_maps=[np.ones((64, 64))])


# ---------------------------------------------------------------- chat

CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "More"},
]


@pytest.mark.parametrize(
    ("messages", "training", "generation", "expected"),
    [
        (CONVERSATION[:1], False, True, f"{USER}<img><IMG_CONTEXT></img>\nHi?<|eot_id|>{ASSISTANT}"),
        (CONVERSATION[:1], True, True, f"{SYSTEM}{USER}<img><IMG_CONTEXT></img>Hi?<|eot_id|>\n{ASSISTANT}"),
        (CONVERSATION[2:], False, False, f"{USER}More<|eot_id|>"),
        (
            CONVERSATION,
            False,
            True,
            f"{USER}<img><IMG_CONTEXT></img>\nHi?<|eot_id|>{ASSISTANT}Yes.<|eot_id|>{USER}More<|eot_id|>{ASSISTANT}",
        ),
        (
            CONVERSATION,
            True,
            False,
            f"{SYSTEM}{USER}<img><IMG_CONTEXT></img>Hi?<|eot_id|>\n{ASSISTANT}Yes.<|eot_id|>{USER}More<|eot_id|>\n",
        ),
        (
            [{"role": "system", "content": "Be brief."}, CONVERSATION[2]],
            True,
            True,
            "<|start_header_id|>system<|end_header_id|>\nBe brief.<|eot_id|>\n" + f"{USER}More<|eot_id|>\n{ASSISTANT}",
        ),
    ],
)
def test_chat_template(base, messages, training, generation, expected):
    got = base.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, training=training)
    assert got == expected


def test_plain_and_formatted_text_are_the_same(base):
    image = np.zeros((128, 128, 3), np.uint8)
    plain = base(images=image, text="Hi?")
    formatted = base.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True)
    again = base(images=image, text=formatted)
    assert torch.equal(plain["input_ids"], again["input_ids"])
    assert prompts(base, plain) == [formatted]
    assert set(plain) == {"input_ids", "attention_mask", "pixel_values", "image_grids"}
    tiles = len(plain["pixel_values"])
    assert (plain["input_ids"] == base.image_token_id).sum() == tiles * base.tokens_per_tile


def test_chat_template_with_a_image_in_one_call(base):
    image = Image.new("RGB", (256, 128))
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi?"}]}
    batch = base.apply_chat_template([message], tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = base(images=image, text="Hi?")
    for name in ("input_ids", "pixel_values", "image_grids"):
        assert torch.equal(batch[name], expected[name]), name


def test_several_images_get_one_tile_each(base):
    images = [np.zeros((128, 512, 3), np.uint8), np.full((512, 128, 3), 255, np.uint8)]
    batch = base(images=images, text="Compare.")
    assert batch["pixel_values"].shape[0] == 2
    assert batch["image_grids"].tolist() == [[1, 1], [1, 1]]
    assert prompts(base, batch)[0].count("<img>") == 2
    assert base(images=images[:1], text="Compare.")["pixel_values"].shape[0] == 5


def test_chat_batch_is_padded_on_the_left(base):
    image = np.zeros((128, 128, 3), np.uint8)
    batch = base(images=[image, [image, image], []], text=["Hi?", "A much longer question?", "No image"])
    assert batch["pixel_values"].shape[0] == 3
    assert batch["attention_mask"].sum(1).unique().numel() == 3
    assert batch["attention_mask"][:, -1].all()
    padding = batch["input_ids"][~batch["attention_mask"].bool()]
    assert padding.eq(base.tokenizer.convert_tokens_to_ids("<|eot_id|>")).all()
    assert "pixel_values" not in base(text="No image")


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (f"{USER}<img><IMG_CONTEXT></img>Hi", 2, "text 0 has 1 image placeholders, but 2 images"),
        (f"{USER}Hi", 1, "text 0 has 0 image placeholders, but 1 images"),
        (f"{USER}<img><IMG_CONTEXT></img>Hi", 0, "text 0 has 1 image placeholders, but 0 images"),
        (["Hi", "Ho"], 1, "2 texts, but images for 1"),
        (None, 1, "Pass a question as `text`"),
        (7, 0, "text 0: expected a string, got int"),
        (["Hi", None], 0, "text 1: expected a string, got NoneType"),
    ],
)
def test_wrong_chat_calls(base, text, images, message):
    given = [np.zeros((128, 128, 3), np.uint8)] * images
    with pytest.raises((ValueError, TypeError), match=message):
        base(images=given or None, text=text)


# ---------------------------------------------------------------- settings of a call


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 60, "padding": "max_length", "do_normalize": False, "return_tensors": "np"},
        {
            "text_kwargs": {"max_length": 60, "padding": "max_length"},
            "images_kwargs": {"do_normalize": False},
            "common_kwargs": {"return_tensors": "np"},
        },
        {"text_kwargs": {"max_length": 60}, "padding": "max_length", "do_normalize": False, "return_tensors": "np"},
    ],
    ids=["flat", "nested", "mixed"],
)
def test_settings_flat_and_by_modality(base, settings):
    image = np.full((128, 128, 3), 255, np.uint8)
    batch = base(images=image, text="Hi?", **settings)
    assert isinstance(batch["input_ids"], np.ndarray) and batch["input_ids"].shape == (1, 60)
    end = base.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    count = batch["attention_mask"].sum()
    assert batch["input_ids"][0, : 60 - count].tolist() == [end] * (60 - count)
    assert (batch["pixel_values"] == 1).all()  # white, rescaled only
    assert (base(images=image, text="Hi?", return_tensors="np")["pixel_values"] == 1).all()  # (1 - 0.5) / 0.5
    black = base(images=image * 0, text="Hi?", **settings)["pixel_values"]
    assert (black == 0).all()


def test_regions_take_the_same_settings(processor):
    image, masks = make_image(0, 64, 64, 2)
    plain = processor(images=[image, image], segmentation_maps=[masks, masks[:1]])
    length = plain["input_ids"].shape[1]
    batch = processor(
        images=[image, image],
        segmentation_maps=[masks, masks[:1]],
        text_kwargs={"pad_to_multiple_of": 64, "padding_side": "right"},
        images_kwargs={"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "max_tiles": 1},
    )
    assert batch["input_ids"].shape[1] == -(-length // 64) * 64
    assert batch["attention_mask"][:, 0].all() and not batch["attention_mask"][:, -1].any()
    assert torch.allclose(batch["pixel_values"] * 2 - 1, plain["pixel_values"], atol=1e-6)
    assert torch.equal(batch["region_order"], plain["region_order"])


def test_the_settings_of_the_tokenizer_count(golden_base):
    loaded = AutoProcessor.from_pretrained(golden_base, padding="max_length", max_length=50)
    assert loaded(text="Hi?")["input_ids"].shape == (1, 50)
    assert loaded(text="Hi?", padding="longest")["input_ids"].shape[1] < 50


@pytest.mark.parametrize("where", [{}, {"text_kwargs": None}])
def test_a_prompt_too_long_is_an_error_and_never_cut(base, processor, where):
    image, masks = make_image(0, 64, 64, 2)
    count = processor(images=image, segmentation_maps=masks)["input_ids"].shape[1]

    def settings(limit):
        given = {"truncation": True, "max_length": limit}
        return {"text_kwargs": given} if where else given

    whole = processor(images=image, segmentation_maps=masks, **settings(count))
    assert whole["input_ids"].shape[1] == count
    with pytest.raises(ValueError, match=rf"A prompt has {count} tokens, more than the {count - 1} of `max_length`"):
        processor(images=image, segmentation_maps=masks, **settings(count - 1))
    with pytest.raises(ValueError, match=r"more than the 5 of `max_length`\. It is not cut"):
        base(text="What is this?", **settings(5))
    assert base(text="Hi?", max_length=5)["input_ids"].shape[1] > 5  # as of a tokenizer: a limit without truncation


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"segmentation_map": 1}, TypeError, r"unknown arguments \['segmentation_map'\]"),
        ({"images_kwargs": {"max_tile": 1}}, TypeError, r"unknown arguments \['max_tile'\]"),
        ({"text_kwargs": {"max_tiles": 1}}, TypeError, r"unknown arguments \['max_tiles'\]"),
        ({"common_kwargs": {"return_tensor": "pt"}}, TypeError, r"unknown arguments \['return_tensor'\]"),
        ({"text_kwargs": {"padding": False}, "padding": True}, ValueError, "padding was passed two times"),
        ({"images_kwargs": {"do_resize": True}, "do_resize": True}, ValueError, "do_resize was passed two times"),
        ({"do_resize": False}, ValueError, "do_resize=False: tiles are cut from the image resized"),
        ({"stride": 4}, ValueError, "stride=4: the prompt has a fixed layout"),
        ({"is_split_into_words": True}, ValueError, "is_split_into_words=True"),
        ({"padding": "max_length"}, ValueError, "needs `max_length`"),
        ({"padding": False}, ValueError, r"make no tensor: set `padding=True`"),
    ],
)
def test_settings_that_cannot_be_followed(base, settings, error, message):
    images = [Image.new("RGB", (64, 64))] * 2
    with pytest.raises(error, match=message):
        base(images=images, text=["Hi?", "Much longer, hi?"], **settings)


def test_rows_without_padding_and_mask(base):
    texts = ["Hi?", "Much longer, hi?"]
    padded = base(text=texts)
    lists = base(text=texts, padding=False, return_tensors=None)
    for ids, row, real in zip(lists["input_ids"], padded["input_ids"], padded["attention_mask"], strict=True):
        assert ids == row[real.bool()].tolist()
    assert [len(mask) for mask in lists["attention_mask"]] == [len(ids) for ids in lists["input_ids"]]
    assert set(base(text=texts, return_attention_mask=False)) == {"input_ids"}
    assert set(base(text=texts, num_frames=2, fps=None)) == {"input_ids", "attention_mask"}  # there are no videos


def test_model_input_names(base, processor):
    image, masks = make_image(0, 64, 64, 1)
    assert set(base(images=image, text="Hi?")) == set(base.model_input_names)
    assert set(processor(images=image, segmentation_maps=masks)) == set(processor.model_input_names)


# ---------------------------------------------------------------- conversations


def answers_of(base, messages, **settings):
    """Which texts `return_assistant_tokens_mask` marks, a list per conversation."""
    batch = base.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True, **settings
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert not {"offset_mapping", "text_replacement_offsets"} & set(batch)
    marked = []
    for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
        starts = [i for i in range(len(mask)) if mask[i] and (i == 0 or not mask[i - 1])]
        ends = [next((j for j in range(i, len(mask)) if not mask[j]), len(mask)) for i in starts]
        marked.append([base.tokenizer.decode(ids[i:j]) for i, j in zip(starts, ends, strict=True)])
    return marked


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokens_of_the_assistant(base, training, side):
    image = Image.new("RGB", (256, 128))
    look = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi?"}]}
    yes, no = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "It is no star."}
    messages = [[look, yes, {"role": "user", "content": "More"}, no], [CONVERSATION[2], yes]]
    settings = {"training": training, "processor_kwargs": {"padding_side": side}}
    assert answers_of(base, messages, **settings) == [
        ["Yes.<|eot_id|>", "It is no star.<|eot_id|>"],
        ["Yes.<|eot_id|>"],
    ]
    assert answers_of(base, messages[:1], **settings) == [["Yes.<|eot_id|>", "It is no star.<|eot_id|>"]]


OLD_TEMPLATE = CHAT_TEMPLATE.replace("{%- generation -%}{{- turn -}}{%- endgeneration -%}", "{{- turn -}}")


def test_a_template_without_generation_blocks_writes_the_same(base, golden_base, tmp_path):
    assert "generation -" not in OLD_TEMPLATE and "generation -" in base.chat_template
    base.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(OLD_TEMPLATE)
    old = AutoProcessor.from_pretrained(tmp_path)
    assert old.chat_template == OLD_TEMPLATE
    for training in (False, True):
        texts = [p.apply_chat_template(CONVERSATION, tokenize=False, training=training) for p in (old, base)]
        assert texts[0] == texts[1]
    image = np.zeros((128, 128, 3), np.uint8)
    assert torch.equal(old(images=image, text="Hi?")["input_ids"], base(images=image, text="Hi?")["input_ids"])


def test_the_template_of_the_embedded_checkpoints():
    for folder in (CHECKPOINT, BASE_CHECKPOINT):
        assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_settings_and_images_of_a_conversation(base, tmp_path):
    image = Image.effect_noise((256, 128), 64).convert("RGB")
    image.save(tmp_path / "noise.png")
    content = [{"type": "image", "path": str(tmp_path / "noise.png")}, {"type": "text", "text": "Hi?"}]
    batch = base.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"padding": "max_length", "max_length": 150, "images_kwargs": {"max_tiles": 1}},
    )
    expected = base(images=image, text="Hi?", max_tiles=1, padding="max_length", max_length=150)
    assert batch["input_ids"].shape == (1, 150) and batch["image_grids"].tolist() == [[1, 1]]
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_the_side_of_padding(golden_base, base, side):
    model, texts = AutoModelForImageTextToText.from_pretrained(golden_base), ["Hi?", "Much longer, hi?"]
    settings = {"max_new_tokens": 4, "max_denoising_steps": 4}
    alone = [model.generate(**base(text=text), **settings)[0, -4:].tolist() for text in texts]
    batch = base(text=texts, padding_side=side)
    assert bool(batch["attention_mask"].all(0)[0]) == (side == "right")
    tokens = model.generate(**batch, **settings)
    assert tokens[:, -4:].tolist() == alone
    assert torch.equal(tokens, model.generate(**base(text=texts), **settings))
    assert base.post_process_answers(tokens) == [base.read_caption(answer).text for answer in alone]


# ---------------------------------------------------------------- outputs


def output_of(processor, texts, slots=12):
    """A generation output whose captions are these texts: {image: [(text, ...)]}."""
    most = max(map(len, texts))
    tokens = torch.full((len(texts), most, slots), -1)
    for i, image in enumerate(texts):
        for k, text in enumerate(image):
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens[i, k] = torch.tensor(
                (ids + [processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")] * slots)[:slots]
            )
    scores = torch.arange(len(texts) * most).float().view(len(texts), most) / 10
    return PdlmGenerationOutput(region_tokens=tokens, region_scores=scores)


def test_captions_in_input_order(processor):
    output = output_of(processor, [["a red star", "a cross"], ["one"]])
    captions = processor.post_process_region_captions(output)
    assert [[c.text for c in image] for image in captions] == [["a red star", "a cross"], ["one"]]
    assert [c.id for c in captions[0]] == [0, 1]
    assert captions[0][1].score == pytest.approx(0.1)
    assert processor.tokenizer.decode(captions[0][0].token_ids) == "a red star"
    assert isinstance(captions[1][0], RegionCaption)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|eot_id|>lost", ""),  # an end-of-turn ends this caption only
        ("kept<|eot_id|>lost", "kept"),
        ("kept<|endoftext|>lost", "kept"),
        ("<|Mask_Cap_3|>a<|start_header_id|> b", "a b"),
        ("a<|mdm_mask|>b", "ab"),
        ("  spaces  ", "spaces"),
    ],
)
def test_special_tokens_never_reach_a_caption(processor, text, expected):
    captions = processor.post_process_region_captions(output_of(processor, [["first", text, "last"]]))[0]
    assert [c.text for c in captions] == ["first", expected, "last"]
    assert processor.decode_captions(output_of(processor, [[text]]).region_tokens) == [[expected]]


def test_batch_decode_of_what_generate_returns(processor, base):
    output = output_of(processor, [["a red star", "a cross<|eot_id|>lost"], ["one"]])
    assert processor.batch_decode(output) == processor.decode(output) == [["a red star", "a cross"], ["one"]]
    assert processor.batch_decode(output, skip_special_tokens=True) == [["a red star", "a cross"], ["one"]]
    ids = base.tokenizer(["Hi<|eot_id|>", "Ho<|eot_id|>"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    chat = PdlmGenerationOutput(sequences=ids)
    assert base.batch_decode(chat) == base.decode(chat) == base.batch_decode(ids) == ["Hi<|eot_id|>", "Ho<|eot_id|>"]
    assert base.batch_decode(chat, skip_special_tokens=True) == ["Hi", "Ho"]
    assert base.decode(ids[0]) == "Hi<|eot_id|>"
    assert base.post_process_image_text_to_text(chat) == base.post_process_image_text_to_text(ids) == ["Hi", "Ho"]


def test_split_captions(processor):
    text = f"{SYSTEM}<|Mask_Cap_0|>one<|eot_id|>x\n<|Mask_Cap_1|>two\n<|Mask_Cap_2|><|eot_id|>"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.split_captions(ids) == ["one", "two", ""]
    assert processor.split_captions([]) == []


def test_answers(base):
    texts = [f"{USER}Hi<|eot_id|>{ASSISTANT}It is.<|eot_id|>rest", f"{USER}Hi<|eot_id|>{ASSISTANT}No"]
    rows = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    end = base.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    sequences = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    assert base.post_process_answers(sequences) == ["It is.", "No"]
    whole = base.post_process_image_text_to_text(sequences)
    assert whole[0].endswith("It is.") and whole[1].endswith("No")
    assert not any("<|" in text for text in whole)


def test_pad(processor):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    right, left = processor.pad(rows, "right"), processor.pad(rows, "left")
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, end, end]]
    assert right["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["input_ids"].tolist() == [[1, 2, 3], [end, end, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# ---------------------------------------------------------------- save and load


def test_reference_folder(golden_regions, golden_base):
    regions, base = AutoProcessor.from_pretrained(golden_regions), AutoProcessor.from_pretrained(golden_base)
    assert type(regions) is type(base) is PdlmProcessor
    config = AutoModelForImageTextToText.from_pretrained(golden_regions).config
    assert regions.tokens_per_tile == config.feature_grid**2
    assert regions.tokens_per_region == config.num_roi_tokens == 16
    assert regions.image_processor.size["height"] == config.vision_config.image_size
    assert regions.image_processor.num_region_prompts == config.num_region_prompts
    assert (base.tokens_per_region, base.image_processor.num_region_prompts) == (0, 0)


@pytest.mark.parametrize("folder", ["golden_regions", "golden_base", None])
def test_saved_processor_gives_the_same_inputs(request, processor, tmp_path, folder):
    original = AutoProcessor.from_pretrained(request.getfixturevalue(folder)) if folder else processor
    original.save_pretrained(tmp_path)
    loaded = PdlmProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PdlmProcessor
    assert loaded.chat_template == original.chat_template
    assert (loaded.tokens_per_tile, loaded.tokens_per_region) == (original.tokens_per_tile, original.tokens_per_region)
    image, masks = make_image(5, 300, 140, 2)
    arguments = {"text": "Hi?"} if folder == "golden_base" else {"segmentation_maps": masks}
    expected, got = original(images=image, **arguments), loaded(images=image, **arguments)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_an_empty_batch_is_an_error(processor):
    with pytest.raises(ValueError, match="`images` is empty"):
        processor(images=[], segmentation_maps=[])


# ---------------------------------------------------------------- regions of a conversation


@pytest.mark.parametrize("question", [None, "What is it?"])
def test_regions_of_a_conversation(processor, question):
    """The masks of `processor_kwargs`, the image and the question of the message."""
    image, masks = make_image(0, 96, 64, 2)
    content = [{"type": "image", "image": image}, *([{"type": "text", "text": question}] if question else [])]
    given = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], processor_kwargs={"segmentation_maps": masks}, **given
    )
    expected = processor(images=image, text=question, segmentation_maps=masks)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_regions_are_described_in_one_turn(processor):
    image, masks = make_image(0, 96, 64, 2)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": image}]},
    ]
    with pytest.raises(ValueError, match="Regions are described in one turn"):
        processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, processor_kwargs={"segmentation_maps": masks}
        )
