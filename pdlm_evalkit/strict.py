"""The paper's strict judge for ChartQA, DocVQA and InfoVQA: Qwen3-8B decides whether a prediction has the answer.

The predictions come from the result files of either harness, the judge is a model of any OpenAI-compatible server, and
a stopped run continues where it stopped. The score is the reference's: the share of rows with the verdict CORRECT.
Failed requests and other replies count as wrong, are counted, and are asked for again by the next call.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlm_hf.client import ChatClient, Reply, ReplyCache
from pdlm_hf.client.chat import Request
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

from .benchmarks import find_benchmark
from .manifests import file_hash, judge_part, manifest_beside, text_hash
from .tables import read_lines, read_table

MODEL, BASE_URL = "Qwen/Qwen3-8B", "http://127.0.0.1:8000/v1"
# Settings and wording are the reference's, to the letter, since the scores depend on them.
SETTINGS: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1,
    "max_tokens": 1000,
    "top_k": 20,
    "chat_template_kwargs": {"enable_thinking": False},
}
SYSTEM_PROMPT = """
You are a strict evaluator.

You will be given:
1. A list or single ground truth answers (multiple valid formats).
2. A predicted answer, which may contain extra text or explanations.

Your task is to determine whether the prediction is correct.

----------------------
Evaluation Rules:

1. The prediction is considered CORRECT if it contains ANY one of the ground truth answers as a substring, ignoring minor formatting differences such as:
   - punctuation (e.g., ":" vs ".")
   - extra spaces
   - capitalization

2. Ignore any irrelevant text in the prediction, including reasoning, explanations, or content inside <think> tags.

3. Focus only on whether the core answer content matches one of the ground truth answers.

4. The prediction is INCORRECT if:
   - none of the valid answers appear in the prediction
   - or the meaning is clearly different

----------------------

