"""Counts how VLMEvalKit scores answers, and keeps the useful replies of its judge.

VLMEvalKit hides what its judge does: without a working judge it scores by rules, an option that the judge does not name
is drawn at random, and a failed request counts as a wrong answer; the result is the same table. [`JudgeLog`] observes
every request, whichever data set makes it, and every draw. Only replies that a score could be computed from are kept, so
that a second evaluation asks for the others again and for nothing else.
"""

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

from pdlm_hf.errors_pdlm import ServerError

from .report import read_lines

# How an answer was scored, the worst last: an answer that was scored in two steps has the worse one.
OUTCOMES = ("rules", "unparsed", "judge", "random", "failed")
FAILURE = "Failed to obtain answer via API"  # VLMEvalKit's reply for a request that failed
_GAVE_UP = re.compile(r"\bAll \d+ retries failed|\bfailed to parse\.\s*$", re.IGNORECASE)
_NO_RULE = "Failed in Prefetch"
# What a judge says of an answer that has no answer in it.
_NO_ANSWER = re.compile(r"\b(none|null|n/?a|no answer|not (given|provided|possible|enough)|unknown|cannot|can't)\b", re.I)


@dataclass
class _Scoring:
    """What happens while one answer is scored: (key of the prompt, reply) in order, and prompts that led to a draw."""

    said: list[tuple[str, str]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    draws: int = 0


class JudgeLog:
    """Observes the evaluations of a run of VLMEvalKit.

    Args:
        judge (`str`): model and address of the judge; replies of another judge are not used.
        path (`Path`): file of useful replies, of this and earlier runs.
    """

    def __init__(self, judge: str, path: Path):
        self.judge, self.path = judge, path
        self._lock, self._local = threading.Lock(), threading.local()
        self._kept: dict[str, str] = {}
        if path.is_file():
            self._kept = {row["key"]: row["reply"] for row in read_lines(path)}
        self._counts: dict[str, dict[str, str]] = {}  # data set: answer: outcome
        self._dataset: str | None = None
        self.requests: Counter[str] = Counter()

    def install(self) -> None:
        """Replace the functions of VLMEvalKit (and `random.choice`) that are observed."""
        import vlmeval.api
        import vlmeval.smp
        import vlmeval.utils.mp_util as pool

        from vlmeval.api.base import BaseAPI

        for kind in (BaseAPI, vlmeval.api.HFChatModel):
            kind.generate = self._generate(kind.generate)
        BaseAPI.working = _must_work(BaseAPI.working)
        pool.new_func = self._scoring(pool.new_func)
        random.choice = self._choice(random.choice)
        vlmeval.smp.upsert_dataset_status = self._status(vlmeval.smp.upsert_dataset_status)

    def counts(self, dataset: str, total: int, unparsed: int = 0) -> dict[str, int]:
        """Number of answers by the way they were scored.

        Args:
            dataset (`str`): the data set.
            total (`int`): number of its answers.
            unparsed (`int`): answers that no rule can read and no judge was asked about, from [`unparsed_in`].
        """
        found = Counter(self._counts.get(dataset, {}).values())
        counts = {name: found.get(name, 0) for name in OUTCOMES}
        counts["unparsed"] = max(counts["unparsed"], unparsed)
        counts["rules"] = max(0, total - sum(counts[name] for name in OUTCOMES if name != "rules"))
        return counts

    # ---------------------------------------------------------------- what is observed

    def _status(self, original: Callable) -> Callable:
        def upsert_dataset_status(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("status") == "eval":
                self._dataset = kwargs["dataset_name"]
                self._counts[self._dataset] = {}
            elif kwargs.get("status") == "done":
                self._dataset = None
            return original(*args, **kwargs)

        return upsert_dataset_status

    def _generate(self, original: Callable) -> Callable:
        def generate(model: Any, message: Any, *args: Any, **kwargs: Any) -> Any:
            if self._dataset is None or message == "hello":  # no evaluation, or VLMEvalKit's own trial
                return original(model, message, *args, **kwargs)
            key = self._key(message)  # before the call, which changes the message
            scoring = self._current()
            if key in self._kept and all(key != asked for asked, _ in scoring.said):
                reply = self._kept[key]
            else:
                self.requests[self._dataset] += 1
                reply = original(model, message, *args, **kwargs)
            scoring.said.append((key, reply if isinstance(reply, str) else json.dumps(reply, default=str)))
            if scoring is not getattr(self._local, "scoring", None):  # asked outside any pool
                self._finish(scoring, key, None, None)
            return reply

        return generate

    def _choice(self, original: Callable) -> Callable:
        def choice(options: Any) -> Any:
            if self._dataset is not None and sys._getframe(1).f_globals.get("__name__", "").startswith("vlmeval.data"):
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
            if self._dataset is not None:
                rows = _rows_in(inputs)
                self._finish(scoring, _index_of(rows, number), result, rows[0] if len(rows) == 1 else None)
            return position, result

        return new_func

    def _current(self) -> _Scoring:
        return getattr(self._local, "scoring", None) or _Scoring()

    def _key(self, message: Any) -> str:
        text = json.dumps([self.judge, self._dataset, message], ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

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
            lines = [
                json.dumps({"key": key, "reply": last[key]}, ensure_ascii=False) + "\n"
                for key, outcome in found.items()
                if outcome == "judge" and key not in self._kept
            ]
            self._kept |= {key: last[key] for key, outcome in found.items() if outcome == "judge"}
            if lines:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)

    def _count(self, answer: str, outcome: str) -> None:
        counts = self._counts.setdefault(self._dataset or "", {})
        counts[answer] = max(outcome, counts.get(answer, "rules"), key=OUTCOMES.index)


def _must_work(original: Callable) -> Callable:
    def working(model: Any) -> bool:
        """Raises: ServerError: the judge does not answer; VLMEvalKit would score by rules and not say so."""
        if not original(model):
            raise ServerError("the judge does not answer, and VLMEvalKit would score by rules in silence")
        return True

    return working


def _rows_in(inputs: Any) -> list[Any]:
    """The rows of a data set among the arguments of a scoring function: mappings with an `index`, or tables of them."""
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
        text = reply.lower()
        choices = [str(choice).lower() for choice in re.findall(r"'([^']*)'|\"([^\"]*)\"", str(row["choices"])) for choice in choice]
        return re.search(r"\b[A-H]\b", reply) is not None or any(choice and choice in text for choice in choices)
    if row["answer_type"] in ("integer", "float"):
        return re.search(r"\d", reply) is not None
    return True


def unparsed_in(folder: Path, model: str, dataset: str) -> dict[str, int]:
    """Count what VLMEvalKit's tables of an evaluation say of answers that were not scored as they should be.

    Args:
        folder (`Path`): the folder of the run.
        model, dataset (`str`): names of the model and of the data set.

    Returns:
        "unparsed": answers that no rule could read, without a judge; "random": options drawn; "failed": requests to
        the judge that failed.
    """
    counts = {"unparsed": 0, "random": 0, "failed": 0}
    for path in sorted(folder.glob(f"{model}_{dataset}_*")):
        if path.suffix not in (".xlsx", ".tsv", ".json", ".csv") or path.stem.endswith(("_acc", "_score", "_results")):
            continue
        for row in read_table(path):
            logs = " ".join(str(value) for name, value in row.items() if str(name).startswith("log"))
            counts["unparsed"] += _NO_RULE in logs or row.get("extracted") == "Unknown"
            counts["random"] += "randomly generate one" in logs
            counts["failed"] += "retries failed" in logs
    return counts


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table that VLMEvalKit wrote; none if it is no table."""
    import pandas

    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, list) else []
        if path.suffix == ".xlsx":
            return pandas.read_excel(path).to_dict("records")
        return pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",").to_dict("records")
    except (OSError, ValueError):
        return []
