"""``gptface bench loss``: the chunked output loss."""

from typing import Annotated

import typer


def loss(
    rows: Annotated[int, typer.Option(min=1, help="Masked tokens.")] = 4096,
    columns: Annotated[int, typer.Option(min=2, help="Ids.")] = 16384,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the features.")] = 768,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    chunk: Annotated[list[int] | None, typer.Option(min=1, help="Rows at a time; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
) -> None:
    """Time and memory of the chunked output loss and its gradients, as ratios to a loss with the full logits tensor."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from gptface_dist import host
    from gptface_dist.errors import UserError
    from gptface_dist.kernels.loss import benchmark

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    host.warn_of_emulation(dtype, "--dtype")
    console = Console()
    work = benchmark.Work(rows, columns, hidden, dtype, tuple(chunk or (256, 1024)))
    with console.status("") as status:
        costs = benchmark.compare(work, rounds, status.update)
    base = costs[0]
    table = Table("way", "ms", "ratio", "MiB beyond inputs", "ratio", "error of the weight gradient")
    for cost in costs:
        time, memory = (
            f"{a / b:.2f}" if b else "" for a, b in ((cost.milliseconds, base.milliseconds), (cost.mebibytes, base.mebibytes))
        )
        table.add_row(cost.way, f"{cost.milliseconds:.0f}", time, f"{cost.mebibytes:.0f}", memory, f"{cost.difference:.1e}")
    console.print(table)
    hardware = f"{host.hardware('torch')}, {torch.get_num_threads()} CPU threads"
    console.print(f"{hardware}; {rows} rows, {columns} ids, width {hidden}, {dtype}", highlight=False)
    console.print(f"medians of {rounds} rounds forward and backward, each way in a process of its own", highlight=False)
