"""Parse a judge's reply: which of the choices does it name?

`parse_reference` applies the rules of the reference's scripts in their order, on which published scores depend.
`parse_robust` understands more ways to name a choice, and accepts nothing that is not an answer.

A reply is text from outside, of any length: every rule takes time proportional to it.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

LETTERS = "abcde"

Parser = Callable[[str, Sequence[str]], int | None]


def parse_reference(reply: str, choices: Sequence[str], benchmark: str = "paradlc") -> int | None:
    """The choice that the reference's script finds in a reply.

    The first rule that applies decides: the reply is a choice, its letter, or "letter. choice"; it contains one choice
    and no other; it starts with a letter and a full stop; of several choices in it, the one found furthest back (of
    those that start there, the longest); of the choices that contain the reply, the longest; a letter on the first
    line alone.
    Surprises that are the reference's: an empty reply is contained in every choice, and "I do not know" contains "no".

    Args:
        reply (`str`): the reply of the judge.
        choices (`Sequence[str]`): the texts of the choices.
        benchmark (`str`): "paradlc" or "dlc"; their scripts differ where a reply is too short for a full stop.

    Returns:
        the position of the choice, or None if the script finds none or would stop with an error.
    """
    reply = reply.strip().lower()
    choices = [choice.strip().lower() for choice in choices]
    for index, (letter, choice) in enumerate(zip(LETTERS, choices, strict=False)):
        if reply in (choice, letter, f"{letter}. {choice}"):
            return index
    contained = [index for index, choice in enumerate(choices) if choice in reply]
    if len(contained) == 1:
        return contained[0]
    named = LETTERS.find(reply[0]) if reply else -1
    if benchmark == "dlc" and (not reply or (named >= 0 and len(reply) == 1)):
        return None  # the script looks at a second character that is not there
    if named >= 0 and reply[1:2] == ".":
        return named if named < len(choices) else None
    if contained:
        return max(contained, key=lambda index: (reply.find(choices[index]), len(choices[index])))
    if containing := [index for index, choice in enumerate(choices) if reply in choice]:
        return max(containing, key=lambda index: len(choices[index]))
    if named >= 0 and reply[1:2] in ("", "\n"):
        return named if named < len(choices) else None
    return None


# A letter, alone or in brackets, but not within a word or something like "N/A".
_LETTER = r"(?<![\w'/.-])[(\[]?([A-Ea-e])[)\]]?(?![\w'])"
# A letter at the start of a line that is an answer: "A. dog" and "A because", but not "A dog".
_MARK = re.compile(
    r"[(\[]([A-Ea-e])[)\]]|([A-Ea-e])(?=\s*$|\s*[.):;,/&+]|\s+[-\u2013\u2014]\s|\s+(?:and|or|is|because|since|as)\b)"
)
_STATED = re.compile(
    r"\b(?:answer|correct (?:option|choice)|final choice)\b(?:\s+(?:is|would be|should be|must be))?[\s:=-]*"
    r"(?:(?:option|choice|letter)\s+)?" + _LETTER,
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"[)\].,:;\s]*(?:(?:and|or)\b|[,;/&+]|(?=[(\[]?[A-E][)\]]?(?![\w'])))\s*[(\[]?([A-Ea-e])(?![\w'])"
)
_VERB = re.compile(r"[^\S\n]*(?:$|\n|[^\w\s]|(?:is|because|since|as|seems|would|and|or|but|so)\b)")
# A letter within a sentence, with the word before it that makes it a choice.
_NAMED = re.compile(r"(?:\b(?i:option|choice|letter)\s+[(\[]?)?" + _LETTER)
# Letters that are said to be no answer: "not A", "B is wrong", "options B and C cannot be right". Lists and gaps in
# them are bounded, so that the time is linear.
_GAP = r"[^\S\n]{1,3}"
_CALLED = rf"(?:(?i:options?|choices?|letters?|answers?){_GAP})?"
_ONE = r"[(\[]?[A-E](?![\w'])[)\]]?"
_SEVERAL = rf"{_CALLED}{_ONE}(?:[^\S\n]?(?:[,/&+]|{_GAP}(?:and|or|nor)\b){{1,2}}[^\S\n]{{0,3}}{_CALLED}{_ONE}){{0,4}}"
_WRONG = (
    r"(?:not|wrong|incorrect|false|inaccurate|untrue|invalid|unsupported|contradicted|impossible|excluded|eliminated|"
    r"rejected|ruled out|no (?:answer|option|choice|match))"
)
_IS_NOT = (
    rf"(?:(?:is|are|was|were|be|seems?|looks?|(?:can|must|should|would) be){_GAP}"
    rf"(?:(?:\w{{1,12}}ly|also|both|all|then|just){_GAP})?{_WRONG}|"
    rf"(?:is|are|was|were|does|do|did|has|have|could|would|should)n't|can't|cannot|"
    rf"(?:can|could|does|do|did|would|should|has|have){_GAP}not)\b"
)
_NOT = (
    r"(?:not|cannot be|can't be|isn't|rather than|instead of|except(?: for)?|nor|never|rul(?:es?|ed|ing) out|"
    r"(?:reject|exclud|eliminat)(?:es?|s|ed|ing)?)"
)
_REJECTED = re.compile(
    rf"(?<![\w'/.-])(?:(?P<not>(?i:{_NOT})[^\S\n]+{_SEVERAL})|{_SEVERAL}[.,:]?{_GAP}(?i:{_IS_NOT}))"
)
_DOUBT = re.compile(
    r"\b(?:not (?:sure|certain|clear)|unsure|uncertain|unclear|unknown|undecided|no idea|no way|none of|n/a|neither|"
    r"(?:do not|don't|cannot|can't|could not|couldn't|unable to|impossible to) "
    r"(?:know|tell|say|determine|decide|answer|choose|see|judge))\b"
)


def parse_robust(reply: str, choices: Sequence[str]) -> int | None:
    """The choice a reply names, by letter or by text, if it names exactly one.

    It understands "B", "(B)", "b)", "**B**", "B: ...", "Answer: B", "The answer is C.", a choice's text with or
    without its letter, quotes, Markdown, code fences, and an explanation after the answer, which may say why others
    are wrong. These are no answers: an empty reply, doubt ("I do not know"), two different letters, a letter with the
    text of another choice, a letter without a choice, a letter that is rejected ("not A", "B is wrong").

    Args:
        reply (`str`): the reply of the judge.
        choices (`Sequence[str]`): the texts of the choices.

    Returns:
        the position of the choice, or None.
    """
    text = _plain(reply)
    wanted = [_words(choice) or "\0" for choice in choices]  # one of signs alone has no text to be named by
    if not text:
        return None
    if (found := _only(index for index, choice in enumerate(wanted) if choice == _words(text))) is not None:
        return found
    kept = _REJECTED.sub(_rejection, text)
    statements = [match for match in _STATED.finditer(kept) if _is_letter(match)]
    stated = {letter for match in statements for letter in (match.group(1).lower(), _joined(kept, match))} - {""}
    marked = _marked_letters(kept, wanted)
    if stated or marked:
        letters = stated or marked
        index = LETTERS.index(next(iter(letters)))
        agreed = len(letters) == 1 and index < len(wanted) and (not marked or letters <= marked)
        return index if agreed and _text_agrees(kept, wanted, index) else None
    words = _words(text)
    named = _by_text(words, wanted)
    if named is None and not _DOUBT.search(words):
        named = _in_prose(kept, wanted)
    return named


def _plain(reply: str) -> str:
    """The text without thoughts, Markdown, quotes and tags, in the same lines."""
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", _normalized(reply), flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}+", r"\1", text)
    text = re.sub(r"```[a-z]*|</?\w+>|[*`\"\u201c\u201d\u00ab\u00bb{}$]|\b_+|(?<!_)_+\b", " ", text)
    text = text.replace("\u2019", "'").replace("\u2018", "'")
    lines = [re.sub(r"^[\s>#\u2022-]+", "", line) for line in text.splitlines()]
    return "\n".join(line.strip().strip("'").strip() for line in lines if line.strip(" '"))


def _normalized(text: str) -> str:
    """The text with full-width letters and colons as ASCII, and accents joined to their letters (NFKC).

    Sorting a run of combining marks takes quadratic time; as in Unicode's stream-safe format 30 in a row are kept.
    """
    if text.isascii():
        return text
    kept, run = [], 0
    for char in text:
        run = run + 1 if unicodedata.combining(unicodedata.normalize("NFKD", char)[0]) else 0
        if run <= 30:
            kept.append(char)
    return unicodedata.normalize("NFKC", "".join(kept))


def _words(text: str) -> str:
    """The text for comparisons: lower case, single spaces, no full stop at the end."""
    return " ".join(_plain(text).casefold().split()).rstrip(" .!")


def _only(found) -> int | None:
    found = set(found)
    return found.pop() if len(found) == 1 else None


def _is_letter(match: re.Match) -> bool:
    """Whether an "a" is a letter and not an article: it has brackets, or no noun follows."""
    if match.group(1) not in "Aa" or match.group(0)[-1] in ")]":
        return True
    return _VERB.match(match.string, match.end()) is not None


def _rejection(match: re.Match) -> str:
    """What stays of letters that are said to be no answer: nothing, unless it is the article of "not A dog"."""
    if match.group("not") and match.group(0)[-1] == "A" and not _VERB.match(match.string, match.end()):
        return match.group(0)
    return ""


def _joined(text: str, match: re.Match) -> str:
    """A second letter directly after a letter: "A or B", "A, B", "A/B"."""
    end = text.find("\n", match.end())
    second = _JOINED.match(text, match.end(), len(text) if end < 0 else end)
    return second.group(1).lower() if second else ""


def _marked_letters(text: str, wanted: list[str]) -> set[str]:
    """The letters that are answers at the start of a line, and those joined to them."""
    letters = set()
    for line in text.splitlines():
        if match := _MARK.match(line):
            letters |= {(match.group(1) or match.group(2)).lower(), _joined(line, match)}
        elif match := re.match(r"[A-Ea-e] +", line):  # "B The tie is red.", "A B"
            letter, rest = line[0].lower(), line[match.end() :]
            second = re.match(r"[A-E](?!\w)", rest)
            own = wanted[LETTERS.index(letter)] if LETTERS.index(letter) < len(wanted) else None
            if second or (own and _starts(_words(rest), own)):
                letters |= {letter, second.group(0).lower() if second else ""}
    return letters - {""}


def _starts(words: str, choice: str) -> bool:
    return words.startswith(choice) and not words[len(choice) : len(choice) + 1].isalnum()


def _text_agrees(text: str, wanted: list[str], index: int) -> bool:
    """Whether the text after a letter is not that of another choice."""
    for line in text.splitlines():
        match = _MARK.match(line) or re.match(rf"{LETTERS[index]}(?=\s)", line, re.IGNORECASE)
        if match and match.group(0).strip("()[] ").lower() == LETTERS[index]:
            rest = _words(line[match.end() :].lstrip(" .):;,-\u2013\u2014"))
            said = [k for k, choice in enumerate(wanted) if _starts(rest, choice)]
            if said and index not in said:
                return False
    return True


def _by_text(words: str, wanted: list[str]) -> int | None:
    """The only choice whose text is in the reply; choices of one word must be at its start or end."""
    spans = []
    for index, choice in enumerate(wanted):
        pattern = rf"(?<!\w){re.escape(choice)}(?!\w)"
        for match in re.finditer(pattern, words):
            at_edge = match.start() == 0 or match.end() == len(words)
            if " " in choice or at_edge:
                spans.append((match.start(), match.end(), index))
    if _DOUBT.search(words) and all(" " not in wanted[index] for _, _, index in spans):
        return None  # "no idea" is not "no"
    if any(_offered(a, b, words) for a in wanted for b in wanted if a != b):
        return None  # "yes or no"
    if spans:
        return _only(_outer(spans))
    if len(words.split()) > 1 and not _DOUBT.search(words):  # a choice that was cut short
        return _only(
            index
            for index, choice in enumerate(wanted)
            if words in choice and re.search(rf"(?<!\w){re.escape(words)}", choice)
        )
    return None


def _outer(spans: list[tuple[int, int, int]]) -> Iterator[int]:
    """The choices of the spans (start, end, choice) that are not a part of a longer one."""
    reach = -1
    for (_, end), same in groupby(sorted(spans, key=lambda span: (span[0], -span[1])), lambda span: span[:2]):
        if end > reach:
            reach = end
            yield from (index for _, _, index in same)


def _offered(one: str, other: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(one)}\s*(?:or|and|/)\s*{re.escape(other)}(?!\w)", words) is not None


def _in_prose(text: str, wanted: list[str]) -> int | None:
    """The only letter named in a sentence: "I would choose option B"."""
    letters = set()
    for match in _NAMED.finditer(text):
        before = text[match.start() : match.start(1)]
        called = re.search("option|choice|letter", before, re.IGNORECASE)
        if (called or match.group(1).isupper()) and _is_letter(match):
            letters.add(match.group(1).lower())
    index = _only(LETTERS.index(letter) for letter in letters)
    return index if index is not None and index < len(wanted) else None
