"""The check of conversations names row and field, goes on to the end, and sums up what is there."""

import json

import pytest
from drawn import write_jsonl
from PIL import Image
from typer.testing import CliRunner

from pdlm_peft.cli import app
from pdlm_peft.data import chat_messages

TURNS = [{"from": "human", "value": "<image>\nWhat is red?"}, {"from": "gpt", "value": "The box"}]

ANSWER = {"role": "assistant", "content": "b"}


def run(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments), "--chat"])


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def test_sound_conversations_are_summed_up(folder):
    rows = [
        {"image": "a.png", "conversations": TURNS},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "box"}] * 2},
    ]
    path = write_jsonl(folder / "chat.jsonl", rows)
    found = json.loads(run(path, "--json").stdout)
    assert found["n_faults"] == 0
    assert found["summary"]["rows"] == 2 and found["summary"]["images"] == 1
    assert found["summary"]["turns"] == {"min": 2, "median": 3, "p95": 3.9, "max": 4}
    text = run(path)
    assert text.exit_code == 0
    assert "2 rows, 1 images\n" in text.stdout and "faults: none" in text.stdout and "region" not in text.stdout


@pytest.mark.parametrize(
    "row, field, kind, said",
    [
        (
            {"image": "a.png", "conversations": TURNS[:1]},
            "conversations",
            "conversation",
            "an answer as the last turn",
        ),
        ({"image": "none.png", "conversations": TURNS}, "image", "missing image", "no such file"),
        ({"image": "cut.png", "conversations": TURNS}, "image", "broken image", "cannot be opened"),
        ({"conversations": TURNS}, "conversations", "conversation", "one for each of 0 images"),
        ({"image": "a.png", "conversations": [{"from": "cat"}]}, "conversations[0]", "conversation", "`from`"),
        (
            {"image": "a.png", "conversations": [TURNS[0], {"from": "gpt", "value": "box " * 30}]},
            "messages[1]",
            "long answer",
            "at most 16",
        ),
        (
            {"image": "a.png", "conversations": [TURNS[0], {"from": "gpt", "value": "<|eot_id|>"}]},
            "messages[1]",
            "special tokens",
            "special tokens",
        ),
        ({"image": 5, "conversations": TURNS}, "image[0]", "conversation", "the path of an image"),
        ({"image": {"path": 1}, "conversations": TURNS}, "image[0]", "conversation", "the path of an image"),
        ({"images": ["a.png", []], "conversations": TURNS}, "images[1]", "conversation", "the path of an image"),
        ({"image": "a.png", "conversations": [{"from": ["human"]}]}, "conversations[0]", "conversation", "`from`"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "\ud800 <image>"}, TURNS[1]]},
            "conversations[0].value",
            "conversation",
            "whole characters",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}, ANSWER]},
            "messages[0].content",
            "conversation",
            "parts with `type`",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "text": "a"}]}, ANSWER]},
            "messages[0].content",
            "conversation",
            "parts with `type`",
        ),
        (
            {"messages": [{"role": "user", "content": [{}]}, ANSWER]},
            "messages[0].content",
            "conversation",
            "parts with `type`",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"text": 5}]}]},
            "messages[1].content",
            "conversation",
            "parts with `type`",
        ),
    ],
)
def test_faults(folder, row, field, kind, said):
    sound = {"image": "a.png", "conversations": TURNS}
    result = run(write_jsonl(folder / "chat.jsonl", [sound, row, sound]), "--json", "--max-caption-tokens", 16)
    (fault,) = json.loads(result.stdout)["faults"]
    assert result.exit_code == 1
    assert (fault["row"], fault["field"], fault["kind"]) == (2, field, kind)
    assert said in fault["got"] + fault["expected"]


def test_drawing_is_for_regions(folder):
    result = run(write_jsonl(folder / "chat.jsonl", [{"conversations": TURNS}]), "--draw", folder / "x.png")
    assert result.exit_code == 2 and "not for --chat" in result.output


def test_a_part_without_type_is_a_text(folder):
    row = {"messages": [{"role": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}, ANSWER]}
    assert chat_messages(1, row)[1][0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert run(write_jsonl(folder / "chat.jsonl", [row])).exit_code == 0
