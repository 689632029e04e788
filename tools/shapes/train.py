r"""Train the tiny region checkpoint on synthetic scenes.

    train="python -m tools.shapes.train --threads 2"
    $train --out runs/vision --lesson vision --steps 4000 --batch-size 64 --learning-rate 3e-3
    $train --out runs/images --lesson images --init runs/vision --steps 2500
    $train --out runs/words --lesson words --init runs/images --steps 800 --batch-size 64 --freeze-vision
    $train --out runs/full --init runs/words --steps 1500 --freeze-vision
    $train --out runs/linear --lesson images --linear-head --init runs/full --steps 700
    $train --out runs/linear2 --lesson images --linear-head --init runs/linear --steps 1200 --learning-rate 2e-3
    $train --out runs/full2 --init runs/linear2 --steps 700 --freeze-vision
    isolated="--prefix-attention isolated --freeze-vision"
    $train --out runs/isolated --init runs/full2 $isolated --steps 900 --learning-rate 7e-4
    $train --out runs/isolated2 --init runs/isolated $isolated --steps 900 --learning-rate 7e-4 --seed 1
    $train --out runs/isolated3 --init runs/isolated2 $isolated --steps 700 --learning-rate 6e-4 --seed 2
    $train --out runs/isolated4 --init runs/isolated3 $isolated --steps 700 --learning-rate 6e-4 --seed 3
    $train --out runs/careful --init runs/isolated4 $isolated --steps 2400 --learning-rate 6e-4 --seed 5
    $train --out runs/commit --init runs/careful $isolated --lesson commit --steps 700 --learning-rate 6e-4 --seed 21

Then, to fill the places of templates in one pass; the second line on a GPU, in two minutes:

    templates="--lesson templates --prefix-attention isolated"
    $train --out runs/templates --init runs/commit $templates --steps 500 --learning-rate 6e-4 --seed 31
    $train --out runs/templates2 --init runs/templates $templates --steps 2600 --batch-size 64 --seed 51 \
        --workers 15 --seconds 115

Then, to see better, templates and, from the same images, their attributes. The average with what it began with is
better than either:

    $train --out runs/joint --init runs/templates2 --lesson joint --prefix-attention isolated --steps 20000 \
        --learning-rate 8e-4 --seed 63 --threads 1 --seconds 4200
    python -m tools.shapes.average runs/joint --start runs/templates2 --share 0.7 --out runs/averaged

With the same `--out` a stopped training is resumed from the last saved step. Images are drawn during training, none
twice in a run; runs of the same lesson with the same seed draw the same images.
"""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from pdlm_hf.modeling_pdlm import PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.dataset import CommitDataset, JointDataset, ShapesDataset, TemplateDataset
from pdlm_hf.training.collator import PdlmCollator
from pdlm_hf.training.trainer import Clock, InOrderTrainer

from .model import build_model, build_processor
from .vision import AttributeCollator, JointCollator, JointModel, RegionClassifier

SLOTS, EASY_SLOTS = (20, 32), (5, 9)  # caption lengths to train for
GROUP = 32  # images of the same number of regions and kind of text in the joint lesson: a batch mixes a few


class TimedTrainer(InOrderTrainer):
    """An [`InOrderTrainer`] whose learning rate falls as a cosine of the steps, as usual, or of the time if that runs
    out first, so that it is zero at the end in either case.

    Args:
        clock (`Clock`): with or without a limit; must be one of the callbacks as well.
        *args, **kwargs: of the trainer.
    """

    def __init__(self, *args, clock: Clock, **kwargs):
        super().__init__(*args, **kwargs)
        self.clock = clock

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule, once."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                share = max(0, step - warmup) / max(1, num_training_steps - warmup)
                if self.clock.limit is not None:
                    share = max(share, self.clock.elapsed / self.clock.limit)
                return min(1.0, step / max(1, warmup)) * (1 + math.cos(math.pi * min(1.0, share))) / 2

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def arguments(
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    workers: int = 1,
    device: str | None = None,
) -> TrainingArguments:
    """Make the arguments that training and ablations share.

    Args:
        out (`Path`): folder of the run.
        steps, batch_size, learning_rate, seed: of the training.
        workers (`int`): processes that draw images; what they draw does not depend on their number.
        device (`str`, *optional*): "cpu" or "cuda"; default: cuda if there is one.
    """
    return TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(150, steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=250,
        save_total_limit=2,
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        use_cpu=device == "cpu" or not torch.cuda.is_available(),
    )


