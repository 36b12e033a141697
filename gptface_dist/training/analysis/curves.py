"""Loss curves of several runs in one figure, and their largest differences."""

from collections.abc import Sequence
from pathlib import Path

from gptface_dist.differences import largest, relative
from gptface_dist.errors import UserError
from gptface_dist.training.metrics import CONSTANT_GUESS, LOSS, NAME, read_metrics, terms


def difference(first: Path, second: Path) -> tuple[int, dict[str, float]]:
    """Number of common steps, and the largest relative difference of each loss over them, by metric."""
    first_records, second_records = _by_step(first), _by_step(second)
    steps = sorted(first_records.keys() & second_records.keys())
    if not steps:
        raise UserError(f"{first} and {second} have no step in common")
    differences = {}
    for name in ("loss", *(LOSS + term for term in terms(first_records.values()))):
        records = [(first_records[step], second_records[step]) for step in steps]
        pairs = [(a[name], b[name]) for a, b in records if name in a and name in b]
        if pairs:
            differences[name] = largest(relative(b, a) for a, b in pairs)
    return len(steps), differences


def draw(folders: Sequence[Path], out: Path) -> None:
    """Draw the losses of each term into a picture (any format of matplotlib): training losses as lines, held-out ones as dots,
    and, if the first run has it, the least loss of a constant guess on the held-out targets as a dotted line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    runs = [(folder, _by_step(folder), read_metrics(folder, "evaluation")) for folder in folders]
    names = terms(metrics for _, train, _ in runs for metrics in train.values())
    figure, grid = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4.5), layout="constrained", squeeze=False)
    axes = grid[0]
    for number, (folder, train, held_out) in enumerate(runs):
        color = f"C{number}"
        for axis, name in zip(axes, names, strict=True):
            key = LOSS + name
            points = [(step, record[key]) for step, record in train.items() if key in record]
            # A broad and pale line for the first run: another run that agrees with it stays visible on top.
            width, alpha = (5.0, 0.35) if number == 0 and len(folders) > 1 else (1.2, 1.0)
            if points:
                axis.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha, label=folder.name)
            dots = [(record["step"], record[key]) for record in held_out if key in record]
            if dots:
                axis.plot(*zip(*dots, strict=True), "o", color=color, markersize=5, label=f"{folder.name}, held out")
            guesses = [record[CONSTANT_GUESS + name] for record in held_out if CONSTANT_GUESS + name in record]
            if guesses and number == 0:
                axis.axhline(guesses[-1], color="gray", linestyle=":", label=f"constant guess {guesses[-1]:.2f}")
            axis.set(title=f"{name} (nats)", xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _by_step(folder: Path) -> dict[int, dict[str, float]]:
    records = {int(metrics["step"]): metrics for metrics in read_metrics(folder)}
    if not records:
        raise UserError(f"{folder / NAME} has no step yet")
    return records
