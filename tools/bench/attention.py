"""``gptface bench attention``: FP8 attention beside PyTorch's, and the tuner of its launches."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptface_dist.errors import check_one_of

if TYPE_CHECKING:
    from rich.console import Console

    from gptface_dist.kernels.attention.benchmark import Speed
    from gptface_dist.kernels.attention.shapes import Shape


def attention(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a sequence; repeat for several.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, max=128, help="Head size; repeat for several.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="full, padded or packed batches; repeat for several.", show_default="full")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 30,
    seconds: Annotated[float, typer.Option(min=1, help="Begin nothing new after so long.")] = 3600.0,
    specialize: Annotated[bool, typer.Option("--specialize", help="Time the warp-specialised kernels too.")] = False,
    qk_norm: Annotated[
        bool, typer.Option("--qk-norm", help="With QK-norm, fused with the making of FP8 copies or not.")
    ] = False,
    launches: Annotated[
        Path | None, typer.Option(help="Table of launches to use instead of the package's.", show_default=False)
    ] = None,
    tune: Annotated[
        Path | None, typer.Option(help="Time every candidate launch and write the table of the best here.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", help="Append each result here at once, as a line of JSON.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw TFLOP/s over tokens here (PNG, SVG).", dir_okay=False)] = None,
) -> None:
    """TFLOP/s of FP8 attention beside PyTorch's in bf16 on this GPU, with errors against float64.

    FP8 rows count the making of FP8 copies in; "quantised before" rows are the kernels alone. cuDNN's own FP8 attention is
    timed where nvidia-cudnn-frontend is installed. With --tune, each kernel's tiles, warps, stages and order are timed instead.
    """
    from rich.console import Console

    from gptface_dist import host
    from gptface_dist.kernels.attention import curves, timing
    from gptface_dist.kernels.attention.launch import load_table
    from gptface_dist.kernels.attention.shapes import KINDS, SIZES, TOKENS, Shape

    for name in kind or ():
        check_one_of("--kind", name, KINDS)
    table = load_table("" if launches is None else str(launches))
    console, device = Console(), timing.require_gpu()
    until = time.monotonic() + seconds

    def left() -> float:
        return until - time.monotonic()

    def keep(record: str, value: Any) -> None:
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"record": record, **dataclasses.asdict(value)}) + "\n")

    timer = timing.cuda_timer(rounds)
    bandwidth, bf16, fp8 = timing.ceilings(timer, device)
    console.print(host.hardware("torch", "triton"), highlight=False)
    console.print(f"copy {bandwidth:,.0f} GB/s; products bf16 {bf16:.0f}, FP8 {fp8:.0f} TFLOP/s", highlight=False)
    chosen = "by machine code alone" if table.device is None else f"timed on {table.device}, {table.date}, {table.versions}"
    console.print(f"launches: {launches or 'of the package'}, {chosen}", highlight=False)
    if tune is not None:
        _tune(console, tune, table, timer, device, left, keep)
        return
    shapes = [Shape.usual(n, d, k) for d in size or SIZES for k in kind or ("full",) for n in tokens or TOKENS]
    speeds = _compare(console, shapes, timer, device, left, keep, (bf16, fp8), (specialize, qk_norm, str(launches or "")))
    _crossovers(console, speeds)
    console.print(f"random data, medians of {rounds} calls with an empty cache", highlight=False)
    if plot is not None:
        curves.draw(speeds, plot)


def _compare(
    console: "Console",
    shapes: list["Shape"],
    timer: Any,
    device: Any,
    left: Callable[[], float],
    keep: Callable[[str, Any], None],
    peaks: tuple[float, float],
    how: tuple[bool, bool, str],
) -> list["Speed"]:
    """Time and print shape after shape."""
    from rich.table import Table

    from gptface_dist.kernels.attention.benchmark import Comparison, Untimed, compare
    from gptface_dist.model.attention import sdpa

    speeds: list[Speed] = []
    for shape in shapes:
        names = ("way", "forward ms", "TFLOP/s", "of peak", "backward ms", "TFLOP/s", "of peak", "error O", "error dQ dK dV")
        table = Table(*names, title=str(shape))
        for result in compare(shape, timer, device, Comparison(*how, sdpa)):
            keep("untimed" if isinstance(result, Untimed) else "speed", result)
            if isinstance(result, Untimed):
                console.print(f"not timed: {result.way}: {result.reason}", highlight=False)
            else:
                speeds.append(result)
                table.add_row(*_row(result, *peaks))
            if left() <= 0:
                break
        console.print(table)
        if left() <= 0:
            console.print("the time is up: what is not above was not timed", highlight=False)
            break
    return speeds


def _row(speed: "Speed", bf16: float, fp8: float) -> list[str]:
    peak = fp8 if "fp8" in speed.way else bf16
    row = [speed.way]
    for milliseconds, products in ((speed.forward, 2), (speed.backward, 5)):
        rate = speed.shape.teraflops(milliseconds, products)
        row += [f"{milliseconds:.3f}", f"{rate:.0f}", f"{rate / peak:.0%}"]
    if speed.parts is not None:
        # The errors are the row's above.
        return [*row, "", " ".join(f"{name} {time:.3f}" for name, time in speed.parts.items())]
    return row + ["" if error is None else f"{error:.4f}" for error in (speed.out_error, speed.gradient_error)]


def _crossovers(console: "Console", speeds: list["Speed"]) -> None:
    from gptface_dist.kernels.attention.benchmark import crossover
    from gptface_dist.kernels.attention.options import BACKWARDS

    for backward in BACKWARDS:
        fewest = crossover(speeds, backward)
        words = "never" if fewest is None else f"from {fewest} tokens: engine.attention.fp8_from={fewest}"
        console.print(f"FP8 with backward {backward} faster than PyTorch's best: {words}", highlight=False)


def _tune(
    console: "Console",
    out: Path,
    table: Any,
    timer: Any,
    device: Any,
    left: Callable[[], float],
    keep: Callable[[str, Any], None],
) -> None:
    """Time candidates; the table is written after each kernel."""
    import torch

    from gptface_dist.kernels.attention import tuning
    from gptface_dist.kernels.attention.options import BACKWARDS

    keys = tuning.tuned_keys(sorted(BACKWARDS, key="mixed".__ne__))
    processes = tuning.compile_processes()
    with console.status(f"compiling candidates in {processes} processes"):
        done = tuning.precompile(keys, processes, lambda: left() / 2)
    console.print(f"{done} candidates compiled", highlight=False)
    trials: list[tuning.Trial] = []
    name = torch.cuda.get_device_name(device)
    for trial in tuning.written(tuning.tune(keys, table, timer, device, left), table, name, out):
        keep("trial", trial)
        trials.append(trial)
        time_ms = "not run" if trial.milliseconds is None else f"{trial.milliseconds:.3f} ms"
        wrong = "" if trial.right else f", WRONG: {trial.failure or f'differs by {trial.difference:.3g}'}"
        console.print(f"{trial.key}, {trial.shape}: {trial.launch}: {time_ms}{wrong}", highlight=False)
    if not trials:
        console.print("the time was up before a launch was timed: nothing was written", highlight=False)
        return
    found = tuning.best(trials, table, name)
    for key in dict.fromkeys(trial.key for trial in trials):
        console.print(f"{key}: {found.launches[key]} (was {table.launches[key]})", highlight=False)
    console.print(f"{out}: the best of {len(trials)} trials; use it with engine.attention.fp8.launches={out}", highlight=False)
