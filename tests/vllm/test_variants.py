"""Images of every mode, format and orientation, and questions to the letter: the captions of transformers, or a
refusal where it refuses."""

import base64
import json
from functools import cache

import pytest
from drawn_images import drawn_images, texts
from image_variants import image_variants
from server import serve

from pdlm_hf import RegionCaptioner
from pdlm_hf.errors_pdlm import PdlmError
from pdlm_hf.regions.images import load_image

BOXES = [[4, 4, 40, 40], [30, 20, 50, 60]]
QUESTIONS = ["  What is this?", "What is this?\n", "\tWhat  is this ?  ", " ", "", "What , is this ."]


@cache
def variants() -> dict[str, bytes]:
    return image_variants(next(image for image, _ in drawn_images(16) if min(image.size) >= 96))


@pytest.fixture(scope="module", params=["shapes", pytest.param("full", marks=pytest.mark.slow)])
def both(request, captioner, reference_folder, tmp_path_factory):
    """A server and transformers on the same checkpoint."""
    if request.param == "shapes":
        yield request.getfixturevalue("server"), captioner
        return
    with serve(reference_folder, tmp_path_factory.mktemp("full") / "server.log") as running:
        yield running, RegionCaptioner.from_pretrained(reference_folder, device="cpu")


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(image_url: str, question: str | None, **options) -> dict:
    content = [{"type": "image_url", "image_url": {"url": image_url}}]
    if question is not None:
        content.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": content}], **options}


def served(server, path: str, body: dict):
    """What the server writes, or None if it refuses with a reason."""
    status, text = server.post(path, body)
    if status == 400:
        assert json.loads(text)["error"]["message"]
        return None
    assert status == 200, text
    answer = json.loads(text)
    if path.endswith("region_captions"):
        return [row["caption"] for row in answer["regions"]]
    return answer["choices"][0]["message"]["content"]


def ours(captioner, source, question: str | None = None):
    try:
        return texts(captioner.caption(source, BOXES, question=question))
    except PdlmError:
        return None


def chatted(captioner, source, question: str):
    try:
        inputs = captioner.processor(images=load_image(source), text=question)
    except PdlmError:
        return None
    out = captioner.model.generate(**inputs, max_new_tokens=8, acceptance_threshold=None)
    return captioner.processor.post_process_answers(out)[0].strip()


def test_there_are_enough_variants():
    assert len(variants()) >= 60


@pytest.mark.parametrize("name", variants())
def test_an_image_is_read_as_by_transformers(both, tmp_path, name):
    server, captioner = both
    data = variants()[name]
    file = tmp_path / "image"
    file.write_bytes(data)
    expected = ours(captioner, file)
    body = {"image": url_of(data), "regions": BOXES}
    assert served(server, "/v1/region_captions", body) == expected
    through_chat = served(
        server, "/v1/chat/completions", chat(url_of(data), None, mm_processor_kwargs={"regions": BOXES})
    )
    assert (through_chat and json.loads(through_chat)) == expected
    answer = served(server, "/v1/chat/completions", chat(url_of(data), "What is this?", max_tokens=8))
    assert (answer if answer is None else answer.strip()) == chatted(captioner, file, "What is this?")


@pytest.mark.parametrize("question", QUESTIONS, ids=repr)
def test_a_question_is_taken_to_the_letter(both, tmp_path, question):
    server, captioner = both
    file = tmp_path / "image.png"
    file.write_bytes(variants()["PNG RGB"])
    url = url_of(variants()["PNG RGB"])
    expected = texts(captioner.caption(file, BOXES, question=question))
    body = {"image": url, "regions": BOXES, "question": question}
    assert served(server, "/v1/region_captions", body) == expected
    through_chat = served(server, "/v1/chat/completions", chat(url, question, mm_processor_kwargs={"regions": BOXES}))
    assert json.loads(through_chat) == expected
    answer = served(server, "/v1/chat/completions", chat(url, question, max_tokens=8))
    assert answer.strip() == chatted(captioner, file, question)
