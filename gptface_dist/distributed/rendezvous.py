"""Where processes meet that another one starts on its machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import TCPStore

ADDRESS = "127.0.0.1"
"""This machine, for itself."""


@contextmanager
def held() -> Iterator[int]:
    """Hold the store in which the processes meet, as torchrun's agent does; yields its TCP port (:attr:`Place.held`).

    The usual way, to look for a free port and leave it to rank 0 to listen there some seconds later, fails now and then:
    every connection made meanwhile, by anyone on the machine, takes one of the same ports.
    """
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    yield store.port
