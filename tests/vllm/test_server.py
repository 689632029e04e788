"""A real server: both routes, streaming, refusals, a mixed load."""

import http.client
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

import pytest
from drawn_images import coco, data_url, drawn_images, texts
from engines import SOME
from pages import Page
from PIL import Image

from pdlm_hf import CHECKPOINT

ROOT = Path(__file__).parents[2]
MODES = [
    {},
    {"prefix_refresh_interval": 1},
    {"acceptance_threshold": 0.6, "prefix_refresh_interval": 3},
    {"acceptance_threshold": 1.0, "trim_canvas": True},
]


def body(image, regions, **settings) -> dict:
    return {"image": data_url(image), "regions": coco(image, regions), **settings}


def chat_body(image, regions, **settings) -> dict:
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    options = {"mm_processor_kwargs": {"regions": coco(image, regions)}}
    return {"messages": [{"role": "user", "content": content}], **options, **settings}


@SOME
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_both_routes_give_the_captions_of_transformers(server, captioner, settings, some):
    pairs = drawn_images(16)[some]
    expected = [texts(captions) for captions in captioner.caption_many(pairs, **settings)]

    def one(pair) -> list[str]:
        return [row["caption"] for row in server.captions(body(*pair, **settings))["regions"]]

    assert [one(pair) for pair in pairs] == expected
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, pairs)) == expected
    for k in (0, -1):  # of one and of eight regions
        status, text = server.post("/v1/chat/completions", chat_body(*pairs[k], **settings))
        assert status == 200, text
        assert json.loads(json.loads(text)["choices"][0]["message"]["content"]) == expected[k]


def test_an_answer_says_what_it_cost(server, captioner):
    image, regions = drawn_images(8)[5]
    answer = server.captions(body(image, regions))
    captions, output = captioner.generate([(image, regions)])
    assert [row["id"] for row in answer["regions"]] == [100 + k for k in range(6)]
    assert [row["score"] for row in answer["regions"]] == pytest.approx([c.score for c in captions[0]], abs=1e-4)
    assert [row["bbox"] for row in answer["regions"]] == [c.bbox for c in captions[0]]
    usage = answer["usage"]
    # the prompt is a pass of its own here; transformers computes it with the first step
    assert usage["num_forwards"] == output.num_forwards + 1
    written = round(output.text_tokens_per_forward * output.num_forwards)
    assert usage["completion_tokens"] == written
    assert usage["tokens_per_forward"] == pytest.approx(written / usage["num_forwards"], abs=1e-3)
    assert usage["total_tokens"] == usage["prompt_tokens"] + written


def test_a_caption_that_was_cut_is_marked(server, captioner):
    image, regions = drawn_images(8)[7]
    expected = [c.truncated for c in captioner.caption(image, regions, max_new_tokens=5)]
    assert True in expected
    request = body(image, regions, max_new_tokens=5)
    assert [row.get("truncated", False) for row in server.captions(request)["regions"]] == expected
    _, text = server.post("/v1/region_captions", {**request, "stream": True})
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    events = [json.loads(line) for line in lines[:-1]]
    assert [row.get("truncated", False) for row in events[-1]["regions"]] == expected
    assert not any("truncated" in row for event in events for row in event["regions"] if not row.get("finished", True))


def test_streaming_shows_every_step(server, captioner):
    image, regions = drawn_images(8)[7]  # eight regions: two passes
    slowly = {"acceptance_threshold": 1.0}  # a token per region and step
    status, text = server.post("/v1/region_captions", body(image, regions, stream=True, **slowly))
    assert status == 200
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    expected = texts(captioner.caption(image, regions, **slowly))
    assert [row["caption"] for row in events[-1]["regions"]] == expected
    steps = events[:-1]
    for number, ids in ((0, range(100, 106)), (1, range(106, 108))):
        found = [event for event in steps if event["pass"] == number]
        assert [event["step"] for event in found] == sorted(event["step"] for event in found)
        assert len(found) > 3 and found[0]["step"] == 1
        assert [row["id"] for row in found[0]["regions"]] == list(ids)
        assert not all(row["finished"] for row in found[0]["regions"])
        assert [row["caption"] for row in found[-1]["regions"]] == expected[ids[0] - 100 : ids[-1] - 99]
        assert all(row["finished"] for row in found[-1]["regions"])
    assert events[-1]["usage"]["num_forwards"] > len(steps)


