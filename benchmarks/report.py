"""The tables of the README and of docs/, from benchmarks/results and the record of the embedded checkpoint.

python benchmarks/report.py            # prints them
python benchmarks/report.py --write    # puts them between the "table" marks of the pages
"""

import json
import re
import sys
from pathlib import Path

from pdlm_hf.captioning.checkpoints import CHECKPOINT

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.batch_tables import (  # noqa: E402
    batch_bytes,
    batch_costs,
    batch_parts,
    batch_throughput,
    kills,
    scale,
)
from benchmarks.commit_tables import commit_costs, commit_parts, commit_rules, commit_sweep, commit_walk, rules  # noqa: E402
from benchmarks.gpu.report import gpu_rows, gpu_tables  # noqa: E402
from benchmarks.markdown import percent, table  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ATTRIBUTES = ("size", "colour", "texture", "shape")


def held_out(record: dict) -> str:
    """Accuracy of the embedded checkpoint, from its training.json."""
    rows = [["checkpoint", "exact", "well formed", *ATTRIBUTES]]
    for name, score in stages(record).items():
        attributes = [percent(score["by_attribute"][attribute]) for attribute in ATTRIBUTES]
        rows.append([name, percent(score["exact"]), percent(score["well_formed"]), *attributes])
    return table(*rows)


def stages(record: dict) -> dict[str, dict]:
    """The scores of the embedded checkpoint and of those that it was trained from, latest first."""
    scored = []
    while record:
        scored += [record["held_out"]] if "held_out" in record else []
        record = record["initialised_from"]
    return dict(zip(("embedded", "fills templates", "commits", "careful"), scored, strict=True))


def by_regions(record: dict) -> str:
    """The same, by the number of regions."""
    found = {name: score["by_regions"] for name, score in stages(record).items()}
    rows = [[f"{name}, exact", *(percent(share) for share in shares.values())] for name, shares in found.items()]
    return table(["regions in the image", *found["embedded"]], *rows)


def quality(record: dict, only: tuple[str, ...] = ()) -> str:
    """Accuracy for every decoding setting."""
    rows = [["setting", "exact", "well formed", "steps per region", "forward passes per image"]]
    for name, row in record["settings"].items():
        if not only or name in only:
            numbers = [percent(row["exact"]), percent(row["well_formed"])]
            rows.append([name, *numbers, f"{row['steps_per_region']:.1f}", f"{row['num_forwards']:.1f}"])
    return table(*rows)


# Table 7 of the paper: average of its benchmarks
PAPER_ABLATION = {
    "full model": 53.7,
    "w/o region prompting": 1.1,
    "w/o RoI feature replay": 51.3,
    "full attention": 47.5,
}


def ablation(record: dict) -> str:
    """What the parts of the model are worth, beside the paper."""
    rows = [["variant", "exact", *ATTRIBUTES, "paper, Table 7"]]
    for name, row in record["variants"].items():
        attributes = [percent(row["by_attribute"][attribute]) for attribute in ATTRIBUTES]
        rows.append([name, percent(row["exact"]), *attributes, str(PAPER_ABLATION[name])])
    return table(*rows)


def decode(record: dict) -> str:
    """Decoding speed beside the reference's loop, and beside the autoregressive one with as many images in a batch."""
    rows = [["loop", "an image", "times the reference", "times autoregressive", "regions a second", "tokens as exact"]]
    found = record["tables"][0]["rows"]
    for name, row in found.items():
        batch = "".join(name.partition(", batch ")[1:])
        rival = found[f"autoregressive, shared prefix{batch}"]["ms_per_image"]
        numbers = [f"{row['ratio_to_reference']:.2f}", f"{rival / row['ms_per_image']:.2f}"]
        same = "" if row["tokens_as_exact"] is None else percent(row["tokens_as_exact"])
        rows.append([name, f"{row['ms_per_image'] / 1000:.2f} s", *numbers, f"{row['regions_per_second']:.2f}", same])
    return table(*rows)


