"""The clients of servers: replies are kept, failures are no replies, and every run comes to an end."""

import base64
import io
import json

import numpy as np
import pytest
from judge_server import JudgeServer, text_of
from PIL import ExifTags, Image
from region_server import RegionCaptionServer

from pdlm_hf.client import server as client
from pdlm_hf.client.cache import Reply, ReplyCache
from pdlm_hf.client.captions import CaptionClient, image_url, request_of
from pdlm_hf.client.chat import ChatClient
from pdlm_hf.client.server import public_url
from pdlm_hf.errors_pdlm import ServerError, SettingError
from pdlm_hf.regions.region import Region

KEY = "sk-very-secret-key"


def messages(text):
    return [{"role": "user", "content": text}]


def echo(body):
    return f"reply to {text_of(body)}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between attempts, no proxy between two ends of one machine, no key from outside."""
    monkeypatch.setattr(client, "_BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")


def ask(server, questions, **options):
    judge = ChatClient("m", server.url, **options)
    try:
        return dict(judge.ask_many(messages(question) for question in questions))
    finally:
        judge.close()


def test_replies_come_for_every_request_with_their_tokens():
    with JudgeServer(echo) as server:
        replies = ask(server, [str(k) for k in range(25)], concurrency=4, settings={"temperature": 0})
    assert [replies[k].text for k in range(25)] == [f"reply to {k}" for k in range(25)]
    assert not any(reply.cached for reply in replies.values())
    assert {(reply.prompt_tokens, reply.completion_tokens) for reply in replies.values()} == {(7, 1)}
    assert all(body["temperature"] == 0 and body["model"] == "m" for body in server.bodies)


@pytest.mark.parametrize("fault", ["500", "429", "garbage", "no choices", "drop", "half"])
def test_what_passes_is_asked_again(fault, tmp_path):
    with JudgeServer(echo, lambda number, _: fault if number % 2 == 0 else None) as server:
        replies = ask(server, ["a", "b", "c"], concurrency=1, cache=tmp_path / "c", retries=1)
    assert [replies[k].text for k in range(3)] == ["reply to a", "reply to b", "reply to c"]
    assert len(server.bodies) == 6 and len(server.answered) == 3


@pytest.mark.parametrize(
    "fault, requests",
    [
        ("500", 3),
        ("429", 3),
        ("garbage", 3),
        ("no choices", 3),
        ("drop", 3),
        ("half", 3),
        ("400", 1),
        ("429 later", 1),
    ],
)
def test_attempts_are_bounded_and_failures_are_not_kept(fault, requests, tmp_path):
    with JudgeServer(echo, lambda number, body: fault if text_of(body) == "bad" else None) as server:
        replies = ask(server, ["good", "bad"], concurrency=1, cache=tmp_path / "c", retries=2)
        assert replies[0].text == "reply to good"
        assert replies[1].text is None and replies[1].error
        assert sum(text_of(body) == "bad" for body in server.bodies) == requests
        server.faults = None
        again = ask(server, ["good", "bad"], cache=tmp_path / "c")
    assert again[0].cached and again[1].text == "reply to bad" and not again[1].cached
    assert len(server.answered) == 2


def test_no_reply_is_paid_for_twice(tmp_path):
    with JudgeServer(echo, delay=0.01) as server:
        questions = ["x", "y", "x", "x", "y", "z"]
        first = ask(server, questions, cache=tmp_path / "c")
        assert [first[k].text for k in range(6)] == [f"reply to {q}" for q in questions]
        assert sum(not reply.cached for reply in first.values()) == 3
        second = ask(server, questions, cache=tmp_path / "c")
        assert all(reply.cached for reply in second.values())
        assert {k: r.text for k, r in first.items()} == {k: r.text for k, r in second.items()}
        assert len(server.bodies) == 3
        # other settings or another model: another question
        ask(server, ["x"], cache=tmp_path / "c", settings={"temperature": 1})
        assert len(server.bodies) == 4


def test_the_address_is_no_part_of_the_question(tmp_path):
    with JudgeServer(echo) as one:
        ask(one, ["x"], cache=tmp_path / "c")
    with JudgeServer(echo) as other:
        assert ask(other, ["x"], cache=tmp_path / "c")[0].cached
        assert other.bodies == [] and other.probes == 0


def test_an_empty_reply_is_a_reply(tmp_path):
    with JudgeServer(lambda body: "") as server:
        assert ask(server, ["x"], cache=tmp_path / "c")[0].text == ""
        assert ask(server, ["x"], cache=tmp_path / "c")[0].cached
    assert len(server.bodies) == 1


