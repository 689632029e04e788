"""Attributes of regions by a schema: templates, blocks, and what the model reads."""

import re

import numpy as np
import pytest
import torch
from tiny import make_image

import pdlm_hf.attributes_pdlm as reading
from pdlm_hf import RegionCaptioner, RegionError, SettingError
from pdlm_hf.readings_pdlm import AttributeReader
from pdlm_hf.shapes.evaluate import calibration_error, evaluate_attributes, held_out
from pdlm_hf.shapes.scenes import PATTERNS, WORDS
from pdlm_hf.templates_pdlm import Template, default_template

CHOICES = {"size": ["small", "large"], "colour": ["red", "blue", "green"]}
LONGER = {"size": ["small", "large"], "colour": ["blue", "dark blue", "dark red"], "kind": ["plain", "plain star"]}


def encode(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def inputs_of(processor, scenes):
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


def direct(model, processor, scene, blocks):
    """Log-probabilities `(regions, positions, vocabulary)` of one ordinary forward pass, in input order.

    Args:
        blocks: token ids of every region's caption block; the same for all.
    """
    inputs = processor(images=[scene.image], segmentation_maps=[scene.masks])
    order = [k for k in inputs["region_order"][0].tolist() if k >= 0]
    config, count = model.config, len(order)
    canvas = []
    for k in range(count):
        close = config.eot_token_id if k == count - 1 else config.newline_token_id
        canvas += [config.caption_token_ids[k], *blocks, close]
    ids = torch.cat([inputs["input_ids"], torch.tensor([canvas])], 1)
    visual = {k: inputs[k] for k in ("pixel_values", "image_grids", "region_masks", "region_boxes", "original_sizes")}
    with torch.no_grad():
        logits = model(input_ids=ids, **visual).logits[0, inputs["input_ids"].shape[1] :]
    logits = logits.unflatten(0, (count, len(blocks) + 2))[:, 1:-1].float().log_softmax(-1)
    return logits[torch.tensor(order).argsort()]


def close(found, expected):
    found, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (found, expected))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-4)


class TestLessons:
    """The blocks that attributes are taught with are those that they are read from."""

    CHOICES = {"size": ["small", "large"], "colour": ["blue", "dark blue"], "shape": ["star"], "name": []}
    VALUES = {"size": "large", "colour": "dark blue", "name": "red box"}

    def plan(self, processor, *templates):
        return processor.attribute_plan(self.CHOICES, {"name": 9}, templates)

    def opened(self, plan, lesson):
        """The block with all that is taught masked."""
        tokens, labels = lesson
        assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
        return [plan.mask_id if label != -100 else token for token, label in zip(tokens, labels, strict=True)]

    TEMPLATE = "A {size} {name} of {colour} shape {shape}."

    @pytest.mark.parametrize("templates", [(), (TEMPLATE,)])
    def test_masked_they_are_the_blocks_of_reading(self, processor, templates):
        plan = self.plan(processor, *templates)
        short, *tree = plan.blocks({})[0]
        assert self.opened(plan, plan.lesson("size", self.VALUES)) == short.tokens
        colour = plan.lesson("colour", self.VALUES)
        assert self.opened(plan, colour) == tree[0].tokens
        end = plan.end_id if not templates else encode(processor, " shape")[0]
        taught = [label for label in colour[1] if label != -100]
        assert taught == [*encode(processor, " large"), *encode(processor, " dark blue"), end]

    def test_a_text_sees_the_choices_and_ends_with_the_turn(self, processor):
        plan = self.plan(processor)
        tokens, labels = plan.lesson("name", self.VALUES | {"shape": "star"})
        written = plan.text_block("name", {"size": 1, "colour": 1, "shape": 0}).tokens
        first = written.index(plan.mask_id)
        assert tokens[:first] == written[:first] and len(tokens) == len(written)
        value = encode(processor, " red box")
        assert labels[first:] == tokens[first:] == value + [plan.end_id] * (9 - len(value))

    def test_a_place_that_nobody_knows_stays_open_and_teaches_nothing(self, processor):
        plan = self.plan(processor)
        tokens, labels = plan.lesson("size", {"colour": "blue"})
        assert tokens == plan.blocks({})[0][0].tokens and set(labels) == {-100}

    def test_what_is_taught_behind_a_value_is_the_next_place(self, processor):
        plan = processor.attribute_plan(
            {"colour": ["blue", "dark blue"], "size": ["small", "large"]}, {}, ["{colour} {size}"]
        )
        for known, behind in (({"size": "large"}, encode(processor, " large")), ({}, [])):
            _, labels = plan.lesson("colour", {"colour": "dark blue"} | known)
            assert [label for label in labels if label != -100] == [*encode(processor, "dark blue"), *behind]

    def test_every_block_is_a_lesson(self, processor):
        plan = self.plan(processor)
        assert plan.lessons(self.CHOICES) == ["size", "colour", "name"]
        assert plan.lessons(["name", "shape"]) == ["shape", "name"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"size": "huge"}, "attribute 'size': 'huge' is none of its choices, 'small', 'large'."),
            ({"name": "red box " * 9}, "tokens, the schema allows 9."),
        ],
    )
    def test_values_that_cannot_be_taught(self, processor, values, message):
        with pytest.raises(SettingError, match=re.escape(message)):
            self.plan(processor).lesson(next(iter(values)), values)


