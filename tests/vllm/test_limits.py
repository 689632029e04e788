"""Limits of a server, without a server."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from hostile import REGIONS

from pdlm_hf.errors_pdlm import ImageError, RegionError, SettingError
from pdlm_hf.templates_pdlm import AttributePlan
from pdlm_vllm.bodies import BoundedBodies, _long_list, _parsed, count_values
from pdlm_vllm.limits import Limits, read_limits
from pdlm_vllm.media import EncodedImage, OpenedImage

SMALL = Limits(
    body_bytes=100,
    body_values=5,
    other_values=3,
    body_escapes=3,
    max_regions=2,
    request_pixels=300,
    rle_bytes=4,
    url_length=20,
)


def test_limits_come_from_the_command_line_then_from_the_environment(monkeypatch):
    monkeypatch.setenv("PDLM_BODY_BYTES", "1000")
    monkeypatch.setenv("PDLM_MAX_REGIONS", "7")
    found = read_limits({"max_regions": 5, "other": "x"})
    assert (found.body_bytes, found.max_regions, found.image_pixels) == (1000, 5, 2**26)
    assert read_limits(None).max_regions == 7


@pytest.mark.parametrize("value", [0, -1, True, "9", 1.5, [1]], ids=repr)
def test_a_limit_is_a_positive_integer(value):
    with pytest.raises(SettingError, match="`image_pixels` must be a positive integer, got"):
        read_limits({"image_pixels": value})


@pytest.mark.parametrize("value", ["", "0", "-1", "1e6", "9" * 20])
def test_a_variable_is_a_positive_integer(value, monkeypatch):
    monkeypatch.setenv("PDLM_POLYGON_POINTS", value)
    with pytest.raises(SettingError, match="`PDLM_POLYGON_POINTS` must be a positive integer, got"):
        read_limits({})


def test_what_is_refused_names_its_limit():
    SMALL.check_count(2)
    SMALL.check_pixels(10, 10, 2)
    SMALL.check_run_lengths([{"segmentation": {"counts": "1234"}}, {"counts": [1] * 9}, [1, 2], {"segmentation": []}])
    with pytest.raises(RegionError, match=r"3 regions, but this server takes at most 2 a request \(max_regions\)"):
        SMALL.check_count(3)
    with pytest.raises(RegionError, match=r"400 pixels together; this server takes at most 300 .*\(request_pixels\)"):
        SMALL.check_pixels(10, 10, 3)
    with pytest.raises(RegionError, match=r"region 1: .* has 5 characters; .* at most 4 \(rle_bytes\)"):
        SMALL.check_run_lengths([{"bbox": [1, 2, 3, 4]}, {"counts": "12345"}])
    SMALL.check_url("http://localhost/a.b")
    SMALL.check_url("DATA:" + "a" * 99)
    with pytest.raises(ImageError, match=r"The address of the image has 21 characters; .* at most 20 \(url_length\)"):
        SMALL.check_url("http://localhost/a.bc")


def test_a_schema_costs_regions_times_choices():
    def plan(choices: dict, lengths: dict, template: str) -> AttributePlan:
        return AttributePlan(choices, lengths, [template], lambda text: list(map(ord, text)), 1, 2)

    limits, letters = Limits(attribute_scores=12, attribute_rows=30), {"a": ["b", "c"]}
    scored = plan(letters, {}, "{a}")
    limits.check_attributes(scored, 6, calibrate=False)
    with pytest.raises(SettingError, match=r"7 regions have 14 choices .* at most 12 .*\(attribute_scores\)"):
        limits.check_attributes(scored, 7, calibrate=False)
    with pytest.raises(SettingError, match="6 regions have 14 choices"):
        limits.check_attributes(scored, 6, calibrate=True)
    written = plan(letters | {"name": []}, {"name": 5}, "{a}{name}")  # a block of 2 + 2 rows, and a text of 5
    limits.check_attributes(written, 3, calibrate=False)
    with pytest.raises(SettingError, match=r"3 regions have 31 token positions .* at most 30 .*\(attribute_rows\)"):
        limits.check_attributes(written, 3, calibrate=True)


def test_an_id_is_short():
    """Each event of a stream has it."""
    SMALL.check_ids([{"id": "a" * 256}, {"id": None}, {"id": 7}, {"bbox": [1, 2, 3, 4]}, [1, 2, 3, 4]])
    with pytest.raises(RegionError, match="region 1: `id` has 257 characters, at most 256"):
        SMALL.check_ids([[1, 2, 3, 4], {"id": "a" * 257}])
    for value in ([1], {"a": 1}):
        with pytest.raises(RegionError, match="region 0: `id` must be a number or a text, got"):
            SMALL.check_ids([{"id": value}])


class State:
    """Of an application with our model, or without."""

    def __init__(self, ours: bool):
        service = SimpleNamespace(ours=ours, counts_load=False)
        self.state = SimpleNamespace(pdlm=service, enable_server_load_tracking=True, server_load_metrics=0)


def sent(chunks: list[bytes], ours: bool = True, path: str = REGIONS, hangs_up: bool = False) -> tuple:
    """What the next application reads, and what the client gets, of a body in chunks."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = hangs_up
    messages.append({"type": "http.disconnect"})
    read, answers = [], []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    async def application(scope, receive, send):
        assert scope["app"].state.server_load_metrics == ours
        more = True
        while more:
            message = await receive()
            read.append(message.get("body"))
            more = message.get("more_body", False)

    scope = {"type": "http", "method": "POST", "path": path, "app": State(ours), "headers": []}
    asyncio.run(BoundedBodies(application, SMALL)(scope, receive, send))
    assert scope["app"].state.server_load_metrics == 0
    return read, answers


