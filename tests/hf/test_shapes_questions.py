"""Questions about drawn images: every answer is true of what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from pdlm_hf.captioning.checkpoints import BASE_CHECKPOINT
from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.questions import KINDS, LETTER_PROMPT, Question, ask, draw_question_scene, is_right
from pdlm_hf.shapes.scenes import COLOURS, Figure
from pdlm_hf.training.collator import PdlmCollator
from tools.shapes.model import build_base_processor
from tools.shapes.train_base import (
    LESSONS,
    LISTS,
    QuestionCollator,
    QuestionDataset,
    QuestionTrainer,
    by_letters,
    several,
    tally,
    told,
)
from tools.shapes.train_lookup import PAIRS, lookup_batch, lookup_loss, stages, tokens_of

FIGURES = [
    Figure("small", "red", "plain", "star"),
    Figure("large", "red", "dotted", "circle"),
    Figure("large", "blue", "striped", "circle"),
]


def questions(kind: str, count: int = 300) -> list[Question]:
    found = [ask(np.random.default_rng(seed), FIGURES, kind) for seed in range(count)]
    assert {question.kind for question in found} == {kind}
    return found


def figures_named(text: str) -> list[Figure]:
    return [f for f in FIGURES if f"{f.colour} figure" in text or f" {f.shape}" in text]


def test_open_questions_name_one_figure():
    for question in questions("open"):
        (figure,) = figures_named(question.text)
        assert figure.shape == "star" or figure.colour == "blue"  # red and circle are not unique
        assert question.answer.rstrip(".").lower() in vars(figure).values()


def test_the_letter_is_that_of_the_right_option():
    for question in questions("choice"):
        text, *lines, prompt = question.text.split("\n")
        (figure,) = figures_named(text)
        options = {line[0]: line[3:] for line in lines}
        assert prompt == LETTER_PROMPT and list(options) == list("ABCD")[: len(options)]
        right = [letter for letter, option in options.items() if option in vars(figure).values()]
        assert question.answer in right and len(set(options.values())) == len(options)


def test_yes_or_no():
    there = {(f.colour, f.shape) for f in FIGURES}
    for question in questions("yes_no"):
        colour, shape = question.text.split("?")[0].split()[-2:]
        assert colour in COLOURS and question.answer == ("Yes" if (colour, shape) in there else "No")
    answers = Counter(question.answer for question in questions("yes_no"))
    assert 0.3 < answers["No"] / 300 < 0.7


def test_counts():
    numbers = {"figures": 3, "circles": 2, "stars": 1, "red figures": 2, "blue figures": 1}
    for question in questions("count"):
        what = question.text.removeprefix("How many ").removesuffix(" are there?")
        assert question.answer == str(numbers.get(what, 0))


def test_reasoning_states_what_it_counts():
    number = {"circle": 2, "star": 1}
    for question in questions("reasoning"):
        first, second, relation, verdict = question.answer.rstrip(".").split(". ")
        (a, m), (b, n) = (part.split(": ") for part in (first, second))
        assert (int(m), int(n)) == (number.get(a, 0), number.get(b, 0))
        assert verdict == ("Yes" if int(m) > int(n) else "No")
        expected = "more than" if m > n else "less than" if m < n else "as many as"
        assert relation == f"{m} is {expected} {n}"


@pytest.mark.parametrize("most", [2, 4])
def test_scenes_hold_nothing_that_is_not_known(most):
    counts = Counter()
    for seed in range(60):
        image, figures = draw_question_scene(np.random.default_rng(seed), most)
        counts[len(figures)] += 1
        assert max(image.size) < 64 * 1.5 * (1 if len(figures) < 3 else 2)
    assert set(counts) == set(range(1, most + 1))


@pytest.mark.parametrize(
    "kind, answer, said, right",
    [
        ("choice", "B", "B", True),
        ("choice", "B", " b.", True),
        ("choice", "B", "B. red", False),
        ("open", "Red.", "red", True),
        ("open", "Red.", "", False),
        ("reasoning", "star: 1. circle: 2. 1 is less than 2. No.", "star: 1. circle: 1. No.", True),
        ("reasoning", "star: 1. circle: 2. 1 is less than 2. No.", "", False),
    ],
)
def test_what_counts_as_right(kind, answer, said, right):
    assert is_right(Question(kind, "", answer), said) is right


def test_training_rows_are_the_prompt_of_inference_and_padded_slots():
    processor = build_base_processor()
    data = QuestionDataset(0, 20, "easy")
    row = next(row for row in (data[i] for i in range(20)) if row["images"])
    encoded = PdlmCollator(processor).encode_chat(row, num_slots=24)
    prompt = processor(images=row["images"], text=row["messages"][0]["content"][1]["text"])["input_ids"][0].tolist()
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    answer = processor.tokenizer(row["messages"][1]["content"], add_special_tokens=False)["input_ids"]
    assert encoded["input_ids"] == prompt + answer + [end] * (24 - len(answer))
    assert encoded["labels"] == [-100] * len(prompt) + encoded["input_ids"][len(prompt) :]


def test_every_kind_is_asked():
    asked = Counter(ask(np.random.default_rng(seed), FIGURES).kind for seed in range(400))
    assert set(asked) == set(KINDS) and min(asked.values()) > 40


def test_lists_to_look_up_in():
    """The second list has the pairs of the first in another order, with one of each to fill in."""
    torch.manual_seed(0)
    tokens = tokens_of(PdlmProcessor.from_pretrained(BASE_CHECKPOINT), False)
    ids, hidden = lookup_batch(np.random.default_rng(0), 32, **tokens)
    pairs = ids.view(32, 2, PAIRS, 2)
    for row in pairs.tolist():
        assert sorted(row[0]) == sorted(row[1])
        assert len({letter for letter, _ in row[0]}) == len({word for _, word in row[0]}) == PAIRS
    assert not hidden[:, : 2 * PAIRS].any()
    assert (hidden[:, 2 * PAIRS :].view(32, PAIRS, 2).sum(2) == 1).all()
    assert (pairs[:, 0] != pairs[:, 1]).any()


def test_lists_to_look_up_in_as_options():
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    ids, hidden = lookup_batch(np.random.default_rng(0), 4, **tokens_of(processor, True))
    for row, gaps in zip(ids, hidden, strict=True):
        lines = processor.tokenizer.decode(row).strip().split("\n")
        assert len(lines) == 2 * PAIRS and sorted(lines[:PAIRS]) == sorted(lines[PAIRS:])
        assert all(line[0] in "ABCDEFGH" and line[1:3] == ". " and line[3:].isalpha() for line in lines)
        assert gaps.sum() == PAIRS and not gaps[: len(gaps) // 2].any()
        assert {processor.tokenizer.decode(token)[-1].isalpha() for token in row[gaps]} == {True}


def test_letters_asked_for_without_a_image():
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    ids, hidden = stages(processor)["asked"](np.random.default_rng(0), 16)
    assert hidden.sum(1).tolist() == [1] * 16
    for row, gap in zip(ids, hidden, strict=True):
        text = processor.tokenizer.decode(row)
        asked, *lines = text.split("Which is ")[1].split("\n")
        listed = {line[3:]: line[0] for line in lines if line[1:3] == ". "}
        assert processor.tokenizer.decode(row[gap]) == listed[asked.rstrip("?")]
        assert text.endswith(processor.tokenizer.decode(row[gap]) + processor.tokenizer.eos_token)


def test_an_image_in_words():
    question = told(Question("open", "What colour is the star?", "Red."), FIGURES[:1])
    figure = FIGURES[0]
    said = f"A {figure.size} {figure.colour} {figure.texture} {figure.shape}."
    assert (question.text, question.answer) == (f"{said}\nWhat colour is the star?", "Red.")


def test_a_figure_by_letters():
    """The letters are those of the figure's words in the list; so are the words, and both."""
    forms = Counter()
    for seed in range(100):
        question = by_letters(np.random.default_rng(seed), FIGURES)
        asked, *lines, prompt = question.text.split("\n")
        options = dict(line.split(". ") for line in lines)
        assert list(options) == list("ABCDEFGH") and len(set(options.values())) == 8
        (figure,) = figures_named(asked)
        words = [figure.size, figure.colour, figure.texture, figure.shape]
        said = question.answer.split("\n")
        answers = {
            "letters.": [options.get(line) for line in said],
            "words.": said[0][2:-1].split(),
            "letters and words.": [options.get(line[0]) and line[3:] for line in said],
        }
        form = prompt.removeprefix("Answer with ")
        assert answers[form] == words
        assert form != "letters and words." or all(line in lines for line in said)
        forms[form] += 1
    assert set(forms) == set(answers) and min(forms.values()) > 10
    assert by_letters(np.random.default_rng(0), [FIGURES[0], FIGURES[0]]) is None


