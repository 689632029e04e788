"""Train the tiny base checkpoint on questions about synthetic scenes.

    train="python -m tools.shapes.train_base --threads 2 --freeze-vision --batch-size 48"
    $train --out runs/easy --lesson easy --steps 2500
    python -m tools.shapes.train_lookup --init runs/easy --out runs/lookup
    $train --out runs/bind --lesson bind --init runs/lookup --lists options --lists asked --steps 3000 --seed 1
    $train --out runs/letters --lesson letters --init runs/bind --lists options --lists asked --steps 2000 --seed 2
    $train --out runs/choose --lesson choose --init runs/letters --lists asked --steps 2000 --seed 3
    $train --out runs/mixed --lesson easy --init runs/choose --lists asked --steps 2500 --seed 4
    $train --out runs/longer --lesson easy --init runs/mixed --steps 5000 --seed 5
    $train --out runs/count --lesson count --init runs/longer --steps 3600 --seed 6 --learning-rate 8e-4
    $train --out runs/reason --lesson count --init runs/count --steps 3200 --seed 7 --learning-rate 6e-4

The model learns to see, to name what it sees, to look words up in lists, and then all of it at once: to answer by
letter it must find the word and then its letter, and a wrong letter does not tell which of the two failed. The
training of the embedded checkpoint took more steps, which its `training.json` lists; these commands are the steps that
helped, and have not been run from end to end. With the same `--out` a stopped training is resumed from the last saved
step.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import set_seed

from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.dataset import TRAINING
from pdlm_hf.shapes.questions import (
    FIGURES,
    LETTER_PROMPT,
    MOST_FIGURES,
    SHAPES,
    SIZES,
    SLOTS,
    TEXTURES,
    Question,
    ask,
    draw_question_scene,
    plural,
)
from pdlm_hf.shapes.scenes import COLOURS, Figure
from pdlm_hf.training.collator import PdlmCollator
from pdlm_hf.training.trainer import InOrderTrainer

from .model import build_base_model, build_base_processor
from .train import arguments, run
from .train_lookup import LETTERS as OPTION_LETTERS
from .train_lookup import STAGES, Batch, lookup_loss, stages

# Share of each kind of question in a lesson. The model learns to look at the figure that a question names from whole
# descriptions of one of two figures. A letter or a yes tells too little about where to look; these are learned later,
# and sooner from questions with several answers in one ("letters", "tally").
MIXED = {
    "choice": 0.24,
    "letters": 0.08,
    "yes_no": 0.12,
    "tally": 0.12,
    "tell": 0.08,
    "open": 0.1,
    "count": 0.1,
    "reasoning": 0.1,
    "describe": 0.06,
}
LESSONS: dict[str, dict[str, float]] = {
    "bind": {"tell": 0.5, "open": 0.2, "yes_no": 0.2, "choice": 0.1},
    "letters": {"letters": 0.45, "choice": 0.45, "tell": 0.1},
    "choose": {"choice": 0.8, "letters": 0.15, "tell": 0.05},
    "easy": MIXED,
    "count": {
        "count": 0.25,
        "tally": 0.2,
        "reasoning": 0.2,
        "describe": 0.07,
        "choice": 0.13,
        "yes_no": 0.07,
        "open": 0.08,
    },
    "full": MIXED,
}
# Shares of the choices that are answered by letter and text, by the text alone, or without image (which letter has
# this word?). Share of all short answers with the image described in words, from which the model learns to find an
# answer and its letter in text that is easy to read.
WITH_TEXT, TEXT_ONLY, WORDS_ONLY, TOLD = 0.12, 0.12, 0.04, 0.1
HARD = 0.5  # share of questions about size and texture drawn again: colour and shape are confused more often
COUNTING = ("count", "tally", "reasoning")
# Share of images to count in that are drawn again if no two figures are alike, and of questions that are drawn again
# if they are not about figures that are alike: otherwise the model rarely has to count beyond one.
ALIKE, ASKED = 0.45, 0.6
AGAIN = 0.3  # share of the same within a tally
SHORT = ("choice", "yes_no", "open")
Lesson = Literal["bind", "letters", "choose", "easy", "count", "full"]
BY_LETTERS = (0.45, 0.2, 0.35)  # letters, words, both
TALLY = 5  # kinds to count
LISTS = 24  # rows of lists per step
LONGEST = 32  # token positions
OTHER_LENGTHS = 0.3  # share of questions trained with more token positions than the benchmarks use


class QuestionDataset(Dataset):
    """Synthetic scenes with a question, drawn on demand from (seed, index).

    Args:
        seed (`int`): seed of the set.
        length (`int`): number of questions.
        lesson (`str`): a key of [`LESSONS`]. "easy", "count": one or two figures on one tile; "full": up to four on
            two tiles; others: two.
    """

    def __init__(self, seed: int, length: int, lesson: str = "easy"):
        self.seed, self.length, self.lesson = seed, length, lesson

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        rng = np.random.default_rng((TRAINING, self.seed, index))
        most = MOST_FIGURES if self.lesson == "full" else FIGURES
        image, figures = draw_question_scene(rng, most)
        while self.lesson in ("bind", "letters", "choose") and len(figures) < 2:
            image, figures = draw_question_scene(rng, most)
        shares = LESSONS[self.lesson]
        kind = list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]
        counts = kind in COUNTING
        while counts and rng.random() < ALIKE and not several(figures, kind):
            image, figures = draw_question_scene(rng, most)
        special = {"tell": tell, "letters": by_letters, "tally": tally}.get(kind)
        question = (special and special(rng, figures)) or ask(rng, figures, "open" if special else kind)
        names = several(figures, kind) if counts else {}
        while names and rng.random() < ASKED and not any(name in question.text for name in names):
            question = (special and special(rng, figures)) or ask(rng, figures, "open" if special else kind)
        while kind in ("choice", "open") and "What" not in question.text and rng.random() < HARD:
            question = ask(rng, figures, kind)
        images, slots, draw = [image], SLOTS[question.kind], rng.random()
        if question.kind == "choice" and draw < WITH_TEXT + TEXT_ONLY:
            question, slots = with_text(question, letter=draw < WITH_TEXT), SLOTS["open"]
        elif question.kind == "choice" and draw < WITH_TEXT + TEXT_ONLY + WORDS_ONLY:
            question, images = words_only(question), []
        elif question.kind in SHORT and draw > 1 - TOLD:
            question, images = told(question, figures), []
        slots = max(slots, 4 * question.answer.count(". "), 2 * len(question.answer.split("\n")))
        if rng.random() < OTHER_LENGTHS:
            slots = int(rng.integers(slots, LONGEST + 1))
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        return {"images": images, "messages": messages, "num_slots": slots, "seed": self.seed * 2**40 + index}


def several(figures: list[Figure], kind: str) -> dict[str, int]:
    """Count the figures that are alike, under the names that a question of this kind uses: {"red figures": 2}."""
    shapes = Counter(plural(figure.shape) for figure in figures)
    colours = Counter(f"{figure.colour} figures" for figure in figures if kind != "reasoning")  # compares shapes
    return {name: number for name, number in (shapes + colours).items() if number > 1}


def tell(rng: np.random.Generator, figures: list[Figure]) -> Question | None:
    """Ask to describe one figure, named by an attribute that only it has; None if there is no such figure."""
    named = ("shape", "colour")[int(rng.integers(2))]
    values = [getattr(figure, named) for figure in figures]
    alone = [figure for figure in figures if values.count(getattr(figure, named)) == 1]
    if not alone:
        return None
    figure = alone[int(rng.integers(len(alone)))]
    name = f"{figure.colour} figure" if named == "colour" else figure.shape
    answer = f"A {figure.size} {figure.colour} {figure.texture} {figure.shape}."
    return Question("open", f"Describe the {name}.", answer)


def by_letters(rng: np.random.Generator, figures: list[Figure]) -> Question | None:
    """Ask the same, to be answered from a list of words by their letters, the words, or both: four answers in one."""
    question = tell(rng, figures)
    if question is None:
        return None
    true = question.answer[2:-1].split()
    others = [word for word in (*COLOURS, *SHAPES, *TEXTURES, *SIZES) if word not in true]
    options = rng.permutation([*true, *rng.permutation(others)[: len(OPTION_LETTERS) - len(true)]]).tolist()
    lines = [f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options, strict=True)]
    right = [lines[options.index(word)] for word in true]
    form, answer = (
        ("letters", "\n".join(line[0] for line in right)),
        ("words", question.answer),
        ("letters and words", "\n".join(right)),
    )[int(rng.choice(3, p=BY_LETTERS))]
    text = "\n".join([question.text, *lines, f"Answer with {form}."])
    return Question("open", text, answer)


def tally(rng: np.random.Generator, figures: list[Figure]) -> Question:
    """Ask for the numbers of several kinds of figures: several questions of counting or yes and no in one."""
    names, numbers, alike = [], [], list(several(figures, "tally").items())
    for _ in range(TALLY):
        if alike and rng.random() < AGAIN:
            name, number = alike[int(rng.integers(len(alike)))]
            names.append(name)
            numbers.append(number)
            continue
        figure = figures[int(rng.integers(len(figures)))]
        colour = figure.colour if rng.random() < 0.5 else list(COLOURS)[int(rng.integers(len(COLOURS)))]
        shape = figure.shape if rng.random() < 0.5 else SHAPES[int(rng.integers(len(SHAPES)))]
        form = int(rng.integers(3))
        names.append((f"{colour} {plural(shape)}", f"{colour} figures", plural(shape))[form])
        numbers.append(sum((f.colour == colour or form == 2) and (f.shape == shape or form == 1) for f in figures))
    text = "\n".join(["How many of each are there?", *names])
    return Question("count", text, "\n".join(map(str, numbers)))


def _options(question: Question) -> dict[str, str]:
    return {line[0]: line[3:] for line in question.text.split("\n")[1:-1]}


def with_text(question: Question, letter: bool = True) -> Question:
    """Change a choice so that its answer is letter and text, or the text alone."""
    text = question.text.replace(LETTER_PROMPT, f"Answer with the option's {'letter and ' * letter}text.")
    said = _options(question)[question.answer]
    return Question("choice", text, f"{question.answer}. {said}" if letter else said.capitalize() + ".")


def words_only(question: Question) -> Question:
    """Change a choice so that it needs no image: which letter has this word?"""
    _, options = question.text.split("\n", 1)
    return Question("choice", f"Which is {_options(question)[question.answer]}?\n{options}", question.answer)


def words_of(question: str, answer: str) -> list[tuple[int, str]]:
    """Find the words behind the letters of an answer, each with the position of its letter in tokens."""
    options = {line[0]: line[3:] for line in question.split("\n") if line[1:3] == ". "}
    lines = answer.split("\n")
    if not all(line in options or line in (f"{letter}. {word}" for letter, word in options.items()) for line in lines):
        return []
    a_line = 2 if len(lines[0]) == 1 else 4  # tokens: letter, dot, word, line break
    return [(k * a_line, options[line[0]]) for k, line in enumerate(lines)]


class QuestionCollator(PdlmCollator):
    """Adds `words`: at the position of each letter of an answer the id of the word behind it, elsewhere -100."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make the batch of [`PdlmCollator`], and its words."""
        batch = super().__call__(rows)
        words = torch.full_like(batch["labels"], -100)
        for row, out, labels in zip(rows, words, batch["labels"], strict=True):
            first = int((labels != -100).nonzero()[0])
            question, answer = (message["content"] for message in row["messages"])
            for place, word in words_of(question[-1]["text"], answer):
                out[first + place] = self.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]
        return batch | {"words": words}


