"""The server as people expect a vLLM server to be: every route right or refused with a reason, the routes described,
requests in the log, the load, the metrics."""

import json
import socket
import time
import urllib.parse
import urllib.request
from functools import cache

import pytest
from drawn_images import coco, data_url, drawn_images, texts
from hostile import CHAT, REGIONS, flat_image, png_header
from test_variants import url_of

COMPLETIONS, MESSAGES = "/v1/completions", [{"role": "user", "content": "What is this?"}]
PROMPT = {"prompt": "A star", "max_tokens": 8}
CHATTING = {"messages": MESSAGES, "max_tokens": 8}


@cache
def request_body() -> dict:
    image, regions = drawn_images(4)[3]
    return {"image": data_url(image), "regions": coco(image, regions)}


def region_chat(**options) -> dict:
    content = [{"type": "image_url", "image_url": {"url": request_body()["image"]}}]
    extra = {"mm_processor_kwargs": {"regions": request_body()["regions"]}}
    return {"messages": [{"role": "user", "content": content}], **extra, **options}


def long_address() -> dict:
    return {"type": "image_url", "image_url": {"url": "http://" + "a" * 2**20}}


@cache
def refusals() -> dict[str, tuple[str, dict | bytes, str]]:
    zigzag = [side for k in range(60000) for side in ((-15 if k % 2 else 15) * 200, k % 100)]
    return {
        "polygon of many points": (REGIONS, request_body() | {"regions": [{"segmentation": [zigzag]}]}, "outline"),
        "polygon of more": (REGIONS, request_body() | {"regions": [{"segmentation": [[5] * 140000]}]}, "body_values"),
        "long run lengths": (
            REGIONS,
            request_body() | {"regions": [{"segmentation": {"size": [9, 9], "counts": "1" * (2**20 + 1)}}]},
            "at most 1048576 (rle_bytes)",
        ),
        "large image": (REGIONS, request_body() | {"image": url_of(flat_image(12000, "PNG"))}, "at most 67108864"),
        "large image in chat": (
            CHAT,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": url_of(png_header(12000, 12000))}}],
                    }
                ]
            },
            "at most 67108864",
        ),
        "many images in chat": (
            CHAT,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": url_of(png_header(8192, 8192))}}] * 9,
                    }
                ]
            },
            "at most 536870912 are read (request_pixels)",
        ),
        "many pixels": (
            REGIONS,
            {"image": url_of(flat_image(6000, "PNG")), "regions": [[0, 0, 9, 9]] * 20},
            "at most 536870912 a request (request_pixels)",
        ),
        "body of escapes": (REGIONS, b'{"image": "' + b"\\n" * (2**19 + 1) + b'"}', "backslashes (body_escapes)"),
        "long address": (REGIONS, request_body() | {"image": "http://" + "a" * 2**20}, "at most 8192 (url_length)"),
        "long address in chat": (
            CHAT,
            {"messages": [{"role": "user", "content": [long_address()]}]},
            "at most 8192 (url_length)",
        ),
        "long question": (REGIONS, request_body() | {"question": "why " * 2**20}, "4194304 characters"),
        "long id": (REGIONS, request_body() | {"regions": [{"id": "a" * 300, "bbox": [0, 0, 9, 9]}]}, "`id` has 300"),
        "many messages": (CHAT, {"messages": [{}] * 5000}, "4096 values beside its regions (other_values)"),
        "many tokens": (COMPLETIONS, {"prompt": [1] * 5000}, "4096 values (other_values)"),
        "many turns": ("/v1/responses", {"input": [{}] * 33}, "has 33 items; /v1/responses takes at most 32"),
        "large body": (REGIONS, b'{"image": "' + b"A" * 2**25 + b'"}', "33554432 bytes (body_bytes)"),
        "NaN": (REGIONS, json.dumps(request_body() | {"regions": [[0, 0, float("nan"), 5]]}).encode(), "JSON"),
        "huge box": (REGIONS, request_body() | {"regions": [[0, 0, 10**400, 5]]}, "too large"),
        "logprobs of completions": (COMPLETIONS, PROMPT | {"logprobs": 1}, "`logprobs` is not served"),
        "logprobs of a stream": (COMPLETIONS, PROMPT | {"logprobs": 1, "stream": True}, "`logprobs` is not served"),
        "prompt_logprobs": (COMPLETIONS, PROMPT | {"prompt_logprobs": 1}, "`prompt_logprobs` is not served"),
        "beam search": (COMPLETIONS, PROMPT | {"use_beam_search": True}, "not served"),
        "beam search in chat": (CHAT, CHATTING | {"use_beam_search": True}, "`use_beam_search` is not served"),
        "beam search by /invocations": ("/invocations", CHATTING | {"use_beam_search": True}, "not served"),
        "two answers": (COMPLETIONS, PROMPT | {"n": 2}, "`n` must be 1"),
        "top_p": (COMPLETIONS, PROMPT | {"top_p": 0.5}, "`top_p` has no meaning"),
        "no tokens": (CHAT, CHATTING | {"max_tokens": 0}, "`max_tokens` must be a positive integer, got 0"),
        "engine's settings": (
            COMPLETIONS,
            PROMPT | {"vllm_xargs": {"pdlm_report": 1}},
            "`pdlm_report` has no meaning",
        ),
        "a canvas": (COMPLETIONS, PROMPT | {"vllm_xargs": {"diffusion_seed_canvas": [1]}}, "has no meaning"),
        "region tokens": (COMPLETIONS, PROMPT | {"prompt": "<|reserved_token_0|>" * 16}, "/v1/region_captions"),
        "scores": ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}, "`logprobs`"),
        "image as a number": (REGIONS, request_body() | {"image": 5}, "valid string"),
        "many regions of no kind": (REGIONS, request_body() | {"regions": [5] * 70}, "70 regions, but"),
        "regions as a number": (REGIONS, request_body() | {"regions": 5}, "valid list"),
        "image_url without a url": (
            CHAT,
            region_chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"src": "x"}}]}]),
            "image_url",
        ),
        "tools with regions": (CHAT, region_chat(stop=["."]), "`stop` has no meaning with regions"),
        "few tokens for regions": (CHAT, region_chat(max_tokens=2), "less than a token for each of the 4 regions"),
        "settings of another type": (CHAT, CHATTING | {"structured_outputs": "x"}, "not what this route takes"),
        "settings of completions": (COMPLETIONS, PROMPT | {"structured_outputs": "x"}, "not what this route takes"),
        "settings of /invocations": ("/invocations", PROMPT | {"structured_outputs": "x"}, ""),
        "scaling of experts": ("/scale_elastic_ep", {"new_data_parallel_size": 2}, "no experts"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_served_is_refused_with_a_reason(server, name):
    path, body, message = refusals()[name]
    status, text = server.post(path, body)
    error = json.loads(text)["error"]
    assert status == error["code"] == 400, text
    assert message in error["message"] and len(text) < 2000


def test_vllms_routes_write_what_transformers_writes(server, captioner):
    """Every route that writes, with the same question: completions, chat and its like, responses, messages."""
    processor, model = captioner.processor, captioner.model
    inputs = processor(text=MESSAGES[0]["content"])
    out = model.generate(**inputs, max_new_tokens=8, acceptance_threshold=None)
    expected = processor.post_process_answers(out)[0].strip()
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    ways = {
        COMPLETIONS: (PROMPT | {"prompt": prompt, "temperature": 0}, lambda a: a["choices"][0]["text"]),
        CHAT: (CHATTING, lambda a: a["choices"][0]["message"]["content"]),
        "/v1/chat/completions/batch": (
            CHATTING | {"messages": [MESSAGES, MESSAGES], "temperature": 0},
            lambda a: a["choices"][1]["message"]["content"],
        ),
        "/v1/responses": (
            {"input": MESSAGES[0]["content"], "max_output_tokens": 8, "temperature": 0},
            lambda a: a["output"][0]["content"][0]["text"],
        ),
        "/v1/messages": (CHATTING | {"model": "shapes", "temperature": 0}, lambda a: a["content"][0]["text"]),
        "/invocations": (CHATTING | {"temperature": 0}, lambda a: a["choices"][0]["message"]["content"]),
    }
    found = {}
    for path, (body, text_of) in ways.items():
        status, text = server.post(path, body)
        assert status == 200, (path, text)
        found[path] = text_of(json.loads(text)).strip()
    assert found == dict.fromkeys(ways, expected)
    status, text = server.post("/tokenize", {"messages": MESSAGES})
    assert json.loads(text)["tokens"] == inputs["input_ids"][0].tolist()
    status, text = server.post("/detokenize", {"tokens": inputs["input_ids"][0].tolist()})
    assert json.loads(text)["prompt"] == prompt


@pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings", "/score", "/classify", "/rerank"])
def test_routes_of_other_kinds_of_models_are_not_there(server, path):
    assert server.post(path, {"input": "Hi", "text_1": "a", "text_2": "b"})[0] == 404


def test_ordinary_openai_fields_are_accepted(server, captioner):
    image, regions = drawn_images(4)[3]
    expected = texts(captioner.caption(image, regions))
    extra = {"user": "someone", "priority": 0}
    answer = server.captions(request_body() | extra | {"max_tokens": 400})
    assert [row["caption"] for row in answer["regions"]] == expected
    status, text = server.post(CHAT, region_chat(**extra, max_tokens=400))
    assert status == 200 and json.loads(json.loads(text)["choices"][0]["message"]["content"]) == expected
    short = texts(captioner.caption(image, regions, max_new_tokens=5))  # 22 // 4
    assert [row["caption"] for row in server.captions(request_body() | {"max_tokens": 22})["regions"]] == short
    status, text = server.post(CHAT, region_chat(max_completion_tokens=22))
    choice = json.loads(text)["choices"][0]
    assert json.loads(choice["message"]["content"]) == short and choice["finish_reason"] == "length"


def test_a_streamed_region_chat_ends_with_the_usage_if_asked(server):
    def events(**options) -> list[dict]:
        _, text = server.post(CHAT, region_chat(stream=True, **options))
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    assert ["usage" in event for event in events()] == [False]
    first, last = events(stream_options={"include_usage": True})
    assert len(json.loads(first["choices"][0]["delta"]["content"])) == 4
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 4


def test_the_id_of_a_request_is_that_of_the_client(server):
    data = json.dumps(request_body()).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": "my-7"}
    with urllib.request.urlopen(urllib.request.Request(server.url + REGIONS, data, headers)) as answer:
        body = json.load(answer)
    assert body["id"] == "regions-my-7" and abs(body["created"] - time.time()) < 60
    time.sleep(0.5)
    log = server.log.read_text()
    assert "Received request regions-my-7-0" in log
    assert "Generated response regions-my-7" in log and body["regions"][0]["caption"] in log


def test_the_route_is_described_as_it_is(server):
    schema = json.loads(server.get("/openapi.json"))
    route, parts = schema["paths"][REGIONS]["post"], schema["components"]["schemas"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RegionCaptionsRequest")
    fields = parts["RegionCaptionsRequest"]["properties"]
    assert fields["max_new_tokens"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    assert {"image", "regions", "question", "stream", "user", "priority", "max_tokens"} < set(fields)
    assert set(route["responses"]) == {"200", "4XX", "5XX"}
    content = route["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/RegionCaptionsResponse")
    assert "text/event-stream" in content
    assert set(parts["RegionCaptionsResponse"]["properties"]) == set(server.captions(request_body()))
    assert route["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert set(schema["paths"][CHAT]["post"]["responses"]) == {"200", "4XX", "5XX"}


def wait_without_load(server) -> None:
    """A request is a part of the load until shortly after its answer."""
    for _ in range(100):
        if json.loads(server.get("/load"))["server_load"] == 0:
            return
        time.sleep(0.1)
    raise AssertionError("the load stays")


def test_the_load_counts_region_requests(server):
    """While a stream is not read to its end it is a part of the load."""
    wait_without_load(server)
    data = json.dumps(request_body() | {"stream": True, "max_new_tokens": 64, "acceptance_threshold": None}).encode()
    request = urllib.request.Request(server.url + REGIONS, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        answer.readline()
        assert json.loads(server.get("/load"))["server_load"] == 1
        answer.read()
    wait_without_load(server)
    with urllib.request.urlopen(request) as answer:  # the client goes away in the middle
        answer.readline()
    wait_without_load(server)
    with socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(server.url).port)) as early:  # and before that
        head = f"POST {REGIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        early.sendall(f"{head}\r\n\r\n".encode() + data)
    wait_without_load(server)


def test_metrics_have_vllms_labels(server):
    server.captions(request_body())
    lines = server.get("/metrics").splitlines()
    for name in ("pdlm:regions_total", "pdlm:denoising_steps_count", "pdlm:tokens_per_forward_sum"):
        (line,) = [line for line in lines if line.startswith(name)]
        assert 'model_name="shapes"' in line and 'engine="0"' in line