def test_several():
    """Named as questions name them; reasoning compares shapes alone."""
    assert several(FIGURES, "count") == {"circles": 2, "red figures": 2}
    assert several(FIGURES[:2], "tally") == {"red figures": 2} and several(FIGURES[1:], "count") == {"circles": 2}
    assert several(FIGURES[:2], "reasoning") == {} and several(FIGURES[1:], "reasoning") == {"circles": 2}
    assert several([FIGURES[0], FIGURES[2]], "count") == several(FIGURES[:1], "count") == {}


def test_two_of_a_kind_are_counted_often():
    """In the lesson on counting; by chance it would be three answers in a hundred."""
    data, numbers = QuestionDataset(0, 600, "count"), Counter()
    for row in (data[k] for k in range(600)):
        question, answer = row["messages"][0]["content"][-1]["text"], row["messages"][1]["content"]
        if question.startswith("How many") and "How many figures" not in question:
            numbers.update(answer.split("\n"))
    assert set(numbers) == {"0", "1", "2"} and min(numbers.values()) > sum(numbers.values()) / 12


def test_a_tally():
    """Every number is that of its line."""
    seen = Counter()
    for seed in range(60):
        question = tally(np.random.default_rng(seed), FIGURES)
        names = question.text.split("\n")[1:]
        for name, number in zip(names, question.answer.split("\n"), strict=True):
            words = name.removesuffix("s").removesuffix(" figure").replace("crosse", "cross").split()
            expected = sum(all(word in (f.colour, f.shape) for word in words) for f in FIGURES)
            assert number == str(expected), name
            seen[len(words), number] += 1
    assert {(2, "0"), (2, "1"), (1, "0"), (1, "2")} <= set(seen)


