"""Stages about single passes: attention, a canvas pass and what it is made of, growth with sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F

from pdlm_hf.bench.model import bound
from pdlm_hf.canvas_pdlm import CanvasView, RegionCanvas
from pdlm_hf.denoising_pdlm import GenerationTask
from pdlm_hf.fused_pdlm import NAME, CanvasCache
from pdlm_hf.generation_config_pdlm import PdlmGenerationConfig
from pdlm_hf.graphs_pdlm import WIDTH_MULTIPLE
from pdlm_hf.image_processing_pdlm import PdlmImageProcessorPil
from pdlm_hf.kernels_pdlm import region_attention
from pdlm_hf.masking_pdlm import region_attention as region_mask

from .run import Run

REGIONS = 3
TURNS = 8  # layers whose keys and values are read in turn; at one image each has 35 MB
# How a canvas pass is computed: attention of the language model, and whether it is captured.
WAYS = {
    "sdpa": ("sdpa", False),
    "kernels": (NAME, False),
    "kernels, captured": (NAME, True),
    "flex": ("flex_attention", False),
}
QUICK = ("sdpa", "kernels", "kernels, captured")  # the other one is compiled first


@contextmanager
def way(run: Run, name: str) -> Iterator[tuple[bool, bool]]:
    """Compute in one of [`WAYS`] for a while; gives whether passes are by kernels, and captured.

    Kernels are for a GPU; in a rehearsal what they fall back to is measured.
    """
    attention, graphs = WAYS[name]
    kernels = attention == NAME and run.device.type == "cuda"
    run.bench.model.set_attn_implementation({"text_config": attention})
    try:
        yield kernels, kernels and graphs
    finally:
        run.bench.model.set_attn_implementation({"text_config": "sdpa"})


def canvas_of(
    run: Run, regions: int, batch: int, how: tuple[bool, bool], slots: int | None = None
) -> tuple[GenerationTask, RegionCanvas, CanvasView]:
    """An open canvas over random prompts."""
    ids, embeds = run.bench.prompts(regions, batch)
    slots = slots or run.slots
    settings = PdlmGenerationConfig(max_new_tokens=slots)
    task = GenerationTask(run.bench.model, settings, ids, torch.ones_like(ids, dtype=torch.bool))
    canvas = RegionCanvas(task, embeds, [regions] * batch, slots)
    canvas.fused, canvas.captured = how
    return task, canvas, canvas.view(canvas.exists)


def attention(run: Run) -> None:
    """The attention of a canvas pass by its kernel, beside a dense mask: error and time. On a GPU alone."""
    for regions, batch in ((1, 1), (REGIONS, 1), (4, 1), (6, 1), (REGIONS, 8)):
        title = f"{regions} region{'s' * (regions > 1)}, batch {batch}"
        run.attempt(title, lambda n=regions, b=batch: _attention(run, n, b))


def _attention(run: Run, regions: int, batch: int) -> dict[str, float]:
    config, block = run.bench.model.config, run.slots + 2
    text = config.text_config
    ids, embeds = run.bench.prompts(regions, batch)
    codes = run.bench.model.model.region_layout(ids)
    room = WIDTH_MULTIPLE * -(-ids.shape[1] // WIDTH_MULTIPLE)
    cache = CanvasCache(text, embeds, batch, room, regions, block, config.num_roi_tokens)
    cache.show(codes, torch.ones_like(ids, dtype=torch.bool))
    layers = cache.layers[:TURNS]
    for layer in layers:
        layer.normal_()
    keys, values = layers[0]
    scale, heads = text.head_dim**-0.5, text.num_attention_heads
    queries = torch.randn(batch, cache.width, heads, text.head_dim, device=run.device, dtype=keys.dtype)
    own = 2 * torch.arange(regions, device=run.device).repeat_interleave(block) + 1
    codes = torch.cat([codes, own.expand(batch, -1)], 1)
    place = torch.arange(codes.shape[1], device=run.device)
    allowed = region_mask(codes[:1], "isolated")(0, None, place[None, ids.shape[1] :, None], place[None, None])
    mask = allowed[:, None].expand(batch, 1, -1, -1)
    seen = slice(room - ids.shape[1], None)

    def dense(dtype, keys=keys, values=values):
        states = (queries.transpose(1, 2), keys[:, :, seen], values[:, :, seen])
        return F.scaled_dot_product_attention(*(each.to(dtype) for each in states), mask, scale=scale, enable_gqa=True)

    def kernel(keys=keys, values=values):
        return region_attention(
            queries, keys, values, cache.shared, cache.starts, cache.rois, cache.num_roi_tokens, block, scale
        )

    exact = dense(torch.float32).transpose(1, 2)
    row = {"error_of_sdpa": relative(dense(keys.dtype).transpose(1, 2), exact)}
    if run.device.type != "cuda":
        return row | {"ms_sdpa": run.milliseconds(lambda: dense(keys.dtype))}
    # the keys and values of several layers in turn, as in a pass: those of one stay in the GPU's cache
    turns = {
        "ms_sdpa": lambda: [dense(keys.dtype, *layer) for layer in layers],
        "ms": lambda: [kernel(*layer) for layer in layers],
    }
    row["error"] = relative(kernel(), exact)
    return row | {name: run.milliseconds(run.captured(turn, 1)) / len(layers) for name, turn in turns.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def agreement(run: Run) -> None:
    """Drafts of a pass over the kept prompts beside those of the whole pass by sdpa. Then decodes."""
    whole = whole_pass(run)
    for name in QUICK:
        with way(run, name) as how:
            run.attempt(f"first canvas pass, {name}", lambda how=how: beside_whole(run, how, whole))
    bench, steps = run.bench, run.slots
    decodes = {}
    for name in QUICK:
        for loop, interval in (("exact", 1), ("cached", 0)):
            attention, graphs = WAYS[name]
            decodes[loop, name] = bench.ours(REGIONS, 1, run.slots, steps, interval, None, attention, graphs)
            tokens = decodes[loop, name]
            row = {"tokens_as_exact": share(tokens, decodes["exact", "sdpa"])}
            run.put(f"whole decode, {loop}, {name}", row | {"as_sdpa": share(tokens, decodes[loop, "sdpa"])})


def whole_pass(run: Run) -> torch.Tensor:
    """Hidden states of a pass over prompt and canvas by sdpa."""
    _, canvas, view = canvas_of(run, REGIONS, 1, (False, False))
    return canvas.forward(view, True)


def beside_whole(run: Run, how: tuple[bool, bool], whole: torch.Tensor) -> dict[str, float]:
    """How passes in a way differ from [`whole_pass`]."""
    task, canvas, view = canvas_of(run, REGIONS, 1, how)
    own = canvas.forward(view, True, keep=True)
    hidden = canvas.forward(view, False)
    expected, expected_odds, _ = task.score(whole, [0], view.counts)
    draft, odds, _ = task.score(hidden, [0], view.counts)
    values = {"hidden_error": relative(hidden, whole), "same_drafts": share(draft, expected)}
    values |= {"hidden_error_whole": relative(own, whole), "log_odds": (odds - expected_odds).abs().max().item()}
    return values | {"captured": float(_captured(canvas))}


def _captured(canvas: RegionCanvas) -> bool:
    return canvas.passes is not None and canvas.passes.graph is not None


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Part of the tokens that are the same."""
    return round((found == expected).float().mean().item(), 4)


