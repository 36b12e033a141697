"""``gptface health``: the reports on FP8 attention of a run."""

from pathlib import Path
from typing import Annotated

import typer


def health(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Step of the report; the last one by default.", show_default=False)] = None,
) -> None:
    """Show how FP8 attention fared in each layer of a run (attention_health.interval): errors against bf16, values lost."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from gptface_dist.training.analysis import attention_report

    report = attention_report.read(run, step)
    names = list(dict.fromkeys(name for layer in report.layers.values() for name in layer.tensors))
    headings = [Column(name, no_wrap=True) for name in ("layer", "O", "dQ dK dV", *names)]
    table = Table(*headings, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, layer in report.layers.items():
        lost = (layer.tensors.get(name) for name in names)
        row = ["/".join(_percent(share) for share in shares) if shares else "" for shares in lost]
        gradient = "" if layer.gradient_error is None else f"{layer.gradient_error:.3f}"
        table.add_row(f"{number}{'*' if layer.fallen_back else ''}", f"{layer.out_error:.3f}", gradient, *row)
    console = Console(highlight=False)
    console.print(f"step {report.step}: O and gradients: error against bf16; others: % saturated/% flushed to zero in FP8")
    console.print(table)
    if any(layer.fallen_back for layer in report.layers.values()):
        console.print("* goes on without FP8")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share == 0 or share >= 0.01 else f"{100 * share:.1g}"
