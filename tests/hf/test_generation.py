import copy
import math

import numpy as np
import pytest
import torch
from tiny import lively_model, make_image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from pdlm_hf import (
    CHECKPOINT,
    PdlmForConditionalGeneration,
    PdlmGenerationConfig,
    PdlmGenerationOutput,
    denoising_pdlm,
)
from pdlm_hf.denoising_pdlm import RandomRows
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.stopping_pdlm import StopStrings

SLOTS, STEPS = 8, 4


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.drafts, self.final, self.ended = [], None, 0

    def put_draft(self, value):
        self.drafts.append(value)

    def put(self, value):
        assert self.final is None
        self.final = value

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def inputs(processor, scenes):
    """Four drawn scenes with different numbers of regions and tiles."""
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


@pytest.fixture(scope="module")
def base(golden_base):
    model = AutoModelForImageTextToText.from_pretrained(golden_base)
    return model, AutoProcessor.from_pretrained(golden_base)


def run(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": SLOTS, "max_denoising_steps": STEPS} | settings)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer, got 0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a positive integer, got 2.5"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be a positive integer, got True"),
        ({"max_denoising_steps": -1}, "`max_denoising_steps` must be a positive integer"),
        ({"block_length": "8"}, "`block_length` must be a positive integer, got '8'"),
        ({"prefix_refresh_interval": -1}, "`prefix_refresh_interval` must be 0 or a positive integer"),
        ({"temperature": -0.1}, r"`temperature` must be 0 \(greedy\) or positive, got -0.1"),
        ({"temperature": float("nan")}, "`temperature` must be 0"),
        ({"remasking": "entropy"}, '`remasking` must be "low_confidence" or "random", got \'entropy\''),
        ({"trim_canvas": "no"}, "`trim_canvas` must be true or false, got 'no'"),
        ({"cuda_graphs": 1}, "`cuda_graphs` must be true or false, got 1"),
        ({"output_history": [True]}, "`output_history` must be true or false"),
        ({"acceptance_threshold": 0.0}, r"`acceptance_threshold` must be in \(0, 1\], got 0.0"),
        ({"acceptance_threshold": 1.1}, r"`acceptance_threshold` must be in \(0, 1\], got 1.1"),
        ({"acceptance_threshold": "high"}, r"`acceptance_threshold` must be in \(0, 1\], got 'high'"),
        ({"temperature": math.inf}, r"`temperature` must be 0 \(greedy\) or positive, got inf"),
        ({"stop_strings": [""]}, "`stop_strings` holds an empty string"),
        ({"entropy_bound": -0.1}, "`entropy_bound` must be 0 or positive, got -0.1"),
        ({"entropy_bound": math.nan}, "`entropy_bound` must be 0 or positive, got nan"),
        ({"entropy_bound": 0.1, "acceptance_threshold": 0.9}, "leave out `acceptance_threshold`"),
        ({"guidance_scale": 0.5}, "`guidance_scale` must be at least 1"),
        ({"seed": 1.5}, "`seed` must be an integer, got 1.5"),
        ({"do_sample": True}, r"Unknown generation settings \['do_sample'\]"),
        ({"num_beams": 4, "top_p": 0.9}, r"Unknown generation settings \['num_beams', 'top_p'\]"),
    ],
)
def test_invalid_settings(model, inputs, settings, message):
    with pytest.raises(ValueError, match=message):
        PdlmGenerationConfig(**settings)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **settings)


@pytest.mark.parametrize(
    ("name", "value"), [("block_length", 8), ("generation_suffix", "end"), ("guidance_scale", 2.0)]
)
def test_settings_for_chat_do_not_fit_regions(model, inputs, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is for chat"):
        run(model, inputs, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"acceptance_threshold": 0.9}, "`acceptance_threshold` is for region captions"),
        (
            {"max_new_tokens": 10, "block_length": 4},
            r"`max_new_tokens` \(10\) must be a multiple of `block_length` \(4\)",
        ),
        (
            {"max_new_tokens": 8, "block_length": 4, "max_denoising_steps": 3},
            r"`max_denoising_steps` \(3\) must be a multiple of the number of blocks \(2\)",
        ),
    ],
)
def test_settings_that_do_not_fit_chat(base, settings, message):
    model, processor = base
    with pytest.raises(ValueError, match=message):
        model.generate(**processor(text="Hi"), **settings)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("steps", "max_denoising_steps"), ("gen_length", "max_new_tokens"), ("gen_len", "max_new_tokens")],
)
def test_reference_names_warn_and_work(model, inputs, theirs, ours):
    expected = model.generate(**inputs, **{"max_new_tokens": 4, "max_denoising_steps": 2, ours: 3})
    settings = {"max_new_tokens": 4, "max_denoising_steps": 2, theirs: 3}
    del settings[ours]
    with pytest.warns(FutureWarning, match=f"`{theirs}` is the reference's name for `{ours}`"):
        got = model.generate(**inputs, **settings)
    assert torch.equal(got.region_tokens, expected.region_tokens)
    assert got.num_forwards == expected.num_forwards