class QuestionTrainer(InOrderTrainer):
    """Adds two losses that letters need.

    The first one trains the layer before the last to predict the word, since the last layer looks up its letter and a
    wrong letter tells nothing about the word. The second one is that of lists, without which the model forgets how to
    look a word up.

    Args:
        batches (`list`): kinds of lists, from [`~train_lookup.stages`].
    """

    def __init__(self, batches: list[Batch], **kwargs: Any):
        super().__init__(**kwargs)
        self.batches = batches
        self.right: list[list[float]] = [[] for _ in batches]

    def compute_loss(self, model, inputs, *args: Any, **kwargs: Any):
        """Compute the loss of the questions, in training with those of the words and of the lists."""
        inputs = dict(inputs)
        words, known = inputs.pop("words"), []
        language_model = model.model.language_model
        hook = language_model.layers[-2].register_forward_hook(lambda layer, given, out: known.append(out))
        try:
            out = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()
        if not model.training or isinstance(out, tuple):
            return out
        asked = (words != -100) & inputs["noise_mask"]
        if asked.any():
            logits = model.get_output_embeddings()(language_model.norm(known[0][asked]))
            out = out + cross_entropy(logits, words[asked])
        for k, batch in enumerate(self.batches):
            rng = np.random.default_rng((TRAINING, self.args.seed, self.state.global_step, k))
            loss, right = lookup_loss(model, *batch(rng, LISTS // len(self.batches)))
            out = out + loss
            self.right[k].append(right)
        return out

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the share of right answers in the lists beside the loss."""
        if "loss" in logs and self.batches:
            logs["lists"] = " ".join(f"{np.mean(right):.3f}" for right in self.right)
            self.right = [[] for _ in self.batches]
        super().log(logs, *args, **kwargs)


def told(question: Question, figures: list[Figure]) -> Question:
    """Ask the same question with the image described in words."""
    said = " ".join(f"A {figure.size} {figure.colour} {figure.texture} {figure.shape}." for figure in figures)
    return Question(question.kind, f"{said}\n{question.text}", question.answer)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; a stopped training is resumed.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Questions per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    start: Annotated[Path, typer.Option(help="Region checkpoint to start from, without --init.")] = CHECKPOINT,
    lesson: Annotated[Lesson, typer.Option(help="Kinds of images and questions.")] = "easy",
    freeze_vision: Annotated[bool, typer.Option("--freeze-vision", help="Do not train the vision tower.")] = False,
    lists: Annotated[
        list[str] | None, typer.Option(help=f"Lists to train on beside the questions: {', '.join(STAGES)}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, images and noise.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train, or resume training, and save."""
    torch.set_num_threads(threads)
    set_seed(seed)
    if init is None:
        processor = build_base_processor()
        vocabulary = PdlmProcessor.from_pretrained(start).tokenizer.get_vocab()
        model = build_base_model(processor, PdlmForConditionalGeneration.from_pretrained(start), vocabulary)
    else:
        processor = PdlmProcessor.from_pretrained(init)
        model = PdlmBaseForConditionalGeneration.from_pretrained(init)
    model.model.vision_tower.requires_grad_(not freeze_vision)
    trainer = QuestionTrainer(
        batches=[stages(processor)[name] for name in lists or ()],
        model=model,
        args=arguments(out, steps, batch_size, learning_rate, seed),
        train_dataset=QuestionDataset(seed, steps * batch_size, lesson),
        data_collator=QuestionCollator(processor, noise_floor=0.3),
    )
    command = (
        f"python -m tools.shapes.train_base --steps {steps} --batch-size {batch_size} --learning-rate "
        f"{learning_rate} --seed {seed} --threads {threads} --lesson {lesson}"
        + " --freeze-vision" * freeze_vision
        + "".join(f" --lists '{name}'" for name in lists or ())
    )
    run(trainer, model, processor, out, init, command, seed)


if __name__ == "__main__":
    typer.run(main)
