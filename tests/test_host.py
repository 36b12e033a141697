"""Which GPU a process takes, and when it is refused; no GPU is needed."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gptface_dist import host
from gptface_dist.benchmarks import step
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.checkpoint.background import Background
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.engine import parity
from gptface_dist.engine.parity_case import Case
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.processes import processes


class Gpus:
    """A machine with so many GPUs, of which this process has set one as the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uuids: list[str]):
        self.uuids, self.current = uuids, None

        def set_device(device: torch.device) -> None:
            self.current = device.index

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current or 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="a GPU", uuid=uuids[i]), raising=False
        )


def test_without_cuda_the_cpu_is_taken() -> None:
    assert host.set_device(3) == torch.device("cpu")
    host.check_gpus(1000)


@pytest.mark.parametrize(
    ("visible", "local_rank", "chosen"),
    [
        (4, 0, 0),
        (4, 3, 3),
        (1, 0, 0),
        # srun --gpus-per-task=1: the task of local rank 3 sees its GPU alone, as number 0.
        (1, 3, 0),
    ],
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, chosen: int
) -> None:
    gpus = Gpus(monkeypatch, [f"GPU-{number}" for number in range(visible)])
    assert host.set_device(local_rank) == torch.device("cuda", chosen)
    assert gpus.current == chosen
    assert host.device() == torch.device("cuda", chosen)


def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, ["GPU-0", "GPU-1"])
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 are visible; start at most 2 processes"):
        host.set_device(2)
    assert gpus.current is None


def test_ranks_that_share_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    Gpus(monkeypatch, ["GPU-a"])
    host.refuse_shared_gpu(store, 0)
    host.refuse_shared_gpu(store, 0)
    with pytest.raises(UserError, match=r"ranks 0 and 5 have the same GPU \(a GPU, GPU-a\)"):
        host.refuse_shared_gpu(store, 5)
    Gpus(monkeypatch, ["GPU-b"])
    host.refuse_shared_gpu(store, 6)


def test_image_tokenizers_take_their_gpu_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, ["GPU-a", "GPU-b"])
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with processes() as group:
        assert group.device == torch.device("cuda", 1)
    assert gpus.current == 1


def test_more_processes_than_gpus_are_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    Gpus(monkeypatch, ["GPU-a"])
    small = ModelOptions(layers=2, hidden=16, heads=2, ffn=24, text_positions=16, rows=4, columns=4)
    for module in (parity, step):
        monkeypatch.setattr(module, "spawn", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UserError, match="2 processes need as many GPUs, there are 1"):
        parity.run_parity([Case(Layout(dp=2))], tmp_path / "results.jsonl")  # type: ignore[operator]
    with pytest.raises(UserError, match="2 processes need as many GPUs, there are 1"):
        step.compare(Workload(small, text_length=8, grid=4), 2, 1, 1, lambda _: None)


def test_the_thread_that_saves_has_its_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is one of each thread."""
    gpus = Gpus(monkeypatch, ["GPU-a", "GPU-b"])
    host.set_device(1)
    threads: list[tuple[str, int | None]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: threads.append((threading.current_thread().name, device.index))
    )
    background = Background(RankGroup())
    background.begin(lambda: threads.append(("work", gpus.current)))
    background.wait()
    assert threads == [("checkpoint", 1), ("work", 1)]
