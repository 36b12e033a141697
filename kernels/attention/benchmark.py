"""How fast FP8 attention is beside PyTorch's in bf16, with its errors, its quantisation counted in and out.

TFLOP/s by the usual counts, 4 N^2 D a head forward and 10 N^2 D backward, whatever a kernel really computes.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptface_dist.errors import UserError
from gptface_dist.kernels.attention import cudnn, operator
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options, Sequences
from gptface_dist.kernels.attention.reference import exact

TOKENS = (333, 1024, 2048, 4096, 8192)
SIZES = (64, 128)

Timer = Callable[[Callable[[], object]], float]
"""Median milliseconds of a call."""


@dataclass(frozen=True)
class Shape:
    """What is attended to: about 16 384 tokens and 2 048 channels at the usual sizes."""

    tokens: int
    """N of each sequence; all are full."""
    size: int
    """D of each head."""
    batch: int
    """Sequences."""
    heads: int
    """Heads."""

    @classmethod
    def usual(cls, tokens: int, size: int) -> "Shape":
        """The shape that fills a GPU."""
        return cls(tokens, size, max(1, 16384 // tokens), 2048 // size)

    def teraflops(self, milliseconds: float, passes: int) -> float:
        """TFLOP/s of ``passes`` products of N^2 D (2 forward, 5 backward)."""
        return 2 * passes * self.tokens**2 * self.size * self.batch * self.heads / milliseconds / 1e9


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
    out_error: float | None
    """Relative error of the output against float64, on one head of one sequence; None where it is another row's."""
    gradient_error: float | None
    """The worst such error of the gradients."""


def require_gpu() -> torch.device:
    """The GPU to measure; :class:`UserError` without one."""
    if not torch.cuda.is_available():
        raise UserError("bench attention needs a CUDA GPU: none was found, so nothing was measured")
    return torch.device("cuda", torch.cuda.current_device())


def hardware(device: torch.device) -> str:
    """The GPU and versions, for the head of a table."""
    import triton

    return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}, triton {triton.__version__}"


def cuda_timer(rounds: int) -> Timer:
    """Times on the GPU, after warming up, with the cache emptied before every call."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def timed(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        found = []
        for _ in range(rounds):
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
        return statistics.median(found)

    return timed


def ceilings(timer: Timer, device: torch.device, side: int = 8192) -> tuple[float, float, float]:
    """GB/s of a copy (read and written), TFLOP/s of a bf16 and of an FP8 matrix product, of random data, by PyTorch."""
    source = torch.randn(side, side, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e6
    half = source.bfloat16()
    bf16 = 2 * side**3 / timer(lambda: half @ half) / 1e9
    eight, one = source.to(torch.float8_e4m3fn), torch.ones((), device=device)
    fp8 = timer(lambda: torch._scaled_mm(eight, eight.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return bandwidth, bf16, 2 * side**3 / fp8 / 1e9


def compare(shape: Shape, timer: Timer, device: torch.device, specialize: bool, qk_norm: bool = False) -> Iterator[Speed | str]:
    """Time every way on one shape, with QK-norm if asked for; a string says which way cannot be timed, and why."""
    generator = torch.Generator(device).manual_seed(0)
    form = (shape.batch, shape.tokens, shape.heads, shape.size)
    q, k, v, dout = (torch.randn(form, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
    unit = torch.tensor([[1.0], [0.0]], device=device, dtype=torch.bfloat16).expand(2, shape.size).contiguous()
    norm = QkNorm(unit, unit, 1e-5) if qk_norm else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)
    sequences = Sequences.padded(lengths, shape.tokens)
    one = (slice(0, 1), slice(None), slice(0, 1))
    true = _true(q[one].detach(), k[one].detach(), v[one].detach(), lengths[:1], dout[one], norm)

    def normed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if norm is None else norm(q, k)

    def timed(way: str, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Speed:
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        errors = [
            float((found[one].double() - wanted).norm() / wanted.norm())
            for found, wanted in zip((out.detach(), *gradients), true, strict=True)
        ]
        # Gradients are wanted: the forward pass is timed with all that it keeps for them.
        forward = timer(lambda: attention(*leaves))
        backward = timer(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        return Speed(way, shape, forward, backward, errors[0], max(errors[1:]))

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            q, k = normed(q, k)
            with sdpa_kernel(backend):
                heads_first = (x.transpose(1, 2) for x in (q, k, v))
                attended: Tensor = F.scaled_dot_product_attention(*heads_first)  # type: ignore[arg-type]
            return attended.transpose(1, 2)

        way = f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"
        try:
            yield timed(way, sdpa)
        except RuntimeError as error:
            yield f"{way}: {str(error).splitlines()[0]}"
    given = [x.detach() for x in (*normed(q, k), v, dout)]
    yield _cudnn(given, shape, timer, _true(given[0][one], given[1][one], given[2][one], lengths[:1], dout[one], None))
    for specialized in (False, True) if specialize else (False,):
        for backward in BACKWARDS:
            options = Fp8Options(backward, warp_specialize=specialized)
            way = f"fp8, backward {backward}{', specialised' if specialized else ''}"

            def eight(q: Tensor, k: Tensor, v: Tensor, options: Fp8Options = options) -> Tensor:
                return operator.fp8_attention(q, k, v, sequences, options, norm)

            def apart(q: Tensor, k: Tensor, v: Tensor, options: Fp8Options = options) -> Tensor:
                return operator.fp8_attention(*normed(q, k), v, sequences, options)

            yield timed(way, eight)
            if norm is not None:
                yield timed(f"{way}, QK-norm apart", apart)
            forward_alone, backward_alone = _alone(given[0], given[1], given[2], dout, sequences, options, timer)
            yield Speed(f"{way}, quantised before", shape, forward_alone, backward_alone, None, None)


def _true(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, dout: Tensor, norm: QkNorm | None) -> list[Tensor]:
    """Output and gradients of q, k, v in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k)]
    given = leaves if norm is None else list(norm(leaves[0], leaves[1]))
    true = exact(given[0].detach(), given[1].detach(), v, lengths, dout)
    dq, dk = torch.autograd.grad(given, leaves, [true.dq, true.dk])
    return [true.out, dq, dk, true.dv]


