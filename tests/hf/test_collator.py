import copy

import numpy as np
import pytest
import torch
from tiny import make_image
from transformers import AutoProcessor

from pdlm_hf.masking_pdlm import caption_canvas
from pdlm_hf.training.collator import PdlmCollator, partition_regions, region_rows


def row(seed: int, captions: list[str], width: int = 64):
    image, masks = make_image(seed, width, 64, len(captions))
    return region_rows(image, masks, captions)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows():
    return [row(0, ["a red star", "one"]), row(1, ["the large one"], 130)]


def test_reference_layout_labels_everything_after_the_header(processor, rows):
    batch = PdlmCollator(processor, prompt_ids="ordered")(rows)
    for k, entry in enumerate(rows):
        areas = [region["mask"].sum() for region in entry["regions"]]
        order = np.argsort(areas)[::-1]
        text = (
            "\n".join(f"<|Mask_Cap_{i}|>{entry['regions'][at]['caption']}" for i, at in enumerate(order))
            + "<|eot_id|>"
        )
        labels, real = batch["labels"][k], batch["attention_mask"][k].bool()
        assert processor.tokenizer.decode(labels[labels != -100]) == text
        assert torch.equal(batch["input_ids"][k][labels != -100], labels[labels != -100])
        assert (labels[~real] == -100).all()
        ids = batch["input_ids"][k][real].tolist()
        header = processor.tokenizer.convert_tokens_to_ids("<|end_header_id|>")
        first = len(ids) - 1 - ids[::-1].index(header) + 2  # behind the header's newline
        assert labels[:first].eq(-100).all() and (labels[first : len(ids)] != -100).all()
    assert batch["attention_mask"][:, 0].all()  # padded on the right


def test_slots_layout_is_that_of_inference(model, processor, rows):
    slots, config = 12, model.config
    batch = PdlmCollator(processor, num_slots=slots, prompt_ids="ordered")(rows)
    ends = (config.mask_token_id, config.newline_token_id, config.eot_token_id)
    for k, entry in enumerate(rows):
        count = len(entry["regions"])
        image, masks = entry["image"], [region["mask"] for region in entry["regions"]]
        prompt = processor(images=image, segmentation_maps=masks)
        canvas = torch.tensor(caption_canvas(count, slots, config.caption_token_ids, *ends))
        expected = torch.cat([prompt["input_ids"][0], canvas])
        labelled = batch["labels"][k][: len(expected)] != -100
        ids = batch["input_ids"][k][: len(expected)]
        assert torch.equal(torch.where(labelled, config.mask_token_id, ids), expected)
        assert torch.equal(labelled, expected == config.mask_token_id)
        assert batch["attention_mask"][k].sum() == len(expected)
        for name in ("region_boxes", "image_grids", "original_sizes"):
            assert torch.equal(batch[name][k], prompt[name][0])
    # captions are filled up with end-of-turn
    labels = batch["labels"][1][batch["labels"][1] != -100]
    text = processor.tokenizer(rows[1]["regions"][0]["caption"])["input_ids"]
    assert labels.tolist() == text + [config.eot_token_id] * (slots - len(text))


def test_range_of_slots(processor, rows):
    collator = PdlmCollator(processor, num_slots=(10, 14), generator=generator())
    lengths = {int((collator(rows)["labels"][1] != -100).sum()) for _ in range(40)}
    assert lengths == {10, 11, 12, 13, 14}


