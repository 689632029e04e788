"""The command `pdlm-peft`."""

import typer

from pdlm_hf.cli import errors

from . import data_cli, train_cli

app = typer.Typer(help="Fine-tune PerceptionDLM on your own region data.", no_args_is_help=True, rich_markup_mode=None)
data_cli.register(app)
train_cli.register(app)
errors.add_version(app, "pdlm-peft")

if __name__ == "__main__":
    app()
