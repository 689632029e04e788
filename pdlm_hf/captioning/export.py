"""A self-contained checkpoint folder: weights, tokenizer and the code that runs them."""

from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors_pdlm import SettingError
from .checkpoints import checkpoint_name


def export_checkpoint(model: str | Path, out: Path) -> list[str]:
    """Write a checkpoint in this package's format, with its code, for users who do not have the package.

    They load it with `AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)`. Reference checkpoints
    are converted on the way: only the weights that are used are kept.

    Args:
        model (`str` or `Path`): folder or hub id, ours or the reference's.
        out (`Path`): folder to write; must not exist or be empty.

    Raises:
        SettingError: the folder holds something already, or there is no such checkpoint.

    Returns:
        `list[str]`: names of the files written.
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
