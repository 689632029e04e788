"""Attributes over HTTP: those of transformers, side by side with captions; and what is refused."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from drawn_images import coco, data_url, drawn_images, texts
from hostile import CHAT, REGIONS, WAYS, Hostile, send
from hostile_schemas import SchemaGenerator
from test_attributes import LONG, SHORT, assert_equal_rows
from test_hostile import wait_until_idle
from typer.testing import CliRunner

from pdlm_hf.cli.main import app
from pdlm_hf.regions.files import read_rows

SENTENCE = {"attributes": SHORT, "template": ["A {size} {colour} star", "{colour}, {size}"], "calibrate": True}


def body_of(image, regions, **options) -> dict:
    return {"image": data_url(image), "regions": coco(image, regions), **options}


@cache
def small() -> dict:
    return body_of(*drawn_images(2)[1])


def chat(schema, **options) -> dict:
    content = [{"type": "image_url", "image_url": {"url": small()["image"]}}]
    answer = {"type": "json_schema", "json_schema": {"name": "regions", "schema": schema}}
    given = {"response_format": answer, "mm_processor_kwargs": {"regions": small()["regions"]}}
    return {"messages": [{"role": "user", "content": content}], **given, **options}


def expected_rows(captioner, pairs, schema) -> list[list[dict]]:
    """What transformers reads, as JSON, with the ids that [`coco`] gives."""
    found = captioner.attributes_many(pairs, schema, batch_size=4)
    return [[region.to_row() | {"id": 100 + k} for k, region in enumerate(regions)] for regions in found]


def check_images(server, captioner, pairs, schema, clients: int) -> None:
    expected, captions = expected_rows(captioner, pairs, schema), list(map(texts, captioner.caption_many(pairs)))

    def one(k: int) -> None:
        image, regions = pairs[k // 2]
        if k % 2:
            rows = server.captions(body_of(image, regions))["regions"]
            assert [row["caption"] for row in rows] == captions[k // 2] and "attributes" not in rows[0]
        else:
            assert_equal_rows(server.captions(body_of(image, regions, schema=schema))["regions"], expected[k // 2])

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(2 * len(pairs))))


def test_attributes_beside_captions(server, captioner):
    check_images(server, captioner, drawn_images(8), SENTENCE, clients=6)


@pytest.mark.slow
@pytest.mark.parametrize("schema", [SENTENCE, LONG, {"attributes": LONG, "jointly": True}], ids=json.dumps)
def test_30_images_16_at_a_time(server, captioner, schema):
    check_images(server, captioner, drawn_images(30, seed=9), schema, clients=16)


def test_more_regions_than_prompts(server, captioner):
    image, _ = drawn_images(1)[0]
    boxes = [[x, y, 14, 14] for y in (0, 20, 40) for x in range(0, 64, 12)]
    rows = server.captions(body_of(image, boxes, schema=LONG | {"name": {"max_tokens": 3}}))["regions"]
    expected = expected_rows(captioner, [(image, boxes)], LONG | {"name": {"max_tokens": 3}})[0]
    assert len(rows) == 18
    assert_equal_rows(rows, expected)


def test_an_answer_has_captions_and_usage(server):
    answer = server.captions(small() | {"schema": SENTENCE | {"unknown_below": 1.0}})
    for row in answer["regions"]:
        assert row["caption"] == "A unknown unknown star"
        values = row["attributes"]
        assert row["score"] == min(value["probability"] for value in values.values())
        assert [value["value"] for value in values.values()] == [None, None]
        assert set(values["size"]) == {"value", "probability", "probabilities", "support"}
    usage = answer["usage"]
    assert (usage["completion_tokens"], usage["num_forwards"]) == (2 * len(answer["regions"]), 2)
    text = server.captions(small() | {"schema": {"name": {"max_tokens": 2}}})["regions"][0]["attributes"]["name"]
    assert set(text) == {"value", "probability"}


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"type": "array", "items": one}])
def test_a_chat_answer_by_json_schema(server, captioner, wrap):
    properties = {"size": {"enum": ["small", "large"]}, "striped": {"type": "boolean"}}
    one = {"type": "object", "properties": properties, "required": ["size"], "additionalProperties": False}
    status, text = server.post(CHAT, chat(wrap(one)))
    assert status == 200, text
    answer = json.loads(text)
    expected = captioner.attributes(*drawn_images(2)[1], one)
    assert json.loads(answer["choices"][0]["message"]["content"]) == [
        {name: value.value for name, value in region.items()} for region in expected
    ]
    assert type(json.loads(answer["choices"][0]["message"]["content"])[0]["striped"]) is bool
    status, stream = server.post(CHAT, chat(wrap(one), stream=True))
    event = json.loads(stream.split("\n\n")[0].removeprefix("data: "))
    assert event["choices"][0]["delta"]["content"] == answer["choices"][0]["message"]["content"]


OBJECT = {"type": "object", "properties": SHORT}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (REGIONS, {"schema": {"colour": []}}, "attribute 'colour': the list of choices is empty"),
        (REGIONS, {"schema": []}, "expected an object of attributes"),
        (REGIONS, {"schema": {"colour": [str(k) for k in range(10_000)]}}, "attribute 'colour': 10000 choices"),
        (REGIONS, {"schema": {"colour": ["red <|eot_id|>"]}}, "attribute 'colour': the choice 'red <|eot_id|>' holds"),
        (REGIONS, {"schema": {"colour": ["q" * 150]}}, "attribute 'colour': the choice 'qqq"),
        (REGIONS, {"schema": SHORT, "template": "{size}"}, "`template` has no meaning here"),
        (REGIONS, {"schema": {"attributes": SHORT, "template": "{size}"}}, "no place for {colour}"),
        (REGIONS, {"schema": SHORT, "stream": True}, "`stream` has no meaning with a schema"),
        (REGIONS, {"schema": SHORT, "max_tokens": 9}, "`max_tokens` has no meaning with a schema"),
        (REGIONS, {"schema": SHORT, "max_new_tokens": 9}, "`max_new_tokens` has no meaning with a schema"),
        (REGIONS, {"schema": SHORT, "acceptance_threshold": 0.5}, "`acceptance_threshold` has no meaning with"),
        (REGIONS, {"schema": SHORT, "temperature": 1}, "`temperature` must be 0"),
        (REGIONS, {"attribute_schema": SHORT}, "`attribute_schema` has no meaning here"),
        (
            REGIONS,
            {"schema": {"attributes": SHORT, "template": "word " * 200 + "{size} {colour}"}},
            "the schema needs a canvas of",
        ),
        (REGIONS, {"schema": {"attributes": SHORT, "template": "word " * 700 + "{size} {colour}"}}, "the template in"),
        (CHAT, chat([]), "response_format"),
        (CHAT, chat({"type": "string"}), "`response_format`: the schema must be of an object with `properties`"),
        (CHAT, chat({"type": "array", "items": 3}), "`response_format`: the schema must be of an object"),
        (CHAT, chat({"type": "object", "properties": {"a": {"$ref": "#"}}}), "`response_format`: .*'a': '$ref' is"),
        (CHAT, chat(OBJECT, max_tokens=9), "`max_tokens` has no meaning with a schema"),
        (CHAT, chat(OBJECT) | {"response_format": {"type": "json_object"}}, "`response_format` with regions must be"),
        (CHAT, chat(OBJECT, n=2), "`n` must be 1"),
    ],
    ids=range(22),
)
def test_refusals_say_why(server, path, body, message):
    status, text = server.post(path, (small() if path == REGIONS else {}) | body)
    found = json.loads(text)["error"]["message"]
    assert status == 400
    assert all(part in found for part in message.split(".*")), found


@pytest.mark.parametrize("way", WAYS)
def test_clients_that_go_away_leave_nothing(server, way):
    image, regions = drawn_images(8)[7]
    body = json.dumps(body_of(image, regions, schema={"attributes": LONG, "jointly": True})).encode()
    found = send(urlsplit(server.url).port, Hostile(REGIONS, body, "schema", way))
    assert found is None or found[0] == 200
    assert wait_until_idle(server) and server.metric("vllm:kv_cache_usage_perc") == 0


def test_limits_of_a_request(server):
    many = {"regions": [[0, 0, 9, 9]] * 60}
    choices = [f"w{k}" for k in range(900)]
    schema = {"attributes": {f"a{k}": choices for k in range(4)}, "template": ["{a0}{a1}{a2}{a3}"] * 2}
    status, text = server.post(REGIONS, small() | many | {"schema": schema})
    assert status == 400 and "at most 262144 a request (attribute_scores)" in json.loads(text)["error"]["message"]
    two = {"attributes": {"a": [f"{k} {n}" for k in range(99) for n in (1, 2)]}, "template": "word " * 20 + "{a}"}
    status, text = server.post(REGIONS, small() | many | {"schema": two})
    assert status == 400 and "at most 65536 a request (attribute_rows)" in json.loads(text)["error"]["message"]


def test_the_schema_is_described(server):
    parts = json.loads(server.get("/openapi.json"))["components"]["schemas"]
    forms = parts["RegionCaptionsRequest"]["properties"]["schema"]["anyOf"]
    assert forms[0]["additionalProperties"]["anyOf"][0]["items"] == {"type": ["string", "integer", "boolean"]}
    assert forms[1]["required"] == ["attributes"]
    assert "attributes" in parts["CaptionRow"]["properties"] and "AttributeRow" in parts


@pytest.mark.slow
def test_200_hostile_schemas(server):
    """Each is refused by name within a second, or answered; good requests in between are not hurt."""
    generator, memory = SchemaGenerator(seed=4), server.memory()
    slowest, good = 0.0, server.captions(small() | {"schema": SHORT})["regions"]
    for number in range(200):
        schema, named = next(generator)
        start = time.monotonic()
        status, text = server.post(REGIONS, small() | {"schema": schema})
        slowest = max(slowest, time.monotonic() - start)
        assert status == 400, (named, status, text[:300])
        assert named in json.loads(text)["error"]["message"], (named, text[:300])
        if number % 20 == 0:
            assert server.captions(small() | {"schema": SHORT})["regions"] == good
    assert slowest < 1
    assert server.memory() < memory + 2**27


def test_the_commands_by_a_server_print_what_they_read_themselves(server, tmp_path):
    image, regions = drawn_images(8)[7]
    image.save(tmp_path / "image.png")
    (tmp_path / "schema.json").write_text(json.dumps(LONG))
    annotations = [{**region, "image_id": 1} for region in coco(image, regions)]
    images = [{"id": 1, "file_name": "image.png", "width": image.width, "height": image.height}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))

    def run(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, [str(one) for one in (*arguments, "--schema", tmp_path / "schema.json")])
        assert done.exit_code == 0, done.output
        return done.stdout

    reading = ("attributes", tmp_path / "image.png", "--regions", tmp_path / "coco.json", "--json")
    here, there = json.loads(run(*reading)), json.loads(run(*reading, "--server", server.url))
    assert (there["model"], len(there["regions"])) == ("shapes", 8)
    assert_equal_rows(there["regions"], here["regions"])
    rows = []
    for name, options in (("here", ()), ("there", ("--server", server.url))):
        run("batch", tmp_path / "coco.json", "--out", tmp_path / f"{name}.jsonl", *options)
        rows.append([row | {"id": row["annotation_id"]} for row in read_rows(tmp_path / f"{name}.jsonl")])
    assert_equal_rows(rows[1], rows[0])
    assert [row["caption"] for row in rows[1]] == [row["caption"] for row in rows[0]]
