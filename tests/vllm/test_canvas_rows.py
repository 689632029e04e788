"""Rows that a step need not compute: scored, run, or hidden; counted, and with the captions of transformers."""

import json

import pytest
from drawn_images import drawn_images, texts
from engines import SOME, engine, runner

from pdlm_hf import CHECKPOINT
from pdlm_hf.canvas_pdlm import RegionCanvas
from pdlm_vllm import caption_many
from pdlm_vllm.plan import defaults_of
from pdlm_vllm.requests import read_captions, region_requests

SLOW = {"acceptance_threshold": 1.0, "prefix_refresh_interval": 0}  # one token a region and step
SETTINGS = [
    {},
    SLOW,
    {**SLOW, "trim_canvas": True},
    {**SLOW, "trim_canvas": True, "prefix_refresh_interval": 3},
    {"acceptance_threshold": 0.95, "trim_canvas": True, "prefix_refresh_interval": 0},
    {"acceptance_threshold": 0.95, "trim_canvas": True, "prefix_refresh_interval": 1},
    {"acceptance_threshold": None, "trim_canvas": True, "max_denoising_steps": 5},
]


class Counts:
    """Token positions that were scored, and rows of passes over canvases alone."""

    def __init__(self):
        self.scored = self.rows = 0

    def of_transformers(self, model, monkeypatch):
        forward = RegionCanvas.forward

        def counted(canvas, view, whole, keep=False):
            self.rows += 0 if whole else int(view.present.sum())
            return forward(canvas, view, whole, keep)

        monkeypatch.setattr(RegionCanvas, "forward", counted)
        return model.lm_head.register_forward_hook(self._head)

    def of_vllm(self, llm, monkeypatch):
        state = model_state(llm)
        logits, canvas = state.model.logits, state._canvas

        def counted(rows, request, *rest):
            before = rows.count
            left = canvas(rows, request, *rest)
            self.rows += 0 if request.plan.refreshes(request.step) else rows.count - before
            return left

        def score(hidden):
            self.scored += len(hidden)
            return logits(hidden)

        monkeypatch.setattr(state, "_canvas", counted)
        monkeypatch.setattr(state.model, "logits", score)

    def _head(self, head, args, logits):
        self.scored += logits.shape[:-1].numel()


def model_state(llm):
    return runner(llm).model_state


def counted_by_transformers(plain, pairs, settings):
    """Captions one image at a time, so that no canvas is padded; and their counts."""
    counts = Counts()
    with pytest.MonkeyPatch.context() as patch:
        handle = counts.of_transformers(plain.model, patch)
        expected = list(plain.caption_many(pairs, batch_size=1, **settings))
        handle.remove()
    return expected, counts


def counted_by_vllm(llm, pairs, settings):
    counts = Counts()
    with pytest.MonkeyPatch.context() as patch:
        counts.of_vllm(llm, patch)
        found = list(caption_many(llm, pairs, **settings))
    return found, counts


def assert_equal(found, expected):
    assert [texts(captions) for captions in found] == [texts(captions) for captions in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert [c.score for c in mine] == pytest.approx([c.score for c in theirs], abs=1e-5)


@SOME
@pytest.mark.parametrize("settings", SETTINGS, ids=json.dumps)
def test_rows_and_captions_are_those_of_transformers(both, settings, some):
    llm, plain = both
    pairs = drawn_images(5)[some]
    expected, theirs = counted_by_transformers(plain, pairs, settings)
    found, mine = counted_by_vllm(llm, pairs, settings)
    assert_equal(found, expected)
    own = plain.model.generation_config.acceptance_threshold
    if settings.get("acceptance_threshold", own) is not None:  # the fixed schedule ranks all positions in every step
        assert (mine.scored, mine.rows) == (theirs.scored, theirs.rows)


def test_hidden_positions_and_complete_regions_leave(both):
    llm, _ = both
    pairs = drawn_images(5)
    plain, trimmed = (counted_by_vllm(llm, pairs, {**SLOW, "trim_canvas": trim})[1] for trim in (False, True))
    assert 0 < trimmed.rows < 0.8 * plain.rows
    assert plain.rows < 34 * 31 * sum(len(regions) for _, regions in pairs)  # if all stayed to the last step


def test_requests_of_every_kind_side_by_side(both):
    """Each as if it were alone, whatever hides its positions beside it."""
    llm, plain = both
    config, defaults = plain.model.config, defaults_of(str(CHECKPOINT))
    pairs = drawn_images(7, seed=3)
    kinds = [SETTINGS[k % len(SETTINGS)] for k in range(7)]
    works = [
        region_requests(plain.processor, config, defaults, *pair, **settings)
        for pair, settings in zip(pairs, kinds, strict=True)
    ]
    flat = [work for passes in works for work in passes]
    outputs = iter(llm.generate([work.prompt for work in flat], [work.params for work in flat], use_tqdm=False))
    for passes, pair, settings in zip(works, pairs, kinds, strict=True):
        found = read_captions(passes, [next(outputs) for _ in passes], plain.processor, config)[0]
        assert_equal([found], [plain.caption(*pair, **settings)])


def test_old_news_costs_rows_and_changes_no_caption(both):
    """A host that runs ahead of its device learns late what was accepted."""
    llm, plain = both
    pairs, settings = drawn_images(5), {**SLOW, "trim_canvas": True}
    news, rows, scored = model_state(llm).news, [], []
    expected = list(plain.caption_many(pairs, batch_size=1, **settings))
    try:
        for news.behind in (0, 1, 3):
            found, counts = counted_by_vllm(llm, pairs, settings)
            assert_equal(found, expected)
            rows.append(counts.rows)
            scored.append(counts.scored)
    finally:
        news.behind = 0
        news.read()
    assert rows[0] < rows[1] < rows[2] and scored[0] < scored[1] < scored[2]


def test_a_server_may_trim_by_default(captioner):
    pairs = drawn_images(4)
    with engine(override_generation_config=SLOW | {"trim_canvas": True}) as llm:
        found, own = counted_by_vllm(llm, pairs, {})
        _, whole = counted_by_vllm(llm, pairs, {"trim_canvas": False})
    assert_equal(found, list(captioner.caption_many(pairs, batch_size=1, **SLOW, trim_canvas=True)))
    assert own.rows < whole.rows


@pytest.mark.parametrize("value", ["yes", 1, 0.0, [True]], ids=repr)
def test_a_switch_is_true_or_false(both, value):
    with pytest.raises(ValueError, match="`trim_canvas` must be true or false"):
        list(caption_many(both[0], drawn_images(1), trim_canvas=value))
