"""What the machine can do at best: bandwidth of a copy, TFLOP/s of bf16 and FP8 matrix products, and its clocks."""

import shutil
import subprocess

from gptface_dist.benchmarks.gpu.context import Context

SIDES = (8192, 4096, 16384)
"""Rows and columns of the square matrices."""
CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def run(context: Context) -> None:
    """Clocks before and under load, and the ceilings at several sizes."""
    _clocks(context, "idle")
    for side in (64,) if context.dry else SIDES:
        context.attempt({"side": side}, lambda side=side: _ceilings(context, side), 8)  # type: ignore[misc]
    _clocks(context, "after load")


def _ceilings(context: Context, side: int) -> None:
    from gptface_dist.kernels.attention.timing import ceilings

    bandwidth, bf16, fp8 = ceilings(context.timer(20), context.device(), side)
    context.record("ceilings", side=side, copy_gb_s=bandwidth, bf16_tflops=bf16, fp8_tflops=fp8)


def _clocks(context: Context, when: str) -> None:
    """What nvidia-smi says of this GPU; nothing where there is no nvidia-smi."""
    if context.dry or shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", f"--id={context.device().index}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode == 0 and len(values) == len(CLOCKS.split(",")):
        context.record("clocks", when=when, **dict(zip(CLOCKS.split(","), values, strict=True)))
    else:
        context.record("failed", about={"clocks": when}, why=f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}")
