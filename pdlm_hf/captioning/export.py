"""Export a self-contained checkpoint folder: weights, tokenizer and the code of the model."""

from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors_pdlm import SettingError
from .checkpoints import checkpoint_name


def export_checkpoint(model: str | Path, out: Path) -> list[str]:
    """Write a checkpoint in this package's format, with its code, for users without this package.

    They load it with `AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)`. A checkpoint of the
    reference is converted; weights that the model does not use are left out.

    Args:
        model (`str` or `Path`): folder or hub id of a checkpoint, ours or the reference's.
        out (`Path`): folder to write; must not exist, or be empty.

    Returns:
        `list[str]`: names of the files written.

    Raises:
        CheckpointError: the checkpoint does not exist.
        SettingError: the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise SettingError(
            f"{out} is not empty. Choose a new folder, so that no file of another checkpoint stays in it."
        )
    name = checkpoint_name(model)
    network = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    processor = AutoProcessor.from_pretrained(name)
    network.save_pretrained(out)
    processor.save_pretrained(out)
    return sorted(path.name for path in out.iterdir() if path.is_file())
