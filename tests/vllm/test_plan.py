"""What an engine request is to do, from its prompt and settings."""

import pytest

from pdlm_hf import CHECKPOINT, PdlmConfig, PdlmGenerationConfig
from pdlm_vllm.plan import ADAPTIVE, CHAT, FIXED, MAX_TAIL, StepPlan, count_regions, defaults_of, make_plan, token_rows

CONFIG = PdlmConfig.from_pretrained(CHECKPOINT)
FULL = PdlmConfig.from_pretrained(CHECKPOINT, prefix_attention="full")
NONE = PdlmGenerationConfig()
GRAPHS = PdlmConfig.from_pretrained(CHECKPOINT)
GRAPHS.cuda_graphs = True


def prompt(regions: int) -> list[int]:
    groups = [[token] * CONFIG.num_roi_tokens for token in CONFIG.region_token_ids[:regions]]
    joined = [token for k, group in enumerate(groups) for token in [CONFIG.newline_token_id] * (k > 0) + group]
    return [1, 2, *joined, 3]


def test_regions_with_the_defaults():
    plan = make_plan(CONFIG, defaults_of(str(CHECKPOINT)), prompt(3), None, 16, 512)
    assert (plan.num_regions, plan.num_tokens, plan.steps, plan.threshold) == (3, 32, 32, 0.8)
    assert (plan.width, plan.interval, plan.joint) == (3 * 34, 0, False)


def test_a_request_goes_before_the_checkpoint():
    extra = {"max_new_tokens": 20, "max_denoising_steps": 8, "acceptance_threshold": 0.5, "prefix_refresh_interval": 4}
    plan = make_plan(FULL, defaults_of(str(CHECKPOINT)), prompt(2), extra, None, 512)
    assert (plan.num_tokens, plan.steps, plan.threshold, plan.interval, plan.joint) == (20, 8, 0.5, 4, True)
    assert [step for step in range(9) if plan.whole(step)] == [0, 4, 8]


@pytest.mark.parametrize(
    "extra, own, expected",
    [
        ({}, True, True),
        ({"trim_canvas": True}, None, True),
        ({"trim_canvas": False}, True, False),
        ({"trim_canvas": "yes"}, None, False),
        ({"trim_canvas": True, "acceptance_threshold": 0}, None, False),  # the fixed schedule opens positions again
    ],
)
def test_trimming(extra, own, expected):
    defaults = PdlmGenerationConfig(acceptance_threshold=0.9, trim_canvas=own)
    assert make_plan(CONFIG, defaults, prompt(2), extra, None, 512).trim is expected
    assert make_plan(CONFIG, defaults, [1, 2, 3], extra, None, 512).trim is False  # chat


def test_a_cached_prompt_is_computed_once_with_the_canvas_where_it_sees_it():
    extra = {"prefix_refresh_interval": 0}
    assert [s for s in range(5) if make_plan(FULL, NONE, prompt(1), extra, None, 512).whole(s)] == [0]
    assert not any(
        make_plan(CONFIG, NONE, prompt(1), {"prefix_refresh_interval": 1}, None, 512).whole(s) for s in (0, 1)
    )


@pytest.mark.parametrize(
    "extra, max_tokens, expected",
    [
        ({}, None, (64, 64, 64)),
        ({}, 20, (20, 20, 20)),
        ({"block_length": 5}, 20, (20, 20, 5)),
        ({"block_length": 5, "max_denoising_steps": 8}, 20, (20, 8, 5)),
        ({"block_length": 7}, 20, (20, 20, 20)),  # refused at the door; here it must not break the engine
    ],
)
def test_chat(extra, max_tokens, expected):
    plan = make_plan(CONFIG, NONE, [1, 2, 3], extra, max_tokens, 512)
    assert (plan.num_tokens, plan.steps, plan.block_length) == expected
    assert plan.num_regions == 0 and plan.width == expected[0] and plan.whole(3)


