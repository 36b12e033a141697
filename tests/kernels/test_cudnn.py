"""What is asked of cuDNN, with a stand-in that computes what its documentation says: never the package itself, nor a GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptface_dist.kernels.attention import cudnn
from gptface_dist.kernels.attention.reference import exact
from tests.kernels.inputs import attention_inputs, relative


class Operand:
    """A tensor of a graph."""

    def __init__(self, name: str = ""):
        self.name = name
        self.shape: list[int] = []

    def set_output(self, _: bool) -> "Operand":
        return self

    def set_dim(self, shape: list[int]) -> "Operand":
        self.shape = shape
        return self

    def set_stride(self, _: list[int]) -> "Operand":
        return self

    def set_data_type(self, _: str) -> "Operand":
        return self


class StandIn:
    """A graph of one operation: values are what is stored times its descale; what is stored is the value times its scale."""

    def __init__(self, **_: Any):
        self.made: tuple[Operand, ...] = ()
        self.scale = 0.0

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Operand:
        assert len(dim) == len(stride) == 4
        assert data_type
        return Operand(name)

    def sdpa_fp8(self, *, attn_scale: float, generate_stats: bool, use_causal_mask: bool, **known: Operand) -> Any:
        assert set(known) == {"q", "k", "v", *cudnn.FORWARD}
        assert generate_stats
        assert not use_causal_mask
        self.scale, self.made = attn_scale, tuple(Operand() for _ in range(4))
        return self.made

    def sdpa_fp8_backward(self, *, attn_scale: float, use_causal_mask: bool, **known: Operand) -> Any:
        assert set(known) == {"q", "k", "v", "o", "dO", "stats", *cudnn.BACKWARD}
        assert not use_causal_mask
        self.scale, self.made = attn_scale, tuple(Operand() for _ in range(7))
        return self.made

    def nothing(self, *_: Any) -> None: ...

    validate = build_operation_graph = create_execution_plans = check_support = build_plans = nothing

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[Operand, Tensor], _: Tensor) -> None:
        data = {operand.name: x for operand, x in pack.items() if operand.name}

        def value(name: str) -> Tensor:
            return data[name].float() * data[f"descale_{name}"]

        def store(operand: Operand, x: Tensor, scale: Tensor) -> None:
            assert tuple(operand.shape) == pack[operand].shape
            pack[operand].copy_((x * scale).clamp(-448, 448).to(torch.float8_e4m3fn))

        def rounded(x: Tensor, name: str) -> Tensor:
            return (x * data[f"scale_{name}"]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * data[f"descale_{name}"]

        q, k, v = value("q"), value("k"), value("v")
        p = (q @ k.mT * self.scale).softmax(-1)
        if len(self.made) == 4:
            out, stats, largest_p, largest_o = self.made
            o = rounded(p, "s") @ v
            store(out, o, data["scale_o"])
            pack[stats].fill_(7.0)
            pack[largest_p].fill_(p.amax())
            pack[largest_o].fill_(o.abs().amax())
            return
        assert bool((data["stats"] == 7.0).all())
        dout = value("dO")
        ds = p * (dout @ v.mT - (dout * value("o")).sum(-1, keepdim=True))
        ds8 = rounded(ds, "dP")
        for i, (name, x) in enumerate(
            {"dQ": ds8 @ k * self.scale, "dK": ds8.mT @ q * self.scale, "dV": rounded(p, "s").mT @ dout}.items()
        ):
            store(self.made[i], x, data[f"scale_{name}"])
            pack[self.made[3 + i]].fill_(x.abs().amax())
        pack[self.made[6]].fill_(ds.abs().amax())


def test_scales_make_the_most_of_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients of a millionth, scales of 1 would give nothing but zeros."""
    package = ModuleType("cudnn")
    kinds = SimpleNamespace(FP8_E4M3="e4m3", BFLOAT16="bf16", FLOAT="f32")
    vars(package).update(pygraph=StandIn, data_type=kinds, heur_mode=SimpleNamespace(A=0, FALLBACK=1))
    monkeypatch.setitem(sys.modules, "cudnn", package)
    q, k, v, dout = (x.bfloat16() for x in attention_inputs("normal", 2, 60, 2, 128))
    attention = cudnn.CudnnFp8(q, k, v, dout * 1e-3)
    true = exact(q, k, v, torch.tensor([60, 60]), dout * 1e-3)
    for found, wanted in zip(attention.results(), (true.out, true.dq, true.dk, true.dv), strict=True):
        assert 0.01 < relative(found, wanted) < 0.1


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda _: None)
    assert "nvidia-cudnn-frontend is not installed" in (cudnn.missing() or "")
