"""Stages about variants of the model: FlexAttention, FP8; and a training step."""

import time
from importlib.util import find_spec
from typing import Any

import torch

from pdlm_hf.bench.decode import FEW_STEPS
from pdlm_hf.versions_pdlm import CHECKPOINTING

from .passes import REGIONS, beside_whole, canvas_of, share, step, way, whole_pass
from .run import NotInstalled, Run, gigabytes

REGIONS_OF_RECIPE = 6
CAPTURABLE = ("kernels", "kernels, captured")


def flex(run: Run) -> None:
    """A canvas pass by FlexAttention; on a CPU not compiled, because torch 2.13 writes C++ that does not compile."""
    with torch.compiler.set_stance("default" if run.device.type == "cuda" else "force_eager"):
        step(run, ("flex", "kernels", "sdpa"), ((REGIONS, 1),))


def fp8(run: Run) -> None:
    """Weights of the language model's layers in FP8: on a GPU its inputs too, by row. The model stays in FP8."""
    if find_spec("torchao") is None:
        raise NotInstalled("torchao is not installed")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    bench, cuda = run.bench, run.device.type == "cuda"
    before = _drafts(run)
    reference = run.milliseconds(lambda: bench.reference(REGIONS, run.slots, run.slots), 1, 1)
    run.put("reference", {"ms": reference})
    step(run, CAPTURABLE, ((REGIONS, 1), (4, 1)), "bfloat16: ")
    _decodes(run, "bfloat16", reference)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if cuda else Float8WeightOnlyConfig()
    start = time.perf_counter()
    quantize_(bench.model.model.language_model, config)
    run.synchronise()
    row = {"seconds": round(time.perf_counter() - start, 1), "same_drafts": share(_drafts(run), before)}
    run.release()
    if cuda:
        row["weights_gb"] = gigabytes(torch.cuda.memory_allocated())
    run.put("quantising", row)
    whole = whole_pass(run)
    for name in CAPTURABLE:
        with way(run, name) as how:
            run.attempt(f"FP8 beside torchao's layers, {name}", lambda how=how: beside_whole(run, how, whole))
    step(run, CAPTURABLE, ((REGIONS, 1), (4, 1), (REGIONS, 8)), "FP8: ")
    _decodes(run, "FP8", reference)


def _decodes(run: Run, weights: str, reference: float) -> None:
    """Decodes of one image as `generate` chooses, beside the reference's loop with weights in bfloat16."""
    for loop, steps, interval in (("exact", run.slots, 1), *(("cached", n, 0) for n in (run.slots, *FEW_STEPS))):
        name = f"{weights}, {loop}, {steps} steps"
        ms = run.milliseconds(lambda n=steps, i=interval: run.bench.ours(REGIONS, 1, run.slots, n, i), 3, 1)
        run.put(name, {"ms": ms, "ratio_to_reference": round(reference / ms, 2)})


def _drafts(run: Run) -> torch.Tensor:
    task, canvas, view = canvas_of(run, REGIONS, 1, (False, False))
    return task.score(canvas.forward(view, True), [0], view.counts)[0]


def lora(run: Run) -> None:
    """Steps of the recipe's model on its largest row: adapter, checkpointing, bfloat16, AdamW."""
    if missing := [name for name in ("peft", "pydantic", "yaml") if find_spec(name) is None]:
        raise NotInstalled(f"{', '.join(missing)} is not installed")
    from pdlm_peft.adapters import add_adapter
    from pdlm_peft.memory import estimate
    from pdlm_peft.recipe import load_recipe

    network = run.bench.model
    model = add_adapter(network, None, load_recipe("lora_8b_80gb").adapter).train()
    getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}})
    model.enable_input_require_grads()
    config = run.shape.config(REGIONS_OF_RECIPE)
    try:
        for batch in (1, 4):
            recipe = load_recipe("lora_8b_80gb", [f"training.per_device_train_batch_size={batch}"])
            run.attempt(f"batch {batch}", lambda b=batch: _training_step(run, model, _training_batch(run, config, b)))
            found = estimate(recipe, config)
            parts = {name: gigabytes(count) for name, count in found.memory.items()}
            run.put(f"batch {batch}, estimate", {"total_gb": gigabytes(found.total)} | parts)
    finally:
        model.disable_input_require_grads()
        getattr(model, f"{CHECKPOINTING}_disable")()
        model.unload().eval()


def _training_batch(run: Run, config, rows: int) -> dict[str, torch.Tensor]:
    """The longest row there can be, `rows` times."""
    from pdlm_peft.memory import largest_row

    slots, regions, device = 48, config.num_region_prompts, run.device
    tiles = largest_row(config, slots).tiles
    ids = [1] * 40 + [config.image_token_id] * (tiles * config.feature_grid**2)
    for k in range(regions):
        ids += [config.region_token_ids[k]] * config.num_roi_tokens + [config.newline_token_id] * (k < regions - 1)
    ids += [2] * 4
    start = len(ids)
    for k in range(regions):
        ids += [config.caption_token_ids[k]] + [3] * slots + [config.newline_token_id]
    input_ids = torch.tensor([ids] * rows, device=device)
    labels = torch.full_like(input_ids, -100)
    for k in range(regions):
        caption = slice(start + k * (slots + 2) + 1, start + k * (slots + 2) + 1 + slots)
        labels[:, caption] = input_ids[:, caption]
    size, side = config.vision_config.image_size, config.patch_grid
    box = [0, 0, size, size]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "noise_mask": labels != -100,
        "mask_probability": torch.ones(rows, device=device),
        "pixel_values": torch.randn(rows * tiles, 3, size, size, device=device),
        "image_grids": torch.tensor([[tiles - 1, 1]] * rows, device=device),
        "region_masks": torch.zeros(rows * tiles, regions, side, side, dtype=torch.uint8, device=device),
        "region_boxes": torch.tensor([[box] * regions] * rows, device=device),
        "original_sizes": torch.tensor([[size, (tiles - 1) * size]] * rows, device=device),
    }


def _training_step(run: Run, model, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.synchronise()
        seconds.append(round(time.perf_counter() - start, 3))
    tokens = batch["input_ids"].numel()
    return {"peak_gb": run.peak_gb(), "seconds": seconds, "tokens": tokens, "loss": loss.item()}
