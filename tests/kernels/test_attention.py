"""The kernels (interpreted without a GPU) against the recipe in plain PyTorch and the oracle, and what must hold exactly."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptface_dist.kernels.attention import emulator, operator
from gptface_dist.kernels.attention.backward import Inputs, Normalised
from gptface_dist.kernels.attention.backward import backward as gradients
from gptface_dist.kernels.attention.forward import forward
from gptface_dist.kernels.attention.launch import FORWARD, load_table
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options, Sequences
from gptface_dist.kernels.attention.prepare import Result, prepare
from gptface_dist.kernels.attention.quantise import Tiles, quantise
from gptface_dist.kernels.attention.reference import exact
from tests.kernels.inputs import KINDS, attention_inputs, relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Norm = QkNorm | None


def inputs(kind: str, batch: int, tokens: int, heads: int, size: int, seed: int = 1) -> list[Tensor]:
    return [x.bfloat16().to(DEVICE) for x in attention_inputs(kind, batch, tokens, heads, size, seed)]


def with_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sequences: Sequences, options: Fp8Options | None = None, norm: Norm = None
) -> list[Tensor]:  # fmt: skip
    """Output and gradients of q, k, v, and with QK-norm of the weights and biases of q's and of k's."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *(() if norm is None else (norm.q, norm.k)))]
    normed = None if norm is None else QkNorm(leaves[3], leaves[4], norm.eps)
    out = operator.fp8_attention(leaves[0], leaves[1], leaves[2], sequences, options or Fp8Options(), normed)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def norms(size: int, dtype: torch.dtype = torch.float32) -> QkNorm:
    """Weights and biases as training leaves them, and an epsilon that would be missed."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, size, generator=generator) * 0.3 + torch.tensor([[1.0], [0.0]]) for _ in range(2))
    return QkNorm(q.to(DEVICE, dtype), k.to(DEVICE, dtype), 0.05)


def true_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lengths: Tensor, norm: Norm = None
) -> list[Tensor]:  # fmt: skip
    """The same in float64."""
    seen = (torch.arange(q.shape[1], device=q.device) < lengths[:, None])[..., None, None]
    leaves = [torch.where(seen, x, 0).double().requires_grad_() for x in (q, k)]
    leaves += [] if norm is None else [x.double().requires_grad_() for x in (norm.q, norm.k)]
    given = leaves[:2] if norm is None else list(QkNorm(leaves[2], leaves[3], norm.eps)(leaves[0], leaves[1]))
    true = exact(given[0].detach(), given[1].detach(), v, lengths, dout)
    dq, dk, *rest = torch.autograd.grad(given, leaves, [true.dq, true.dk])
    return [true.out, dq, dk, true.dv, *rest]


def padded(lengths: list[int], longest: int) -> Sequences:
    return Sequences.padded(torch.tensor(lengths, device=DEVICE), longest)


RECIPES = [
    *((kind, backward, size, False) for kind in ("channel", "sink") for backward in BACKWARDS for size in (64, 128)),
    *(("channel", backward, size, True) for backward, size in zip(BACKWARDS, (64, 128, 64), strict=True)),
]


@pytest.mark.parametrize(("kind", "backward", "size", "normed"), RECIPES)
def test_kernels_compute_the_recipe(kind: str, backward: str, size: int, normed: bool) -> None:
    q, k, v, dout = inputs(kind, 2, 130, 2, size)
    options, lengths, norm = Fp8Options(backward), torch.tensor([130, 65], device=DEVICE), norms(size) if normed else None
    found = with_gradients(q, k, v, dout, padded([130, 65], 130), options, norm)
    factor = 1 / math.sqrt(size)
    raw = [x.float().requires_grad_() for x in ((q, k) if norm is None else (q, k, norm.q, norm.k))]
    given = raw if norm is None else QkNorm(raw[2], raw[3], norm.eps)(raw[0], raw[1])
    out, state = emulator.forward(given[0].detach(), given[1].detach(), v, lengths, factor, options)
    dq, dk, dv = emulator.backward(dout, state, factor, options)
    dq, dk, *rest = torch.autograd.grad(given, raw, [dq, dk])
    assert relative(found[0], out) < 4e-3
    for a, b in zip(found[1:4], (dq, dk, dv), strict=True):
        assert relative(a, b.bfloat16()) < 1e-2
    for a, b in zip(found[4:], rest, strict=True):
        assert relative(a, b) < 1e-2


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled, products of float32 are in TF32")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_kernels_that_round_nothing_are_exact(backward: str, normed: bool) -> None:
    """The algebra apart from FP8: float32 in place of FP8 and bf16."""
    lengths, size = torch.tensor([130, 0, 77], device=DEVICE), 64
    norm = norms(size) if normed else None
    q, k, v, dout = (x.float() for x in inputs("channel", 3, 130, 2, size))
    tiles, factor = Tiles.of(Sequences.padded(lengths, 130), 3 * 130), 1 / math.sqrt(size)

    def launch() -> list[Tensor]:
        normalised = None if norm is None else Normalised(q, k, norm.affine(), norm.eps)
        applied = () if normalised is None else (normalised.affine, normalised.eps)
        x = quantise(q, k, v, tiles, True, backward, torch.float32, *applied)
        table = load_table()
        how = table.of(FORWARD, size, backward, False)
        result = Result(*forward(x, tiles, q, factor * math.log2(math.e), how))
        given = Inputs(prepare(dout, x, result, tiles, backward), x, result, tiles, factor, backward, normalised)
        dq, dk, dv, daffine = gradients(given, table, False)
        return [result.out, dq, dk, dv, *([] if norm is None else daffine.chunk(2))]

    true = true_gradients(q, k, v, dout, lengths, norm)
    for a, b in zip(operator.launched(launch), true, strict=True):
        # The bias of keys moves all scores of a query alike: its gradient is nothing.
        assert relative(a, b) < 2e-5


@pytest.mark.parametrize("lengths", [[0, 1, 127, 128], [129, 64, 63, 0], [0, 0, 0, 0]])
def test_lengths_at_the_edges_of_tiles(lengths: list[int]) -> None:
    longest = max(*lengths, 1)
    q, k, v, dout = inputs("normal", 4, longest, 1, 64)
    found = with_gradients(q, k, v, dout, padded(lengths, longest))
    true = exact(q, k, v, torch.tensor(lengths, device=DEVICE), dout)
    for x, y in zip(found, (true.out, true.dq, true.dk, true.dv), strict=True):
        for b, length in enumerate(lengths):
            assert not x[b, length:].any()
            # One key: its weight is 1 whatever the query, and the true gradients of q and k are zero.
            if length > 1:
                assert relative(x[b, :length], y[b, :length]) < 0.12


@pytest.mark.parametrize("norm", [None, norms(64)], ids=["", "qk_norm"])
@pytest.mark.parametrize("options", [*map(Fp8Options, BACKWARDS), Fp8Options(hadamard=True)], ids=[*BACKWARDS, "hadamard"])
def test_what_padding_holds_has_no_influence(options: Fp8Options, norm: Norm) -> None:
    q, k, v, dout = inputs("normal", 2, 100, 1, 64)
    sequences = padded([100, 37], 100)
    clean = with_gradients(q, k, v, dout, sequences, options, norm)
    for x, poison in zip((q, k, v, dout), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        x[1, 37:] = poison
    for a, b in zip(with_gradients(q, k, v, dout, sequences, options, norm), clean, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 140), min_size=2, max_size=2).filter(any),
    slack=st.integers(0, 20),
    backward=st.sampled_from(BACKWARDS),
    normed=st.booleans(),
)
def test_packed_padded_and_alone_are_the_same_bits(lengths: list[int], slack: int, backward: str, normed: bool) -> None:
    longest, options, norm = max(lengths), Fp8Options(backward), norms(64) if normed else None
    q, k, v, dout = inputs("normal", len(lengths), longest, 2, 64)
    together = with_gradients(q, k, v, dout, padded(lengths, longest), options, norm)

    def pack(x: Tensor) -> Tensor:
        rows = [row[:length] for row, length in zip(x, lengths, strict=True)]
        return torch.cat([*rows, x.new_full((slack, *x.shape[2:]), math.nan)])

    boundaries = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    packed = with_gradients(*map(pack, (q, k, v, dout)), Sequences.packed(boundaries, longest), options, norm)
    for a, b in zip(together[:4], packed[:4], strict=True):
        assert torch.equal(pack(a)[: sum(lengths)], b[: sum(lengths)])
        assert not b[sum(lengths) :].any()
    for a, b in zip(together[4:], packed[4:], strict=True):
        assert torch.equal(a, b)
    for i, length in enumerate(lengths):
        if length:
            one = [x[i : i + 1, :length] for x in (q, k, v, dout)]
            for a, b in zip(together[:4], with_gradients(*one, padded([length], length), options, norm)[:4], strict=True):
                assert torch.equal(a[i, :length], b[0])


@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_scale_with_the_outputs_and_repeat_to_the_bit(backward: str) -> None:
    """No gradient is too small for FP8: its scale follows, exactly. (bf16 runs out of exponents below 2^-126.)"""
    q, k, v, dout = inputs("normal", 1, 70, 1, 64)
    sequences, options = padded([70], 70), Fp8Options(backward)
    plain = with_gradients(q, k, v, dout, sequences, options)
    for power in (0, -40, 30):
        scaled = with_gradients(q, k, v, dout * 2.0**power, sequences, options)
        assert torch.equal(scaled[0], plain[0])
        for a, b in zip(scaled[1:], plain[1:], strict=True):
            assert torch.equal(a, b * 2.0**power)


def test_keys_in_another_order_and_moved_give_the_same() -> None:
    q, k, v, _ = inputs("normal", 1, 256, 1, 64)
    sequences, options = padded([256], 256), Fp8Options()
    out = operator.fp8_attention(q, k, v, sequences, options)
    # Whole tiles in another order: sums in another order, the same rounding to FP8.
    turned = operator.fp8_attention(q, k.roll(128, 1), v.roll(128, 1), sequences, options)
    assert relative(turned, out) < 1e-3
    # A vector added to every key changes no softmax. 1 is added to values of bf16 that have room for it.
    coarse = (k * 8).round() / 8
    moved = operator.fp8_attention(q, coarse + 1, v, sequences, options)
    assert relative(moved, operator.fp8_attention(q, coarse, v, sequences, options)) < 5e-3


@pytest.mark.parametrize(
    ("size", "hadamard", "normed"), [(1, False, False), (24, False, True), (80, True, True), (64, True, True)]
)
def test_head_sizes_between(size: int, hadamard: bool, normed: bool) -> None:
    q, k, v, dout = inputs("normal", 1, 60, 2, size)
    norm = norms(size) if normed else None
    found = with_gradients(q, k, v, dout, padded([60], 60), Fp8Options(hadamard=hadamard), norm)
    true = true_gradients(q, k, v, dout, torch.tensor([60], device=DEVICE), norm)
    for a, b in zip(found[:4], true[:4], strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 0.12
    for a, b in zip(found[4:], true[4:], strict=True):
        assert relative(a, b) < 0.2


def test_any_strides() -> None:
    """Heads in front, and views of a fused projection."""
    q, k, v, dout = inputs("normal", 2, 50, 2, 64)
    sequences = padded([50, 20], 50)
    plain = with_gradients(q, k, v, dout, sequences)
    fused = torch.stack([q, k, v], 3).permute(1, 0, 2, 3, 4).contiguous()
    leaf = fused.requires_grad_()
    out = operator.fp8_attention(*leaf.permute(1, 0, 2, 3, 4).unbind(3), sequences, Fp8Options())
    (gradient,) = torch.autograd.grad(out, leaf, dout)
    for a, b in zip([out, *gradient.permute(1, 0, 2, 3, 4).unbind(3)], plain, strict=True):
        assert torch.equal(a, b)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for a, b in zip(with_gradients(*turned, dout.flip(0).flip(0), sequences), plain, strict=True):
        assert torch.equal(a, b)
    normed = with_gradients(q, k, v, dout, sequences, None, norms(64))
    for a, b in zip(with_gradients(*turned, dout, sequences, None, norms(64)), normed, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(with_gradients(q, turned[1], v, dout, sequences, None, norms(64)), normed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normed", [False, True])
def test_without_the_interpreter_a_cpu_computes_the_same(monkeypatch: pytest.MonkeyPatch, normed: bool) -> None:
    q, k, v, dout = (x.cpu() for x in inputs("channel", 2, 60, 1, 64))
    norm = QkNorm(norms(64).q.cpu(), norms(64).k.cpu(), 0.05) if normed else None
    boundaries = torch.tensor([0, 60, 71])
    rows = [x.flatten(0, 1)[:71] for x in (q, k, v, dout)]
    if DEVICE == "cpu":
        kernels = with_gradients(*rows, Sequences.packed(boundaries, 60), None, norm)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = with_gradients(*rows, Sequences.packed(boundaries, 60), None, norm)
    if DEVICE == "cpu":
        for a, b in zip(plain, kernels, strict=True):
            assert relative(a, b) < 4e-3
    true = true_gradients(*(x[None, :60] for x in rows), torch.tensor([60]), norm)
    assert relative(plain[0][:60], true[0][0]) < 0.07


@pytest.mark.parametrize(
    ("backward", "packed", "normed"),
    [("fp8", False, False), ("mixed", True, True), ("bf16", False, False), ("none", True, True)],
)
def test_the_operator_is_registered_soundly(backward: str, packed: bool, normed: bool) -> None:
    q, k, v, _ = inputs("normal", 2, 20, 1, 64)
    starts = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE) if packed else None
    lengths = torch.tensor([20, 9], dtype=torch.int32, device=DEVICE)
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    leaves = [x.requires_grad_(backward != "none") for x in (q, k, v, *((norms(64).affine(),) if normed else ()))]
    affine = leaves[3] if normed else None
    arguments = (*leaves[:3], affine, 1e-5, lengths, starts, 20, 0.1, True, backward, False, "")
    # The check under AOT dispatch sums outputs, and that of the schema alters inputs: FP8 has no operation for either.
    torch.library.opcheck(operator._forward, arguments, test_utils=("test_autograd_registration", "test_faketensor"))
    if backward != "none":
        saved = [x.detach() for x in operator._forward(*arguments)]
        raw = (q.detach(), k.detach(), leaves[3].detach()) if normed else (None, None, None)
        rest = (*raw, 1e-5, lengths, starts, 20, 0.1, backward, False, "")
        torch.library.opcheck(operator._backward, (saved[0], saved, *rest), test_utils="test_faketensor")


@pytest.mark.parametrize("normed", [False, True])
def test_compiled_and_recomputed_it_is_the_same(normed: bool) -> None:
    q, k, v, dout = inputs("normal", 2, 40, 1, 64)
    sequences, norm = padded([40, 11], 40), norms(64) if normed else None
    plain = with_gradients(q, k, v, dout, sequences, None, norm)

    def attend(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor) -> Tensor:
        given = None if norm is None else QkNorm(*affine, eps=norm.eps)
        return operator.fp8_attention(q, k, v, sequences, Fp8Options(), given)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for call in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *(() if norm is None else (norm.q, norm.k)))]
        out = call(*leaves)
        for a, b in zip([out, *torch.autograd.grad(out, leaves, dout)], plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("q", "k", "longest", "message"),
    [
        ((2, 5, 1, 64), (2, 6, 1, 64), 5, "one shape"),
        ((2, 5, 64), (2, 5, 64), 5, r"\[B, N, H, D\]"),
        ((2, 5, 1, 64), (2, 5, 1, 64), 6, "up to 6"),
        ((2, 5, 1, 129), (2, 5, 1, 129), 5, "head size 129"),
    ],
)
def test_misfits_are_refused(q: tuple[int, ...], k: tuple[int, ...], longest: int, message: str) -> None:
    sequences = Sequences.padded(torch.tensor([5, 5]), longest)
    with pytest.raises(ValueError, match=message):
        operator.fp8_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), sequences, Fp8Options())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_attend_to_is_no_error(kind: str) -> None:
    q, k, v, _ = inputs(kind, 1, 5, 1, 64)
    empty = [x[:, :0] for x in (q, k, v)]
    assert operator.fp8_attention(*empty, padded([0], 0), Fp8Options()).shape == (1, 0, 1, 64)
