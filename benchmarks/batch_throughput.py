"""Regions a second of `pdlm batch`: this process, Ray with one and two captioners, a server, in turn in one run.

    python benchmarks/batch_throughput.py --vllm .venv-vllm/bin/vllm --json benchmarks/results/batch_throughput.json

Random weights of the decode benchmark's shape "small" behind the embedded checkpoint's processor (`--shape shapes`:
the embedded checkpoint itself), drawn images of four regions, one thread a captioner. Without `--vllm`, the program
of an environment that has the plugin, there is no server. What an image costs the CPU besides is measured on a
image of the size of COCO's.
"""

import io
import json
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import ray
import torch
import typer
from PIL import Image
from serving import four_regions, random_checkpoint, serve

from pdlm_hf import CHECKPOINT, RegionCaptioner
from pdlm_hf.batch.dataset import open_data
from pdlm_hf.batch.engines import Engine, LocalEngine
from pdlm_hf.batch.ray_engine import CaptionerSettings, RayEngine
from pdlm_hf.batch.run import BatchFiles, run_batch
from pdlm_hf.batch.server_engine import ServerEngine
from pdlm_hf.bench.decode import FEW_STEPS
from pdlm_hf.client.captions import CaptionClient
from pdlm_hf.regions.files import append_rows, read_rows, write_json
from pdlm_hf.regions.images import load_image
from pdlm_hf.regions.region import Region, parse_region

SETTINGS = {"max_new_tokens": 32, "max_denoising_steps": FEW_STEPS}


