"""Answers of several blocks leave the engine block by block, and end where a stop string or the end of turn stands."""

import json

import pytest
from drawn_images import data_url
from engines import engine
from server import serve
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from pdlm_hf import BASE_CHECKPOINT
from pdlm_hf.shapes.evaluate_base import held_out_question

CASES = [held_out_question(7, index, "describe") for index in range(2)] + [held_out_question(7, 0, "reasoning")]
LENGTH = 32


@pytest.fixture(scope="module")
def answers():
    """transformers' answers by case and block length."""
    model = AutoModelForImageTextToText.from_pretrained(BASE_CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(BASE_CHECKPOINT)

    def answer(case: int, block_length: int) -> str:
        image, question = CASES[case]
        inputs = processor(images=image, text=question.text)
        settings = {"max_new_tokens": LENGTH, "block_length": block_length, "acceptance_threshold": None}
        return processor.post_process_answers(model.generate(**inputs, **settings))[0]

    return answer


@pytest.fixture(scope="module")
def llm():
    with engine(BASE_CHECKPOINT) as started:
        yield started


def deltas(llm: LLM, block_length: int, **settings) -> tuple[list[list[str]], list]:
    """What the engine hands out piece by piece for all cases at once, and its last outputs."""
    extra = {"block_length": block_length}
    pieces, last = [[] for _ in CASES], [None] * len(CASES)
    for case, (image, question) in enumerate(CASES):
        text = f"<img><IMG_CONTEXT></img>\n{question.text}"
        chat = [{"role": "user", "content": text}]
        ids = llm.get_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        params = SamplingParams(
            max_tokens=LENGTH, output_kind=RequestOutputKind.DELTA, extra_args=dict(extra), **settings
        )
        llm.llm_engine.add_request(str(case), prompt, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            case = int(output.request_id.split("-")[0])
            pieces[case].append(output.outputs[0].text)
            last[case] = output
    return pieces, last


@pytest.mark.parametrize("block_length", [4, 8, 1])
def test_blocks_make_up_the_answer(llm, answers, block_length):
    pieces, last = deltas(llm, block_length)
    for case, found in enumerate(pieces):
        assert "".join(found).strip() == answers(case, block_length)
        assert len(found) > 1 and last[case].finished
        # the end of turn came before the last block: nothing behind its block was computed
        assert (last[case].outputs[0].finish_reason, len(found)) == ("stop", len(found))
        assert len(found) <= LENGTH // block_length


def test_a_stop_string_ends_the_answer_at_its_block(llm, answers):
    whole = answers(0, 4)
    word = whole.split()[2]
    pieces, last = deltas(llm, 4, stop=[word])
    assert "".join(pieces[0]) == whole.split(word)[0]
    assert (last[0].outputs[0].finish_reason, last[0].outputs[0].stop_reason) == ("stop", word)
    all_pieces, _ = deltas(llm, 4)
    assert len(pieces[0]) < len(all_pieces[0])


@pytest.mark.slow
def test_streams_over_http(answers, tmp_path):
    with serve(BASE_CHECKPOINT, tmp_path / "server.log") as server:
        for case, (image, question) in enumerate(CASES):
            content = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
            content.append({"type": "text", "text": question.text})
            request = {"messages": [{"role": "user", "content": content}], "max_tokens": LENGTH, "block_length": 4}
            whole = json.loads(server.post("/v1/chat/completions", request)[1])
            assert whole["choices"][0]["message"]["content"].strip() == answers(case, 4)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            status, text = server.post("/v1/chat/completions", request | options)
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
            chunks = [json.loads(line) for line in lines[:-1]]
            pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]
            assert status == 200 and lines[-1] == "[DONE]"
            assert "".join(filter(None, pieces)).strip() == answers(case, 4)
            assert len(list(filter(None, pieces))) > 2
            assert chunks[-1]["usage"] == {k: v for k, v in whole["usage"].items() if v is not None}
            word = whole["choices"][0]["message"]["content"].split()[1]
            cut = json.loads(server.post("/v1/chat/completions", request | {"stop": [word]})[1])
            assert cut["choices"][0]["stop_reason"] == word
            assert cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
