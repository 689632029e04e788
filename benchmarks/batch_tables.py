"""The tables of what large data sets cost."""

from .markdown import percent, table


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
