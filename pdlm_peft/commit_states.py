"""What teaches a model to commit: the states it starts from, and the loss beside that of masked diffusion.

Several wordings of a caption are equally likely, so tokens written in one pass contradict each other, and careful
decoding writes few of them a pass. A model that is trained on its own captions, mostly from an empty canvas, has one
wording and can write many at once (dParallel, arXiv 2509.26488; d3LLM).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pdlm_hf.diffusion_pdlm import token_entropy
from pdlm_hf.training.collator import PdlmCollator

from .plan import TrainingRows
from .training import RegionTrainer

OWN_STATE = "own_state"  # key of a row and of a batch: threshold of the model's own first pass; 0 = another state
_THRESHOLDS = (0.3, 0.95)  # drawn from, so that the model knows the states of every rule it may get


class CommitRows(TrainingRows):
    """The rows of a [`~plan.plan`], each with the state of its canvas.

    Args:
        dataset, steps, seed: see [`~plan.TrainingRows`].
        empty (`float`): share of the rows whose canvas is empty.
        own (`float`): share of the rows whose canvas is what the model itself has accepted after its first pass. The
            tokens of the remaining rows are masked at random.
    """

    def __init__(self, dataset, steps: list, seed: int, empty: float, own: float):
        super().__init__(dataset, steps, seed)
        self.empty, self.own = empty, own

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = super().__getitem__(position)
        kind, threshold = np.random.default_rng((self.seed, position)).random(2)
        if kind < self.empty + self.own:
            row["mask_probability"] = 1.0
        if self.empty <= kind < self.empty + self.own:
            row[OWN_STATE] = float(np.interp(threshold, (0, 1), _THRESHOLDS))
        return row


class CommitCollator(PdlmCollator):
    """The project's collator, with the thresholds of own states (`own_state`, of shape `(batch_size,)`)."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """See [`~pdlm_hf.training.PdlmCollator`]."""
        return super().__call__(rows) | {OWN_STATE: torch.tensor([row.get(OWN_STATE, 0.0) for row in rows])}


def own_states(
    logits: torch.Tensor, labels: torch.Tensor, noise_mask: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Masks after the model's own pass over an empty canvas: its accepted tokens are shown.

    A wrong token stays masked: nothing says what its caption should go on with. A row of which nothing would stay
    masked keeps its empty canvas.

    Args:
        logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`): at the masked positions.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
        noise_mask (`torch.BoolTensor` of that shape): the positions masked in that pass.
        threshold (`torch.FloatTensor` of shape `(batch_size,)`): accept tokens more probable than this; rows with 0
            keep their mask.

    Returns:
        bool tensor of the shape of `noise_mask`.
    """
    probability, draft = logits.softmax(-1).max(-1)
    limit = threshold[:, None].expand_as(noise_mask)[noise_mask]
    accepted = (probability > limit) & (draft == labels[noise_mask]) & (limit > 0)
    left = noise_mask.clone()
    left[noise_mask] = ~accepted
    return torch.where(left.any(1, keepdim=True), left, noise_mask)


def certainty_loss(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Mean entropy in nats of the predictions that are right already: it raises certainty only where it is deserved.

    Args:
        logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`)
        targets (`torch.LongTensor` of shape `(num_masked,)`): the teacher's tokens.
        temperature (`float`): of the softmax. Below 1 the gradient goes to the less certain tokens (dParallel: 0.5).

    Returns:
        scalar; 0 if no prediction is right.
    """
    right = logits.argmax(-1) == targets
    entropy = token_entropy(logits / temperature)
    return (entropy * right).sum() / right.sum().clamp_min(1)


class CommitTrainer(RegionTrainer):
    """Trainer with own states, and with the certainty loss beside that of masked diffusion.

    Args:
        certainty (`float`): weight of [`certainty_loss`].
        **kwargs: see [`~training.RegionTrainer`].
    """

    def __init__(self, *args: Any, certainty: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.certainty = certainty

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Show rows with an own state what the model accepts of them, then compute the loss."""
        threshold = inputs.pop(OWN_STATE, None)
        if threshold is not None and bool((threshold > 0).any()):
            with torch.no_grad():
                logits = model(**inputs, output_masked_logits=True).masked_logits
            mask = own_states(logits, inputs["labels"], inputs["noise_mask"], threshold)
            share = mask.sum(1) / (inputs["labels"] != -100).sum(1).clamp_min(1)
            inputs["mask_probability"] = torch.where(threshold > 0, share, inputs["mask_probability"])
            inputs["noise_mask"] = mask
        inputs["output_masked_logits"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.certainty:
            targets = inputs["labels"][inputs["noise_mask"]]
            loss = loss + self.certainty * certainty_loss(outputs.masked_logits, targets)
        return (loss, outputs) if return_outputs else loss
