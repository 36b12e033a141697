"""The table of parameters: global name and shape, initial value, weight decay, and placement in a layout.

Names and shapes are those of the plain model. Initialisation, checkpoints, conversion and the parity check all derive shards
from this table.
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
    """Tensor-parallel sharding of a parameter: rank ``t`` of ``T`` holds the ``t``-th of ``T`` ranges along ``axis``."""

    axis: int
    """Axis that is sharded."""
    parts: int = 1
    """Equal parts along the axis, each sharded on its own: 2 for the fused gate and value of swiglu."""

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """One rank's shard of a whole tensor, [.., ceil(n / size), ..] along the axis; padding rows (words only) are zero."""
        chunks = []
        for part in whole.chunk(self.parts, self.axis):
            each = -(-part.shape[self.axis] // size)
            start = min(rank * each, part.shape[self.axis])
            chunk = part.narrow(self.axis, start, min(each, part.shape[self.axis] - start))
            padding = list(chunk.shape)
            padding[self.axis] = each - padding[self.axis]
            chunks.append(torch.cat([chunk, chunk.new_zeros(padding)], self.axis))
        return torch.cat(chunks, self.axis)

    def spans(self, length: int, rank: int, size: int) -> list[tuple[int, int, int]]:
        """Map a shard's rows along the axis to the whole of ``length`` rows: (first in the shard, first in the whole, how
        many) for each part with rows on this rank. Other rows of the shard are padding.
        """
        part = length // self.parts
        each = -(-part // size)
        local = min(each, part - rank * each)
        return [(number * each, number * part + rank * each, local) for number in range(self.parts) if local > 0]

    def join(self, shards: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Concatenate all ranks' shards, in rank order, to the whole of ``shape``; padding is dropped."""
        chunks = [shard.chunk(self.parts, self.axis) for shard in shards]
        whole = torch.cat([parts[number] for number in range(self.parts) for parts in chunks], self.axis)
        return whole.narrow(self.axis, 0, shape[self.axis])


@dataclass(frozen=True)
class ParameterSpec:
    """Entry of the table: one parameter of the model."""

    name: str
    """Global name: that of the plain model."""
    shape: tuple[int, ...]
    """Shape in the plain model: whole, without padding."""
    layer: int | None
    """Global layer it belongs to; None for embeddings (first stage) and heads (last stage)."""
    sharding: TensorParallelSharding | None
    """Tensor-parallel sharding; None for a parameter that every tensor-parallel rank holds whole."""
    std: float | None
    """Standard deviation of its normal initial values; None if they are all ``constant``."""
    constant: float
    """Initial value if ``std`` is None."""
    decay: bool
    """Whether weight decay applies: true but for norms, biases, other constants and embeddings."""
    tied: bool
    """Whether it is the word embeddings of a model that predicts tokens, hence also the output weights."""

    @property
    def on_first_stage(self) -> bool:
        """Whether the first pipeline stage holds it: an embedding."""
        return self.name.startswith("embeddings.")

    @property
    def on_last_stage(self) -> bool:
        """Whether the last pipeline stage holds it: part of a head or the final norm, or tied (then on both stages)."""
        return self.tied or (self.layer is None and not self.on_first_stage)

    def initial(self, seed: int) -> Tensor:
        """Float32 initial value, a function of (seed, name, shape) alone: every layout starts from the same weights."""
        if self.std is None:
            return torch.full(self.shape, self.constant)
        # torch takes a signed 64-bit seed.
        generator = torch.Generator().manual_seed(stable_hash(f"{seed} {self.name}") >> 1)
        return torch.randn(self.shape, generator=generator) * self.std


def tensor_parallel_sharding(name: str, options: ModelOptions) -> TensorParallelSharding | None:
    """Sharding by global name (Shoeybi et al. 2019: first linear layer by columns, second by rows); None: replicated."""
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
    """Entries of all parameters of a plain model, in its order; the model may be on torch's meta device."""
    for name, tensor in model.named_parameters():
        layer = LAYER.match(name)
        owner, _, key = name.rpartition(".")
        declared = getattr(model.get_submodule(owner), "initial_values", {})
        std = None if key in declared else initial_std(name, model.options)
        yield ParameterSpec(
            name=name,
            shape=tuple(tensor.shape),
            layer=int(layer.group(1)) if layer else None,
            sharding=tensor_parallel_sharding(name, model.options),
            std=std,
            constant=declared.get(key, 0.0 if key == "bias" else 1.0),
            decay=std is not None and not name.startswith("embeddings."),
            tied=name == "embeddings.word.weight" and hasattr(model, "token_head"),
        )


def initialise(model: Transformer, seed: int) -> None:
    """Fill a plain model with :meth:`ParameterSpec.initial`, in place."""
    with torch.no_grad():
        for parameter in parameters(model):
            model.get_parameter(parameter.name).copy_(parameter.initial(seed))
