"""The report sees what goes wrong."""

import math

import pytest
import torch

from gptface_dist.kernels.attention.health import Health, health, sums
from gptface_dist.kernels.attention.options import Fp8Options
from tests.kernels.inputs import attention_inputs


def test_well_behaved_tensors_are_healthy() -> None:
    q, k, v, dout = attention_inputs("normal", 2, 96, 2, 64)
    q[1, 50:], v[1, 50:] = math.nan, math.inf
    found = health(q, k, v, torch.tensor([96, 50]), Fp8Options("fp8"), dout)
    assert set(found.shares) == {"q", "k", "v", "p", "dout", "ds", "weights"}
    assert all(shares.saturated == 0 for shares in found.shares.values())
    assert found.shares["q"].flushed < 0.002
    assert found.out_error < 0.07
    assert found.gradient_error is not None
    assert found.gradient_error < 0.09


def test_one_huge_value_flushes_the_rest_and_rotation_spreads_it() -> None:
    q, k, v, _ = attention_inputs("normal", 1, 96, 1, 64)
    q[0, 3, 0, 7] = 1e6
    sick = health(q, k, v, torch.tensor([96]), Fp8Options())
    assert sick.shares["q"].flushed > 0.9
    assert sick.out_error > 0.5
    assert sick.gradient_error is None
    assert set(sick.shares) == {"q", "k", "v", "p"}
    assert health(q, k, v, torch.tensor([96]), Fp8Options(hadamard=True)).out_error < sick.out_error / 3


def test_head_sizes_between_are_padded_and_rotated() -> None:
    q, k, v, dout = attention_inputs("normal", 1, 40, 1, 80)
    found = health(q, k, v, torch.tensor([40]), Fp8Options(hadamard=True), dout)
    assert found.out_error < 0.07
    assert (found.gradient_error or 1) < 0.09


def test_biased_keys_show_as_error_without_smoothing() -> None:
    inputs = attention_inputs("channel", 1, 96, 1, 64)
    lengths = torch.tensor([96])
    found = {smooth: health(*inputs[:3], lengths, Fp8Options("fp8", smooth), inputs[3]) for smooth in (True, False)}
    assert (found[False].gradient_error or 0) > 1.5 * (found[True].gradient_error or 1)


@pytest.mark.parametrize("lengths", [[0, 5], [0, 0]])
def test_empty_sequences_are_no_error(lengths: list[int]) -> None:
    q, k, v, dout = attention_inputs("normal", 2, 5, 1, 64)
    found = health(q, k, v, torch.tensor(lengths), Fp8Options(), dout)
    assert math.isfinite(found.out_error)
    assert math.isfinite(found.gradient_error or 0)


def test_padding_is_not_counted() -> None:
    q, k, v, _ = attention_inputs("normal", 1, 40, 1, 64)
    short = health(q[:, :20], k[:, :20], v[:, :20], torch.tensor([20]), Fp8Options())
    assert health(q, k, v, torch.tensor([20]), Fp8Options()).shares == short.shares


def test_sums_of_sequences_and_heads_may_be_added() -> None:
    """As tensor-parallel ranks do."""
    q, k, v, dout = attention_inputs("outlier", 2, 40, 3, 16)
    lengths, options = torch.tensor([40, 23]), Fp8Options("fp8")

    def part(heads: slice) -> torch.Tensor:
        return sums(q[:, :, heads], k[:, :, heads], v[:, :, heads], lengths, options, dout[:, :, heads])

    whole = part(slice(None))
    assert torch.allclose(whole, part(slice(1)) + part(slice(1, None)), rtol=1e-12)
    assert Health.of(whole) == health(q, k, v, lengths, options, dout)


def test_no_number_is_the_worst_error() -> None:
    q, k, v, dout = attention_inputs("normal", 1, 20, 1, 16)
    q[0, 3, 0, 3] = math.inf
    found = health(q, k, v, torch.tensor([20]), Fp8Options(), dout)
    assert found.out_error == found.gradient_error == math.inf
