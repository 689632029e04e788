"""A made-up row of each benchmark in the form of both harnesses, and the prompts that were recorded for it.

The prompts in results/prompts.json come from the harnesses' own builders (VLMEvalKit at e8e78f05, lmms-eval 0.7.3):

    python tests/evalkit/prompt_rows.py vlmeval|lmms       # in the environment of the harness: records its part anew
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from PIL import Image  # noqa: E402

from pdlm_evalkit.benchmarks import BENCHMARKS, find_benchmark  # noqa: E402

PROMPTS = HERE / "results" / "prompts.json"
IMAGE = Image.new("RGB", (32, 32), "red")
OPTIONS = {"A": "red", "B": "dark blue"}
QUESTION = {"question": "Which colour?", **OPTIONS, "answer": "A"}

# VLMEvalKit: the columns that its own builders read; images: how many the row has
VLMEVAL: dict[str, dict[str, Any]] = {benchmark.name: dict(QUESTION) for benchmark in BENCHMARKS}
VLMEVAL["MMBench"] |= {"hint": "Look at the sky."}
VLMEVAL["MMMU"] |= {"question": "Compare <image 1> with <image 2>.", "A": "<image 3>", "images": 3}
VLMEVAL["BLINK"] |= {"question": "Which is closer?\nSelect from the following choices.", "images": 2}
VLMEVAL["CV-Bench-2D"] |= {"prompt": "Which colour? Select from the following choices.\n(A) red\n(B) dark blue"}
for _name in ("ChartQA", "DocVQA", "InfoVQA", "HallusionBench"):
    VLMEVAL[_name] = {"question": "Is it red?", "answer": "Yes"}
for _name in ("MathVista", "MathVerse Vision-Only"):
    VLMEVAL[_name] = {"question": "Hint: Give the number.\nQuestion: How many?", "answer": "7"}

# lmms-eval: the fields of its data sets
_IMAGE = {"image": IMAGE}
LMMS: dict[str, dict[str, Any]] = {
    "MMStar": _IMAGE | {"question": "Which colour?\nOptions: A: red, B: dark blue", "answer": "A"},
    "SeedBench": {"image": [IMAGE], "question": "Which colour?", "choice_a": "red", "choice_b": "dark blue"}
    | {"choice_c": "green", "choice_d": "white"},
    "MMBench": _IMAGE | QUESTION | {"hint": "Look at the sky.", "category": "c", "L2-category": "l", "index": 1}
    | {"source": "s", "split": "dev"},
    "MMMU": {"question": "Compare <image 1> with <image 2>.", "question_type": "multiple-choice"}
    | {"options": "['<image 3>', 'dark blue']", **{f"image_{k}": IMAGE for k in (1, 2, 3)}},
    "MathVista": {"decoded_image": IMAGE, "question": "How many?", "question_type": "free_form", "choices": []}
    | {"answer_type": "integer", "answer": "7", "precision": 0, "unit": ""},
    "MathVerse Vision-Only": _IMAGE | {"question": "", "query_wo": "Please answer from the image.", "query_cot": "q"}
    | {"question_type": "free-form", "problem_version": "Vision Only", "answer": "7"},
    "AI2D": _IMAGE | {"question": "Which colour?", "options": ["red", "dark blue"]},
    "MMVP": _IMAGE | {"Question": "Which colour?", "Options": "(a) red (b) dark blue"},
    "BLINK": {"image_1": IMAGE, "image_2": IMAGE, "image_3": None, "choices": ["red", "dark blue"]}
    | {"prompt": "Which is closer?\nSelect from the following choices.\n(A) red\n(B) dark blue"},
    "RealWorldQA": _IMAGE | {"question": "Which colour?\nA. red\nB. dark blue\nPlease answer directly with only the "
                             "letter of the correct option and nothing else."},
    "CV-Bench-2D": _IMAGE | {"prompt": VLMEVAL["CV-Bench-2D"]["prompt"], "choices": ["red", "dark blue"]},
    "HallusionBench": _IMAGE | {"question": "Is it red?"},
    "V*": _IMAGE | {"text": "Which colour? (A) red (B) dark blue"},
}  # fmt: skip
LMMS |= {name: _IMAGE | {"question": "Is it red?"} for name in ("ChartQA", "DocVQA", "InfoVQA")}


def vlmeval_prompts() -> dict[str, dict[str, Any]]:
    """Prompts in VLMEvalKit, and those of its InternVL wrapper, whose copy the reference is."""
    from vlmeval.vlm.internvl.utils import build_multi_choice_prompt, reorganize_prompt

    from pdlm_evalkit.benchmarks import place_images
    from pdlm_evalkit.vlmeval_model import PerceptionDLM

    model = object.__new__(PerceptionDLM)
    model.answerer = SimpleNamespace(presets="paper", benchmark=find_benchmark)
    found = {}
    for benchmark in BENCHMARKS:
        row = dict(VLMEVAL[benchmark.name])
        images = row.pop("images", 1)
        model.dump_image = lambda line, dataset, images=images: [f"{k}.png" for k in range(images)]
        assert model.use_custom_prompt(benchmark.vlmeval)
        message = model.build_prompt(row, benchmark.vlmeval)
        text = place_images([None if part["type"] == "image" else part["value"] for part in message])
        found[benchmark.name] = {"images": images, "text": text, "internvl": reorganize_prompt(message, images)}
        if benchmark.kind == "letter":
            found[benchmark.name]["internvl_letter"] = build_multi_choice_prompt(row)
    return found


def lmms_prompts() -> dict[str, dict[str, Any]]:
    """Prompts in both interfaces of lmms-eval, and the text that the task itself writes."""
    os.environ.setdefault("OPENAI_API_KEY", "none")  # MathVista of lmms-eval wants one when it is imported
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask, TaskConfig
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    from pdlm_evalkit.lmms import PdlmChat, PdlmSimple

    index, found = TaskManager("ERROR").task_index, {}
    for benchmark in BENCHMARKS:
        name = "blink_relative_depth" if benchmark.name == "BLINK" else benchmark.lmms
        config = load_yaml_config(index[name]["yaml_path"], mode="full")
        task = object.__new__(ConfigurableMessagesTask)
        task._config = TaskConfig(**config)
        task.lmms_eval_specific_kwargs = (config.get("lmms_eval_specific_kwargs") or {}).get("default")
        task.features, task.prompt, task.multiple_input = [], None, False
        doc = LMMS[benchmark.name]
        context = task.doc_to_text(doc)
        asked = {"max_new_tokens": benchmark.max_new_tokens}
        texts = []
        for kind, middle in ((PdlmSimple, (asked, task.doc_to_visual)), (PdlmChat, (task.doc_to_messages, asked))):
            model = object.__new__(kind)
            model.answerer, model.task_dict = SimpleNamespace(benchmark=find_benchmark), {name: {"s": [doc]}}
            request = Instance(
                "generate_until", (context, *middle, 0, name, "s"), 0, {"task": name, "doc_id": 0, "repeats": 1}
            )
            text, settings, images, _ = model._read(request)
            texts.append((model._question(text, settings, images, name).text, len(images)))
        (simple, count), (chat, _) = texts
        assert texts[0] == texts[1], texts
        found[benchmark.name] = {"images": count, "text": chat, "task": context}
    return found


if __name__ == "__main__":
    recorded = json.loads(PROMPTS.read_text()) if PROMPTS.is_file() else {}
    recorded[sys.argv[1]] = {"vlmeval": vlmeval_prompts, "lmms": lmms_prompts}[sys.argv[1]]()
    PROMPTS.write_text(json.dumps(recorded, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