def test_too_long_a_caption_is_refused(processor):
    with pytest.raises(
        ValueError, match=r"caption of region 0 has \d+ tokens, more than the 3 positions. .*'far too long"
    ):
        PdlmCollator(processor, num_slots=3)([row(0, ["far too long for three slots"])])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (row(0, ["x <|Mask_Cap_1|>"]), "caption of region 0 holds special tokens"),
        (row(0, ["x"] * 7, 200), "7 regions, but the checkpoint has 6 region prompts"),
        ({"image": np.zeros((9, 9, 3), np.uint8), "regions": []}, "no regions"),
        ({"image": np.zeros((9, 9, 3), np.uint8), "regions": [{"mask": np.zeros((9, 9)), "caption": ""}]}, "is empty"),
    ],
)
def test_bad_rows(processor, entry, message):
    with pytest.raises(ValueError, match=message):
        PdlmCollator(processor, num_slots=8)([entry])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_ids": "sorted"}, '`prompt_ids` must be "random" or "ordered"'),
        ({"replacement_noise": True}, "`vocab_size`"),
    ],
)
def test_bad_settings(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        PdlmCollator(processor, **settings)


def test_question(processor):
    batch = PdlmCollator(processor)([row(0, ["x"]) | {"question": "What is here?"}])
    assert "What is here?" in processor.tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("slots", [None, 12])
def test_noise_falls_on_labels_only(processor, rows, slots):
    batch = PdlmCollator(processor, num_slots=slots, generator=generator())(rows * 8)
    assert batch["noise_mask"].dtype == torch.bool
    assert batch["noise_mask"].shape == batch["labels"].shape
    assert not (batch["noise_mask"] & (batch["labels"] == -100)).any()
    share = batch["noise_mask"].sum(1) / (batch["labels"] != -100).sum(1)
    assert torch.corrcoef(torch.stack([share, batch["mask_probability"]]))[0, 1] > 0.8


@pytest.mark.parametrize("floor", [1e-3, 0.3])
def test_noise_floor(processor, floor):
    labels = torch.ones(2000, 3, dtype=torch.long)
    probability = PdlmCollator(processor, noise_floor=floor, generator=generator()).noise(labels)["mask_probability"]
    assert probability.min() >= floor and probability.max() <= 1
    assert probability.mean().item() == pytest.approx((1 + floor) / 2, abs=0.02)


def test_draws_in_the_order_of_the_reference(processor):
    labels = torch.ones(2, 5, dtype=torch.long)
    noise = PdlmCollator(processor, replacement_noise=True, vocab_size=50, generator=generator(7)).noise(labels)
    again = generator(7)
    probability = (1 - 1e-3) * torch.rand(2, generator=again) + 1e-3
    masked = torch.rand(2, 5, generator=again) < probability[:, None]
    torch.rand(2, generator=again)
    replaced = torch.rand(2, 5, generator=again) < probability[:, None]
    ids = torch.randint(0, 50, (2, 5), generator=again)
    torch.testing.assert_close(noise["mask_probability"], probability)
    assert torch.equal(noise["noise_mask"], masked)
    assert torch.equal(noise["replacement_ids"], torch.where(masked & replaced, ids, -1))


def test_a_generator_makes_it_repeatable(processor, rows):
    def collate(seed):
        collator = PdlmCollator(processor, num_slots=(10, 14), prompt_ids="ordered", generator=generator(seed))
        return collator(rows)

    first, second, other = collate(1), collate(1), collate(2)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["mask_probability"], other["mask_probability"])


def test_random_prompts_use_all_planes(processor):
    collator = PdlmCollator(processor, prompt_ids="random")
    planes = set()
    for _ in range(60):
        batch = collator([row(0, ["a", "b"])])
        used = batch["region_masks"].flatten(2).any(-1).any(0).nonzero()[:, 0].tolist()
        assert len(used) == 2
        planes |= set(used)
    assert planes == set(range(6))
    assert "<|reserved_token_0|>" in processor.tokenizer.decode(batch["input_ids"][0])  # text stays in order


@pytest.mark.parametrize("settings", [{}, {"num_slots": 12}, {"replacement_noise": True, "vocab_size": 512}])
def test_batch_goes_into_the_model(model, processor, rows, settings):
    if "replacement_noise" in settings:
        model = copy.deepcopy(model)
        model.config.replacement_noise_mode = True
    batch = PdlmCollator(processor, generator=generator(), **settings)(rows)
    with torch.no_grad():
        loss = model(**batch).loss
    assert torch.isfinite(loss) and loss > 0


