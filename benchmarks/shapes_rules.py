"""Rules of acceptance beyond a threshold, without training: forward passes against right captions.

    python benchmarks/shapes_rules.py --careful careful --json benchmarks/results/shapes_rules.json

The rules remember the steps before, which thresholds and entropy bounds do not. None was better than those; so they
live here and not in `generate`. Forward passes are those of an image alone: regions of the embedded checkpoint and of
the careful one do not depend on each other, and an image needs as many passes as its slowest region.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # noqa: F401  registers the model
from pdlm_hf import denoising_pdlm
from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.diffusion_pdlm import accept_confident
from pdlm_hf.regions.files import write_json
from pdlm_hf.shapes.evaluate import Tally, held_out

SEEDS = (21, 22, 23)
BATCH = 20
fill_accepted = denoising_pdlm._fill_accepted


class Memory:
    """What a rule knows of the steps before, for every token position.

    Args:
        unchanged (`torch.LongTensor`): steps for which the draft has been the same.
        credit (`torch.FloatTensor`): past probabilities of the present draft, older ones decayed.
    """

    def __init__(self, draft: torch.Tensor):
        self.draft, self.unchanged = draft, torch.zeros_like(draft)
        self.credit = torch.zeros(draft.shape, device=draft.device)

    def update(self, draft: torch.Tensor) -> None:
        """Note the drafts of a step."""
        same = draft == self.draft
        self.unchanged, self.credit = torch.where(same, self.unchanged + 1, 0), torch.where(same, self.credit, 0.0)
        self.draft = draft


Rule = Callable[[Memory, torch.Tensor, torch.Tensor], torch.Tensor]  # memory, log odds and open positions -> accepted


def credit(threshold: float, weight: float, decay: float, power: float) -> Rule:
    """Credit of stable drafts, added to their log odds (CreditDecoding, arXiv 2510.06133)."""

    def accept(memory: Memory, log_odds: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        memory.credit = decay * memory.credit + log_odds.sigmoid() ** power
        return accept_confident((log_odds + weight * memory.credit.log1p()).sigmoid(), masked, threshold)

    return accept


def leave(threshold: float, steps: int) -> Rule:
    """A region whose drafts have all been the same for so many steps is complete."""

    def accept(memory: Memory, log_odds: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        stable = ((memory.unchanged >= steps) | ~masked).all(-1, keepdim=True)
        return accept_confident(log_odds.sigmoid(), masked, threshold) | (stable & masked)

    return accept


def stable(threshold: float, steps: int, low: float) -> Rule:
    """A draft that has been the same for so many steps needs a lower threshold only."""

    def accept(memory: Memory, log_odds: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        probability = log_odds.sigmoid()
        confident = accept_confident(probability, masked, threshold)
        return confident | (masked & (memory.unchanged >= steps) & (probability > low))

    return accept


RULES: dict[str, Rule | dict[str, Any]] = {
    "threshold 0.8": {"acceptance_threshold": 0.8},
    "threshold 0.7": {"acceptance_threshold": 0.7},
    "threshold 0.65": {"acceptance_threshold": 0.65},
    "entropy bound 0.5": {"acceptance_threshold": None, "entropy_bound": 0.5},
    "entropy bound 0.7": {"acceptance_threshold": None, "entropy_bound": 0.7},
    "credit, weight 0.3, threshold 0.8": credit(0.8, 0.3, 0.7, 0.5),
    "0.8, or 0.6 for an unchanged draft": stable(0.8, 1, 0.6),
    "0.8, or all of a region, unchanged twice": leave(0.8, 2),
}


def score(model, processor, batches: list[tuple], rule: Rule | dict[str, Any]) -> dict[str, float]:
    """Score a rule: mean forward passes of an image alone, and the share of right captions."""
    settings = rule if isinstance(rule, dict) else {"acceptance_threshold": 1.0}
    memory: Memory | None = None

    def fill(canvas, draft: torch.Tensor, log_odds: torch.Tensor, accepted: torch.Tensor) -> None:
        nonlocal memory
        if callable(rule) and not accepted.equal(canvas.masked):  # in the last step everything is accepted
            memory = memory or Memory(draft)
            memory.update(draft)
            accepted = rule(memory, log_odds, canvas.masked)
        fill_accepted(canvas, draft, log_odds, accepted)

    denoising_pdlm._fill_accepted = fill
    tally, forwards = Tally(), []
    for scenes, inputs in batches:
        memory = None
        output = model.generate(**inputs, **settings)
        forwards += output.region_steps.amax(-1).tolist()
        for scene, captions in zip(scenes, processor.post_process_region_captions(output), strict=True):
            tally.add(scene, [caption.text for caption in captions])
    denoising_pdlm._fill_accepted = fill_accepted
    return {"forwards": round(sum(forwards) / len(forwards), 3), "exact": tally.report()["exact"]}


def prepare(processor, images: int) -> list[tuple]:
    """Scenes and their inputs, in batches of images of similar size."""
    scenes = [scene for seed in SEEDS for scene in held_out(seed, images)]
    scenes.sort(key=lambda scene: (scene.image.width * scene.image.height, len(scene.masks)))
    parts = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    return [
        (part, processor(images=[s.image for s in part], segmentation_maps=[s.masks for s in part])) for part in parts
    ]


def main(
    careful: Annotated[Path, typer.Option(help="The checkpoint before `commit`.")],
    model: Annotated[Path, typer.Option(help="The checkpoint that commits.")] = CHECKPOINT,
    images: Annotated[int, typer.Option(help="Held-out images of every seed.")] = 40,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Score both checkpoints with every rule."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": f"{images} held-out images of each of the seeds {SEEDS}",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
    }
    for name, folder in (("careful", careful), ("commits", model)):
        network = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        batches, rows = prepare(processor, images), record.setdefault(name, {})
        for rule_name, rule in RULES.items():
            with torch.inference_mode():
                rows[rule_name] = score(network, processor, batches, rule)
            print(f"{name:10} {rule_name:40} {rows[rule_name]}", flush=True)
            if json_file:
                write_json(json_file, record)


if __name__ == "__main__":
    typer.run(main)