def test_reference_name_and_ours_together(model, inputs):
    with pytest.raises(
        ValueError, match="`steps` is the reference's name for `max_denoising_steps`, which is given too"
    ):
        model.generate(**inputs, steps=3, max_denoising_steps=4)


def test_defaults_come_from_the_model_and_calls_override_them(processor):
    model = lively_model(processor)
    image, masks = make_image(1, 64, 64, 1)
    inputs = processor(images=image, segmentation_maps=masks)
    model.generation_config = PdlmGenerationConfig(max_new_tokens=5, max_denoising_steps=3)
    assert model.generate(**inputs).region_tokens.shape[-1] == 5
    assert model.generate(**inputs).num_forwards == 3
    assert model.generate(**inputs, max_new_tokens=6).region_tokens.shape[-1] == 6
    assert model.generate(**inputs, generation_config=PdlmGenerationConfig(max_new_tokens=2)).num_forwards <= 32
    model.generation_config = PdlmGenerationConfig()
    output = model.generate(**inputs)
    assert (output.region_tokens.shape[-1], output.num_forwards) == (32, 32)


def test_generation_config_saves_only_what_is_set(tmp_path):
    PdlmGenerationConfig(max_new_tokens=9, stop_strings=["\n"], seed=3).save_pretrained(tmp_path)
    loaded = PdlmGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.max_new_tokens, loaded.stop_strings, loaded.seed) == (9, ["\n"], 3)
    assert loaded.temperature is None and loaded.block_length is None


def test_generate_needs_ids(model):
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model.generate()


# ---------------------------------------------------------------- regions