def test_a_body_within_the_limits_arrives_whole():
    assert sent([b"ab", b"", b"c,d"]) == ([b"abc,d"], [])
    assert sent([b"ab", b"c"], hangs_up=True) == ([], [])


@pytest.mark.parametrize(
    "chunks, message",
    [
        ([b"x" * 101], "more than 100 bytes (body_bytes)"),
        ([b"x" * 60] * 2 + [b"y"], "more than 100 bytes (body_bytes)"),
        ([b"x" * 60] * 50, "more than 100 bytes (body_bytes)"),
        ([b"[1,2,3,", b"4,5,6,7]"], "more than 5 values (body_values)"),
        ([b'["\\n\\n', b'\\n\\n"]'], "more than 3 backslashes (body_escapes)"),
    ],
)
def test_a_body_beyond_them_is_refused_before_anyone_reads_it(chunks, message):
    read, (start, body) = sent(chunks)
    assert read == [] and start["status"] == 400
    assert message in json.loads(body["body"])["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions/batch", "/v1/responses"])
def test_routes_without_regions_take_fewer_values(path):
    assert sent([b"[1,2,3,4]"], path=path) == ([b"[1,2,3,4]"], [])
    read, (_, body) = sent([b"[1,2,3,4,5]"], path=path)
    assert read == [] and "more than 3 values (other_values)" in json.loads(body["body"])["error"]["message"]
    assert sent([b"[1,2,3,4,5]"], path="/prefix/v1/chat/completions")[1] == []


def test_values_are_counted_in_all_lists_and_dicts():
    value = {"a": [1, {"b": 2}, []], "c": "1,2,3"}
    assert [count_values(value, 100), count_values([1] * 50, 10), count_values("abc", 10)] == [6, 50, 0]


def test_a_chat_has_few_values_beside_its_regions():
    body = {"mm_processor_kwargs": {"regions": [1, 2, 3, 4, 5]}, "messages": [1]}
    assert _parsed(json.dumps(body).encode(), SMALL) == body
    with pytest.raises(HTTPException) as caught:
        _parsed(json.dumps(body | {"messages": [[1, 2]]}).encode(), SMALL)
    assert caught.value.detail == "The body has more than 3 values beside its regions (other_values)."


def test_a_long_list_of_responses():
    many = json.dumps({"a": [{"b": [1] * 33}]}).encode()
    assert _long_list(many) == "A list of this body has 33 items; /v1/responses takes at most 32."
    assert [_long_list(body) for body in (b"[1]", b"{", json.dumps([1] * 32).encode())] == [None] * 3


def test_other_models_keep_their_bodies():
    read, answers = sent([b"x" * 60] * 3, ours=False)
    assert len(b"".join(read)) == 180 and answers == []


def test_a_route_that_can_only_fail_says_so():
    read, (start, body) = sent([b"{}"], path="/scale_elastic_ep")
    assert read == [] and start["status"] == 400 and "no experts" in json.loads(body["body"])["error"]["message"]


def test_an_image_is_opened_without_being_decoded(monkeypatch):
    from hostile import flat_image, png_header

    from pdlm_hf.regions import limits

    data = flat_image(9000, "PNG")
    assert EncodedImage(SMALL).load_bytes(data) is data
    opened = OpenedImage(SMALL).load_bytes(data)
    assert opened.media.size == (9000, 9000) and opened.media._im is None and opened.original_bytes is data
    monkeypatch.setattr(limits, "IMAGE_PIXELS", 9000 * 9000 - 1)
    for large in (data, png_header(60000, 60000)):
        with pytest.raises(ImageError, match="pixels"):
            OpenedImage(SMALL).load_bytes(large)
