"""The folders of the embedded checkpoints, and names of checkpoints."""

from pathlib import Path

from ..errors_pdlm import CheckpointError

_SHAPES = Path(__file__).parents[1] / "shapes"
CHECKPOINT = _SHAPES / "checkpoint"
BASE_CHECKPOINT = _SHAPES / "checkpoint_base"


def checkpoint_name(model: str | Path) -> str:
    """Check a folder or hub id and return it as text, for `from_pretrained`.

    Raises:
        CheckpointError: the folder does not exist, or the name is empty or a file's; names like owner/name may be hub
            ids and are not checked.
    """
    name = str(model)
    if not name:
        raise CheckpointError("The name of the checkpoint is empty, perhaps that of a variable that is not set.")
    if Path(name).is_file():
        raise CheckpointError(f"{name}: is a file. A checkpoint is a folder, or a hub id like owner/name.")
    as_folder = isinstance(model, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1
    if as_folder and not Path(name).is_dir():
        raise CheckpointError(
            f"{name}: there is no such folder. A checkpoint is a folder, or a hub id like owner/name."
        )
    return name
