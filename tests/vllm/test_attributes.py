"""Attributes through the engine are those of transformers; and what their requests may have."""

import json

import pytest
from drawn_images import drawn_images, texts
from engines import SOME, engine
from hostile_schemas import SchemaGenerator

from pdlm_hf import CHECKPOINT
from pdlm_hf.attributes import parse_schema
from pdlm_hf.errors_pdlm import SettingError
from pdlm_vllm import attributes_many
from pdlm_vllm.attributes import attribute_works
from pdlm_vllm.blocks import BLOCKS, SEEN
from pdlm_vllm.config import block_room
from pdlm_vllm.plan import defaults_of
from pdlm_vllm.requests import read_captions, region_requests

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


@SOME
@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_attributes_are_those_of_transformers(both, schema, some):
    llm, plain = both
    pairs = drawn_images(8)[::-1][some]  # of 8, 5 and 2 regions
    expected = list(plain.attributes_many(pairs, schema))
    for found, right in zip(attributes_many(llm, pairs, schema), expected, strict=True):
        assert_equal(found, right)


def test_attributes_and_captions_side_by_side(both):
    """Requests of both kinds in the same steps, each as if it were alone."""
    llm, plain = both
    config, defaults = plain.model.config, defaults_of(str(CHECKPOINT))
    pairs, schema = drawn_images(4, seed=3), parse_schema(LONG)
    vllm_config = llm.llm_engine.vllm_config
    works = [
        work
        for pair in pairs
        for work in attribute_works(plain.processor, config, defaults, block_room(vllm_config), *pair, schema)
    ]
    passes = [region_requests(plain.processor, config, defaults, *pair) for pair in pairs]
    flat = [work for found in passes for work in found]
    prompts = [work.prompt for work in flat] + [work.prompt.prompt for work in works for _ in work.parts]
    params = [work.params for work in flat] + [one for work in works for one in work.params]
    outputs = iter(llm.generate(prompts, params, use_tqdm=False))
    for pair, found in zip(pairs, passes, strict=True):
        captions = read_captions(found, [next(outputs) for _ in found], plain.processor, config)[0]
        assert texts(captions) == texts(plain.caption(*pair))
    for pair, work in zip(pairs, works, strict=True):
        work.tell([next(outputs).kv_transfer_params["pdlm"] for _ in work.parts])
        assert not work.parts
        found = work.attributes(schema, plain.processor)
        assert_equal([found[k] for k in sorted(found)], plain.attributes(*pair, LONG))


def test_many_choices_in_a_small_canvas(captioner, reference_folder, reference_captioner):
    """More blocks than fit are several engine requests; also where prompts see the first of each region."""
    schema = {"colour": [f"{kind} {word}" for kind in ("dark", "light", "") for word in ("red", "blue", "green")]}
    pairs = drawn_images(6)[3:]
    for folder, plain in ((CHECKPOINT, captioner), (reference_folder, reference_captioner)):
        with engine(folder, diffusion_config={"canvas_length": 120}) as llm:
            found = list(attributes_many(llm, pairs, schema))
        for mine, theirs in zip(found, plain.attributes_many(pairs, schema), strict=True):
            assert_equal(mine, theirs)


# (blocks, seen) that cannot be computed
NO_BLOCKS = [
    ("x", 0),
    ([], 0),
    ([[0, 0, [5, 6], [[1, None]]]] * 65, 0),
    ([[0, 0, [5] * 8, [[1, None]]]] * 64, 0),  # more private areas than there are pages for
    ([[0, 0, [5, 6], []]], 0),
    ([[0, 0, [], [[0, None]]]], 0),
    ([[0, 0, [5, 6], [[2, None]]]], 0),
    ([[0, 0, [5, 6], [[1, []]]]], 0),
    ([[0, 0, [5, 6], [[1, [10**9]]]]], 0),
    ([[9, 0, [5, 6], [[1, None]]]], 0),
    ([[0, -1, [5, 6], [[1, None]]]], 0),
    ([[0, 10**6, [5, 6], [[1, None]]]], 0),
    ([[0, 0, [True, 6], [[1, None]]]], 0),
    ([[0, 0, [5, 6], [[1, None]]]], 2),
    ([[0, 0, [5, 6], [[1, None]]]], "1"),
    ([[0, 0, [5, 6]]], 0),
]


def test_blocks_that_cannot_be_computed_are_none(both):
    """They come from our own doors only; if not, the request is one for captions."""
    llm, plain = both
    (image, regions), steps = drawn_images(3)[2], {"max_denoising_steps": 8}
    request = (plain.processor, plain.model.config, defaults_of(str(CHECKPOINT)), image, regions)
    works = [region_requests(*request, **steps)[0] for _ in NO_BLOCKS]
    for work, (blocks, seen) in zip(works, NO_BLOCKS, strict=True):
        work.params.extra_args |= {BLOCKS: blocks, SEEN: seen}
    outputs = llm.generate([work.prompt for work in works], [work.params for work in works], use_tqdm=False)
    expected = texts(plain.caption(image, regions, **steps))
    for work, output, given in zip(works, outputs, NO_BLOCKS, strict=True):
        assert texts(read_captions([work], [output], plain.processor, plain.model.config)[0]) == expected, given


def test_several_passes_over_a_kept_prompt_are_refused(both):
    llm, plain = both
    pairs, kept = drawn_images(1), {"prefix_refresh_interval": 0}
    expected = list(plain.attributes_many(pairs, LONG, **kept))
    assert_equal(next(attributes_many(llm, pairs, LONG, **kept)), expected[0])
    for schema in ({"attributes": LONG, "jointly": True}, {"name": None}):
        if plain.model.config.prefix_attention == "full":
            with pytest.raises(SettingError, match="`prefix_refresh_interval` 0 is not served with"):
                list(attributes_many(llm, pairs, schema, **kept))
        else:
            assert_equal(next(attributes_many(llm, pairs, schema, **kept)), plain.attributes(*pairs[0], schema))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 4}, "`max_new_tokens` has no meaning with a schema"),
        ({"stepz": 4}, "`stepz` has no meaning"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"template": "{size}"}, "no place for {colour}"),
        ({"question": "<|eot_id|>"}, "special tokens"),
    ],
)
def test_what_is_refused(both, settings, message):
    with pytest.raises(SettingError, match=message):
        list(attributes_many(both[0], drawn_images(1), SHORT, **settings))


def test_200_hostile_schemas_are_named(captioner):
    """By the parser and the processor alone, as a server asks them."""
    generator = SchemaGenerator(seed=3)
    for _ in range(200):
        value, named = next(generator)
        with pytest.raises(SettingError) as error:
            schema = parse_schema(value)
            captioner.processor.attribute_plan(schema.choices, schema.lengths, schema.template)
        assert named in str(error.value) and len(str(error.value)) < 500
