"""Score a base checkpoint on held-out questions about synthetic scenes.

    python -m pdlm_hf.shapes.evaluate_base RUN --seed 7 --questions 500 --json

Questions are asked as in the benchmarks: letters and yes or no get 2 token positions, longer answers more (`SLOTS`),
and reasoning is decoded in autoregressive order (`BLOCKS`).
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from ..modeling_pdlm import PdlmBaseForConditionalGeneration
from ..processing_pdlm import PdlmProcessor
from .dataset import HELD_OUT
from .questions import BLOCKS, FIGURES, KINDS, SLOTS, Question, draw_question_scene, is_right


def held_out_question(seed: int, index: int, kind: str, figures: int = FIGURES) -> tuple[Image.Image, Question]:
    """Draw an image that training never draws, and ask a question of this kind about it."""
    rng = np.random.default_rng((HELD_OUT, seed, index))
    while True:
        image, drawn = draw_question_scene(rng, figures)
        if question := KINDS[kind](rng, drawn):
            return image, question


def evaluate(
    model,
    processor,
    seed: int,
    count: int,
    batch_size: int = 16,
    figures: int = FIGURES,
    kinds: Iterable[str] = tuple(KINDS),
    **generation: Any,
) -> dict[str, Any]:
    """Answer held-out questions and count the right answers.

    Args:
        model, processor: a base checkpoint.
        seed, count (`int`): seed of the questions, and number of questions of each kind.
        batch_size (`int`): questions in a batch.
        figures (`int`): figures in an image at most.
        kinds (`Iterable[str]`): kinds of questions, keys of [`KINDS`].
        **generation: settings of `generate`; `max_new_tokens` and the default of `block_length` depend on the kind.

    Returns:
        `dict` with right (share), by_kind (shares), num_forwards (mean of the batches) and seconds.
    """
    by_kind, forwards, start = {}, defaultdict(list), time.perf_counter()
    for kind in kinds:
        right, settings = 0, {"block_length": BLOCKS.get(kind)} | generation
        cases = [held_out_question(seed, index, kind, figures) for index in range(count)]
        for first in range(0, count, batch_size):
            chunk = cases[first : first + batch_size]
            inputs = processor(images=[image for image, _ in chunk], text=[question.text for _, question in chunk])
            output = model.generate(**inputs, max_new_tokens=SLOTS[kind], return_dict_in_generate=True, **settings)
            forwards[kind].append(output.num_forwards)
            answers = processor.post_process_answers(output.sequences)
            right += sum(is_right(question, said) for (_, question), said in zip(chunk, answers, strict=True))
        by_kind[kind] = round(right / count, 4)
    return {
        "right": round(sum(by_kind.values()) / len(by_kind), 4),
        "by_kind": by_kind,
        "num_forwards": {kind: round(float(np.mean(values)), 2) for kind, values in forwards.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 11,
    questions: Annotated[int, typer.Option(help="Number of questions of each kind.", min=1)] = 200,
    figures: Annotated[int, typer.Option(help="Figures in an image at most.", min=1)] = FIGURES,
    block_length: Annotated[int | None, typer.Option(help="1 = autoregressive order.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a base checkpoint."""
    torch.set_num_threads(threads)
    network = PdlmBaseForConditionalGeneration.from_pretrained(model).eval()
    generation: dict[str, Any] = {} if block_length is None else {"block_length": block_length}
    with torch.inference_mode():
        report = evaluate(
            network, PdlmProcessor.from_pretrained(model), seed, questions, figures=figures, **generation
        )
    typer.echo(json.dumps(report) if as_json else "\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    typer.run(main)
