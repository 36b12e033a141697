"""Loss curves of runs, drawn together, and how far they are apart."""

from collections.abc import Sequence
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.training.metrics import CONSTANT_GUESS, LOSS, NAME, read_metrics, terms


def difference(first: Path, second: Path) -> tuple[int, dict[str, float]]:
    """Steps that both runs have, and the largest relative difference of each loss over these."""
    one, two = (_by_step(folder) for folder in (first, second))
    steps = sorted(one.keys() & two.keys())
    if not steps:
        raise UserError(f"{first} and {second} have no step in common")
    found = {}
    for name in ("loss", *(LOSS + term for term in terms(one.values()))):
        pairs = [(one[step][name], two[step][name]) for step in steps if name in one[step] and name in two[step]]
        if pairs:
            found[name] = max(abs(a - b) / abs(a) for a, b in pairs)
    return len(steps), found


def draw(folders: Sequence[Path], out: Path) -> None:
    """A picture (any format of matplotlib's) of the loss of each term: every run's training losses as lines, held-out ones as
    dots, and the least loss of a constant guess on the held-out targets where it was found.
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
            # The first run is drawn broad and pale: one that agrees with it stays visible on top.
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
