"""Where a process stands, from the environment of torchrun, of Slurm, or of neither."""

import pytest

from gptface_dist.distributed.rank import RankInfo, first_host
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
    assert RankInfo.from_env({}) == RankInfo(0, 1, 0, "127.0.0.1", 0)
    assert RankInfo.from_env(TORCHRUN) == RankInfo(5, 8, 1, "n1", 29500)
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert RankInfo.from_env(agent) == RankInfo(5, 8, 1, "n1", 29500, external_store=True)
    assert RankInfo.from_env(SLURM) == RankInfo(3, 4, 1, "gpu07", 20000 + 40123 % 12000)
    assert RankInfo.from_env({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == RankInfo(3, 4, 1, "head", 1234)
    # torchrun inside a Slurm job: torchrun knows better.
    assert RankInfo.from_env({**SLURM, **TORCHRUN}) == RankInfo(5, 8, 1, "n1", 29500)


@pytest.mark.parametrize("external_store", [False, True])
def test_what_is_put_into_the_environment_is_found_there(external_store: bool) -> None:
    rank_info = RankInfo(2, 4, 1, "n1", 29500, external_store)
    assert RankInfo.from_env(rank_info.variables()) == rank_info


def test_one_slurm_task_is_alone() -> None:
    assert RankInfo.from_env({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == RankInfo()


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
        RankInfo.from_env(environment)
