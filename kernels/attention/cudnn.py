"""cuDNN's own FP8 attention, forward and backward, for :mod:`.benchmark` to compare ours with. **Never run: there was no GPU.**

The graphs were written against nvidia-cudnn-frontend 1.32.0's list of operations and their operands.
Every tensor has one scale, as in cuDNN; scales that a training run would guess from earlier steps are measured on the very
data that is timed, which is the best that cuDNN can do.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptface_dist.kernels.attention.options import E4M3_MAX

FORWARD = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
"""Scalars of the forward graph: what a tensor in FP8 is multiplied with to get its values (descale), and its inverse."""

BACKWARD = (
    *("descale_q", "descale_k", "descale_v", "descale_o", "descale_dO", "descale_s", "descale_dP"),
    *("scale_s", "scale_dQ", "scale_dK", "scale_dV", "scale_dP"),
)  # fmt: skip
"""Scalars of the backward graph."""


def missing() -> str | None:
    """Why cuDNN's FP8 attention cannot be measured; None where it can be tried."""
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    return None


@dataclass(frozen=True)
class Scaled:
    """A tensor in FP8 with one scale."""

    values: Tensor
    """float8_e4m3fn, [B, H, N, D] with the strides of [B, N, H, D]."""
    descale: float
    """Factor from FP8 values to the tensor's values."""

    @classmethod
    def of(cls, x: Tensor) -> "Scaled":
        """[B, N, H, D], scaled by its largest value."""
        descale = float(x.abs().amax()) / E4M3_MAX
        return cls((x.float() / descale).to(torch.float8_e4m3fn).transpose(1, 2), descale)


class Graph:
    """One operation of cuDNN, built for given tensors and called with the same ones every time.

    Args:
        name: the operation: a method of cuDNN's graph.
        inputs: tensors by the operation's names.
        scales: scalars by the operation's names.
        outputs: the tensors that it fills, in its order.
        options: its other arguments.
    """

    def __init__(self, name: str, inputs: dict[str, Tensor], scales: dict[str, float], outputs: list[Tensor], **options: Any):
        import cudnn

        self.graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        kinds = {
            torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3,
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float32: cudnn.data_type.FLOAT,
        }
        device = outputs[0].device
        data = inputs | {key: torch.full((1, 1, 1, 1), value, device=device) for key, value in scales.items()}
        known = {
            key: self.graph.tensor(name=key, dim=list(x.shape), stride=list(x.stride()), data_type=kinds[x.dtype])
            for key, x in data.items()
        }
        made = getattr(self.graph, name)(**known, **options)
        for tensor, x in zip(made, outputs, strict=True):
            tensor.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride())).set_data_type(kinds[x.dtype])
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = torch.empty(max(self.graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)
        self.pack = {known[key]: x for key, x in data.items()} | dict(zip(made, outputs, strict=True))

    def __call__(self) -> None:
        """Fill the outputs."""
        self.graph.execute(self.pack, self.workspace)


class CudnnFp8:
    """Attention of q, k, v [B, N, H, D] in bf16, and of the output's gradient ``dout``, all full sequences."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
        self._q, self._k, self._v, self._dout = (Scaled.of(x) for x in (q, k, v, dout))
        self._factor = 1 / math.sqrt(q.shape[-1])
        batch, tokens, heads, _ = q.shape
        self._stats = torch.empty(batch, heads, tokens, 1, device=q.device)
        # P is at most 1. What else is not known before is measured by a first call, with scales of 1.
        self._scales = {"s": E4M3_MAX} | dict.fromkeys(("o", "dP", "dQ", "dK", "dV"), 1.0)
        scalar = torch.empty(1, 1, 1, 1, device=q.device)
        self._out, *self._gradients = (torch.empty_like(self._q.values) for _ in range(4))
        self._largest = {name: torch.empty_like(scalar) for name in ("s", "o", "dQ", "dK", "dV", "dP")}
        self.forward = self._forward()
        self.forward()
        self._set("o")
        self.forward = self._forward()
        self.forward()
        # dP's scale comes first: gradients made of a dP that is rounded to nothing have no largest value.
        for names in (("dP",), ("dQ", "dK", "dV"), ()):
            self.backward = self._backward()
            self.backward()
            self._set(*names)

    def _set(self, *names: str) -> None:
        for name in names:
            self._scales[name] = E4M3_MAX / max(float(self._largest[name]), 1e-30)

    def _forward(self) -> Graph:
        inputs = {"q": self._q.values, "k": self._k.values, "v": self._v.values}
        outputs = [self._out, self._stats, self._largest["s"], self._largest["o"]]
        return Graph(
            "sdpa_fp8", inputs, self._chosen(FORWARD), outputs, attn_scale=self._factor, generate_stats=True,
            use_causal_mask=False,
        )  # fmt: skip

    def _backward(self) -> Graph:
        inputs = {"q": self._q.values, "k": self._k.values, "v": self._v.values, "o": self._out}
        inputs |= {"dO": self._dout.values, "stats": self._stats}
        outputs = [*self._gradients, *(self._largest[name] for name in ("dQ", "dK", "dV", "dP"))]
        return Graph(
            "sdpa_fp8_backward", inputs, self._chosen(BACKWARD), outputs, attn_scale=self._factor, use_causal_mask=False
        )  # fmt: skip

    def _chosen(self, names: tuple[str, ...]) -> dict[str, float]:
        known = {f"scale_{name}": scale for name, scale in self._scales.items()}
        known |= {f"descale_{name}": 1 / scale for name, scale in self._scales.items()}
        given = {"q": self._q, "k": self._k, "v": self._v, "dO": self._dout}
        known |= {f"descale_{name}": x.descale for name, x in given.items()}
        return {name: known[name] for name in names}

    def results(self) -> list[Tensor]:
        """The output and the gradients of q, k, v as the last calls left them, float32 [B, N, H, D]."""
        scales = (self._scales[name] for name in ("o", "dQ", "dK", "dV"))
        return [x.transpose(1, 2).float() / scale for x, scale in zip((self._out, *self._gradients), scales, strict=True)]
