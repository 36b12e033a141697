"""``gptface parity``: a layout against the plain model in one process."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def parity(
    dp: Annotated[int, typer.Option(help="Data-parallel replicas.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="Model chunks a pipeline rank (interleaved).")] = 1,
    sp: Annotated[bool, typer.Option("--sp", help="Sequence parallelism.")] = False,
    zero: Annotated[int, typer.Option(help="ZeRO stage: 1, 2 or 3.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Largest relative error.")] = 1e-5,
) -> None:
    """Compare loss, every gradient and the norm of a layout with the plain model. Status 1 where they differ.

    Spawns the processes that the layout needs, on this machine.
    """
    from rich.console import Console
    from rich.table import Table

    from gptface_dist.engine.parity import Case, prove
    from gptface_dist.layout import Layout

    case = Case(Layout(dp, tp, pp, vpp, sp, zero), steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        (found,) = prove([case], Path(folder) / "found.jsonl")
    table = Table("compared with the plain model", "relative error", title=found.layout)
    table.add_row(f"loss of {steps} steps", f"{found.loss:.1e}")
    table.add_row("norm of the gradient", f"{found.norm:.1e}")
    table.add_row(f"worst of {found.compared} gradients: {found.worst}", f"{found.gradient:.1e}")
    Console().print(table)
    verdict = found.ok(tolerance)
    print(f"{'equal' if verdict else 'DIFFERENT'} within {tolerance:g}")
    raise typer.Exit(0 if verdict else 1)
