"""PerceptionDLM as a model of VLMEvalKit. Only [`vlmeval_run`] imports it, since VLMEvalKit has no plugins."""

import hashlib
import json
import os
import string
from pathlib import Path
from typing import Any

from vlmeval.dataset import DATASET_MODALITY, DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from pdlm_hf.regions.files import read_rows

from .answering import Answerer, Question
from .benchmarks import DIRECT, LETTER, SUFFIX, Benchmark, place_images
from .manifests import log_answer, models_of, note_model

_CHINESE_LETTER, _CHINESE_DIRECT = "\n请直接回答选项字母。", "\n请直接回答问题。"
_SEVERAL_ROUNDS = ("MMDU", "MME-RealWorld", "WeMath_COT", "MMAlignBench")


class PerceptionDLM(BaseModel):
    """A checkpoint with the paper's settings and prompts for the paper's benchmarks.

    Args:
        pretrained (`str`): folder, hub id, "shapes" or "shapes_base".
        device (`str`, *optional*): default: the GPU of this rank, if there is one.
        dtype (`str`): as in `from_pretrained`.
        presets (`str`): "paper", or "none": the reference's general settings everywhere.
        log (`str`, *optional*): file to append a JSON line per answer to, with tokens, forward passes and seconds.
        kept (`list[str]`, *optional*): such files of earlier attempts with the same settings; their questions are not
            asked again.
        **settings: settings of `generate`, and arguments of [`Answerer`]; they take precedence over the benchmark's.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        presets: str = "paper",
        log: str | None = None,
        kept: list[str] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.answerer = Answerer.from_pretrained(pretrained, device=device, dtype=dtype, presets=presets, **settings)
        self.log = Path(log) if log else None
        self.kept: dict[str, list[str]] = {}  # the texts of answers by question, which a data set may have twice
        for row in (row for path in kept or () for row in read_rows(Path(path))):
            self.kept.setdefault(row.get("key", ""), []).append(row["text"])
        self.rank = int(os.environ.get("RANK", 0))
        if self.log is not None and not self.rank:
            note_model(models_of(self.log), self.answerer.model, pretrained)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether [`build_prompt`] writes the question; it does for single questions about images."""
        if self.answerer.presets != "paper" or any(name in dataset for name in _SEVERAL_ROUNDS):
            return False
        return DATASET_MODALITY(dataset) != "VIDEO" and DATASET_TYPE(dataset) in ("MCQ", "Y/N", "VQA")

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """Write a row of a data set as a message, in the reference's wording.

        Args:
            line: the row, with question, answer options and image.
            dataset (`str`): the name of the data set.
        """
        images = self.dump_image(line, dataset)
        images = images if isinstance(images, list) else [images]
        text = question_text(line, DATASET_TYPE(dataset), self.answerer.benchmark(dataset))
        return [{"type": "text", "value": text}, *({"type": "image", "value": path} for path in images)]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one message; the answer is post-processed as in the reference."""
        images = [part["value"] for part in message if part["type"] == "image"]
        text = place_images([None if part["type"] == "image" else part["value"] for part in message])
        key = key_of(dataset, text, images)
        if self.kept.get(key):
            return self.kept[key].pop(0)
        question = Question(images, text, self.answerer.benchmark(dataset))
        answer = self.answerer.answer([question])[0]
        if self.log is not None:
            more = {"key": key, "rank": self.rank}
            log_answer(self.log, dataset, answer, self.answerer.effective_settings(question), **more)
        return answer.text


def key_of(dataset: str | None, text: str, images: list[str]) -> str:
    """A hash of a question: name of the data set, text, and contents of the images."""
    parts = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in images]
    return hashlib.sha256(json.dumps([dataset, text, *parts]).encode()).hexdigest()


def question_text(line: Any, kind: str, benchmark: Benchmark | None) -> str:
    """Write the question of a row in the reference's wording.

    Args:
        line: mapping with `question`, and possibly `hint` and the options `A`, `B`, ...
        kind (`str`): the type in VLMEvalKit: "MCQ", "Y/N" or "VQA".
        benchmark (`Benchmark`, *optional*): the benchmark of the paper.
    """
    question = str(line["question"])
    if kind == "MCQ":
        if "hint" in line and not _absent(line["hint"]):
            question = f"{line['hint']}\n{question}"
        options = [c for c in string.ascii_uppercase if c in line and not _absent(line[c])]
        question += "".join(f"\n{letter}. {line[letter]}" for letter in options)
        if benchmark is not None and benchmark.prompt_suffix is not None:
            return question + benchmark.prompt_suffix
        if any("\u4e00" <= character <= "\u9fff" for character in question):
            return question + (_CHINESE_LETTER if options else _CHINESE_DIRECT)
        return question + (LETTER if options else DIRECT)
    if benchmark is not None:
        return question + benchmark.suffix
    return question + (SUFFIX["free"] if kind == "VQA" else "")


def _absent(value: Any) -> bool:
    """Whether a cell of a table is empty: None, or NaN, which differs from itself."""
    return value is None or value != value
