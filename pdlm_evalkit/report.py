"""Measured scores and the paper's, from the result files of both harnesses and of the strict judge."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

from .benchmarks import BENCHMARKS, TOTAL_TILES, Benchmark, find_benchmark


@dataclass
class Measured:
    """A score of one benchmark.

    Args:
        benchmark (`str`): the name in the paper.
        harness (`str`): "VLMEvalKit", "lmms-eval" or "strict judge".
        score (`float`): the score in percent.
        metric (`str`): the name of the score in the harness.
        paper (`float`): the score of PerceptionDLM-Base in Table 1, in percent.
        questions (`int`, *optional*): number of questions.
        tokens_per_forward (`float`, *optional*): denoised token positions per forward pass, padding included.
        text_tokens_per_forward (`float`, *optional*): tokens before the end of the answers, per forward pass.
        seconds (`float`, *optional*): time of the model.
        note (`str`): how the measurement differs from the paper's.
        source (`str`): the file of the score.
    """

    benchmark: str
    harness: str
    score: float
    metric: str
    paper: float
    questions: int | None = None
    tokens_per_forward: float | None = None
    text_tokens_per_forward: float | None = None
    seconds: float | None = None
    note: str = ""
    source: str = ""

    @property
    def difference(self) -> float:
        """The measured score minus the paper's, in percentage points."""
        return round(self.score - self.paper, 2)


def collect(paths: list[Path]) -> list[Measured]:
    """Read all scores of the paper's benchmarks from files and folders.

    Returns:
        the scores in the order of the paper; of one benchmark the oldest first.

    Raises:
        DataError: a path does not exist, a result file cannot be read, or there is no score.
    """
    files: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        patterns = ("pdlm_report.json", "*_results.json", "*_strict.json")
        files |= {path} if path.is_file() else {file for pattern in patterns for file in path.rglob(pattern)}
    found: list[Measured] = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        content = load_json(file)
        if isinstance(content, list):
            found += [row for row in map(_from_vlmeval, content) if row is not None]
        elif not isinstance(content, dict):
            raise DataError(f"{file}: expected an object or a list of results, got {content!r:.60}.")
        elif "accuracy" in content:
            found += [row for row in [_from_strict(content)] if row is not None]
        else:
            found += _from_lmms(content, file)
        for row in found:
            row.source = row.source or str(file)
    if not found:
        raise DataError(f"There are no scores of the paper's benchmarks in {', '.join(map(str, paths))}.")
    order = [benchmark.name for benchmark in BENCHMARKS]
    return sorted(found, key=lambda row: order.index(row.benchmark))


