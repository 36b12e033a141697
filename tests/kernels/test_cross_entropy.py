"""The chunked loss against PyTorch's own over whole logits, on one rank and with columns spread over several."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptface_dist import host
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.distributed.spawn import spawn
from gptface_dist.kernels.loss.cross_entropy import linear_cross_entropy
from tests.fake_cuda import DEVICE, fake_cuda


def problem(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((rows, 8), (columns, 8), (columns,)))
    targets = torch.randint(0, columns, (rows,), generator=generator)
    return features, weight, bias, targets


def whole(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float) -> list[Tensor]:
    """Loss, right predictions and gradients, the usual way."""
    leaves = [x.clone().requires_grad_() for x in (features, weight, bias)]
    logits = F.linear(*leaves).float()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return [loss.detach(), (logits.argmax(1) == targets).sum(), *torch.autograd.grad(loss * scale, leaves)]


def chunked(
    features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float, chunk: int, group: dist.ProcessGroup | None
) -> list[Tensor]:  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in (features, weight, bias)]
    loss, correct = linear_cross_entropy(*leaves, targets, group, chunk)
    return [loss.detach(), correct, *torch.autograd.grad(loss * scale, leaves)]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40), columns=st.integers(1, 30), chunk=st.integers(1, 50), seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 0.37, -2.0]),
)  # fmt: skip
def test_chunks_compute_the_whole(rows: int, columns: int, chunk: int, seed: int, scale: float) -> None:
    made = problem(rows, columns, seed)
    for a, b in zip(chunked(*made, scale, chunk, None), whole(*made, scale), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_gradients_are_summed_in_float32() -> None:
    """500 chunks of equal, small contributions: summed in bf16 they would stand still."""
    features = torch.ones(500, 8, dtype=torch.bfloat16)
    weight, bias = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    found = chunked(features, weight, bias, torch.zeros(500, dtype=torch.int64), 1.0, 1, None)
    assert found[3].dtype == torch.bfloat16
    assert torch.equal(found[3][1], torch.full((8,), 250, dtype=torch.bfloat16))


def test_no_chunk_has_more_than_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(100, 30)
    seen: list[int] = []
    linear = F.linear

    def watched(*arguments: Tensor) -> Tensor:
        logits = linear(*arguments)
        seen.append(len(logits))
        return logits

    monkeypatch.setattr(F, "linear", watched)
    chunked(*made, 1.0, 16, None)
    assert max(seen) == 16
    assert sum(seen) == 100


def test_evaluation_makes_no_gradients() -> None:
    features, weight, bias, targets = problem(10, 5)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(features.requires_grad_(), weight, bias, targets, None)
    assert not loss.requires_grad
    assert linear_cross_entropy(features.detach(), weight, bias, targets, None)[0] == loss


def spread(rank_info: RankInfo) -> None:
    """One rank's part, compared with the whole: uneven columns, none for the last rank, no rows in one case."""
    rank_info.export()
    dist.init_process_group("gloo")
    rank = rank_info.rank
    bounds = [0, 9, 13, 13]
    for rows in (21, 0):
        features, weight, bias, targets = problem(rows, 13, seed=3)
        part = slice(bounds[rank], bounds[rank + 1])
        local = targets - part.start
        found = chunked(features, weight[part], bias[part], local, 0.5, 4, dist.group.WORLD)
        wanted = whole(features, weight, bias, targets, 0.5)
        dist.all_reduce(found[2])
        wanted[3], wanted[4] = wanted[3][part], wanted[4][part]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    shutdown()


def test_columns_spread_over_ranks() -> None:
    spawn(spread, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake GPU stands in for CUDA")
@pytest.mark.parametrize(("rows", "columns"), [(20, 13), (0, 13), (20, 0)])
def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Without columns, as a rank may be, every target is elsewhere."""
    features, weight, bias, targets = problem(rows, 13, dtype=torch.float32)
    made = (features, weight[:columns], bias[:columns], targets if columns else targets + 13)
    wanted = chunked(*made, 0.5, 8, None)
    with fake_cuda(monkeypatch) as gpu:
        found = chunked(*(host.to_device(x, DEVICE) for x in made), 0.5, 8, None)
        assert gpu.waits == []
        for a, b in zip(found, wanted, strict=True):
            assert a.device == DEVICE
            assert torch.equal(a.cpu(), b) or not b.isfinite().all()
