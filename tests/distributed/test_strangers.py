"""Processes that know where a run meets, but not its token: they cannot join it, end it, or silence it."""

import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import rendezvous_store
from gptface_dist.distributed.token import RunToken
from gptface_dist.distributed.watchdog import BEAT, FAILED
from tests.distributed.test_watchdog import messages, run, start
from tests.processes import free_port
from tests.sockets import listening, run_and_watch

JOIN = """
import sys
from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.distributed.token import RunToken
from gptface_dist.distributed.watchdog import Watchdog

rank_info = RankInfo.from_env()
if sys.argv[1:]:
    # A stranger has seen the run's keys in the store, and puts its own beside them.
    RunToken.prefix = sys.argv[1]
with Watchdog(rank_info, 8) as watchdog:
    rendezvous.join(rank_info, watchdog.store, 8)
    print("joined")
    shutdown()
"""
WRITTEN = ["0:99", "0:0", "1:0", "256:0", "2:7", "-1:0", "", "nonsense", RunToken("guessed").sign("1:0"), "\udcff\udcfe"]


def join(ranks: list[RankInfo], prefix: str = "") -> tuple[list[int], list[str]]:
    """Statuses and outputs of processes that join a run; the last one is the stranger with the ``prefix``, if there is one."""
    return start(ranks, lambda rank_info: [JOIN, *([prefix] if prefix and rank_info is ranks[-1] else [])])


def test_one_with_the_keys_but_not_the_token_is_found_out() -> None:
    with rendezvous_store(3) as ranks:
        stranger = dataclasses.replace(ranks[2], token=RunToken("guessed"))
        statuses, outputs = join([*ranks[:2], stranger], ranks[0].token.prefix)
    assert statuses[:2] == [2, 2]
    assert "joined\n" not in "".join(outputs)
    # One message, which a stranger that overwrites the first one's report makes the second one print as well.
    (message,) = set(messages("".join(outputs[:2])))
    assert "rank 2 at 127.0.0.1:" in message
    assert "does not have this run's token" in message


def test_one_without_the_keys_meets_nobody() -> None:
    with rendezvous_store(2) as ranks:
        statuses, outputs = join([ranks[0], dataclasses.replace(ranks[1], token=RunToken())])
    assert 0 not in statuses
    assert "joined\n" not in "".join(outputs)


def test_who_has_the_token_joins() -> None:
    with rendezvous_store(2) as ranks:
        assert join(ranks)[0] == [0, 0]


@contextlib.contextmanager
def stranger(port: int) -> Iterator[list[str]]:
    """A stranger that writes to every key that may end the run, again and again; yields the names of the keys it saw."""
    ended, seen = threading.Event(), list[str]()
    rng = random.Random(0)

    def write() -> None:
        store = TCPStore("127.0.0.1", port)
        while not ended.wait(0.03):
            for key in store.list_keys():
                if BEAT in key:
                    seen.append(key)
                    store.set(key.split(BEAT)[0] + FAILED, rng.choice(WRITTEN).encode(errors="surrogateescape"))
            with socket.create_connection(("127.0.0.1", port)) as door:
                door.sendall(rng.randbytes(64))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_what_a_stranger_writes_does_not_end_a_run() -> None:
    with rendezvous_store(3) as ranks, stranger(ranks[0].port) as seen:
        statuses, output = run("long", ranks=ranks)
    assert len(seen) > 20
    assert statuses == [0, 0, 0], output
    assert messages(output) == []


def test_a_failure_is_told_though_a_stranger_wrote_first() -> None:
    with rendezvous_store(3) as ranks, stranger(ranks[0].port):
        statuses, output = run("mistake", ranks=ranks)
    assert 0 not in statuses
    # What others read in the store is overwritten again and again: they may say first that its rank has gone.
    assert "gptface: shard 7 cannot be read" in messages(output)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_of_this_machine_listens_on_loopback(address: str) -> None:
    before = listening(os.getpid())
    store = rendezvous.connect(RankInfo(address=address), 30)
    store.set("key", "value")
    assert listening(os.getpid()) - before <= {"127.0.0.1", "::1"}
    assert "0.0.0.0" not in listening(os.getpid())


def test_sockets_follow_the_address() -> None:
    cluster = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert rendezvous.sockets("localhost", cluster) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert rendezvous.sockets("192.0.2.1", cluster) == {}
    # A documentation address (RFC 5737): nothing is sent there, but the kernel knows by which interface it would be.
    names = {name for _, name in socket.if_nameindex()}
    assert set(rendezvous.sockets("192.0.2.1", {}).values()) <= names - {"lo"}


def own_address() -> str:
    """This machine's address towards others; a datagram socket sends nothing in connect."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no interface but loopback")
        return str(probe.getsockname()[0])


def test_a_run_of_several_machines_listens_on_one_interface() -> None:
    """Two ranks as two machines would have them: the store at the address of rank 0, gloo on its interface."""
    address, token = own_address(), RunToken.new()
    ranks = [RankInfo(rank, 2, 0, address, free_port(), token=token) for rank in range(2)]
    ranks[1] = dataclasses.replace(ranks[1], port=ranks[0].port)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", JOIN]
    other = subprocess.Popen(command, env={**environment, **ranks[1].variables()}, stdout=subprocess.PIPE, text=True)
    done, seen = run_and_watch(command, env={**environment, **ranks[0].variables()})
    assert (done.returncode, done.stdout) == (0, "joined\n"), done.stderr
    assert other.communicate(timeout=60)[0] == "joined\n"
    assert seen == {address}
