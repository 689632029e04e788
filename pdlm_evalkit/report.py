"""Measured scores and the paper's, from the result files of both harnesses and of the strict judge.

A number is right, or it is not printed: the unit of a score comes from what wrote it, a score outside 0..100 is an
error, and a score is withheld if some answers were drawn at random, or got no useful reply from the judge.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

from .benchmarks import BENCHMARKS, TOTAL_TILES, Benchmark, find_benchmark
from .comparing import differences, not_comparable
from .lmms_judge import judged_beside
from .manifests import manifest_beside
from .outcomes import Outcomes, interval_of, of_lmms, of_strict, of_vlmeval
from .scores import as_percent, note_on_splits, score_in
from .tables import read_lines
from .vlmeval_judge import counted_in

_LOST = {"failed": "the judge failed on {} answers", "random": "{} answers were scored by options drawn at random"}


@dataclass
class Measured:
    """A score of one benchmark.

    Args:
        benchmark (`str`): the name in the paper.
        harness (`str`): "VLMEvalKit", "lmms-eval" or "strict judge".
        score (`float`, *optional*): the score in percent; None if it is withheld, for the reason in `problem`.
        metric (`str`): the name of the score in the harness.
        paper (`float`): the score of PerceptionDLM-Base in Table 1, in percent.
        questions (`int`, *optional*): number of questions.
        tokens_per_forward (`float`, *optional*): denoised token positions per forward pass, padding included.
        text_tokens_per_forward (`float`, *optional*): tokens before the end of the answers, per forward pass.
        seconds (`float`, *optional*): time of the model.
        note (`str`): how the measurement differs from the paper's.
        source (`str`): the file of the score.
        judged (`dict`, *optional*): number of answers by the way they were scored: by `rules`, by the `judge`, at
            `random` by the harness, `failed` (no useful reply of the judge), `unparsed` (neither rules nor judge could
            read the answer, which counts as wrong); None if the harness does not say.
        problem (`str`): why the score is withheld.
        replaces (`str`): the folder of the run whose answers were scored again.
        interval (`tuple[float, float]`, *optional*): the 95 % interval of the score, by a bootstrap over questions.
        no_interval (`str`): why there is no interval.
        manifest (`dict`, *optional*): what the score depends on, see [`manifests.manifest`].
        not_comparable (`list[str]`): what the score does not share with the paper's.
        differs (`list[str]`): what the score does not share with the first one of this benchmark.
    """

    benchmark: str
    harness: str
    score: float | None
    metric: str
    paper: float
    questions: int | None = None
    tokens_per_forward: float | None = None
    text_tokens_per_forward: float | None = None
    seconds: float | None = None
    note: str = ""
    source: str = ""
    judged: dict[str, int] | None = None
    problem: str = ""
    replaces: str = ""
    interval: tuple[float, float] | None = None
    no_interval: str = ""
    manifest: dict[str, Any] | None = None
    not_comparable: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def difference(self) -> float | None:
        """The measured score minus the paper's, in percentage points."""
        return None if self.score is None else round(self.score - self.paper, 2)

    def add_interval(self, read: Callable[[], Outcomes]) -> None:
        """Add the interval of a score that is not withheld; `read` reads the points, see [`outcomes.interval_of`]."""
        if self.score is not None:
            self.interval, self.no_interval = interval_of(self.score, read)

    def add_manifest(self, benchmark: Benchmark, manifest: Any) -> None:
        """Add the manifest, if there is one, and what is not comparable with the paper."""
        if isinstance(manifest, dict):
            self.manifest = manifest
            self.not_comparable += not_comparable(benchmark, manifest, self.tokens_per_forward, self.harness)

    @property
    def notes(self) -> str:
        """All notes in one text."""
        parts = [self.problem, self.note]
        parts += [f"not comparable with the paper: {', '.join(self.not_comparable)}"] * bool(self.not_comparable)
        parts += [f"differs from the first row: {', '.join(self.differs)}"] * bool(self.differs)
        return "; ".join(filter(None, [*parts, self.no_interval and f"no interval: {self.no_interval}"]))

    def withhold(self, judged: dict[str, int] | None) -> None:
        """Note how the answers were scored, and withhold the score if some of them were not."""
        self.judged = judged
        lost = [what.format(judged[name]) for name, what in _LOST.items() if judged and judged.get(name)]
        if lost:
            self.score, self.problem = None, " and ".join(lost)


