"""``gptface train`` as a user runs it: in every precision, under ZeRO-3, and resumed from a checkpoint."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from gptface_dist.benchmarks.gpu import token_shards
from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.benchmarks.gpu.token_shards import TokenShards
from gptface_dist.checkpoint import folder as checkpoints
from gptface_dist.differences import largest, relative
from gptface_dist.training.metrics import read_metrics

RUNS: dict[str, list[str]] = {
    "float32": [],
    "bfloat16": ["engine.dtype=bfloat16"],
    "fp8": ["engine.dtype=bfloat16", "engine.attention.kernel=fp8"],
    "zero3": ["engine.dtype=bfloat16", "layout.zero=3"],
}
"""Name -> overrides; ZeRO-1 unless they say otherwise."""
FROM_FLOAT32 = 0.02
"""Largest relative difference of the last loss from that in float32, after a few steps."""
FROM_UNINTERRUPTED = 1e-3
"""Of a resumed run's losses from those of the run that it was resumed from: GPUs add up in changing orders."""


def run(context: Context) -> None:
    """Train side by side, compare the last losses, then resume the float32 run from its middle."""
    work = Path.cwd()
    shards = token_shards.made_up(256, work) if context.tokens is None else token_shards.given(context.tokens, work)
    steps = 4 if context.dry else 20
    Path("run.yaml").write_text(yaml.safe_dump(config(shards, steps, context.dry)), encoding="utf-8")
    with ThreadPoolExecutor(2 if context.dry else len(RUNS)) as pool:
        # list() raises here what was raised there.
        list(pool.map(lambda name: context.attempt({"run": name}, lambda: _train(context, name, RUNS[name]), 10), RUNS))
    for name in RUNS:
        if name != "float32":
            about = {"run": name, "compared with": "float32"}
            context.attempt(about, lambda name=name, about=about: _compare(context, name, about), 0)  # type: ignore[misc]
    context.attempt({"run": "resumed"}, lambda: _resume(context, steps // 2), 10)


def config(shards: TokenShards, steps: int, dry: bool) -> dict[str, Any]:
    """A small model with heads of 64."""
    hidden, layers = (64, 2) if dry else (256, 4)
    return {
        "model": {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden, "init_std": 0.05},
        "data": {
            "tokenizers": str(shards.tokenizers), "sources": [{"path": str(shards.path)}], "global_batch": 16 if dry else 64,
            "micro_batch": 8 if dry else 32, "order": {"block": 8, "streams": 4}, "batch": {"text_length": 48},
            "workers": 0 if dry else 1,
        },
        "layout": {"zero": 1},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "run": {"steps": steps, "log_every": 1},
        "checkpoint": {"interval": steps // 2, "keep_last": 0},
        "tracking": {"mlflow": False},
    }  # fmt: skip


def _train(context: Context, name: str, overrides: Sequence[str]) -> None:
    folder = Path.cwd() / "runs" / name
    why = context.command(name, ["train", "run.yaml", f"run.folder={folder}", *overrides])
    if why:
        raise RuntimeError(why)
    records = read_metrics(folder)
    first, last = records[0], records[-1]
    context.record(
        "train", run=name, steps=int(last["step"]), first_loss=first["loss"], last_loss=last["loss"],
        tokens_s=last["tokens_per_s"], gib=last["peak_memory_gib"],
    )  # fmt: skip
    if name in RUNS:
        context.check({"run": name}, {}, **{"the loss falls": last["loss"] < first["loss"]})


def _compare(context: Context, name: str, about: dict[str, str]) -> None:
    loss, wanted = (read_metrics(Path("runs", run))[-1]["loss"] for run in (name, "float32"))
    context.check(about, {"last_loss": (abs(loss - wanted) / wanted, FROM_FLOAT32)})


def _resume(context: Context, step: int) -> None:
    """Go on from a checkpoint in the middle of the float32 run, and compare with how that went on itself."""
    checkpoint = Path.cwd() / "runs" / "float32" / checkpoints.FOLDER_NAME / checkpoints.name_of(step)
    _train(context, "resumed", [f"checkpoint.resume_from={checkpoint}"])
    resumed = read_metrics(Path("runs", "resumed"))
    whole = read_metrics(Path("runs", "float32"))[step:]
    worst = largest(relative(a["loss"], b["loss"]) for a, b in zip(resumed, whole, strict=False))
    same = [one["step"] for one in resumed] == [one["step"] for one in whole]
    context.check({"run": "resumed", "from step": step}, {"losses": (worst, FROM_UNINTERRUPTED)}, **{"same steps": same})