@pytest.mark.parametrize("lesson", LESSONS)
def test_slots_hold_the_answer(lesson):
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    data = QuestionDataset(0, 300, lesson)
    for k in range(300):
        row = data[k]
        answer = processor.tokenizer(row["messages"][1]["content"], add_special_tokens=False)["input_ids"]
        assert len(answer) < row["num_slots"]


def test_words_of_letters():
    """At the letters of an answer stand their words, whatever the form of the answer."""
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    rows = [QuestionDataset(0, 200, "letters")[k] for k in range(200)]
    batch, seen = QuestionCollator(processor)(rows), Counter()
    decode = processor.tokenizer.decode
    for row, labels, words in zip(rows, batch["labels"], batch["words"], strict=True):
        question, answer = row["messages"][0]["content"][-1]["text"], row["messages"][1]["content"]
        options = {line[0]: line[3:] for line in question.split("\n") if line[1:3] == ". "}
        there = (words != -100).nonzero()[:, 0]
        assert [options[decode(labels[k])] for k in there] == [decode(words[k]).strip() for k in there]
        seen[len(there), "letters and words" in question] += 1
        assert len(there) == len(
            [line for line in answer.split("\n") if line[:1] in options and line[1:2] in ("", ".")]
        )
    assert {(0, False), (1, False), (4, False), (4, True)} <= set(seen)


def test_the_word_is_known_before_the_last_layer(tmp_path):
    """The loss of the words is that of the last layer but one, read by the head."""
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    model = PdlmBaseForConditionalGeneration.from_pretrained(BASE_CHECKPOINT)
    trainer = QuestionTrainer([], model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    rows = QuestionCollator(processor)([QuestionDataset(0, 16, "letters")[k] for k in range(16)])
    asked = (rows["words"] != -100) & rows["noise_mask"]
    assert asked.any()
    inputs = {name: value for name, value in rows.items() if name != "words"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-2]  # what the last layer is given
    logits = model.get_output_embeddings()(model.model.language_model.norm(hidden[asked]))
    expected = torch.nn.functional.cross_entropy(logits, rows["words"][asked])
    without = trainer.compute_loss(model.eval(), rows)
    torch.testing.assert_close(trainer.compute_loss(model.train(), rows) - without, expected)


def test_lists_are_part_of_the_loss_while_training(tmp_path):
    """Of each kind an equal share of the rows; when it does not train, the loss is that of the questions."""
    processor = PdlmProcessor.from_pretrained(BASE_CHECKPOINT)
    model = PdlmBaseForConditionalGeneration.from_pretrained(BASE_CHECKPOINT)
    asked = stages(processor)["asked"]
    seen = []

    def batch(rng, rows):
        seen.append((rows, asked(rng, rows)))
        return seen[-1][1]

    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = QuestionTrainer([batch, batch], model=model, args=arguments)
    rows = QuestionCollator(processor)([QuestionDataset(3, 2, "easy")[k] for k in range(2)])
    rows["words"][:] = -100
    without = trainer.compute_loss(model.eval(), rows)
    assert not seen
    with_lists = trainer.compute_loss(model.train(), rows)
    assert [rows for rows, _ in seen] == [LISTS // 2] * 2
    expected = sum(lookup_loss(model, *lists)[0] for _, lists in seen)
    torch.testing.assert_close(with_lists - without, expected)
    assert [len(right) for right in trainer.right] == [1, 1]
