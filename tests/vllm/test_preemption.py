"""Requests that lose their places in the cache and start again: the same captions."""

import pytest
from drawn_images import drawn_images, texts
from engines import engine
from test_canvas_rows import SLOW, assert_equal, model_state

from pdlm_vllm import caption_many


@pytest.fixture(scope="module")
def crowded():
    """An engine with a cache for about three requests."""
    with engine(num_gpu_blocks_override=180) as llm:
        yield llm


def preemptions(llm) -> int:
    """How often requests have lost their places in the cache."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_preemption_changes_nothing(crowded, captioner):
    """A cache for about three requests, and sixteen that want in: some lose their place and start again."""
    pairs, before = drawn_images(16, seed=5), preemptions(crowded)
    found = [texts(captions) for captions in caption_many(crowded, pairs)]
    assert found == [texts(captions) for captions in captioner.caption_many(pairs)]
    assert preemptions(crowded) > before


def test_a_request_that_starts_again_knows_nothing_of_before(crowded, captioner):
    """In a cache for about three requests, with news that arrive after some have lost their place."""
    pairs, settings = drawn_images(12, seed=5), {**SLOW, "trim_canvas": True}
    news, before = model_state(crowded).news, preemptions(crowded)
    try:
        news.behind = 1
        found = list(caption_many(crowded, pairs, **settings))
    finally:
        news.behind = 0
        news.read()
    assert_equal(found, list(captioner.caption_many(pairs, batch_size=1, **settings)))
    assert preemptions(crowded) > before