def write_data(folder: Path, count: int) -> None:
    """A COCO file of drawn images of four regions."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for k, (image, boxes) in enumerate(four_regions(count)):
        image.save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "width": image.width, "height": image.height})
        annotations += [{"id": 4 * k + n, "image_id": k, "bbox": box} for n, box in enumerate(boxes)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def measure(folder: Path, open_engine: Callable[[], Engine]) -> tuple[dict, dict]:
    """Run the data set once. Returns: seconds to the first captions, regions a second from there on; the captions."""
    data, seen = open_data(folder / "coco.json", folder / "images"), []
    with tempfile.TemporaryDirectory() as temporary:
        files = BatchFiles(Path(temporary) / "out.jsonl", {})
        start = time.perf_counter()
        run_batch(data, open_engine, files, progress=lambda _, c: seen.append((time.perf_counter(), c.regions)))
        said = {row["annotation_id"]: row["caption"] for row in read_rows(files.out)}
    seen = [(seconds, regions) for seconds, regions in seen if regions]
    (first, before), (last, after) = seen[0], seen[-1]
    found = {"start_s": first - start, "regions_per_second": (after - before) / (last - first)}
    return found, said


def driver_memory(rows: list[dict], count: int = 500) -> dict:
    """Bytes a region: in the COCO file, in the one with captions, and in the driver, which holds what the first says,
    what is done, and what it sends to Ray."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "0.jpg").touch()
        images = [{"id": k, "file_name": f"{k}.jpg", "width": 640, "height": 480} for k in range(count)]
        regions = [
            {**{name: row[name] for name in ("bbox", "segmentation")}, "id": k * len(rows) + n, "image_id": k}
            for k in range(count)
            for n, row in enumerate(rows)
        ]
        (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": regions}))
        count, size = len(regions), (folder / "coco.json").stat().st_size
        del images, regions
        tracemalloc.start()
        data, files = open_data(folder / "coco.json"), BatchFiles(folder / "out.jsonl", {})
        for entry in data.entries:
            ids = {"image_id": entry.id, "file_name": entry.file_name}
            files.add({**row, **ids, "annotation_id": own} for row, own in zip(rows, entry.ids, strict=True))
        sent = [pickle.dumps((entry, [])) for entry in data.entries]
        held = tracemalloc.get_traced_memory()[0]
        del sent
        tracemalloc.stop()
        write_json(files.coco_path, data.with_captions(read_rows(files.out)))
        return {
            "coco_bytes": round(size / count),
            "coco_out_bytes": round(files.coco_path.stat().st_size / count),
            "driver_bytes": round(held / count),
        }


def parts(repeats: int = 30) -> dict:
    """What an image of 640 x 480, its masks and its rows cost besides the model: time on a core, bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    y, x = np.mgrid[:480, :640]
    regions = [
        Region(k, ((x - 320) / (40 + 9 * k)) ** 2 + ((y - 240) / (50 + 5 * k)) ** 2 + np.sin(x / (5 + k)) / 3 < 1)
        for k in range(20)
    ]
    shapes = [{"segmentation": region.segmentation} for region in regions]
    caption = {
        "caption": "A dark brown dog with a white chest that lies on a blue blanket beside a window.",
        "score": 0.8312,
    }
    ids = {"image_id": 139, "annotation_id": 1768, "file_name": "000000000139.jpg"}
    rows = [{**ids, **caption, "bbox": r.bbox, "segmentation": r.segmentation} for r in regions]

    def milliseconds(work: Callable[[], object], count: int) -> float:
        """Of one of so many."""
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            taken.append((time.perf_counter() - start) / count)
        return round(1000 * statistics.median(taken), 4)

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.jsonl"
        written = milliseconds(lambda: append_rows(path, rows), len(rows))
    return {
        "open_ms_per_image": milliseconds(lambda: load_image("a.jpg", file.getvalue()), 1),
        "read_mask_ms_per_region": milliseconds(lambda: [parse_region(s, 640, 480) for s in shapes], len(shapes)),
        "encode_mask_ms_per_region": milliseconds(lambda: [r.segmentation for r in regions], len(regions)),
        "write_ms_per_region": written,
        "image_bytes": len(file.getvalue()),
        "mask_bytes": round(statistics.mean(len(s["segmentation"]["counts"]) for s in shapes)),
        "row_bytes": round(statistics.mean(len(json.dumps(row, ensure_ascii=False)) + 1 for row in rows)),
        **driver_memory(rows),
    }


def main(
    shape: Annotated[str, typer.Option(help="small, tiny, or shapes: the embedded checkpoint.")] = "small",
    images: Annotated[int, typer.Option(help="Images a run.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of everything, in turn.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images a forward.")] = 4,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    vllm: Annotated[Path | None, typer.Option(help="The program vllm of an environment with the plugin.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time them, in turn."""
    torch.set_num_threads(1)
    os.environ |= {"NO_PROXY": "127.0.0.1", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, images)
        model = str(CHECKPOINT if shape == "shapes" else random_checkpoint(folder / "checkpoint", shape))
        settings = CaptionerSettings(model, "default", batch_size, None, SETTINGS)
        engines = {
            "this process": lambda: LocalEngine(RegionCaptioner.from_pretrained(model), batch_size, **SETTINGS),
            "Ray, 1 captioner": lambda: RayEngine(settings, 1),
            "Ray, 2 captioners": lambda: RayEngine(settings, 2),
        }
        runs: dict[str, list[dict]] = {}
        said: dict[str, dict] = {}

        def run(name: str, open_engine: Callable[[], Engine]) -> None:
            found, said[name] = measure(folder, open_engine)
            runs.setdefault(name, []).append(found)
            print(name, found, file=sys.stderr)

        for _ in range(repeats):
            for name, open_engine in engines.items():
                run(name, open_engine)
            if vllm is not None:
                with serve(model, folder / "server.log", program=vllm, cores="0") as server:
                    name = f"vLLM, {concurrency} requests in flight"
                    run(
                        name,
                        lambda: ServerEngine(CaptionClient(server.url, settings=SETTINGS, concurrency=concurrency)),
                    )
    expected = said["this process"]
    rows = {}
    for name, found in runs.items():
        rates = [row["regions_per_second"] for row in found]
        rows[name] = {
            "regions_per_second": round(statistics.median(rates), 3),
            "spread": [round(min(rates), 3), round(max(rates), 3)],
            "start_s": round(statistics.median(row["start_s"] for row in found), 1),
            "same_captions": sum(said[name][key] == text for key, text in expected.items()) / len(expected),
        }
    record = {
        "what": f"{images} images of 4 regions, 32 slots, {FEW_STEPS} steps, {batch_size} images a forward; "
        f"{repeats} runs in turn",
        "shape": shape,
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores; one thread a captioner",
        "torch": torch.__version__,
        "ray": ray.__version__,
        "rows": rows,
        "parts": parts(),
    }
    print(json.dumps(record, indent=1))
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
