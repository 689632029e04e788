import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pdlm_hf.shapes.dataset import COMMITTED_WORDS, CommitDataset, ShapesDataset, committed
from pdlm_hf.shapes.evaluate import Tally, evaluate, held_out
from pdlm_hf.shapes.scenes import (
    MAX_REGIONS,
    PATTERNS,
    SHAPES_DOMAIN,
    TILE,
    WORDS,
    Figure,
    Scene,
    describe,
    draw_scene,
    read,
)
from pdlm_hf.tiling_pdlm import best_grid

FIGURES = [Figure(*values) for values in itertools.product(*WORDS.values())]


def drawn(seed):
    return draw_scene(np.random.default_rng(seed))


@pytest.fixture(scope="module")
def many():
    return [drawn(seed) for seed in range(250)]


# ---------------------------------------------------------------- captions


def test_every_wording_of_every_figure_is_read_back():
    """All figures in all patterns, each with all first and all last synonyms."""
    assert len(FIGURES) == 2 * 8 * 3 * 5
    for figure, pattern, choice in itertools.product(FIGURES, PATTERNS, (0, -1)):
        words = {attribute: values[getattr(figure, attribute)][choice] for attribute, values in WORDS.items()}
        assert read(pattern.format(**words)) == figure


def test_describe_is_true_and_varied():
    rng = np.random.default_rng(0)
    for figure in FIGURES:
        assert read(describe(figure, rng)) == figure
    figure = Figure("small", "red", "striped", "circle")
    wordings = {describe(figure, rng) for _ in range(2000)}
    assert len(wordings) == len(PATTERNS) * 2 * 1 * 2 * 2
    assert 4 <= min(len(w.split()) for w in wordings) and max(len(w.split()) for w in wordings) <= 20


def test_no_wording_is_ambiguous():
    words = Counter(word for values in WORDS.values() for synonyms in values.values() for word in synonyms)
    assert max(words.values()) == 1


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "A small red plain",
        "A small red plain circle.",
        "a small red plain circle",
        "A small  red plain circle",
        "A small crimson plain circle",
        "A red small plain circle",
        "A small red plain circle A small red plain circle",
        "This circle is red, plain and.",
        "One plain circle, small and red, small.",
    ],
)
def test_other_sentences_are_not_well_formed(caption):
    assert read(caption) is None


def test_captions_fit_the_slots(processor):
    from tools.shapes.train import SLOTS

    rng = np.random.default_rng(0)
    lengths = [len(processor.tokenizer(describe(figure, rng))["input_ids"]) for figure in FIGURES * 10]
    assert min(lengths) >= 4 and max(lengths) <= min(SLOTS)


