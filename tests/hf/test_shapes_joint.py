"""The lesson of templates and of the attributes of their images."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer import BadParameter

from pdlm_hf.processing_pdlm import area_order
from pdlm_hf.shapes.dataset import JointDataset
from pdlm_hf.shapes.templates import DARK_DOMAIN
from pdlm_hf.training.collator import PdlmCollator
from tools.shapes.average import main as average
from tools.shapes.model import build_model
from tools.shapes.train import save
from tools.shapes.vision import JointCollator, JointModel

NOISE = {"num_slots": 20, "noise_floor": 0.1, "prompt_ids": "ordered"}


@pytest.fixture(scope="module")
def rows(processor):
    mask = processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    data = JointDataset(processor.tokenizer, mask, 3, 96, 4)
    return [data[k] for k in range(len(data))]


@pytest.fixture(scope="module")
def batch(processor, rows):
    return JointCollator(processor, **NOISE)(rows[:6])


def test_half_of_the_figures_are_dotted(rows):
    count = Counter(region["attributes"]["texture"] for row in rows for region in row["regions"])
    assert count["dotted"] / count.total() == pytest.approx(0.5, abs=0.1)
    assert 0.6 < count["plain"] / count["striped"] < 1.7


def test_the_batch_has_the_attributes_in_the_order_of_the_prompts(processor, rows, batch):
    plain = PdlmCollator(processor, **NOISE)(rows[:6])
    assert batch.keys() - plain.keys() == {"attributes"}
    assert all(torch.equal(batch[name], value) for name, value in plain.items())
    values = iter(batch["attributes"].tolist())
    for row in rows[:6]:
        for k in area_order([np.asarray(region["mask"]) for region in row["regions"]]):
            said = [list(words)[at] for words, at in zip(DARK_DOMAIN.words.values(), next(values), strict=True)]
            figure = row["regions"][k]["attributes"]
            assert said == [figure[name] for name in DARK_DOMAIN.words]
    assert not list(values)


def test_the_processor_that_is_saved_has_no_cache(processor, tmp_path):
    JointCollator(processor, **NOISE)
    assert "region_ids" not in vars(processor)


def test_the_loss_is_that_of_the_texts_and_of_the_attributes(processor, batch):
    torch.manual_seed(0)
    model = build_model(processor, "isolated")
    texts = {name: value for name, value in batch.items() if name != "attributes"}
    learner = JointModel(model)
    torch.nn.init.normal_(learner.score.weight, std=0.05)
    out = learner(**batch)
    assert out["right"].shape == batch["attributes"].shape
    features = model.get_image_features(batch["pixel_values"], batch["region_masks"]).pooler_output
    places = (batch["image_grids"], batch["region_boxes"], batch["original_sizes"])
    tokens = model.model.get_region_features(features, *places, True)
    normal = tokens / tokens.square().mean(-1, keepdim=True).sqrt()
    parts = (10 * learner.score(normal.mean(1))).split([2, 12, 3, 5], 1)
    seen = sum(torch.nn.functional.cross_entropy(s, a) for s, a in zip(parts, batch["attributes"].T, strict=True))
    assert out["loss"].item() == pytest.approx((model(**texts).loss + seen).item(), rel=1e-5)
    out["loss"].backward()
    assert all(weight.grad is not None for weight in learner.parameters())


def test_the_average_of_a_run_and_its_start(processor, tmp_path):
    for name, record in (("start", {"seed": 1}), ("run", {"initialised_from": {"seed": 1}})):
        torch.manual_seed(len(name))
        save(build_model(processor, "isolated"), processor, tmp_path / name, record)
    average(tmp_path / "run", tmp_path / "start", 0.7, tmp_path / "out")
    start, run, out = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run", "out"))
    for name, weight in out.items():
        torch.testing.assert_close(weight, 0.3 * start[name] + 0.7 * run[name])
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["initialised_from"] == {"initialised_from": {"seed": 1}} and "--share 0.7" in record["command"]
    with pytest.raises(BadParameter, match="was not initialised from it"):
        average(tmp_path / "start", tmp_path / "run", 0.7, tmp_path / "out")
