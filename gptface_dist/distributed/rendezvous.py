"""Where the ranks of a run meet, and how each proves to the others that it is one of them.

The launcher hands a secret to each process (:class:`RunToken`), which never travels: keys of the store are under a prefix made
of it, reports of a failure are signed with it, and each rank answers a challenge once the process group is formed. So a
process that only reaches the port can neither join a run nor end it. What the ranks send each other is neither signed nor
encrypted: the network between machines is trusted (docs/training.md).
"""

import contextlib
import datetime
import fcntl
import ipaddress
import logging
import os
import secrets
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from gptface_dist import host
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.token import TOKEN, RunToken
from gptface_dist.errors import UserError, first_line

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
"""Address at which the processes of one machine meet."""
_NONCE = 16
"""Bytes of a challenge."""
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address: netdevice(7)."""


@contextlib.contextmanager
def rendezvous_store(world: int) -> Iterator[list[RankInfo]]:
    """Serve the store of ``world`` processes of this machine, on loopback; yields what each must know, with a new token.

    The store is of this process, as it is of torchrun's agent. Finding a free port for rank 0 to listen on seconds later
    fails now and then: every connection made meanwhile, by anyone on the machine, takes one of the same ports.
    """
    with _listen(LOOPBACK, 0) as listener:
        store = TCPStore(
            LOOPBACK,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    token = RunToken.new()
    yield [RankInfo(rank, world, rank, LOOPBACK, store.port, external_store=True, token=token) for rank in range(world)]


def connect(rank_info: RankInfo, timeout_s: float) -> Any:
    """Meet the other ranks: the store that the launcher serves, or rank 0, under keys of this run and attempt alone.

    :class:`UserError` if not all ranks come within ``timeout_s``.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    where = (rank_info.address, rank_info.port)
    try:
        if rank_info.rank or rank_info.external_store:
            store = TCPStore(*where, rank_info.world, timeout=timeout, multi_tenant=True)
        else:
            with _listen(*where) as listener:
                where = (rank_info.address, listener.getsockname()[1])
                # torch closes the descriptor that it is given.
                descriptor = os.dup(listener.fileno())
                store = TCPStore(*where, rank_info.world, True, timeout=timeout, multi_tenant=True, master_listen_fd=descriptor)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{rank_info.world} processes did not meet at {where[0]}:{where[1]} in {timeout_s:g} s: {first_line(error)}; "
            "were all of them started?"
        ) from None
    # torchrun keeps its store when it starts the processes anew: what an earlier attempt wrote is not ours.
    return PrefixStore(f"gptface/{rank_info.token.prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(rank_info: RankInfo, store: Any, timeout_s: float) -> None:
    """Initialise the default process group by rendezvous in ``store`` (:func:`connect`), on the interface of the run's address.

    Collective. :class:`UserError` if one of the processes that answer is none of this run.
    """
    if rank_info.rank == 0 and rank_info.world > 1 and not rank_info.token.secret:
        log.warning("%s is not set: whoever reaches %s:%d may join this run", TOKEN, rank_info.address, rank_info.port)
    rank_info.export()
    os.environ.update(sockets(rank_info.address, os.environ))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(host.backend(), store=store, rank=rank_info.rank, world_size=rank_info.world, timeout=timeout)
    _prove(rank_info)


def sockets(address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which gloo and NCCL listen where the store of ``address`` does: on loopback, or one interface.

    On loopback they replace what the environment says, which is meant for a cluster; elsewhere they never do.
    """
    if _is_loopback(address):
        # "=": the name itself, not each that begins so.
        return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    if "GLOO_SOCKET_IFNAME" in environment or not (interface := _interface_to(address)):
        return {}
    return {"GLOO_SOCKET_IFNAME": interface}


def _prove(rank_info: RankInfo) -> None:
    """Answer the challenge of all ranks, and check the answers of all. Collective."""
    if rank_info.world == 1:
        return
    challenge = b"".join(_gather(secrets.token_bytes(_NONCE), rank_info.world))
    answers = _gather(_answer(rank_info.token, challenge, rank_info.rank), rank_info.world)
    strangers = [rank for rank, answer in enumerate(answers) if answer != _answer(rank_info.token, challenge, rank)]
    if strangers:
        raise UserError(
            f"rank {', '.join(map(str, strangers))} at {rank_info.address}:{rank_info.port} does not have this run's token: a "
            f"process of another run, or a stranger, has joined; {TOKEN} must be the same for all processes of a run"
        )


def _answer(token: RunToken, challenge: bytes, rank: int) -> bytes:
    return token.digest(b"rank %d " % rank + challenge)


def _gather(data: bytes, world: int) -> list[bytes]:
    """Bytes of all ranks, of equal length, in rank order."""
    local = torch.tensor(list(data), dtype=torch.uint8, device=host.device())
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local)
    return [bytes(part.tolist()) for part in parts]


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens at ``address`` alone, or everywhere where only this machine gives the name that address."""
    failure: OSError | None = None
    for family, _, _, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        # Debian gives a machine's own name the address 127.0.1.1, in its own /etc/hosts.
        unreachable = ipaddress.ip_address(where[0]).is_loopback and not _is_loopback(address)
        try:
            return socket.create_server(("", port) if unreachable else where[:2], family=family, backlog=2048)
        except OSError as error:
            failure = error
    assert failure is not None
    raise failure


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _interface_to(address: str) -> str:
    """Name of the interface over which this machine reaches ``address`` by IPv4; empty where there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # A datagram socket sends nothing in connect.
            probe.connect((address, 9))
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    if fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                        return name
    except OSError:
        pass
    return ""
