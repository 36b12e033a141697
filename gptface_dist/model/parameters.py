"""The one table of parameters: global name and shape, initial value, and where each lives in a layout.

Names and shapes are those of the plain model. Everything that must know about shards (initialisation, checkpoints,
conversion, the parity check) asks here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptface_dist.hashing import stable_hash
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import Transformer, initial_std

LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorParallelSharding:
    """How tensor parallelism divides a parameter: rank ``t`` of ``T`` has the ``t``-th of ``T`` ranges along ``axis``."""

    axis: int
    """The axis that is divided."""
    parts: int = 1
    """Equal parts that are divided one by one and joined again: 2 for the fused gate and value of swiglu."""

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The shard of one rank, [.., ceil(n / size), ..] along the axis; rows beyond the whole (words only) are zero."""
        pieces = []
        for part in whole.chunk(self.parts, self.axis):
            each = -(-part.shape[self.axis] // size)
            start = min(rank * each, part.shape[self.axis])
            piece = part.narrow(self.axis, start, min(each, part.shape[self.axis] - start))
            missing = list(piece.shape)
            missing[self.axis] = each - missing[self.axis]
            pieces.append(torch.cat([piece, piece.new_zeros(missing)], self.axis))
        return torch.cat(pieces, self.axis)

    def spans(self, length: int, rank: int, size: int) -> list[tuple[int, int, int]]:
        """Where a shard's rows along the axis stand in the whole of ``length`` rows: (first in the shard, first in the
        whole, how many), one for each part that has any. Rows of the shard in none of them are padding.
        """
        part = length // self.parts
        each = -(-part // size)
        here = min(each, part - rank * each)
        return [(number * each, number * part + rank * each, here) for number in range(self.parts) if here > 0]

    def join(self, shards: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The whole, of ``shape``, of all ranks' shards in rank order."""
        pieces = [shard.chunk(self.parts, self.axis) for shard in shards]
        whole = torch.cat([piece[part] for part in range(self.parts) for piece in pieces], self.axis)
        return whole.narrow(self.axis, 0, shape[self.axis])


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model."""

    name: str
    """Global name: that of the plain model."""
    shape: tuple[int, ...]
    """Global shape."""
    layer: int | None
    """Global layer it belongs to; None for embeddings (first stage) and heads (last stage)."""
    sharding: TensorParallelSharding | None
    """How tensor parallelism divides it; None where every rank has all of it."""
    std: float | None
    """Standard deviation of its initial values; None where they are all ``constant``."""
    constant: float
    """Its initial value where ``std`` is None."""
    decay: bool
    """Whether weight decay applies: not to norms, biases, other constants and embeddings."""
    tied: bool
    """Whether it is the word embeddings of a model that predicts tokens: output weights too."""

    @property
    def on_first_stage(self) -> bool:
        """Whether the first pipeline stage has it because it embeds tokens."""
        return self.name.startswith("embeddings.")

    @property
    def on_last_stage(self) -> bool:
        """Whether the last pipeline stage has it because it predicts; tied embeddings are on both."""
        return self.tied or (self.layer is None and not self.on_first_stage)

    def initial(self, seed: int) -> Tensor:
        """Float32 initial value, a function of (seed, name, shape) alone: every layout starts from the same weights."""
        if self.std is None:
            return torch.full(self.shape, self.constant)
        # torch takes a signed 64-bit seed.
        generator = torch.Generator().manual_seed(stable_hash(f"{seed} {self.name}") >> 1)
        return torch.randn(self.shape, generator=generator) * self.std


def tensor_parallel_sharding(name: str, options: ModelOptions) -> TensorParallelSharding | None:
    """How tensor parallelism divides a parameter (Shoeybi et al. 2019): columns first, then rows."""
    if name == "embeddings.word.weight" or name == "token_head.bias":
        return TensorParallelSharding(0)
    tail = LAYER.sub("", name)
    if tail in ("qkv.weight", "qkv.bias"):
        return TensorParallelSharding(0)
    if tail in ("mlp_in.weight", "mlp_in.bias"):
        return TensorParallelSharding(0, parts=2 if options.activation == "swiglu" else 1)
    if tail in ("out_proj.weight", "mlp_out.weight"):
        return TensorParallelSharding(1)
    return None


def parameters(model: Transformer) -> Iterator[ParameterSpec]:
    """Every parameter of a plain model, which may be on torch's meta device, in its order."""
    for name, tensor in model.named_parameters():
        found = LAYER.match(name)
        owner, _, key = name.rpartition(".")
        declared = getattr(model.get_submodule(owner), "initial_values", {})
        std = None if key in declared else initial_std(name, model.options)
        yield ParameterSpec(
            name=name,
            shape=tuple(tensor.shape),
            layer=int(found.group(1)) if found else None,
            sharding=tensor_parallel_sharding(name, model.options),
            std=std,
            constant=declared.get(key, 0.0 if key == "bias" else 1.0),
            decay=std is not None and not name.startswith("embeddings."),
            tied=name == "embeddings.word.weight" and hasattr(model, "token_head"),
        )


def initialise(model: Transformer, seed: int) -> None:
    """Give a plain model its initial values."""
    with torch.no_grad():
        for parameter in parameters(model):
            model.get_parameter(parameter.name).copy_(parameter.initial(seed))
