"""Masked diffusion as pure functions: forward noise, loss, confidence, schedules, acceptance. No model, no state."""

import math
from collections.abc import Sequence

import torch
from torch import nn

NOISE_FLOOR = 1e-3  # LLaDA, as the reference: p = (1 - 1e-3) t + 1e-3, so that 1 / p stays finite


def noise_probability(t: torch.Tensor, floor: float = NOISE_FLOOR) -> torch.Tensor:
    """Probability that a token is masked at noise level t (LLaDA's linear schedule).

    Args:
        t (`torch.FloatTensor`): noise level in [0, 1].
        floor (`float`): probability at t = 0. The reference uses 1e-3; a higher one tames the 1/p weight of small t.
    """
    return (1 - floor) * t + floor


def diffusion_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    probability: torch.Tensor,
    answer_length: torch.Tensor,
) -> torch.Tensor:
    """Masked-diffusion negative log-likelihood bound, term by term: cross entropy / p / answer length.

    Their sum over a sample is its loss, the mean over samples that of the batch.

    Args:
        logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`): at the masked positions only.
        targets (`torch.LongTensor` of shape `(num_masked,)`): clean tokens there (no shift).
        probability (`torch.FloatTensor` of shape `(num_masked,)`): masking probability p of each one's sample.
        answer_length (`torch.LongTensor` of shape `(num_masked,)`): labelled tokens in each one's sample.

    Returns:
        float32 tensor of shape `(num_masked,)`.
    """
    cross_entropy = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return cross_entropy / probability / answer_length


def gumbel_perturb(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Logits with Gumbel noise: its argmax is a sample at `temperature`.

    The logarithm of the reference's exp(logits) / (-log u) ** T, hence the same argmax, without the overflow that made
    the reference compute it in float64.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`)
        temperature (`float`): > 0.
        uniform (`torch.FloatTensor`): of the same shape, in (0, 1).
    """
    return logits - temperature * torch.log(-torch.log(uniform))


_STRIDE = 128


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(-1)`: of equal ones the first.

    torch's argmax for CPUs has no vector instructions and takes four times as long as its maximum, so there the parts
    of a row are compared first.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`)

    Returns:
        `torch.LongTensor` of shape `(...,)`.
    """
    if logits.device.type != "cpu" or logits.shape[-1] % _STRIDE:
        return logits.argmax(-1)
    parts = logits.unflatten(-1, (-1, _STRIDE))
    part = parts.amax(-1).argmax(-1)
    index = part[..., None, None].expand(*part.shape, 1, _STRIDE)
    return part * _STRIDE + parts.gather(-2, index)[..., 0, :].argmax(-1)


def token_log_odds(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of `tokens` under softmax(logits), in float32.

    Orders tokens exactly as the reference's float64 probability does, also where p rounds to 1 in float32, because the
    mass of the other tokens is summed without the chosen one. Probability = sigmoid of it.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`); overwritten.
        tokens (`torch.LongTensor` of shape `(...,)`)
    """
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    others = logits.scatter_(-1, tokens[..., None], -torch.inf)
    largest = others.amax(-1, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0)  # where no other token is possible
    return chosen - (others.sub_(largest).exp_().sum(-1).log_() + largest[..., 0])


def transfer_schedule(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each step accepts: equal shares, the remainder to the first steps (block sampler).

    Args:
        num_masked (`int`): masked tokens at the start of the block.
        num_steps (`int`): steps for the block.
    """
    base, extra = divmod(num_masked, num_steps)
    return [base + (step < extra) for step in range(num_steps)]


def masks_left(num_slots: int, step: int, num_steps: int) -> int:
    """Slots that stay masked after a step of the parallel sampler: int(m * ((S - 1 - s) / S)) in doubles.

    The order of operations matters: 49 slots in 49 steps leave 31 twice, as in the reference.

    Args:
        num_slots (`int`): m, slots of all regions together.
        step (`int`): s, counted from 0.
        num_steps (`int`): S.
    """
    return math.trunc(num_slots * ((num_steps - 1 - step) / num_steps))


def lowest_mask(score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """True at the `count[i]` lowest scores of row i.

    Args:
        score (`torch.FloatTensor` of shape `(rows, n)`): +inf where never wanted.
        count (`torch.LongTensor` of shape `(rows,)`)
    """
    rank = score.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count[:, None]


def accept_confident(probability: torch.Tensor, masked: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Slots to accept in an adaptive step: all above the threshold, and in any case the best one of each region.

    Args:
        probability (`torch.FloatTensor` of shape `(..., num_slots)`): of the drafted token; the last axis is a region.
        masked (`torch.BoolTensor`): same shape, slots still open.
        threshold (`float`, or a tensor that broadcasts): in (0, 1].
    """
    open_probability = probability.masked_fill(~masked, -1.0)
    best = torch.zeros_like(masked).scatter(-1, open_probability.argmax(-1, keepdim=True), True)
    return (best | (probability > threshold)) & masked


def before_end(tokens: torch.Tensor, closing: Sequence[int]) -> torch.Tensor:
    """True at the tokens of a caption's text, which ends before its first closing token.

    Args:
        tokens (`torch.LongTensor` of shape `(..., num_slots)`): the last axis is a caption.
        closing (`Sequence[int]`): tokens that end it.
    """
    return torch.isin(tokens, torch.tensor(closing, device=tokens.device)).cumsum(-1) == 0


def caption_scores(probability: torch.Tensor, text: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean probability of the tokens of each caption's text; an empty one is scored by the token that ends it.

    Args:
        probability (`torch.FloatTensor` of shape `(..., num_slots)`): of the tokens, as of the step that wrote each.
        text (`torch.BoolTensor` of that shape): see [`before_end`].
        temperature (`float`): divides the log odds of the means, so that scores become probabilities of being right.

    Returns:
        `torch.FloatTensor` of shape `(...,)`.
    """
    scored = text.clone()
    scored[..., 0] = True
    mean = (probability * scored).sum(-1) / scored.sum(-1)
    return mean if temperature == 1 else torch.sigmoid(torch.logit(mean, eps=1e-6) / temperature)


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) over the last axis, float32.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`)
    """
    return torch.special.entr(torch.softmax(logits, -1)).sum(-1)


def accept_bounded(entropy: torch.Tensor, masked: torch.Tensor, bound: float) -> torch.Tensor:
    """Slots to accept in an entropy-bounded step (EB-Sampler, arXiv 2505.24857), region by region.

    The k slots of lowest entropy, with the largest k for which the sum of their entropies less the largest of them
    stays within the bound: that difference bounds how much the k tokens can tell about each other, so tokens that are
    accepted together are nearly independent. One slot always qualifies.

    Args:
        entropy (`torch.FloatTensor` of shape `(..., num_slots)`): of the prediction in each slot, in nats.
        masked (`torch.BoolTensor`): same shape, slots still open.
        bound (`float`): in nats, not negative.
    """
    ascending, order = entropy.masked_fill(~masked, torch.inf).sort(dim=-1)
    taken = (ascending.cumsum(-1) - ascending) <= bound  # inf - inf is nan, which compares false
    return torch.zeros_like(masked).scatter(-1, order, taken) & masked
