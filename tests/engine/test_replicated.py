"""Buckets of replicated gradients; their sums and norms are proven by the layouts with zero=0 (test_parity)."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptface_dist.engine import replicated
from gptface_dist.engine.replicated import Replicated, _filled


@given(sizes=st.lists(st.integers(1, 9), min_size=1), limit=st.integers(1, 20))
def test_buckets_have_every_parameter_once_in_order_and_are_bounded(sizes: list[int], limit: int) -> None:
    parameters = [nn.Parameter(nn.Parameter().new_zeros(size)) for size in sizes]
    buckets = _filled(parameters, limit)
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    for bucket in buckets:
        assert sum(p.numel() for p in bucket) <= limit or len(bucket) == 1
    for bucket, following in itertools.pairwise(buckets):
        assert sum(p.numel() for p in bucket) + following[0].numel() > limit, "no bucket is smaller than need be"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    for name in ("get_data_parallel_group", "get_model_parallel_group"):
        monkeypatch.setattr(replicated.groups, name, lambda: dist.group.WORLD)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_gradients_are_clipped_as_by_a_number_of_the_host(clip: float) -> None:
    """To the bit: the norm stays on the device, where it is a tensor."""
    torch.manual_seed(0)
    module = nn.Linear(5, 7)
    for parameter in module.parameters():
        parameter.model_parallel = True  # type: ignore[attr-defined]
    engine = Replicated(module, torch.optim.SGD(module.parameters(), lr=1.0), clip)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    engine(torch.randn(3, 5)).square().sum().backward()
    gradients = [gradient.clone() for gradient in engine.gradients.values()]
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(gradient).double() ** 2) for gradient in gradients))
    factor = clip / (norm + 1e-6) if 0 < clip < norm else 1.0
    assert (factor < 1) == (clip == 0.5)
    norms = []

    def decide(found: torch.Tensor) -> float:
        norms.append(float(found))
        return 1.0

    engine.decide = decide
    engine.step()
    assert norms == [norm]
    for parameter, old, gradient in zip(module.parameters(), before, gradients, strict=True):
        assert torch.equal(parameter, old - gradient * factor)
