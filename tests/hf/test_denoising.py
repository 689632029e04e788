"""The prefix cache, chunks of a batch, and regions that finish early."""

from functools import partialmethod

import pytest
import torch

from pdlm_hf import PdlmGenerationConfig
from pdlm_hf.canvas_pdlm import RegionCanvas
from pdlm_hf.captioning.captioner import RegionCaptioner
from pdlm_hf.denoising_pdlm import GenerationTask
from pdlm_hf.diffusion_pdlm import masks_left
from pdlm_hf.generation_pdlm import _chunks
from pdlm_hf.shapes.evaluate import held_out

SETTINGS = {"max_new_tokens": 8, "max_denoising_steps": 8}


@pytest.fixture(scope="module")
def inputs(processor, scenes):
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


def hidden_rows(model, monkeypatch):
    """Query lengths of every pass through the language model."""
    lengths = []
    forward = model.model.language_model.forward

    def spy(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[:2])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", spy)
    return lengths


@pytest.mark.parametrize("rule", [{}, {"acceptance_threshold": 0.3}, {"entropy_bound": 2.0}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_isolated_cache_is_exact(isolated_model, inputs, implementation, rule):
    settings = {**SETTINGS, **rule, "output_history": True}
    isolated_model.set_attn_implementation(implementation)
    try:
        exact = isolated_model.generate(**inputs, prefix_refresh_interval=1, **settings)
        for interval in (0, 3):
            cached = isolated_model.generate(**inputs, prefix_refresh_interval=interval, **settings)
            assert torch.equal(cached.region_tokens, exact.region_tokens)
            assert torch.equal(cached.region_steps, exact.region_steps)
            assert cached.num_forwards == exact.num_forwards
            torch.testing.assert_close(cached.region_scores, exact.region_scores, atol=1e-5, rtol=1e-4)
            for ours, theirs in zip(cached.history, exact.history, strict=True):
                assert torch.equal(ours.tokens, theirs.tokens)
                where = ours.masked  # finished regions are no longer computed
                torch.testing.assert_close(ours.probability[where], theirs.probability[where], atol=1e-5, rtol=1e-4)
    finally:
        isolated_model.set_attn_implementation("sdpa")


def test_entropy_bound_from_one_slot_to_all(isolated_model, inputs):
    exists = inputs["region_order"] >= 0
    slow = isolated_model.generate(**inputs, **SETTINGS, entropy_bound=0.0, output_history=True)
    for before, after in zip(slow.history, slow.history[1:], strict=False):
        committed = (before.masked & ~after.masked).sum(-1)
        assert (committed[before.masked.any(-1)] >= 1).all()
    wide = isolated_model.generate(**inputs, **SETTINGS, entropy_bound=1e6)
    assert wide.num_forwards == 1
    assert (wide.region_steps == 1).sum() == exists.sum()
    some = isolated_model.generate(**inputs, **SETTINGS, entropy_bound=4.0)
    assert 1 < some.num_forwards <= slow.num_forwards


def test_the_cache_is_the_default_for_isolated_checkpoints_only(isolated_model, model, inputs, monkeypatch):
    for network, cached in ((isolated_model, True), (model, False)):
        lengths = hidden_rows(network, monkeypatch)
        network.generate(**inputs, **SETTINGS)
        canvas = max((inputs["region_order"] >= 0).sum(1).tolist()) * 10
        assert lengths[0][1] == inputs["input_ids"].shape[1] + canvas
        assert [length[1] for length in lengths[1:-1]] == [canvas if cached else lengths[0][1]] * 6
        monkeypatch.undo()


def test_full_attention_first_step_is_identical_and_later_ones_approximate(model, inputs):
    settings = {**SETTINGS, "output_history": True}
    exact = model.generate(**inputs, prefix_refresh_interval=1, **settings).history
    frozen = model.generate(**inputs, prefix_refresh_interval=0, **settings).history
    refreshed = model.generate(**inputs, prefix_refresh_interval=2, **settings).history
    for approximate in (frozen, refreshed):
        assert torch.equal(approximate[0].draft, exact[0].draft)
        assert torch.equal(approximate[0].probability, exact[0].probability)
        assert torch.equal(approximate[1].tokens, exact[1].tokens)
    assert not torch.equal(frozen[1].probability, exact[1].probability)
    # step 2 computes everything again; its canvas differs only if step 1 drafted something else
    if torch.equal(refreshed[2].tokens, exact[2].tokens):
        torch.testing.assert_close(refreshed[2].probability, exact[2].probability)


def test_finished_regions_and_rows_leave_the_canvas(isolated_model, inputs, monkeypatch):
    lengths = hidden_rows(isolated_model, monkeypatch)
    output = isolated_model.generate(**inputs, max_new_tokens=8, max_denoising_steps=32, acceptance_threshold=0.3)
    steps = output.region_steps
    present = output.region_tokens[..., 0] >= 0
    for step, (rows, length) in enumerate(lengths[1:], 1):
        active = (steps > step) & present
        assert rows == active.any(1).sum()
        assert length == active.sum(1).max() * 10
    assert len(lengths) == output.num_forwards == steps.max()
    assert steps[present].float().mean() < output.num_forwards  # some did finish early


class Recorder:
    """A streamer that counts drafts."""

    drafts = 0

    def put(self, tokens):
        pass

    def put_draft(self, tokens):
        self.drafts += 1

    def end(self):
        pass


@pytest.mark.parametrize("settings", [{"acceptance_threshold": 0.3}, {}], ids=["adaptive", "fixed"])
def test_a_streamer_keeps_no_region_in_the_canvas(isolated_model, inputs, monkeypatch, settings):
    lengths, streamer = hidden_rows(isolated_model, monkeypatch), Recorder()
    silent = isolated_model.generate(**inputs, max_new_tokens=8, max_denoising_steps=12, **settings)
    alone = list(lengths)
    lengths.clear()
    output = isolated_model.generate(**inputs, max_new_tokens=8, max_denoising_steps=12, streamer=streamer, **settings)
    assert lengths == alone and len(set(lengths[1:])) > 1
    assert streamer.drafts == output.num_forwards
    assert torch.equal(output.region_tokens, silent.region_tokens)


@pytest.mark.parametrize("interval", [0, 1, 5])
@pytest.mark.parametrize("steps", [3, 12])
def test_what_the_schedule_cannot_open_again_leaves(isolated_model, inputs, monkeypatch, steps, interval):
    """Regions in the step that opens no position of their image, images behind it; with the captions of all rows."""
    settings = {"max_new_tokens": 8, "max_denoising_steps": steps, "prefix_refresh_interval": interval}
    counts = (inputs["region_order"] >= 0).sum(1).tolist()
    prompt = inputs["input_ids"].shape[1]
    lengths = hidden_rows(isolated_model, monkeypatch)
    output = isolated_model.generate(**inputs, **settings, output_history=True)
    for step, (rows, length) in enumerate(lengths):
        before = [masks_left(n * 8, step - 1, steps) if step else n * 8 for n in counts]
        after = [masks_left(n * 8, step, steps) for n in counts]
        unfinished = output.history[step].masked.any(-1).sum(1).tolist()
        needed = [n if left else some for n, left, some in zip(counts, after, unfinished, strict=True)]
        whole = step == 0 or (interval and step % interval == 0)
        assert rows == sum(left > 0 for left in before)
        if whole:
            assert length == prompt + 10 * max(n for n, left in zip(counts, before, strict=True) if left)
        else:
            assert length == 10 * max(needed)
    monkeypatch.setattr(RegionCanvas, "view", partialmethod(view_of_all, RegionCanvas.view))
    everything = isolated_model.generate(**inputs, **settings)
    assert torch.equal(output.region_tokens, everything.region_tokens)
    assert torch.equal(output.region_steps, everything.region_steps)
    torch.testing.assert_close(output.region_scores, everything.region_scores, atol=1e-5, rtol=1e-4)


def view_of_all(canvas, view, active, trimmed=False):
    return view(canvas, canvas.exists)


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("extra", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_random_numbers_stay_when_images_leave(isolated_model, inputs, monkeypatch, extra, interval):
    settings = {
        "max_new_tokens": 8,
        "max_denoising_steps": 12,
        "prefix_refresh_interval": interval,
        "seed": 3,
        **extra,
    }
    output = isolated_model.generate(**inputs, **settings)
    monkeypatch.setattr(RegionCanvas, "view", partialmethod(view_of_all, RegionCanvas.view))
    assert torch.equal(output.region_tokens, isolated_model.generate(**inputs, **settings).region_tokens)


@pytest.mark.parametrize("extra", [{}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_complete_images_leave_where_every_pass_computes_prompts(model, inputs, monkeypatch, extra):
    settings = {"max_new_tokens": 8, "max_denoising_steps": 32, "acceptance_threshold": 0.3, **extra}
    lengths = hidden_rows(model, monkeypatch)
    output = model.generate(**inputs, **settings)
    steps = output.region_steps.amax(1)
    assert [rows for rows, _ in lengths] == [int((steps > step).sum()) for step in range(output.num_forwards)]
    assert steps.min() < steps.max()
    monkeypatch.setattr(RegionCanvas, "view", partialmethod(view_of_all, RegionCanvas.view))
    everything = model.generate(**inputs, **settings)
    assert torch.equal(output.region_tokens, everything.region_tokens)
    torch.testing.assert_close(output.region_scores, everything.region_scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "acceptance_threshold": 0.3}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("interval", [0, 1])
def test_chunks_change_nothing(isolated_model, inputs, settings, interval):
    whole = isolated_model.generate(**inputs, prefix_refresh_interval=interval, **settings)
    chunks = isolated_model.generate(**inputs, prefix_refresh_interval=interval, max_batch_tokens=400, **settings)
    assert chunks.num_forwards > whole.num_forwards
    assert torch.equal(chunks.region_tokens, whole.region_tokens)
    assert torch.equal(chunks.sequences, whole.sequences)
    torch.testing.assert_close(chunks.region_scores, whole.region_scores)


@pytest.mark.parametrize(
    ("prompts", "counts", "limit", "expected"),
    [
        ([10, 10, 10], [1, 1, 1], None, [3]),
        ([10, 10, 10], [1, 1, 1], 40, [2, 1]),  # 2 rows of 10 + 10
        ([10, 30, 10], [1, 1, 1], 40, [1, 1, 1]),  # a long row widens its whole portion
        ([10, 10], [1, 4], 40, [1, 1]),
        ([100], [1], 5, [1]),  # one row always goes
    ],
)
def test_portion_sizes(prompts, counts, limit, expected):
    assert _chunks(prompts, counts, 8, limit) == expected


def test_tokens_per_forward_with_and_without_padding(isolated_model, inputs):
    output = isolated_model.generate(**inputs, **SETTINGS)
    end = {isolated_model.config.eot_token_id, isolated_model.config.eos_token_id}
    text = 0
    for caption in output.region_tokens.flatten(0, 1).tolist():
        ends = [i for i, token in enumerate(caption) if token in end or token < 0]
        text += ends[0] if ends else len(caption)
    regions = int((inputs["region_order"] >= 0).sum())
    assert output.tokens_per_forward == regions * 8 / 8
    assert output.tokens_per_forward_per_region == 8 / 8
    assert output.text_tokens_per_forward == text / 8


def test_flex_attention_with_the_cache(isolated_model, processor, scenes):
    """Not compiled: on CPUs torch 2.13 writes C++ for it that does not compile."""
    inputs = processor(images=scenes[0].image, segmentation_maps=scenes[0].masks)
    settings = {"max_new_tokens": 8, "max_denoising_steps": 3}
    expected = isolated_model.generate(**inputs, **settings)
    isolated_model.set_attn_implementation("flex_attention")
    try:
        with torch.compiler.set_stance("force_eager"):
            output = isolated_model.generate(**inputs, **settings)
    finally:
        isolated_model.set_attn_implementation("sdpa")
    assert torch.equal(output.region_tokens, expected.region_tokens)
    torch.testing.assert_close(output.region_scores, expected.region_scores, atol=1e-4, rtol=1e-3)


def test_a_trimmed_canvas_hides_what_is_behind_the_ends(isolated_model, inputs):
    """Left out of a forward pass is the same as seen by nobody."""
    slots = 8
    counts = (inputs["region_order"] >= 0).sum(1).tolist()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    task = GenerationTask(isolated_model, PdlmGenerationConfig(), ids, mask)
    names = ("pixel_values", "image_grids", "region_masks", "region_boxes", "original_sizes")
    with torch.no_grad():
        prompt = isolated_model.model.embed(ids, **{name: inputs[name] for name in names})
        canvas = RegionCanvas(task, prompt, counts, slots)
        whole = canvas.view(canvas.exists)
        canvas.forward(whole, True, keep=True)
        canvas.masked[0, 0, :4] = canvas.masked[1, 1, 2] = False
        canvas.tokens[0, 0, :3], canvas.tokens[0, 0, 3], canvas.tokens[1, 1, 2] = 7, canvas.end, canvas.end
        canvas.tokens[0, 0, 6] = canvas.end  # a draft, not final
        trimmed = canvas.view(canvas.exists, trimmed=True)
        assert [n - m for n, m in zip(whole.counts, trimmed.counts, strict=True)] == [4, 5] + [0] * (len(counts) - 2)
        found = canvas.forward(trimmed, False).flatten(0, 1)[trimmed.place]

        row, region, slot = whole.where
        behind = torch.zeros_like(canvas.masked)
        behind[0, 0, 4:] = behind[1, 1, 3:] = True
        canvas.forward(whole, False)  # builds its mask
        bias = whole.masks[False]
        seen = torch.zeros(whole.columns.shape, dtype=torch.bool)
        place = whole.slots.flatten()[whole.place]
        seen[row, place] = behind[row, region, slot]
        width = canvas.prompt.shape[1]
        bias[..., width:] = bias[..., width:].masked_fill(seen[:, None, None], -torch.inf)
        expected = canvas.forward(whole, False).flatten(0, 1)[whole.place][~behind[whole.where]]
    assert all(torch.equal(a, b[~behind[whole.where]]) for a, b in zip(trimmed.where, whole.where, strict=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_trimmed_canvases_run_fewer_rows(monkeypatch):
    captioner = RegionCaptioner.from_pretrained()
    captioner.model.generation_config.update(acceptance_threshold=None, entropy_bound=0.01)  # in many passes
    scenes = list(held_out(5, 4))
    lengths = hidden_rows(captioner.model, monkeypatch)

    def run(scenes, **settings):
        lengths.clear()
        found = captioner.caption_many([(scene.image, scene.masks) for scene in scenes], **settings)
        captions = [[caption.text for caption in captions] for captions in found]
        return captions, sum(batch * length for batch, length in lengths)

    plain, trimmed = run(scenes), run(scenes, trim_canvas=True)
    assert trimmed[1] < 0.9 * plain[1]
    assert [run([scene], trim_canvas=True)[0][0] for scene in scenes] == trimmed[0]