Output format (strict):
- Output only one word: "CORRECT" or "INCORRECT"
- Do NOT output anything else
"""  # noqa: E501


@dataclass
class Row:
    """A row of a result file.

    Args:
        index (`str`): the index of the question.
        answer (`str`): the right answer, or a list of right answers, as written in the file.
        prediction (`str`): the answer of the model.
    """

    index: str
    answer: str
    prediction: str


def read_results(path: Path) -> list[Row]:
    """Read the rows of a result file.

    Args:
        path (`Path`): predictions of VLMEvalKit (.xlsx, .tsv, .csv, .json) or samples of lmms-eval (.jsonl).

    Raises:
        DataError: the file cannot be read, has no rows, or lacks a column.
        MissingPackageError: a table needs pandas or openpyxl.
    """
    readers = {
        ".jsonl": _lmms_rows,
        ".json": _json_rows,
        ".tsv": _table_rows,
        ".csv": _table_rows,
        ".xlsx": _table_rows,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file whose name ends with one of {', '.join(readers)}.")
    try:
        rows = readers[path.suffix](path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if not rows:
        raise DataError(f"{path}: the file has no rows.")
    return rows


def _need(row: Any, names: tuple[str, ...], path: Path, number: int) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(f"{path}: row {number} has no {' and no '.join(missing)}; is it a file of predictions?")


def _lmms_rows(path: Path) -> list[Row]:
    rows = []
    for number, row in enumerate(read_lines(path), 1):
        _need(row, ("target", "filtered_resps", "doc_id"), path, number)
        said = row["filtered_resps"]  # a list of lists, or less where there is one
        while isinstance(said, list):
            said = said[0] if said else ""
        rows.append(Row(str(row["doc_id"]), str(row["target"]), str(said)))
    return rows


def _json_rows(path: Path) -> list[Row]:
    content = load_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of rows.")
    for number, row in enumerate(content, 1):
        _need(row, ("answer", "prediction"), path, number)
    return [Row(str(row.get("index", k)), str(row["answer"]), str(row["prediction"])) for k, row in enumerate(content)]


def _table_rows(path: Path) -> list[Row]:
    table = read_table(path)
    for number, row in enumerate(table, 1):
        _need(row, ("answer", "prediction"), path, number)
    return [Row(str(row.get("index", k)), str(row["answer"]), str(row["prediction"])) for k, row in enumerate(table)]


def request_for(row: Row) -> Request:
    """The request about a row; as in the reference, the judge does not see the question."""
    user = f"Ground Truth(s): {row.answer}\nPrediction: {row.prediction}"
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]


def verdict_in(reply: str) -> str:
    """The verdict in a reply: "CORRECT" or "INCORRECT", whatever marks are around the word; else "UNPARSED"."""
    word = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).strip(" \n\t.*`\"'!:").upper()
    return word if word in ("CORRECT", "INCORRECT") else "UNPARSED"


class Verdicts(ReplyCache):
    """Replies with a verdict; the others are asked for again."""

    def get(self, key: str) -> Reply | None:
        """Return the reply with this key, or None if there is none, or none of use."""
        reply = super().get(key)
        return None if reply is None or verdict_in(reply.text or "") == "UNPARSED" else reply


def manifest_of(results: Path, benchmark: str, judge: str, base_url: str) -> dict[str, Any]:
    """The manifest of a strict score: that of the predictions, if there is one beside them, with this judge.

    Args:
        results (`Path`): the file of the predictions.
        benchmark (`str`): the name of the benchmark in the paper.
        judge, base_url (`str`): name and address of the judge.
    """
    found: dict[str, Any] = {}
    report = results.with_name("pdlm_report.json")
    if results.suffix == ".jsonl":  # RUN_samples_TASK.jsonl of lmms-eval
        run, _, task = results.stem.partition("_samples_")
        found = manifest_beside(results.with_name(f"{run}_results.json"), task) or {}
    elif report.is_file():
        rows = [row for row in load_json(report) if row["benchmark"] in results.name]
        same = [row for row in rows if getattr(find_benchmark(row["benchmark"]), "name", None) == benchmark]
        found = (same[0].get("manifest") if same else None) or {}
    own = judge_part(judge, judge, base_url, SETTINGS) | {"prompt": text_hash(SYSTEM_PROMPT)}
    return {**found, "judge": own, "predictions": {"file": results.name, "sha256": file_hash(results)}}


def judge_results(
    rows: list[Row], client: ChatClient, progress: Callable[[int, Reply], None] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the judge about every row and count the verdicts.

    Args:
        rows (`list[Row]`): rows from [`read_results`].
        client (`ChatClient`): the server of the judge.
        progress (*optional*): see [`ChatClient.ask_many`].

    Returns:
        the accuracy (share of all rows) with its counts, and the rows with their verdicts: "CORRECT", "INCORRECT",
        "UNPARSED" or "FAILED"; `accuracy_exact` is the reference's, for which "CORRECT." is not CORRECT. Tokens are
        those of all replies, of earlier attempts too.

    Raises:
        ServerError: the server cannot be used; the replies so far are in its cache.
    """
    verdicts, exact, tokens = ["FAILED"] * len(rows), 0, {"prompt_tokens": 0, "completion_tokens": 0}
    for index, reply in client.ask_many([request_for(row) for row in rows], progress):
        if reply.text is not None:
            verdicts[index] = verdict_in(reply.text)
            exact += reply.text.strip() == "CORRECT"
            tokens = {name: count + (getattr(reply, name) or 0) for name, count in tokens.items()}
    counts = {name: verdicts.count(name) for name in ("CORRECT", "INCORRECT", "UNPARSED", "FAILED")}
    score = {"accuracy": counts["CORRECT"] / len(rows), "accuracy_exact": exact / len(rows), "n_rows": len(rows)}
    score |= {f"n_{name.lower()}": count for name, count in counts.items()} | tokens
    return score, [{**vars(row), "verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)]
