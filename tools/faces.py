"""`gptface faces`."""

import typer

app = typer.Typer(no_args_is_help=True, help="faces")


@app.callback()
def group() -> None:
    """Group of commands."""