CHOICES = {"size": ["small", "large"], "colour": ["blue", "dark blue"]}


def with_attributes(entry, *values):
    for region, own in zip(entry["regions"], values, strict=True):
        region |= {"attributes": own} if own else {}
    return entry


def answers(processor, rows, **settings):
    """Labelled text and all text of the answer of every row, unknown places as "_"."""
    plan = processor.attribute_plan(CHOICES)
    batch = PdlmCollator(processor, prompt_ids="ordered", attributes=plan, **settings)(rows)
    found = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        start = ids.index(processor.tokenizer.convert_tokens_to_ids("<|Mask_Cap_0|>"))
        text = processor.tokenizer.decode(ids[start:]).replace("<|mdm_mask|>", "_")
        found.append((processor.tokenizer.decode([label for label in labels if label != -100]), text))
    return found


def test_captions_only_attributes_only_and_both(processor):
    small, dark = {"size": "small"}, {"colour": "dark blue"}
    captioned, both = row(0, ["one", "two"]), with_attributes(row(0, ["one", "two"]), small, {"size": "large"})
    bare = with_attributes(row(0, ["one", "two"]), small, dark)
    for region in bare["regions"]:
        del region["caption"]
    order = sorted((0, 1), key=lambda k: -captioned["regions"][k]["mask"].sum())
    sizes = [("small", "large")[k] for k in order]
    plain = "<|Mask_Cap_0|>{}\n<|Mask_Cap_1|>{}<|eot_id|>".format(*(("one", "two")[k] for k in order))
    lesson = "<|Mask_Cap_0|>size: {}\n<|Mask_Cap_1|>size: {}<|eot_id|>".format(*sizes)
    [(labels, text)] = answers(processor, [captioned], attribute_share=1)
    assert labels == plain and text.startswith(plain)
    [(labels, text)] = answers(processor, [both], attribute_share=0)
    assert labels == plain
    [(labels, text)] = answers(processor, [both], attribute_share=1)
    assert labels == "".join(f" {size}" for size in sizes) and text.startswith(lesson)
    [(labels, text)] = answers(processor, [bare], attribute_share=0)  # nothing else is known of these regions
    assert sorted(labels.replace("<|eot_id|>", "").split()) == ["blue", "dark", "small"]
    some = with_attributes(row(0, ["one", "two"]), *(small if k == order[0] else None for k in (0, 1)))
    [(labels, text)] = answers(processor, [some], attribute_share=1)
    caption = ("one", "two")[order[1]]
    assert labels == f" small<|Mask_Cap_1|>{caption}<|eot_id|>"  # a caption still has its end


def test_all_regions_of_a_row_have_the_same_block(processor):
    entry = with_attributes(row(0, ["one", "two"]), *[{"size": "small", "colour": "blue"}] * 2)
    seen = set()
    for seed in range(12):
        [(_, text)] = answers(processor, [entry | {"seed": seed}], attribute_share=1)
        first, second = text.split("<|Mask_Cap_1|>")
        assert ("colour" in first) == ("colour" in second)
        seen.add("colour" in first)
        assert answers(processor, [entry | {"seed": seed}], attribute_share=1)[0][1] == text
    assert seen == {False, True}


