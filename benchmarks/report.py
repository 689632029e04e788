"""The tables of the README and of docs/, from benchmarks/results and the record of the embedded checkpoint.

python benchmarks/report.py            # prints them
python benchmarks/report.py --write    # puts them between the "table" marks of the pages
"""

import json
import re
import sys
from pathlib import Path

from pdlm_hf.captioning.checkpoints import CHECKPOINT

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ATTRIBUTES = ("size", "colour", "texture", "shape")


def percent(share: float) -> str:
    """0.973 -> 97.3 %"""
    return f"{100 * share:.1f} %"


def table(*rows: list[str]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def held_out(record: dict) -> str:
    """Accuracy of the embedded checkpoint, from its training.json."""
    rows = [["checkpoint", "exact", "well formed", *ATTRIBUTES]]
    for name, score in stages(record).items():
        attributes = [percent(score["by_attribute"][attribute]) for attribute in ATTRIBUTES]
        rows.append([name, percent(score["exact"]), percent(score["well_formed"]), *attributes])
    return table(*rows)


def stages(record: dict) -> dict[str, dict]:
    """The scores of the embedded checkpoint and of the careful one that it was trained from."""
    return {"embedded": record["held_out"], "careful": record["initialised_from"]["held_out"]}


def by_regions(record: dict) -> str:
    """The same, by the number of regions."""
    found = {name: score["by_regions"] for name, score in stages(record).items()}
    rows = [[f"{name}, exact", *(percent(share) for share in shares.values())] for name, shares in found.items()]
    return table(["regions in the image", *found["embedded"]], *rows)


def quality(record: dict, only: tuple[str, ...] = ()) -> str:
    """Accuracy for every decoding setting."""
    rows = [["setting", "exact", "well formed", "steps a region", "forwards an image"]]
    for name, row in record["settings"].items():
        if not only or name in only:
            numbers = [percent(row["exact"]), percent(row["well_formed"])]
            rows.append([name, *numbers, f"{row['steps_per_region']:.1f}", f"{row['num_forwards']:.1f}"])
    return table(*rows)


def commit_sweep(record: dict) -> str:
    """Forward passes against right captions, before and after `pdlm-peft commit` of the embedded checkpoint."""
    rows = [
        ["setting", "careful: exact", "forwards an image", "commits: exact", "at six regions", "forwards an image"]
    ]
    for name, after in record["commits"].items():
        before = record["careful"][name]
        cells = [percent(before["exact"]), f"{before['forwards']:.1f}"]
        cells += [percent(after["exact"]), percent(after["six_regions"]), f"{after['forwards']:.2f}"]
        rows.append([name, *cells])
    return table(*rows)


def commit_walk(record: dict) -> str:
    """`pdlm-peft commit` from the careful checkpoint to the merged one: scores on images of other seeds."""
    stages = [record[stage] for stage in ("before", "after")]
    rows = [[f"{stages[0]['images']} held-out images", "careful", "merged"]]
    rows.append(["forward passes an image", *(f"{row['forwards']:.2f}" for row in stages)])
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
    """Decoding speed beside the reference's loop."""
    rows = [["loop", "an image", "times the reference", "regions a second", "tokens as exact"]]
    for name, row in record["tables"][0]["rows"].items():
        numbers = [
            f"{row['ratio_to_reference']:.2f}",
            f"{row['regions_per_second']:.2f}",
            percent(row["tokens_as_exact"]),
        ]
        rows.append([name, f"{row['ms_per_image'] / 1000:.2f} s", *numbers])
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


def chat(record: dict) -> str:
    """What block length and steps do to answers of the base checkpoint, and to their cost."""
    kinds = list(next(iter(record["settings"].values())))
    rows = [["setting", *(f"{kind}: right, passes, s" for kind in kinds)]]
    for name, found in record["settings"].items():
        cells = [found[kind] for kind in kinds]
        rows.append([name, *(f"{percent(c['right'])}, {c['forwards']:.0f}, {c['seconds']:.1f}" for c in cells)])
    return table(*rows)


def batch_throughput(record: dict) -> str:
    """Regions a second of the engines of `pdlm batch`."""
    rows = [["engine", "regions a second", "least, most", "hours a million regions", "start", "same captions"]]
    for name, row in record["rows"].items():
        rate, spread = row["regions_per_second"], row["spread"]
        numbers = [f"{rate:.2f}", f"{spread[0]:.2f}, {spread[1]:.2f}", f"{1e6 / rate / 3600:,.0f}"]
        rows.append([name, *numbers, f"{row['start_s']:.0f} s", percent(row["same_captions"])])
    return table(*rows)


def scale(record: dict) -> str:
    """CPU seconds and peak memory of each command, by the number of annotations."""
    found = {(row["command"], row["annotations"]): row for row in record["rows"]}
    counts = sorted({row["annotations"] for row in record["rows"]})
    rows = [["command", *(f"{count:,} annotations" for count in counts)]]
    for name in dict.fromkeys(row["command"] for row in record["rows"]):
        cells = (found.get((name, count)) for count in counts)
        rows.append(
            [
                name,
                *(f"{c['cpu_seconds']:.0f} s, {c['megabytes'] / 1000:.1f} GB" if c else "not measured" for c in cells),
            ]
        )
    return table(*rows)


def kills(record: dict) -> str:
    """Kills of every command of the evaluation, and the requests that were asked again."""
    rows = [["command", "kills", "runs", "requests to the judge", "asked again"]]
    for row in record["rows"]:
        counts = (row["kills"], row["runs"], row.get("requests", "-"), row.get("asked_again", "-"))
        rows.append([f"`{row['name']}`", *map(str, counts)])
    return table(*rows, ["all", str(sum(row["kills"] for row in record["rows"])), "", "", ""])


def batch_parts(record: dict) -> str:
    """What an image costs a CPU besides the model."""
    parts = record["parts"]
    named = {
        "open_ms_per_image": "open a JPEG of 640 x 480",
        "read_mask_ms_per_region": "make a mask of RLE",
        "encode_mask_ms_per_region": "make RLE of a mask",
        "write_ms_per_region": "write a row",
    }
    rows = [["work", "takes", "a second on one core"]]
    rows += [[text, f"{parts[name]:.3f} ms", f"{1000 / parts[name]:,.0f}"] for name, text in named.items()]
    return table(*rows)


def batch_bytes(record: dict) -> str:
    """What a region takes, in files and in memory."""
    named = {
        "coco_bytes": "COCO file that comes in",
        "row_bytes": "`OUT.jsonl`: a row",
        "coco_out_bytes": "`OUT.coco.json`",
        "mask_bytes": "of each of them: the mask as RLE",
        "driver_bytes": "memory of the driver",
    }
    rows = [["what", "bytes a region", "a million", "a billion"]]
    for name, text in named.items():
        size = record["parts"][name]
        rows.append([text, str(size), f"{size / 1e3:.2f} GB", f"{size / 1e3:.2f} TB"])
    return table(*rows)


def batch_costs(rates: tuple[int, ...] = (5, 20, 80, 320)) -> str:
    """What a million and a billion regions take, by the regions a second of one captioner."""
    rows = [["regions a second", "captioner hours a million", "a billion", "days of 8 captioners", "of 64", "of 512"]]
    for rate in rates:
        hours = 1e9 / rate / 3600
        days = [f"{hours / captioners / 24:,.1f}" for captioners in (8, 64, 512)]
        rows.append([str(rate), f"{hours / 1000:,.1f}", f"{hours:,.0f}", *days])
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


def gpu_rows(record: dict, stage: str) -> dict[str, dict]:
    """Rows of a stage of `benchmarks/gpu`."""
    return record["stages"][stage]["rows"]


def gpu_decode(stages: dict[int, dict]) -> str:
    """The 8B's shape beside the reference's loop, by the number of regions."""
    rows = [["loop", *(f"{n} region{'s' * (n > 1)}: an image, ratio, tokens as exact" for n in stages)]]
    for name in (name for name in stages[3] if name != "all"):
        cells = []
        for found in stages.values():
            if row := found.get(name):
                as_exact = f"{100 * row['tokens_as_exact']:.0f} %"
                cells.append(f"{row['ms_per_image']:.0f} ms, {row['ratio_to_reference']:.1f}, {as_exact}")
            else:
                cells.append("not run")
        rows.append([name.replace("region_split", "split").replace("graphs", "captured"), *cells])
    return table(*rows)


def gpu_pass(records: dict[int, dict]) -> str:
    """Single passes of the 8B's shape, by how they are computed."""
    rows = [
        ["way", "images", "canvas pass", "scoring", "of the roofline", "prompt pass", "peak memory", "call, stage"]
    ]
    for call, stage in ((3, "step"), (2, "compile"), (2, "flex"), (2, "fp8")):
        for name, row in gpu_rows(records[call], stage).items():
            if "canvas_ms" in row:
                way, images = name.split(", 3 regions, batch ")
                times = [f"{row[f'{part}_ms']:.1f} ms" for part in ("canvas", "score")]
                share, prompt = f"{100 * row['share_of_roofline']:.0f} %", f"{row['prompt_ms']:.0f} ms"
                rows.append([way, images, *times, share, prompt, f"{row['peak_gb']:.1f} GB", f"{call}, {stage}"])
    return table(*rows)


def gpu_kernels(record: dict) -> str:
    """What an eager canvas pass consists of, beside the time it takes."""
    rows = [["way", "kernels a pass", "the GPU is busy", "the pass takes"]]
    for name, row in gpu_rows(record, "kernels").items():
        taken = gpu_rows(record, "step")[f"{name}, 3 regions, batch 1"]["canvas_ms"]
        rows.append([name, f"{row['kernels']:,}", f"{row['busy_us'] / 1000:.1f} ms", f"{taken:.1f} ms"])
    return table(*rows)


def gpu_agreement(record: dict) -> str:
    """The first canvas pass with a prefix cache beside the pass over everything: the same computation."""
    rows = [["way", "the same drafts", "hidden states differ by"]]
    for name, row in gpu_rows(record, "agreement").items():
        if "same_drafts" in row:
            way = name.removeprefix("first canvas pass, ")
            rows.append([way, percent(row["same_drafts"]), percent(row["hidden_error"])])
    return table(*rows)


def gpu_growth(record: dict) -> str:
    """How a cached decode grows with regions, tiles and batch."""
    rows = [["size", "sdpa", "split, captured", "peak memory"]]
    for name, row in gpu_rows(record, "scaling").items():
        times = [f"{row[f'{way} ms']:,.0f} ms" for way in ("sdpa", "split, captured")]
        rows.append([name, *times, f"{row['peak_gb']:.1f} GB"])
    return table(*rows)


def gpu_shapes(record: dict) -> str:
    """The embedded checkpoint on the GPU."""
    rows = [["computed in", "captions", "exact", "the same words as float32"]]
    for name, row in gpu_rows(record, "shapes").items():
        same = percent(row["same_as_float32"]) if "same_as_float32" in row else ""
        rows.append([name, f"{row['captions']:,}", percent(row["exact"]), same])
    return table(*rows)


def gpu_lora(record: dict) -> str:
    """Memory of a training step beside its estimate."""
    found = gpu_rows(record, "lora")
    rows = [["rows a step", "tokens", "peak memory, measured", "estimated", "a step"]]
    for size in (1, 4):
        row, estimate = found[f"batch {size}"], found[f"batch {size}, estimate"]
        memory = [f"{row['peak_gb']:.1f} GB", f"{estimate['total_gb']:.1f} GB"]
        rows.append([str(size), f"{row['tokens']:,}", *memory, f"{row['seconds'][-1]:.2f} s"])
    return table(*rows)


# Rows of the decode tables that stand in the README, in its words.
DECODES = {
    "exact": "the reference's computation",
    "cached": "prefix cache",
    "cached, region_split": "prefix cache, region split without CUDA graphs",
    "cached, region_split, graphs": "prefix cache, region split with CUDA graphs",
    "cached, 11 steps": "prefix cache, 11 of 32 steps",
    "cached, 11 steps, region_split, graphs": "prefix cache, 11 of 32 steps, region split with CUDA graphs",
}


def headlines(held: dict, cpu: dict, gpu: dict, served: dict, tuned: dict, commit: dict) -> str:
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
    for name, found in ((on_cpu, cpu["tables"][0]["rows"]), (on_gpu, gpu_rows(gpu, "table6"))):
        for loop, row in ((loop, found[loop]) for loop in DECODES if loop in found):
            same = f"{100 * row['tokens_as_exact']:.0f} %"
            rows.append([name, DECODES[loop], f"{row['ratio_to_reference']:.1f} times", same])
    passes = [gpu_rows(gpu, "fp8")[f"{dtype}: split, captured, 3 regions, batch 1"] for dtype in ("bfloat16", "FP8")]
    ratio = passes[0]["canvas_ms"] / passes[1]["canvas_ms"]
    rows.append(
        [f"[A pass on an H100]({page}#a-forward-pass)", "FP8, beside bfloat16, CUDA graphs", f"{ratio:.1f} times", ""]
    )
    ratios = [row["ratio_to_transformers"] for name, row in served["rows"].items() if name.startswith("vLLM")]
    same = "100 %" if served["same_captions"] else "not all"
    spread = f"{min(ratios):.1f} to {max(ratios):.1f} times"
    rows.append([f"[Serving on a CPU]({page}#serving)", "vLLM, beside the transformers loop", spread, same])
    for domain in ("new", "old"):
        change = " → ".join(percent(tuned[stage][domain]["exact"]) for stage in ("before", "after"))
        rows.append(["[Fine-tuning](docs/fine-tuning.md#measured)", f"captions right, {domain} domain", change, ""])
    return table(*rows)


def gpu_tables(records: dict[int, dict]) -> dict[str, str]:
    """Tables of three calls of `benchmarks/gpu`, by name; each of the newest call that measured it rightly."""
    decodes = {1: gpu_rows(records[2], "table1"), 3: gpu_rows(records[1], "table3"), 6: gpu_rows(records[2], "table6")}
    return {
        "gpu_decode": gpu_decode(decodes),
        "gpu_pass": gpu_pass(records),
        "gpu_kernels": gpu_kernels(records[1]),
        "gpu_agreement": gpu_agreement(records[3]),
        "gpu_growth": gpu_growth(records[3]),
        "gpu_shapes": gpu_shapes(records[1]),
        "gpu_lora": gpu_lora(records[1]),
    }


def tables() -> dict[str, str]:
    """Every table, by name."""

    def load(name: str) -> dict:
        return json.loads((RESULTS / name).read_text())

    batch = {"batch_throughput": batch_throughput, "batch_parts": batch_parts, "batch_bytes": batch_bytes}
    walk = load("commit_walk.json")
    later = {"shapes_chat": chat, "lora_shapes": lora, "lora_parts": lora_parts, "lora_isolated": lora_isolated}
    checkpoint, speed = json.loads((CHECKPOINT / "training.json").read_text()), load("decode_cpu_small.json")
    kept = ("32 steps, recomputed", "32 steps, prompt every 8", "32 steps", "threshold 0.8", "threshold 0.9")
    return {
        "headlines": headlines(
            checkpoint,
            speed,
            load("gpu_h100_2.json"),
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
        "ablation": ablation(load("shapes_ablation.json")),
        "decode": decode(speed),
        "scaling": scaling(speed),
        "serving": serving(load("serving_cpu_small.json")),
        **{name: make(load("batch_throughput.json")) for name, make in batch.items()},
        "batch_costs": batch_costs(),
        "scale": scale(load("scale.json")),
        "kills": kills(load("kills.json")),
        "newest": newest(RESULTS / "newest.json"),
        **gpu_tables({call: load(f"gpu_h100_{call}.json") for call in (1, 2, 3)}),
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
