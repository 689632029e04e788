"""Both readers of replies, row by row, and the reference's against an oracle written rule by rule."""

import random

import pytest

from pdlm_evalkit.paradlc.parsing import parse_reference, parse_robust

TIE = (
    "The tie is red.",
    "The person or their tie is not mentioned.",
    "The tie is mentioned but not red.",
    "The tie colour is not mentioned, but the tie is mentioned.",
)
FAN = (
    "The fan of the ceiling is mentioned in the description.",
    "The ceiling is not mentioned in the description.",
    "The fan of the ceiling is not mentioned in the description.",
)
YES_NO = ("Yes", "No")

# reply, choices, what the reference takes in ParaDLC-Bench, in DLC-Bench, and what the robust reader takes
TABLE = [
    ("A", TIE, 0, 0, 0),
    ("b", TIE, 1, 1, 1),
    (" C \n", TIE, 2, 2, 2),
    ("D.", TIE, 3, 3, 3),
    ("B. The person or their tie is not mentioned.", TIE, 1, 1, 1),
    ("b. the person or their tie is not mentioned.", TIE, 1, 1, 1),
    ("The tie is red.", TIE, 0, 0, 0),
    ("the tie is RED.", TIE, 0, 0, 0),
    ("The tie is red. It says so.", TIE, 0, 0, 0),
    ("B. because", TIE, 1, 1, 1),
    ("C\nThe caption says blue.", TIE, 2, 2, 2),
    # several texts: the reference takes the last, the longest of those at one place
    ("The tie is red. The tie is mentioned but not red.", TIE, 2, 2, None),
    ("A. The tie is red.\nB. The person or their tie is not mentioned.", TIE, 0, 0, None),
    # part of a text: the reference takes the longest choice it is part of
    ("not mentioned", TIE, 3, 3, None),
    ("The person or their tie", TIE, 1, 1, 1),
    ("x", ("box", "a longer box"), 1, 1, None),
    # forms the reference does not know
    ("(A)", TIE, None, None, 0),
    ("B)", TIE, None, None, 1),
    ("C:", TIE, None, None, 2),
    ("**D**", TIE, None, None, 3),
    ("**D.** The tie colour is not mentioned, but the tie is mentioned.", TIE, 3, 3, 3),
    ("Answer: B", TIE, None, None, 1),
    ("The answer is C.", TIE, None, None, 2),
    ("```\nB\n```", TIE, None, None, 1),
    ('{"answer": "B"}', TIE, None, None, 1),
    ("The correct answer is (D).", TIE, None, None, 3),
    # its surprises
    ("", TIE, 3, None, None),
    (" \n ", TIE, 3, None, None),
    ("", YES_NO, 0, None, None),
    ("e", YES_NO, 0, None, None),
    ("e", TIE, 3, None, None),
    ("E. none of these", TIE, None, None, None),
    ("I do not know", YES_NO, 1, 1, None),
    ("not sure", YES_NO, 1, 1, None),
    ("I do not know", TIE, None, None, None),
    ("C", YES_NO, None, None, None),
    ("Yes", YES_NO, 0, 0, 0),
    ("a. yes", YES_NO, 0, 0, 0),
    ("No, it is a dog.", YES_NO, 1, 1, 1),
    ("A. No", YES_NO, 1, 1, None),
    ("Yes, nothing else fits.", YES_NO, 1, 1, 0),
    ("Maybe", YES_NO, None, None, None),
]


@pytest.mark.parametrize("reply, choices, paradlc, dlc, robust", TABLE)
def test_every_reader(reply, choices, paradlc, dlc, robust):
    assert parse_reference(reply, choices) == paradlc
    assert parse_reference(reply, choices, "dlc") == dlc
    assert parse_robust(reply, choices) == robust


