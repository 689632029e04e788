"""The embedded checkpoints, and how a checkpoint is named."""

from pathlib import Path

from ..errors_pdlm import CheckpointError

_SHAPES = Path(__file__).parents[1] / "shapes"
CHECKPOINT = _SHAPES / "checkpoint"
BASE_CHECKPOINT = _SHAPES / "checkpoint_base"


def checkpoint_name(model: str | Path) -> str:
    """A folder or hub id for `from_pretrained`.

    Raises:
        CheckpointError: the name can only be a folder, and the folder does not exist.
    """
    name = str(model)
    as_folder = isinstance(model, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1
    if as_folder and not Path(name).is_dir():
        raise CheckpointError(
            f"{name}: there is no such folder. A checkpoint is a folder, or a hub id like owner/name."
        )
    return name
