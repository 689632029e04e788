"""The engine against transformers, without a server: the same captions in every mode."""

import subprocess
import sys

import pytest
import torch
from drawn_images import drawn_images, texts
from engines import SOME, engine
from test_attributes import assert_equal
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import SamplingParams

from pdlm_hf import CHECKPOINT, RegionCaptioner
from pdlm_hf.shapes.evaluate import Tally, held_out
from pdlm_vllm import attributes_many, caption_many

MODES = [
    {},
    {"acceptance_threshold": 0.6, "prefix_refresh_interval": 4},
    {"acceptance_threshold": 0.9, "prefix_refresh_interval": 0},
    {"acceptance_threshold": 0.9, "prefix_refresh_interval": 1},
    {"max_denoising_steps": 7, "max_new_tokens": 21},
]
FIXED = [
    {"acceptance_threshold": None, "max_denoising_steps": 9},
    {"max_denoising_steps": 12, "prefix_refresh_interval": 1},
    {"max_denoising_steps": 12, "prefix_refresh_interval": 5},
    {"max_denoising_steps": 12, "prefix_refresh_interval": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "reference"])
def test_an_engine_in_a_process_of_its_own(captioner, reference_captioner, reference_folder, name):
    """As [`LLM`] starts it by itself."""
    model, plain = (CHECKPOINT, captioner) if name == "shapes" else (reference_folder, reference_captioner)
    pairs, schema = drawn_images(8), {"colour": ["dark blue", "dark red", "blue"], "name": {"max_tokens": 3}}
    with engine(model, processes=2) as llm:
        assert not hasattr(llm.llm_engine, "model_executor")
        for settings in MODES + FIXED:
            found, expected = caption_many(llm, pairs, **settings), plain.caption_many(pairs, **settings)
            assert [texts(captions) for captions in found] == [texts(captions) for captions in expected]
        for found, expected in zip(
            attributes_many(llm, pairs, schema), plain.attributes_many(pairs, schema), strict=True
        ):
            assert_equal(found, expected)
        with pytest.raises(ValueError, match="7 regions in one request"):
            prompt = {"prompt": "", "multi_modal_data": {"image": pairs[0][0]}}
            options = {"mm_processor_kwargs": {"regions": [[0, 0, 5, 5]] * 7}}
            llm.generate([prompt | options], SamplingParams(), use_tqdm=False)


@pytest.mark.slow
def test_another_dtype_than_that_of_the_checkpoint():
    """What a GPU makes of a float32 checkpoint. Rounding differs from transformers', so not every caption is equal."""
    plain, pairs = RegionCaptioner.from_pretrained(device="cpu", dtype="bfloat16"), drawn_images(12)
    with engine(dtype="bfloat16") as llm:
        found, expected = ([text for captions in many for text in texts(captions)] for many in (
            caption_many(llm, pairs), plain.caption_many(pairs)
        ))  # fmt: skip
    assert len(found) == len(expected)
    assert sum(mine == theirs for mine, theirs in zip(found, expected, strict=True)) > 0.75 * len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
def test_keys_and_values_in_eight_bits(captioner, kind):
    """Rounded, so that not every caption is equal."""
    pairs = drawn_images(12)
    with engine(kv_cache_dtype=kind) as llm:
        found = [text for captions in caption_many(llm, pairs) for text in texts(captions)]
    expected = [text for captions in captioner.caption_many(pairs) for text in texts(captions)]
    assert sum(mine == theirs for mine, theirs in zip(found, expected, strict=True)) > 0.5 * len(expected)


