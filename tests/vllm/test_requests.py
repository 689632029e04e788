"""From an image and its regions to engine requests, without an engine."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_images import drawn_images
from pycocotools import mask as coco_mask
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import GracefulHTTPError

from pdlm_hf import CHECKPOINT, PdlmConfig, PdlmProcessor
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions import region as region_module
from pdlm_vllm.doors import check_chat
from pdlm_vllm.plan import DEFAULT_TOKENS, chat_room, defaults_of
from pdlm_vllm.processing import check_length
from pdlm_vllm.requests import read_report, region_requests
from pdlm_vllm.service import Service

BOXES = [[2, 2, 30, 30], [10, 5, 20, 25]]
CONFIG = PdlmConfig.from_pretrained(CHECKPOINT)
DEFAULTS = defaults_of(str(CHECKPOINT))


@pytest.fixture(scope="module")
def processor():
    return PdlmProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def image():
    return drawn_images(1)[0][0]


def masks_of(image, boxes):
    masks = np.zeros((len(boxes), image.height, image.width), dtype=bool)
    for mask, (x, y, width, height) in zip(masks, boxes, strict=True):
        mask[y : y + height, x : x + width] = True
    return masks


def as_rle(masks):
    """COCO regions as a client sends them."""
    rles = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"id": k, "segmentation": rle | {"counts": rle["counts"].decode()}} for k, rle in enumerate(rles)]


def test_masks_are_decoded_once(processor, image, monkeypatch):
    masks = masks_of(image, BOXES)
    regions = as_rle(masks)
    decode, decoded = region_module._from_rle, []
    monkeypatch.setattr(region_module, "_from_rle", lambda rle, *of: decoded.append(rle) or decode(rle, *of))
    monkeypatch.setattr(coco_mask, "encode", lambda mask: pytest.fail("a mask was encoded again"))
    (work,) = region_requests(processor, CONFIG, DEFAULTS, image, regions)
    sent = work.prompt["mm_processor_kwargs"]["regions"]
    assert len(decoded) == 2
    assert all(mask.dtype == bool and np.array_equal(mask, given) for mask, given in zip(sent, masks, strict=True))
    assert sorted(work.positions) == [0, 1] and [region.id for region in work.regions] == work.positions


def test_prompt_and_captions_fit_the_positions(processor, image, monkeypatch):
    inputs = processor(images=image, segmentation_maps=list(masks_of(image, BOXES)), text="What?")
    longest = inputs["input_ids"].shape[1] + 2 * (20 + 2)
    arguments = (processor, CONFIG, DEFAULTS, image, BOXES, "What?")
    monkeypatch.setattr(CONFIG.text_config, "max_position_embeddings", longest)
    assert len(region_requests(*arguments, max_new_tokens=20)) == 1
    with pytest.raises(SettingError, match=f"its captions or answer 46; this server takes {longest} together"):
        region_requests(*arguments, max_new_tokens=21)
    monkeypatch.setattr(CONFIG, "served_length", longest - 1, raising=False)  # --max-model-len
    with pytest.raises(SettingError, match=f"its captions or answer 44; this server takes {longest - 1} together"):
        region_requests(*arguments, max_new_tokens=20)


def test_what_is_served_is_counted_together():
    most = CONFIG.text_config.max_position_embeddings
    check_length(CONFIG, most - 34, DEFAULT_TOKENS + 2)
    with pytest.raises(SettingError, match=f"The prompt has {most - 33} tokens and its captions or answer 34;"):
        check_length(CONFIG, most - 33, DEFAULT_TOKENS + 2)


def test_a_report_says_which_captions_were_cut(processor, image):
    (work,) = region_requests(processor, CONFIG, DEFAULTS, image, BOXES, max_new_tokens=3)
    word, end, newline = processor.tokenizer.convert_tokens_to_ids("A"), CONFIG.eot_token_id, CONFIG.newline_token_id
    first, second = CONFIG.caption_token_ids[:2]
    report = {
        "tokens": [first, word, end, end, newline, second, word, word, word, end],
        "logprobs": np.log([1, 0.5, 0.1, 0.1, 1, 1, 0.25, 0.5, 0.75, 1]).tolist(),
        "open": [0] * 8 + [1, 0],
        "steps": [2, 3],
    }
    reading = read_report(report, work, processor, CONFIG)
    found = [reading.captions[position] for position in work.positions]  # in the order of the blocks
    assert [caption.truncated for caption in found] == [False, True]
    assert [caption.score for caption in found] == pytest.approx([0.5, 0.5])
    assert [reading.closed[position] for position in work.positions] == [True, False]
    assert (reading.steps, reading.text_tokens) == (3, 4)


@pytest.mark.parametrize("given, expected", [({}, 50), ({"max_tokens": 50}, 50), ({"max_completion_tokens": 3}, 3)])
def test_a_chat_answer_fits_the_canvas(given, expected):
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], **given)
    check_chat(request, 50)
    assert (request.max_completion_tokens, request.max_tokens) == (expected, None)


def test_a_longer_answer_is_refused_not_cut():
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], max_tokens=204)
    with pytest.raises(SettingError, match="`max_tokens` 204 is more than the served canvas has room for: 203 tokens"):
        check_chat(request, chat_room(SimpleNamespace(cuda_graphs=True), 204))
    check_chat(request, chat_room(SimpleNamespace(cuda_graphs=False), 204))


def test_requests_under_way_hear_of_the_end():
    """vLLM ends its engine in a thread; nobody would wake those that wait for it."""
    heard, ended = [], []
    engine = SimpleNamespace(output_processor=SimpleNamespace(propagate_error=heard.append))

    async def end() -> None:
        parts = {"engine_shutdown": lambda timeout: ended.append(timeout), "engine_generate": lambda prompt: prompt}
        service = SimpleNamespace(engine=engine, loop=asyncio.get_running_loop(), over=False, **parts)
        assert Service.generate(service, "a") == "a"
        await asyncio.to_thread(Service._shut_down, service, timeout=7)
        await asyncio.sleep(0)
        with pytest.raises(GracefulHTTPError, match="shutting down"):
            Service.generate(service, "b")

    asyncio.run(end())
    assert ended == [7] and [error.http_status for error in heard] == [503]