def test_output_of_regions(model, processor, scenes, inputs):
    output = run(model, inputs)
    counts = [len(p.masks) for p in scenes]
    assert isinstance(output, PdlmGenerationOutput)
    assert output.region_tokens.shape == (4, max(counts), SLOTS)
    assert output.region_scores.shape == (4, max(counts))
    for k, count in enumerate(counts):
        assert (output.region_tokens[k, :count] >= 0).all()
        assert (output.region_tokens[k, count:] == -1).all()
        assert (output.region_scores[k, :count] > 0).all() and (output.region_scores[k, :count] <= 1).all()
    assert output.num_forwards == STEPS
    assert output.tokens_per_forward == sum(counts) * SLOTS / STEPS
    assert output.tokens_per_forward_per_region == SLOTS / STEPS
    assert output.history is None
    # `sequences` ends with the captions, in the model's order
    tail = output.sequences[0][-(SLOTS + 2) * counts[0] :].view(counts[0], SLOTS + 2)
    assert tail[:, 0].tolist() == model.config.caption_token_ids[: counts[0]]
    order = inputs["region_order"][0][: counts[0]]
    assert torch.equal(tail[:, 1:-1], output.region_tokens[0][order])
    assert [len(image) for image in processor.post_process_region_captions(output)] == counts
    assert not (output.region_tokens == model.config.mask_token_id).any()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_denoising_steps": 1},
        {"max_denoising_steps": 14, "max_new_tokens": 1},
        {"temperature": 0.7, "seed": 5},
        {"remasking": "random", "seed": 5},
        {"acceptance_threshold": 0.4},
        {"entropy_bound": 2.0},
        {"acceptance_threshold": 0.4, "temperature": 1.0, "seed": 5},
        {"acceptance_threshold": 0.4, "remasking": "random", "seed": 5},
        {"prefix_refresh_interval": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("fixture", ["model", "isolated_model"])
def test_batch_equals_one_by_one(request, processor, scenes, inputs, fixture, settings):
    model = request.getfixturevalue(fixture)
    batched = run(model, inputs, **settings)
    for k, p in enumerate(scenes):
        single = run(model, processor(images=p.image, segmentation_maps=p.masks), **settings)
        assert torch.equal(single.region_tokens[0], batched.region_tokens[k, : len(p.masks)])
        scores = batched.region_scores[k, : len(p.masks)]
        torch.testing.assert_close(single.region_scores[0], scores, atol=1e-4, rtol=1e-4)


def test_captions_follow_their_masks(model, processor):
    image, masks = make_image(1, 140, 64, 4)
    areas = [int(mask.sum()) for mask in masks]
    assert len(set(areas)) == 4
    expected = run(model, processor(images=image, segmentation_maps=masks)).region_tokens[0]
    assert len({tuple(row) for row in expected.tolist()}) == 4
    for permutation in ([3, 2, 1, 0], [1, 3, 0, 2]):
        got = run(model, processor(images=image, segmentation_maps=[masks[k] for k in permutation])).region_tokens[0]
        assert torch.equal(got, expected[permutation])


def test_without_a_seed_torch_decides(model, inputs):
    """`torch.manual_seed` repeats the result, and rows of a batch draw different numbers."""

    def drawn(state):
        torch.manual_seed(state)
        tokens = run(model, inputs, temperature=2.0).region_tokens
        return tokens, torch.rand(1)

    (first, after), (again, after_again), (other, _) = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first, again) and torch.equal(after, after_again)
    assert not torch.equal(first, other)
    free, fixed = RandomRows(2, None, torch.device("cpu")), RandomRows(2, 3, torch.device("cpu"))
    different, same = (rows.uniform([0, 1], [4, 4], (4,)) for rows in (free, fixed))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_a_rule_in_the_call_takes_the_place_of_the_default_one():
    """The embedded checkpoint has a threshold of its own; its lengths are of captions, not of answers."""
    network = PdlmForConditionalGeneration.from_pretrained(CHECKPOINT)
    settings = network._settings(None, {"entropy_bound": 0.1})
    assert (settings.entropy_bound, settings.acceptance_threshold) == (0.1, None)
    with pytest.raises(ValueError, match="leave out `acceptance_threshold`"):
        network._settings(None, {"entropy_bound": 0.1, "acceptance_threshold": 0.8})
    network.generation_config.update(acceptance_threshold=None, entropy_bound=0.1)
    settings = network._settings(None, {"acceptance_threshold": 0.5})
    assert (settings.entropy_bound, settings.acceptance_threshold) == (None, 0.5)
    assert network._settings(None, {"remasking": "random"}).entropy_bound is None
    chat = network._settings(None, {}, chat=True)
    assert (chat.max_new_tokens, chat.max_denoising_steps) == (None, None)
    assert network._settings(None, {}).max_new_tokens == 32


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 1}])
def test_more_regions_than_prompts(model, processor, settings):
    image, masks = make_image(3, 120, 130, 14)
    other, few = make_image(4, 64, 64, 2)
    inputs = processor(images=[other, image], segmentation_maps=[few, masks])
    output = run(model, inputs, **settings)
    assert output.region_tokens.shape[:2] == (2, 14)
    assert output.num_forwards == STEPS
    captions = processor.post_process_region_captions(output)
    assert [len(image) for image in captions] == [2, 14]
    for start in range(0, 14, 6):
        part = run(model, processor(images=image, segmentation_maps=masks[start : start + 6]), **settings)
        assert torch.equal(output.region_tokens[1, start : start + 6], part.region_tokens[0])
    alone = run(model, processor(images=other, segmentation_maps=few), **settings)
    assert torch.equal(output.region_tokens[0, :2], alone.region_tokens[0])


def test_the_first_draft_is_the_one_step_result(model, processor):
    image, masks = make_image(1, 64, 64, 3)
    inputs = processor(images=image, segmentation_maps=masks)
    first = run(model, inputs, output_history=True).history[0]
    assert torch.equal(first.draft, run(model, inputs, max_denoising_steps=1).region_tokens)
    assert first.masked.all()


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"remasking": "random"}])
def test_seed(model, inputs, settings):
    first = run(model, inputs, seed=1, **settings).region_tokens
    torch.manual_seed(123)
    assert torch.equal(run(model, inputs, seed=1, **settings).region_tokens, first)
    assert not torch.equal(run(model, inputs, seed=2, **settings).region_tokens, first)
    assert not torch.equal(run(model, inputs, **settings).region_tokens, first)


def test_temperature_draws_other_tokens(model, inputs):
    greedy = run(model, inputs).region_tokens
    assert torch.equal(run(model, inputs, temperature=0.0, seed=4).region_tokens, greedy)
    assert not torch.equal(run(model, inputs, temperature=2.0, seed=4).region_tokens, greedy)


