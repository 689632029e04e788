"""How long `pdlm-peft validate --no-images` takes for many rows, on one core.

    python benchmarks/validate_rows.py --rows 100000 --out benchmarks/results/validate_rows.json

Rows are those of drawn images (one to six regions, RLE of up to 400 pixels a side), each with an id of its own.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from pycocotools import mask as coco
from transformers import AutoProcessor

import pdlm_hf
from pdlm_hf.shapes.scenes import describe, draw_scene
from pdlm_peft.sources import find_source
from pdlm_peft.validation import Validator


def write_rows(path: Path, count: int, distinct: int = 200) -> int:
    """Write `count` rows, made of `distinct` images. Returns: regions in them."""
    drawn, regions = [], 0
    for k in range(distinct):
        rng = np.random.default_rng((7, k))
        image = draw_scene(rng)
        rles = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in image.masks]
        shapes = [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]
        drawn.append([(shape, describe(figure, rng)) for shape, figure in zip(shapes, image.figures, strict=True)])
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            found = drawn[number % distinct]
            row = [{"id": k, "segmentation": shape, "caption": text} for k, (shape, text) in enumerate(found)]
            file.write(json.dumps({"image": f"{number}.png", "regions": row}) + "\n")
            regions += len(row)
    return regions


def main() -> None:
    """Write the rows, check them, print and keep what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        regions = write_rows(path, options.rows)
        validator = Validator(AutoProcessor.from_pretrained(pdlm_hf.CHECKPOINT), open_images=False)
        start, cpu = time.perf_counter(), time.process_time()
        report = validator.validate(find_source(path))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        result = {
            "rows": options.rows,
            "regions": regions,
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "faults": len(report.faults),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "rows_per_second": round(options.rows / seconds),
            "hardware": {"machine": platform.machine(), "system": platform.system(), "threads": 1},
            "python": platform.python_version(),
        }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