class TestTemplates:
    def test_values_have_the_space_before_them(self, processor):
        template = Template("A {size} {colour}  star.")
        tokens, spans = template.block(lambda text: encode(processor, text), {"size": "small", "colour": "red"})
        assert processor.tokenizer.decode(tokens) == "A small red  star."
        assert [tokens[slice(*spans[name])] for name in ("size", "colour")] == [
            encode(processor, " small"),
            encode(processor, " red"),
        ]

    def test_the_default_is_a_list(self):
        assert default_template(["size", "a b"]) == "size: {size}, a b: {a b}"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("A red star", "no {name} place"),
            ("A {} star", "a place without a name"),
            ("{size} or {size}", "two places {size}"),
            ("{size} } star", "brace without its other"),
            ("{size} {{colour}}", "brace without its other"),
            ("{size", "brace without its other"),
            (7, "must be a string"),
        ],
    )
    def test_what_cannot_be_read(self, text, message):
        with pytest.raises(SettingError, match=message):
            Template(text)


class TestPlan:
    def test_one_token_choices_share_a_block(self, processor):
        (block,) = processor.attribute_plan(CHOICES).blocks({})[0]
        assert processor.tokenizer.decode(block.tokens) == "size:<|mdm_mask|>, colour:<|mdm_mask|>"
        assert [read.name for read in block.reads] == ["size", "colour"]
        assert [block.tokens[read.position] for read in block.reads] == [processor_mask(processor)] * 2
        assert block.reads[1].tokens == [encode(processor, f" {word}")[0] for word in CHOICES["colour"]]

    def test_longer_choices_are_a_tree_whose_branchings_are_blocks(self, processor):
        blocks = processor.attribute_plan(LONGER).blocks({})[0]
        texts = [processor.tokenizer.decode(block.tokens).replace("<|mdm_mask|>", "_") for block in blocks]
        # " dark blue" has four tokens, and an open position for what follows it
        assert texts == [
            "size:_",
            "size:_, colour:_____",
            "size:_, colour: dark__",
            "size:_, kind:___",
            "size:_, kind: plain__",
        ]
        end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        root, dark, kind, plain = (block.reads[0] for block in blocks[1:])
        assert (root.choices, dark.choices, kind.choices, plain.choices) == (
            [[0], [1, 2]],
            [[1], [2]],
            [[0, 1]],
            [[1], [0]],
        )
        assert plain.tokens == [encode(processor, " star")[0], end]
        assert [read.is_first for read in (root, dark, kind, plain)] == [True, False, True, False]

    def test_a_place_inside_a_sentence_is_open_to_its_end(self, processor):
        plan = processor.attribute_plan({"colour": ["red", "dark red"]}, templates=["One {colour} star."])
        (root,) = plan.blocks({})[0]
        assert processor.tokenizer.decode(root.tokens[:1]) == "One"
        assert root.tokens[1:] == [processor_mask(processor)] * 5

    def test_a_choice_that_begins_another_ends_where_the_next_place_begins(self, processor):
        choices = {"colour": ["dark", "dark blue"], "shape": ["circle", "star"]}
        plan = processor.attribute_plan(choices, templates=["A {colour} {shape}."])
        blue, circle, star = (encode(processor, f" {word}")[0] for word in ("blue", "circle", "star"))
        _, root, dark = plan.blocks({})[0]
        assert (root.reads[0].choices, dark.reads[0].choices) == ([[0, 1]], [[1], [0]])
        assert dark.reads[0].tokens == [blue, circle, star]
        assert plan.blocks({"shape": 1})[0][-1].reads[0].tokens == [blue, star]

        asking = AttributeReader(plan, [1], False, False, None).read()
        shares = {blue: 0.2, circle: 0.05, star: 0.35}
        asked = next(asking)
        with pytest.raises(StopIteration) as done:
            asking.send([torch.tensor([shares.get(t, 0.5) for t in place.tokens]).log() for place in asked.places])
        reading = done.value.value[0, 0]
        np.testing.assert_allclose(reading.probabilities["colour"], [0.4 / 0.6, 0.2 / 0.6], rtol=1e-5)
        assert reading.support["colour"] == pytest.approx(0.5)

    def test_the_longest_block_has_room_for_a_text_behind_the_longest_choices(self, processor):
        plan = processor.attribute_plan({"colour": ["red", "dark red"], "note": []}, {"note": 20})
        text = "colour: dark red, note:"
        assert plan.longest == len(encode(processor, "colour:")) + len(encode(processor, text[7:])) + 20

    def test_known_attributes_are_shown(self, processor):
        (block,) = processor.attribute_plan(CHOICES).blocks({"size": 1})[0]
        assert processor.tokenizer.decode(block.tokens) == "size: large, colour:<|mdm_mask|>"
        assert [read.name for read in block.reads] == ["colour"]

    @pytest.mark.parametrize(
        ("choices", "templates", "message"),
        [
            (CHOICES, ["A {size} star"], "no place for {colour}"),
            (CHOICES, ["A {size} {colour} {shape}"], r"a place {shape}"),
            ({"size": ["red", "red"]}, [], "have the same tokens"),
            ({"size": ["red <|eot_id|>"]}, [], "special tokens"),
            ({"<|mdm_mask|>": ["red"]}, [], "special tokens"),
            (CHOICES, ["{size} {colour}<|Mask_Cap_0|>"], "special tokens"),
            ({"size": ["x" * 150]}, [], "a choice has 1 to 32"),
            ({"a": ["red", "red, big"], "b": ["x"]}, ["{a}, {b}"], "the choice 'red' cannot be distinguished"),
            ({"a": ["red", "red dark"], "b": ["dark"]}, ["{a} {b}"], "'red' cannot.*words behind {a}"),
            ({"a": ["red", "red dark"], "b": []}, ["{a} {b}"], "the choice 'red' cannot be distinguished"),
            ({"a": ["red"]}, ["\udcff {a}"], "half of a character, or bytes that are no UTF-8"),
            ({"a": ["\ud800"]}, [], "the choice '.ud800' has half of a character"),
        ],
    )
    def test_what_cannot_be_read(self, processor, choices, templates, message):
        with pytest.raises(SettingError, match=message):
            processor.attribute_plan(choices, templates=templates)