def scaling(record: dict) -> str:
    """How a decode grows with regions, and what one pass for all is worth."""
    times = record["scaling"]["ms"]
    counts = [n for n in range(1, 9) if f"regions {n}" in times]
    return table(
        ["regions in one pass", *map(str, counts)],
        ["cached, seconds", *(f"{times[f'regions {n}'] / 1000:.2f}" for n in counts)],
    )


def serving(record: dict) -> str:
    """vLLM's server beside the transformers loop."""
    rows = [["images in flight", "vLLM", "transformers", "ratio", "vLLM p50 / p99", "transformers p50 / p99"]]
    table_of = record["rows"]
    for name, row in table_of.items():
        if name.startswith("vLLM"):
            count = name.split(", ")[1]
            other = table_of[f"transformers, {count}"]
            rates = [f"{r['images_per_second']:.2f} images/s" for r in (row, other)]
            latencies = [f"{r['p50_s']:.2f} / {r['p99_s']:.2f} s" for r in (row, other)]
            rows.append([count, *rates, f"{row['ratio_to_transformers']:.2f}", *latencies])
    return table(*rows)


def soak(record: dict) -> str:
    """Memory of a server's processes under a long load."""
    names = ["API server", "EngineCore", "Worker"]
    rows = [["requests", *names, "all"]]
    for row in record["rows"]:
        sizes = row["mb"]
        numbers = [f"{sizes[name]:,.0f} MB" for name in names]
        rows.append([f"{row['requests']:,}", *numbers, f"{sum(sizes.values()):,.0f} MB"])
    return table(*rows)


def lora(record: dict) -> str:
    """Fine-tuning on a new domain: both domains, before and after."""
    rows = [["", "new domain, exact", "well formed", "old domain, exact"]]
    for stage in ("before", "after"):
        domains = record[stage]
        cells = [domains["new"]["exact"], domains["new"]["well_formed"], domains["old"]["exact"]]
        rows.append([stage, *map(percent, cells)])
    return table(*rows)


def lora_parts(record: dict) -> str:
    """What the parts of the adapter are worth, for equal steps."""
    rows = [["variant", "new domain, exact", *ATTRIBUTES, "old domain, exact"]]
    for name, row in record["variants"].items():
        attributes = [percent(row["new"]["by_attribute"][attribute]) for attribute in ATTRIBUTES]
        rows.append([name, percent(row["new"]["exact"]), *attributes, percent(row["old"]["exact"])])
    return table(*rows)


def lora_isolated(record: dict) -> str:
    """Cached decoding before and after the adaptation."""
    rows = [["checkpoint, prompt", "exact", "well formed"]]
    rows += [[name, percent(row["exact"]), percent(row["well_formed"])] for name, row in record["rows"].items()]
    return table(*rows)


def lora_attributes(record: dict) -> str:
    """A new attribute, before and after it was taught, beside the old ones and the captions."""
    rows = [["", "seed", "tone", "lowest of the other four", "captions right"]]
    for stage in ("before", "after"):
        for row in record[stage]:
            read = row["attributes"]
            shares = [read["by_attribute"]["tone"], min(read["by_attribute"][name] for name in ATTRIBUTES)]
            rows.append([stage, str(row["seed"]), *map(percent, (*shares, row["captions"]["exact"]))])
    return table(*rows)


# Cases of benchmarks/attributes.py, in the words of the page.
READ_AS = {
    "list": "a list, `size: ..., colour: ...`",
    "sentence 1": "a sentence of its captions",
    "sentence 2": "another one",
    "both sentences": "both, averaged",
    "unseen sentence": "a sentence that it has never seen",
    "unseen form": "a sentence of a form that it has never seen",
    "jointly": "the list, `jointly`",
    "calibrated": "the list, `calibrate`",
    "two tokens": "a list of two choices of two tokens",
    "two tokens, last first": "the same, the last token first",
    "dark colours offered": "the list, beside colours that no image has",
    "dark colours offered, by length": "the same, normalised by the number of tokens",
    "dark colours drawn": "the list with these colours, on images that have them",
    "dark colours drawn, by length": "the same, normalised by the number of tokens",
}