def test_tokenizer_writes_any_text(processor):
    for text in ('{"regions": [1, 2]}', "Größe, 大きさ, 🟥", "never\ttrained\non"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


# ---------------------------------------------------------------- images


def test_masks_are_visible_and_disjoint(many):
    for image in many[:80]:
        assert 1 <= len(image.figures) == len(image.masks) <= MAX_REGIONS
        for mask in image.masks:
            assert mask.dtype == bool and mask.shape == (image.image.height, image.image.width)
            assert mask.sum() >= 20
        assert np.sum(image.masks, axis=0).max() == 1


def test_numbers_of_regions_and_tiles_all_occur(many):
    assert {len(image.figures) for image in many} == set(range(1, MAX_REGIONS + 1))
    grids = {best_grid(*image.image.size, TILE, 1, 6) for image in many}
    assert {columns * rows for columns, rows in grids} == {1, 2, 3, 4, 5, 6}
    assert any(columns > rows for columns, rows in grids) and any(columns < rows for columns, rows in grids)


def test_every_attribute_occurs(many):
    for attribute, values in WORDS.items():
        seen = Counter(getattr(figure, attribute) for image in many for figure in image.figures)
        assert seen.keys() == values.keys()
        assert min(seen.values()) > 0.5 * sum(seen.values()) / len(values)


def test_some_figures_touch(many):
    def touching(image):
        grown = [m | np.roll(m, 2, 0) | np.roll(m, 2, 1) | np.roll(m, -2, 0) | np.roll(m, -2, 1) for m in image.masks]
        return any((a & b).any() for a, b in itertools.combinations(grown, 2))

    assert sum(map(touching, many)) > 5


def same(left: Scene, right: Scene) -> bool:
    return left.image.tobytes() == right.image.tobytes() and left.figures == right.figures


def test_a_seed_decides_everything():
    assert same(drawn(3), drawn(3))
    assert all(np.array_equal(a, b) for a, b in zip(drawn(3).masks, drawn(3).masks, strict=True))
    assert not same(drawn(3), drawn(4))


def test_images_of_a_layout_have_as_many_figures():
    for seed in range(10):
        images = [draw_scene(np.random.default_rng(k), np.random.default_rng(seed)) for k in range(3)]
        assert len({len(image.figures) for image in images}) == 1
        assert not same(images[0], images[1])


def test_dots_are_squares_in_rows_and_columns():
    """As if they were drawn one by one; the images of a seed must not change."""
    for width, height, period, phase in ((77, 51, 5.83, 0.41), (64, 64, 5.5, 0.0), (260, 70, 7.1, 0.97)):
        one_by_one, found = (Image.new("RGB", (width, height), (9, 99, 199)) for _ in range(2))
        draw = ImageDraw.Draw(one_by_one)
        for x, y in itertools.product((np.arange(60) + phase) * period, repeat=2):
            draw.rectangle([x, y, x + 0.45 * period, y + 0.45 * period], fill=(25, 25, 30))
        SHAPES_DOMAIN.texture(ImageDraw.Draw(found), "dotted", width, height, period, phase, (25, 25, 30))
        assert found.tobytes() == one_by_one.tobytes()


# ---------------------------------------------------------------- data sets


def test_dataset_is_deterministic_and_has_no_repeats():
    dataset, again = ShapesDataset(0, 12, 4), ShapesDataset(0, 12, 4)
    assert len(dataset) == 12
    for index in (0, 5, 11):
        left, right = dataset[index], again[index]
        assert left["image"].tobytes() == right["image"].tobytes()
        assert [r["caption"] for r in left["regions"]] == [r["caption"] for r in right["regions"]]
    assert len({row["image"].tobytes() for row in dataset}) == 12
    assert dataset[0]["image"].tobytes() != ShapesDataset(1, 12, 4)[0]["image"].tobytes()
    with pytest.raises(IndexError):
        dataset[12]
    counts = [len(row["regions"]) for row in dataset]
    assert all(len(set(counts[k : k + 4])) == 1 for k in (0, 4, 8))


def test_dataset_captions_are_true():
    for row in ShapesDataset(3, 8, 1):
        for region in row["regions"]:
            assert read(region["caption"]) is not None
            assert region["mask"].any()


def test_the_one_wording_is_true():
    assert committed(Figure("small", "red", "dotted", "square")) == "One spotted box, little and red."
    assert committed(Figure("large", "blue", "plain", "star")) == "One plain star, big and blue."
    words = {word: value for values in WORDS.values() for value, found in values.items() for word in found}
    assert all(words[word] == value for value, word in COMMITTED_WORDS.items())


def test_commit_rows_have_the_one_wording_where_nothing_is_written():
    rows = list(CommitDataset(3, 64, 4))
    empty = [row for row in rows if row["mask_probability"] == 1]
    assert 20 < len(empty) < 50
    own = [all(r["caption"] == committed(read(r["caption"])) for r in row["regions"]) for row in rows]
    assert all(found for found, row in zip(own, rows, strict=True) if row["mask_probability"] == 1)
    assert not all(own) and all(0.1 <= row["mask_probability"] for row in rows)
    groups = [rows[start : start + 4] for start in range(0, 64, 4)]
    for group in groups:  # short captions or long ones, and as many regions in each image
        assert len({row["num_slots"] < 20 for row in group}) == len({len(row["regions"]) for row in group}) == 1
    assert 0 < sum(group[0]["num_slots"] < 20 for group in groups) < 16


@pytest.mark.parametrize("easy", [False, True])
def test_held_out_images_are_not_training_images(easy):
    unseen = list(held_out(0, 8, easy))
    assert all(same(a, b) for a, b in zip(unseen, held_out(0, 8, easy), strict=True))
    training = {row["image"].tobytes() for row in ShapesDataset(0, 8, 1)}
    assert not training & {image.image.tobytes() for image in unseen}
    assert not any(same(a, b) for a, b in zip(unseen, held_out(1, 8, easy), strict=True))
    if easy:
        assert {best_grid(*image.image.size, TILE, 1, 6) for image in unseen} == {(1, 1)}
        assert max(len(image.masks) for image in unseen) <= 2


# ---------------------------------------------------------------- score


def test_tally():
    red = Figure("small", "red", "plain", "circle")
    blue = Figure("large", "blue", "dotted", "star")
    tally = Tally()
    tally.add(Scene(None, [], [red, blue]), ["A little red solid disc", "A large blue dotted cross"])
    tally.add(Scene(None, [], [red]), ["A red thing"])
    tally.add(Scene(None, [], [blue]), ["One spotted star, big and blue."])
    assert tally.report() == {
        "captions": 4,
        "exact": 0.5,
        "well_formed": 0.75,
        "by_attribute": {"size": 0.75, "colour": 0.75, "texture": 0.75, "shape": 0.5},
        "by_regions": {"1": 0.5, "2": 0.5},
    }


def test_evaluate_reports_what_it_did(model, processor):
    with torch.inference_mode():
        report = evaluate(model, processor, seed=1, images=3, batch_size=2, max_new_tokens=6, max_denoising_steps=2)
    assert report["captions"] == sum(len(image.figures) for image in held_out(1, 3))
    assert report["exact"] == report["well_formed"] == 0
    assert (report["images"], report["seed"], report["batch_size"], report["num_forwards"]) == (3, 1, 2, 2)
    assert report["tokens_per_forward"] == pytest.approx(report["captions"] * 6 / 4, abs=0.01)
    assert report["seconds"] >= 0
