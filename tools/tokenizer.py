"""`gptface tokenizer`."""

import typer

app = typer.Typer(no_args_is_help=True, help="tokenizer")


@app.callback()
def group() -> None:
    """Group of commands."""