def step(run: Run, names=QUICK, sizes=((REGIONS, 1), (4, 1), (REGIONS, 8)), prefix: str = "") -> None:
    """A pass over the prompts and one over the canvas."""
    for regions, batch in sizes:
        for name in names:
            with way(run, name) as how:
                title = f"{prefix}{name}, {regions} regions, batch {batch}"
                run.attempt(title, lambda r=regions, b=batch, how=how: pass_times(run, r, b, how))


def tile(run: Run) -> None:
    """A canvas of 128 rows beside one of 136: 4 regions of 30 and of 32 token positions."""
    for slots in (30, 32):
        with way(run, "kernels, captured") as how:
            run.attempt(f"4 regions, {slots} positions", lambda s=slots, how=how: pass_times(run, 4, 1, how, s))


def pass_times(run: Run, regions: int, batch: int, how: tuple[bool, bool], slots: int | None = None):
    """Times of the two kinds of pass and of scoring, and the share of the roofline of a canvas pass with scoring."""
    slots = slots or run.slots
    task, canvas, view = canvas_of(run, regions, batch, how, slots)
    canvas.forward(view, True, keep=True)
    hidden = canvas.forward(view, False).clone()
    taken = {
        "canvas_ms": run.milliseconds(lambda: canvas.forward(view, False)),
        "score_ms": run.milliseconds(lambda: task.score(hidden, [0] * batch, view.counts)),
        "prompt_ms": run.milliseconds(lambda: canvas.forward(view, True, keep=True), 3, 1),
    }
    two, one = (bound(run.bench, regions, slots, "cached", n, batch, run.limits) for n in (2, 1))
    least = 1000 * (two - one)
    together = taken["canvas_ms"] + taken["score_ms"]
    taken |= {"roofline_ms": round(least, 4), "share_of_roofline": round(least / together, 3)}
    return taken | {"captured": float(_captured(canvas)), "peak_gb": run.peak_gb()}