def collect(paths: list[Path]) -> list[Measured]:
    """Read all scores of the paper's benchmarks from files and folders.

    Returns:
        the scores in the order of the paper; of one benchmark the oldest first. Runs whose answers were scored again
        are left out.

    Raises:
        DataError: a path does not exist, a result file cannot be read, a score is outside 0..100, or there is none.
    """
    found = [row for file, named in _files_in(paths) for row in _read(file, named)]
    if not found:
        raise DataError(f"There are no scores of the paper's benchmarks in {', '.join(map(str, paths))}.")
    replaced = {(row.replaces, row.benchmark) for row in found}
    found = [row for row in found if (str(Path(row.source).parent), row.benchmark) not in replaced]
    order = [benchmark.name for benchmark in BENCHMARKS]
    found.sort(key=lambda row: order.index(row.benchmark))
    for rows in (list(group) for _, group in groupby(found, key=lambda row: row.benchmark)):
        for row in rows[1:]:
            if row.manifest is not None and rows[0].manifest is not None:
                row.differs = differences(row.manifest, rows[0].manifest)
    return found


def _files_in(paths: list[Path]) -> list[tuple[Path, bool]]:
    """Result files, the oldest first, and whether each was named itself."""
    named: dict[Path, bool] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        if path.is_file():
            named[path] = True
            continue
        for pattern in ("pdlm_report.json", "status.json", "*_results.json", "*_strict.json"):
            for file in path.rglob(pattern):
                if file.is_symlink() or (file.name == "status.json" and (file.parent / "pdlm_report.json").exists()):
                    continue  # VLMEvalKit links its newest files; our report has more than its status
                named.setdefault(file, False)
    return sorted(named.items(), key=lambda item: item[0].stat().st_mtime)


def _read(file: Path, named: bool) -> list[Measured]:
    """The scores in a file. Another tool's file in a folder has none."""
    content = load_json(file)
    if isinstance(content, list) and all(isinstance(row, dict) and "benchmark" in row for row in content):
        found = [_from_vlmeval(row, file) for row in content]
    elif isinstance(content, dict) and isinstance(content.get("datasets"), dict):
        found = [_from_status(name, row, content, file) for name, row in content["datasets"].items()]
    elif isinstance(content, dict) and {"accuracy", "n_rows"} <= content.keys() and _is_number(content["accuracy"]):
        found = [_from_strict(content, file)]
    elif isinstance(content, dict) and isinstance(content.get("results"), dict):
        found = list(_from_lmms(content, file))
    elif named:
        raise DataError(f"{file}: neither a result of lmms-eval or VLMEvalKit nor of pdlm-eval strict.")
    else:
        return []
    rows = [row for row in found if row is not None]
    for row in rows:
        row.source = str(file)
    return rows


def _from_vlmeval(row: dict[str, Any], file: Path) -> Measured | None:
    benchmark = find_benchmark(str(row["benchmark"]))
    if benchmark is None:
        return None
    metric, score = _vlmeval_score(benchmark, row, file)
    if score is None and not row.get("metrics"):
        return None
    answers = row.get("answers") or {}
    notes = [note_on_splits(row.get("metrics") or {}, benchmark)]
    if row.get("paper_settings") is None:
        notes.append("settings differ from the paper's")
    elif row.get("settings") and not row.get("manifest"):
        notes.append("changed: " + ", ".join(f"{k}={v}" for k, v in row["settings"].items()))
    if benchmark.paper_judge:
        notes.append(f"the paper: {benchmark.paper_judge}")
    measured = Measured(
        benchmark.name,
        "VLMEvalKit",
        score,
        metric,
        benchmark.paper,
        row.get("infer_total"),
        answers.get("tokens_per_forward"),
        answers.get("text_tokens_per_forward"),
        answers.get("seconds"),
        "; ".join(filter(None, notes)),
    )
    measured.add_manifest(benchmark, row.get("manifest"))
    if row.get("source_run"):
        measured.replaces = str(file.parent.parent / str(row["source_run"]))
    judged = row.get("judged")
    measured.withhold({"failed": row["judge_failed"]} if judged is None and row.get("judge_failed") else judged)
    if score is None:
        measured.problem = f"VLMEvalKit wrote no {metric} of all questions or of the split {benchmark.split}"
    if row.get("infer_failed"):
        measured.score, measured.problem = None, f"{row['infer_failed']} questions got no answer"
    measured.add_interval(partial(of_vlmeval, benchmark, file.parent, str(row["benchmark"]), row.get("judge")))
    return measured