def test_history_follows_the_schedule(model, inputs):
    output = run(model, inputs, output_history=True)
    mask = model.config.mask_token_id
    assert len(output.history) == STEPS
    regions = (output.region_tokens[..., 0] >= 0).sum(1).tolist()
    for number, step in enumerate(output.history):
        for value in (step.tokens, step.masked, step.draft, step.probability):
            assert value.shape == output.region_tokens.shape
        assert ((step.tokens == mask) == step.masked).all()
        opened = [int(step.masked[k].sum()) for k in range(4)]
        assert opened == [int(n * SLOTS * ((STEPS - number) / STEPS)) for n in regions]
        assert ((step.probability >= 0) & (step.probability <= 1)).all()
        absent = output.region_tokens < 0
        assert (step.tokens[absent] == -1).all() and (step.draft[absent] == -1).all()
    last = output.history[-1]
    assert torch.equal(torch.where(last.masked, last.draft, last.tokens), output.region_tokens)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0])
def test_acceptance_threshold(model, inputs, threshold):
    output = run(model, inputs, acceptance_threshold=threshold, output_history=True, max_denoising_steps=32)
    assert output.num_forwards == len(output.history) <= SLOTS
    present = output.region_tokens[..., 0] >= 0
    masked = [step.masked for step in output.history] + [torch.zeros_like(output.history[0].masked)]
    for step, before, after in zip(output.history, masked[:-1], masked[1:], strict=True):
        committed = before & ~after
        assert not (after & ~before).any()  # never re-opened
        open_regions = before.any(-1) & present
        assert (committed.sum(-1)[open_regions] >= 1).all()
        sure = before & (step.probability > threshold + 1e-6)
        assert (committed | ~sure).all()
        written = committed & (output.region_tokens == step.draft)
        ended = committed & (output.region_tokens == model.config.eot_token_id)
        assert torch.equal(written | ended, committed)
    assert not (output.region_tokens[present] == model.config.mask_token_id).any()
    assert output.tokens_per_forward == int(present.sum()) * SLOTS / output.num_forwards


def test_acceptance_threshold_respects_the_steps(model, inputs):
    output = run(model, inputs, acceptance_threshold=1.0, max_denoising_steps=3)
    assert output.num_forwards == 3
    assert not (output.region_tokens == model.config.mask_token_id).any()


def test_a_lower_threshold_needs_fewer_forwards(model, inputs):
    forwards = [
        run(model, inputs, acceptance_threshold=t, max_denoising_steps=32).num_forwards for t in (0.02, 0.3, 1.0)
    ]
    assert forwards == sorted(forwards) and forwards[0] < forwards[-1]


@pytest.mark.parametrize("settings", [{}, {"acceptance_threshold": 0.3}])
def test_streamer(model, inputs, settings):
    streamer = Recorder()
    output = run(model, inputs, streamer=streamer, output_history=True, **settings)
    assert len(streamer.drafts) == output.num_forwards
    for draft, step in zip(streamer.drafts, output.history, strict=True):
        assert draft.shape == output.region_tokens.shape
        assert torch.equal(draft < 0, output.region_tokens < 0)
        assert not (draft == model.config.mask_token_id).any()
        if not settings:
            assert torch.equal(draft, torch.where(step.masked, step.draft, draft))
    assert torch.equal(streamer.final, output.region_tokens)
    assert torch.equal(streamer.drafts[-1], output.region_tokens)
    assert streamer.ended == 1


def test_stop_strings_cut_captions(model, processor, inputs):
    tokens = run(model, inputs).region_tokens
    caption = tokens[0, 0].tolist()
    start, text = next(  # two neighbouring tokens that are what their text is encoded to
        (k, text)
        for k in range(1, SLOTS - 2)
        if processor.tokenizer(text := processor.tokenizer.decode(caption[k : k + 2]))["input_ids"]
        == caption[k : k + 2]
    )
    stop = caption[start : start + 2]
    cut = run(model, inputs, stop_strings=text, tokenizer=processor.tokenizer).region_tokens
    end = model.config.eot_token_id
    for region, before in zip(cut.view(-1, SLOTS).tolist(), tokens.view(-1, SLOTS).tolist(), strict=True):
        at = next((i for i in range(SLOTS - 1) if before[i : i + 2] == stop), SLOTS)
        assert region == before[:at] + [end] * (SLOTS - at)
    assert cut[0, 0, start:].eq(end).all()
    again = run(model, inputs, stop_strings=["never to be seen", text], tokenizer=processor.tokenizer).region_tokens
    assert torch.equal(again, cut)


def test_a_stop_string_is_found_wherever_its_tokens_begin(model, processor, inputs):
    """In the middle of a token too; the earliest of several counts, in whatever order they are given."""
    tokenizer, end = processor.tokenizer, model.config.eot_token_id
    tokens = run(model, inputs).region_tokens[0, 0].tolist()
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    for stop in (text[5:8], text[9], text[2:20]):
        cut = run(model, inputs, stop_strings=stop, tokenizer=tokenizer).region_tokens[0, 0].tolist()
        kept = cut[: cut.index(end)] if end in cut else cut
        assert kept == tokens[: len(kept)] and stop not in tokenizer.decode(kept)
        assert stop in tokenizer.decode(tokens[: len(kept) + len(tokenizer(stop)["input_ids"]) + 1])
    early, late = text[5:8], text[9]
    both = run(model, inputs, stop_strings=[late, early], tokenizer=tokenizer).region_tokens[0, 0]
    assert torch.equal(both, run(model, inputs, stop_strings=early, tokenizer=tokenizer).region_tokens[0, 0])


