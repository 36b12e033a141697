"""Where this process stands among those that were started together: by torchrun, by Slurm's srun, or alone."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from gptface_dist.errors import UserError

HELD = "TORCHELASTIC_USE_AGENT_STORE"
"""Torchrun's variable for :attr:`Place.held`."""


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    rank: int = 0
    """Its number among all."""
    world: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine: that of its GPU."""
    address: str = "127.0.0.1"
    """Machine of rank 0, where all meet."""
    port: int = 0
    """TCP port there; 0 for any (one process)."""
    held: bool = False
    """Whether who started the processes holds the store in which they meet, as torchrun does; otherwise rank 0 does."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def variables(self) -> dict[str, str]:
        """Torchrun's variables: libraries read them, whoever started the process."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank, "MASTER_PORT": self.port}
        words = {"MASTER_ADDR": self.address, HELD: str(self.held)}
        return {name: str(number) for name, number in numbers.items()} | words

    def export(self) -> None:
        """Put :meth:`variables` into this process's environment."""
        os.environ.update(self.variables())


def find(environment: Mapping[str, str] = os.environ) -> Place:
    """Read torchrun's variables, else those of a Slurm step with more than one task; else this process is alone.

    Slurm: the first host of the step, and a port derived from the job's number, so that jobs sharing a node do not meet;
    ``MASTER_ADDR`` and ``MASTER_PORT`` win where they are set. :class:`UserError` where variables are missing or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    else:
        return Place()
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
        return Place(rank, world, local_rank, environment["MASTER_ADDR"], last, environment.get(HELD) == "True")
    address = environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # Below the ports that Linux gives to any connection (32768 and up), so that it is free when rank 0 listens there.
    port = environment.get("MASTER_PORT", str(20000 + last % 12000))
    return Place(rank, world, local_rank, address, int(port))


def first_host(hosts: str) -> str:
    """The first of Slurm's abbreviated hosts: ``node[003-010,12],other`` -> ``node003``."""
    found = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", hosts)
    if not found:
        raise UserError(f"hosts {hosts!r} cannot be read: set MASTER_ADDR")
    return "".join(part for part in found.groups() if part)
