"""Layout of a run over processes, with every rule on which sizes may combine."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of parallelism. Rank order: tensor-parallel fastest, then data, then pipeline."""

    dp: int = 1
    """Data-parallel replicas."""
    tp: int = 1
    """Tensor-parallel ranks that shard each layer."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual pipeline stages: model chunks that a pipeline rank holds (interleaved 1F1B)."""
    sp: bool = False
    """Sequence parallelism: between tensor-parallel linear layers, every rank holds a part of the sequence."""
    zero: int = 3
    """ZeRO stage, sharding over data-parallel ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    reshard_after_forward: bool = True
    """With zero=3: free gathered weights after each use and gather them again for the next (least memory), or keep them until
    the optimizer has changed them (least traffic: one all-gather a step)."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.tp * self.pp

    @property
    def chunks(self) -> int:
        """Number of model chunks, over all pipeline ranks and virtual stages."""
        return self.pp * self.vpp

    def __str__(self) -> str:
        parts = [f"DP{self.dp}", f"TP{self.tp}", f"PP{self.pp}"]
        parts += [f"VPP{self.vpp}"] * (self.vpp > 1) + ["SP"] * self.sp + [f"ZeRO-{self.zero}" if self.zero else "no ZeRO"]
        parts[-1] += " gathered once a step" * (not self.reshard_after_forward)
        return " x ".join(parts)

    def layers_of(self, chunk: int, layers: int) -> range:
        """Global layers of model chunk ``chunk`` (0 = first in the model); a remainder goes to the first chunks."""
        each, more = divmod(layers, self.chunks)
        start = chunk * each + min(chunk, more)
        return range(start, start + each + (chunk < more))

    def chunk(self, stage: int, vp_stage: int) -> int:
        """Model chunk of virtual stage ``vp_stage`` on pipeline rank ``stage``: chunks go round robin over the ranks."""
        return vp_stage * self.pp + stage

    def problems(self, model: ModelOptions, micro_batches: int, length: int | None = None) -> Iterator[str]:
        """Every reason why this layout cannot run the model: one sentence each, with the values and a legal one.

        ``micro_batches``: of one step on one replica; ``length``: padded length of sequences in tokens, if known.
        """
        for name in ("dp", "tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
                return
        if self.zero not in ZERO_STAGES:
            yield f"zero must be one of {ZERO_STAGES}, got {self.zero}"
        if not self.reshard_after_forward and self.zero != 3:
            yield f"reshard_after_forward=false is about weights that are sharded: it needs zero=3, got zero={self.zero}"
        for name in ("heads", "ffn"):
            if getattr(model, name) % self.tp:
                size = getattr(model, name)
                yield f"model.{name} {size} is not a multiple of tp {self.tp}: {_divisors(size)} would do"
        if self.sp and self.tp == 1:
            yield "sp divides sequences among tensor-parallel ranks: it needs tp of at least 2"
        if self.sp and length is not None and length % self.tp:
            yield f"with sp, the padded length {length} must be a multiple of tp {self.tp}: set data.batch.pad_to_multiple_of"
        if self.vpp > 1 and self.pp == 1:
            yield f"vpp {self.vpp} interleaves pipeline stages: it needs pp of at least 2"
        if self.chunks > model.layers:
            chunks = f"pp {self.pp} x vpp {self.vpp} = {self.chunks} chunks"
            yield f"{model.layers} layers cannot fill {chunks}: use {model.layers} at most"
        if self.vpp > 1 and micro_batches % self.pp:
            nearest = max(1, round(micro_batches / self.pp)) * self.pp
            wanted = f"a multiple of pp {self.pp} micro-batches a step"
            yield f"vpp needs {wanted}, got {micro_batches}: nearest is {nearest}"

    def check(self, world: int, model: ModelOptions, micro_batches: int, length: int | None = None) -> None:
        """Raise :class:`UserError` with all problems, before any process group exists; ``world``: number of processes."""
        problems = list(self.problems(model, micro_batches, length))
        if not problems and self.world != world:
            problems.append(
                f"{self} needs {self.world} processes, there are {world}: dp {max(1, world // (self.tp * self.pp))} would fit"
            )
        if problems:
            raise UserError(f"layout {self}: " + "; ".join(problems))


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0 and d <= 64)