def test_base_chat(server, captioner):
    image = drawn_images(1)[0][0]
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "What is this?"},
    ]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
    for settings in ({}, {"block_length": 4}, {"block_length": 1}):
        status, text = server.post("/v1/chat/completions", request | settings)
        assert status == 200, text
        inputs = captioner.processor(images=image, text="What is this?")
        out = captioner.model.generate(**inputs, max_new_tokens=16, acceptance_threshold=None, **settings)
        expected = captioner.processor.post_process_answers(out)[0]
        assert json.loads(text)["choices"][0]["message"]["content"].strip() == expected


@cache
def refusals() -> list[tuple[str, dict | bytes, int, str]]:
    image, regions = drawn_images(2)[1]
    good = body(image, regions)
    rle = coco(image, regions)[0]["segmentation"]
    question = {"role": "user", "content": "Hi"}
    region_route, chat = "/v1/region_captions", "/v1/chat/completions"
    return [
        (region_route, good | {"regions": []}, 400, "No regions given"),
        (region_route, good | {"regions": [[0, 0, 4, 4]] * 61}, 400, "at most 60"),
        (region_route, good | {"regions": ["/etc/hostname"]}, 400, "expected a COCO region"),
        (region_route, good | {"regions": [{"segmentation": rle | {"size": [3, 4]}}]}, 400, "the RLE is for size"),
        (region_route, good | {"regions": [{"segmentation": rle | {"counts": "00"}}]}, 400, "the RLE is damaged"),
        (region_route, good | {"regions": [{"bbox": [9000, 0, 5, 5]}]}, 400, "lies outside the image"),
        (region_route, good | {"regions": [{"id": 1}]}, 400, "needs `segmentation`"),
        (region_route, good | {"image": "data:image/png;base64,AAAA"}, 400, "cannot be read"),
        (region_route, good | {"image": "file:///etc/hostname"}, 400, "cannot be read"),
        (region_route, {"regions": good["regions"]}, 400, "image"),
        (region_route, good | {"segmentations": 1}, 400, "`segmentations` has no meaning"),
        (region_route, good | {"seed": 1}, 400, "`seed` has no meaning"),
        (region_route, good | {"trim_canvas": 1}, 400, "`trim_canvas` must be true or false"),
        (region_route, good | {"cuda_graphs": True}, 400, "`cuda_graphs` has no meaning"),
        (region_route, good | {"temperature": 1}, 400, "`temperature` must be 0"),
        (region_route, good | {"max_new_tokens": 500}, 400, "served canvas"),
        (region_route, good | {"max_denoising_steps": 0}, 400, "positive integer"),
        (region_route, good | {"question": "why " * 300}, 400, "tokens, at most"),
        (
            region_route,
            body(Image.new("L", (8000, 8000)), [[0, 0, 9, 9]]) | {"regions": [[0, 0, 9, 9]] * 60},
            400,
            "pixels",
        ),
        (chat, {"messages": [question], "prompt_logprobs": 1}, 400, "`prompt_logprobs` is not served"),
        (chat, {"messages": [question], "logprobs": True, "top_logprobs": 2}, 400, "`logprobs` is not served"),
        (chat, {"messages": [question], "vllm_xargs": {"block_length": "a"}}, 400, "`block_length` must be"),
        (region_route, good | {"model": "other"}, 404, "does not exist"),
        (region_route, b'{"image": "data', 400, ""),
        (chat, {"messages": [question], "mm_processor_kwargs": {"regions": [[0, 0, 4, 4]]}}, 400, "got 0 images"),
        (chat, {"messages": [question], "temperature": 0.5}, 400, "`temperature` must be 0"),
        (chat, {"messages": [question], "seed": 1}, 400, "`seed` has no meaning"),
        (chat, {"messages": [question], "max_tokens": 5000}, 400, "served canvas"),
        (chat, {"messages": [question], "max_tokens": 10, "block_length": 4}, 400, "multiple of `block_length`"),
        (chat, {"messages": [question], "mm_processor_kwargs": {"region": []}}, 400, ""),
        (chat, {"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "maximum context length"),
        (region_route, good | {"image": data_url(Image.new("1", (14000, 14000)))}, 400, "cannot be read"),
        (
            chat,
            {"messages": [question, question], "mm_processor_kwargs": {"regions": [[0, 0, 4, 4]]}},
            400,
            "one user",
        ),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_bad_requests_are_refused_with_a_reason(server, number):
    path, request, expected, message = refusals()[number]
    status, text = server.post(path, request)
    assert status == expected, text
    assert message in json.loads(text)["error"]["message"]


def test_metrics_count_regions_and_steps(server):
    before = server.metric("pdlm:regions_total")
    server.captions(body(*drawn_images(8)[7]))
    assert server.metric("pdlm:regions_total") == before + 8
    assert server.metric("pdlm:denoising_steps_count") > 0
    assert server.metric("pdlm:tokens_per_forward_sum") > 0


def test_the_log_says_what_is_off(server):
    log = server.log.read_text()
    assert "prefix caching and chunked prefill are off" in log
    assert "Endpoint plugin overrides POST /v1/chat/completions" in log


def test_a_crowd_of_large_images(server, captioner):
    """More image tokens than fit into one step: an image waits, it is not cut."""
    pairs = [(image.resize((192, 128)), [[8 + k, 8, 60, 60]]) for k, (image, _) in enumerate(drawn_images(32, seed=3))]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda pair: server.captions(body(*pair)), pairs))
    expected = [texts(captions) for captions in captioner.caption_many(pairs)]
    assert [[row["caption"] for row in answer["regions"]] for answer in answers] == expected


def test_a_crowd_of_region_and_chat_requests_with_images(server, captioner):
    """Their images go through the vision tower together."""
    pairs = [(image.resize((160, 96)), [[8 + k, 8, 50, 60]]) for k, (image, _) in enumerate(drawn_images(12, seed=6))]

    def one(number: int) -> str:
        image, regions = pairs[number // 2]
        if number % 2 == 0:
            return server.captions(body(image, regions))["regions"][0]["caption"]
        content = [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": "What is it?"},
        ]
        request = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        status, text = server.post("/v1/chat/completions", request)
        assert status == 200, text
        return json.loads(text)["choices"][0]["message"]["content"].strip()

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    assert found[::2] == [texts(captions)[0] for captions in captioner.caption_many(pairs)]
    inputs = [captioner.processor(images=image, text="What is it?") for image, _ in pairs]
    outputs = [captioner.model.generate(**one, max_new_tokens=8, acceptance_threshold=None) for one in inputs]
    assert found[1::2] == [captioner.processor.post_process_answers(output)[0].strip() for output in outputs]


def test_a_crowd_of_large_canvases(server, captioner):
    """All places taken by six regions of 64 slots each: no canvas is cut either."""
    settings = {"max_new_tokens": 64, "max_denoising_steps": 4}
    pairs = [
        (image, [[2 + k, 2 + r, 20, 20] for r in range(6)]) for k, (image, _) in enumerate(drawn_images(32, seed=4))
    ]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda pair: server.captions(body(*pair, **settings)), pairs))
    expected = [texts(captions) for captions in captioner.caption_many(pairs, **settings)]
    assert [[row["caption"] for row in answer["regions"]] for answer in answers] == expected


