"""One rank's end is every rank's: processes that meet, and one of them fails in different ways."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import rendezvous_store
from gptface_dist.distributed.token import RunToken
from tests.processes import free_port

PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.errors import UserError
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.watchdog import Watchdog

how, rank_info = sys.argv[1], RankInfo.from_env()
with Watchdog(rank_info, 30) as watchdog:
    rendezvous.join(rank_info, watchdog.store, 6)
    for step in range(10**6):
        if step == 20 and rank_info.rank == int(sys.argv[2]):
            if how == "mistake":
                raise UserError("shard 7 cannot be read")
            if how == "bug":
                {}["no such key"]
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stuck":
                time.sleep(600)
        if how == "all":
            raise UserError("every rank sees this")
        if how == "none" and step == 30 or how == "long" and step == 300:
            break
        if how == "long":
            time.sleep(0.02)
        dist.all_reduce(torch.ones(4))
    shutdown()
print("done", rank_info.rank)
"""


def run(how: str, culprit: int = 1, ranks: list[RankInfo] | None = None) -> tuple[list[int], str]:
    """Exit statuses by rank, and what all wrote together; two minutes are more than any of them needs.

    ``ranks`` meet at an external store; without them, rank 0 of three serves one.
    """
    if ranks is None:
        port, token = free_port(), RunToken.new()
        ranks = [RankInfo(rank, 3, rank, port=port, token=token) for rank in range(3)]
    statuses, outputs = start(ranks, lambda rank_info: [PROGRAM, how, str(culprit)])
    return statuses, "".join(outputs)


def start(ranks: list[RankInfo], program: Callable[[RankInfo], list[str]]) -> tuple[list[int], list[str]]:
    """Statuses and outputs of Python programs, with their arguments, as the ranks; two minutes are more than they need."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", *program(rank_info)],
            env={**environment, **rank_info.variables()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank_info in ranks
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def messages(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("gptface:")]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_mistake_on_one_rank_ends_all_with_its_message(culprit: int) -> None:
    statuses, output = run("mistake", culprit)
    assert statuses == [2, 2, 2]
    assert messages(output) == ["gptface: shard 7 cannot be read"]
    assert "Traceback" not in output


def test_a_mistake_that_all_see_is_told_once() -> None:
    statuses, output = run("all")
    assert statuses == [2, 2, 2]
    assert messages(output) == ["gptface: every rank sees this"]


def test_a_bug_shows_one_traceback_and_its_rank() -> None:
    statuses, output = run("bug")
    assert statuses == [1, 1, 1]
    assert output.count("Traceback (most recent call last)") == 1
    (message,) = messages(output)
    assert "rank 1 on " in message
    assert "KeyError: 'no such key'" in message


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_killed_rank_ends_the_others(culprit: int) -> None:
    statuses, output = run("killed", culprit)
    assert statuses.pop(culprit) == -signal.SIGKILL
    assert statuses == [1, 1]
    # Without rank 0 there is no store to agree on who speaks.
    assert 1 <= len(messages(output)) <= (2 if culprit == 0 else 1)
    if culprit:
        assert "rank 2 died" in messages(output)[0]


def test_where_another_process_holds_the_store_rank_0_is_no_exception() -> None:
    with rendezvous_store(3) as ranks:
        statuses, output = run("killed", 0, ranks)
    assert statuses == [-signal.SIGKILL, 1, 1]
    (message,) = messages(output)
    assert "rank 0 died" in message


def test_a_stuck_rank_ends_all_after_the_time_out() -> None:
    """The time-out of collectives is 6 s; the stuck one would sleep ten minutes."""
    statuses, output = run("stuck")
    assert statuses == [1, 1, 1]
    (message,) = messages(output)
    assert "no rank died" in message


def test_without_failure_nothing_is_said() -> None:
    statuses, output = run("none")
    assert statuses == [0, 0, 0]
    assert messages(output) == []
    assert sorted(output.split()) == sorted(["done", "0", "done", "1", "done", "2"])
