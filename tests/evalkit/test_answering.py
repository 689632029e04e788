"""Prompts, settings, batches and costs of answers."""

import json

import numpy as np
import pytest
from PIL import Image

from pdlm_evalkit.answering import Answerer, Question, shorten
from pdlm_evalkit.benchmarks import find_benchmark as find
from pdlm_evalkit.settings import our_settings
from pdlm_hf.shapes.evaluate import held_out_scene
from pdlm_hf.shapes.evaluate_base import held_out_question
from pdlm_hf.shapes.questions import SLOTS


@pytest.fixture(scope="module")
def base():
    return Answerer.from_pretrained("shapes_base", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def regions():
    return Answerer.from_pretrained("shapes", device="cpu", batch_size=4)


def with_settings(answerer, **settings):
    return Answerer(answerer.model, answerer.processor, answerer.batch_size, **settings)


def settings(answerer, benchmark=None, **asked):
    found = answerer.settings_of(Question([], "Q", find(benchmark) if benchmark else None, asked))
    return found["max_new_tokens"], found["block_length"], found["max_denoising_steps"]


class TestSettings:
    def test_the_paper_decides(self, base):
        assert settings(base, "MMStar") == (2, 2, 2)
        assert settings(base, "MathVista") == (256, 1, 256)
        assert settings(base, "ChartQA") == (128, 128, 128)
        assert settings(base) == (64, 64, 64)

    def test_the_caller_goes_before_the_paper(self, base):
        assert settings(with_settings(base, block_length=1), "MMStar") == (2, 1, 2)
        assert settings(with_settings(base, block_length=32), "ChartQA") == (128, 32, 128)
        assert settings(with_settings(base, steps=64), "ChartQA") == (128, 128, 64)

    def test_another_length_keeps_the_way_of_decoding(self, base):
        assert settings(with_settings(base, max_new_tokens=32), "MMStar") == (32, 32, 32)
        assert settings(with_settings(base, max_new_tokens=512), "MathVista") == (512, 1, 512)
        assert settings(base, max_new_tokens=16) == (16, 16, 16)
        assert settings(base, max_new_tokens=16, block_length=64) == (16, 16, 16)

    def test_without_presets(self, base):
        assert settings(with_settings(base, presets="none"), "MMStar") == (64, 64, 64)

    def test_what_is_no_setting_of_generate(self, base):
        changed = with_settings(base, max_tiles=2, prompt_suffix=" Say it.", shorten=False, upscale_first=True)
        benchmark = changed.benchmark("mmstar")
        found = (benchmark.max_tiles, benchmark.suffix, benchmark.shorten, benchmark.upscale_first)
        assert found == (2, " Say it.", False, True)
        assert changed.describe()["settings"]["max_tiles"] == 2
        assert changed._tiles(Question([None], "", benchmark)) == 2
        assert changed.benchmark("other") is None and base.benchmark("mmstar") == find("MMStar")
        assert with_settings(base, presets="none").benchmark("mmstar") is None
        with pytest.raises(ValueError, match='`presets="none"` does not use max_tiles'):
            with_settings(base, presets="none", max_tiles=2)

    def test_reference_names(self):
        assert our_settings({"steps": 4, "gen_length": 8, "cfg_scale": 0.5}) == {
            "max_denoising_steps": 4,
            "max_new_tokens": 8,
            "guidance_scale": 1.5,
        }

    def test_unknown_names_are_refused(self, base):
        with pytest.raises(ValueError, match=r"Unknown settings \['num_beams'\]"):
            with_settings(base, num_beams=3)
        with pytest.raises(ValueError, match='`presets` must be "paper" or "none"'):
            with_settings(base, presets="mine")

    def test_a_region_checkpoint_can_chat_though_its_defaults_are_for_captions(self, regions):
        image = held_out_scene(0, 0).image
        answer = regions.answer([Question([image], "What is this?", settings={"max_new_tokens": 4})])[0]
        assert (answer.slots, answer.num_forwards) == (4, 4)


class TestPrompts:
    def test_one_image(self, base):
        assert base._prompt("Why?", 1) == (
            "<|start_header_id|>user<|end_header_id|>\n<img><IMG_CONTEXT></img>\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n"
        )

    def test_several_images_are_numbered(self, base):
        assert base._prompt("Why?", 2) == (
            "<|start_header_id|>user<|end_header_id|>\nImage-1: <img><IMG_CONTEXT></img>\n"
            "Image-2: <img><IMG_CONTEXT></img>\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
        )

    def test_special_tokens_in_a_question_do_not_end_a_run(self, base):
        with pytest.warns(UserWarning, match="special token <img>"):
            assert "see   here" in base._prompt("see <img> here", 0)

    def test_tiles_are_shared(self, base):
        wide = Image.new("RGB", (64 * 6, 64))
        for count, tiles in ((1, 7), (2, 14), (16, 80)):  # 6, 6 and 4 tiles each, and a thumbnail
            inputs = base.processor(
                images=[[wide] * count],
                text=[base._prompt("Q", count)],
                max_tiles=base._tiles(Question([wide] * count, "")),
            )
            assert len(inputs["pixel_values"]) == tiles

    def test_mmmu_doubles_the_first_image(self, base):
        images = [Image.new("RGB", (20, 10)), Image.new("RGB", (20, 10))]
        sizes = [image.size for image in base._images(Question(images, "Q", find("MMMU")))]
        assert sizes == [(40, 20), (20, 10)]
        assert [i.size for i in base._images(Question(images, "Q", find("MMStar")))] == [(20, 10)] * 2


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("Yes", "Yes"),
        ("No.", "No"),
        ("Yes<|im_end|>", "Yes"),
        ("None", "No"),  # as the reference
        ("Nobody", "Nobody"),
        ("B. red", "B"),
        ("B.", "B."),
        ("G. red", "G. red"),
        (" C ", "C"),
        ("A long answer", "A long answer"),
    ],
)
def test_shorten(said, short):
    assert shorten(said) == short