def test_requests_may_have_settings_of_their_own():
    with JudgeServer(lambda body: str(body["extra"])) as server:
        judge = ChatClient("m", server.url)
        replies = dict(judge.ask_many({"messages": messages("x"), "extra": k} for k in range(3)))
    assert [replies[k].text for k in range(3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "options, faults, said",
    [
        ({"key": "right"}, None, "refuses the key: "),
        ({"model": "other"}, None, "does not know 'm'"),
        ({}, "quota", "no quota left"),
    ],
)
def test_a_judge_of_no_use_stops_the_run_at_once(options, faults, said, tmp_path):
    with JudgeServer(echo, faults and (lambda number, body: faults), **options) as server:
        with pytest.raises(ServerError, match=said) as error:
            ask(server, ["a", "b", "c"], api_key=KEY, concurrency=1, cache=tmp_path / "c")
    assert KEY not in str(error.value)
    assert len(server.bodies) <= 1 and server.answered == []
    assert KEY.encode() not in (tmp_path / "c").read_bytes()


def test_an_unreachable_judge_is_said_before_anything_is_asked():
    with JudgeServer(echo) as server:
        pass
    asked = []

    def requests():
        asked.append(1)
        yield messages("x")

    with pytest.raises(ServerError, match="does not answer: no connection"):
        list(ChatClient("m", server.url, retries=1).ask_many(requests()))
    assert asked == [1]
    with pytest.raises(ServerError, match="does not answer: no connection"):
        ChatClient("m", server.url).probe(chat=False)


def test_a_key_of_the_environment_goes_nowhere():
    with JudgeServer(echo) as server:
        ask(server, ["x"])
        assert server.keys == {"Bearer none"}
        ask(server, ["y"], api_key=KEY)
        assert f"Bearer {KEY}" in server.keys


def test_a_filtered_request_fails_alone():
    with JudgeServer(echo, lambda _, body: "400" if text_of(body) == "3" else None) as server:
        replies = ask(server, [str(k) for k in range(8)], give_up_after=2)
    assert [k for k, reply in replies.items() if reply.text is None] == [3]
    assert "fault 400" in replies[3].error


def test_refusals_stop_a_run_only_when_nothing_was_ever_answered(tmp_path):
    """Many questions about an image the filter keeps back come one after the other, and again in the next run."""
    refused = {str(k) for k in range(2, 8)}
    with JudgeServer(echo, lambda _, body: "400" if text_of(body) in refused else None) as server:
        for _ in range(2):
            options = {"give_up_after": 3, "concurrency": 1, "cache": tmp_path / "c"}
            replies = ask(server, [str(k) for k in range(8)], **options)
            assert {str(k) for k, reply in replies.items() if reply.text is None} == refused
            assert all(reply.refused == (reply.text is None) for reply in replies.values())
        assert len(server.bodies) == 2 + 2 * len(refused)
        with pytest.raises(ServerError, match="last 3 calls to m failed"):
            ask(server, sorted(refused), give_up_after=3, concurrency=1)


@pytest.mark.parametrize("content", [7, {"text": "A"}, ["A"], True])
def test_what_is_no_text_is_no_reply(content, tmp_path):
    with JudgeServer(lambda body: content) as server:
        reply = ask(server, ["x"], cache=tmp_path / "c", retries=1)[0]
        assert reply.text is None and "is no reply" in reply.error
        assert len(server.bodies) == 2


def test_half_a_character_is_kept(tmp_path):
    """JSON can hold half of a surrogate pair, a file of UTF-8 cannot."""
    with JudgeServer(lambda body: "A \ud83d.") as server:
        assert ask(server, ["x"], cache=tmp_path / "c")[0].text == "A ?."
        assert ask(server, ["x"], cache=tmp_path / "c")[0].cached


def test_calls_that_keep_failing_stop_the_run(tmp_path):
    with JudgeServer(echo, lambda number, _: None if number < 5 else "500") as server:
        with pytest.raises(ServerError, match="last 3 calls to m failed"):
            ask(server, [str(k) for k in range(100)], concurrency=1, retries=1, give_up_after=3, cache=tmp_path / "c")
        assert len(server.bodies) == 5 + 3 * 2
    cache = ReplyCache(tmp_path / "c")
    assert len(cache) == 5


def test_max_calls_stops_and_the_next_run_goes_on(tmp_path):
    with JudgeServer(echo) as server:
        questions = [str(k) for k in range(9)]
        with pytest.raises(ServerError, match="Stopped at 5 calls"):
            ask(server, questions, concurrency=2, max_calls=5, cache=tmp_path / "c")
        assert len(server.bodies) + server.probes == 5
        replies = ask(server, questions, cache=tmp_path / "c")
        assert sum(not reply.cached for reply in replies.values()) == 9 - 4
    assert len(server.answered) == len(set(server.answered)) == 9


def test_an_iterator_that_is_left_keeps_what_came(tmp_path):
    with JudgeServer(echo) as server:
        judge = ChatClient("m", server.url, cache=tmp_path / "c", concurrency=2)
        replies = judge.ask_many(messages(str(k)) for k in range(50))
        for _ in range(10):
            next(replies)
        replies.close()
        received = len(server.answered)
        assert 10 <= received <= 12 and len(judge.cache) == received
        ask(server, [str(k) for k in range(50)], cache=tmp_path / "c")
    assert len(server.answered) == 50


def test_progress_and_the_list_of_models():
    seen = []
    with JudgeServer(echo, model="m") as server:
        judge = ChatClient("m", server.url)
        list(judge.ask_many([messages("a"), messages("b")], lambda count, reply: seen.append((count, reply.text))))
        judge.probe(chat=False)
        with pytest.raises(ServerError, match="has no model 'other', but m"):
            ChatClient("other", server.url).probe(chat=False)
    assert [count for count, _ in seen] == [1, 2]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"concurrency": 0}, "`concurrency` must be at least 1"),
        ({"retries": -1}, "`retries` must be at least 0"),
        ({"timeout": 0}, "`timeout` must be positive"),
        ({"base_url": "127.0.0.1:8000"}, "must start with http"),
    ],
)
def test_wrong_settings(options, said):
    with pytest.raises(ValueError, match=said):
        ChatClient(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", **options})


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "c").write_text("something else, long enough to be told from a new file" * 20)
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        ReplyCache(tmp_path / "c")


