"""How fast FP8 attention is beside PyTorch's in bf16, with its errors, its quantisation counted in and out.

TFLOP/s by the usual counts, 4 N^2 D a head forward and 10 N^2 D backward, whatever a kernel really computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptface_dist.errors import first_line
from gptface_dist.kernels.attention import cudnn, operator
from gptface_dist.kernels.attention.kernel_set import KernelSet
from gptface_dist.kernels.attention.launch import DK_DV, DQ, FORWARD, load_table
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options
from gptface_dist.kernels.attention.reference import exact
from gptface_dist.kernels.attention.shapes import FULL, PACKED, PADDED, Shape
from gptface_dist.kernels.attention.timing import Timer

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v of a shape -> what is attended to, alike."""


@dataclass(frozen=True)
class Speed:
    """One way to compute attention, timed."""

    way: str
    """What was timed."""
    shape: Shape
    """Of what."""
    forward: float
    """Milliseconds."""
    backward: float
    """Milliseconds."""
    out_error: float | None = None
    """Relative error of the output against float64, on one head of the shortest sequence; None where it is another row's."""
    gradient_error: float | None = None
    """The worst such error of the gradients."""
    parts: dict[str, float] | None = None
    """Milliseconds of each kernel, where they were timed apart: :meth:`KernelSet.times`."""


@dataclass(frozen=True)
class Untimed:
    """One way that could not be timed."""

    way: str
    """Which."""
    shape: Shape
    """Of what."""
    reason: str
    """One line."""


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    specialize: bool = False
    """Whether the warp-specialised kernels are timed too."""
    qk_norm: bool = False
    """Whether queries and keys go through QK-norm, in every way."""
    launches: str = ""
    """See :class:`Fp8Options`."""
    model: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
    """PyTorch's attention as training calls it: of q, k, v [B, N, H, D] and a mask, bool [B, 1, 1, N], of the tokens that are
    seen, None where all are."""


def compare(shape: Shape, timer: Timer, device: torch.device, what: Comparison) -> Iterator[Speed | Untimed]:
    """Time every way on one shape, one after the other."""
    bench = _Bench(shape, timer, device, what.qk_norm)
    yield from bench.pytorch()
    if what.model is not None and shape.kind != PACKED:
        yield bench.time("sdpa as training calls it", bench.with_mask(what.model))
    if shape.kind == FULL:
        yield bench.cudnn()
    for specialized in (False, True) if what.specialize else (False,):
        for backward in BACKWARDS:
            options = Fp8Options(backward, warp_specialize=specialized, launches=what.launches)
            yield from bench.fp8(options, f"fp8, backward {backward}{', specialised' if specialized else ''}")


