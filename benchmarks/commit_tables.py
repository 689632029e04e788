"""The tables of `pdlm-peft commit` and of the rules of acceptance, from benchmarks/results."""

from benchmarks.markdown import percent, table


def commit_sweep(record: dict) -> str:
    """Forward passes against right captions, before and after `pdlm-peft commit` of the embedded checkpoint."""
    rows = [
        [
            "setting",
            "careful: exact",
            "forward passes per image",
            "commits: exact",
            "at six regions",
            "forward passes per image",
        ]
    ]
    found = record["commits"]
    names = [
        name for plain in found if "trimmed" not in plain for name in (plain, f"{plain}, trimmed") if name in found
    ]
    for name in names:
        before, after = record["careful"][name], found[name]
        cells = [percent(before["exact"]), f"{before['forwards']:.1f}"]
        cells += [percent(after["exact"]), percent(after["six_regions"]), f"{after['forwards']:.2f}"]
        rows.append([name, *cells])
    return table(*rows)


def commit_walk(record: dict) -> str:
    """`pdlm-peft commit` from the careful checkpoint to the merged one: scores on images of other seeds."""
    stages = [record[stage] for stage in ("before", "after")]
    rows = [[f"{stages[0]['images']} held-out images", "careful", "merged"]]
    rows.append(["forward passes per image", *(f"{row['forwards']:.2f}" for row in stages)])
    rows.append(["right captions", *(percent(row["exact"]) for row in stages)])
    return table(*rows, ["expected calibration error of the scores", *(f"{row['ece']:.3f}" for row in stages)])


def commit_costs(record: dict) -> str:
    """What every command of that walk took."""
    rows = [["command", "time", "of it on the CPU", "peak memory"]]
    for name, row in record["costs"].items():
        minutes = [f"{row[key] / 60:.1f} min" for key in ("seconds", "cpu_seconds")]
        rows.append([name, *minutes, f"{row['peak_gb']:.1f} GB"])
    return table(*rows)


def commit_rules(record: dict) -> str:
    """The rules of acceptance of that walk, on the images that it chooses by."""
    run = record["run"]["commit"]
    before = {str(row["rule"]): row for row in run["before"]}
    rows = [["threshold", "careful: right", "forward passes", "adapter: right", "forward passes"]]
    for after in run["after"]:
        cells = [cell for row in (before[str(after["rule"])], after) for cell in commit_cells(row)]
        name = f"{after['rule']['acceptance_threshold']}" + " (chosen)" * (after["rule"] == run["rule"])
        rows.append([name, *cells])
    return table(*rows)


def rules(record: dict) -> str:
    """Forward passes against right captions by rule of acceptance, before and after `pdlm-peft commit`."""
    rows = [["rule", "careful: exact", "forward passes per image", "commits: exact", "forward passes per image"]]
    for name, before in record["careful"].items():
        after = record["commits"][name]
        cells = [text for row in (before, after) for text in (percent(row["exact"]), f"{row['forwards']:.2f}")]
        rows.append([name, *cells])
    return table(*rows)


def commit_cells(row: dict) -> list[str]:
    """Right captions and forward passes."""
    return [percent(row["exact"]), f"{row['forwards']:.2f}"]


def commit_parts(record: dict, thresholds: tuple[float, ...] = (0.7, 0.8, 0.9)) -> str:
    """The recipe with parts left out, at some of its thresholds."""
    rows = [["trained with", *(text for t in thresholds for text in (f"right at {t}", "forward passes"))]]
    for name, variant in record["variants"].items():
        after = {row["rule"]["acceptance_threshold"]: row for row in variant["run"]["commit"]["after"]}
        rows.append([name, *(cell for t in thresholds for cell in commit_cells(after[t]))])
    return table(*rows)
