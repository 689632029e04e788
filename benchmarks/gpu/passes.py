"""Stages about single passes: attention, a canvas pass and what it is made of, growth with sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

import pdlm_hf.split_attention_pdlm as split
from pdlm_hf.bench.model import bound
from pdlm_hf.canvas_pdlm import CanvasView, RegionCanvas
from pdlm_hf.denoising_pdlm import GenerationTask
from pdlm_hf.generation_config_pdlm import PdlmGenerationConfig
from pdlm_hf.graphs_pdlm import WIDTH_MULTIPLE
from pdlm_hf.image_processing_pdlm import PdlmImageProcessorPil

from .run import Run

REGIONS = 3
# How a canvas pass is computed: attention of the language model, and whether it is captured.
WAYS = {
    "sdpa": ("sdpa", False),
    "split": (split.NAME, False),
    "split, captured": (split.NAME, True),
    "split by products": (split.NAME, False),
    "flex": ("flex_attention", False),
}
QUICK = ("sdpa", "split", "split, captured", "split by products")  # the other one is compiled first


@contextmanager
def way(run: Run, name: str) -> Iterator[bool]:
    """Compute in one of [`WAYS`] for a while; gives whether passes are captured."""
    attention, graphs = WAYS[name]
    chosen = split.attention_kind
    run.bench.model.set_attn_implementation({"text_config": attention})
    if name == "split by products":
        split.attention_kind = _products
    try:
        yield graphs
    finally:
        split.attention_kind = chosen
        run.bench.model.set_attn_implementation({"text_config": "sdpa"})


def canvas_of(run: Run, regions: int, batch: int, graphs: bool) -> tuple[GenerationTask, RegionCanvas, CanvasView]:
    """An open canvas over random prompts."""
    ids, embeds = run.bench.prompts(regions, batch)
    settings = PdlmGenerationConfig(max_new_tokens=run.slots)
    task = GenerationTask(run.bench.model, settings, ids, torch.ones_like(ids, dtype=torch.bool))
    canvas = RegionCanvas(task, embeds, [regions] * batch, run.slots)
    if graphs:
        canvas.graphs = run.bench.model.canvas_graphs()
    return task, canvas, canvas.view(canvas.exists)


def attention(run: Run) -> None:
    """The two attentions of a canvas pass by the kernel that is chosen here, beside float32 products.

    Where the kernel fails, the stages that follow do with products.
    """
    try:
        _attention(run)
    except RuntimeError:
        split.attention_kind = _products
        raise


def _products(*of) -> str:
    return "products"


def _attention(run: Run) -> None:
    shape = run.shape
    block = run.slots + 2
    shared = shape.image_tokens + shape.text_tokens
    room = WIDTH_MULTIPLE * -(-shared // WIDTH_MULTIPLE)
    size = shape.hidden // shape.heads
    kind = split.attention_kind(run.device.type, shape.dtype, size)
    generator = torch.Generator(run.device).manual_seed(0)
    for n, queries, keys, counted in (
        (1, REGIONS * block, room, shared),
        (8, REGIONS * block, room, shared),
        (REGIONS, block, shape.roi_tokens + block, shape.roi_tokens + block),
        (8 * REGIONS, block, shape.roi_tokens + block, shape.roi_tokens + block),
    ):
        query, key, value = (
            torch.randn(n, rows, shape.heads, size, generator=generator, device=run.device, dtype=shape.dtype)
            for rows in (queries, keys, keys)
        )
        lengths = torch.full((n,), counted, dtype=torch.int32, device=run.device)

        def work(how, query=query, key=key, value=value, lengths=lengths):
            return split.attend(query, key, value, lengths, size**-0.5, how)

        (out, lse), (expected, expected_lse) = work(kind), work("products")
        exact, _ = split.attend(*(states.float() for states in (query, key, value)), lengths, size**-0.5, "products")
        run.put(
            f"{n} x {queries} queries, {counted} of {keys} keys",
            {
                "kind": kind,
                "error": relative(out, exact),
                "error_of_products": relative(expected, exact),
                "lse_error": (lse - expected_lse).abs().max().item(),
                "ms": run.milliseconds(lambda work=work: work(kind)),
                "ms_products": run.milliseconds(lambda work=work: work("products"), 5, 1),
            },
        )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def agreement(run: Run) -> None:
    """Drafts of a pass over the kept prompts beside those of the whole pass: the same computation. Then decodes."""
    for name in QUICK:
        with way(run, name) as graphs:
            run.attempt(f"first canvas pass, {name}", lambda graphs=graphs: _beside_whole(run, graphs))
    bench, steps = run.bench, run.slots
    exact = bench.ours(REGIONS, 1, run.slots, steps, 1)
    cached = bench.ours(REGIONS, 1, run.slots, steps, 0)
    run.put("whole decode, sdpa", {"tokens_as_exact": share(cached, exact)})
    for name in ("split", "split, captured"):
        tokens = bench.ours(REGIONS, 1, run.slots, steps, 0, None, *WAYS[name])
        run.put(f"whole decode, {name}", {"tokens_as_exact": share(tokens, exact), "as_sdpa": share(tokens, cached)})


def _beside_whole(run: Run, graphs: bool) -> dict[str, float]:
    task, canvas, view = canvas_of(run, REGIONS, 1, graphs)
    whole = canvas.forward(view, True, keep=True)
    expected, expected_odds, _ = task.score(whole, [0], view.counts)
    hidden = canvas.forward(view, False)
    draft, odds, _ = task.score(hidden, [0], view.counts)
    values = {"hidden_error": relative(hidden, whole), "same_drafts": share(draft, expected)}
    return values | {"log_odds": (odds - expected_odds).abs().max().item(), "captured": float(_captured(canvas))}


def _captured(canvas: RegionCanvas) -> bool:
    return canvas.graph is not None and canvas.graph.graph is not None


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Part of the tokens that are the same."""
    return round((found == expected).float().mean().item(), 4)


