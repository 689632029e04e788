"""The tables of docs/performance.md from the records of three calls of `benchmarks/gpu`."""

from ..markdown import percent, table


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
                same = row["tokens_as_exact"]
                as_exact = "" if same is None else f", {100 * same:.0f} %"
                cells.append(f"{row['ms_per_image']:.0f} ms, {row['ratio_to_reference']:.1f}{as_exact}")
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
