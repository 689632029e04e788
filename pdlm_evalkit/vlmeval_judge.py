"""Counts how VLMEvalKit scores answers, and keeps the useful replies of its judge.

VLMEvalKit hides what its judge does: without a working judge it scores by rules, an option that the judge does not
name is drawn at random, and a failed request counts as a wrong answer; the result is the same table. [`JudgeLog`]
observes every request, whichever data set makes it, and every draw. Only replies that a score could be computed from
are kept, so that a second evaluation asks for the others again and for nothing else.
"""

import glob
import hashlib
import json
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdlm_hf.client import Reply, ReplyCache
from pdlm_hf.errors_pdlm import ServerError

from .check import RULES
from .tables import read_table

# How an answer was scored, the worst last: an answer that was scored in two steps has the worse one.
OUTCOMES = ("rules", "unparsed", "judge", "random", "failed")
FAILURE = "Failed to obtain answer via API"  # VLMEvalKit's reply for a request that failed
_GAVE_UP = re.compile(r"\bAll \d+ retries failed|\bfailed to parse\.\s*$", re.IGNORECASE)
_NO_RULE = "Failed in Prefetch,"  # "Failed in Prefetching" is an answer that was read, and is wrong
# The second is what a circular evaluation writes, without saying whether the judge answered or the option was drawn.
_DRAWN = re.compile(r"randomly generate one|^Rolling \d+: Answer is", re.MULTILINE)
# What a judge says of an answer that has no answer in it.
_NO_ANSWER = re.compile(
    r"\b(none|null|n/?a|no answer|not (given|provided|possible|enough)|unknown|cannot|can't)\b", re.I
)


_Subject = tuple[str, str]  # names of model and data set


