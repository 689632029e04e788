"""A stage: the embedded checkpoint on this device, beside a CPU."""

import time

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.fused_pdlm import NAME
from pdlm_hf.shapes.evaluate import Tally, held_out

from .run import Run

SEED, BATCH = 5, 8
ON_CPU = 96  # images


def shapes(run: Run) -> None:
    """Captions of held-out images: how many are exact, and how many the same as in float32 and as on a CPU."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    images = sorted(held_out(SEED, run.images), key=lambda p: (len(p.masks), p.image.width * p.image.height))
    chunks = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
    inputs = [
        processor(images=[p.image for p in chunk], segmentation_maps=[p.masks for p in chunk]) for chunk in chunks
    ]
    known: dict[str, list[list[str]]] = {}
    every = max(1, len(chunks) * BATCH // ON_CPU)
    for name, device, dtype, kernels, step in (
        ("float32", run.device.type, torch.float32, False, 1),
        ("bfloat16", run.device.type, torch.bfloat16, False, 1),
        ("bfloat16, kernels, captured", run.device.type, torch.bfloat16, True, 1),
        ("float32 on a CPU", "cpu", torch.float32, False, every),
        ("float32, kernels, captured", run.device.type, torch.float32, True, 1),
    ):
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=dtype).eval().to(device)
        model.set_attn_implementation({"text_config": NAME if kernels else "sdpa"})
        start, tally, said = time.perf_counter(), Tally(), []
        for chunk, batch in zip(chunks[::step], inputs[::step], strict=True):
            output = model.generate(**batch.to(device), cuda_graphs=kernels or None)
            captions = [[c.text for c in of] for of in processor.post_process_region_captions(output)]
            for image, texts in zip(chunk, captions, strict=True):
                tally.add(image, texts)
            said.append([text for texts in captions for text in texts])
        known[name] = said
        row = {"captions": tally.captions, "exact": tally.report()["exact"]}
        row["seconds"] = round(time.perf_counter() - start, 2)
        if name != "float32":
            row["same_as_float32"] = same(said, known["float32"][::step])
        run.put(name, row)


def same(found: list[list[str]], expected: list[list[str]]) -> float:
    """Share of captions that are word for word the same."""
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    return round(sum(a == b for a, b in pairs) / len(pairs), 4)