def _vlmeval_score(benchmark: Benchmark, row: dict[str, Any], file: Path) -> tuple[str, float | None]:
    """Name and percent of the score, from all that VLMEvalKit wrote, or else from its main score.

    The main score was multiplied by 100 already if VLMEvalKit calls it "Overall Acc"; other names are those of the
    metrics, and have their unit. The main score of MMVP is not the one of the paper; of HallusionBench it is a third.
    """
    if row.get("metrics"):
        score = score_in(row["metrics"], benchmark.vlmeval_metric, benchmark.vlmeval_percent, benchmark.split)
        return benchmark.vlmeval_metric, as_percent(score, file, benchmark.name)
    metric, value = str(row.get("primary_metric")), row.get("primary_metric_value")
    if metric.startswith("Overall Acc"):
        score = score_in({metric: value}, metric, True)
    elif metric.rpartition("|")[2] == benchmark.vlmeval_metric and benchmark.name != "MMVP":
        score = score_in({metric: value}, benchmark.vlmeval_metric, benchmark.vlmeval_percent)
    else:
        score = None
    return metric, as_percent(score, file, benchmark.name)


def _from_status(name: str, status: dict[str, Any], run: dict[str, Any], file: Path) -> Measured | None:
    """A data set in the status.json of VLMEvalKit, whose run.py was not started by us."""
    judge = status.get("judge_model") or "exact_matching"
    row = {key: status.get(key) for key in ("metrics", "source_run")}
    measured = _from_vlmeval({"benchmark": name, "judge": judge, **row}, file)
    if measured is not None:
        judged = counted_in(file.parent, run.get("model_name") or file.parents[1].name, name, judge)
        measured.withhold(judged if any(judged.values()) else None)
        measured.note = "; ".join([f"VLMEvalKit's own run; judge: {judge}", *filter(None, [measured.note])])
    return measured


def _from_strict(content: dict[str, Any], file: Path) -> Measured | None:
    benchmark = find_benchmark(content.get("benchmark") or "")
    if benchmark is None:
        return None
    score = as_percent(100 * content["accuracy"], file, benchmark.name)
    measured = Measured(
        benchmark.name,
        "strict judge",
        score,
        "CORRECT",
        benchmark.paper,
        content["n_rows"],
        note=f"{content.get('judge')}",
    )
    measured.add_manifest(benchmark, content.get("manifest"))
    # a reply that is no verdict is none of use
    lost = content.get("n_failed", 0) + content.get("n_unparsed", 0)
    measured.withhold({"rules": 0, "unparsed": 0, "judge": content["n_rows"] - lost, "random": 0, "failed": lost})
    measured.add_interval(partial(of_strict, file.with_suffix(".jsonl")))
    return measured


def _from_lmms(content: dict[str, Any], file: Path) -> Iterator[Measured]:
    groups = content.get("groups")
    rows = {**content["results"], **(groups if isinstance(groups, dict) else {})}
    for task, metrics in rows.items():
        benchmark = find_benchmark(task)
        if benchmark is None or not isinstance(metrics, dict) or (task != benchmark.lmms and benchmark.lmms in rows):
            continue  # a part of a benchmark whose whole is there too
        scores = {key.split(",")[0]: value for key, value in metrics.items() if "," in key and "_stderr" not in key}
        score = as_percent(score_in(scores, benchmark.lmms_metric, benchmark.lmms_percent), file, benchmark.name)
        if score is None:
            continue
        notes = ["" if task == benchmark.lmms else f"task {task}"]
        measured = Measured(benchmark.name, "lmms-eval", score, benchmark.lmms_metric, benchmark.paper)
        samples = _samples_of(task, content, file)
        _add_costs(measured, samples)
        config = content.get("config")
        if isinstance(config, dict) and config.get("limit"):
            measured.not_comparable.append(f"only {float(config['limit']):g} questions (--limit)")
        measured.add_manifest(benchmark, manifest_beside(file, task))
        judged = judged_beside(file, task)
        if judged is None and benchmark.lmms_judge != "rules":
            notes.append("not run by pdlm-eval lmms: whether the judge answered is unknown")
        elif judged is not None or measured.questions:
            counts = {"unparsed": 0, "judge": 0, "random": 0, "failed": 0} | (judged or {})
            measured.withhold({"rules": max(0, (measured.questions or 0) - sum(counts.values()))} | counts)
        measured.note = "; ".join(filter(None, notes))
        measured.add_interval(partial(of_lmms, benchmark, samples))
        yield measured