def example(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_examples_against_a_server(server, captioner):
    boxes = [[101, 12, 25, 25], [66, 93, 49, 48]]
    texts_of_boxes = texts(captioner.caption("examples/shapes.png", boxes))
    shown = example("examples/vllm_client.py", server.url, "examples/shapes.png", "101,12,25,25", "66,93,49,48")
    assert "step  1 | " in shown and "'num_forwards'" in shown
    assert all(f"{k}  {text}  (" in shown for k, text in enumerate(texts_of_boxes, 1))
    load = example("examples/vllm_load.py", server.url, "examples/shapes.png", "--requests", "8", "--in-flight", "4")
    assert load.startswith("32 captions in ")


def test_requests_of_the_pages(server):
    """What docs/vllm.md sends, with the example image; the answer has the fields of the page's."""
    bodies = [json.loads(f.text) for f in Page("vllm.md").fences if f.language == "json"]
    assert len(bodies) == 4  # captions and attributes
    for request, answer in zip(bodies[::2], bodies[1::2], strict=True):
        found = server.captions({**request, "image": data_url(Image.open(ROOT / "examples/shapes.png"))})
        assert found.keys() == answer.keys() and found["usage"].keys() == answer["usage"].keys()
        assert [row.keys() for row in found["regions"]] == [row.keys() for row in answer["regions"]]
        assert [row["id"] for row in found["regions"]] == [row["id"] for row in request["regions"]]
    for name, value in answer["regions"][0]["attributes"].items():
        assert found["regions"][0]["attributes"][name].keys() == value.keys()


@pytest.mark.slow
def test_the_offline_example(captioner):
    shown = example("examples/vllm_offline.py")
    masks = [f"examples/shapes_mask_{k}.png" for k in range(6)]
    for caption in captioner.caption("examples/shapes.png", masks, acceptance_threshold=0.9):
        assert f"{caption.score:.2f}  {caption.text}\n" in shown


@pytest.mark.slow
def test_a_benchmark_is_captioned_through_the_server(server, tmp_path):
    """`pdlm-eval paradlc caption --server` writes what the same command with --model writes."""
    annotations = ROOT / "pdlm_evalkit/paradlc/example"
    sources = {
        "server": ("--server", server.url + "/v1", "--server-model", "shapes"),
        "model": ("--model", str(CHECKPOINT)),
    }
    captions = {}
    for name, source in sources.items():
        out = tmp_path / name
        command = [str(Path(sys.executable).with_name("pdlm-eval")), "paradlc", "caption"]
        command += ["--annotations", str(annotations), "--out", str(out), *source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        captions[name] = json.loads((out / "captions.json").read_text())
    assert captions["server"] == captions["model"]
    assert len(captions["model"]) == len(json.loads((annotations / "qa.json").read_text()))


def disconnect(server, request: dict) -> None:
    """Send a request and hang up."""
    connection = http.client.HTTPConnection(urlparse(server.url).netloc, timeout=60)
    connection.request(
        "POST", "/v1/region_captions", json.dumps(request | {"stream": True}), {"Content-Type": "application/json"}
    )
    connection.getresponse().read(10)
    connection.close()


def mixed_load(server, captioner, count: int, images: int, seed: int) -> dict:
    """Requests of all kinds, 16 at a time. Returns what was asked, and what came of it."""
    rng = random.Random(seed)
    pairs = drawn_images(images, seed)
    expected = {
        number: [texts(captions) for captions in captioner.caption_many(pairs, **settings)]
        for number, settings in enumerate(MODES)
    }
    bad = [entry for entry in refusals() if entry[2] == 400]
    memory = [server.memory()]
    tally = {"right": 0, "wrong": [], "refused": 0, "gone": 0, "chat": 0}

    def one(kind: float) -> None:
        k, mode = rng.randrange(images), rng.randrange(len(MODES))
        request = body(*pairs[k], **MODES[mode])
        if kind < 0.10:
            path, request, status, _ = rng.choice(bad)
            got, text = server.post(path, request)
            tally["refused"] += got == status
            if got != status:
                tally["wrong"].append((path, got, text[:200]))
        elif kind < 0.15:
            disconnect(server, request)
            tally["gone"] += 1
        elif kind < 0.25:
            status, text = server.post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
            )
            tally["chat"] += status == 200
        elif kind < 0.5:
            _, text = server.post("/v1/region_captions", request | {"stream": True})
            last = json.loads(text.strip().splitlines()[-3].removeprefix("data: "))
            check([row["caption"] for row in last["regions"]], mode, k)
        else:
            check([row["caption"] for row in server.captions(request)["regions"]], mode, k)

    def check(found: list[str], mode: int, k: int) -> None:
        if found == expected[mode][k]:
            tally["right"] += 1
        else:
            tally["wrong"].append((MODES[mode], k, found, expected[mode][k]))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, [rng.random() for _ in range(count // 2)]))
        memory.append(server.memory())
        list(pool.map(one, [rng.random() for _ in range(count - count // 2)]))
    for _ in range(60):
        if server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0:
            break
        time.sleep(0.5)
    memory.append(server.memory())
    tally["preemptions"] = server.metric("vllm:num_preemptions_total")
    tally["cache_in_use"] = server.metric("vllm:kv_cache_usage_perc")
    tally["memory_mb"] = [round(bytes_ / 2**20) for bytes_ in memory]
    return tally


def check_load(tally: dict, count: int) -> None:
    assert not tally["wrong"]
    assert tally["right"] + tally["refused"] + tally["gone"] + tally["chat"] == count
    assert tally["cache_in_use"] == 0, "a slot leaked"
    assert tally["memory_mb"][2] < tally["memory_mb"][1] * 1.05 + 30


def test_a_mixed_load(server, captioner):
    check_load(mixed_load(server, captioner, 60, images=8, seed=1), 60)


@pytest.mark.slow
def test_a_long_mixed_load(server, captioner, capsys):
    tally = mixed_load(server, captioner, 240, images=16, seed=2)
    with capsys.disabled():  # into the log of test-full
        record = {name: value for name, value in tally.items() if name != "wrong"}
        sys.stdout.write(f"\nmixed load of 240: {json.dumps(record)}\n")
    check_load(tally, 240)
