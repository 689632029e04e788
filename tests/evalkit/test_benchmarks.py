"""The table of the paper's benchmarks."""

import json
from dataclasses import replace

import pytest
from prompt_rows import PROMPTS

from pdlm_evalkit.benchmarks import (
    BENCHMARKS,
    LETTER,
    SUFFIX,
    ask_like_paper,
    choose_benchmarks,
    place_images,
    tiles_for,
)
from pdlm_evalkit.benchmarks import (
    find_benchmark as find,
)

# name, VLMEvalKit, lmms-eval, slots, block, steps, paper's Table 1
EXPECTED = [
    ("MMStar", "MMStar", "mmstar", 2, 2, 2, 63.7),
    ("SeedBench", "SEEDBench_IMG", "seedbench", 2, 2, 2, 78.9),
    ("MMBench", "MMBench_DEV_EN", "mmbench_en_dev", 2, 2, 2, 85.0),
    ("MMMU", "MMMU_DEV_VAL", "mmmu_val", 2, 2, 2, 47.2),
    ("MathVista", "MathVista_MINI", "mathvista_testmini_format", 256, 1, 256, 65.5),
    ("MathVerse Vision-Only", "MathVerse_MINI_Vision_Only", "mathverse_testmini_vision_only", 256, 1, 256, 25.3),
    ("AI2D", "AI2D_TEST", "ai2d", 2, 2, 2, 85.0),
    ("ChartQA", "ChartQA_TEST", "chartqa", 128, 128, 128, 91.6),
    ("DocVQA", "DocVQA_VAL", "docvqa_val", 128, 128, 128, 89.9),
    ("InfoVQA", "InfoVQA_VAL", "infovqa_val", 128, 128, 128, 74.6),
    ("MMVP", "MMVP", "mmvp", 2, 2, 2, 82.0),
    ("BLINK", "BLINK", "blink", 2, 2, 2, 60.3),
    ("RealWorldQA", "RealWorldQA", "realworldqa", 2, 2, 2, 73.7),
    ("CV-Bench-2D", "CV-Bench-2D", "cv_bench_2d", 2, 2, 2, 79.8),
    ("HallusionBench", "HallusionBench", "hallusion_bench_image", 2, 2, 2, 58.4),
    ("V*", "VStarBench", "vstar_bench", 2, 2, 2, 73.3),
]


def test_the_sixteen():
    rows = [
        (b.name, b.vlmeval, b.lmms, b.max_new_tokens, b.block_length, b.max_denoising_steps, b.paper)
        for b in BENCHMARKS
    ]
    assert rows == EXPECTED


def test_only_mmmu_doubles_its_first_image():
    assert [b.name for b in BENCHMARKS if b.upscale_first] == ["MMMU"]


def test_judges():
    """The README of the reference wants gpt-5.2 everywhere; its run.py has other defaults, VLMEvalKit others again."""
    assert find("MMStar").judges == {"paper": "gpt-5.2", "paper_default": "chatgpt-0125", "vlmeval": "gpt-4o-mini",
                                     "lmms": "rules"}  # fmt: skip
    assert find("MathVista").judges["paper_default"] == "gpt-4o-mini"
    assert find("ChartQA").judges["paper"] == "Qwen3-8B, strict" and find("ChartQA").judges["vlmeval"] == "rules"
    assert find("HallusionBench").judges["lmms"] == "gpt-4" and find("MMBench").judges["lmms"] == "gpt-4o-2024-11-20"
    assert [b.name for b in BENCHMARKS if b.unverifiable] == ["MMBench", "AI2D", "MMVP", "HallusionBench"]
    assert [b.name for b in BENCHMARKS if b.stock_judge == "LLM"] == ["MathVista", "MathVerse Vision-Only"]
    assert [b.name for b in BENCHMARKS if b.paper_judge] == ["ChartQA", "DocVQA", "InfoVQA"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("MMStar", "MMStar"),
        ("mmstar", "MMStar"),
        ("MMBench_DEV_EN_V11", "MMBench"),
        ("AI2D_TEST_NO_MASK", "AI2D"),
        ("blink_counting", "BLINK"),
        ("mathvista_testmini_cot", "MathVista"),
        ("cv-bench-2d", "CV-Bench-2D"),
        ("CV-Bench-3D", None),
        ("MMMU_Pro_10c", None),
        ("ChartQAPro", None),
        ("DocVQA_TEST", None),
        ("mathverse_testmini", None),
        ("seedbench_2", None),
        ("seedbench_2_plus", None),
        ("mmmu_val_reasoning", None),
        ("cv_bench_2d_reasoning", None),
    ],
)
def test_find(name, found):
    benchmark = find(name)
    assert (benchmark and benchmark.name) == found


