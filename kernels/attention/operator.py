"""FP8 attention as PyTorch sees it: one function, differentiable, over an operator of ``torch.library``.

The operator runs the Triton kernels (compiled on CUDA; interpreted on a CPU under TRITON_INTERPRET=1). On a CPU without
the interpreter the same recipe runs in plain PyTorch: the same numbers, for small sizes. Scales are made anew from each
call's tensors, so there is no state to keep, to checkpoint, or to agree on between ranks; each head is on its own, so
tensor parallelism needs nothing.
"""

import contextvars
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.kernels.attention.emulator import emulated_attention
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import HEAD_SIZES, TILE, Fp8Options, Sequences

T = TypeVar("T")


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Fp8Options, norm: QkNorm | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V within each sequence, no causal mask, with products in FP8.

    Args:
        q: bf16 (or fp16, fp32) [B, N, H, D] or packed [T, H, D], D at most 128.
        k: likewise.
        v: likewise.
        sequences: which rows are tokens; what others hold, NaN included, has no influence.
        options: the recipe.
        norm: QK-norm, which Q and K have not been through yet. With heads of 64 or 128, and neither rotation nor warp
            specialisation, the kernels that make the FP8 copies apply it, in float32, and those of the gradients lead back
            through it; else it comes before them.

    Returns the attended values in q's shape and dtype; zero where there is no token. Its gradients flow to q, k, v and
    the norm's weights and biases.
    """
    sequences.check(q, k, v)
    if q.numel() == 0:
        return v.clone()
    size = q.shape[-1]
    factor = 1 / math.sqrt(size)
    launch = q.is_cuda or _interpreting()
    fused = norm is not None and size in HEAD_SIZES and not options.hadamard and not options.warp_specialize
    if norm is not None and not (fused and launch):
        seen = sequences.seen(len(q))
        # Float32 where the kernels would not round either.
        kind = torch.float32 if fused else q.dtype
        q, k = norm(*(torch.where(seen, x, 0).to(kind) for x in (q, k)))
    q, k, v = in_kernel_form(q, k, v, options)
    if launch:
        affine = norm.affine() if norm is not None and fused else None
        gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, affine))
        backward = options.backward if gradient else "none"
        out = _forward(
            q, k, v, affine, 0.0 if norm is None else norm.eps, sequences.lengths, sequences.starts, sequences.longest,
            factor, options.smooth, backward, options.warp_specialize, options.launches,
        )[0]  # fmt: skip
    else:
        out = _emulate(q, k, v, sequences, factor, options)
    return out[..., :size]


def in_kernel_form(q: Tensor, k: Tensor, v: Tensor, options: Fp8Options) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to a head size that the kernels compute, and rotated if the options want it; differentiable.

    Channels of zeros add nothing to scores and attend to nothing; a rotation of Q and K leaves their products as they are.
    """
    size = q.shape[-1]
    room = min(supported for supported in HEAD_SIZES if supported >= size)
    if room > size:
        q, k, v = (F.pad(x, (0, room - size)) for x in (q, k, v))
    if options.hadamard:
        rotation = hadamard(room).to(q)
        q, k = q @ rotation, k @ rotation
    return q, k, v


def hadamard(size: int) -> Tensor:
    """The orthogonal Sylvester-Hadamard matrix [size, size], ``size`` a power of two: entries +-1 / sqrt(size)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _interpreting() -> bool:
    """Whether this process interprets Triton's kernels; triton is not imported to find out that it does not."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _emulate(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, factor: float, options: Fp8Options) -> Tensor:
    """The recipe in plain PyTorch; a packed batch is padded for it."""
    if sequences.starts is None:
        return emulated_attention(q, k, v, sequences.lengths, factor, options)
    offsets = torch.arange(sequences.longest, device=q.device)
    seen = offsets < sequences.lengths.unsqueeze(1)
    rows = (sequences.starts.unsqueeze(1) + offsets)[seen]

    def padded(x: Tensor) -> Tensor:
        dense = x.new_zeros(*seen.shape, *x.shape[1:])
        dense[seen] = x[rows]
        return dense

    out = emulated_attention(padded(q), padded(k), padded(v), sequences.lengths, factor, options)
    return torch.zeros_like(v).index_put((rows,), out[seen])


