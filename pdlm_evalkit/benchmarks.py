"""The paper's 16 benchmarks: everything a run needs, and the paper's score.

Settings are those of the reference's harness copy (generation by benchmark, prompts by kind of question,
images by benchmark); scores are Table 1 of the paper.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

from pdlm_hf.errors_pdlm import SettingError

Kind = Literal["letter", "yes_no", "document", "math", "free"]

LETTER = "\nAnswer with the option's letter from the given choices directly."
DIRECT = "\nAnswer the question directly."
SUFFIX: dict[str, str] = {
    "letter": LETTER,
    "yes_no": " Please answer yes or no. Answer the question using a single word or phrase.",
    "document": "\n\nPlease reason step by step, and answer the question using a single word or phrase.",
    "math": "\n\n\nPlease reason step by step.",
    "free": "\nAnswer the question using a single word or phrase.",
}
# What the harnesses' own tasks ask for at the end of a question, without the last full stop.
HARNESS_SUFFIXES = (
    "Answer with the option's letter from the given choices directly",
    "Answer the question with a single word",
    "Answer the question using a single word or phrase",
    "Please answer directly with only the letter of the correct option and nothing else",
    "Please answer directly with a single word or number",
)
# What BLINK and CV-Bench of lmms-eval ask for before the question, and their options, in the paper "A. red".
_NOTE = re.compile(r"^Note: You only need to respond with [^\n]* without providing any additional information\.\s*")
_OPTION = re.compile(r"^\(([A-Z])\) ", re.MULTILINE)
_SELECT = re.compile(r"\s*Select from the following choices\.(?=\nA\. )")
TOTAL_TILES = 64  # all images of a question share them
_OTHERS = {"2", "pass64", "ppl", "reasoning"}  # in a task's name: another benchmark, or another way to ask
OVERRIDES = ("max_tiles", "upscale_first", "prompt_suffix", "shorten")  # what is no setting of `generate`


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with the paper's settings.

    Args:
        name (`str`): the name in Table 1.
        group (`str`): the group in Table 1.
        kind (`str`): the kind of question, which decides prompt suffix and post-processing.
        vlmeval (`str`): the name in VLMEvalKit.
        lmms (`str`): the task of lmms-eval.
        split (`str`): the split that the score is computed on.
        stock_judge, lmms_judge (`str`): how VLMEvalKit and lmms-eval score: "rules", "LLM", or "rules, then LLM".
        paper_judge (`str`): the judge of the paper, where it is a different one.
        max_new_tokens, block_length, max_denoising_steps (`int`): settings of `generate`; with block_length 1 the
            answer is written from left to right.
        upscale_first (`bool`): whether the first image is doubled in size.
        max_tiles (`int`): most tiles of an image, without the thumbnail; several images share [`TOTAL_TILES`].
        prompt_suffix (`str`, *optional*): the end of each question; default: that of its kind.
        shorten (`bool`): whether an answer that begins with "Yes", "No" or a letter is reduced to it.
        aliases (`tuple[str]`): further names in the harnesses.
        lmms_metric, vlmeval_metric (`str`): name of the score among all that the harness writes; names joined by "+"
            stand for their mean.
        lmms_percent, vlmeval_percent (`bool`): whether the harness writes percent instead of shares. (The main score
            of VLMEvalKit, `primary_metric_value`, is in percent or not, depending on class and columns of the data.)
        paper (`float`): score of PerceptionDLM-Base in Table 1, in percent.
        unverifiable (`str`): what neither the paper nor its repository says.
    """

    name: str
    group: str
    kind: Kind
    vlmeval: str
    lmms: str
    split: str
    stock_judge: str
    lmms_metric: str
    paper: float
    lmms_judge: str = "rules"
    paper_judge: str | None = None
    vlmeval_metric: str = "Overall"
    max_new_tokens: int = 2
    block_length: int = 2
    max_denoising_steps: int = 2
    upscale_first: bool = False
    max_tiles: int = 6
    prompt_suffix: str | None = None
    shorten: bool = True
    lmms_percent: bool = False
    vlmeval_percent: bool = False
    aliases: tuple[str, ...] = ()
    unverifiable: str = ""

    @property
    def suffix(self) -> str:
        """The end of each question."""
        return SUFFIX[self.kind] if self.prompt_suffix is None else self.prompt_suffix

    @property
    def judges(self) -> dict[str, str]:
        """Names of judges: `paper`, as its repository documents it; `paper_default`, what its run.py takes by itself;
        `vlmeval` and `lmms`, the defaults of the harnesses; "rules" where none is asked."""
        if self.stock_judge == "rules":
            found = {"paper": self.paper_judge or "rules", "paper_default": "rules", "vlmeval": "rules"}
        else:
            own = "gpt-4o-mini" if self.stock_judge == "LLM" else "chatgpt-0125"
            found = {"paper": "gpt-5.2", "paper_default": own, "vlmeval": "gpt-4o-mini"}
        stock = "gpt-4" if self.name == "HallusionBench" else "gpt-4o-2024-11-20"
        return found | {"lmms": "rules" if self.lmms_judge == "rules" else stock}

    def generation(self) -> dict[str, Any]:
        """Settings of `generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "max_denoising_steps": self.max_denoising_steps,
        }

    def as_dict(self) -> dict[str, Any]:
        """The benchmark as a dict, for result files."""
        return asdict(self) | {"suffix": self.suffix, "total_tiles": TOTAL_TILES, "judges": self.judges}


class _Generation(TypedDict):
    max_new_tokens: int
    block_length: int
    max_denoising_steps: int


_RULES, _RULES_LLM, _LLM = "rules", "rules, then LLM", "LLM"
_REASON: _Generation = {"max_new_tokens": 256, "block_length": 1, "max_denoising_steps": 256}
_READ: _Generation = {"max_new_tokens": 128, "block_length": 128, "max_denoising_steps": 128}
_STRICT = "Qwen3-8B, strict"

_DOC = "OCR & Doc & Chart"

# The mean of the three: of the other models in Table 1 the numbers are those published as such (InternVL3-8B: 49.9).
_HALLUSION = "aAcc+fAcc+qAcc"

# fmt: off
# name, group, kind, VLMEvalKit, lmms-eval, split, stock judge, lmms-eval's metric, Table 1
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("MMStar", "General VQA", "letter", "MMStar", "mmstar", "val", _RULES_LLM, "average", 63.7),
    Benchmark("SeedBench", "General VQA", "letter", "SEEDBench_IMG", "seedbench", "image", _RULES_LLM,
              "seed_image", 78.9),
    Benchmark("MMBench", "General VQA", "letter", "MMBench_DEV_EN", "mmbench_en_dev", "dev", _RULES_LLM,
              "gpt_eval_score", 85.0, lmms_judge=_RULES_LLM, lmms_percent=True,
              unverifiable="version: MMBench_DEV_EN or MMBench_DEV_EN_V11"),
    Benchmark("MMMU", "Reasoning", "letter", "MMMU_DEV_VAL", "mmmu_val", "validation", _RULES_LLM,
              "mmmu_acc", 47.2, upscale_first=True),
    Benchmark("MathVista", "Reasoning", "math", "MathVista_MINI", "mathvista_testmini_format", "testmini", _LLM,
              "llm_as_judge_eval", 65.5, lmms_judge=_LLM, lmms_percent=True, vlmeval_metric="acc",
              vlmeval_percent=True, aliases=("mathvista_testmini",), **_REASON),
    Benchmark("MathVerse Vision-Only", "Reasoning", "math", "MathVerse_MINI_Vision_Only",
              "mathverse_testmini_vision_only", "testmini", _LLM, "gpt_eval_score", 25.3, lmms_judge=_LLM,
              vlmeval_percent=True, **_REASON),
    Benchmark("AI2D", _DOC, "letter", "AI2D_TEST", "ai2d", "test", _RULES_LLM, "exact_match", 85.0,
              unverifiable="with or without mask: AI2D_TEST or AI2D_TEST_NO_MASK"),
    Benchmark("ChartQA", _DOC, "document", "ChartQA_TEST", "chartqa", "test", _RULES,
              "relaxed_overall", 91.6, paper_judge=_STRICT, vlmeval_percent=True, **_READ),
    Benchmark("DocVQA", _DOC, "document", "DocVQA_VAL", "docvqa_val", "val", _RULES, "anls", 89.9,
              paper_judge=_STRICT, vlmeval_percent=True, **_READ),
    Benchmark("InfoVQA", _DOC, "document", "InfoVQA_VAL", "infovqa_val", "val", _RULES, "anls", 74.6,
              paper_judge=_STRICT, vlmeval_percent=True, **_READ),
    # the reference's harness copy knows no pairs: single questions count, which VLMEvalKit calls average
    Benchmark("MMVP", "Perception", "letter", "MMVP", "mmvp", "test", _RULES_LLM, "mmvp_accuracy", 82.0,
              vlmeval_metric="Average", unverifiable="single questions or pairs"),
    Benchmark("BLINK", "Perception", "letter", "BLINK", "blink", "val", _RULES_LLM, "blink_acc", 60.3),
    Benchmark("RealWorldQA", "Perception", "letter", "RealWorldQA", "realworldqa", "test", _RULES_LLM,
              "exact_match", 73.7),
    Benchmark("CV-Bench-2D", "Perception", "letter", "CV-Bench-2D", "cv_bench_2d", "2D", _RULES_LLM,
              "cv_bench_acc", 79.8),
    Benchmark("HallusionBench", "Others", "yes_no", "HallusionBench", "hallusion_bench_image", "image", _RULES_LLM,
              _HALLUSION, 58.4, lmms_judge=_LLM, vlmeval_metric=_HALLUSION, vlmeval_percent=True,
              lmms_percent=True, unverifiable="aAcc, or the mean of aAcc, fAcc and qAcc"),
    Benchmark("V*", "Others", "letter", "VStarBench", "vstar_bench", "test", _RULES_LLM, "vstar_overall_acc", 73.3,
              lmms_percent=True),
)
# fmt: on


def tiles_for(images: int, max_tiles: int = 6) -> int:
    """Most tiles of an image in a question with a number of images, which share [`TOTAL_TILES`]."""
    return max(1, min(max_tiles, TOTAL_TILES // max(1, images)))


def find_benchmark(name: str) -> Benchmark | None:
    """The benchmark with a name in the spelling of the paper, VLMEvalKit or lmms-eval; None if there is none.

    As in the reference, variants of a data set are found too: `MMBench_DEV_EN_V11`, `blink_counting`. Variants that
    ask for something else are not: `mmmu_val_reasoning`, `seedbench_2`.
    """
    wanted = _plain(name)
    for benchmark in BENCHMARKS:
        names = [_plain(key) for key in (benchmark.vlmeval, benchmark.lmms, *benchmark.aliases)]
        if wanted in (_plain(benchmark.name), *names):
            return benchmark
        further = [wanted.removeprefix(key + "_").split("_") for key in names if wanted.startswith(key + "_")]
        if any(not _OTHERS & set(words) for words in further):
            return benchmark
    return None


def choose_benchmarks(names: list[str] | None) -> list[Benchmark]:
    """The benchmarks with these names; all of them without names.

    Raises:
        SettingError: a name is not that of a benchmark of the paper.
    """
    if not names:
        return list(BENCHMARKS)
    found = {name: find_benchmark(name) for name in names}
    if unknown := [name for name, benchmark in found.items() if benchmark is None]:
        raise SettingError(
            f"No benchmark of the paper: {', '.join(unknown)}. Known: {', '.join(b.name for b in BENCHMARKS)}."
        )
    return list(dict.fromkeys(benchmark for benchmark in found.values() if benchmark is not None))


def ask_like_paper(benchmark: Benchmark, text: str) -> str:
    """Replace the end of a question, which asks for the form of the answer, by the paper's.

    Questions of benchmarks with letters keep their own end, if they have one: some of them are open questions. BLINK
    and CV-Bench-2D of lmms-eval have an instruction before the question, which is removed, and options as "(A) red".

    Args:
        benchmark (`Benchmark`): the benchmark of the question.
        text (`str`): the question as the task of the harness writes it.
    """
    if benchmark.name in ("BLINK", "CV-Bench-2D") and _NOTE.match(text):
        text = _OPTION.sub(r"\1. ", _NOTE.sub("", text))
        if benchmark.name == "CV-Bench-2D":  # of the task's prompt; VLMEvalKit's questions lack it
            text = _SELECT.sub("", text)
    own = next((s for s in HARNESS_SUFFIXES if text.rstrip(" .\n").endswith(s)), None)
    if benchmark.kind == "letter" and benchmark.prompt_suffix is None:
        return text if own else text.rstrip() + benchmark.suffix
    if text.endswith(benchmark.suffix):
        return text
    if own:
        text = text.rstrip(" .\n").removesuffix(own)
    return text.rstrip() + benchmark.suffix


def place_images(parts: Sequence[str | None]) -> str:
    """Write the text of a message, whose images come first, as the reference does.

    The place of the k-th of several images is marked by `<Image-k>`, unless all images stand together.

    Args:
        parts (`list`): the parts of the message in order; None is an image.
    """
    texts = [part for part in parts if part is not None]
    if len(parts) - len(texts) <= 1:
        return "\n".join(texts)
    marks = [f"<Image-{number}>" for number in range(1, len(parts) - len(texts) + 1)]
    places = iter(marks)
    text = "".join(next(places) if part is None else part for part in parts)
    return text.replace("".join(marks), "")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
