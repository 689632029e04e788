"""Captions of held-out images during training, as drawings, as JSONL, and in TensorBoard and wandb."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from pdlm_hf import RegionCaptioner
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.render.drawing import draw_captions

logger = logging.getLogger(__name__)


class CaptionSamples(TrainerCallback):
    """Captions the same images every `every` steps and after the last one.

    Writes `step_000300/0.png` and so on, with `captions.jsonl` beside them (one row per region, with the model's
    caption and the expected one), and adds the drawings to TensorBoard and wandb if the run reports there.

    Args:
        trainer (`Trainer`), processor (`PdlmProcessor`)
        rows (`list[dict]`): held-out images with captioned regions.
        every (`int`): number of steps.
        folder (`Path`): folder for the drawings.
    """

    def __init__(self, trainer: Trainer, processor, rows: list[dict[str, Any]], every: int, folder: Path):
        self.trainer, self.processor, self.every, self.folder = trainer, processor, every, folder
        limit = processor.image_processor.num_region_prompts
        self.rows = [row | {"regions": row["regions"][:limit]} for row in rows]

    def on_step_end(self, args, state, control, **kwargs):
        """Write captions if this step is due."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        if not state.is_world_process_zero:
            return
        try:
            # trained weights are float32 and frozen ones bf16: as in training, autocast converts the activations
            with torch.inference_mode(), self.trainer.accelerator.autocast():
                self.write(state.global_step)
        except Exception as error:  # a drawing is not worth ending the run
            logger.warning("No samples at step %d (%s: %s).", state.global_step, type(error).__name__, error)

    def write(self, step: int) -> None:
        """Caption all images and write captions and drawings."""
        captioner = RegionCaptioner(self.trainer.model, self.processor)
        folder = self.folder / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        lines, drawings = [], []
        for index, row in enumerate(self.rows):
            masks = [np.asarray(region["mask"]) for region in row["regions"]]
            captions = captioner.caption(row["image"], masks, question=row.get("question"))
            for k, (region, caption) in enumerate(zip(row["regions"], captions, strict=True)):
                place = {"image": index, "region": region.get("id", k)}
                lines.append(place | {"caption": caption.text, "expected": region["caption"], "score": caption.score})
            regions = parse_regions(masks, *row["image"].size)
            drawings.append(draw_captions(row["image"], regions, captions))
        (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for index, drawing in enumerate(drawings):
            drawing.save(folder / f"{index}.png")
        self._report(drawings, step)

    def _report(self, drawings: list, step: int) -> None:
        """Send the drawings to the reporters that take images."""
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                for index, drawing in enumerate(drawings):
                    callback.tb_writer.add_image(f"captions/{index}", np.asarray(drawing), step, dataformats="HWC")
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None and getattr(wandb, "run", None) is not None:
                wandb.log({"captions": [wandb.Image(drawing) for drawing in drawings]})