def test_where_texts_end():
    tokenizer = AutoProcessor.from_pretrained(CHECKPOINT).tokenizer
    mask, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|mdm_mask|>", "<|eot_id|>"))
    tokens = tokenizer("One plain triangle, big and black.")["input_ids"]
    for stop, kept in {
        " big": "One plain triangle,", "big": "One plain triangle,", "and": "One plain triangle, big",
        "triangle": "One plain", "plain triangle": "One", ",": "One plain triangle", "ne": "",
        "g an": "One plain triangle,", "white": "One plain triangle, big and black.",
    }.items():  # fmt: skip
        stops = StopStrings([stop], tokenizer, {mask, end})
        assert tokenizer.decode(tokens[: stops.position(tokens)]) == kept, stop
    stops = StopStrings(["black", "big", [tokens[1]]], tokenizer, {mask, end})
    assert stops.position(tokens) == 1  # the earliest, and tokens as they are
    assert StopStrings(["mask", "eot"], tokenizer, {mask, end}).position([mask, *tokens, end]) == len(tokens) + 2
    accents = tokenizer("eine Übung für alle")["input_ids"]
    assert tokenizer.decode(accents[: StopStrings(["für"], tokenizer).position(accents)]) == "eine Übung"


@pytest.mark.parametrize("stops", [5, [5], ["x", None], [True]])
def test_stop_strings_are_strings(model, inputs, stops):
    with pytest.raises(ValueError, match="`stop_strings` must be a string or a list of strings, got"):
        run(model, inputs, stop_strings=stops)


def test_another_end_is_refused(model, inputs):
    with pytest.raises(ValueError, match="`eos_token_id` would change nothing"):
        run(model, inputs, eos_token_id=5)
    own = model.generation_config.eos_token_id
    assert torch.equal(run(model, inputs, eos_token_id=own).region_tokens, run(model, inputs).region_tokens)


def test_strings_need_a_tokenizer(model, inputs):
    with pytest.raises(ValueError, match="need a tokenizer: pass `tokenizer=processor.tokenizer`"):
        run(model, inputs, stop_strings="x")


def test_a_caption_is_scored_up_to_its_end(model, inputs):
    """Mean probability, each as of the step that wrote the token."""
    output = run(model, inputs, output_history=True, max_denoising_steps=1)
    ends = {model.config.eot_token_id, model.config.eos_token_id}
    for image in range(4):
        for region, tokens in enumerate(output.region_tokens[image].tolist()):
            if tokens[0] >= 0:
                length = max(1, next((i for i, token in enumerate(tokens) if token in ends), SLOTS))
                expected = output.history[0].probability[image, region, :length].mean().item()
                assert output.region_scores[image, region].item() == pytest.approx(expected, rel=1e-4)


def test_logits_exist_for_the_slots_only(processor, inputs):
    model = lively_model(processor)
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    output = run(model, inputs)
    most = output.region_tokens.shape[1]
    assert sum(shape[0] for shape in shapes) == 4 * STEPS
    assert {shape[1] for shape in shapes} == {most * SLOTS}


@pytest.mark.parametrize("settings", [{"acceptance_threshold": 0.1}, {"entropy_bound": 2.0}], ids=str)
def test_adaptive_decoding_scores_open_positions_only(model, inputs, monkeypatch, settings):
    scored = []
    handle = model.lm_head.register_forward_hook(lambda head, args, logits: scored.append(logits.shape[:-1].numel()))
    output = run(model, inputs, **settings, max_denoising_steps=32, output_history=True)
    handle.remove()
    assert sum(scored) == sum(int(step.masked.sum()) for step in output.history)
    assert sum(scored) < sum((step.tokens >= 0).sum() for step in output.history)
    monkeypatch.setattr(denoising_pdlm, "_score_view", scoring_all(denoising_pdlm._score_view))
    everything = run(model, inputs, **settings, max_denoising_steps=32)
    assert torch.equal(output.region_tokens, everything.region_tokens)
    assert torch.allclose(output.region_scores, everything.region_scores, atol=1e-6)


def scoring_all(score):
    return lambda task, canvas, view, hidden, only_open: score(task, canvas, view, hidden, False)


