"""Compare judged runs with each other and with the paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

from ..comparing import differences
from ..manifests import data_part, judge_part, text_hash
from .captioning import read_lines
from .captioning import totals as cost_of
from .data import Benchmark, area_shares, load_benchmark, read_captions
from .judging import captions_hash
from .paper import paper_rows
from .scoring import MaskScore, intervals, read_answers, score_answers, totals

AREAS = ((0.01, "< 1 %"), (0.05, "1-5 %"), (0.20, "5-20 %"), (float("inf"), ">= 20 %"))  # share of the image
FILES = ("annotations.json", "qa.json", "class_names.json")
MANY_MASKS = 6  # images with as many masks or more are one group


@dataclass
class Table:
    """A table for a terminal or a page.

    Args:
        title (`str`): the title.
        columns (`list[str]`): names of the columns; the first column is text, the others are numbers.
        rows (`list[list[str]]`): the cells.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> Any:
        """The table as a `rich.table.Table`."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def report_run(folder: Path, annotations: Path | None = None, parser: str = "robust") -> dict[str, Any]:
    """Score a judged run.

    Args:
        folder (`Path`): a run folder with answers.json, or the folder of `judge --out`.
        annotations (`Path`, *optional*): the folder of the benchmark; default: the folder recorded in the run.
        parser (`str`): "robust" or "reference".

    Returns:
        `run`, `model`, `benchmark`, `judge`, `judging` (model, settings and `with_images`), `parser`, `settings`,
        `effective` (all settings of `generate`, if known), `manifest` (see [`manifests.manifest`]), all of
        [`scoring.totals`], `intervals` (see [`scoring.intervals`]), all of [`captioning.totals`], and `by_masks` and
        `by_area`: lists of totals with their `group`.

    Raises:
        DataError: the run is not judged, its answers belong to other captions, it is of another benchmark, or one of
            its files is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: this is not a run folder.")
    if not (folder / "answers.json").exists():
        raise DataError(f"{folder}: has no answers.json; run `pdlm-eval paradlc judge` first.")
    judged = _read_record(folder / "judge.json", {"judge": str, "captions": str, "fingerprint": str})
    source = folder if (folder / "run.json").exists() else folder / str(judged.get("run") or "")
    if not (source / "run.json").exists():
        raise DataError(f"{folder}: the captions have no run folder; make one by `caption --captions FILE`.")
    run = _read_record(source / "run.json", {"settings": dict} | ({} if annotations else {"annotations": str}))
    benchmark = load_benchmark(annotations or run["annotations"])
    if {benchmark.fingerprint} != {run["settings"].get("fingerprint"), judged["fingerprint"]}:
        raise DataError(f"{folder}: the run was made with other annotations than {annotations or run['annotations']}.")
    if (
        captions_hash(read_captions(source / "captions.json", benchmark.order, allow_missing=True))
        != judged["captions"]
    ):
        raise DataError(f"{folder}: the answers belong to other captions; run `pdlm-eval paradlc judge` again.")
    questions = {key: mask.questions for key, mask in benchmark.masks.items()}
    scores = score_answers(questions, read_answers(folder / "answers.json", questions), parser, benchmark.name)
    cost = cost_of(read_lines(source / "captions.jsonl"))
    folder_of_data = Path(annotations or run["annotations"])
    data = data_part(benchmark.name, [folder_of_data / name for name in FILES]) | {"images": benchmark.fingerprint}
    del cost["n_masks"]  # of the captions; the score's is of all masks
    return {
        "run": folder.name,
        "model": run["settings"].get("name") or run["settings"].get("model"),
        "benchmark": benchmark.name,
        "judge": judged["judge"],
        "judging": {name: judged.get(name) for name in ("model", "settings", "with_images")},
        "parser": parser,
        "manifest": _manifest(run, judged, cost, data),
        "settings": run["settings"],
        "effective": run.get("effective") if isinstance(run.get("effective"), dict) else None,
        **totals(scores),
        "intervals": intervals(
            scores, {mask.id: image.path.name for image in benchmark.images for mask in image.masks}
        ),
        **cost,
        "by_masks": _grouped(scores, _by_masks(benchmark)),
        "by_area": _grouped(scores, {key: _area_group(area) for key, area in area_shares(benchmark).items()}),
    }