def processor_mask(processor):
    return processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")


class TestReading:
    @pytest.mark.parametrize("kind", ["isolated_model", "model"])
    def test_it_is_one_ordinary_forward_pass(self, request, processor, scenes, kind):
        """Of the model over prompt and template, with the logits limited to the choices."""
        network = request.getfixturevalue(kind)
        plan = processor.attribute_plan(CHOICES)
        block = plan.blocks({})[0][0]
        scene = scenes[1]
        output = network.read_attributes(**inputs_of(processor, [scene]), plan=plan)
        expected = direct(network, processor, scene, block.tokens)
        assert output.num_forwards == 1 and len(output.readings[0]) == len(scene.masks)
        for region, found in enumerate(output.readings[0]):
            for read in block.reads:
                full = expected[region, read.position, read.tokens]
                close(found.probabilities[read.name], full.softmax(0))
                close(found.support[read.name], full.exp().sum())

    def test_longer_choices_are_products_along_the_tree(self, isolated_model, processor, scenes):
        plan = processor.attribute_plan(LONGER)
        output = isolated_model.read_attributes(**inputs_of(processor, scenes[:1]), plan=plan)
        assert output.num_forwards == 1
        _, root, dark, _, plain = plan.blocks({})[0]

        def local(block):
            read = block.reads[0]
            return direct(isolated_model, processor, scenes[0], block.tokens)[:, read.position, read.tokens].softmax(
                -1
            )

        first, second, third = local(root), local(dark), local(plain)
        for region, found in enumerate(output.readings[0]):
            blue, darker = first[region]
            close(found.probabilities["colour"], torch.stack([blue, *(darker * second[region])]))
            close(found.probabilities["kind"], third[region].flip(0))

    def test_a_batch_reads_as_each_image_alone(self, isolated_model, model, processor, scenes):
        for network in (isolated_model, model):
            plan = processor.attribute_plan(LONGER)
            together = network.read_attributes(**inputs_of(processor, scenes), plan=plan).readings
            for scene, found in zip(scenes, together, strict=True):
                alone = network.read_attributes(**inputs_of(processor, [scene]), plan=plan).readings[0]
                for one, other in zip(found, alone, strict=True):
                    assert one.probabilities.keys() == other.probabilities.keys()
                    for name, values in one.probabilities.items():
                        close(values, other.probabilities[name])
            few = network.read_attributes(**inputs_of(processor, scenes), plan=plan, max_batch_tokens=1)
            assert few.num_forwards == len(scenes)
            close(few.readings[2][0].probabilities["colour"], together[2][0].probabilities["colour"])

    @pytest.mark.parametrize("implementation", ["eager", "region_split"])
    def test_every_attention_reads_the_same(self, isolated_model, processor, scenes, implementation):
        plan = processor.attribute_plan(LONGER)
        inputs = inputs_of(processor, scenes[:2])
        expected = isolated_model.read_attributes(**inputs, plan=plan, jointly=True).readings
        isolated_model.set_attn_implementation({"text_config": implementation})
        try:
            found = isolated_model.read_attributes(**inputs, plan=plan, jointly=True).readings
        finally:
            isolated_model.set_attn_implementation({"text_config": "sdpa"})
        for one, other in zip(sum(found, []), sum(expected, []), strict=True):
            for name, values in one.probabilities.items():
                close(values, other.probabilities[name])

    def test_more_blocks_than_fit_take_more_passes(self, isolated_model, processor, scenes, monkeypatch):
        plan = processor.attribute_plan(LONGER)
        inputs = inputs_of(processor, scenes[:2])
        expected = isolated_model.read_attributes(**inputs, plan=plan).readings
        monkeypatch.setattr(reading, "MOST_COLUMNS", 60)
        output = isolated_model.read_attributes(**inputs, plan=plan)
        assert output.num_forwards > 2
        for one, other in zip(sum(output.readings, []), sum(expected, []), strict=True):
            for name, values in one.probabilities.items():
                close(values, other.probabilities[name])

    def test_regions_in_any_order_and_number(self, isolated_model, processor):
        image, masks = make_image(4, 128, 96, 8)
        plan = processor.attribute_plan(CHOICES)
        assert len(masks) > processor.image_processor.num_region_prompts
        inputs = processor(images=image, segmentation_maps=masks)
        found = isolated_model.read_attributes(**inputs, plan=plan).readings[0]
        turned = processor(images=image, segmentation_maps=masks[:6][::-1])
        part = processor(images=image, segmentation_maps=masks[:6])
        few = isolated_model.read_attributes(**part, plan=plan).readings[0]
        back = isolated_model.read_attributes(**turned, plan=plan).readings[0]
        assert len(found) == 8
        for one, two, three in zip(found, few, back[::-1], strict=False):
            for name, values in two.probabilities.items():
                close(one.probabilities[name], values)
                close(three.probabilities[name], values)

    def test_jointly_fixes_the_most_certain_first(self, isolated_model, processor, scenes):
        plan = processor.attribute_plan(CHOICES)
        inputs = inputs_of(processor, scenes[:1])
        alone = isolated_model.read_attributes(**inputs, plan=plan).readings[0]
        output = isolated_model.read_attributes(**inputs, plan=plan, jointly=True)
        assert output.num_forwards == 2
        for region, (joint, single) in enumerate(zip(output.readings[0], alone, strict=True)):
            first = max(CHOICES, key=lambda name: max(single.probabilities[name]))
            (second,) = CHOICES.keys() - {first}
            close(joint.probabilities[first], single.probabilities[first])
            value = int(np.argmax(single.probabilities[first]))
            (block,) = plan.blocks({first: value})[0]
            read = block.reads[0]
            logs = direct(isolated_model, processor, scenes[0], block.tokens)[region, read.position, read.tokens]
            close(joint.probabilities[second], logs.softmax(0))

    def test_several_templates_are_averaged(self, isolated_model, processor, scenes):
        texts = ["A {size} {colour} star", "{colour}, {size}"]
        inputs = inputs_of(processor, scenes[:1])
        one, two, both = (
            isolated_model.read_attributes(**inputs, plan=processor.attribute_plan(CHOICES, templates=t))
            for t in (texts[:1], texts[1:], texts)
        )
        assert both.num_forwards == 1
        for first, second, mean in zip(one.readings[0], two.readings[0], both.readings[0], strict=True):
            for name, values in mean.probabilities.items():
                close(values, (np.array(first.probabilities[name]) + second.probabilities[name]) / 2)

    def test_calibration_divides_by_what_is_read_without_a_region(self, isolated_model, processor, scenes):
        plan = processor.attribute_plan(CHOICES)
        inputs = inputs_of(processor, scenes[:1])
        plain = isolated_model.read_attributes(**inputs, plan=plan).readings[0]
        output = isolated_model.read_attributes(**inputs, plan=plan, calibrate=True)
        assert output.num_forwards == 1
        for name in CHOICES:
            ratios = [
                np.log(found.probabilities[name]) - np.log(before.probabilities[name])
                for found, before in zip(output.readings[0], plain, strict=True)
            ]
            prior = [ratio - ratio.mean() for ratio in ratios]  # the same for every region, up to a factor
            assert np.abs(prior[0]).max() > 1e-3
            for other in prior[1:]:
                np.testing.assert_allclose(other, prior[0], atol=1e-4)

    @pytest.mark.parametrize("kind", ["isolated_model", "model"])
    def test_free_text_follows_the_choices(self, request, processor, scenes, kind):
        network = request.getfixturevalue(kind)
        plan = processor.attribute_plan({"note": [], **CHOICES}, {"note": 5})
        inputs = inputs_of(processor, scenes[:2])
        output = network.read_attributes(**inputs, plan=plan)
        assert 2 <= output.num_forwards <= 6
        for found in sum(output.readings, []):
            assert list(found.probabilities) == list(CHOICES)
            assert len(found.texts["note"]) <= 5 and processor_mask(processor) not in found.texts["note"]
            assert 0 < found.text_scores["note"] <= 1
        only = processor.attribute_plan({"note": []}, {"note": 5})
        assert network.read_attributes(**inputs, plan=only).num_forwards <= 5

    def test_what_cannot_be_read(self, isolated_model, processor, scenes):
        plan = processor.attribute_plan(CHOICES)
        inputs = inputs_of(processor, scenes[:1])
        with pytest.raises(RegionError, match="segmentation_maps"):
            isolated_model.read_attributes(inputs["input_ids"], plan)
        with pytest.raises(SettingError, match="Unknown generation settings"):
            isolated_model.read_attributes(**inputs, plan=plan, tempo=1)
        with pytest.raises(SettingError, match="`temperature` is for captions; for attributes there are max"):
            isolated_model.read_attributes(**inputs, plan=plan, temperature=1.0)
        long = processor.attribute_plan(CHOICES, templates=["{size} {colour}" + " plain" * 2000])
        with pytest.raises(SettingError, match="more than the 2048 positions"):
            isolated_model.read_attributes(**inputs, plan=long)


