"""What the model reads in lmms-eval: each benchmark's own prompt builder, both interfaces, images inside the text."""

import json
from types import SimpleNamespace

import pytest
from lmms_eval.api.instance import Instance
from PIL import Image
from prompt_rows import PROMPTS, lmms_prompts

from pdlm_evalkit.benchmarks import BENCHMARKS, find_benchmark
from pdlm_evalkit.check import _lmms_repository
from pdlm_evalkit.lmms import PdlmChat


def test_prompts_of_all_sixteen(monkeypatch):
    """Chat and simple interface send the same text, the one that was recorded."""
    assert lmms_prompts() == json.loads(PROMPTS.read_text())["lmms"]


def read(task, context, *parts):
    model = object.__new__(PdlmChat)
    model.answerer, model.task_dict = SimpleNamespace(benchmark=find_benchmark), {task: {"s": [{}]}}
    image = Image.new("RGB", (8, 8))
    content = [{"type": "image", "url": image} if part is None else {"type": "text", "text": part} for part in parts]
    arguments = (context, lambda doc: [{"role": "user", "content": content}], {}, 0, task, "s")
    metadata = {"task": task, "doc_id": 0, "repeats": 1}
    text, _, images, _ = model._read(Instance("generate_until", arguments, 0, metadata))
    return text, len(images)


@pytest.mark.parametrize("parts, text, images", [
    (("Compare", None, "with", None, "?"), "Compare<Image-1>with<Image-2>?", 2),
    ((None, None, "Which is closer?"), "Which is closer?", 2),
    ((None, "Which?"), "Which?", 1),
    (("Look at", None, "Which?"), "Look at\nWhich?", 1),
])  # fmt: skip
def test_places_of_images(parts, text, images):
    assert read("any_task", "", *parts) == (text, images)


def test_mmmu_keeps_its_own_marks():
    """Its messages would put the first image in the place of the second."""
    context = "Compare <image 2> with <image 1>.\nA. <image 3>"
    parts = ("Compare", None, "with", None, ".\nA.", None, "")
    assert read("mmmu_val", context, *parts) == (context, 3)


def test_the_data_of_all_sixteen_is_looked_for():
    found = {benchmark.name: _lmms_repository(benchmark.lmms) for benchmark in BENCHMARKS}
    assert found["MMStar"] == ("Lin-Chen/MMStar", "val")
    assert found["BLINK"][0] == "BLINK-Benchmark/BLINK" and found["MathVista"][0] == "AI4Math/MathVista"
    assert all("/" in repository for repository, _ in found.values())
    with pytest.raises(ValueError, match="no task none_such"):
        _lmms_repository("none_such")