def _cudnn(given: list[Tensor], shape: Shape, timer: Timer, true: list[Tensor]) -> Speed | str:
    """cuDNN's FP8 attention of normalised bf16 q, k, v and the output's gradient, its tensors quantised before."""
    why = cudnn.missing()
    if why is not None:
        return f"cudnn fp8: {why}"
    try:
        attention = cudnn.CudnnFp8(*given)
        found = [x[:1, :, :1].double() for x in attention.results()]
        errors = [float((x - wanted).norm() / wanted.norm()) for x, wanted in zip(found, true, strict=True)]
        forward, backward = timer(attention.forward), timer(attention.backward)
    # Whatever another package cannot do must not take our table with it; cuDNN's errors have no class in common.
    except Exception as error:
        return f"cudnn fp8: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Speed("cudnn fp8, quantised before", shape, forward, backward, errors[0], max(errors[1:]))


def _alone(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sequences: Sequences, options: Fp8Options, timer: Timer
) -> tuple[float, float]:  # fmt: skip
    """Milliseconds of the kernels of attention and of its gradients, without those that make FP8 copies."""
    from gptface_dist.kernels.attention import backward as kernels
    from gptface_dist.kernels.attention.forward import forward
    from gptface_dist.kernels.attention.prepare import Result, prepare
    from gptface_dist.kernels.attention.quantise import Tiles, quantise

    kind, specialize, factor = options.backward, options.warp_specialize, 1 / math.sqrt(q.shape[-1])

    def both() -> tuple[float, float]:
        tiles = Tiles.of(sequences, q.shape[:-2].numel())
        x = quantise(q, k, v, tiles, options.smooth, kind, torch.float8_e4m3fn)

        def attend() -> tuple[Tensor, Tensor, Tensor]:
            return forward(x, tiles, q, factor * math.log2(math.e), specialize)

        result = Result(*attend())
        prepared = prepare(dout, x, result, tiles, kind)
        return timer(attend), timer(lambda: kernels.backward(prepared, x, result, tiles, factor, kind, specialize))

    with torch.no_grad():
        return operator.launched(both)


def crossover(speeds: list[Speed], backward: str) -> int | None:
    """Fewest tokens from which FP8 with this backward pass, quantisation included, always beats the best of PyTorch's.

    Forward and backward together, at every head size measured; None if not even at the longest.
    """
    found = None
    for tokens in sorted({speed.shape.tokens for speed in speeds}, reverse=True):
        here = [speed for speed in speeds if speed.shape.tokens == tokens]
        for size in {speed.shape.size for speed in here}:
            total = {speed.way: speed.forward + speed.backward for speed in here if speed.shape.size == size}
            rivals = [time for way, time in total.items() if way.startswith("sdpa")]
            if not rivals or total[f"fp8, backward {backward}"] >= min(rivals):
                return found
        found = tokens
    return found