@SOME
@pytest.mark.parametrize("settings", MODES + FIXED, ids=str)
def test_captions_are_those_of_transformers(both, settings, some):
    llm, plain = both
    pairs = drawn_images(8)[::-1][some]  # of 8, 5 and 2 regions: two passes, and one
    expected = list(plain.caption_many(pairs, batch_size=4, **settings))
    found = list(caption_many(llm, pairs, **settings))
    assert [texts(captions) for captions in found] == [texts(captions) for captions in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert [c.score for c in mine] == pytest.approx([c.score for c in theirs], abs=1e-5)
        assert [c.bbox for c in mine] == [c.bbox for c in theirs]


@pytest.mark.parametrize(
    "settings",
    [{}, {"block_length": 4}, {"block_length": 1}, {"block_length": 8, "max_denoising_steps": 4}],
    ids=str,
)
def test_chat_is_that_of_transformers(both, settings):
    llm, plain = both
    questions = ["What is this?", "One star, big and", "Which colour has the largest shape in the image?"]
    images = [image for image, _ in drawn_images(3)]
    contents = [
        [{"type": "image_pil", "image_pil": images[k]}, {"type": "text", "text": questions[k]}] for k in range(3)
    ]
    contents.append([{"type": "text", "text": "A sentence without an image."}])
    expected = []
    for k, content in enumerate(contents):
        text = content[-1]["text"]
        inputs = plain.processor(images=images[k] if k < 3 else None, text=text)
        out = plain.model.generate(**inputs, max_new_tokens=16, acceptance_threshold=None, **settings)
        expected.append(plain.processor.post_process_answers(out)[0])
    params = SamplingParams(max_tokens=16, extra_args=settings)
    answers = llm.chat([[{"role": "user", "content": content}] for content in contents], params, use_tqdm=False)
    assert [answer.outputs[0].text.strip() for answer in answers] == expected


def test_plain_sampling_params_will_do(both):
    llm, plain = both
    image, regions = drawn_images(3)[2]
    boxes = [[10, 5, 20, 25], [2, 2, 30, 30], [0, 0, 12, 12]]  # neither by area nor the other way round
    prompt = {"prompt": "", "multi_modal_data": {"image": image}, "mm_processor_kwargs": {"regions": boxes}}
    output = llm.generate([prompt], SamplingParams(), use_tqdm=False)[0]
    expected = plain.caption(image, boxes)
    assert plain.processor.split_captions(output.outputs[0].token_ids) == texts(expected)
    assert [line.strip() for line in output.outputs[0].text.strip().split("\n")] == texts(expected)


@pytest.mark.parametrize("question", [None, "Describe the colour of each region.\n Two lines, outer space "])
def test_regions_in_a_chat(both, question):
    """As `vllm run-batch` hands them over."""
    llm, plain = both
    image, boxes = drawn_images(3)[2][0], [[10, 5, 20, 25], [2, 2, 30, 30]]
    content = [{"type": "image_pil", "image_pil": image}]
    content += [{"type": "text", "text": question}] if question else []
    messages, options = [{"role": "user", "content": content}], {"regions": boxes}
    output = llm.chat(messages, SamplingParams(), use_tqdm=False, mm_processor_kwargs=options)[0]
    expected = texts(plain.caption(image, boxes, question=question))
    assert plain.processor.split_captions(output.outputs[0].token_ids) == expected


def test_an_image_alone_and_with_another(both):
    """With several images each is one tile: what was computed for one alone is not used."""
    llm, plain = both
    images = [image for image, _ in drawn_images(8)[5:7]]
    for chosen in (images[:1], images, images[:1]):
        inputs = plain.processor(images=chosen if len(chosen) == 1 else [chosen], text=["What is this?"])
        out = plain.model.generate(**inputs, max_new_tokens=8, acceptance_threshold=None)
        content = [{"type": "image_pil", "image_pil": image} for image in chosen]
        content.append({"type": "text", "text": "What is this?"})
        answer = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=8), use_tqdm=False)
        assert answer[0].outputs[0].text.strip() == plain.processor.post_process_answers(out)[0]


@pytest.mark.parametrize(
    "extra",
    [
        {"block_length": "a"},
        {"block_length": -4},
        {"max_denoising_steps": [1]},
        {"acceptance_threshold": float("nan")},
        {"prefix_refresh_interval": 1e300},
    ],
    ids=str,
)
def test_nothing_that_gets_past_the_doors_stops_the_engine(both, extra):
    llm, _ = both
    prompts = ["Hi", "<|reserved_token_0|><|reserved_token_1|><|reserved_token_1|> Hi", "<|reserved_token_1|>" * 40]
    params = SamplingParams(max_tokens=8, logprobs=1, prompt_logprobs=1, extra_args=extra)
    assert len(llm.generate(prompts, params, use_tqdm=False)) == 3


