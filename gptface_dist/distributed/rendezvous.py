"""The rendezvous store of processes that another one starts on its machine."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import TCPStore

ADDRESS = "127.0.0.1"
"""Host of the store: this machine."""


@contextmanager
def rendezvous_store() -> Iterator[int]:
    """Serve the store, as torchrun's agent does; yields its TCP port (:attr:`RankInfo.external_store`).

    Finding a free port for rank 0 to listen on seconds later fails now and then: every connection made meanwhile, by anyone
    on the machine, takes one of the same ports.
    """
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    yield store.port
