"""The errors this project raises: one base class, and one child for each kind of cause."""


class PdlmError(ValueError):
    """The caller can correct the cause: the message says what was wrong, what came and what to do."""


class ImageError(PdlmError):
    """An image cannot be opened, or has a form that the model cannot read."""


class RegionError(PdlmError):
    """A region or a file of regions cannot be read, or does not fit its image."""


class DataError(PdlmError):
    """A file of annotations, rows or results cannot be read, or has other contents than expected."""


class SettingError(PdlmError):
    """A setting, an option or a combination of them is not possible."""


class CheckpointError(PdlmError):
    """There is no such checkpoint, it is damaged, or it is of another kind."""


class ServerError(PdlmError):
    """A server cannot be reached, refuses the request, or fails again and again."""


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