@pytest.mark.parametrize(
    "regions, message",
    [
        ([[0, 0, 5, 5]] * 7, "7 regions in one request"),
        (["/etc/hostname"], "expected a COCO region"),
        ([], "No regions given"),
        ([[0, 0, 0, 5]], "has no area"),
        ([{"segmentation": {"size": [3, 3], "counts": "11"}}], "the RLE is for size"),
    ],
)
def test_bad_regions_are_refused_before_the_engine(both, regions, message):
    llm, _ = both
    image = drawn_images(1)[0][0]
    prompt = {"prompt": "", "multi_modal_data": {"image": image}, "mm_processor_kwargs": {"regions": regions}}
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], SamplingParams(), use_tqdm=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.5}, "`temperature` must be 0"),
        ({"seed": 3}, "`seed` has no meaning"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer"),
        ({"max_new_tokens": 400}, "served canvas"),
        ({"stepz": 4}, "`stepz` has no meaning"),
        ({"question": "<|eot_id|>"}, "special tokens"),
        ({"question": "why " * 200}, "tokens, at most"),
    ],
)
def test_bad_settings_are_refused(both, settings, message):
    llm, _ = both
    with pytest.raises(ValueError, match=message):
        list(caption_many(llm, drawn_images(2), **settings))


def test_regions_of_equal_area_keep_their_captions(both):
    llm, plain = both
    image, _ = drawn_images(20)[18]
    width, height = image.size
    boxes = [[x, 4, 24, 24] for x in range(2, width - 26, (width - 28) // 3)][:4]
    assert texts(next(caption_many(llm, [(image, boxes)]))) == texts(plain.caption(image, boxes))


def test_temperature_zero_is_greedy(both):
    llm, _ = both
    pairs = drawn_images(2)
    assert texts(next(caption_many(llm, pairs, temperature=0))) == texts(next(caption_many(llm, pairs)))


@pytest.mark.slow
def test_a_merged_adapter_is_a_checkpoint_like_any_other(captioner, tmp_path):
    """Two steps of LoRA by `pdlm-peft`, merged, served: captions of transformers, and no longer those of the base."""
    settings = ["training.max_steps=2", "training.eval_strategy=no", "samples.every=0", "training.warmup_steps=0"]
    settings += ["training.save_strategy=no", "training.dataloader_num_workers=0", "training.learning_rate=0.02"]
    commands = [["train", "shapes", f"output={tmp_path}/adapter", *settings]]
    commands += [["merge", f"{tmp_path}/adapter", f"{tmp_path}/merged"]]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "pdlm_peft.cli", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    pairs = drawn_images(4)
    with engine(tmp_path / "merged") as llm:
        found = [texts(captions) for captions in caption_many(llm, pairs)]
    merged = RegionCaptioner.from_pretrained(tmp_path / "merged", device="cpu")
    assert found == [texts(captions) for captions in merged.caption_many(pairs)]
    assert found != [texts(captions) for captions in captioner.caption_many(pairs)]


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(captioner, monkeypatch):
    """Tensor parallelism, over two processes of a core each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    pairs = drawn_images(12)
    with engine(tensor_parallel_size=2) as llm:
        found = [texts(captions) for captions in caption_many(llm, pairs)]
    assert found == [texts(captions) for captions in captioner.caption_many(pairs)]


@pytest.mark.slow
def test_held_out_accuracy_is_that_of_transformers():
    """The accuracy on the card, measured through the engine."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    mine, theirs = Tally(), Tally()
    all_images = list(held_out(11, 200))
    with engine() as llm:
        found = list(caption_many(llm, ((image.image, image.masks) for image in all_images)))
    for image, captions in zip(all_images, found, strict=True):
        mine.add(image, texts(captions))
        with torch.inference_mode():
            output = model.generate(**processor(images=[image.image], segmentation_maps=[image.masks]))
        theirs.add(image, texts(processor.post_process_region_captions(output)[0]))
    assert mine.report() == theirs.report()
    assert mine.report()["exact"] >= 0.96
