"""Loss curves of runs, drawn together from their journals, and how far they are apart."""

from collections.abc import Sequence
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.training.callbacks import journal

LOSSES = ("loss", "loss/text", "loss/image", "loss/match")


def difference(first: Path, second: Path) -> tuple[int, dict[str, float]]:
    """Steps that both runs have, and the largest relative difference of each loss over these."""
    one, two = (_by_step(folder) for folder in (first, second))
    steps = sorted(one.keys() & two.keys())
    if not steps:
        raise UserError(f"{first} and {second} have no step in common")
    found = {}
    for name in LOSSES:
        pairs = [(one[step][name], two[step][name]) for step in steps if name in one[step] and name in two[step]]
        if pairs:
            found[name] = max(abs(a - b) / abs(a) for a, b in pairs)
    return len(steps), found


def draw(folders: Sequence[Path], out: Path) -> None:
    """A picture (any format of matplotlib's) of the losses of text, image and match: every run's training losses as lines,
    held-out ones as dots, and the unigram entropy of the held-out targets where it was found.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, folder in enumerate(folders):
        train, held_out = _by_step(folder), journal.read(folder, "evaluation")
        color = f"C{number}"
        for axis, name in zip(axes, ("text", "image", "match"), strict=True):
            key = f"loss/{name}"
            points = [(step, record[key]) for step, record in train.items() if key in record]
            # The first run is drawn broad and pale: one that agrees with it stays visible on top.
            width, alpha = (5.0, 0.35) if number == 0 and len(folders) > 1 else (1.2, 1.0)
            axis.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha, label=folder.name)
            dots = [(record["step"], record[key]) for record in held_out if key in record]
            if dots:
                axis.plot(*zip(*dots, strict=True), "o", color=color, markersize=5, label=f"{folder.name}, held out")
            unigram = [record[f"unigram/{name}"] for record in held_out if f"unigram/{name}" in record]
            if unigram and number == 0:
                axis.axhline(unigram[-1], color="gray", linestyle=":", label=f"unigram entropy {unigram[-1]:.2f}")
            axis.set(title=f"{name} (nats)", xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _by_step(folder: Path) -> dict[int, dict[str, float]]:
    try:
        records = {int(record["step"]): record for record in journal.read(folder)}
    except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no journal of a run ({journal.NAME}): {error}") from None
    if not records:
        raise UserError(f"{folder / journal.NAME} has no step yet")
    return records
