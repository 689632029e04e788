"""Arguments and error messages that the commands of `pdlm-peft` share."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pdlm_hf.cli import errors

fail, exit_on_error = partial(errors.fail, "pdlm-peft"), errors.exit_on_error("pdlm-peft")

Data = Annotated[
    str, typer.Argument(help="COCO json, JSONL, the reference's json, a `datasets` folder, or hf:NAME@SPLIT.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images; default: the folder of the file.")]