def test_addresses_are_shown_without_secrets():
    assert public_url("http://me:pw@host:8000/v1?key=abc") == "http://host:8000/v1"


def test_replies_that_cannot_be_kept_stop_the_run(tmp_path):
    cache = ReplyCache(tmp_path / "c")
    cache.put("key", "m", Reply("text", usage={"prompt_tokens": 3}))
    found = cache.get("key")
    assert (found.text, found.cached, found.prompt_tokens, found.completion_tokens) == ("text", True, 3, None)
    assert cache.get("other") is None
    cache._rows.execute("PRAGMA query_only = 1")  # as a disk without space
    with pytest.raises(SettingError, match="c: the cache of replies cannot be written"):
        cache.put("other", "m", Reply("text"))


# ---------------------------------------------------------------- our own server


def test_captions_of_our_server():
    region = Region("mine", np.ones((6, 8), dtype=bool))
    request = request_of(image_url(None, Image.new("RGB", (8, 6))), [region, region])
    with RegionCaptionServer() as server:
        captions = CaptionClient(server.url, settings={"max_new_tokens": 4})
        assert (captions.model, captions.concurrency) == ("served", 10) and server.bodies == []
        captions.probe()
        ((index, reply),) = captions.ask_many([request])
        events = list(captions.stream(request))
        captions.close()
    assert index == 0 and reply.usage["num_forwards"] == 2
    assert [(row["id"], row["caption"]) for row in json.loads(reply.text)] == [(0, "48 pixels"), (1, "48 pixels")]
    assert [row["caption"] for event in events for row in event["regions"]] == ["4"] * 2 + ["48"] * 2 + [
        "48 pixels"
    ] * 2
    assert [body["max_new_tokens"] for body in server.bodies] == [4] * 3  # also of the small grey image
    with RegionCaptionServer() as server:
        with pytest.raises(ServerError, match="has no model 'other', but served"):
            CaptionClient(server.url, "other")


def test_captions_are_checked_and_asked_again():
    lacking = b'{"regions": [{"id": 0, "caption": "a", "score": 2}], "usage": {}}'
    region = Region(0, np.ones((6, 8), dtype=bool))
    request = request_of(image_url(None, Image.new("RGB", (8, 6))), [region])
    with RegionCaptionServer(lambda number, body: lacking if number in (1, 2) else None) as server:
        captions = CaptionClient(server.url, retries=1)
        replies = [next(captions.ask_many([request]))[1] for _ in range(2)]
    assert replies[0].text is None and "is not one caption for each region" in replies[0].error
    assert json.loads(replies[1].text)[0]["caption"] == "48 pixels" and len(server.bodies) == 4


def test_files_are_sent_unchanged_where_every_reader_sees_the_same(tmp_path):
    image = Image.new("RGB", (8, 6), "red")
    image.save(tmp_path / "plain.jpg")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    image.save(tmp_path / "damaged.png", exif=b"no EXIF at all")
    with Image.open(tmp_path / "damaged.png") as file, pytest.raises(SyntaxError):
        file.getexif()
    plain = image_url(tmp_path / "plain.jpg", image)
    assert plain == "data:image/jpeg;base64," + base64.b64encode((tmp_path / "plain.jpg").read_bytes()).decode()
    for path in (tmp_path / "turned.jpg", tmp_path / "damaged.png", tmp_path / "none.jpg", None):
        url = image_url(path, image)
        pixels = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert pixels.size == (8, 6) and pixels.getpixel((0, 0)) == (255, 0, 0)
