"""``gptface parity``: a layout against the plain model in one process."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gptface_dist.errors import UserError


def parity(
    dp: Annotated[int, typer.Option(help="Data-parallel replicas.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="Model chunks a pipeline rank (interleaved).")] = 1,
    sp: Annotated[bool, typer.Option("--sp", help="Sequence parallelism.")] = False,
    zero: Annotated[int, typer.Option(help="ZeRO stage: 0 (none), 1, 2 or 3.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3,
    matrix: Annotated[bool, typer.Option("--matrix", help="All legal layouts of 2 to 8 processes instead of one.")] = False,
    objective: Annotated[str, typer.Option(help="What is trained: milm_itm or contrastive.")] = "milm_itm",
    micro_batches: Annotated[
        int | None,
        typer.Option(min=1, help="Micro-batches of 16 samples.", show_default="of 2 samples each: --dp's multiple from 8 on"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32 or bfloat16.")] = "float32",
    recompute: Annotated[str, typer.Option(help="What the backward pass computes again: none, attention or layer.")] = "none",
    dropout: Annotated[float, typer.Option(help="Chance of dropout, of hidden states and attention weights.")] = 0.0,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error.", show_default="4 x rounding, at least 1e-05, in bfloat16 0.1"),
    ] = None,
) -> None:
    """Compare loss, every gradient and the norm of a layout with the plain model. Status 1 where they differ.

    Spawns the processes that the layout needs, on this machine.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from gptface_dist import host
    from gptface_dist.engine import parity as proof
    from gptface_dist.engine import parity_case
    from gptface_dist.engine.parity_case import Case
    from gptface_dist.objectives.registry import ObjectiveOptions, build_objective
    from gptface_dist.parallel.layout import Layout
    from gptface_dist.parallel.options import EngineOptions

    if micro_batches and parity_case.SAMPLES % micro_batches:
        raise UserError(
            f"--micro-batches {micro_batches} does not divide the {parity_case.SAMPLES} samples of the global batch"
        )
    size = parity_case.SAMPLES // micro_batches if micro_batches else 2
    cases = parity_case.matrix() if matrix else [Case(Layout(dp, tp, pp, vpp, sp, zero), micro_batches=8 + -8 % dp)]
    model = replace(parity_case.MODEL, hidden_dropout=dropout, attention_dropout=dropout)
    engine = EngineOptions(dtype=dtype, recompute=recompute)
    host.warn_of_emulation(dtype, "--dtype")
    how: dict[str, Any] = {"steps": steps, "model": model, "engine": engine, "tolerance": tolerance, "size": size}
    how |= {"seed": seed, "objective": build_objective(ObjectiveOptions(objective), {})}
    cases = [replace(case, micro_batches=micro_batches or case.micro_batches, **how) for case in cases]
    table = Table(
        "layout",
        "loss",
        "norm",
        "gradient",
        Column("worst gradient of", overflow="fold"),
        "compared",
        "rounding",
        "",
        title="relative error to the plain model in float64; rounding: its own in the layout's dtype",
    )
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status(f"{len(cases)} layouts, {steps} steps each"):
        results = proof.run_parity(cases, Path(folder) / "results.jsonl")
    for result in results:
        errors = [f"{error:.1e}" for error in (result.loss, result.norm, result.gradient)]
        verdict = "equal" if result.ok() else "DIFFERENT"
        table.add_row(result.layout, *errors, result.worst, str(result.compared), f"{result.rounding:.1e}", verdict)
    Console().print(table)
    equal = all(result.ok() for result in results)
    print(f"{'equal' if equal else 'DIFFERENT'} within {max(result.tolerance for result in results):.2g}")
    raise typer.Exit(0 if equal else 1)