ROBUST = [
    *[
        (form, 1)
        for form in ("(b)", "[B]", "B]", "b.", "- B", "> B", "'B'", '"B".', "_B_", "__B__", "`B`", "B!", "# B")
    ],
    *[(form, 1) for form in ("B;", "B,", "B - so it is", "B \u2013 so", "B because it says so", "B is right", "B\nB")],
    *[
        (form, 1)
        for form in ("answer B", "Answer\nB", "ANSWER - B", "Final answer: **B**", "My answer would be B, as")
    ],
    *[(form, 1) for form in ("option b", "Answer：Ｂ")],
    *[(form, 1) for form in ("Option B", "Choice (B)", "I would choose option B", "\\boxed{B}", "<answer>B</answer>")],
    *[(form, 1) for form in ("<think>A or C?</think>B", "B. B", "(B) The person or their tie is not mentioned")],
    *[
        (form, 1)
        for form in ("B The person or their tie is not mentioned.", "B:The person or their tie is not mentioned")
    ],
    ("B - A is wrong", 1),
    ("B.\n\nExplanation: A is wrong, and so is C.", 1),
    ("A. Options B and C are wrong.", 0),
    ("The answer is A because it is said.", 0),
    ("A) The tie is red. B is wrong.", 0),
    ("A. The tie is red.\nB. The person or their tie is not mentioned.\n\nAnswer: A", 0),
    ("\u201cThe tie is red\u201d", 0),
    ("The tie   is\nred", 0),
    ("According to the description, the tie is mentioned but not red.", 2),
    ("The answer is: the tie is red.", 0),
    *[
        (form, None)
        for form in ("A or B", "A and C", "A, B", "A/B", "A & B", "A\nB", "A B", "(A) (B)", "Both A and B")
    ],
    *[
        (form, None)
        for form in ("The answer is A or B.", "It is either B or C", "Answer: A. Answer: B", "A. The answer is B")
    ],
    *[(form, None) for form in ("E", "(E)", "Answer: E", "F", "N/A", "None of the above", "The answer is not A.")],
    *[
        (form, None)
        for form in ("Not sure.", "I am not sure, A or B", "I cannot tell.", "I'm sorry, I can't help.", "?")
    ],
    *[(form, None) for form in ("A tie is shown.", "A dog", "Answer: A person", "...", "mentioned")],
    ("A. The tie is mentioned but not red.", None),
    ("B: The tie is red.", None),
]


# a letter at the end of a line, and letters that the reply rejects
EXPLAINED = [
    *[
        (form.replace("X", "ABCD"[index]), index)
        for form in (
            "Answer: X\nThe description supports it.",
            "The answer is X\n\nExplanation: it is said.",
            "Option X\nIt is said.",
            "Final answer: X\nSo it is.",
            "I would choose option X\nThe reason is simple.",
            "**Answer:** X\n\nE. is wrong because it is not said.",
            "The best option is X.\nE is incorrect because it is not said.",
            "I choose X\n(E) is wrong",
            "Option X\nE is wrong.",
            "X, not E",
            "The correct answer is not E but X.",
            "E is wrong. X is correct.",
            "The answer is X rather than E",
            "Answer: X. Option E can't be right.",
            "Answer: X. Neither fits, so E is ruled out.",
        )
        for index in range(4)
    ],
    ("Answer: B. A and C are incorrect.", 1),
    ("Answer: B. Options A, C and D are clearly wrong.", 1),
    ("A, B and C are wrong.\nD is right.", 3),
    ("A is incorrect, B is incorrect, so C.", 2),
    ("I ruled out A and B. My answer is C", 2),
    ("Answer: A\n\nB. is wrong because it is not said.", 0),
    *[
        (form, None)
        for form in (
            "A is not correct.",
            "Not A",
            "The answer cannot be B.",
            "B is not the answer",
            "A isn't right",
            "Options A and B are wrong.",
            "(C) does not apply",
            "Not A dog",
            "B is wrong and C is right, but so is D",
        )
    ],
]


@pytest.mark.parametrize("reply, expected", EXPLAINED)
def test_letters_that_are_rejected(reply, expected):
    assert parse_robust(reply, TIE) == expected


@pytest.mark.parametrize("reply, expected", ROBUST)
def test_the_robust_reader(reply, expected):
    assert parse_robust(reply, TIE) == expected


@pytest.mark.parametrize(
    "reply, expected",
    [
        *[
            (reply, 0)
            for reply in ("yes.", "**Yes**", "Yes!", "I would say yes.", "A\nYes", "Yes (A)", "A. Yes, no doubt")
        ],
        *[(reply, 1) for reply in ("B. No", "The answer is no.", "Answer: No", "No. It is a cat, not a dog.", "NO")],
        *[
            (reply, None)
            for reply in ("no idea", "There is no way to tell", "Yes and no", "Yes/No", "It could be yes or no")
        ],
        *[(reply, None) for reply in ("None", "Nothing", "I know", "unknown", "Yes\nNo", "cannot say: no")],
    ],
)
def test_the_robust_reader_on_recognition(reply, expected):
    assert parse_robust(reply, YES_NO) == expected


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("form", ["{0}", "{1}. {0}", "({1}) {0}", "{1}) {0} For sure.", "The answer is: {0}", "*{0}*"])
def test_choices_that_hold_parts_of_each_other(form, index):
    assert parse_robust(form.format(FAN[index], "ABC"[index]), FAN) == index


