"""Options that several commands of `pdlm` share, and functions that apply them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors_pdlm import CheckpointError, SettingError
from .errors import exit_on_error as _exit_on_error

exit_on_error = _exit_on_error("pdlm")

Model = Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the embedded one.")]
Server = Annotated[
    str | None, typer.Option(help="Address of a vLLM server with the region route; --model is a name that it serves.")
]
KeyEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")]
Format = Annotated[str | None, typer.Option(help="Format of the region files, if they can be read in several ways.")]
Length = Annotated[int, typer.Option("--max-new-tokens", help="Token positions per caption.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps at most.")]
Question = Annotated[str | None, typer.Option(help="Question about the regions, instead of the default one.")]
Fast = Annotated[bool, typer.Option("--fast", help="Accept certain tokens early: fewer forward passes.")]

Schema = Annotated[
    Path | None,
    typer.Option("--schema", help='JSON file of attributes to read and their choices: {"colour": ["red", ...]}.'),
]

RELEASED, RELEASED_BASE = "MSALab/PerceptionDLM", "MSALab/PerceptionDLM-Base"  # ids on the hub


def embedded_note(released: str = RELEASED) -> str:
    """The note that the embedded checkpoint knows drawn shapes only, with the name of the released checkpoint."""
    return (
        "no --model, so this is the embedded checkpoint, which knows drawn shapes only; for photographs: "
        f"--model {released}"
    )


def note_embedded(model: str | None, released: str = RELEASED, program: str = "pdlm") -> None:
    """Print [`embedded_note`] on stderr where no model is named.

    Args:
        model (`str`, *optional*): the value of `--model`.
        released (`str`): the checkpoint to name instead.
        program (`str`): name of the command.
    """
    if model is None:
        typer.echo(f"{program}: {embedded_note(released)}", err=True)


def check_positive(values: dict[str, int]) -> None:
    """Raises: SettingError if one of the options, by its name, is not positive."""
    for name, value in values.items():
        if value < 1:
            raise SettingError(f"{name} must be a positive integer, got {value}.")


def load(read: Callable, model: str | None, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint. Raises: CheckpointError, whatever a damaged or missing one made the readers raise."""
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    try:
        return read(model, *args, **kwargs)
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        name = model or "the embedded checkpoint"
        raise CheckpointError(f"{name}: the checkpoint cannot be loaded, it may be damaged ({reason[0]}).") from error
    except (OSError, HFValidationError) as error:
        if isinstance(error, HFValidationError) or "local folder" in str(error) or "connect" in str(error):
            raise CheckpointError(
                f"{model}: there is no such folder here, and no such checkpoint in the hub's cache or on the hub, or "
                "the hub cannot be reached."
            ) from error
        raise


def load_captioner(model: str | None, fast: bool = False) -> Any:
    """A captioner from a checkpoint, without transformers' own progress bar."""
    from transformers.utils.logging import disable_progress_bar

    from ..captioning.captioner import RegionCaptioner

    disable_progress_bar()
    return load(RegionCaptioner.from_pretrained, model, mode="fast" if fast else "default")


def check_captioner(model: str | None, schema: Any = None) -> None:
    """Check a checkpoint without its weights, before what takes long: whether it is one, and can read a schema.

    Raises:
        CheckpointError: it does not exist, is damaged, or cannot caption regions.
        SettingError: it cannot read the schema, for example since two choices have the same tokens.
    """
    from ..captioning.captioner import NO_REGIONS
    from ..captioning.checkpoints import CHECKPOINT
    from ..captioning.loading import load_processor

    processor = load(lambda path: load_processor(CHECKPOINT if path is None else path), model)
    if not processor.tokens_per_region:
        raise CheckpointError(NO_REGIONS)
    if schema is not None:
        processor.attribute_plan(schema.choices, schema.lengths, schema.template)


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option, by the name of its parameter, stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_served(context: typer.Context, server: str | None) -> None:
    """Raises: SettingError: an option about a server is given, and no server; or one that a server decides."""
    reason = "is about a server; give --server, or leave it out."
    if server is not None:
        reason = "the server forms the batches; leave it out, or set --concurrency."
    for option in ("concurrency", "key_env") if server is None else ("batch_size",):
        if is_given(context, option):
            raise SettingError(f"--{option.replace('_', '-')}: {reason}")


def caption_client(
    url: str, model: str | None, key_env: str | None, concurrency: int, settings: dict[str, Any], schema: Any = None
) -> Any:
    """A client of the region route. Raises: ServerError: the server cannot be reached, or has no such model."""
    from ..client.captions import CaptionClient
    from ..client.server import key_in

    options = {"api_key": key_in(key_env), "settings": settings, "concurrency": concurrency}
    return CaptionClient(url, model, schema, **options)