def test_inputs_stay_as_they_are(model, inputs):
    before = {name: value.clone() for name, value in inputs.items()}
    run(model, inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


def test_num_forwards_is_counted_at_the_language_model(processor, inputs):
    model = lively_model(processor)
    calls = []
    model.model.language_model.register_forward_pre_hook(lambda *_: calls.append("text"))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append("vision"))
    output = run(model, inputs)
    assert calls.count("text") == output.num_forwards == STEPS
    assert calls.count("vision") == 1


@pytest.mark.parametrize("interval", [0, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"acceptance_threshold": 0.4}, {"temperature": 0.7, "seed": 5}], ids=str)
def test_a_kept_prefix_is_exact_where_it_is_isolated(isolated_model, inputs, interval, settings):
    expected = run(isolated_model, inputs, prefix_refresh_interval=1, **settings)
    got = run(isolated_model, inputs, prefix_refresh_interval=interval, **settings)
    assert torch.equal(got.region_tokens, expected.region_tokens)
    torch.testing.assert_close(got.region_scores, expected.region_scores, atol=1e-4, rtol=1e-4)
    assert got.num_forwards == expected.num_forwards


@pytest.mark.parametrize(("fixture", "default"), [("model", 1), ("isolated_model", 0)])
def test_default_of_the_prefix_refresh_interval(request, inputs, fixture, default):
    model = request.getfixturevalue(fixture)
    expected = run(model, inputs, prefix_refresh_interval=default)
    got = run(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.region_scores, expected.region_scores)


def test_region_order_may_be_left_out(model, processor):
    image, masks = make_image(1, 64, 64, 2)
    masks = sorted(masks, key=np.sum, reverse=True)
    inputs = processor(images=image, segmentation_maps=masks)
    expected = run(model, inputs).region_tokens
    del inputs["region_order"], inputs["image_index"]
    assert torch.equal(run(model, inputs).region_tokens, expected)


def test_region_checkpoint_without_regions_chats(model, processor):
    sequence = run(model, processor(text="Hello"))
    assert isinstance(sequence, torch.Tensor)


# ---------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def question(base):
    return base[1](images=make_image(2, 256, 128)[0], text="What is this?")


def test_chat_returns_tokens(base, question):
    model, _ = base
    sequences = run(model, question)
    length = question["input_ids"].shape[1]
    assert sequences.shape == (1, length + SLOTS)
    assert torch.equal(sequences[:, :length], question["input_ids"])
    banned = {model.config.mask_token_id, model.config.start_header_token_id, model.config.end_header_token_id}
    banned |= {model.config.bos_token_id, model.config.eos_token_id}
    assert not banned & set(sequences[0, length:].tolist())


def test_chat_output_object(base, question):
    model, _ = base
    output = run(model, question, return_dict_in_generate=True, output_history=True)
    assert isinstance(output, PdlmGenerationOutput)
    assert output.region_tokens is None
    assert output.num_forwards == STEPS and output.tokens_per_forward == SLOTS / STEPS
    assert torch.equal(output.sequences, run(model, question))
    committed = 0
    for step in output.history:
        assert step.tokens.shape == (1, SLOTS)
        assert int((~step.masked).sum()) == committed
        committed += SLOTS // STEPS


def test_ids_and_pixels_are_enough(base, question):
    model, _ = base
    got = model.generate(
        input_ids=question["input_ids"], pixel_values=question["pixel_values"], max_new_tokens=4, max_denoising_steps=2
    )
    assert torch.equal(got, run(model, question, max_new_tokens=4, max_denoising_steps=2))


def history(model, inputs, **settings):
    return run(model, inputs, return_dict_in_generate=True, output_history=True, **settings).history


def test_block_length_one_is_left_to_right(base, question):
    model, _ = base
    for number, step in enumerate(history(model, question, block_length=1, max_denoising_steps=SLOTS)):
        assert step.masked[0].tolist() == [False] * number + [True] * (SLOTS - number)


def test_blocks_are_written_from_left_to_right(base, question):
    model, _ = base
    steps = history(model, question, block_length=4, max_denoising_steps=4)
    opened = [(int(s.masked[0, :4].sum()), int(s.masked[0, 4:].sum())) for s in steps]
    assert opened == [(4, 4), (2, 4), (0, 4), (0, 2)]
    assert [s.draft[0].lt(0).tolist() for s in steps[:1]] == [[False] * 4 + [True] * 4]


def test_a_block_longer_than_the_answer_is_the_answer(base, question):
    model, _ = base
    assert torch.equal(run(model, question, block_length=64), run(model, question))


