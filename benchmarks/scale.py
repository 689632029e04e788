"""What annotation files of very different length cost: CPU seconds and memory of each command on data sets.

    python benchmarks/scale.py --annotations 10000 100000 1000000 --out benchmarks/results/scale.json
    python benchmarks/report.py

The data is a COCO file with a caption for each annotation, seven annotations an image, masks as RLE. Each command is a
process of its own, so start-up counts; its memory is the peak of the resident set. Captions of a batch cost what a
model costs, so that here a batch only starts, and goes on when everything is done. No image is opened but those of the
report.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 640, 480
EACH = 7  # annotations of an image
SHOWN = 500  # images of a report
SETTINGS = {"model": "none"}
NOUNS = ("street", "dog", "cup", "kite", "bus", "child", "tree", "boat")


def shapes(count: int = 200) -> list[tuple[list[int], dict]]:
    """Boxes and RLE of masks with wavy outlines."""
    import numpy as np

    from pdlm_hf.regions.region import Region

    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = []
    for k in range(count):
        rng = np.random.default_rng((7, k))
        cx, cy, radius = rng.uniform(150, WIDTH - 150), rng.uniform(120, HEIGHT - 120), rng.uniform(40, 110)
        angle = np.arctan2(y - cy, x - cx)
        waves = 1 + 0.1 * np.sin(angle * rng.integers(3, 12)) + 0.05 * np.sin(angle * rng.integers(12, 40))
        region = Region(k, np.hypot(x - cx, y - cy) < radius * waves)
        found.append((region.bbox, region.segmentation))
    return found


def caption(number: int) -> str:
    """A caption of ten words, as those of COCO have."""
    names = [NOUNS[(number >> shift) % len(NOUNS)] for shift in (0, 3, 6)]
    return f"A {names[0]} beside a {names[1]} and a {names[2]}, number {number}."


def write_data(folder: Path, count: int) -> None:
    """Write coco.json, all results of a batch of it, and the images of its report."""
    import numpy as np
    from PIL import Image

    from pdlm_hf.regions.files import write_json, write_json_lists

    regions = shapes()
    images = -(-count // EACH)

    def annotations() -> Iterator[dict]:
        for number in range(count):
            box, shape = regions[number % len(regions)]
            place = {"id": number + 1, "image_id": number // EACH + 1, "category_id": 1, "iscrowd": 0}
            yield place | {"bbox": box, "segmentation": shape, "caption": caption(number)}

    names = ({"id": k + 1, "file_name": f"{k:07}.jpg", "width": WIDTH, "height": HEIGHT} for k in range(images))
    values = {"images": names, "annotations": annotations(), "categories": [{"id": 1, "name": "thing"}]}
    write_json_lists(folder / "coco.json", values)
    with open(folder / "out.jsonl", "w", encoding="utf-8") as file:
        for entry in annotations():
            row = {"image_id": entry["image_id"], "annotation_id": entry["id"]}
            row |= {"file_name": f"{entry['image_id'] - 1:07}.jpg", "caption": entry["caption"]}
            row["score"] = 0.1 if entry["image_id"] <= SHOWN else 0.9
            file.write(json.dumps(row | {key: entry[key] for key in ("bbox", "segmentation")}) + "\n")
    write_json(folder / "out.run.json", SETTINGS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    image.resize((WIDTH, HEIGHT)).save(folder / "0000000.jpg")
    for k in range(1, min(SHOWN, images)):
        os.link(folder / "0000000.jpg", folder / f"{k:07}.jpg")


class _Started(Exception):
    """The engine of a batch was asked for."""


def start(folder: Path) -> None:
    """A new batch until its first image."""
    from pdlm_hf.batch.dataset import open_data
    from pdlm_hf.batch.run import BatchFiles, run_batch

    try:
        run_batch(open_data(folder / "coco.json", folder), _stop, BatchFiles(folder / "new.jsonl", SETTINGS))
    except _Started:
        return
    raise SystemExit("the batch has no images")


def resume(folder: Path) -> None:
    """A batch in which every region has its caption: it reads them and writes the final COCO file."""
    from pdlm_hf.batch.dataset import open_data
    from pdlm_hf.batch.run import BatchFiles, run_batch

    counts = run_batch(open_data(folder / "coco.json", folder), _stop, BatchFiles(folder / "out.jsonl", SETTINGS))
    if not counts.whole:
        raise SystemExit(str(counts))


def _stop():
    raise _Started


def measured(arguments: list[str]) -> dict[str, float]:
    """CPU seconds, seconds and peak memory in MB of a Python process.

    The system counts the memory of the process that starts it, too, so this one imports nothing large.
    """
    begin = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable, [sys.executable, *arguments], {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{arguments} ended with {os.waitstatus_to_exitcode(status)}.")
    per_megabyte = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # bytes, or units of 1024
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "cpu_seconds": round(cpu, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "megabytes": round(usage.ru_maxrss / per_megabyte),
    }


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments of Python for every command, by its name."""
    pdlm = "import sys; from {} import app; app()"
    data, train, held_out = (str(folder / name) for name in ("coco.json", "train.jsonl", "held_out.jsonl"))
    peft = ["-c", pdlm.format("pdlm_peft.cli")]
    convert = ["convert", data, train, "--from", "coco-instances", "--category-captions", "A {}."]
    report = ["report", str(folder / "out.jsonl"), "--images", str(folder), "--out", str(folder / "page.html")]
    return {
        "validate": [*peft, "validate", data, "--no-images"],
        "convert": [*peft, *convert],
        "split": [*peft, "split", data, train, held_out],
        "batch, start": [__file__, "--part", "start", str(folder)],
        "batch, resume and final file": [__file__, "--part", "resume", str(folder)],
        "report": ["-c", pdlm.format("pdlm_hf.cli.main"), *report],
    }


def processor_name() -> str:
    """The name of the machine's processor, as far as it is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Write the data, run the commands, print and keep what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, folder = options.part[0], Path(options.part[1])
        return write_data(folder, int(part)) if part.isdigit() else {"start": start, "resume": resume}[part](folder)
    rows = []
    for count in options.annotations:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            measured([__file__, "--part", str(count), name])
            megabytes = round((folder / "coco.json").stat().st_size / 1e6)
            for command, arguments in commands(folder).items():
                if options.only and command not in options.only:
                    continue
                row = {"annotations": count, "file_megabytes": megabytes, "command": command, **measured(arguments)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.out is not None:
        machine = {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[1],
            "python": platform.python_version(),
        }
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