def test_the_loss_of_attributes_is_that_of_the_paper(model, processor):
    """Only masked places count, with the weight 1 / t, over the labelled ones."""
    entry = with_attributes(row(0, ["one", "two"]), {"size": "small"}, {"size": "large"})
    plan = processor.attribute_plan({"size": ["small", "large"]})
    collator = PdlmCollator(processor, generator=generator(2), attributes=plan, attribute_share=1)
    batch = collator([entry])
    labelled = batch["labels"][0] != -100
    assert int(labelled.sum()) == 2
    batch["noise_mask"] = labelled[None].clone()
    batch["noise_mask"][0, labelled.nonzero()[0]] = False
    batch["mask_probability"] = torch.tensor([0.25])
    with torch.no_grad():
        loss = model(**batch, output_masked_logits=True)
    target = batch["labels"][batch["noise_mask"]]
    expected = torch.nn.functional.cross_entropy(loss.masked_logits.float(), target) / 0.25 / 2
    torch.testing.assert_close(loss.loss, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "huge"}, "region 0: attribute 'size': 'huge' is none of its choices"),
        ({"weight": "3"}, "region 0 has no caption, and none of the attributes that are taught"),
        (None, "region 0 has no caption, and none"),
    ],
)
def test_attributes_that_cannot_be_taught(processor, values, message):
    entry = with_attributes(row(0, ["one"]), values)
    del entry["regions"][0]["caption"]
    with pytest.raises(ValueError, match=message):
        answers(processor, [entry])


