"""The lesson of templates, and figures in dark colours."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny import make_image

from pdlm_hf.shapes.dataset import TemplateDataset
from pdlm_hf.shapes.scenes import COLOURS, SHAPES_DOMAIN, WORDS, draw_scene
from pdlm_hf.shapes.templates import DARK_DOMAIN, NAMES, random_template
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
    assert len(texts) > 140
    assert all(sorted(Template(text).names) == sorted(WORDS) for text in texts)


def test_lists_call_attributes_by_known_and_by_invented_names():
    rng = np.random.default_rng(0)
    texts = [random_template(rng, ["size", "colour shape"]) for _ in range(300)]
    assert all(sorted(Template(text).names) == ["colour shape", "size"] for text in texts)
    named = [re.search(r"([\w ]+)(: | = | is | - )\{colour shape\}", text) for text in texts]
    names = [found[1].strip() for found in named if found]
    known = sum(name == "colour shape" for name in names)
    one = sum(name in NAMES["colour"] + NAMES["shape"] for name in names)
    other = sum(bool(re.fullmatch("([bdfgklmnprstvz][aeiou]){1,3}", name)) for name in names)
    assert min(known, one, other) >= 3


def test_a_domain_of_small_figures():
    small = replace(SHAPES_DOMAIN, large=0.0)
    assert {f.size for k in range(9) for f in draw_scene(np.random.default_rng(k), domain=small).figures} == {"small"}


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


def test_a_false_dark_is_shown_without_a_label(processor, rows):
    """What follows is labelled, as behind a true one."""
    dark = processor.tokenizer(" dark", add_special_tokens=False)["input_ids"]
    found = {True: 0, False: 0}
    for row in rows:
        for tokens, labels in (region["block"] for region in row["regions"] if "block" in region):
            for k in range(len(tokens) - len(dark)):
                if tokens[k : k + len(dark)] == dark and labels[k + len(dark)] != -100:
                    labelled = {label != -100 for label in labels[k : k + len(dark)]}
                    assert len(labelled) == 1
                    found[labelled.pop()] += 1
    assert min(found.values()) >= 3


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