def attributes(record: dict) -> str:
    """Attributes read by a schema: right values and calibration, seed by seed."""
    seeds = [str(row["seed"]) for row in record["cases"]["list"]]
    heads = [f"all right, seed {seed}" for seed in seeds]
    rows = [["read as", "images per seed", *heads, "calibration error", "forward passes"]]
    for name, found in record["cases"].items():
        errors, passes = (sum(row[key] for row in found) / len(found) for key in ("ece", "num_forwards"))
        cells = [str(found[0]["images"]), *(percent(row["all_right"]) for row in found)]
        rows.append([READ_AS[name], *cells, f"{errors:.3f}", f"{passes:.0f}"])
    return table(*rows)


def chat(record: dict) -> str:
    """What block length and steps do to answers of the base checkpoint, and to their cost."""
    kinds = list(next(iter(record["settings"].values())))
    rows = [["setting", *(f"{kind}: right, passes, s" for kind in kinds)]]
    for name, found in record["settings"].items():
        cells = [found[kind] for kind in kinds]
        rows.append([name, *(f"{percent(c['right'])}, {c['forwards']:.0f}, {c['seconds']:.1f}" for c in cells)])
    return table(*rows)


def newest(path: Path) -> str:
    """The last run of `make test-newest`."""
    if not path.is_file():
        return "`make test-newest` has not been run yet."
    record = json.loads(path.read_text())
    names = ("torch", "transformers", "peft", "gradio", "pillow")
    counts = [str(record["passed"]), str(record["failed"])]
    return table(
        ["date", "Python", *names, "passed", "failed"],
        [record["date"], record["python"], *(record["versions"][name] for name in names), *counts],
    )


# Rows of the decode tables that stand in the README, in its words.
DECODES = {
    "exact": "the reference's computation",
    "cached": "prefix cache",
    "cached, 11 steps": "prefix cache, 11 of 32 steps",
    "cached, 4 steps": "prefix cache, 4 of 32 steps",
    "cached, 1 step": "one forward pass",
    "autoregressive, shared prefix": "autoregressive, 20 tokens a caption, shared prefix",
}
DECODES_ON_GPU = ("exact", "cached, 11 steps", "autoregressive, shared prefix")  # the page has all


def preprocessing(record: dict) -> str:
    """What an image costs before the model, before and after, and what Pillow's resizing alone takes of it."""
    rows = [["image", "before", "now", "of that resizing the image, by Pillow"]]
    for row in record["rows"]:
        times = [f"{row[name]:.0f} ms" for name in ("before_ms", "ours_ms", "resize_ms")]
        rows.append([" x ".join(map(str, row["size"])), *times])
    return table(*rows)


def headlines(held: dict, cpu: dict, gpus: dict[int, dict], served: dict, tuned: dict, commit: dict) -> str:
    """The README's table: what every part gains and loses, with a link to the conditions."""
    page = "docs/performance.md"
    rows = [
        ["what", "how", "result", "same tokens"],
        [
            f"[Embedded checkpoint]({page}#accuracy-of-the-embedded-checkpoint)",
            "captions of held-out drawings in which all is right",
            percent(held["held_out"]["exact"]),
            "",
        ],
        [
            f"[Forward passes an image]({page}#forward-passes-an-image)",
            "embedded checkpoint, before and after it learned to commit",
            " → ".join(f"{commit[stage]['threshold 0.8']['forwards']:.1f}" for stage in ("careful", "commits")),
            "",
        ],
    ]
    on_cpu = f"[Decoding on a CPU]({page}#decoding-speed), 4 regions"
    on_gpu = f"[Decoding on an H100]({page}#a-decode-beside-the-references-loop), 6 regions"
    on_each = ((on_cpu, cpu["tables"][0]["rows"], DECODES), (on_gpu, gpu_rows(gpus[4], "table6"), DECODES_ON_GPU))
    for name, found, loops in on_each:
        for loop in loops:
            row = found[loop]
            same = "" if row["tokens_as_exact"] is None else f"{100 * row['tokens_as_exact']:.0f} %"
            rows.append([name, DECODES[loop], f"{row['ratio_to_reference']:.1f} times", same])
    step, fp8 = gpu_rows(gpus[4], "step"), gpu_rows(gpus[2], "fp8")
    for how, before, after in (
        (
            "fused kernels and CUDA graphs, beside sdpa",
            step["sdpa, 3 regions, batch 1"],
            step["kernels, captured, 3 regions, batch 1"],
        ),
        (
            "FP8, beside bfloat16, CUDA graphs (before the fused kernels)",
            fp8["bfloat16: split, captured, 3 regions, batch 1"],
            fp8["FP8: split, captured, 3 regions, batch 1"],
        ),
    ):
        ratio = before["canvas_ms"] / after["canvas_ms"]
        rows.append([f"[A pass on an H100]({page}#a-forward-pass)", how, f"{ratio:.1f} times", ""])
    ratios = [row["ratio_to_transformers"] for name, row in served["rows"].items() if name.startswith("vLLM")]
    same = "100 %" if served["same_captions"] else "not all"
    spread = f"{min(ratios):.1f} to {max(ratios):.1f} times"
    rows.append([f"[Serving on a CPU]({page}#serving)", "vLLM, beside the transformers loop", spread, same])
    for domain in ("new", "old"):
        change = " → ".join(percent(tuned[stage][domain]["exact"]) for stage in ("before", "after"))
        rows.append(["[Fine-tuning](docs/fine-tuning.md#measured)", f"captions right, {domain} domain", change, ""])
    return table(*rows)