def _manifest(
    run: dict[str, Any], judged: dict[str, Any], cost: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a run's scores, see [`manifests.manifest`]."""
    given = run["settings"]
    prompt = given.get("prompt")
    settings = run["effective"] if isinstance(run.get("effective"), dict) else {}
    settings = settings | {name: given[name] for name in ("batch_size", "masks_per_pass") if name in given}
    judge = judge_part(judged["judge"], judged.get("model"), judged.get("base_url"), judged.get("settings") or {})
    return {
        "prompts": {"sha256": prompt and text_hash(prompt), "distinct": int(prompt is not None)},
        "settings": settings or given,
        "checkpoint": run.get("checkpoint") or {"name": given.get("model") or given.get("name"), "sha256": None},
        **{name: run.get(name) for name in ("versions", "commits", "hardware")},
        "judge": judge | {"with_images": judged.get("with_images")},
        "data": data,
        "attempts": {"number": run.get("attempts"), **cost},
    }


def _read_record(path: Path, fields: dict[str, type]) -> dict[str, Any]:
    """The content of judge.json or run.json. Raises: DataError: it has another form, or lacks one of the fields."""
    record = load_json(path)
    wrong = [
        name for name, kind in fields.items() if not isinstance(record, dict) or not isinstance(record.get(name), kind)
    ]
    if wrong:
        raise DataError(f"{path}: `{wrong[0]}` is missing or of another type than `pdlm-eval paradlc` writes.")
    return record


def _by_masks(benchmark: Benchmark) -> dict[str, str]:
    counts = {mask.id: len(image.masks) for image in benchmark.images for mask in image.masks}
    return {key: str(count) if count < MANY_MASKS else f"{MANY_MASKS}+" for key, count in counts.items()}


def _area_group(area: float) -> str:
    return next(name for limit, name in AREAS if area < limit)


def _grouped(scores: list[MaskScore], group_of: dict[str, str]) -> list[dict[str, Any]]:
    """Totals of every group, in the order of areas or numbers."""
    order = [name for _, name in AREAS]
    names = sorted(set(group_of.values()), key=lambda name: (order.index(name) if name in order else 0, name))
    return [{"group": name, **totals(score for score in scores if group_of.get(score.id) == name)} for name in names]


def paper_beside(reports: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of the paper for these runs, each table once."""
    found: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        title, rows = paper_rows(report["benchmark"], report["judge"], report["settings"].get("max_denoising_steps"))
        known = found.setdefault(title, rows)
        known += [row for row in rows if row not in known]
    return list(found.items())


def notes_of(reports: list[dict[str, Any]]) -> list[str]:
    """Notes that explain the numbers of a report."""
    notes = []
    for empty, masks in sorted({(r["n_no_positive"], r["n_masks"]) for r in reports if r["n_no_positive"]}):
        notes.append(
            f"{empty} of {masks} masks have no positive question and count 0 in Pos, as in the reference: Pos is at "
            f"most {(masks - empty) / masks:.5f}."
        )
    notes.append(
        "Avg is (Pos + Neg) / 2, as the reference prints it. The paper's Avg is the same for PerceptionDLM (42.3 and "
        "82.4 give 62.35), but not in 8 of the 10 rows of its table 2 (DAM: 48.1 and 87.2 give 67.65, printed 69.2), "
        "and its text mentions a mean over masks: compare Pos and Neg, and both averages."
    )
    if any(report["text_tokens_per_forward"] is not None for report in reports):
        notes.append(
            "TPF: tokens per forward pass, with the positions after a caption's end, as in the paper, and without."
        )
    notes += [note for report in reports for note in _differences(report)]
    judges: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        judges.setdefault((report["benchmark"], report["judge"]), []).append(report)
    for same in judges.values():
        if any(report["judging"] != same[0]["judging"] for report in same):
            names = ", ".join(report["run"] for report in same)
            notes.append(
                f"{names}: judged by {same[0]['judge']} with different settings; do not compare their scores."
            )
    for report in reports[1:]:
        if found := differences(report["manifest"], reports[0]["manifest"]):
            notes.append(f"{report['run']} differs from {reports[0]['run']}: {', '.join(found)}.")
    notes.append("In brackets: 95 % intervals, by a bootstrap over the images.")
    if any(report["n_missing"] or report["n_failed"] or report["n_unparsed"] for report in reports):
        notes.append(
            "Missing captions, failed requests and replies that name no choice score 0 and count in all means."
        )
    return notes


def _differences(report: dict[str, Any]) -> list[str]:
    """Notes on how a run differs from the paper's row, for which it is printed beside it."""
    settings, notes = report["effective"] or {}, []
    rules = [f"{name} {settings[name]}" for name in ("acceptance_threshold", "entropy_bound") if settings.get(name)]
    if rules:
        notes.append(
            f"{report['run']}: accepts tokens early ({', '.join(rules)}), the paper's row has fixed steps: do not "
            "compare TPF and seconds with it."
        )
    if (batch := report["settings"].get("batch_size") or 1) > 1:
        notes.append(
            f"{report['run']}: a batch has {batch} passes, in the paper one: do not compare TPF and seconds with it."
        )
    shown = report["judging"]["with_images"]
    if isinstance(shown, bool) and shown != (report["benchmark"] == "paradlc"):
        how = "saw the region" if shown else "read the text only"
        notes.append(
            f"{report['run']}: the judge {how}, unlike the paper's: do not compare its scores with the paper."
        )
    return notes


def tables_of(reports: list[dict[str, Any]]) -> list[Table]:
    """The report as tables."""
    overall = [_overall(report["run"], report) for report in reports]
    columns = ["", "Pos", "Neg", "Avg", "mean of masks", "TPF", "TPF, text", "seconds"]
    tables = [Table("Scores (%)", columns, overall)]
    for title, rows in paper_beside(reports):
        cells = [[row["name"], *(_number(row[c]) for c in ("pos", "neg", "avg"))] for row in rows]
        tail = [["-", _number(row["tokens_per_forward"]), "-", _number(row["seconds"], 0)] for row in rows]
        tables.append(Table(title, columns, [a + b for a, b in zip(cells, tail, strict=True)]))
    names = ("n_masks", "n_recognised", "n_missing", "n_failed", "n_unparsed", "n_no_positive")
    counts = [
        [report["run"], report["judge"], report["parser"], *(str(report[name]) for name in names)]
        for report in reports
    ]
    heads = ["", "judge", "parser", "masks", "recognised", "no caption", "failed", "unparsed", "no positive"]
    tables.append(Table("Counts", heads, counts))
    for name, title in (("by_masks", "By number of masks in the image (%)"), ("by_area", "By area of the mask (%)")):
        cells = [
            [f"{report['run']}: {group['group']}", str(group["n_masks"]), *_percent(group)]
            for report in reports
            for group in report[name]
        ]
        tables.append(Table(title, ["", "masks", "Pos", "Neg", "Avg", "mean of masks"], cells))
    return tables


def markdown_of(reports: list[dict[str, Any]]) -> str:
    """The report as a page."""
    parts = [table.markdown() for table in tables_of(reports)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes_of(reports))]) + "\n"


def _percent(values: dict[str, Any]) -> list[str]:
    return [_number(100 * values[name]) for name in ("avg_pos", "avg_neg", "avg", "mean_mask_score")]


def _overall(name: str, report: dict[str, Any]) -> list[str]:
    cost = [report["tokens_per_forward"], report["text_tokens_per_forward"], report["seconds"]]
    limits = report["intervals"].values()
    scores = [
        f"{score} [{100 * low:.1f}, {100 * high:.1f}]"
        for score, (low, high) in zip(_percent(report), limits, strict=True)
    ]
    return [name, *scores, *(_number(value, 2) for value in cost)]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
