"""The command `pdlm-peft`."""

from pdlm_hf.cli.errors import make_app

from . import build_cli, data_cli, train_cli

app = make_app("pdlm-peft", "Fine-tune PerceptionDLM on your own region data.")
for _command in (
    data_cli.validate,
    data_cli.convert,
    data_cli.split,
    train_cli.train,
    train_cli.commit,
    train_cli.merge,
):
    app.command()(_command)
app.add_typer(build_cli.app, name="build")

if __name__ == "__main__":
    app()