class TestShapes:
    """The embedded checkpoint."""

    @pytest.fixture
    def captioner(self):
        return RegionCaptioner.from_pretrained(device="cpu")

    def test_attributes_of_drawn_figures(self, captioner):
        scene = next(held_out(3, 1))
        schema = {name: list(values) for name, values in WORDS.items()}
        rows = captioner.attributes(scene.image, scene.masks, schema, template=PATTERNS[0])
        assert [{name: value.value for name, value in row.items()} for row in rows] == [vars(f) for f in scene.figures]
        for number, row in enumerate(rows):
            assert row.id == number and len(row.bbox) == 4
            for name, value in row.items():
                assert list(value.probabilities) == schema[name]
                assert sum(value.probabilities.values()) == pytest.approx(1, abs=1e-6)
                assert value.probability == max(value.probabilities.values())

    def test_many_images(self, captioner):
        scenes = list(held_out(3, 3))
        pairs = [(scene.image, scene.masks) for scene in scenes]
        schema = {"colour": list(WORDS["colour"]), "plain": [True, False]}
        found = list(captioner.attributes_many(pairs, schema, batch_size=2, template="A {colour} {plain}"))
        assert [len(rows) for rows in found] == [len(scene.masks) for scene in scenes]
        assert [row["colour"].value for rows in found for row in rows] == [f.colour for s in scenes for f in s.figures]
        assert {row["plain"].value for rows in found for row in rows} <= {True, False}
        with pytest.raises(SettingError, match="batch_size"):
            next(captioner.attributes_many(pairs, schema, batch_size=0))

    def test_unknown(self, captioner):
        scene = next(held_out(3, 1))
        schema = {"colour": list(WORDS["colour"]), "size": ["small", "large"]}
        sure = captioner.attributes(scene.image, scene.masks, schema, template="A {size} {colour}", unknown_below=0.4)
        none = captioner.attributes(scene.image, scene.masks, schema, template="A {size} {colour}", unknown_below=1.0)
        assert [row["colour"].value for row in sure] == [figure.colour for figure in scene.figures]
        assert {value.value for row in none for value in row.values() if value.probability < 1} == {None}

    def test_evaluation(self, captioner):
        report = evaluate_attributes(captioner.model, captioner.processor, 5, 4, templates=PATTERNS[:1])
        assert report["regions"] == sum(len(scene.masks) for scene in held_out(5, 4))
        assert report["num_forwards"] == 1 and report["by_attribute"].keys() == WORDS.keys()
        assert report["all_right"] >= 0.9 and report["ece"] < 0.05


def test_calibration_error():
    assert calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, True, False]) == 0
    assert calibration_error([1.0, 1.0, 0.55, 0.55], [True, False, True, True]) == pytest.approx(0.475)
