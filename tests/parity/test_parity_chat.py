"""The base model: inputs, logits and every step of the block sampler."""

import functools

import torch
from parity_golden import (
    LOGITS,
    VISION,
    assert_close,
    each,
    load,
    matches,
    normalised,
    record,
    stems,
    subset_holds,
    tensors,
)

from pdlm_hf.diffusion_pdlm import transfer_schedule

CASES = stems("dmllm_case_*.json")
IMAGES = [name for name in CASES if "image_u8" in tensors(name)]
RUNS = [(name, run["tag"]) for name in CASES for run in record(name)["runs"]]


def test_found():
    subset_holds(images=IMAGES, texts=set(CASES) - set(IMAGES), runs=RUNS)
    for option in ("generation_suffix", "stopping_criteria", "cfg_scale"):
        subset_holds(**{option: [run for name in CASES for run in record(name)["runs"] if option in run]})
    assert all(tag in matches(name, r"(.+)\.output") for name, tag in RUNS)


@functools.cache
def _inputs(name: str):
    image = tensors(name).get("image_u8")
    question = record(name)["question"].removeprefix("<image>\n")
    return load("dmllm").processor(None if image is None else image.numpy(), text=question)


def _run(name: str, tag: str) -> dict:
    return next(run for run in record(name)["runs"] if run["tag"] == tag)


@functools.cache
def _output(name: str, tag: str):
    run = _run(name, tag)
    return load("dmllm").model.generate(
        **_inputs(name),
        max_new_tokens=run["gen_length"],
        block_length=run["block_length"],
        max_denoising_steps=run["steps"],
        generation_suffix=run.get("generation_suffix"),
        stop_strings=run.get("stopping_criteria"),
        guidance_scale=run.get("cfg_scale", 0.0) + 1,
        return_dict_in_generate=True,
        output_history=True,
    )


@each("name", CASES)
def test_ids(name):
    assert torch.equal(_inputs(name)["input_ids"], tensors(name)["input_ids"])
    assert _inputs(name)["attention_mask"].all()


@each("name", IMAGES)
@torch.no_grad()
def test_image(name):
    inputs, theirs = _inputs(name), tensors(name)
    if "tiles_u8" in theirs:
        assert torch.equal(inputs["pixel_values"], normalised(theirs["tiles_u8"]))
    features = load("dmllm").model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(features, theirs["vision_embeds"], VISION)


def _embeds(name: str) -> torch.Tensor:
    inputs = _inputs(name)
    return load("dmllm").model.model.embed(inputs["input_ids"], inputs.get("pixel_values"))


@each("name", CASES)
@torch.no_grad()
def test_inputs_embeds(name):
    assert_close(_embeds(name), tensors(name)["inputs_embeds"], VISION)


@each("name", [name for name in CASES if "step0_logits_gen_region" in tensors(name)])
@torch.no_grad()
def test_logits_of_first_step(name):
    model, theirs = load("dmllm").model, tensors(name)["step0_logits_gen_region"]
    blank = model.get_input_embeddings()(torch.full(theirs.shape[:2], model.config.mask_token_id))
    embeds = torch.cat([_embeds(name), blank], 1)
    logits = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long)).logits
    assert_close(logits[:, -theirs.shape[1] :], theirs, LOGITS)


@each("name, tag", RUNS)
def test_steps(name, tag):
    run, output, theirs = _run(name, tag), _output(name, tag), tensors(name)
    tokens, masks = theirs[f"{tag}.tokens_before"], theirs[f"{tag}.mask_before"].bool()
    slots = run["gen_length"]
    assert len(output.history) == len(tokens) == len(run["block_step_k"]) == run["forwards"]
    # guidance is a second row there and a second pass here
    assert output.num_forwards == run["forwards"] * (2 if run.get("cfg_scale") else 1)
    suffix = load("dmllm").processor.tokenizer(run.get("generation_suffix", ""))["input_ids"]
    for s, step in enumerate(output.history):
        assert step.tokens[0].tolist() == tokens[s, :slots].tolist(), f"step {s}"
        assert step.masked[0].tolist() == masks[s, :slots].tolist(), f"step {s}"
        assert tokens[s, slots:].tolist() == suffix
        assert not masks[s, slots:].any()


@each("name, tag", RUNS)
def test_schedule(name, tag):
    run = _run(name, tag)
    blocks = run["gen_length"] // run["block_length"]
    schedule = transfer_schedule(run["block_length"], run["steps"] // blocks)
    for block, step, count in run["block_step_k"]:
        assert schedule[step] == count, f"block {block}"


@each("name, tag", RUNS)
def test_answer(name, tag):
    run, output, theirs = _run(name, tag), _output(name, tag), tensors(name)[f"{tag}.output"]
    prompt = _inputs(name)["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], theirs)
    assert theirs[0].tolist() == run["output"]
    assert torch.equal(output.sequences[:, :prompt], _inputs(name)["input_ids"])
    assert load("dmllm").processor.post_process_answers(output.sequences) == [run["response"]]