@dataclass
class _Scoring:
    """What happens while one answer is scored: (key of the prompt, reply) in order, and prompts that led to a draw."""

    said: list[tuple[str, str]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    draws: int = 0


class JudgeLog:
    """Observes the evaluations of a run of VLMEvalKit.

    Args:
        path (`Path`): file of useful replies, of this and earlier runs. The key of a reply is its prompt with the
            names of judge and data set, not the address of the judge.

    Raises:
        SettingError: the file cannot be used.
    """

    def __init__(self, path: Path):
        self.installed = False
        self._kept = ReplyCache(path)
        self._lock, self._local = threading.Lock(), threading.local()
        self._outcomes: dict[_Subject, dict[str, str]] = {}  # of each answer
        self._requests: Counter[_Subject] = Counter()
        self._subject: _Subject | None = None

    def install(self) -> None:
        """Replace the functions of VLMEvalKit (and `random.choice`) that are observed.

        Raises:
            ImportError, AttributeError: this version of VLMEvalKit lacks them; nothing was replaced.
        """
        import vlmeval.api
        import vlmeval.smp
        import vlmeval.utils.mp_util as pool
        from vlmeval.api.base import BaseAPI

        replaced = [(kind, "generate", self._generate(kind.generate)) for kind in (BaseAPI, vlmeval.api.HFChatModel)]
        replaced += [
            (BaseAPI, "working", _must_work(BaseAPI.working)),
            (pool, "new_func", self._scoring(pool.new_func)),
            (random, "choice", self._choice(random.choice)),
            (vlmeval.smp, "upsert_dataset_status", self._status(vlmeval.smp.upsert_dataset_status)),
        ]
        for place, name, function in replaced:
            setattr(place, name, function)
        self.installed = True

    def counts(self, model: str, dataset: str, total: int, unparsed: int = 0) -> dict[str, int]:
        """Number of answers by the way they were scored, and `requests` to the judge.

        Args:
            model, dataset (`str`): names of the model and of the data set.
            total (`int`): number of the answers.
            unparsed (`int`): answers that no rule can read and no judge was asked about, from [`counted_in`].
        """
        found = Counter(self._outcomes.get((model, dataset), {}).values())
        found["unparsed"] = max(found["unparsed"], unparsed)
        found["rules"] = max(0, total - sum(found[name] for name in OUTCOMES if name != "rules"))
        return {name: found[name] for name in OUTCOMES} | {"requests": self._requests[model, dataset]}

    def judged(self, folder: Path, model: str, row: dict[str, Any]) -> dict[str, int]:
        """As [`counts`], of a data set of a run.

        Args:
            folder (`Path`): the folder of the run.
            model (`str`): the name of the model.
            row (`dict`): the data set's row of VLMEvalKit's run report, with the name of the `judge`.
        """
        rules = row["judge"] in (None, "", RULES)
        unparsed = counted_in(folder, model, row["benchmark"], RULES)["unparsed"] if rules else 0
        return self.counts(model, row["benchmark"], row["infer_total"] or 0, unparsed)

    # ---------------------------------------------------------------- what is observed

    def _status(self, original: Callable) -> Callable:
        def upsert_dataset_status(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("status") == "eval":
                self._subject = kwargs["model_name"], kwargs["dataset_name"]
            elif kwargs.get("status") == "done":
                self._subject = None
            return original(*args, **kwargs)

        return upsert_dataset_status

    def _generate(self, original: Callable) -> Callable:
        def generate(model: Any, message: Any, *args: Any, **kwargs: Any) -> Any:
            if self._subject is None or message == "hello":  # no evaluation, or VLMEvalKit's own trial
                return original(model, message, *args, **kwargs)
            judge = getattr(model, "model", None) or getattr(model, "model_path", type(model).__name__)
            key = _key_of([judge, self._subject[1], message])  # before the call, which changes the message
            scoring = self._current()
            kept = self._kept.get(key) if all(key != asked for asked, _ in scoring.said) else None
            if kept is not None and kept.text is not None:
                reply = kept.text
            else:
                self._requests[self._subject] += 1
                reply = original(model, message, *args, **kwargs)
            if not isinstance(reply, str):  # an agent's record: no judge of VLMEvalKit answers so
                return reply
            scoring.said.append((key, reply))
            if scoring is not getattr(self._local, "scoring", None):  # asked outside any pool
                self._finish(scoring, key, None, None)
            return reply

        return generate

    def _choice(self, original: Callable) -> Callable:
        def choice(options: Any) -> Any:
            if self._subject is not None and sys._getframe(1).f_globals.get("__name__", "").startswith("vlmeval.data"):
                scoring = self._current()
                scoring.draws += 1
                scoring.drawn += [scoring.said[-1][0]] if scoring.said else []
                if scoring is not getattr(self._local, "scoring", None):
                    self._finish(scoring, f"draw {id(scoring)}", None, None)
            return original(options)

        return choice

    def _scoring(self, original: Callable) -> Callable:
        def new_func(number: int, function: Callable, inputs: Any) -> Any:
            self._local.scoring = scoring = _Scoring()
            try:
                position, result = original(number, function, inputs)
            finally:
                self._local.scoring = None
            if self._subject is not None:
                rows = _rows_in(inputs)
                self._finish(scoring, _index_of(rows, number), result, rows[0] if len(rows) == 1 else None)
            return position, result

        return new_func

    def _current(self) -> _Scoring:
        return getattr(self._local, "scoring", None) or _Scoring()

    # ---------------------------------------------------------------- what it means

    def _finish(self, scoring: _Scoring, answer: str | None, result: Any, row: Any) -> None:
        """Count an answer, and keep the replies that its score came from."""
        last = dict(scoring.said)  # of each prompt, the last reply
        found = {key: outcome_of(reply, key in scoring.drawn, result, row) for key, reply in last.items()}
        with self._lock:
            if answer is None:  # several answers at once, a prompt each
                for key, outcome in found.items():
                    self._count(key, outcome)
            else:
                worst = max([*found.values(), "random" if scoring.draws else "rules"], key=OUTCOMES.index)
                unread = worst == "rules" and _NO_RULE in str(result)
                self._count(answer, "unparsed" if unread else worst)
        for key, outcome in found.items():
            if outcome == "judge":
                self._kept.put(key, "", Reply(last[key]))

    def _count(self, answer: str, outcome: str) -> None:
        if self._subject is not None:
            found = self._outcomes.setdefault(self._subject, {})
            found[answer] = max(outcome, found.get(answer, "rules"), key=OUTCOMES.index)


def _key_of(request: Any) -> str:
    text = json.dumps(request, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _must_work(original: Callable) -> Callable:
    def working(model: Any) -> bool:
        """Raises: ServerError: the judge does not answer; VLMEvalKit would score by rules and not say so."""
        if not original(model):
            raise ServerError("the judge does not answer, and VLMEvalKit would score by rules in silence")
        return True

    return working


def _rows_in(inputs: Any) -> list[Any]:
    """The rows of a data set among the arguments of a scoring function: mappings with `index`, or tables of them."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (list, tuple)) else [inputs]
    rows: list[Any] = []
    for value in values:
        if hasattr(value, "iloc") and hasattr(value, "columns"):
            rows += [value.iloc[k] for k in range(len(value))]
        elif hasattr(value, "keys") and "index" in value.keys():  # noqa: SIM118 - `in` of a pandas row tests its index
            rows.append(value)
    return rows


def _index_of(rows: list[Any], number: int) -> str | None:
    """The name of the answer that is scored; None for several answers."""
    return None if len(rows) > 1 else str(rows[0]["index"]) if rows else f"task {number}"


def outcome_of(reply: str, drawn: bool, result: Any, row: Any) -> str:
    """Find out what a reply of the judge was worth.

    Args:
        reply (`str`): the last reply to a prompt.
        drawn (`bool`): VLMEvalKit drew an option after this reply.
        result: what the scoring function of VLMEvalKit returned; None if unknown.
        row: the row of the data set; None if unknown, or if several are scored at once.

    Returns:
        "failed", "random" or "judge".
    """
    if FAILURE in reply or not reply.strip():
        return "random" if drawn else "failed"
    if drawn:
        return "random"
    if result == "Unknown":  # yes or no; the prompt allows this word
        return "judge" if "unknown" in reply.lower() else "failed"
    logs = [value for name, value in result.items() if "log" in str(name)] if isinstance(result, dict) else []
    if any(_GAVE_UP.search(str(log)) for log in logs):
        return "failed"
    return "judge" if _is_value(reply, row) else "failed"


def _is_value(reply: str, row: Any) -> bool:
    """Whether a reply can be what it was asked for. In MathVista the judge extracts a number or an option."""
    if row is None or "answer_type" not in row.keys() or "question_type" not in row.keys():  # noqa: SIM118
        return True
    if _NO_ANSWER.search(reply):
        return True
    if row["question_type"] == "multi_choice":
        quoted = re.findall(r"'([^']+)'|\"([^\"]+)\"", str(row["choices"]))
        texts = [text.lower() for pair in quoted for text in pair if text]
        return re.search(r"\b[A-H]\b", reply) is not None or any(text in reply.lower() for text in texts)
    if row["answer_type"] in ("integer", "float"):
        return re.search(r"\d", reply) is not None
    return True


def counted_in(folder: Path, model: str, dataset: str, judge: str | None) -> dict[str, int]:
    """Count what VLMEvalKit's own tables of an evaluation say of answers that were not scored as they should be.

    Args:
        folder (`Path`): the folder of the run.
        model, dataset (`str`): names of the model and of the data set.
        judge (`str`, *optional*): name of the judge; of a yes-or-no answer that stayed unknown, the tables do not say
            whether the judge failed, so that it counts as failed.

    Returns:
        "unparsed": answers that no rule could read, without a judge; "random": options that were drawn, or may have
        been; "failed": requests to the judge that failed.

    Raises:
        DataError: a table cannot be read.
        MissingPackageError: a table needs pandas or openpyxl.
    """
    found: dict[str, str] = {}  # the worst of all tables
    for path in sorted(folder.glob(f"{glob.escape(model)}_{glob.escape(dataset)}_*")):
        if path.suffix in (".xlsx", ".tsv") and not path.stem.endswith(("_acc", "_results")):
            for number, row in enumerate(read_table(path)):
                index = str(row.get("index", number))
                found[index] = max(found.get(index, "rules"), _outcome_in(row, judge), key=OUTCOMES.index)
    return {name: list(found.values()).count(name) for name in ("unparsed", "random", "failed")}


def _outcome_in(row: dict[str, Any], judge: str | None) -> str:
    logs = " ".join(str(value) for name, value in row.items() if str(name).startswith("log"))
    if _GAVE_UP.search(logs):
        return "failed"
    if _DRAWN.search(logs):
        return "random"
    if row.get("extracted") == "Unknown":
        return "unparsed" if judge == RULES else "failed"
    return "unparsed" if _NO_RULE in logs else "rules"
