"""The command `pdlm`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import typer

from .attributes import attributes
from .batch import batch, convert, report
from .bench import decode
from .caption import caption
from .chat import chat, export
from .check import check
from .demo import demo
from .errors import make_app
from .regions import RepeatedOptions

app = make_app("pdlm", "PerceptionDLM: captions for many regions of an image, written together.")
for _command in (caption, attributes):
    app.command(cls=RepeatedOptions)(_command)
for _command in (batch, report, convert, chat, demo, export, check):
    app.command()(_command)
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True, rich_markup_mode=None)
bench.command()(decode)
bench.callback()(lambda: None)  # keeps `decode` a subcommand
app.add_typer(bench, name="bench")

if __name__ == "__main__":
    app()