def test_chat_default_is_one_step_a_token(base, question):
    model, _ = base
    output = model.generate(**question, max_new_tokens=6, return_dict_in_generate=True)
    assert output.num_forwards == 6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 4},
        {"temperature": 0.5, "seed": 3},
        {"remasking": "random", "seed": 3},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "temperature": 0.5, "seed": 3, "block_length": 4},
    ],
    ids=str,
)
def test_chat_batch_equals_one_by_one(base, settings):
    model, processor = base
    texts = ["Hi?", "A longer question about two images", "No image"]
    image = make_image(2, 256, 128)[0]
    images = [[image], [image, image], []]
    batched = run(model, processor(images=images, text=texts), **settings)[:, -SLOTS:]
    for k in range(3):
        single = run(model, processor(images=images[k] or None, text=texts[k]), **settings)
        assert torch.equal(single[0, -SLOTS:], batched[k])


def test_chat_seed(base, question):
    model, _ = base
    first = run(model, question, temperature=1.0, seed=1)
    assert torch.equal(run(model, question, temperature=1.0, seed=1), first)
    assert not torch.equal(run(model, question, temperature=1.0, seed=2), first)


def test_guidance_by_hand(base, question):
    """One step: draft = argmax of un + scale * (cond - un), un from a prompt of mask embeddings."""
    model, _ = base
    mask, scale = model.config.mask_token_id, 3.0
    length = question["input_ids"].shape[1]
    canvas = torch.full((1, SLOTS), mask)
    with torch.no_grad():
        ids = torch.cat([question["input_ids"], canvas], 1)
        visual = {"pixel_values": question["pixel_values"], "image_grids": question["image_grids"]}
        conditional = model(input_ids=ids, **visual).logits[:, length:]
        blank = model.get_input_embeddings()(torch.full_like(ids, mask))
        unconditional = model(inputs_embeds=blank).logits[:, length:]
    logits = unconditional + scale * (conditional - unconditional)
    banned = ("mask_token_id", "start_header_token_id", "end_header_token_id", "bos_token_id", "eos_token_id")
    logits[..., [getattr(model.config, name) for name in banned]] = -torch.inf
    got = run(model, question, max_denoising_steps=1, guidance_scale=scale, return_dict_in_generate=True)
    assert torch.equal(got.sequences[:, length:], logits.argmax(-1))
    assert got.num_forwards == 2
    assert torch.equal(run(model, question, guidance_scale=1.0), run(model, question))


@pytest.mark.parametrize("form", ["text", "ids", "own tokenizer"])
def test_generation_suffix(base, question, form):
    model, processor = base
    suffix = " end."
    ids = processor.tokenizer(suffix, add_special_tokens=False)["input_ids"]
    settings = {"generation_suffix": ids if form == "ids" else suffix}
    if form == "text":
        settings["tokenizer"] = processor.tokenizer
    sequences = run(model, question, **settings)  # else the tokenizer beside the weights
    assert sequences.shape[1] == question["input_ids"].shape[1] + SLOTS + len(ids)
    assert sequences[0, -len(ids) :].tolist() == ids
    assert torch.equal(sequences, run(model, question, generation_suffix=ids))


def test_suffix_is_seen_while_writing(base, question):
    model, _ = base
    first, second = (
        model.generate(
            **question,
            max_new_tokens=4,
            max_denoising_steps=1,
            generation_suffix=ids,
            output_history=True,
            return_dict_in_generate=True,
        )
        .history[0]
        .probability
        for ids in ([5, 6, 7], [8, 9, 10])
    )
    assert (first - second).abs().max() > 1e-6


def test_stop_strings_end_an_answer(base, question):
    model, processor = base
    length = question["input_ids"].shape[1]
    free = run(model, question, block_length=1, max_denoising_steps=SLOTS)[0, length:].tolist()
    stop = [free[3]]
    first = free.index(stop[0])
    settings = {"block_length": 1, "max_denoising_steps": SLOTS, "generation_suffix": [5]}
    with_suffix = run(model, question, **settings)[0, length:-1].tolist()
    copied = copy.deepcopy(model)
    text = processor.tokenizer.decode(stop)
    if processor.tokenizer(text, add_special_tokens=False)["input_ids"] == stop:
        plain = run(copied, question, stop_strings=text, block_length=1, max_denoising_steps=SLOTS)[0, length:]
        assert plain.tolist() == free[:first]
        output = run(copied, question, stop_strings=[text], return_dict_in_generate=True, **settings)
        if stop[0] in with_suffix:
            at = with_suffix.index(stop[0])
            assert output.sequences[0, length:].tolist() == with_suffix[:at] + [5]
            assert output.num_forwards == at + 1


