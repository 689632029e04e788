"""Steps with the numbers and addresses of earlier ones, as CUDA graphs compute them: the same captions."""

import pytest
from drawn_images import drawn_images, texts
from engines import engine, runner
from replay import Replay
from test_canvas_rows import SLOW, assert_equal, counted_by_vllm
from vllm import SamplingParams
from vllm.v1.attention.backend import AttentionCGSupport

from pdlm_vllm import caption_many


@pytest.fixture(scope="module")
def replay():
    """An engine, and what replays its steps."""
    with engine(diffusion_config={"canvas_length": 204}, additional_config={"cuda_graphs": True}) as llm:
        yield llm, Replay(runner(llm))


def test_steps_are_replayed_from_buffers_that_never_move(replay, captioner):
    """What a CUDA graph would do, on a CPU; with padding, as graphs are captured for some numbers of requests only."""
    llm, steps = replay
    assert steps.state.get_additional_cg_support() == (AttentionCGSupport.UNIFORM_BATCH, "pdlm")
    replayed, padded = steps.replayed, steps.padded
    six = [pair for pair in drawn_images(40) if len(pair[1]) == 6]
    for pairs in (six, drawn_images(10), six[:3]):
        expected = [texts(captions) for captions in captioner.caption_many(pairs)]
        assert [texts(captions) for captions in caption_many(llm, pairs)] == expected
    for params in (SamplingParams(max_tokens=204), SamplingParams(max_tokens=16)):  # never as wide as a graph
        assert 0 < len(llm.generate(["Hi"], params, use_tqdm=False)[0].outputs[0].token_ids) < 204
    assert steps.replayed > replayed + 20 and steps.padded > padded + 1
    assert len(steps.addresses) == 1


def test_a_graph_hides_what_it_cannot_leave_out(replay, captioner):
    llm, steps = replay
    pairs, settings = [pair for pair in drawn_images(40) if len(pair[1]) == 6], {**SLOW, "trim_canvas": True}
    before = steps.replayed
    found, counts = counted_by_vllm(llm, pairs, settings)
    assert_equal(found, list(captioner.caption_many(pairs, batch_size=1, **settings)))
    assert steps.replayed > before + 10
    assert counts.rows % 204 == 0 and counts.rows > 0
