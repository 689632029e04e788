"""Recipes in miniature: the same YAML, a tiny model, a few steps on a CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from pdlm_hf.shapes.scenes import describe, draw_scene
from pdlm_peft.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SMALL = [
    "dtype=float32",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.eval_strategy=no",
    "training.dataloader_num_workers=0",
    "training.report_to=none",
    "training.use_cpu=true",
    "training.disable_tqdm=true",
    "samples.every=0",
    "data.held_out_limit=2",
]


def small(name, output, *more):
    return load_recipe(name, [*SMALL, f"output={output}", *more])


def region_rows(count=6):
    rows = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        image = draw_scene(rng)
        pairs = enumerate(zip(image.masks, image.figures, strict=True))
        regions = [{"id": k, "mask": mask, "caption": describe(figure, rng)} for k, (mask, figure) in pairs]
        rows.append({"image": image.image, "regions": regions})
    return rows


def chat_rows(count=4):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A drawing."},
    ]
    return [{"images": [row["image"]], "messages": messages} for row in region_rows(count)]


def losses(log, key="loss"):
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs
    )