class TestAnswers:
    def questions(self, kind, count=6):
        cases = [held_out_question(3, index, kind) for index in range(count)]
        return [Question([image], q.text, settings={"max_new_tokens": SLOTS[kind]}) for image, q in cases]

    def test_batched_and_mixed_answers_are_those_of_one_by_one(self, base):
        mixed = [q for pair in zip(self.questions("choice"), self.questions("open"), strict=True) for q in pair]
        together = base.answer(mixed)
        alone = [base.answer([question])[0] for question in mixed]
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.slots for a in together] == [2, 8] * 6
        assert [a.num_forwards for a in together] == [2, 8] * 6

    def test_costs(self, base):
        answer = base.answer(self.questions("choice", 1))[0]
        assert answer.text in list("ABCD")
        assert answer.output_tokens == 1
        assert answer.seconds > 0
        text = self.questions("choice", 1)[0]
        inputs = base.processor(images=text.images[0], text=text.text)
        assert answer.input_tokens == inputs["input_ids"].shape[1]

    def test_regions_come_back_in_their_order(self, regions):
        image = next(p for p in map(lambda i: held_out_scene(11, i), range(20)) if len(p.masks) == 3)
        masks = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in image.masks]
        answer = regions.answer([Question([image.image], "", masks=masks, settings={"max_new_tokens": 32})])[0]
        backward = regions.answer([Question([image.image], "", masks=masks[::-1], settings={"max_new_tokens": 32})])[0]
        captions = json.loads(answer.text)
        assert len(captions) == 3
        assert json.loads(backward.text) == captions[::-1]
        assert answer.slots == 96
        assert answer.output_tokens < 96

    def test_a_base_checkpoint_refuses_regions(self, base):
        image = held_out_scene(0, 0)
        with pytest.raises(ValueError, match="cannot caption regions"):
            base.answer([Question([image.image], "", masks=image.masks)])
