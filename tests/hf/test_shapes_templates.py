"""The lesson of templates, and figures in dark colours."""

import numpy as np
import pytest
from tiny import make_image

from pdlm_hf.shapes.dataset import TemplateDataset
from pdlm_hf.shapes.scenes import COLOURS, WORDS, draw_scene
from pdlm_hf.shapes.templates import DARK_DOMAIN, random_template
from pdlm_hf.templates_pdlm import Template
from pdlm_hf.training.collator import PdlmCollator

GROUP = 4


@pytest.fixture(scope="module")
def rows(processor):
    mask = processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    data = TemplateDataset(processor.tokenizer, mask, 3, 40 * GROUP, GROUP)
    return [data[k] for k in range(len(data))]


def text_of(processor, tokens):
    return processor.tokenizer.decode(tokens)


def test_random_templates_have_every_place_once():
    rng = np.random.default_rng(0)
    texts = {random_template(rng, list(WORDS)) for _ in range(200)}
    assert len(texts) > 150
    assert all(sorted(Template(text).names) == sorted(WORDS) for text in texts)


def test_dark_colours_are_drawn_darker():
    assert len(DARK_DOMAIN.colours) == 12 and DARK_DOMAIN.colours["dark blue"] == (20, 38, 96)
    assert all(DARK_DOMAIN.colours[name] == colour for name, colour in COLOURS.items())
    drawn = {
        f.colour for seed in range(60) for f in draw_scene(np.random.default_rng(seed), domain=DARK_DOMAIN).figures
    }
    assert drawn == set(DARK_DOMAIN.colours)


def test_the_labels_are_the_words_of_the_figures(processor, rows):
    words = {word for values in DARK_DOMAIN.words.values() for words in values.values() for word in words}
    kinds = {"captions": 0, "shown": 0, "open": 0}
    for row in rows:
        blocks = [region["block"] for region in row["regions"] if "block" in region]
        if not blocks:
            kinds["captions"] += 1
            continue
        shown = True
        for tokens, labels in blocks:
            assert len(tokens) == len(labels) == row["num_slots"]
            assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
            labelled = [text_of(processor, [label]).strip() for label in labels if label != -100]
            assert labelled
            shown &= set(labelled) <= words  # an open one also has the token behind the value
        kinds["shown" if shown else "open"] += 1
    assert min(kinds.values()) >= 5 * GROUP


def test_every_row_is_the_same_again(processor, rows):
    mask = processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    again = TemplateDataset(processor.tokenizer, mask, 3, 40 * GROUP, GROUP)
    for k in (1, 17, 90):
        for one, other in zip(again[k]["regions"], rows[k]["regions"], strict=True):
            assert one.get("block") == other.get("block") and one.get("caption") == other.get("caption")


def test_blocks_in_the_collator(processor):
    image, masks = make_image(0)
    red, mask = processor.tokenizer(" red")["input_ids"][0], processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    block = [red, red, mask], [-100, red, -100]
    row = {"image": image, "regions": [{"mask": m, "block": block} for m in masks], "seed": 1, "mask_probability": 1.0}
    batch = PdlmCollator(processor, num_slots=3)([row])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    assert (labels != -100).sum() == len(masks) and set(labels[labels != -100].tolist()) == {red}
    assert batch["noise_mask"][0].equal(labels != -100)
    assert (ids == mask).sum() == len(masks)  # open positions without a label
