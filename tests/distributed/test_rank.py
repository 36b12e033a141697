"""Where a process stands, from the environment of torchrun, of Slurm, or of neither."""

import pytest

from gptface_dist.distributed.rank import Place, find, first_host
from gptface_dist.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],x1",
    "SLURM_JOB_ID": "40123",
}


def test_alone_under_torchrun_and_under_slurm() -> None:
    assert find({}) == Place(0, 1, 0, "127.0.0.1", 0)
    assert find(TORCHRUN) == Place(5, 8, 1, "n1", 29500)
    assert find({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == Place(5, 8, 1, "n1", 29500, held=True)
    assert find(SLURM) == Place(3, 4, 1, "gpu07", 20000 + 40123 % 12000)
    assert find({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == Place(3, 4, 1, "head", 1234)
    # torchrun inside a Slurm job: torchrun knows better.
    assert find({**SLURM, **TORCHRUN}) == Place(5, 8, 1, "n1", 29500)


@pytest.mark.parametrize("held", [False, True])
def test_what_is_put_into_the_environment_is_found_there(held: bool) -> None:
    place = Place(2, 4, 1, "n1", 29500, held)
    assert find(place.variables()) == place


def test_one_slurm_task_is_alone() -> None:
    assert find({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == Place()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[003-010,12],other", "node003"),
        ("node[7]", "node7"),
        ("rack[1-2]-ib,x", "rack1-ib"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_host_of_slurms_abbreviations(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "x"}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8"),
        ({key: value for key, value in SLURM.items() if key != "SLURM_JOB_ID"}, "SLURM_JOB_ID"),
    ],
)
def test_what_cannot_be_is_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        find(environment)
