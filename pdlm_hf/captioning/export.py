"""Export a self-contained checkpoint folder: weights, tokenizer and the code of the model."""

import os
from pathlib import Path

from ..adapters_pdlm import BASE_FILE
from ..errors_pdlm import SettingError
from .loading import load_checkpoint


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
        CheckpointError: the checkpoint does not exist, or is damaged.
        SettingError: the folder is not empty or cannot be written, or the checkpoint is an adapter.
    """
    if Path(model, BASE_FILE).is_file():
        raise SettingError(f"{model}: is an adapter; merge it first, with `pdlm-peft merge {model} OUT`.")
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise SettingError(f"{out}: no folder can be written here, since {place} is a file or is read-only.")
    if out.exists() and any(out.iterdir()):
        raise SettingError(
            f"{out} is not empty. Choose a new folder, so that no file of another checkpoint stays in it."
        )
    network, processor = load_checkpoint(model)
    network.save_pretrained(out)
    processor.save_pretrained(out)
    return sorted(path.name for path in out.iterdir() if path.is_file())