def oracle(reply, choices, benchmark):
    """The reference's rules one after the other; None where it finds nothing or stops with an error."""
    text = reply.strip().lower()
    lowered = [choice.strip().lower() for choice in choices]
    letters = ["a", "b", "c", "d", "e"]
    for number in range(len(lowered)):
        exact = [lowered[number], letters[number], letters[number] + ". " + lowered[number]]
        if text in exact:
            return number
    inside = []
    for number in range(len(lowered)):
        if lowered[number] in text:
            inside.append(number)
    if len(inside) == 1:
        return inside[0]
    if text == "" and benchmark == "dlc":
        return None
    if len(text) == 1 and text in letters and benchmark == "dlc":
        return None
    if len(text) > 1 and text[0] in letters and text[1] == ".":
        number = letters.index(text[0])
        return number if number < len(lowered) else None
    if inside:
        furthest = max(text.index(lowered[number]) for number in inside)
        there = [number for number in inside if text.index(lowered[number]) == furthest]
        longest = max(len(lowered[number]) for number in there)
        return [number for number in there if len(lowered[number]) == longest][0]
    around = [number for number in range(len(lowered)) if text in lowered[number]]
    if around:
        longest = max(len(lowered[number]) for number in around)
        return [number for number in around if len(lowered[number]) == longest][0]
    if text[0] in letters and (len(text) == 1 or text[1] == "\n"):
        number = letters.index(text[0])
        return number if number < len(lowered) else None
    return None


def messy_reply(rng, choices):
    """Letters, texts and parts of texts, put together in ways a judge may."""
    pieces = [
        "A",
        "B",
        "C",
        "D",
        "E",
        "a",
        "e",
        "yes",
        "no",
        "I do not know",
        "Answer: ",
        "The answer is ",
        "x",
        "the",
    ]
    pieces += ["", "(", ")", ". ", ".", ": ", "\n", "**", " ", '"']
    parts = []
    for _ in range(rng.randint(0, 4)):
        kind, choice = rng.random(), rng.choice(choices)
        start = rng.randint(0, len(choice))
        if kind < 0.5:
            parts.append(rng.choice(pieces))
        elif kind < 0.75:
            parts.append(rng.choice([choice, choice.upper(), choice.lower(), f"{rng.choice('ABCDE')}. {choice}"]))
        else:
            parts.append(choice[start : start + rng.randint(0, 25)])
    return "".join(parts)


@pytest.mark.parametrize("choices", [TIE, FAN, YES_NO, ("same", "same"), ("a", "ab", "abc"), ("x. y", "y")])
def test_the_reference_reader_is_the_oracle(choices):
    rng = random.Random(str(choices))
    for _ in range(3000):
        reply = messy_reply(rng, choices)
        for benchmark in ("paradlc", "dlc"):
            assert parse_reference(reply, choices, benchmark) == oracle(reply, choices, benchmark), repr(reply)


def test_the_robust_reader_takes_any_text():
    rng = random.Random(0)
    for choices in (TIE, FAN, YES_NO):
        for _ in range(300):
            reply = messy_reply(rng, choices)
            assert parse_robust(reply, choices) in (None, *range(len(choices)))
            assert parse_robust(f" {reply}\n", choices) == parse_robust(reply, choices)


@pytest.mark.parametrize(
    "piece, choices, expected",
    [
        ("A" + " " * 200_000 + "B", YES_NO, None),
        ("x" + "_" * 200_000 + "x", YES_NO, None),
        ("Answer" + " " * 200_000 + "B", YES_NO, 1),
        ("Answer: B " * 20_000, YES_NO, 1),
        ("not" + " " * 200_000 + "B", YES_NO, None),
        ("I say B, " * 20_000, YES_NO, 1),
        ("option b, " * 20_000, YES_NO, 1),
        ("the tie is red " * 20_000, ("the tie is red", "red"), 0),
        ("<a" * 100_000, YES_NO, None),
        ("e" + "\u0315\u0300" * 100_000, YES_NO, None),
        ("<think>" * 30_000, YES_NO, None),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_long_replies_take_linear_time(piece, choices, expected):
    """Each took minutes or hours when a rule was quadratic."""
    assert parse_robust(piece, choices) == expected


def test_accents_in_two_spellings_are_the_same():
    assert parse_robust("cafe\u0301", ("caf\u00e9", "bar")) == parse_robust("caf\u00e9", ("cafe\u0301", "bar")) == 0
