"""Repairs of Triton's interpreter (TRITON_INTERPRET=1: kernels run on a CPU, without compilation).

Triton's interpreter (3.6.0 and 3.7.1) rounds casts to 8-bit and 16-bit floats wrongly and multiplies bfloat16 matrices by
their bit patterns; that of 3.6.0 cannot count loops with numpy 2.4 and later; both look the whole language through again at
each call that a kernel makes. Each repair stands in for one of its functions while our kernels run, and computes what the GPU
does.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_FLOATS = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def interpreting() -> bool:
    """Whether kernels of this process are interpreted rather than compiled."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Around launches of kernels; without the interpreter it does nothing."""
    if not interpreting():
        yield
        return
    with (
        mock.patch.object(interpreter, "_convert_float", _convert_float),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _create_dot),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_lang_tensor),
        mock.patch.object(interpreter, "_patch_lang", _patch_lang),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
        # Rows of padding divide zero by zero; a GPU says nothing of it either.
        np.errstate(all="ignore"),
    ):
        yield


def _values(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The interpreter's array, which holds the bits of small floats, as a tensor of their values."""
    bits = _BITS[data.dtype.itemsize]
    return torch.from_numpy(np.array(data, order="C").view(str(bits).removeprefix("torch."))).view(_FLOATS[dtype])


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: Any) -> np.ndarray:
    """Round to nearest, ties to even; FP8 saturates but keeps NaN (PTX ``cvt.rn.satfinite``). Returns bits."""
    source, target = source.scalar, target.scalar
    values = _values(data, source)
    if target in _LARGEST:
        largest = _LARGEST[target]
        values = values.float()
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    converted = values.to(_FLOATS[target])
    bits = converted.view(_BITS[converted.element_size()]).numpy()
    return bits.view(f"uint{8 * converted.element_size()}").reshape(data.shape)


def _create_dot(_builder: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
    """a b + d of the operands' values, accumulated in d's type."""
    left, right = (_values(x.data, x.dtype.scalar).float().numpy() for x in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


_patch_lang_before = interpreter._patch_lang
_LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _patch_lang(_kernel: Any) -> Any:
    """Replace the language's operations for one launch: both modules, whichever the kernel and what it calls name them by.

    Returns the scope that restores them.
    """
    return _patch_lang_before(_LANGUAGE)


def _call(function: Any, *arguments: Any, **named: Any) -> Any:
    """A function that is called by a kernel, for which the language is replaced already.

    Triton replaces it once more in each of these calls, and never restores that.
    """
    try:
        return function.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


_patch_tensor_before = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Loop bounds are arrays of one element, which numpy 2.4 and later does not turn into numbers unasked.

    Triton 3.6.0 relies on that (triton-lang/triton#9171); 3.7.1 asks, and this changes nothing there.
    """
    _patch_tensor_before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
