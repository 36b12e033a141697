"""CUDA's rules on a machine without CUDA: tensors that say they are on a GPU, and hold CPU data.

A :class:`FakeCuda` is a mode. Inside it, what is made on or moved to ``cuda`` is a :class:`CudaTensor`, whose operations run on
the CPU data that it holds. As on a GPU, an operation on tensors of both devices raises, unless the CPU's has no dimensions;
collectives take no CPU tensors, as NCCL's do; and each time that the host would wait for the device is noted. Autograd sees
tensors of the ``meta`` device, for which it needs no CUDA; Python code sees ``cuda:0``.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from gptface_dist import host

DEVICE = torch.device("cuda", 0)

OURS = ("gptface_dist/", "kernels/loss/", "kernels/attention/")
"""Parts of the paths of this project's files."""

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""Operations that need the device's answer: a value, or how large their result is."""
COUNTS = {aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class CudaTensor(Tensor):
    """A tensor that says it is on the GPU."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "CudaTensor":
        made = Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device="meta"
        )
        made.data_on_cpu = data
        return made

    def __init__(self, data: Tensor):
        pass

    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda _: False)  # type: ignore[assignment]

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        """Made on the host and copied, as PyTorch does it, where a mode does not see it."""
        return torch.tensor(data, **{"dtype": self.dtype} | options).to(DEVICE)

    def tolist(self) -> Any:
        """By a copy to the host; PyTorch has none for subclasses."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"cuda:{self.data_on_cpu!r}"

    # Modes see every operation, so that this is reached outside of one only.
    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise RuntimeError(f"{function} on a GPU's tensor outside of FakeCuda")


class FakeCuda(TorchDispatchMode):
    """The GPU while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """For each time the host would have waited: the operation, and where in this project."""
        self.pinned: list[Tensor] = []
        """Host tensors in pinned memory."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        leaves = tree_flatten((arguments, options))[0]
        here = [x for x in leaves if isinstance(x, CudaTensor)]
        device = options.get("device")
        if function is aten.pin_memory.default or function is aten._pin_memory.default:
            return self._pin(arguments[0])
        if function is aten.is_pinned.default:
            return any(arguments[0] is x for x in self.pinned)
        on_gpu = bool(here) if device is None else torch.device(device).type in ("cuda", "meta")
        if here or on_gpu or "c10d" in str(function):
            self._check(function, leaves, here)
            self._note(function, arguments, options, here, on_gpu)
        plain = {key: torch.device("cpu") if key == "device" and value is not None else value for key, value in options.items()}
        # Of a collective's answer, the work belongs to the CPU's backend; of a copy, the caller asked for this one's memory.
        found = function(*tree_map(_data, arguments), **tree_map(_data, plain))
        if function in READS and not isinstance(found, Tensor):
            return found
        if "c10d" in str(function):
            return (arguments[0], *found[1:]) if isinstance(found, tuple) else found
        made = tree_map(lambda x: CudaTensor(x) if on_gpu and isinstance(x, Tensor) else x, found)
        return return_and_correct_aliasing(function, arguments, options, made) if here and on_gpu else made

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def _check(self, function: Any, leaves: list[Any], here: list[CudaTensor]) -> None:
        """Refuse what CUDA and NCCL refuse."""
        away = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
        if "c10d" in str(function):
            if away:
                raise RuntimeError(f"{function}: NCCL takes no tensors of the CPU")
            return
        # Indices on the host are copied.
        copied = function in COPIES or (function in INDEXING and isinstance(leaves[0], CudaTensor))
        if here and any(x.dim() > 0 for x in away) and not copied:
            raise RuntimeError(f"{function}: tensors on cuda:0 and on cpu")

    def _note(self, function: Any, arguments: Any, options: Any, here: list[CudaTensor], on_gpu: bool) -> None:
        """Note it where the host would wait."""
        flat = tree_flatten(arguments)[0]
        reads = function in READS | COUNTS
        masks = function in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in arguments[1])
        uploads = function in INDEXING and any(isinstance(x, Tensor) and not isinstance(x, CudaTensor) for x in flat[1:])
        copies = False
        if function is aten._to_copy.default:
            copies = on_gpu != bool(here) and not self._free(arguments[0], options.get("non_blocking", False), on_gpu)
        if function is aten.copy_.default:
            target, source = arguments[:2]
            crosses = isinstance(target, CudaTensor) != isinstance(source, CudaTensor)
            free = self._free(source, len(arguments) > 2 and arguments[2], isinstance(target, CudaTensor))
            copies = crosses and not free
        if reads or masks or uploads or copies:
            ours = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in OURS)]
            where = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}" if ours else "elsewhere"
            self.waits.append(f"{function} at {where}")

    def _free(self, source: Tensor, non_blocking: bool, upload: bool) -> bool:
        """Whether a copy between host and device is one that the host does not wait for."""
        return upload and non_blocking and any(source is x for x in self.pinned)


def _data(x: Any) -> Any:
    return x.data_on_cpu if isinstance(x, CudaTensor) else x


class FakeEvent:
    """A moment on the device; on the fake one, a number."""

    clock = 0.0

    def __init__(self, **_: Any):
        self.at = 0.0

    def record(self) -> None:
        """Now: each event is 250 ms after the last."""
        FakeEvent.clock += 250.0
        self.at = FakeEvent.clock

    def elapsed_time(self, other: "FakeEvent") -> float:
        """Milliseconds."""
        return other.at - self.at


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """One GPU, current from the beginning."""
    mode = FakeCuda()

    def synchronize(*_: Any) -> None:
        mode.waits.append("torch.cuda.synchronize")

    answers = {
        "is_available": True, "device_count": 1, "_lazy_init": None, "set_device": None,
        "get_device_capability": (9, 0), "get_device_name": "a fake GPU", "max_memory_allocated": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    # Not its number: as a device, PyTorch takes a number for one of the accelerator's, and there is none.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(host, "device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return make(data, **options) if device is None else make(data, **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    # Of pinned memory there is none without CUDA.
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: mode._pin(self))
    # A module's parameters stay the objects that they are, tied ones included, as they do where PyTorch moves their data.
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    # Autograd's threads for CUDA devices do not exist, and would not have this mode.
    with torch.autograd.set_multithreading_enabled(False), mode:
        yield mode
