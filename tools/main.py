"""The ``gptface`` program: groups of commands, and one place where a user's mistake becomes one line."""

import sys

import typer

import gptface_dist
from gptface_dist.errors import UserError
from gptface_dist.tools import (
    bench,
    bundle,
    data,
    faces,
    generate,
    health,
    parity,
    release,
    report,
    study,
    tokenizer,
    train,
)

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GPTFace: from pictures with captions to a model that reads, writes and edits faces.",
)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(faces.app, name="faces")
app.add_typer(tokenizer.app, name="tokenizer")
generate.register(app)
app.command("convert")(release.convert)
app.command("inspect")(release.inspect)
app.command("parity")(parity.parity)
app.command("report")(report.report)
app.command("study")(study.study)
app.command("train")(train.train)
app.command("bundle")(bundle.bundle)
app.command("curves")(train.curves)
app.command("health")(health.health)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gptface_dist {gptface_dist.__version__}")
        raise typer.Exit


@app.callback()
def main(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    """Everything GPTFace, from the command line."""


def run() -> None:
    """Entry point: a mistake of the user or an interrupt ends the program with one line on stderr, without a traceback.

    The exit status is 2 after a :class:`UserError` and 130 after an interrupt.
    """
    try:
        app()
    except UserError as error:
        print(f"gptface: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        # Typer turns KeyboardInterrupt into an exit with this status, and says nothing. A run's own processes do.
        if end.code == _INTERRUPTED and isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("gptface: interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    run()