def phases(run: Run) -> None:
    """The parts of a decode, and what comes before it."""
    run.put(
        f"model, {REGIONS} regions", {f"{name}_ms": ms for name, ms in run.bench.phases(REGIONS, run.slots).items()}
    )
    vision = run.bench.model.config.vision_config
    processor = PdlmImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size}, patch_size=vision.patch_size
    )
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (2 * vision.image_size, 3 * vision.image_size, 3), dtype=np.uint8)
    masks = [generator.random(image.shape[:2]) < 0.5 for _ in range(REGIONS)]

    def prepare():
        return processor(images=[image], segmentation_maps=[masks], return_tensors="pt")

    inputs = prepare()
    pixels = inputs["pixel_values"]
    run.put(
        "preprocessing",
        {
            "tiles": len(pixels),
            "ms": run.milliseconds(prepare, 5, 1),
            "to_device_ms": run.milliseconds(lambda: pixels.to(run.device, run.shape.dtype)),
            "vision_ms": run.milliseconds(lambda: _vision(run, pixels), 5, 2),
        },
    )


def _vision(run: Run, pixels: torch.Tensor) -> torch.Tensor:
    return run.bench.model.model.get_image_features(pixels.to(run.device, run.shape.dtype))


def kernels(run: Run) -> None:
    """The kernels of an eager canvas pass (operations, on a CPU), the longest first."""
    from torch.profiler import ProfilerActivity, profile

    cuda = run.device.type == "cuda"
    for name in ("sdpa", "kernels"):
        with way(run, name) as how:
            _, canvas, view = canvas_of(run, REGIONS, 1, (how[0], False))
            canvas.forward(view, True, keep=True)
            canvas.forward(view, False)
            run.synchronise()
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
                canvas.forward(view, False)
                run.synchronise()
        found = sorted(
            (
                (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
                for e in seen.key_averages()
            ),
            key=lambda event: -event[2],
        )
        found = [event for event in found if event[2] > 0]
        longest = [{"name": key[:80], "count": count, "us": round(us, 1)} for key, count, us in found[:15]]
        total = {"kernels": sum(count for _, count, _ in found), "busy_us": round(sum(us for *_, us in found), 1)}
        run.put(name, total | {"longest": longest})


def scaling(run: Run) -> None:
    """Milliseconds a decode, by regions, tiles and batch, with sdpa and by kernels."""
    bench, slots = run.bench, run.slots
    tile = bench.shape.image_tokens // 7
    sizes = {f"regions {n}": (n, 1, None) for n in (1, 2, 4, 6, 8)}
    sizes |= {f"tiles {n}": (4, 1, n * tile) for n in (1, 3, 5)}
    sizes |= {f"batch {n}": (4, n, None) for n in (2, 4, 8)}
    for title, (regions, batch, tokens) in sizes.items():
        row = {}
        for name in ("sdpa", "kernels, captured"):
            run.release()

            def decode(r=regions, b=batch, t=tokens, how=WAYS[name]):
                return bench.ours(r, b, slots, slots, 0, t, *how)

            row[name] = run.milliseconds(decode, 2, 1)
        run.put(title, {f"{name} ms": ms for name, ms in row.items()} | {"peak_gb": run.peak_gb()})