def test_chat_streamer(base, question):
    model, _ = base
    streamer = Recorder()
    sequences = run(model, question, streamer=streamer, block_length=4)
    assert len(streamer.drafts) == STEPS
    assert all(draft.shape == (1, SLOTS) for draft in streamer.drafts)
    assert torch.equal(streamer.final[0], sequences[0, -SLOTS:])
    assert torch.equal(streamer.drafts[-1], streamer.final)
    assert streamer.ended == 1


def test_chat_logits_exist_for_the_block_only(golden_base, question):
    model = AutoModelForImageTextToText.from_pretrained(golden_base)
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    run(model, question, block_length=2)
    assert shapes == [(1, 2)] * STEPS


def positions(model, monkeypatch, limit: int):
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", limit)


def test_captions_fit_the_positions_of_the_checkpoint(model, inputs, monkeypatch):
    """The captions of a row stand one behind the other: prompt, and for each region its token, its slots, its end."""
    counts = (inputs["region_order"] >= 0).sum(1)
    lengths = inputs["attention_mask"].sum(1) + counts * (SLOTS + 2)
    longest = int(lengths.max())
    whole = run(model, inputs)
    positions(model, monkeypatch, longest)
    assert torch.equal(run(model, inputs).region_tokens, whole.region_tokens)
    assert torch.equal(run(model, inputs, max_batch_tokens=1).region_tokens, whole.region_tokens)
    positions(model, monkeypatch, longest - 1)
    most = int(counts[lengths.argmax()])
    message = (
        f"The prompt and {most} captions of 8 token positions make {longest} tokens, more than the {longest - 1} "
    )
    with pytest.raises(SettingError, match=message):
        run(model, inputs)


def test_rows_of_an_image_count_their_own_positions(model, processor, monkeypatch):
    """More regions than prompts are spread over rows, and every row begins at position 0."""
    image, masks = make_image(1, num_masks=3)
    inputs = processor(images=image, segmentation_maps=masks * 3)
    rows = (inputs["region_order"] >= 0).sum(1)
    assert rows.tolist() == [6, 3]
    positions(model, monkeypatch, int((inputs["attention_mask"].sum(1) + rows * (SLOTS + 2)).max()))
    assert run(model, inputs).region_tokens.shape == (1, 9, SLOTS)


@pytest.mark.parametrize("suffix", [[], [5, 6, 7]])
def test_an_answer_fits_the_positions_of_the_checkpoint(base, question, monkeypatch, suffix):
    model, _ = base
    longest = int(question["attention_mask"].sum(1).max()) + SLOTS + len(suffix)
    positions(model, monkeypatch, longest)
    settings = {"max_denoising_steps": SLOTS, "generation_suffix": suffix}
    assert run(model, question, **settings).shape[1] == question["input_ids"].shape[1] + SLOTS + len(suffix)
    positions(model, monkeypatch, longest - 1)
    with pytest.raises(SettingError, match=f"an answer of 8 token positions make {longest} tokens, more than the "):
        run(model, question, **settings)


def test_a_caption_without_an_end_is_truncated(model, processor, inputs):
    output = run(model, inputs)
    end, plain = model.config.eot_token_id, processor.tokenizer.convert_tokens_to_ids("A")
    output.region_tokens = torch.full((1, 3, 4), plain)
    output.region_tokens[0, 1, 3] = end
    output.region_tokens[0, 2, 0] = end
    output.region_scores = torch.tensor([[0.5, 0.25, 1.0]])
    captions = processor.post_process_region_captions(output)[0]
    assert [caption.truncated for caption in captions] == [True, False, False]
    assert [len(caption.token_ids) for caption in captions] == [4, 3, 0]
    assert [caption.score for caption in captions] == [0.5, 0.25, 1.0]


def test_numpy_numbers_are_numbers(model, inputs):
    output = run(model, inputs, max_denoising_steps=np.int64(2), acceptance_threshold=np.float32(0.5))
    assert output.num_forwards <= 2


def test_region_inputs_cannot_be_forgotten(model, inputs):
    """Without them the prompt would be answered as chat, about nothing."""
    for kept in (("input_ids", "pixel_values"), ("input_ids", "pixel_values", "image_grids", "region_boxes")):
        with pytest.raises(ValueError, match="The prompt has places for regions"):
            model.generate(**{name: inputs[name] for name in kept}, max_new_tokens=4)


def test_settings_of_other_models_are_refused(model, inputs):
    with pytest.raises(ValueError, match="must be a PdlmGenerationConfig, got GenerationConfig"):
        model.generate(**inputs, generation_config=GenerationConfig(num_beams=4))
