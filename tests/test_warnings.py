"""No command, snippet or training step of ours warns of something that a coming version takes away.

Each runs in a process of its own in which such warnings are errors: those of our modules, and those that others raise
about our calls.
"""

import os
import subprocess
import sys
from pathlib import Path

import pdlm_hf

CLONE = Path(__file__).resolve().parent.parent
STRICT = [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
LOAD = """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({0!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({0!r}, trust_remote_code=True)
print(type(model).__module__.startswith("transformers_modules"), type(processor).__name__)
"""
COMMANDS = """
import runpy, sys
from pdlm_hf.cli.main import app
app(["caption", "examples/shapes.png", "--mask", "examples/shapes_mask_0.png"], standalone_mode=False)
app(["chat", "examples/two_shapes.png", "What colour is the circle?"], standalone_mode=False)
app(["export", sys.argv[1], sys.argv[2]], standalone_mode=False)
runpy.run_path("examples/caption_regions.py", run_name="__main__")
"""
SMALL = "max_steps=2 save_steps=2 logging_steps=1 eval_strategy=no activation_checkpointing=true"


def run(*command: str, folder: Path = CLONE, path: str | None = None) -> str:
    """Output of a command in which deprecations are errors."""
    environment = dict(os.environ, PYTHONPATH=str(CLONE) if path is None else path, HF_HUB_OFFLINE="1")
    done = subprocess.run([*STRICT, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr.lower(), done.stderr
    return done.stdout


def test_commands_the_snippet_of_the_readme_and_exported_code(tmp_path):
    """The code that travels with the exported checkpoint loads without the package."""
    out = run("-c", COMMANDS, str(pdlm_hf.CHECKPOINT), str(tmp_path / "exported"))
    assert "One spotted cross, big and blue." in out and "\nYellow.\n" in out
    assert "6 captions, forward passes: 2" in out
    assert run("-c", LOAD.format(str(tmp_path / "exported")), folder=tmp_path, path="") == "True PdlmProcessor\n"


def test_training_step(tmp_path):
    """With activation checkpointing, which got another name, and an adapter that is saved."""
    settings = [
        "samples.images=0",
        "training.per_device_train_batch_size=1",
        *(f"training.{setting}" for setting in SMALL.split()),
    ]
    out = run("-m", "pdlm_peft.cli", "train", "shapes", f"output={tmp_path / 'run'}", *settings)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file(), out