def step(run: Run, names=QUICK, sizes=((REGIONS, 1), (REGIONS, 8)), prefix: str = "") -> None:
    """A pass over the prompts and one over the canvas."""
    for regions, batch in sizes:
        for name in names:
            with way(run, name) as graphs:
                title = f"{prefix}{name}, {regions} regions, batch {batch}"
                run.attempt(title, lambda r=regions, b=batch, g=graphs: pass_times(run, r, b, g))


def pass_times(run: Run, regions: int, batch: int, graphs: bool) -> dict[str, float]:
    """Times of the two kinds of pass and of scoring, and the share of the roofline of a canvas pass with scoring."""
    task, canvas, view = canvas_of(run, regions, batch, graphs)
    canvas.forward(view, True, keep=True)
    hidden = canvas.forward(view, False).clone()
    taken = {
        "canvas_ms": run.milliseconds(lambda: canvas.forward(view, False)),
        "score_ms": run.milliseconds(lambda: task.score(hidden, [0] * batch, view.counts)),
        "prompt_ms": run.milliseconds(lambda: canvas.forward(view, True, keep=True), 3, 1),
    }
    two, one = (bound(run.bench, regions, run.slots, "cached", n, batch, run.limits) for n in (2, 1))
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
    for name in ("sdpa", "split"):
        with way(run, name):
            _, canvas, view = canvas_of(run, REGIONS, 1, False)
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
    """Milliseconds a decode, by regions, tiles and batch, eager with sdpa and captured."""
    bench, slots = run.bench, run.slots
    tile = bench.shape.image_tokens // 7
    sizes = {f"regions {n}": (n, 1, None) for n in (1, 2, 4, 6, 8)}
    sizes |= {f"tiles {n}": (4, 1, n * tile) for n in (1, 3, 5)}
    sizes |= {f"batch {n}": (4, n, None) for n in (2, 4, 8)}
    for title, (regions, batch, tokens) in sizes.items():
        row = {}
        for name in ("sdpa", "split, captured"):
            run.release()

            def decode(r=regions, b=batch, t=tokens, how=WAYS[name]):
                return bench.ours(r, b, slots, slots, 0, t, *how)

            row[name] = run.milliseconds(decode, 2, 1)
        run.put(title, {f"{name} ms": ms for name, ms in row.items()} | {"peak_gb": run.peak_gb()})
