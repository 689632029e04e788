"""Serving load: throughput and latency of `vllm serve` against the number of images in flight, beside transformers.

    python benchmarks/serving.py --concurrency 1,4,16 --json benchmarks/results/serving_cpu_small.json

Both run in turn on the same random weights (the shape "small" of the decode benchmark, with the vision tower and
tokenizer of the embedded checkpoint) and the same images of four regions, cached, 11 steps, on as many threads.
Runs where vLLM is installed, in the environment of `make test-vllm` for example.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from drawn_images import coco, data_url, texts
from server import serve

from pdlm_hf import CHECKPOINT, PdlmConfig, PdlmForConditionalGeneration, PdlmProcessor, RegionCaptioner
from pdlm_hf.bench.decode import FEW_STEPS
from pdlm_hf.bench.model import SHAPES
from pdlm_hf.shapes.scenes import draw_scene


def random_checkpoint(folder: Path, shape: str) -> Path:
    """Random weights of this shape behind the embedded checkpoint's processor."""
    size = SHAPES[shape]
    config = PdlmConfig.from_pretrained(CHECKPOINT)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.vocab_size = size.hidden, size.mlp, size.vocab
    text.num_hidden_layers, text.num_attention_heads = size.layers, size.heads
    text.num_key_value_heads, text.head_dim = size.heads, size.hidden // size.heads
    torch.manual_seed(0)
    model = PdlmForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "language_model" in name or "lm_head" in name:
            weight.data.normal_(0, 1 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    PdlmProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


def four_regions(count: int) -> list[tuple]:
    """Large images with four boxes each."""
    pairs = []
    for k in range(count):
        rng = np.random.default_rng((9, k))
        image = draw_scene(rng).image.resize((192, 128))
        pairs.append((image, [[int(rng.integers(0, 150)), int(rng.integers(0, 90)), 38, 34] for _ in range(4)]))
    return pairs


def percentile(values: list[float], share: float) -> float:
    """Value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(latencies: list[float], seconds: float) -> dict:
    """Numbers of one run."""
    return {
        "images_per_second": round(len(latencies) / seconds, 3),
        "latency_s": {name: round(percentile(latencies, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99))},
    }


def main(
    shape: Annotated[str, typer.Option(help="tiny or small.")] = "small",
    concurrency: Annotated[str, typer.Option(help="Images in flight, comma separated.")] = "1,4,16",
    images: Annotated[int, typer.Option(help="Images a run.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of everything, in turn.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time both, in turn."""
    torch.set_num_threads(1)
    settings = {"max_denoising_steps": FEW_STEPS, "prefix_refresh_interval": 0}
    pairs = four_regions(images)
    bodies = [{"image": data_url(image), "regions": coco(image, regions), **settings} for image, regions in pairs]
    rows: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_checkpoint(Path(temporary) / "checkpoint", shape)
        captioner = RegionCaptioner.from_pretrained(folder, device="cpu")
        captioner.model.generation_config.acceptance_threshold = None
        expected = [texts(captions) for captions in captioner.caption_many(pairs[:4], **settings)]
        with serve(folder, Path(temporary) / "server.log", "--generation-config", "vllm", cores="0") as server:
            found = [[r["caption"] for r in server.captions(body)["regions"]] for body in bodies[:4]]
            same = found == expected
            for _ in range(repeats):
                for together in (int(part) for part in concurrency.split(",")):

                    def timed(body) -> float:
                        start = time.perf_counter()
                        server.captions(body)
                        return time.perf_counter() - start

                    start = time.perf_counter()
                    with ThreadPoolExecutor(together) as pool:
                        latencies = list(pool.map(timed, bodies))
                    rows.setdefault(f"vLLM, {together}", []).append(row(latencies, time.perf_counter() - start))
                    start, latencies = time.perf_counter(), []
                    # every image of a batch was asked for when its batch began
                    for first in range(0, images, together):
                        begin = time.perf_counter()
                        batch = pairs[first : first + together]
                        list(captioner.caption_many(batch, batch_size=together, **settings))
                        latencies += [time.perf_counter() - begin] * len(batch)
                    rows.setdefault(f"transformers, {together}", []).append(
                        row(latencies, time.perf_counter() - start)
                    )
    table = {}
    for name, runs in rows.items():
        table[name] = {
            "images_per_second": statistics.median(run["images_per_second"] for run in runs),
            "spread": [f(run["images_per_second"] for run in runs) for f in (min, max)],
            "p50_s": statistics.median(run["latency_s"]["p50"] for run in runs),
            "p99_s": statistics.median(run["latency_s"]["p99"] for run in runs),
        }
    for together in concurrency.split(","):
        ratio = (
            table[f"vLLM, {together}"]["images_per_second"] / table[f"transformers, {together}"]["images_per_second"]
        )
        table[f"vLLM, {together}"]["ratio_to_transformers"] = round(ratio, 3)
    record = {
        "what": f"{images} images of 4 regions, 32 slots, {FEW_STEPS} steps, prompt kept; {repeats} runs in turn",
        "shape": shape,
        "hardware": f"{platform.machine()} CPU; vLLM's worker and transformers on one core each, in turn; vLLM's "
        "engine process on another",
        "torch": torch.__version__,
        "same_captions": same,
        "rows": table,
    }
    print(json.dumps(record, indent=1))
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
