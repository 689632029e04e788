"""The tables of docs/performance.md from the records of four calls of `benchmarks/gpu`."""

from ..markdown import percent, table


def gpu_rows(record: dict, stage: str) -> dict[str, dict]:
    """Rows of a stage of `benchmarks/gpu`."""
    return record["stages"][stage]["rows"]


def gpu_decode(stages: dict[int, dict]) -> str:
    """The 8B's shape beside the reference's loop, by the number of regions."""
    rows = [["loop", *(f"{n} region{'s' * (n > 1)}: an image, ratio" for n in stages)]]
    for name in (name for name in stages[3] if name != "all"):
        cells = []
        for found in stages.values():
            if row := found.get(name):
                cells.append(f"{row['ms_per_image']:.0f} ms, {row['ratio_to_reference']:.1f}")
            else:
                cells.append("not run")
        rows.append([name, *cells])
    return table(*rows)


def gpu_pass(records: dict[int, dict]) -> str:
    """Single passes of the 8B's shape, by how they are computed."""
    rows = [["way", "regions, images", "canvas pass", "scoring", "of the roofline", "prompt pass", "peak memory"]]
    found = [(4, "step"), (4, "tile"), (3, "step"), (2, "compile"), (2, "flex"), (2, "fp8")]
    for call, stage in found:
        for name, row in gpu_rows(records[call], stage).items():
            if "canvas_ms" in row:
                way, size = _way_and_size(name)
                times = [f"{row[f'{part}_ms']:.1f} ms" for part in ("canvas", "score")]
                share, prompt = f"{100 * row['share_of_roofline']:.0f} %", f"{row['prompt_ms']:.0f} ms"
                rows.append([f"{call}: {way}", size, *times, share, prompt, f"{row['peak_gb']:.1f} GB"])
    return table(*rows)


def _way_and_size(name: str) -> tuple[str, str]:
    """The parts of a row's name, as in "split, captured, 3 regions, batch 8" and "4 regions, 30 positions"."""
    *way, regions, last = name.split(", ")
    if last.endswith("positions"):
        return f"kernels, captured, {last}", f"{regions.split()[0]}, 1"
    return ", ".join(way), f"{regions.split()[0]}, {last.removeprefix('batch ')}"


def gpu_kernels(record: dict, fused: dict) -> str:
    """What a canvas pass consists of."""
    rows = [["way", "kernels per pass", "the GPU is busy"]]
    found = {f"1: {name}": row for name, row in gpu_rows(record, "kernels").items()}
    found |= {
        "before 4: fused kernels": fused["profile"]["canvas"],
        "before 4: fused kernels, with the prompt": fused["profile"]["whole"],
    }
    for name, row in found.items():
        rows.append([name, f"{row['kernels']:,}", f"{row['busy_us'] / 1000:.1f} ms"])
    return table(*rows)


def gpu_regions(fused: dict) -> str:
    """How passes grow with regions and images."""
    rows = [["size", "prompt and canvas", "canvas, captured", "canvas, launched one by one"]]
    for name, row in fused["passes"].items():
        times = [f"{row[f'{part}_ms']:.1f} ms" for part in ("prompt_full", "canvas_captured", "canvas_eager")]
        rows.append([name, *times])
    return table(*rows)


def gpu_tuning(record: dict) -> str:
    """The attention kernel by the sizes of a program."""
    titles = {
        f"{images}x{n}": f"{n} region{'s' * (n > 1)}, batch {images}"
        for images, n in ((1, 1), (1, 3), (1, 4), (1, 6), (8, 3))
    }
    rows = [["queries, keys, warps, stages, programs per multiprocessor", *titles.values()]]
    for name, sizes in record["candidates"].items():
        rows.append([", ".join(map(str, sizes)), *(f"{record['us'][name][key]:.0f} µs" for key in titles)])
    return table(*rows)


def gpu_agreement(record: dict) -> str:
    """The first canvas pass with a prefix cache beside the pass over everything: the same computation."""
    rows = [["way", "the same drafts", "hidden states differ by"]]
    for name, row in gpu_rows(record, "agreement").items():
        if "same_drafts" in row:
            way = name.removeprefix("first canvas pass, ")
            rows.append([way, percent(row["same_drafts"]), percent(row["hidden_error"])])
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
    rows = [["rows per step", "tokens", "peak memory, measured", "estimated", "a step"]]
    for size in (1, 4):
        row, estimate = found[f"batch {size}"], found[f"batch {size}, estimate"]
        memory = [f"{row['peak_gb']:.1f} GB", f"{estimate['total_gb']:.1f} GB"]
        rows.append([str(size), f"{row['tokens']:,}", *memory, f"{row['seconds'][-1]:.2f} s"])
    return table(*rows)


def gpu_tables(records: dict[int, dict], fused: dict, tuning: dict) -> dict[str, str]:
    """Tables of four calls of `benchmarks/gpu`, by name; each of the newest call that measured it rightly."""
    decodes = {3: gpu_rows(records[4], "table3"), 6: gpu_rows(records[4], "table6")}
    return {
        "gpu_decode": gpu_decode(decodes),
        "gpu_pass": gpu_pass(records),
        "gpu_kernels": gpu_kernels(records[1], fused),
        "gpu_regions": gpu_regions(fused),
        "gpu_tuning": gpu_tuning(tuning),
        "gpu_agreement": gpu_agreement(records[4]),
        "gpu_shapes": gpu_shapes(records[1]),
        "gpu_lora": gpu_lora(records[1]),
    }