@pytest.mark.parametrize(("images", "tiles"), [(0, 6), (1, 6), (2, 6), (10, 6), (11, 5), (16, 4), (64, 1), (100, 1)])
def test_images_share_64_tiles(images, tiles):
    assert tiles_for(images) == tiles


def test_another_suffix():
    letters, charts = (replace(find(name), prompt_suffix=" Say it.") for name in ("MMStar", "ChartQA"))
    assert letters.suffix == letters.as_dict()["suffix"] == " Say it."
    assert ask_like_paper(letters, "Q?\nA. x" + LETTER) == "Q?\nA. x Say it."
    assert ask_like_paper(charts, "Q?") == "Q? Say it."
    assert find("ChartQA").as_dict()["suffix"] == SUFFIX["document"]


def test_choose_names_what_it_does_not_know():
    assert [b.name for b in choose_benchmarks(["V*", "mmmu_val"])] == ["V*", "MMMU"]
    assert len(choose_benchmarks(None)) == 16
    with pytest.raises(ValueError, match="MMStarr.*Known: MMStar, SeedBench"):
        choose_benchmarks(["MMStar", "MMStarr"])


RECORDED = json.loads(PROMPTS.read_text())


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_recorded_prompts(benchmark):
    """Written by the harnesses' own builders on a made-up row; see prompt_rows.py."""
    stock, ours = RECORDED["vlmeval"][benchmark.name], RECORDED["lmms"][benchmark.name]
    text = stock["text"]
    assert text.endswith(benchmark.suffix)
    # as in the wrapper that the reference copied: images first, numbered if there are several
    numbers = (
        [f"Image-{k}: <image>\n" for k in range(1, stock["images"] + 1)] if stock["images"] > 1 else ["<image>\n"]
    )
    assert stock["internvl"] == "".join(numbers) + text
    if benchmark.kind == "letter":
        assert stock["internvl_letter"] == text
    assert ask_like_paper(benchmark, ours["task"]) == ours["text"]
    assert benchmark.kind == "letter" or ours["text"].endswith(benchmark.suffix)


@pytest.mark.parametrize(
    "name", ["BLINK", "CV-Bench-2D", "MMVP", "AI2D", "V*", "ChartQA", "DocVQA", "InfoVQA", "HallusionBench"]
)
def test_both_harnesses_send_the_papers_prompt(name):
    """Of the others docs/evaluation.md says how lmms-eval's differs."""
    assert RECORDED["lmms"][name]["text"] == RECORDED["vlmeval"][name]["text"]


@pytest.mark.parametrize("parts, text", [
    (["Compare", None, "with", None], "Compare<Image-1>with<Image-2>"),
    (["Compare", None, None, "."], "Compare."),  # all in one place, which comes first anyway
    (["Is", None, "in", None, None], "Is<Image-1>in<Image-2><Image-3>"),
    ([None, "Which?", None], "<Image-1>Which?<Image-2>"),
    (["Which?", None], "Which?"),
    (["Look at", None, "Which?"], "Look at\nWhich?"),
    (["No image"], "No image"),
])  # fmt: skip
def test_places_of_images(parts, text):
    assert place_images(parts) == text


@pytest.mark.parametrize(
    ("benchmark", "text", "asked"),
    [
        # a task's own request for the letter stays; one that lacks it gets it
        ("MMStar", "Q?\nA. x" + LETTER[:-1], "Q?\nA. x" + LETTER[:-1]),
        ("CV-Bench-2D", "Q? (A) x (B) y\n", "Q? (A) x (B) y" + LETTER),
        ("RealWorldQA", "Q? Please answer directly with a single word or number.", None),
        ("MMMU", "Q? <image 1>\n\nAnswer the question using a single word or phrase.", None),
        # documents: reasoning in place of the task's short answer
        ("ChartQA", "Q?\nAnswer the question with a single word.", "Q?" + SUFFIX["document"]),
        ("DocVQA", "Q?\nAnswer the question using a single word or phrase.", "Q?" + SUFFIX["document"]),
        ("HallusionBench", "Is it?", "Is it?" + SUFFIX["yes_no"]),
        ("MathVista", "How many?", "How many?\n\n\nPlease reason step by step."),
    ],
)
def test_ask_like_paper(benchmark, text, asked):
    assert ask_like_paper(find(benchmark), text) == (text if asked is None else asked)
    assert ask_like_paper(find(benchmark), ask_like_paper(find(benchmark), text)) == ask_like_paper(
        find(benchmark), text
    )