def tables() -> dict[str, str]:
    """Every table, by name."""

    def load(name: str) -> dict:
        return json.loads((RESULTS / name).read_text())

    batch = {"batch_throughput": batch_throughput, "batch_parts": batch_parts, "batch_bytes": batch_bytes}
    walk = load("commit_walk.json")
    later = {"shapes_chat": chat, "lora_shapes": lora, "lora_parts": lora_parts, "lora_isolated": lora_isolated}
    later["lora_attributes"] = lora_attributes
    checkpoint, speed = json.loads((CHECKPOINT / "training.json").read_text()), load("decode_cpu_small.json")
    kept = ("32 steps, recomputed", "32 steps, prompt every 8", "32 steps", "threshold 0.8", "threshold 0.9")
    return {
        "headlines": headlines(
            checkpoint,
            speed,
            {call: load(f"gpu_h100_{call}.json") for call in (2, 4)},
            load("serving_cpu_small.json"),
            load("lora_shapes.json"),
            load("shapes_commit.json"),
        ),
        "held_out": held_out(checkpoint),
        "by_regions": by_regions(checkpoint),
        "quality": quality(load("shapes_quality.json")),
        "quality_careful": quality(load("shapes_quality_careful.json")),
        "quality_full": quality(load("shapes_quality_full.json"), kept),
        "commit": commit_sweep(load("shapes_commit.json")),
        "commit_walk": commit_walk(walk),
        "commit_costs": commit_costs(walk),
        "commit_rules": commit_rules(walk),
        "commit_parts": commit_parts(load("commit_parts.json")),
        "rules": rules(load("shapes_rules.json")),
        "attributes": attributes(load("attributes_shapes.json")),
        "ablation": ablation(load("shapes_ablation.json")),
        "decode": decode(speed),
        "scaling": scaling(load("decode_cpu_small_scaling.json")),
        "serving": serving(load("serving_cpu_small.json")),
        "preprocessing": preprocessing(load("preprocessing.json")),
        "soak": soak(load("soak_cpu.json")),
        **{name: make(load("batch_throughput.json")) for name, make in batch.items()},
        "batch_costs": batch_costs(),
        "scale": scale(load("scale.json")),
        "kills": kills(load("kills.json")),
        "newest": newest(RESULTS / "newest.json"),
        **gpu_tables(
            {call: load(f"gpu_h100_{call}.json") for call in (1, 2, 3, 4)},
            load("gpu_h100_kernels.json"),
            load("gpu_h100_tuning.json"),
        ),
        **{name: make(load(f"{name}.json")) for name, make in later.items() if (RESULTS / f"{name}.json").is_file()},
    }


def write(text: str) -> str:
    """A page with its tables up to date. Raises: KeyError for a mark without a table."""
    known = tables()
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{known[m[2]]}\n{m[3]}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for page in PAGES:
            page.write_text(write(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in tables().items()))
