"""Plot the speed of attention over the length of sequences."""

from collections.abc import Sequence
from pathlib import Path

from gptface_dist.kernels.attention.benchmark import Speed
from gptface_dist.kernels.attention.shapes import FULL


def draw(timed: Sequence[Speed], out: Path) -> None:
    """TFLOP/s over tokens of full batches, a panel for each head size and pass, a line for each way; format by the file's
    suffix.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    speeds = [speed for speed in timed if speed.shape.kind == FULL]
    sizes = sorted({speed.shape.size for speed in speeds})
    ways = list(dict.fromkeys(speed.way for speed in speeds))
    figure, axes = pyplot.subplots(len(sizes), 2, figsize=(12, 4.5 * len(sizes)), layout="constrained", squeeze=False)
    for row, size in zip(axes, sizes, strict=True):
        for axis, name, passes in zip(row, ("forward", "backward"), (2, 5), strict=True):
            for number, way in enumerate(ways):
                curve = [speed for speed in speeds if speed.way == way and speed.shape.size == size]
                rates = [speed.shape.teraflops(getattr(speed, name), passes) for speed in curve]
                # FP8 copies made before: dashed, in the color of the way that makes them.
                line, of = ("--", way.removesuffix(", quantised before")) if way.endswith("before") else ("-", way)
                color = f"C{ways.index(of) if of in ways else number}"
                axis.plot([speed.shape.tokens for speed in curve], rates, line, marker="o", color=color, label=way)
            axis.set(title=f"{name}, heads of {size}", xlabel="tokens of a sequence", ylabel="TFLOP/s", xscale="log", ylim=0)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(out)
    pyplot.close(figure)
