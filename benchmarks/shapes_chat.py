"""What block length, steps and autoregressive order do to the answers of the embedded base checkpoint.

    python benchmarks/shapes_chat.py --questions 200 --json benchmarks/results/shapes_chat.json

Questions of each kind with room for an answer of several tokens, 16 at a time. Steps are forward passes of a batch.
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from pdlm_hf.captioning.checkpoints import BASE_CHECKPOINT
from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.evaluate_base import evaluate
from pdlm_hf.shapes.questions import SLOTS

KINDS = ("open", "reasoning", "describe")


def settings(slots: int) -> dict[str, dict[str, int]]:
    """Name -> settings of `generate` for an answer of so many slots."""
    shares = {"one block": 1, "one block, half the steps": 2, "one block, a quarter of the steps": 4}
    table = {name: {"block_length": slots, "max_denoising_steps": slots // part} for name, part in shares.items()}
    table["one block, one step"] = {"block_length": slots, "max_denoising_steps": 1}
    for length in (8, 4):
        table[f"blocks of {length}"] = {"block_length": length, "max_denoising_steps": slots}
        table[f"blocks of {length}, 2 steps each"] = {
            "block_length": length,
            "max_denoising_steps": 2 * slots // length,
        }
    table["autoregressive order"] = {"block_length": 1, "max_denoising_steps": slots}
    return table


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = BASE_CHECKPOINT,
    questions: Annotated[int, typer.Option(help="Held-out questions of each kind.")] = 200,
    seed: Annotated[int, typer.Option(help="Which questions.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Score the checkpoint with every setting."""
    torch.set_num_threads(threads)
    network = PdlmBaseForConditionalGeneration.from_pretrained(model).eval()
    processor = PdlmProcessor.from_pretrained(model)
    rows: dict[str, dict[str, dict]] = {}
    for kind in KINDS:
        for name, generation in settings(SLOTS[kind]).items():
            with torch.inference_mode():
                report = evaluate(network, processor, seed, questions, kinds=[kind], **generation)
            row = {"right": report["right"], "forwards": report["num_forwards"][kind], "seconds": report["seconds"]}
            rows.setdefault(name, {})[kind] = row | generation
            print(
                f"{kind:10} {name:32} right {row['right']:.3f}  {row['forwards']:5.1f} passes {row['seconds']:6.1f} s"
            )
    if json_file:
        record = {
            "what": f"{questions} held-out questions of each kind, seed {seed}, 16 at a time",
            "machine": f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}",
            "settings": rows,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
