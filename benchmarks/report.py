"""The tables of the README, from the files in benchmarks/results and the record of the embedded checkpoint.

python benchmarks/report.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pdlm_hf.shapes import CHECKPOINT

RESULTS = Path(__file__).parent / "results"
ATTRIBUTES = ("size", "colour", "texture", "shape")


def percent(share: float) -> str:
    """0.973 -> 97.3 %"""
    return f"{100 * share:.1f} %"


def table(*rows: list[str]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def held_out(record: dict) -> Iterator[str]:
    """Accuracy of the embedded checkpoint, from its training.json."""
    score = record["held_out"]
    attributes = [percent(score["by_attribute"][name]) for name in ATTRIBUTES]
    yield table(
        ["exact", "well formed", *ATTRIBUTES],
        [percent(score["exact"]), percent(score["well_formed"]), *attributes],
    )
    yield table(
        ["regions in the picture", *score["by_regions"]],
        ["exact", *(percent(share) for share in score["by_regions"].values())],
    )


def quality(record: dict) -> str:
    """Accuracy of the embedded checkpoint for every decoding setting."""
    rows = [["setting", "exact", "well formed", "steps a region", "forwards a batch"]]
    for name, row in record["settings"].items():
        numbers = [percent(row["exact"]), percent(row["well_formed"])]
        rows.append([name, *numbers, f"{row['steps_per_region']:.1f}", f"{row['num_forwards']:.1f}"])
    return table(*rows)


def decode(record: dict) -> Iterator[str]:
    """Decoding speed beside the reference's loop."""
    for part in record["tables"]:
        rows = [["loop", "a picture", "times the reference", "regions a second"]]
        for name, row in part["rows"].items():
            rate = f"{row['regions_per_second']:.2f}"
            rows.append([name, f"{row['ms_per_image'] / 1000:.2f} s", f"{row['ratio_to_reference']:.2f}", rate])
        yield table(*rows)


def tables() -> Iterator[str]:
    """Every table of the README."""

    def load(name: str) -> dict:
        return json.loads((RESULTS / name).read_text())

    yield from held_out(json.loads((CHECKPOINT / "training.json").read_text()))
    yield quality(load("shapes_quality.json"))
    yield from decode(load("decode_cpu_small.json"))


if __name__ == "__main__":
    print("\n\n".join(tables()))
