"""The errors this project raises: one base class, and one child for each kind of cause."""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any


class PdlmError(ValueError):
    """The caller can correct the cause: the message says what was wrong, what came and what to do."""


class ImageError(PdlmError):
    """An image cannot be opened, or has a form that the model cannot read."""


class RegionError(PdlmError):
    """A region or a file of regions cannot be read, or does not fit its image."""


class NoRegionsError(RegionError):
    """A file of regions is sound and holds none for the image."""


class DataError(PdlmError):
    """A file of annotations, rows or results cannot be read, or has other contents than expected."""


class SettingError(PdlmError):
    """A setting, an option or a combination of them is not possible."""


class CheckpointError(PdlmError):
    """There is no such checkpoint, it is damaged, or it is of another kind."""


@contextmanager
def reading(checkpoint: Any, file: str) -> Iterator[None]:
    """Read a file of a checkpoint: whatever a damaged one makes a library raise becomes one line with its name.

    Args:
        checkpoint: folder or hub id, for messages.
        file (`str`): the file, or the files of which one must be damaged.

    Raises:
        CheckpointError: the file is damaged.
        OSError: the file is missing, or the hub cannot be reached.
    """
    try:
        yield
    except CheckpointError as error:
        if str(checkpoint) in str(error):
            raise
        raise CheckpointError(f"{checkpoint}: {error}") from None
    except (OSError, ImportError, MemoryError) as error:
        if not isinstance(error.__context__, (JSONDecodeError, UnicodeDecodeError)):
            raise
        raise CheckpointError(f"{checkpoint}: {file}: is not valid JSON ({error.__context__}).") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{checkpoint}: {file}: cannot be loaded, it may be damaged ({reason:.300}).") from error


class ServerError(PdlmError):
    """A server cannot be reached, refuses the request, or fails again and again."""


class RefusedError(ServerError):
    """A server refuses everything it is asked: key, model, address or settings must be others."""


class MissingPackageError(PdlmError, ImportError):
    """An optional package is not installed.

    Args:
        what (`str`): the missing package or feature, with which the message begins.
        extra (`str`): the extra of this project that installs it.
    """

    def __init__(self, what: str, extra: str):
        super().__init__(
            f'{what[0].upper()}{what[1:]} is needed: pip install "perceptiondlm[{extra}]", or ".[{extra}]" in a clone.'
        )
