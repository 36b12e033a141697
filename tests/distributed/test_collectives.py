"""What ranks tell each other: JSON and tensors, in rank order, errors the same on every rank; no pickle on any way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.distributed.spawn import spawn
from gptface_dist.errors import UserError

WORLD = 3


def no_pickle(*_: object) -> Any:
    raise AssertionError("ranks told each other a pickle")


def fails(rank: int, error: Exception) -> None:
    if rank == 1:
        raise error


def error_of(work: Any) -> str:
    try:
        work()
    except (Failed, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(rank_info: RankInfo, folder: str) -> None:
    distributed_c10d._object_to_tensor = distributed_c10d._tensor_to_object = no_pickle
    rendezvous.join(rank_info, rendezvous.connect(rank_info, 60), 60)
    ranks, rank = RankGroup.of_world(300), rank_info.rank
    pair = dist.new_group([1, 2], backend="gloo")
    tensors = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "codes": torch.tensor([7, 2**40])}
    found: dict[str, Any] = {
        "gathered": ranks.all_gather(lambda: {"rank": rank, "text": "ü" * 1000 * rank, "nan": float("nan")}),
        "nothing": ranks.all_gather(lambda: None),
        "first": ranks.on_rank0(lambda: [rank, "x", 2**70]),
        "failed": error_of(lambda: ranks.all_gather(lambda: fails(rank, OSError(28, "No space left", "/data/x")))),
        "refused": error_of(lambda: ranks.all_gather(lambda: fails(rank, UserError("no such folder")))),
        "first failed": error_of(lambda: ranks.on_rank0(lambda: fails(rank + 1, KeyError("k")))),
        "silent": error_of(lambda: ranks.all_gather(lambda: fails(rank, UserError("")))),
        "no json": error_of(lambda: ranks.on_rank0(lambda: {1, 2})),
    }
    if rank:
        received: dict[str, Tensor] = RankGroup(pair).broadcast(tensors if rank == 2 else None, 1)
        found["same"] = all(torch.equal(received[name], tensor) for name, tensor in tensors.items())
        found["names"] = list(received)
    Path(folder, str(rank)).write_text(json.dumps(found))
    shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    spawn(work, WORLD, str(folder))
    return [json.loads((folder / str(rank)).read_text()) for rank in range(WORLD)]


def test_all_get_all_results_in_rank_order(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert [each["rank"] for each in one["gathered"]] == [0, 1, 2]
        assert [len(each["text"]) for each in one["gathered"]] == [0, 1000, 2000]
        assert all(each["nan"] != each["nan"] for each in one["gathered"])
        assert one["nothing"] == [None] * 3
        assert one["first"] == [0, "x", 2**70]


def test_an_error_is_the_same_on_every_rank(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["failed"] == "Failed: rank 1: No space left: /data/x"
        assert one["refused"] == "UserError: no such folder"
        assert one["first failed"] == "Failed: KeyError: 'k'"
        assert one["silent"] == "UserError: "
        assert one["no json"] == "Failed: TypeError: Object of type set is not JSON serializable"


def test_tensors_arrive_as_they_are(found: list[dict[str, Any]]) -> None:
    for one in found[1:]:
        assert one["same"]
        assert one["names"] == ["a", "empty", "codes"]


def test_alone_it_is_the_same() -> None:
    alone = RankGroup()
    assert alone.all_gather(lambda: (1, "x")) == [[1, "x"]]
    assert alone.on_rank0(lambda: 5) == 5
    assert torch.equal(alone.broadcast({"a": torch.ones(2)}, 0)["a"], torch.ones(2))
    with pytest.raises(Failed, match=r"^not one of them$"):
        alone.on_rank0(lambda: (_ for _ in ()).throw(Failed("not one of them")))