def launched(function: Callable[[], T]) -> T:
    """Call a function that launches kernels: with repairs where they are interpreted, and with memory for descriptors
    that warp-specialised kernels make (the allocator holds for this call only).
    """
    import triton

    from gptface_dist.kernels.attention.interpreter import repaired

    def allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    def prepared() -> T:
        triton.set_allocator(allocate)
        with repaired():
            return function()

    return contextvars.copy_context().run(prepared)


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with one set of strides and a contiguous last axis, copied only where they have others."""
    if q.stride(-1) == 1 and q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


_Saved = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("gptface::fp8_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, affine: Tensor | None, eps: float, lengths: Tensor, starts: Tensor | None,
    longest: int, factor: float, smooth: bool, backward: str, specialize: bool, launches: str,
) -> _Saved:  # fmt: skip
    """Output, lse, p_max, and the fields of Quantised in their order."""

    def launch() -> _Saved:
        from gptface_dist.kernels.attention.forward import forward
        from gptface_dist.kernels.attention.launch import FORWARD, load_table
        from gptface_dist.kernels.attention.quantise import Tiles, quantise

        tiles = Tiles.of(Sequences(lengths, starts, longest), q.shape[:-2].numel())
        x = quantise(*_alike(q, k, v), tiles, smooth, backward, torch.float8_e4m3fn, affine, eps)
        how = load_table(launches).of(FORWARD, q.shape[-1], backward, specialize)
        result = forward(x, tiles, q, factor * math.log2(math.e), how)
        return cast(_Saved, (*result, *x.tensors()))

    return launched(launch)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, affine: Tensor | None, eps: float, lengths: Tensor, starts: Tensor | None,
    longest: int, factor: float, smooth: bool, backward: str, specialize: bool, launches: str,
) -> _Saved:  # fmt: skip
    heads, size, batch = q.shape[-2], q.shape[-1], lengths.shape[0]
    capacity = (q.shape[:-2].numel() // TILE + batch) * TILE
    eight, half = torch.float8_e4m3fn, torch.bfloat16
    by_row, by_column, none = (heads * capacity, size), (heads * size, capacity), (0,)
    back, kind = {"none": (none, eight), "bf16": (by_row, half)}.get(backward, (by_column, eight))

    def floats(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    return (
        q.new_empty(q.shape),
        floats(heads * capacity),
        floats(heads * capacity),
        q.new_empty(by_row, dtype=eight),
        q.new_empty(by_row, dtype=eight),
        q.new_empty(by_column, dtype=eight),
        q.new_empty(back, dtype=kind),
        q.new_empty(back, dtype=kind),
        q.new_empty(none if backward == "none" else by_row, dtype=eight if backward == "fp8" else half),
        floats(batch, heads, 2),
        floats(batch, heads, size),
        floats(batch, heads, size),
        floats(batch, heads),
    )


@torch.library.custom_op("gptface::fp8_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, saved: list[Tensor], q: Tensor | None, k: Tensor | None, affine: Tensor | None, eps: float,
    lengths: Tensor, starts: Tensor | None, longest: int, factor: float, backward: str, specialize: bool, launches: str,
) -> _Gradients:  # fmt: skip
    """Gradients of q, k, v and ``affine`` (empty without one); ``saved`` is what the forward operator returned.

    q and k are wanted with ``affine`` only.
    """

    def launch() -> _Gradients:
        from gptface_dist.kernels.attention import backward as kernels
        from gptface_dist.kernels.attention.launch import load_table
        from gptface_dist.kernels.attention.prepare import Result, prepare
        from gptface_dist.kernels.attention.quantise import Quantised, Tiles

        tiles = Tiles.of(Sequences(lengths, starts, longest), dout.shape[:-2].numel())
        result, x = Result(*saved[:3]), Quantised(*saved[3:])
        prepared = prepare(dout.contiguous(), x, result, tiles, backward)
        norm = None
        if q is not None and k is not None and affine is not None:
            raw_q, raw_k, _ = _alike(q, k, k)
            norm = kernels.Normalised(raw_q, raw_k, affine, eps)
        given = kernels.Inputs(prepared, x, result, tiles, factor, backward, norm)
        return kernels.backward(given, load_table(launches), specialize)

    return launched(launch)


@_backward.register_fake
def _(
    dout: Tensor, saved: list[Tensor], q: Tensor | None, k: Tensor | None, affine: Tensor | None, eps: float,
    lengths: Tensor, starts: Tensor | None, longest: int, factor: float, backward: str, specialize: bool, launches: str,
) -> _Gradients:  # fmt: skip
    like = saved[0]
    daffine = like.new_empty(0 if affine is None else affine.shape, dtype=torch.float32)
    return like.new_empty(like.shape), like.new_empty(like.shape), like.new_empty(like.shape), daffine


def _keep(ctx: Any, inputs: tuple[Any, ...], output: _Saved) -> None:
    q, k, _, affine, ctx.eps, lengths, starts, ctx.longest, ctx.factor, _, *ctx.how = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    raw = (None, None) if affine is None else (q, k)
    ctx.save_for_backward(*raw, affine, lengths, starts, *output)


def _differentiate(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 13
    q, k, affine, lengths, starts, *saved = ctx.saved_tensors
    dq, dk, dv, daffine = _backward(dout, saved, q, k, affine, ctx.eps, lengths, starts, ctx.longest, ctx.factor, *ctx.how)
    return dq, dk, dv, None if affine is None else daffine, *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_keep)
