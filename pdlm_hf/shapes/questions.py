"""Questions about synthetic scenes, with answers: open, yes or no, counting, multiple choice, reasoning, description.

They are for the base model, which takes whole images. All figures of a scene are known, so every answer is true.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..tiling_pdlm import best_grid
from .scenes import COLOURS, TILE, WORDS, Figure, paint

FIGURES = 2  # figures at most in the images on which a base checkpoint is scored
MOST_FIGURES = 4  # figures at most: there are no words and no room for more
LETTERS = "ABCD"
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."  # as VLMEvalKit and lmms-eval ask
YES_NO_PROMPT = "Please answer yes or no."
REASONING_PROMPT = "Please reason step by step."
DESCRIBE_PROMPT = "Describe the picture."
SHAPES = tuple(WORDS["shape"])
TEXTURES = tuple(WORDS["texture"])
SIZES = tuple(WORDS["size"])
_VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES, "size": SIZES}


@dataclass
class Question:
    """A question about an image.

    Args:
        kind (`str`): a key of [`KINDS`].
        text (`str`): the question, as the model gets it.
        answer (`str`): the only right answer.
    """

    kind: str
    text: str
    answer: str


def draw_question_scene(rng: np.random.Generator, figures: int = FIGURES) -> tuple[Image.Image, list[Figure]]:
    """Draw an image: one or two figures on one tile, more figures on two tiles.

    Args:
        rng (`np.random.Generator`): decides everything.
        figures (`int`): figures at most.

    Returns:
        the image, and all figures in it.
    """
    while True:
        count = int(rng.integers(1, figures + 1))
        columns, rows = (1, 1) if count <= 2 else (2, 1) if rng.random() < 0.5 else (1, 2)
        scale = rng.uniform(0.9, 1.35)
        width = round(columns * TILE * scale * rng.uniform(0.95, 1.05))
        height = round(rows * TILE * scale * rng.uniform(0.95, 1.05))
        if best_grid(width, height, TILE, 1, 6) != (columns, rows):
            continue
        scene = paint(rng, width, height, (width / columns + height / rows) / (2 * TILE), count)
        if len(scene.figures) == count:
            return scene.image, scene.figures


def _pick(rng: np.random.Generator, values):
    values = list(values)
    return values[int(rng.integers(len(values)))]


def _unique(figures: list[Figure], attribute: str) -> list[Figure]:
    """The figures whose value of this attribute no other figure has."""
    values = [getattr(figure, attribute) for figure in figures]
    return [figure for figure, value in zip(figures, values, strict=True) if values.count(value) == 1]


def _about_one(rng: np.random.Generator, figures: list[Figure]) -> tuple[str, str, str] | None:
    """A question about one figure, named by an attribute only it has: text, attribute asked for, its value."""
    named = _pick(rng, ("shape", "colour"))
    candidates = _unique(figures, named)
    if not candidates:
        return None
    figure = _pick(rng, candidates)
    asked = _pick(rng, [name for name in _VALUES if name != named])
    name = f"{figure.colour} figure" if named == "colour" else figure.shape
    text = {
        "colour": f"What colour is the {name}?",
        "shape": f"What shape is the {name}?",
        "texture": f"Is the {name} plain, striped or dotted?",
        "size": f"Is the {name} small or large?",
    }[asked]
    return text, asked, getattr(figure, asked)


def _open(rng: np.random.Generator, figures: list[Figure]) -> Question | None:
    found = _about_one(rng, figures)
    return found and Question("open", found[0], found[2].capitalize() + ".")


def _choice(rng: np.random.Generator, figures: list[Figure]) -> Question | None:
    found = _about_one(rng, figures)
    if found is None:
        return None
    text, asked, value = found
    others = [other for other in _VALUES[asked] if other != value]
    options = [value, *rng.permutation(others)[: len(LETTERS) - 1].tolist()]
    options = rng.permutation(options).tolist()
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return Question("choice", f"{text}\n{lines}\n{LETTER_PROMPT}", LETTERS[options.index(value)])


def _yes_no(rng: np.random.Generator, figures: list[Figure]) -> Question:
    if rng.random() < 0.4:
        figure = _pick(rng, figures)
        colour, shape = figure.colour, figure.shape
    else:  # mostly "no"; half of these colours or shapes are those of a figure
        figure = _pick(rng, figures)
        colour = figure.colour if rng.random() < 0.4 else _pick(rng, COLOURS)
        shape = figure.shape if rng.random() < 0.4 else _pick(rng, SHAPES)
    exists = any(figure.colour == colour and figure.shape == shape for figure in figures)
    return Question("yes_no", f"Is there a {colour} {shape}? {YES_NO_PROMPT}", "Yes" if exists else "No")


def _count(rng: np.random.Generator, figures: list[Figure]) -> Question:
    if rng.random() < 0.4:
        return Question("count", "How many figures are there?", str(len(figures)))
    attribute = _pick(rng, ("shape", "colour"))
    value = getattr(_pick(rng, figures), attribute) if rng.random() < 0.7 else _pick(rng, _VALUES[attribute])
    name = f"{value} figures" if attribute == "colour" else plural(value)
    return Question("count", f"How many {name} are there?", str(_number(figures, attribute, value)))


def _number(figures: list[Figure], attribute: str, value: str) -> int:
    return sum(getattr(figure, attribute) == value for figure in figures)


def plural(shape: str) -> str:
    """Return the plural of a shape."""
    return shape + ("es" if shape == "cross" else "s")


def _reason(rng: np.random.Generator, figures: list[Figure]) -> Question:
    drawn = sorted({figure.shape for figure in figures})
    first = _pick(rng, drawn) if rng.random() < 0.8 else _pick(rng, SHAPES)
    second = _pick(rng, [shape for shape in SHAPES if shape != first])
    if len(drawn) > 1 and rng.random() < 0.6:
        second = _pick(rng, [shape for shape in drawn if shape != first] or [second])
    if rng.random() < 0.5:
        first, second = second, first
    a, b = (_number(figures, "shape", shape) for shape in (first, second))
    relation = "more than" if a > b else "less than" if a < b else "as many as"
    answer = f"{first}: {a}. {second}: {b}. {a} is {relation} {b}. {'Yes' if a > b else 'No'}."
    text = f"Are there more {plural(first)} than {plural(second)}? {REASONING_PROMPT}"
    return Question("reasoning", text, answer)


def _describe(rng: np.random.Generator, figures: list[Figure]) -> Question:
    order = [list(values) for values in (COLOURS, SHAPES, TEXTURES, SIZES)]

    def place(figure: Figure) -> list[int]:
        values = (figure.colour, figure.shape, figure.texture, figure.size)
        return [known.index(value) for known, value in zip(order, values, strict=True)]

    parts = [f"a {f.size} {f.colour} {f.texture} {f.shape}" for f in sorted(figures, key=place)]
    answer = ", ".join(parts) + "."
    return Question("describe", DESCRIBE_PROMPT, answer[0].upper() + answer[1:])


KINDS: dict[str, Callable[[np.random.Generator, list[Figure]], Question | None]] = {
    "open": _open,
    "choice": _choice,
    "yes_no": _yes_no,
    "count": _count,
    "reasoning": _reason,
    "describe": _describe,
}
# Token positions for an answer: for letters and yes or no as in the paper's settings.
SLOTS = {"choice": 2, "yes_no": 2, "count": 4, "open": 8, "reasoning": 32, "describe": 32}
BLOCKS = {"reasoning": 1}  # block length: reasoning is decoded token by token, other answers are one block


def ask(rng: np.random.Generator, figures: list[Figure], kind: str | None = None) -> Question:
    """Ask a question about the figures of an image.

    Args:
        rng (`np.random.Generator`): decides everything.
        figures (`list[Figure]`): all figures of the image.
        kind (`str`, *optional*): a key of [`KINDS`]; default: any kind. If the figures allow no question of this kind,
            the question is of another kind.
    """
    while True:
        question = KINDS[kind or _pick(rng, KINDS)](rng, figures)
        if question is not None:
            return question
        kind = None


def is_right(question: Question, said: str) -> bool:
    """Whether an answer is right: exactly the letter, word or number; for a reasoned answer only its last word."""
    answers = [text.strip().rstrip(".").lower() for text in (said, question.answer)]
    if question.kind == "reasoning":
        answers = [text.split()[-1] if text else "" for text in answers]
    return answers[0] == answers[1]