def score_in(metrics: dict[str, Any], wanted: str, percents: bool) -> float | None:
    """Find a score.

    Args:
        metrics (`dict`): the scores of a harness by name; in VLMEvalKit the split comes before the name.
        wanted (`str`): a name, or names joined by "+" for their mean.
        percents (`bool`): whether the scores are in percent already, instead of shares.

    Returns:
        the score in percent; None if there is none.
    """
    found = []
    for name in wanted.split("+"):
        splits = {key.rpartition("|")[0]: value for key, value in metrics.items() if key.rpartition("|")[2] == name}
        value = next((splits[split] for split in ("", "split=none", "split=Overall") if split in splits), None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        found.append(value)
    return round(sum(found) / len(found) * (1 if percents else 100), 2)


def _from_vlmeval(row: dict[str, Any]) -> Measured | None:
    benchmark = find_benchmark(row["benchmark"])
    if benchmark is None:
        return None
    metric, value = row.get("primary_metric"), row.get("primary_metric_value")
    if isinstance(value, dict):  # several main metrics; the paper's is that of all questions
        metric, value = next(((k, v) for k, v in value.items() if "Overall" in k), (None, None))
    metrics = {"": value}
    if benchmark.vlmeval_metric is not None:
        metric, metrics = benchmark.vlmeval_metric, row.get("metrics") or {}
    score = score_in(metrics, benchmark.vlmeval_metric or "", benchmark.kind != "letter")
    if score is None:
        return None
    answers = row.get("answers") or {}
    notes = []
    if row.get("paper_settings") is None:
        notes.append("settings differ from the paper's")
    elif row.get("settings"):
        notes.append("changed: " + ", ".join(f"{k}={v}" for k, v in row["settings"].items()))
    if benchmark.paper_judge:
        notes.append(f"the paper: {benchmark.paper_judge}")
    return Measured(
        benchmark.name,
        "VLMEvalKit",
        score,
        str(metric),
        benchmark.paper,
        row.get("infer_total"),
        answers.get("tokens_per_forward"),
        answers.get("text_tokens_per_forward"),
        answers.get("seconds"),
        "; ".join(notes),
    )


def _from_strict(content: dict[str, Any]) -> Measured | None:
    benchmark = find_benchmark(content.get("benchmark") or "")
    if benchmark is None:
        return None
    lost = content.get("n_failed", 0) + content.get("n_unparsed", 0)
    note = f"{content.get('judge')}" + (f"; {lost} rows without a verdict count as wrong" if lost else "")
    return Measured(
        benchmark.name,
        "strict judge",
        round(100 * content["accuracy"], 2),
        "CORRECT",
        benchmark.paper,
        content["n_rows"],
        note=note,
    )


def _from_lmms(content: dict[str, Any], file: Path) -> list[Measured]:
    found = []
    rows = {**content.get("results", {}), **content.get("groups", {})}
    for task, metrics in rows.items():
        benchmark = find_benchmark(task)
        if benchmark is None or (task != benchmark.lmms and benchmark.lmms in rows):
            continue  # a part of a benchmark whose whole is there too
        scores = {key.split(",")[0]: value for key, value in metrics.items() if "," in key and "_stderr" not in key}
        score = score_in(scores, benchmark.lmms_metric, benchmark.lmms_percent)
        if score is None:
            continue
        note = "" if task == benchmark.lmms else f"task {task}"
        measured = Measured(benchmark.name, "lmms-eval", score, benchmark.lmms_metric, benchmark.paper, note=note)
        _add_costs(measured, file.with_name(file.name.replace("_results.json", f"_samples_{task}.jsonl")))
        limit = content.get("config", {}).get("limit")
        if limit:
            measured.note = "; ".join(filter(None, (measured.note, f"only {limit:g} questions (--limit)")))
        found.append(measured)
    return found


def _add_costs(measured: Measured, samples: Path) -> None:
    """Add tokens, forward passes and time from the samples file, if there is one."""
    if not samples.is_file():
        return
    rows = read_lines(samples)
    measured.questions = len(rows)
    counts = [c for row in rows for c in row.get("token_counts") or [] if c and c.get("num_forwards")]
    forwards = sum(c["num_forwards"] for c in counts)
    if forwards:
        measured.tokens_per_forward = round(sum(c["slots"] for c in counts) / forwards, 3)
        measured.text_tokens_per_forward = round(sum(c.get("output_tokens") or 0 for c in counts) / forwards, 3)
        measured.seconds = round(sum(c["seconds"] for c in counts), 1)


def read_lines(path: Path) -> list[Any]:
    """Read a JSON Lines file of another tool; its last line may have no line break. Raises: json.JSONDecodeError."""
    with path.open(encoding="utf-8") as file:  # not `splitlines`, which also splits at line breaks within a text
        return [json.loads(line) for line in file if line.strip()]


def as_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """The scores as dicts, for `--json`."""
    return [asdict(row) | {"difference": row.difference} for row in measured]


def as_table(measured: list[Measured]) -> Table:
    """The scores as a table for the terminal."""
    table = Table(title="PerceptionDLM-Base: measured, and Table 1 of the paper")
    for name in (
        "benchmark",
        "harness",
        "measured",
        "paper",
        "difference",
        "questions",
        "TPF",
        "text TPF",
        "s",
        "note",
    ):
        table.add_column(name, justify="left" if name in ("benchmark", "harness", "note") else "right")
    for row in measured:
        numbers = (row.questions, row.tokens_per_forward, row.text_tokens_per_forward, row.seconds)
        table.add_row(
            row.benchmark,
            row.harness,
            f"{row.score:.1f}",
            f"{row.paper:.1f}",
            f"{row.difference:+.1f}",
            *("" if number is None else f"{number:g}" for number in numbers),
            row.note,
        )
    return table


def list_table(benchmarks: list[Benchmark]) -> Table:
    """Benchmarks with their settings as a table for the terminal."""
    table = Table(title="The paper's benchmarks")
    columns = "benchmark VLMEvalKit lmms-eval split judge tokens block steps tiles question paper"
    for name in columns.split():
        table.add_column(name, overflow="fold")
    kinds = {b.kind: b.suffix for b in benchmarks}
    table.caption = "\n".join(
        [
            *(f"{kind}: the question ends with {suffix!r}" for kind, suffix in kinds.items()),
            f"tiles: most tiles of one image, without the thumbnail; several images share {TOTAL_TILES}",
            'tokens: length of the answer; answers that begin with Yes, No or "B." are reduced to that word or letter',
        ]
    )
    table.caption_justify = "left"
    for b in benchmarks:
        judge = b.stock_judge + (f"; lmms-eval: {b.lmms_judge}" if b.lmms_judge != b.stock_judge else "")
        judge += f"; paper: {b.paper_judge}" if b.paper_judge else ""
        table.add_row(
            b.name,
            b.vlmeval,
            b.lmms,
            b.split,
            judge,
            str(b.max_new_tokens),
            str(b.block_length),
            str(b.max_denoising_steps),
            str(b.max_tiles),
            b.kind + (", first image doubled" if b.upscale_first else ""),
            f"{b.paper:.1f}",
        )
    return table
