import math

import numpy as np
import pytest
import torch
from small import region_rows
from transformers import AutoProcessor

from pdlm_hf import CHECKPOINT
from pdlm_peft.commit_states import OWN_STATE, CommitCollator, CommitRows, certainty_loss, own_states
from pdlm_peft.plan import Step


def log_of(*probabilities):
    return torch.tensor(probabilities).log()


# ---------------------------------------------------------------- states and loss


def test_certainty_is_the_entropy_of_right_tokens():
    logits = log_of([0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1])
    targets = torch.tensor([0, 1, 1])  # right, wrong, right
    entropies = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    assert certainty_loss(logits, targets, temperature=1.0).item() == pytest.approx(sum(entropies) / 2)
    squares = torch.tensor([0.25, 0.0625, 0.0625]) / 0.375  # temperature 0.5 squares the probabilities
    sharp = certainty_loss(logits[:1], targets[:1]).item()
    assert sharp == pytest.approx(-(squares * squares.log()).sum().item())


def test_certainty_leaves_wrong_tokens_alone():
    logits = log_of([0.6, 0.4], [0.6, 0.4]).requires_grad_()
    certainty_loss(logits, torch.tensor([0, 1])).backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    assert certainty_loss(logits, torch.tensor([1, 1])).item() == 0


def test_own_states_show_what_is_right_and_certain():
    labels = torch.tensor([[-100, 1, 0, 0], [-100, 1, 1, -100], [-100, 0, 1, 1]])
    masked = labels != -100
    logits = log_of([0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9])
    found = own_states(logits, labels, masked, torch.tensor([0.7, 0.7, 0.0]))
    # row 0: one token right and certain, one wrong, one uncertain; row 1: all would be shown; row 2: no own state
    assert found.tolist() == [[False, False, True, True], masked[1].tolist(), masked[2].tolist()]


def test_rows_have_states_by_their_position():
    rows = region_rows(2)
    steps = [Step(k % 2, None) for k in range(400)]
    found = [CommitRows(rows, steps, 3, empty=0.5, own=0.25)[k] for k in range(400)]
    empty = sum("mask_probability" in row and OWN_STATE not in row for row in found)
    own = [row[OWN_STATE] for row in found if OWN_STATE in row]
    assert 170 < empty < 230 and 70 < len(own) < 130
    assert all(row["mask_probability"] == 1 for row in found if OWN_STATE in row)
    assert 0.3 <= min(own) < 0.4 and 0.85 < max(own) <= 0.95
    again = CommitRows(rows, steps, 3, empty=0.5, own=0.25)[7]
    assert (again.get(OWN_STATE), again["seed"]) == (found[7].get(OWN_STATE), found[7]["seed"])


def test_the_collator_masks_as_the_row_says():
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    collator = CommitCollator(processor, num_slots=24, prompt_ids="ordered")
    first, second = region_rows(2)
    first |= {"seed": 1, "mask_probability": 1.0, OWN_STATE: 0.5}
    batch = collator([first, second | {"seed": 2}])
    assert batch[OWN_STATE].tolist() == [0.5, 0.0]
    assert torch.equal(batch["noise_mask"][0], batch["labels"][0] != -100)
    assert batch["mask_probability"][0] == 1 and batch["mask_probability"][1] < 1
    plain = collator([second | {"seed": 2}])
    length = plain["noise_mask"].shape[1]
    assert torch.equal(batch["noise_mask"][1, :length], plain["noise_mask"][0])
    assert np.isclose(batch["mask_probability"][1], plain["mask_probability"][0])
