"""Attributes through the engine are those of transformers; and what their requests may have."""

import json

import pytest
from drawn_images import drawn_images
from vllm import LLM

from pdlm_hf import CHECKPOINT, PdlmConfig, RegionCaptioner
from pdlm_vllm import attributes_many

SHORT = {"size": ["small", "large"], "colour": ["red", "green", "blue", "yellow"]}
LONG = {
    "size": ["small", "large"],
    "colour": ["dark blue", "dark red", "blue", "light green star"],
    "striped": [True, False],
}
SCHEMAS = [
    SHORT,
    {"attributes": SHORT, "template": ["A {size} {colour} star", "{colour}, {size}"]},
    LONG,
    {"attributes": LONG, "calibrate": True},
    {"attributes": LONG, "jointly": True},
    {"attributes": SHORT | {"name": {"max_tokens": 4}}, "template": "A {size} {colour} {name}"},
    {"name": None},
]  # fmt: skip
CONFIG = PdlmConfig.from_pretrained(CHECKPOINT)


def engine(model, **options) -> LLM:
    return LLM(str(model), dtype="float32", enforce_eager=True, disable_log_stats=False, **options)


@pytest.fixture(scope="module", params=["shapes", "reference"])
def both(request, captioner, reference_folder):
    """An engine and transformers on the same checkpoint."""
    folder = CHECKPOINT if request.param == "shapes" else reference_folder
    plain = captioner if request.param == "shapes" else RegionCaptioner.from_pretrained(folder, device="cpu")
    llm = engine(folder)
    yield llm, plain
    llm.llm_engine.engine_core.shutdown()


def assert_equal_rows(found: list[dict], expected: list[dict]) -> None:
    """Attributes of the regions of one image as JSON: the same values, and probabilities to rounding."""
    assert [(row["id"], row["bbox"]) for row in found] == [(row["id"], row["bbox"]) for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine["attributes"]) == list(theirs["attributes"])
        for name, value in theirs["attributes"].items():
            own = mine["attributes"][name]
            assert own["value"] == value["value"] and set(own) == set(value)
            for number in {"probability", "probabilities", "support"} & set(value):
                assert own[number] == pytest.approx(value[number], abs=2e-4)  # both are rounded to four digits


def assert_equal(found, expected) -> None:
    """The same of what Python reads."""
    assert_equal_rows([region.to_row() for region in found], [region.to_row() for region in expected])
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            assert mine[name].probability == pytest.approx(value.probability, abs=1e-4)
            assert mine[name].probabilities == pytest.approx(value.probabilities, abs=1e-4)
            assert mine[name].support == pytest.approx(value.support, abs=1e-4)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_attributes_are_those_of_transformers(both, schema):
    llm, plain = both
    pairs = drawn_images(8)[::2] + drawn_images(8)[-1:]  # of 1, 3, 5, 7 and 8 regions
    expected = list(plain.attributes_many(pairs, schema))
    for found, right in zip(attributes_many(llm, pairs, schema), expected, strict=True):
        assert_equal(found, right)
