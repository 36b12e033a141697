"""What ``gptface bench gpu`` runs, in which order, and for how long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gptface_dist.errors import UserError


@dataclass(frozen=True)
class Part:
    """One line of :data:`PARTS`; ``parts/NAME.py`` has its ``run(context)``."""

    name: str
    """What ``--only`` calls it."""
    seconds: float
    """Time limit of each of its processes; a dry run allows :data:`DRY_FACTOR` times as much."""
    stage: str
    """Neighbours in the table with the same stage run at the same time, and so do their variants; a part whose stage is
    :data:`ALONE` runs one process after another, with the machine to itself, as what is timed must."""
    correctness: bool
    """Whether it must end by itself, with at least one check, for exit status 0. A check that fails counts in any part."""
    variants: tuple[str, ...] = ("",)
    """It runs once for each, in a process of its own."""
    dry_variants: tuple[str, ...] | None = None
    """Those of a dry run, where they are not all."""
    interpret: bool = False
    """Whether a dry run interprets the kernels that it launches (TRITON_INTERPRET=1); else they are emulated."""
    package: str = "gptface_dist.benchmarks.gpu.parts"
    """The package that has its file."""


ALONE = "alone"
SPECIALIZED = "specialized"

# Head sizes and backward modes of kernels/attention/options.py, which would import torch before anything is said.
_KERNELS = tuple(f"{size}-{mode}" for size in (64, 128) for mode in ("mixed", "fp8", "bf16", SPECIALIZED))
_DRY_KERNELS = (*_KERNELS[:4], _KERNELS[-1])

# Correctness first, then what is worth most. A new part is a file in parts/ and a line here.
PARTS = (
    Part("right", 100, "kernels", True, _KERNELS, _DRY_KERNELS, interpret=True),
    Part("compile_launches", 100, "kernels", False, interpret=True),
    Part("parity", 90, "system", True, ("zero0", "zero1", "zero3", "bfloat16"), ("zero1", "bfloat16")),
    Part("train", 110, "system", True),
    Part("kernel_tests", 110, "system", True, interpret=True),
    Part("ceilings", 30, ALONE, False),
    Part("speed", 100, ALONE, False, interpret=True),
    Part("tune", 85, ALONE, False, interpret=True),
    Part("step", 75, ALONE, False, ("base", "1b"), ("base",)),
    Part("speed_tuned", 45, ALONE, False, interpret=True),
    Part("loss", 40, ALONE, False),
)

DRY_FACTOR = 4.0
"""A CPU that interprets kernels is slower than a GPU, even at toy sizes."""


@dataclass(frozen=True)
class Task:
    """One process: a part, or one variant of it."""

    part: Part
    """The part."""
    variant: str
    """One of the part's variants."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.part.name}-{self.variant}" if self.variant else self.part.name


def tasks(only: Sequence[str], dry: bool, parts: Sequence[Part] = PARTS) -> list[Task]:
    """The tasks of the parts named in ``only`` (none: of all), in the table's order.

    A name may also be a single task's, ``PART-VARIANT``. :class:`UserError` for a name that is neither.
    """
    chosen = []
    unknown = set(only)
    for part in parts:
        variants = part.variants if not dry or part.dry_variants is None else part.dry_variants
        for variant in part.variants:
            task = Task(part, variant)
            named = {part.name, task.name} & set(only)
            unknown -= named
            # One that is named by its variant runs in a dry run too.
            if task.name in only or (variant in variants and (named or not only)):
                chosen.append(task)
    if unknown:
        names = ", ".join(part.name for part in parts)
        raise UserError(f"--only {','.join(sorted(unknown))}: no such part; the parts are {names}")
    return chosen


def stages(chosen: Sequence[Task], dry: bool) -> Iterator[list[Task]]:
    """The tasks that run at the same time, stage after stage; in a dry run, which times nothing, all of them."""
    if dry:
        yield list(chosen)
        return
    for stage, together in groupby(chosen, key=lambda task: task.part.stage):
        if stage == ALONE:
            yield from ([task] for task in together)
        else:
            yield list(together)
