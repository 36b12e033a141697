"""Run a function on all ranks; if any rank fails, every rank raises the same error.

What ranks tell each other is JSON or tensors, never a pickle: unpickling runs whatever code the sender chose.
"""

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist import host
from gptface_dist.errors import Damaged, UserError, one_line

T = TypeVar("T")


class Failed(Exception):
    """A rank failed. The message is one line, the same on every rank."""


def barrier() -> None:
    """Wait until every rank calls it."""
    # Without a device NCCL guesses one by the rank's number.
    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a run, over a process group of their own."""

    group: dist.ProcessGroup | None = None
    """None for one process alone."""

    @classmethod
    def of_world(cls, timeout_s: float) -> "RankGroup":
        """All ranks, over a new group for CPU tensors. Every rank must call it."""
        timeout = datetime.timedelta(seconds=timeout_s)
        return cls(dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank; all get all results in rank order. :class:`Failed` on all ranks if one fails.

        A result is made of what JSON has: tuples arrive as lists, and keys as text.
        """
        attempts = [json.loads(text) for text in _all_gather_bytes(_attempt(work), self.group)]
        failures = [(rank, attempt) for rank, attempt in enumerate(attempts) if "result" not in attempt]
        if failures:
            rank, attempt = failures[0]
            others = f" (and {len(failures) - 1} ranks more)" if len(failures) > 1 else ""
            _fail(attempt, f"rank {rank}: " if self.size > 1 else "", others)
        return [attempt["result"] for attempt in attempts]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0; all get its result, made of what JSON has. :class:`Failed` on all ranks if it fails."""
        attempt = json.loads(_broadcast_bytes(_attempt(work) if self.rank == 0 else b"", 0, self.group))
        if "result" not in attempt:
            _fail(attempt)
        result: T = attempt["result"]
        return result

    def broadcast(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """The tensors of rank ``source`` of the group, by name, on the CPU of every rank; others pass None."""
        local = dict(tensors or {})
        header = [[name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in local.items()]
        received = {}
        for name, shape, dtype in json.loads(_broadcast_bytes(json.dumps(header).encode(), source, self.group)):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=_device(self.group))
            if name in local:
                tensor.copy_(local[name])
            if self.group is not None:
                dist.broadcast(tensor, dist.get_global_rank(self.group, source), group=self.group)
            received[name] = tensor.cpu()
        return received


def _attempt(work: Callable[[], object]) -> bytes:
    """Result of one rank's work, or why it failed, as JSON."""
    try:
        return json.dumps({"result": work()}).encode()
    except Exception as error:
        return json.dumps({"reason": describe(error), "user_error": isinstance(error, UserError)}).encode()


def _fail(attempt: dict[str, Any], before: str = "", after: str = "") -> NoReturn:
    reason = attempt["reason"]
    raise UserError(reason) if attempt["user_error"] else Failed(f"{before}{reason}{after}")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    return host.device() if group is not None and dist.get_backend(group) == "nccl" else torch.device("cpu")


def _all_gather_bytes(data: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """Bytes of all ranks, in rank order."""
    if group is None:
        return [data]
    size, device = dist.get_world_size(group), _device(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(size)]
    dist.all_gather(parts, _tensor(data.ljust(longest), device), group=group)
    return [_bytes(part)[: int(length)] for part, length in zip(parts, lengths, strict=True)]


def _broadcast_bytes(data: bytes, source: int, group: dist.ProcessGroup | None) -> bytes:
    """Bytes of rank ``source`` of the group; what other ranks pass is ignored."""
    if group is None:
        return data
    root, device = dist.get_global_rank(group, source), _device(group)
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, root, group=group)
    local = _tensor(data if dist.get_rank(group) == source else bytes(int(length)), device)
    dist.broadcast(local, root, group=group)
    return _bytes(local)


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def describe(error: BaseException) -> str:
    """An exception in one line: its message if that was written for users, else its type too."""
    if isinstance(error, UserError | Failed | Damaged):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {one_line(error)}"
