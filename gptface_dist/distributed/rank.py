"""Rank, world size and rendezvous address of this process, as torchrun or Slurm's srun started it, or alone."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptface_dist.distributed.token import TOKEN, RunToken
from gptface_dist.errors import UserError

EXTERNAL_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Torchrun's variable for :attr:`RankInfo.external_store`."""


@dataclass(frozen=True)
class RankInfo:
    """This process among those that were started together."""

    rank: int = 0
    world: int = 1
    """Number of ranks."""
    local_rank: int = 0
    """Rank within this machine, and the number of its GPU."""
    address: str = "127.0.0.1"
    """Host of the rendezvous store."""
    port: int = 0
    """TCP port of the store; 0 for any (one process)."""
    external_store: bool = False
    """Whether the launcher serves the store, as torchrun's agent does; otherwise rank 0 does."""
    token: RunToken = RunToken()  # noqa: RUF009 (frozen)
    """Secret of the run's processes."""

    @classmethod
    def from_env(cls, environment: Mapping[str, str] = os.environ) -> "RankInfo":
        """Read torchrun's variables, else those of a Slurm step with more than one task; else a world of this process alone.

        Slurm: the step's first host, and a port derived from the job id, so that jobs sharing a node do not meet;
        ``MASTER_ADDR`` and ``MASTER_PORT`` win if set. :class:`UserError` where a variable is missing or not a number.
        """
        rank_info = cls._numbers_from_env(environment)
        return replace(rank_info, token=RunToken.from_env(environment)) if rank_info.world > 1 else rank_info

    @classmethod
    def _numbers_from_env(cls, environment: Mapping[str, str]) -> "RankInfo":
        if "RANK" in environment and "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
        else:
            return cls()
        missing = [name for name in names if name not in environment]
        if missing:
            raise UserError(f"the environment lacks {', '.join(missing)}: start with torchrun or srun")
        numbers = []
        for name in (*names[:3], names[4]):
            if not environment[name].isdigit():
                raise UserError(f"{name}={environment[name]!r} is not a number")
            numbers.append(int(environment[name]))
        rank, world, local_rank, last = numbers
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} is not one of {world} processes ({names[0]}, {names[1]})")
        if names[0] == "RANK":
            return cls(rank, world, local_rank, environment["MASTER_ADDR"], last, environment.get(EXTERNAL_STORE) == "True")
        address = environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        # Below the ports that Linux gives to any connection (32768 and up), so that it is free when rank 0 listens there.
        port = environment.get("MASTER_PORT", str(20000 + last % 12000))
        return cls(rank, world, local_rank, address, int(port))

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def variables(self) -> dict[str, str]:
        """Torchrun's environment variables, which libraries read, and the run's token."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank, "MASTER_PORT": self.port}
        words = {"MASTER_ADDR": self.address, EXTERNAL_STORE: str(self.external_store), TOKEN: self.token.secret}
        return {name: str(number) for name, number in numbers.items()} | words

    def export(self) -> None:
        """Put :meth:`variables` into this process's environment."""
        os.environ.update(self.variables())


def first_host(hosts: str) -> str:
    """The first of Slurm's abbreviated hosts: ``node[003-010,12],other`` -> ``node003``."""
    found = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", hosts)
    if not found:
        raise UserError(f"hosts {hosts!r} cannot be read: set MASTER_ADDR")
    return "".join(part for part in found.groups() if part)
