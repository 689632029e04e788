"""Pure functions: noise, schedules, caption splitting, grouping of masks."""

import re

import torch
from parity_golden import each, load, matches, record, subset_holds, tensors

from pdlm_hf.diffusion_pdlm import gumbel_perturb, masks_left, transfer_schedule
from pdlm_hf.training.collator import partition_regions

GUMBEL = matches("sampler_helpers", r"gumbel\.out_temperature_([\d.]+)")
TRANSFER = matches("sampler_helpers", r"num_transfer_tokens\.(\d+_\d+)")
NONBLOCK = next((v for k, v in record("sampler_helpers").items() if k.startswith("nonblock")), {})
SPLITS = list(range(len(record("split_assistant_blocks"))))
PARTITIONS = list(record("mask_partition").get("cases", {}))


def test_found():
    subset_holds(gumbel=GUMBEL, transfer=TRANSFER, nonblock=NONBLOCK, splits=SPLITS, partitions=PARTITIONS)


@each("temperature", GUMBEL)
def test_gumbel(temperature):
    data = tensors("sampler_helpers")
    theirs = data[f"gumbel.out_temperature_{temperature}"]
    ours = gumbel_perturb(data["gumbel.logits"].double(), float(temperature), data["gumbel.uniform_f64"])
    torch.testing.assert_close(ours.exp(), theirs, rtol=1e-12, atol=0)  # ours is its logarithm, both in float64
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@each("key", TRANSFER)
def test_transfer_schedule(key):
    masked, steps = map(int, key.split("_"))
    assert transfer_schedule(masked, steps) == tensors("sampler_helpers")[f"num_transfer_tokens.{key}"].tolist()


@each("key", list(NONBLOCK))
def test_masks_left(key):
    slots, steps = map(int, key.split("_"))
    theirs = NONBLOCK[key]
    assert [masks_left(slots, step, steps) for step in range(len(theirs))] == theirs
    assert theirs[-1] == masks_left(slots, steps - 1, steps) == 0


@each("index", SPLITS)
def test_split_captions(index):
    """As the reference, except that an end-of-turn ends its own caption only: there it empties all later ones."""
    entry, processor = record("split_assistant_blocks")[index], load("pdmllm").processor
    ours = processor.split_captions(processor.tokenizer(entry["text"], add_special_tokens=False)["input_ids"])
    assert len(ours) == entry["num_masks"]
    blocks = re.split(r"<\|Mask_Cap_\d+\|>", entry["text"])[1:]
    assert ours == [block.split("<|eot_id|>")[0].strip() for block in blocks]
    for k, theirs in enumerate(entry["captions"]):
        if not any("<|eot_id|>" in block for block in blocks[:k]):
            assert ours[k] == theirs
        else:
            assert theirs == ""


@each("key", PARTITIONS)
def test_partition_regions(key):
    recorded = record("mask_partition")
    masks, prompts, epoch = map(int, re.findall(r"\d+", key))
    index = int(re.search(r"data_idx=(\d+)", recorded["note"])[1])
    assert partition_regions(masks, prompts, index, epoch) == recorded["cases"][key]
