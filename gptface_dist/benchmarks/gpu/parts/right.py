"""The compiled attention kernels: against float64 and the emulator, and what must hold to the bit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.benchmarks.gpu.inputs import KINDS, attention_inputs
from gptface_dist.benchmarks.gpu.plan import SPECIALIZED
from gptface_dist.kernels.attention.emulator import emulated_attention
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.operator import fp8_attention
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options, Sequences
from gptface_dist.kernels.attention.reference import exact

TOKENS = (333, 1024, 4096)
FROM_FLOAT64, UNSMOOTHED_FROM_FLOAT64 = 0.15, 0.25
"""Largest relative error (root mean square) of FP8; the emulator's own largest on these inputs are 0.13 and 0.19."""
FROM_EMULATOR = 0.012
"""Rounding to bf16 in the end, and sums in another order."""
NAMES = ("out", "dq", "dk", "dv", "dnorm_q", "dnorm_k")


@dataclass(frozen=True)
class Case:
    """One recipe on one input."""

    tokens: int
    """N of the longer of two sequences."""
    size: int
    """D."""
    backward: str
    """Of :class:`Fp8Options`."""
    inputs: str = "normal"
    """One of :data:`KINDS`."""
    smooth: bool = True
    """Of :class:`Fp8Options`."""
    specialized: bool = False
    """Whether the kernels are warp-specialised."""
    qk_norm: bool = False
    """Whether Q and K go through QK-norm inside."""

    def options(self) -> Fp8Options:
        """The recipe."""
        return Fp8Options(self.backward, smooth=self.smooth, warp_specialize=self.specialized)


def cases(size: int, mode: str, dry: bool) -> Iterator[Case]:
    """What a variant checks, short sequences first."""
    special = mode == SPECIALIZED
    for tokens in (40,) if dry else TOKENS:
        for backward in BACKWARDS if special else (mode,):
            for kind in ("normal",) if dry or tokens > 1024 else KINDS:
                yield Case(tokens, size, backward, kind, specialized=special)
            yield Case(tokens, size, backward, "channel", smooth=False, specialized=special)
            # Warp-specialised kernels cannot share out the norm's sums, so it comes before them there.
            if not special:
                yield Case(tokens, size, backward, qk_norm=True)


def run(context: Context) -> None:
    """Check one head size with one backward mode, or all of them warp-specialised."""
    size, mode = context.variant.split("-")
    for case in cases(int(size), mode, context.dry):
        context.attempt(asdict(case), lambda case=case: check(context, case))  # type: ignore[misc]


def check(context: Context, case: Case) -> None:
    """Run the kernels on one case, and record how far they are from what is right."""
    device = context.device()
    q, k, v, dout = (x.to(device) for x in attention_inputs(case.inputs, 2, case.tokens, 1 if context.dry else 2, case.size, 1))
    lengths = torch.tensor([case.tokens, case.tokens * 7 // 10], dtype=torch.int32, device=device)
    norm = _norm(case.size, device) if case.qk_norm else None
    seen = (torch.arange(case.tokens, device=device) < lengths[:, None])[..., None, None]
    given, poisoned = ([torch.where(seen, x, fill) for x in (q, k, v, dout)] for fill in (0.0, math.nan))
    padded, options = Sequences.padded(lengths, case.tokens), case.options()
    out = kernels(given, padded, options, norm)
    inside = seen[..., 0, 0]
    packed = kernels([x[inside] for x in given], Sequences.packed(_boundaries(lengths), case.tokens), options, norm)
    holds = {
        "finite": all(bool(x.isfinite().all()) for x in out),
        "same bits twice": same_bits(out, kernels(given, padded, options, norm)),
        "same bits packed": same_bits([*(x[inside] for x in out[:4]), *out[4:]], packed),
        "padding has no influence": same_bits(out, kernels(poisoned, padded, options, norm)),
    }
    limit = FROM_FLOAT64 if case.smooth else UNSMOOTHED_FROM_FLOAT64
    measured = dict(zip(NAMES, ((error, limit) for error in apart(out, oracle(given, lengths, norm))), strict=False))
    measured["from_emulator"] = (worst(out, emulated(given, lengths, options, norm)), FROM_EMULATOR)
    if case.specialized:
        plain = kernels(given, padded, replace(options, warp_specialize=False), norm)
        measured["from_plain"] = (worst(out, plain), FROM_EMULATOR)
    context.check(asdict(case), measured, **holds)


def kernels(given: Sequence[Tensor], sequences: Sequences, options: Fp8Options, norm: QkNorm | None) -> list[Tensor]:
    """Output and gradients of q, k, v and, with QK-norm, of its weights and biases; ``given`` is q, k, v, dout."""
    leaves = _leaves(given, norm)
    out = fp8_attention(leaves[0], leaves[1], leaves[2], sequences, options, _with(leaves, norm))
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def emulated(given: Sequence[Tensor], lengths: Tensor, options: Fp8Options, norm: QkNorm | None) -> list[Tensor]:
    """The same by the recipe in plain PyTorch, with the norm in float32, as the kernels have it in registers."""
    leaves = _leaves(given, norm)
    q, k, v = leaves[:3]
    applied = _with(leaves, norm)
    if applied is not None:
        q, k = applied(q.float(), k.float())
    out = emulated_attention(q, k, v, lengths, 1 / math.sqrt(v.shape[-1]), options)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def oracle(given: Sequence[Tensor], lengths: Tensor, norm: QkNorm | None) -> list[Tensor]:
    """The same in float64."""
    leaves = [x.double().requires_grad_() for x in (given[0], given[1], *(() if norm is None else (norm.q, norm.k)))]
    q, k = leaves[:2] if norm is None else QkNorm(leaves[2], leaves[3], norm.eps)(leaves[0], leaves[1])
    true = exact(q.detach(), k.detach(), given[2], lengths, given[3])
    dq, dk, *rest = torch.autograd.grad([q, k], leaves, [true.dq, true.dk])
    return [true.out, dq, dk, true.dv, *rest]


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """Relative error of each tensor: root mean square of the difference as a part of the wanted one's."""
    norms = [(float((a.double() - b.double()).norm()), float(b.double().norm())) for a, b in zip(found, wanted, strict=True)]
    return [difference / max(norm, 1e-30) for difference, norm in norms]


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of :func:`apart`; NaN where one is, which Python's own max would pass over."""
    return float(torch.tensor(apart(found, wanted)).max())


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal; NaN is equal to nothing."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _leaves(given: Sequence[Tensor], norm: QkNorm | None) -> list[Tensor]:
    weights = () if norm is None else (norm.q, norm.k)
    return [x.detach().clone().requires_grad_() for x in (*given[:3], *weights)]


def _with(leaves: Sequence[Tensor], norm: QkNorm | None) -> QkNorm | None:
    return None if norm is None else QkNorm(leaves[3], leaves[4], norm.eps)


def _norm(size: int, device: torch.device) -> QkNorm:
    """Weights and biases as training leaves them, and an epsilon that would be missed."""
    generator = torch.Generator().manual_seed(5)
    unit = torch.tensor([[1.0], [0.0]])
    q, k = ((torch.randn(2, size, generator=generator) * 0.3 + unit).to(device) for _ in range(2))
    return QkNorm(q, k, 0.05)


def _boundaries(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(lengths.dtype)])