def _samples_of(task: str, content: dict[str, Any], file: Path) -> list[Path]:
    """The samples files of a task, or of the tasks in a group."""
    members = (content.get("group_subtasks") or {}).get(task) or [task]
    files = [file.with_name(file.name.replace("_results.json", f"_samples_{name}.jsonl")) for name in members]
    return [path for path in files if path.is_file()]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _add_costs(measured: Measured, samples: list[Path]) -> None:
    """Add questions, tokens, forward passes and time from the samples files, if there are any."""
    names = ("num_forwards", "slots", "output_tokens", "seconds")
    questions, totals = 0, dict.fromkeys(names, 0.0)
    for path in samples:
        try:
            rows = read_lines(path)
            counts = [c for row in rows for c in row.get("token_counts") or [] if c and c.get("num_forwards")]
            for name in names:
                totals[name] += sum(float(c.get(name) or 0) for c in counts)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: no samples with the token counts of lmms-eval ({error}).") from None
        questions += len(rows)
    measured.questions = questions or None
    if totals["num_forwards"]:
        measured.tokens_per_forward = round(totals["slots"] / totals["num_forwards"], 3)
        measured.text_tokens_per_forward = round(totals["output_tokens"] / totals["num_forwards"], 3)
        measured.seconds = round(totals["seconds"], 1)


def as_rows(measured: list[Measured]) -> list[dict[str, Any]]:
    """The scores as dicts, for `--json`."""
    return [asdict(row) | {"difference": row.difference} for row in measured]


def as_table(measured: list[Measured]) -> Table:
    """The scores as a table for the terminal."""
    table = Table(title="PerceptionDLM-Base: measured, and Table 1 of the paper")
    columns = ("benchmark", "harness", "measured", "95 %", "paper", "difference", "questions", "scored by", "TPF")
    for name in (*columns, "text TPF", "s", "note"):
        table.add_column(name, justify="left" if name in ("benchmark", "harness", "scored by", "note") else "right")
    for row in measured:
        numbers = (row.tokens_per_forward, row.text_tokens_per_forward, row.seconds)
        judged = {name: count for name, count in (row.judged or {}).items() if count and name != "requests"}
        table.add_row(
            row.benchmark,
            row.harness,
            "withheld" if row.score is None else f"{row.score:.1f}",
            "" if row.interval is None else f"{row.interval[0]:.1f}-{row.interval[1]:.1f}",
            f"{row.paper:.1f}",
            "" if row.difference is None else f"{row.difference:+.1f}",
            "" if row.questions is None else f"{row.questions}",
            ", ".join(f"{name} {count}" for name, count in judged.items()),
            *("" if number is None else f"{number:g}" for number in numbers),
            row.notes,
        )
    return table


def list_table(benchmarks: list[Benchmark]) -> Table:
    """Benchmarks with their settings as a table for the terminal."""
    table = Table(title="The paper's benchmarks")
    columns = "VLMEvalKit,lmms-eval,split,scored by,judge of the paper,default judge,tokens/block/steps,question,paper"
    for name in ("benchmark", *columns.split(",")):
        table.add_column(name, overflow="fold", no_wrap=name in ("VLMEvalKit", "lmms-eval", "paper"))
    kinds = {b.kind: b.suffix for b in benchmarks}
    table.caption = "\n".join(
        [
            *(f"{kind}: the question ends with {suffix!r}" for kind, suffix in kinds.items()),
            f"an image has at most 6 tiles, without the thumbnail; several images share {TOTAL_TILES}",
            'tokens: length of the answer; answers that begin with Yes, No or "B." are reduced to that word or letter',
            "judge of the paper: as its repository documents it, and the default of its run.py; default judge: of "
            "VLMEvalKit, and of lmms-eval if that is another",
            *(f"unverifiable from paper and code: {b.name}, {b.unverifiable}" for b in benchmarks if b.unverifiable),
        ]
    )
    table.caption_justify = "left"
    for b in benchmarks:
        by = b.stock_judge + (f"; lmms-eval: {b.lmms_judge}" if b.lmms_judge != b.stock_judge else "")
        paper, own, stock, lmms = (b.judges[name] for name in ("paper", "paper_default", "vlmeval", "lmms"))
        table.add_row(
            b.name,
            b.vlmeval,
            b.lmms,
            b.split,
            by,
            paper if own in (paper, "rules") else f"{paper} (run.py: {own})",
            stock if lmms == stock else f"{stock}; lmms-eval: {lmms}",
            f"{b.max_new_tokens}/{b.block_length}/{b.max_denoising_steps}",
            b.kind + (", first image doubled" if b.upscale_first else ""),
            f"{b.paper:.1f}",
        )
    return table
