"""The fake GPU has a GPU's rules: what is proven with it would show there too."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist import host
from tests.fake_cuda import DEVICE, CudaTensor, FakeCuda, fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it stands in for CUDA")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as made:
        yield made


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0, 0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.__setitem__(x > 0, 1.0),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "torch.tensor": lambda x: torch.tensor(3.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor(3.0),
    "pageable upload": lambda x: torch.arange(3).to(x.device),
    "pageable upload, non-blocking": lambda x: torch.arange(3).to(x.device, non_blocking=True),
    "pageable copy_": lambda x: x[0].copy_(torch.zeros(3)),
}

FREE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x @ x.mT + 1).sum(),
    "where with a number": lambda x: torch.where(x > 0, x, 0.0),
    "full": lambda x: torch.full((), 3, device=x.device),
    "new_full": lambda x: x.new_full((), 3),
    "index on the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "pinned upload": lambda x: torch.arange(3).pin_memory().to(x.device, non_blocking=True),
    "to_device": lambda x: host.to_device(torch.arange(3), x.device),
    "scalar of the host": lambda x: x + torch.ones(()),
    "zeros on the device": lambda x: torch.zeros(3, device="cuda"),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_a_gpu_is_noted(gpu: FakeCuda, name: str) -> None:
    x = torch.ones(2, 3, device=DEVICE)
    WAITS[name](x)
    assert len(gpu.waits) == 1


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(gpu: FakeCuda, name: str) -> None:
    made = FREE[name](torch.ones(2, 3, device=DEVICE))
    assert gpu.waits == []
    assert isinstance(made, CudaTensor)
    assert made.device == DEVICE


def test_devices_do_not_mix(gpu: FakeCuda) -> None:
    x = torch.ones(2, 3, device=DEVICE)
    for other in (torch.ones(2, 3), torch.ones(3)):
        with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
            x + other
        with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
            x += other


def test_collectives_take_no_cpu_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with fake_cuda(monkeypatch):
            x = torch.ones(3, device=DEVICE)
            dist.all_reduce(x)
            with pytest.raises(RuntimeError, match="NCCL takes no tensors of the CPU"):
                dist.all_reduce(torch.ones(3))
    finally:
        dist.destroy_process_group()


def test_gradients_are_those_of_the_cpu(gpu: FakeCuda) -> None:
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(5, 3)
    (layer(x) ** 2).sum().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    layer.to(DEVICE)
    ((layer(host.to_device(x, DEVICE))) ** 2).sum().backward()
    found = [parameter.grad.cpu() for parameter in layer.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