def test_conversations(golden_base):
    processor = AutoProcessor.from_pretrained(golden_base)
    image = make_image(0, 256, 128)[0]
    content = [{"type": "image"}, {"type": "text", "text": "Hi?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "No more."},
    ]
    batch = PdlmCollator(processor, generator=generator())(
        [{"images": [image], "messages": messages}, {"messages": messages[2:]}]
    )
    for k, expected in enumerate(["Yes.<|eot_id|>No more.<|eot_id|>", "No more.<|eot_id|>"]):
        labels = batch["labels"][k]
        assert processor.tokenizer.decode(labels[labels != -100]) == expected
        assert torch.equal(batch["input_ids"][k][labels != -100], labels[labels != -100])
    template = processor.apply_chat_template(messages, tokenize=False, training=True)
    real = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    text = processor.tokenizer.decode(real[real != processor.image_token_id])
    assert text == template.replace("<IMG_CONTEXT>", "")
    tiles = 3
    assert batch["pixel_values"].shape[0] == tiles
    assert (real == processor.image_token_id).sum() == tiles * processor.tokens_per_tile


@pytest.mark.parametrize("settings", [{}, {"num_slots": (10, 14)}, {"replacement_noise": True, "vocab_size": 512}])
def test_rows_with_seeds_draw_their_own_noise(processor, rows, settings):
    seeded = [entry | {"seed": 5 + k} for k, entry in enumerate(rows)]
    collator = PdlmCollator(processor, **settings)
    together, alone = collator(seeded), [collator([entry]) for entry in seeded]
    for k, one in enumerate(alone):
        length = one["labels"].shape[1]
        for name in {"input_ids", "labels", "noise_mask", "replacement_ids"} & one.keys():
            assert torch.equal(together[name][k, :length], one[name][0]), name
        assert together["mask_probability"][k] == one["mask_probability"][0]
        assert not together["noise_mask"][k, length:].any()
    assert together["mask_probability"][0] != together["mask_probability"][1]
    assert not torch.equal(alone[0]["noise_mask"], collator([seeded[0] | {"seed": 99}])["noise_mask"])


def test_sample_losses(model, processor, rows):
    """Their mean is the loss, and each is the loss of its row alone."""
    collator = PdlmCollator(processor)
    seeded = [entry | {"seed": k} for k, entry in enumerate(rows)]
    with torch.no_grad():
        output = model(**collator(seeded))
        alone = [model(**collator([entry])).loss for entry in seeded]
    torch.testing.assert_close(output.sample_losses, torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.sample_losses.mean(), output.loss)


# ---------------------------------------------------------------- groups of regions


@pytest.mark.parametrize(
    ("num_regions", "num_prompts", "sizes"),
    [(0, 6, [0]), (1, 6, [1]), (3, 6, [3]), (4, 6, [2, 2]), (6, 6, [3, 3]), (7, 6, [4, 3]), (8, 6, [3, 3, 2])],
)
def test_partition_sizes(num_regions, num_prompts, sizes):
    groups = partition_regions(num_regions, num_prompts, index=3, epoch=1)
    assert [len(group) for group in groups] == sizes
    assert sorted(k for group in groups for k in group) == list(range(num_regions))


def test_partition_changes_with_epoch_and_image_only():
    assert partition_regions(9, 6, 1, 0) == partition_regions(9, 6, 1, 0)
    assert len({str(partition_regions(9, 6, index, epoch)) for index in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("num_prompts", [1, 2, 5, 6, 15])
@pytest.mark.parametrize("num_regions", [1, 5, 6, 20, 61])
def test_groups_fit_a_pass(num_regions, num_prompts):
    assert max(map(len, partition_regions(num_regions, num_prompts, 0, 0))) <= num_prompts


# ---------------------------------------------------------------- at least one masked token


def test_rows_without_a_masked_token(processor):
    """The reference has them: 1 of n + 1 answers of n tokens. With slots, and on request, there are none."""
    labels = torch.full((4000, 7), 5)
    labels[:, :2] = -100
    kept = PdlmCollator(processor, generator=generator()).noise(labels)
    assert (~kept["noise_mask"].any(1)).float().mean().item() == pytest.approx(1 / 6, abs=0.02)
    for settings in ({"at_least_one": True}, {"num_slots": 12}):
        drawn = PdlmCollator(processor, generator=generator(), **settings).noise(labels)
        assert drawn["noise_mask"].any(1).all() and not drawn["noise_mask"][:, :2].any()
        some = kept["noise_mask"].any(1)
        assert torch.equal(drawn["noise_mask"][some], kept["noise_mask"][some])  # the same numbers are drawn
        assert (drawn["noise_mask"][~some].sum(1) == 1).all()
        expected = kept["mask_probability"] + (1 - kept["mask_probability"]) ** 5 / 5
        assert torch.allclose(drawn["mask_probability"], expected)
    none = PdlmCollator(processor, num_slots=12, at_least_one=False, generator=generator()).noise(labels)
    assert torch.equal(none["noise_mask"], kept["noise_mask"])


def test_the_expectation_of_the_loss_stays(processor):
    """A token weighs one over the probability that it is masked, so that every token weighs 1 in the mean."""
    labels = torch.zeros(200_000, 3, dtype=torch.long)
    drawn = PdlmCollator(processor, at_least_one=True, generator=generator()).noise(labels)
    weight = (drawn["noise_mask"] / drawn["mask_probability"][:, None]).mean(0)
    assert weight.tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert drawn["mask_probability"].min() >= 1 / 3  # no weight is above the number of tokens


def test_rows_without_labels_are_left_alone(processor):
    labels = torch.full((3, 4), -100)
    drawn = PdlmCollator(processor, at_least_one=True, generator=generator()).noise(labels)
    assert not drawn["noise_mask"].any() and torch.isfinite(drawn["mask_probability"]).all()


def test_a_row_can_say_how_much_of_it_is_masked(processor, rows):
    collator = PdlmCollator(processor, num_slots=24)
    first, second = ({**row, "seed": k} for k, row in enumerate(rows))
    batch, plain = collator([first | {"mask_probability": 1.0}, second]), collator([first, second])
    assert torch.equal(batch["noise_mask"][0], batch["labels"][0] != -100) and batch["mask_probability"][0] == 1
    assert plain["mask_probability"][0] < 1
    assert torch.equal(batch["noise_mask"][1], plain["noise_mask"][1])
    labelled = int((batch["labels"][0] != -100).sum())
    tenth = collator([first | {"mask_probability": 0.1}])
    chance = 0.1 + 0.9**labelled / labelled  # one token is masked in any case
    assert tenth["mask_probability"].item() == pytest.approx(chance) and tenth["noise_mask"].sum() < labelled / 2