class _Bench:
    """The inputs of one shape, the truth, and ways to be timed on them."""

    def __init__(self, shape: Shape, timer: Timer, device: torch.device, qk_norm: bool):
        self.shape, self.timer, self.device = shape, timer, device
        q, k, v, self.dout = shape.inputs(device)
        unit = torch.tensor([[1.0], [0.0]], device=device, dtype=torch.bfloat16).expand(2, shape.size).contiguous()
        self.norm = QkNorm(unit, unit, 1e-5) if qk_norm else None
        self.leaves = [x.requires_grad_() for x in (q, k, v)]
        self.sequences = shape.sequences(device)
        given = [self.sample(x.detach()) for x in (*self.leaves, self.dout)]
        self.true = _true(given, self.norm)

    def sample(self, x: Tensor) -> Tensor:
        """One head of the first sequence, the shortest, of an input or gradient: [1, n, 1, D]."""
        count = self.shape.lengths()[0]
        return x[None, :count, :1] if self.shape.kind == PACKED else x[:1, :count, :1]

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys through QK-norm, where there is one."""
        return (q, k) if self.norm is None else self.norm(q, k)

    def time(self, way: str, attention: Attention) -> Speed | Untimed:
        """Time forward and backward pass of one way; an error gives :class:`Untimed`, so that the table goes on without it."""
        try:
            out = attention(*self.leaves)
            gradients = torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)
            errors = [
                float((self.sample(result).double() - wanted).norm() / wanted.norm())
                for result, wanted in zip((out.detach(), *gradients), self.true, strict=True)
            ]
            # Gradients are wanted: the forward pass is timed with all that it keeps for them.
            forward = self.timer(lambda: attention(*self.leaves))
            backward = self.timer(lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True))
        except Exception as error:
            return Untimed(way, self.shape, first_line(error))
        return Speed(way, self.shape, forward, backward, errors[0], max(errors[1:]))

    def pytorch(self) -> Iterator[Speed | Untimed]:
        """What PyTorch has for this kind of batch: for padding a mask of keys, which flash attention does not take."""
        if self.shape.kind == PACKED:
            yield self.time("varlen flash", self._varlen)
            return
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        if self.shape.kind == PADDED:
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        for backend in backends:
            yield self.time(f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}", self._sdpa(backend))

    def _sdpa(self, backend: SDPBackend) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                heads_first = (x.transpose(1, 2) for x in (q, k, v))
                attended: Tensor = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)  # type: ignore[misc,arg-type]
            return attended.transpose(1, 2)

        return self.with_mask(attend)

    def with_mask(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Attention:
        """An attention that is given normalised queries and keys, and a mask of keys where there is padding."""
        mask = self.sequences.seen(self.shape.batch).transpose(1, 3) if self.shape.kind == PADDED else None
        # seen: [B, N, 1, 1] -> [B, 1, 1, N].
        return lambda q, k, v: attend(*self.normed(q, k), v, mask)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Since torch 2.10.
        from torch.nn.attention.varlen import varlen_attn

        q, k = self.normed(q, k)
        boundaries = F.pad(self.sequences.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        attended = varlen_attn(q, k, v, boundaries, boundaries, self.shape.tokens, self.shape.tokens)
        return cast(Tensor, attended)

    def cudnn(self) -> Speed | Untimed:
        """cuDNN's FP8 attention of normalised q, k, v, its tensors quantised before."""
        way = "cudnn fp8, quantised before"
        why = cudnn.missing()
        if why is not None:
            return Untimed(way, self.shape, why)
        given = [x.detach() for x in (*self.normed(*self.leaves[:2]), self.leaves[2], self.dout)]
        true = _true([self.sample(x) for x in given], None)
        try:
            attention = cudnn.CudnnFp8(*given)
            results = [self.sample(x).double() for x in attention.results()]
            errors = [float((x - wanted).norm() / wanted.norm()) for x, wanted in zip(results, true, strict=True)]
            forward, backward = self.timer(attention.forward), self.timer(attention.backward)
        # cuDNN's errors have no class in common.
        except Exception as error:
            return Untimed(way, self.shape, first_line(error))
        return Speed(way, self.shape, forward, backward, errors[0], max(errors[1:]))

    def fp8(self, options: Fp8Options, way: str) -> Iterator[Speed | Untimed]:
        """Ours with its quantisation, with QK-norm apart, and its kernels one by one."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operator.fp8_attention(q, k, v, self.sequences, options, self.norm)

        def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operator.fp8_attention(*self.normed(q, k), v, self.sequences, options)

        yield self.time(way, attend)
        if self.norm is not None:
            yield self.time(f"{way}, QK-norm apart", apart)
        way += ", quantised before"
        try:
            table = load_table(options.launches)
            kernels = KernelSet(self.shape, options.backward, table, self.device, options.smooth, options.warp_specialize)
            times = kernels.times(self.timer)
        except Exception as error:
            yield Untimed(way, self.shape, first_line(error))
            return
        yield Speed(way, self.shape, times[FORWARD], times["prepare"] + times[DK_DV] + times[DQ], parts=times)


def _true(given: list[Tensor], norm: QkNorm | None) -> list[Tensor]:
    """Output and gradients in float64 of q, k, v and the output's gradient, [1, n, 1, D] each."""
    q, k, v, dout = given
    leaves = [x.double().requires_grad_() for x in (q, k)]
    normed = leaves if norm is None else list(norm(leaves[0], leaves[1]))
    lengths = torch.tensor([q.shape[1]], device=q.device)
    true = exact(normed[0].detach(), normed[1].detach(), v, lengths, dout)
    dq, dk = torch.autograd.grad(normed, leaves, [true.dq, true.dk])
    return [true.out, dq, dk, true.dv]


def crossover(speeds: list[Speed], backward: str) -> int | None:
    """Fewest tokens from which FP8 with this backward pass, quantisation included, always beats the best of PyTorch's.

    Forward and backward together, of full batches, at every head size measured; None if not even at the longest.
    """
    fewest = None
    for tokens in sorted({speed.shape.tokens for speed in speeds if speed.shape.kind == FULL}, reverse=True):
        timed = [speed for speed in speeds if speed.shape.tokens == tokens and speed.shape.kind == FULL]
        for size in {speed.shape.size for speed in timed}:
            total = {speed.way: speed.forward + speed.backward for speed in timed if speed.shape.size == size}
            rivals = [time for way, time in total.items() if way.startswith("sdpa")]
            own = total.get(f"fp8, backward {backward}")
            if not rivals or own is None or own >= min(rivals):
                return fewest
        fewest = tokens
    return fewest
