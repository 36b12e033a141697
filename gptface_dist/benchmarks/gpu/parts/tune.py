"""Which launch of each attention kernel is fastest on this GPU; writes the table of the best beside its records."""

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.kernels.attention import tuning
from gptface_dist.kernels.attention.launch import DQ, Key, load_table
from gptface_dist.kernels.attention.shapes import Shape
from gptface_dist.kernels.attention.tuning import Trial

TABLE = "launches.json"


def keys(dry: bool) -> list[Key]:
    """What is tuned, most valuable first."""
    return [Key(DQ, 64, "mixed", False)] if dry else tuning.tuned_keys(("mixed", "fp8", "bf16"))


def run(context: Context) -> None:
    """Time candidate after candidate; the table is written after each kernel."""
    import torch

    table, device = load_table(), context.device()
    name = "CPU" if context.dry else torch.cuda.get_device_name(device)
    trials: list[Trial] = []

    tokens, shape = ((40,), lambda n, size: Shape(n, size, 1, 1)) if context.dry else (tuning.TOKENS, Shape.usual)
    timer, chosen = context.timer(10), keys(context.dry)
    tried = tuning.tune(chosen, table, timer, device, lambda: context.left() - 4, tokens, shape)
    for trial in tuning.written(tried, table, name, context.beside("tune", TABLE)):
        trials.append(trial)
        context.record(
            "trial", key=str(trial.key), launch=str(trial.launch), tokens=trial.shape.tokens, ms=trial.milliseconds,
            difference=trial.difference, why=trial.failure,
        )  # fmt: skip
    found = tuning.best(trials, table, name)
    for key in dict.fromkeys(trial.key for trial in trials):
        own, others = ([t.milliseconds for t in trials if t.key == key and t.launch == x.launches[key]] for x in (table, found))
        context.record(
            "best", key=str(key), launch=str(found.launches[key]), was=str(table.launches[key]), ms=others, was_ms=own
        )
    # Nothing launches a kernel like these: wrong is a fault of the candidate, not of what runs.
    for trial in trials:
        if trial.milliseconds is not None and not trial.right:
            context.record("wrong", key=str(trial.key), launch=str(trial.launch), difference=trial.difference)