def save(model: PdlmForConditionalGeneration, processor: PdlmProcessor, out: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint folder and its training record, without the code, which is in the package."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for code in out.glob("*_pdlm.py"):
        code.unlink()
    for name in ("config.json", "processor_config.json"):
        settings = json.loads((out / name).read_text())
        for part in (settings, settings.get("image_processor", {})):
            part.pop("auto_map", None)
        (out / name).write_text(json.dumps(settings, indent=1) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def run(
    trainer: Trainer,
    model,
    processor,
    out: Path,
    init: Path | None,
    command: str,
    seed: int,
    clock: Clock | None = None,
) -> None:
    """Train from the last saved step on, and save the checkpoint with a record of its training.

    Args:
        trainer (`Trainer`), model, processor: the trainer and its parts.
        out, init (`Path`): the folder to write, and the checkpoint to start from.
        command, seed: values of the record.
        clock (`Clock`, *optional*): that of the trainer, if it has one.
    """
    trainer.add_callback(clock or Clock())
    last = get_last_checkpoint(out / "trainer") if (out / "trainer").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    steps = trainer.state.global_step
    record = record_of(model, command, init, steps, seed, trainer.state.log_history[-1].get("elapsed"))
    record["final_loss"] = next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None)
    save(model, processor, out, record)


def record_of(model, command: str, init: Path | None, steps: int, seed: int, seconds: float | None) -> dict[str, Any]:
    """Make the record of a checkpoint's training, including that of the checkpoint it started from."""
    on_gpu = model.device.type == "cuda"
    return {
        "command": command + (f" --init {init.name}" if init else ""),
        "machine": f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores" if on_gpu else "CPU",
        "steps": steps,
        "seed": seed,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "initialised_from": json.loads((init / "training.json").read_text()) if init else None,
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; a stopped training is resumed.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    prefix_attention: Annotated[str, typer.Option(help='"full" or "isolated".')] = "full",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    lesson: Annotated[
        Literal["vision", "images", "words", "captions", "commit", "templates", "joint"],
        typer.Option(
            help="vision, images: attributes of small, then all images. words, captions: their captions. "
            "commit: one wording from an empty canvas. templates: that, and templates with places for attributes. "
            "joint: templates and the attributes of their images."
        ),
    ] = "captions",
    linear_head: Annotated[
        bool, typer.Option("--linear-head", help="vision, images: classify attributes by one linear layer.")
    ] = False,
    freeze_vision: Annotated[
        bool, typer.Option("--freeze-vision", help="Do not train the vision tower and the region prompts.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, images and noise.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw images.", min=0)] = 1,
    seconds: Annotated[
        float | None, typer.Option(help="End after these seconds, if the steps take longer; the rate is zero then.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Where to train; default: cuda if there is one.")
    ] = None,
) -> None:
    """Train, or resume training, and save."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here.", param_hint="--device")
    torch.set_num_threads(threads)
    set_seed(seed)
    if init is None:
        processor = build_processor()
        model = build_model(processor, prefix_attention)
    else:
        processor = PdlmProcessor.from_pretrained(init)
        model = PdlmForConditionalGeneration.from_pretrained(init)
        model.config.prefix_attention = prefix_attention
    if freeze_vision:
        for part in (model.model.vision_tower, model.model.region_embedding):
            part.requires_grad_(False)
    easy = lesson in ("vision", "words")
    seeing = lesson in ("vision", "images")
    noise = {"num_slots": EASY_SLOTS if easy else SLOTS, "noise_floor": 0.1, "prompt_ids": "ordered"}
    collator: Any = AttributeCollator(processor) if seeing else PdlmCollator(processor, **noise)
    learner: Any = RegionClassifier(model, linear_head) if seeing else model
    length = steps * batch_size
    if lesson == "templates":
        scenes = TemplateDataset(processor.tokenizer, model.config.mask_token_id, seed, length, batch_size)
    elif lesson == "joint":
        scenes = JointDataset(processor.tokenizer, model.config.mask_token_id, seed, length, GROUP)
        collator, learner = JointCollator(processor, **noise), JointModel(model)
    else:
        dataset = CommitDataset if lesson == "commit" else ShapesDataset
        scenes = dataset(seed, length, batch_size, easy)
    clock = Clock(seconds)
    trainer = TimedTrainer(
        clock=clock,
        model=learner,
        args=arguments(out, steps, batch_size, learning_rate, seed, workers, device),
        train_dataset=scenes,
        data_collator=collator,
    )
    command = (
        f"python -m tools.shapes.train --steps {steps} --batch-size {batch_size} --learning-rate {learning_rate} "
        f"--prefix-attention {prefix_attention} --seed {seed} --threads {threads} --lesson {lesson}"
        + (" --linear-head" if linear_head else "")
        + (" --freeze-vision" if freeze_vision else "")
        + (f" --seconds {seconds:g}" if seconds else "")
    )
    run(trainer, model, processor, out, init, command, seed, clock)


if __name__ == "__main__":
    typer.run(main)
