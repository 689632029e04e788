import math

import pytest
import torch

from pdlm_hf.diffusion_pdlm import (
    accept_bounded,
    accept_confident,
    before_end,
    caption_scores,
    diffusion_loss,
    gumbel_perturb,
    lowest_mask,
    masks_left,
    most_probable,
    noise_probability,
    token_entropy,
    token_log_odds,
    transfer_schedule,
)


@pytest.mark.parametrize(
    ("t", "floor", "expected"),
    [(0.0, 1e-3, 1e-3), (1.0, 1e-3, 1.0), (0.5, 1e-3, 0.5005), (0.0, 0.1, 0.1), (0.5, 0.1, 0.55)],
)
def test_noise_probability(t, floor, expected):
    assert noise_probability(torch.tensor(t), floor).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_masked", "num_steps", "expected"),
    [(8, 4, [2, 2, 2, 2]), (7, 3, [3, 2, 2]), (4, 8, [1, 1, 1, 1, 0, 0, 0, 0]), (1, 1, [1]), (32, 1, [32])],
)
def test_transfer_schedule(num_masked, num_steps, expected):
    assert transfer_schedule(num_masked, num_steps) == expected


@pytest.mark.parametrize("num_slots", [1, 7, 49, 100, 192])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 300])
def test_masks_left(num_slots, num_steps):
    left = [masks_left(num_slots, step, num_steps) for step in range(num_steps)]
    assert left == [int(num_slots * ((num_steps - 1 - step) / num_steps)) for step in range(num_steps)]
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)


def test_diffusion_loss_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    targets = torch.tensor([0, 0, 1])
    probability, length = torch.tensor([0.5, 0.5, 0.25]), torch.tensor([4, 4, 2])
    terms = [
        math.log(1 + math.exp(-1)) / 0.5 / 4,
        math.log(1 + math.exp(2)) / 0.5 / 4,
        math.log(2) / 0.25 / 2,
    ]
    assert diffusion_loss(logits, targets, probability, length).tolist() == pytest.approx(terms)


def test_diffusion_loss_of_nothing_is_zero_with_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = diffusion_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0)).sum()
    assert loss.item() == 0
    loss.backward()


def test_gumbel_samples_the_tempered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0])
    uniform = torch.rand(40000, 3, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0):
        drawn = gumbel_perturb(logits, temperature, uniform).argmax(-1)
        shares = torch.bincount(drawn, minlength=3) / len(drawn)
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.01, rtol=0)


def test_log_odds_keep_their_order_where_float32_probability_is_one():
    logits = torch.tensor([[60.0, 0.0], [50.0, 0.0], [1.0, 0.0]])
    tokens = torch.zeros(3, dtype=torch.long)
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[1, 0] == 1
    odds = token_log_odds(logits.clone(), tokens)
    torch.testing.assert_close(odds, torch.tensor([60.0, 50.0, 1.0]))
    torch.testing.assert_close(odds.sigmoid()[2], logits.softmax(-1)[2, 0])


def test_log_odds_where_nothing_else_is_possible():
    logits = torch.tensor([[3.0, -torch.inf], [-200.0, 200.0]])
    assert token_log_odds(logits, torch.tensor([0, 0])).tolist() == [torch.inf, -400.0]


@pytest.mark.parametrize("size", [128, 384, 1000, 3200])
def test_most_probable_is_the_first_of_the_largest(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(0, 40, (3, 50, size), generator=generator).float()  # with many equal ones
    logits[0, :10] = -torch.inf
    logits[1, 0, 77], logits[1, 1, size - 1] = torch.nan, 100.0
    assert torch.equal(most_probable(logits), logits.argmax(-1))
    assert most_probable(logits)[0, 0] == 0 and most_probable(logits)[1, 1] == size - 1
    assert most_probable(logits[:0]).shape == (0, 50)


@pytest.mark.parametrize(
    ("score", "count", "expected"),
    [
        ([3.0, 1.0, 2.0], 0, [False, False, False]),
        ([3.0, 1.0, 2.0], 2, [False, True, True]),
        ([1.0, 1.0, 1.0], 1, [True, False, False]),
        ([1.0, math.inf, math.inf], 1, [True, False, False]),
        ([-math.inf, 0.0, 1.0], 5, [True, True, True]),
    ],
)
def test_lowest_mask(score, count, expected):
    assert lowest_mask(torch.tensor([score]), torch.tensor([count]))[0].tolist() == expected


@pytest.mark.parametrize(
    ("probability", "masked", "threshold", "expected"),
    [
        ([0.9, 0.2, 0.95], [True, True, True], 0.8, [True, False, True]),
        ([0.1, 0.2, 0.15], [True, True, True], 0.8, [False, True, False]),  # at least the best one
        ([0.1, 0.9, 0.15], [True, False, True], 0.8, [False, False, True]),  # written slots do not count
        ([0.1, 0.9, 0.15], [False, False, False], 0.8, [False, False, False]),
        ([0.8, 0.7, 0.1], [True, True, True], 0.8, [True, False, False]),
    ],
)
def test_accept_confident(probability, masked, threshold, expected):
    got = accept_confident(torch.tensor([[probability]]), torch.tensor([[masked]]), threshold)
    assert got[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("entropy", "masked", "bound", "expected"),
    [
        ([0.3, 0.1, 0.2], [True, True, True], 0.0, [False, True, False]),  # at least the most certain one
        ([0.3, 0.1, 0.2], [True, True, True], 0.11, [False, True, True]),  # 0.1 + 0.2 - 0.2
        ([0.3, 0.1, 0.2], [True, True, True], 0.31, [True, True, True]),  # 0.1 + 0.2 + 0.3 - 0.3
        ([0.3, 0.1, 0.2], [True, False, True], 0.1, [False, False, True]),  # written slots do not count
        ([0.0, 0.0, 2.0], [True, True, True], 0.0, [True, True, True]),  # nothing to learn from certain ones
        ([0.3, 0.1, 0.2], [False, False, False], 9.0, [False, False, False]),
    ],
)
def test_accept_bounded(entropy, masked, bound, expected):
    got = accept_bounded(torch.tensor([[entropy]]), torch.tensor([[masked]]), bound)
    assert got[0, 0].tolist() == expected


def test_token_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([math.log(4), 0.0, math.log(2)]))


def test_a_caption_is_scored_up_to_its_end():
    tokens = torch.tensor([[5, 6, 9, 5], [5, 6, 7, 5], [8, 5, 5, 5]])
    text = before_end(tokens, [8, 9])
    assert text.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
    probability = torch.tensor([[0.5, 1.0, 0.1, 0.1], [0.2, 0.4, 0.6, 0.8], [0.75, 0.0, 0.0, 0.0]])
    scores = caption_scores(probability, text)  # an empty caption: the probability of its end
    torch.testing.assert_close(scores, torch.tensor([0.75, 0.5, 0.75]))
    # odds of 3 and of 1, to the power of 1 / 2
    scores = caption_scores(probability, text, temperature=2.0)
    torch.testing.assert_close(scores, torch.tensor([3**0.5 / (1 + 3**0.5), 0.5, 3**0.5 / (1 + 3**0.5)]))
