"""What is wrong with Triton's interpreter, and that the repairs put it right. A test of the first kind that fails says
that a repair is no longer needed.
"""

import warnings
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from gptface_dist.kernels.attention.interpreter import interpreting, repaired

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels are compiled here")

TYPES = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.bfloat16: 3e38, torch.float16: 65504.0}


@triton.jit
def _cast(source, target, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(target + places, tl.load(source + places).to(target.dtype.element_ty))


@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    places = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + places, tl.dot(tl.load(a + places), tl.load(b + places)))


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _sum(source, target, COUNT: tl.constexpr):
    total = tl.zeros((1,), tl.float32)
    for _ in range(5):
        total = _plus(total, tl.sum(tl.load(source + tl.arange(0, COUNT)), 0))
    tl.store(target + tl.arange(0, 1), total)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(values.shape, dtype=dtype)
    _cast[(1,)](values, target, len(values))
    return target.float()


def dot(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(a.shape)
    _dot[(1,)](a, b, out, len(a))
    return out


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4096, generator=generator)
    edges = torch.tensor([0.0, -0.0, 448, 464, 465, 1e9, -1e9, 2**-9, 2**-10, 1.5 * 2**-10, 1.99, 17, 19])
    return torch.cat([normal, normal * 1e-3, normal * 300, torch.nn.functional.pad(edges, (0, 4096 - len(edges)))])


@pytest.mark.parametrize("dtype", TYPES)
def test_casts_round_to_nearest_even_and_saturate(dtype: torch.dtype) -> None:
    with repaired():
        found = cast(numbers(), dtype)
    largest = TYPES[dtype]
    wanted = numbers() if dtype in (torch.bfloat16, torch.float16) else numbers().clamp(-largest, largest)
    assert torch.equal(found, wanted.to(dtype).float())
    with repaired():
        assert cast(torch.full((16,), torch.nan), dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_products_are_of_values(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    with repaired():
        assert torch.allclose(dot(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def replaced(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """The modules whose operations the interpreter replaces during a launch of :func:`_sum`, again for each time."""
    modules, replace = [], interpreter._patch_lang_core

    def watched(module: ModuleType, scope: object) -> None:
        modules.append(module)
        replace(module, scope)

    monkeypatch.setattr(interpreter, "_patch_lang_core", watched)
    total = torch.empty(1)
    _sum[(1,)](torch.arange(8.0), total, 8)
    assert total.item() == 5 * 28
    return modules


def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And restored, whichever module names it."""
    before = {module: dict(vars(module)) for module in (tl, tl.core, tl.math, tl.tensor)}
    with repaired():
        assert replaced(monkeypatch) == [tl, tl.core]
    assert all(vars(module)[name] is value for module, members in before.items() for name, value in members.items())


def test_the_repairs_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float8_e4m3fn, torch.bfloat16):
            assert not torch.equal(cast(numbers()[:4096], dtype), numbers()[:4096].to(dtype).float())
        ones = torch.ones(16, 16, dtype=torch.bfloat16)
        assert not torch.equal(dot(ones, ones), ones.float() @ ones.float())
    assert len(replaced(monkeypatch)) > 10