def test_the_step_plans_of_each_sampler():
    budget = make_plan(CONFIG, NONE, prompt(2), {"max_new_tokens": 4, "max_denoising_steps": 3}, None, 512)
    assert [budget.step_plan(step) for step in range(4)] == [
        StepPlan(FIXED, False, 5),  # int(8 * (2 / 3))
        StepPlan(FIXED, False, 2),
        StepPlan(FIXED, True, 0),
        StepPlan(FIXED, True, 0),
    ]
    adaptive = make_plan(CONFIG, NONE, prompt(2), {"max_denoising_steps": 2, "acceptance_threshold": 0.9}, None, 512)
    assert [adaptive.step_plan(step) for step in range(2)] == [StepPlan(ADAPTIVE, False), StepPlan(ADAPTIVE, True)]
    chat = make_plan(CONFIG, NONE, [1], {"block_length": 5, "max_denoising_steps": 4}, 10, 512)
    assert [chat.step_plan(step) for step in range(4)] == [
        StepPlan(CHAT, False, 0, 3, 0, 5),
        StepPlan(CHAT, False, 0, 2, 0, 5),
        StepPlan(CHAT, False, 0, 3, 5, 10),
        StepPlan(CHAT, True, 0, 2, 5, 10),
    ]


def test_only_prompts_of_the_processor_have_regions():
    first, second = CONFIG.region_token_ids[:2]
    group = CONFIG.num_roi_tokens
    assert [count_regions(CONFIG, prompt(n)) for n in range(7)] == list(range(7))
    for text in (
        [first, second, second],
        [second] * group,
        [first] * (group - 1),
        [first] * group + [second] * group,  # no newline between
        [*prompt(2), first],
        prompt(2) + [3] * MAX_TAIL,
    ):
        assert count_regions(CONFIG, text) == 0


def test_settings_that_are_none_are_the_defaults():
    bad = {
        "max_new_tokens": -3,
        "max_denoising_steps": "x",
        "acceptance_threshold": 7,
        "prefix_refresh_interval": None,
    }
    assert make_plan(FULL, NONE, prompt(2), bad, None, 512) == make_plan(FULL, NONE, prompt(2), {}, None, 512)
    assert make_plan(CONFIG, NONE, [1], {"block_length": -4}, 8, 512).block_length == 8
    assert make_plan(CONFIG, NONE, [1], "nonsense", 8, 512).num_tokens == 8
    fixed = make_plan(CONFIG, defaults_of(str(CHECKPOINT)), prompt(1), {"acceptance_threshold": 0}, None, 512)
    assert fixed.threshold is None


def test_nothing_is_wider_than_what_is_served():
    assert make_plan(CONFIG, NONE, [1], {}, 10_000, 512).width == 512
    assert make_plan(CONFIG, NONE, prompt(6), {"max_new_tokens": 400}, None, 512).width <= 512


def test_a_chat_answer_is_never_as_wide_as_a_graph():
    assert make_plan(GRAPHS, NONE, [1], {}, 10_000, 512).width == 511
    assert make_plan(GRAPHS, NONE, prompt(6), {"max_new_tokens": 32}, None, 204).width == 204


def test_the_empty_canvas():
    plan = make_plan(CONFIG, NONE, prompt(2), {"max_new_tokens": 3}, None, 512)
    mask, end = CONFIG.mask_token_id, CONFIG.eot_token_id
    first, second = CONFIG.caption_token_ids[:2]
    assert plan.canvas(CONFIG) == [first, mask, mask, mask, CONFIG.newline_token_id, second, mask, mask, mask, end]
    assert token_rows(plan).tolist() == [[1, 2, 3], [6, 7, 8]]
    chat = make_plan(CONFIG, NONE, [1], {}, 4, 512)
    assert chat.canvas(CONFIG) == [mask] * 4 and token_rows(chat).tolist() == [[0, 1, 2, 3]]


def test_a_folder_without_generation_settings(tmp_path):
    assert defaults_of(str(tmp_path)).max_new_tokens is None
    assert defaults_of(str(CHECKPOINT)).acceptance_threshold == 0.8
