"""The kernels of attention one by one, to be timed each alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gptface_dist.kernels.attention import operator
from gptface_dist.kernels.attention.launch import DK_DV, DQ, FORWARD, Launch, LaunchTable
from gptface_dist.kernels.attention.shapes import Shape
from gptface_dist.kernels.attention.timing import Timer


class KernelSet:
    """The kernels of one shape and backward pass, on random inputs.

    Args:
        shape: what is attended to.
        backward: which products of the backward pass are in FP8.
        table: how the kernels are launched.
        device: a GPU, or the CPU where kernels are interpreted.
        smooth: see :class:`Fp8Options`.
        specialize: whether loads and products run in different warps.
    """

    def __init__(
        self,
        shape: Shape,
        backward: str,
        table: LaunchTable,
        device: torch.device,
        smooth: bool = True,
        specialize: bool = False,
    ):
        self.shape, self._backward, self._table, self._smooth, self._specialize = shape, backward, table, smooth, specialize
        self._q, self._k, self._v, self._dout = shape.inputs(device)
        self._factor = 1 / math.sqrt(shape.size)
        operator.launched(lambda: self._prepare(device))

    def _prepare(self, device: torch.device) -> None:
        from gptface_dist.kernels.attention.backward import Inputs
        from gptface_dist.kernels.attention.prepare import Result
        from gptface_dist.kernels.attention.quantise import Tiles

        self._tiles = Tiles.of(self.shape.sequences(device), self._q.shape[:-2].numel())
        self._x = self._quantise()
        self._result = Result(*self._attend(self._launch(FORWARD)))
        do = self._prepare_gradient()
        self._given = Inputs(do, self._x, self._result, self._tiles, self._factor, self._backward)

    def _launch(self, kernel: str) -> Launch:
        return self._table.of(kernel, self.shape.size, self._backward, self._specialize)

    def _quantise(self):  # type: ignore[no-untyped-def]  # Quantised, which imports triton
        from gptface_dist.kernels.attention.quantise import quantise

        return quantise(self._q, self._k, self._v, self._tiles, self._smooth, self._backward, torch.float8_e4m3fn)

    def _attend(self, launch: Launch) -> tuple[Tensor, Tensor, Tensor]:
        from gptface_dist.kernels.attention.forward import forward

        return forward(self._x, self._tiles, self._q, self._factor * math.log2(math.e), launch)

    def _prepare_gradient(self):  # type: ignore[no-untyped-def]  # Prepared, which imports triton
        from gptface_dist.kernels.attention.prepare import prepare

        return prepare(self._dout, self._x, self._result, self._tiles, self._backward)

    def call(self, kernel: str, launch: Launch) -> Callable[[], tuple[Tensor, ...]]:
        """A launch of one kernel with products; its tensors are the output, or gradients."""
        from gptface_dist.kernels.attention import backward

        if kernel == FORWARD:
            return lambda: self._attend(launch)[:1]
        if kernel == DK_DV:
            return lambda: backward.dk_dv(self._given, launch)[:2]
        return lambda: backward.dq(self._given, launch)[:1]

    def times(self, timer: Timer) -> dict[str, float]:
        """Milliseconds of each part of forward and backward pass, alone: the copies of Q, K and V, the forward kernel, the
        copies of dO, the kernel of dK and dV, and that of dQ.
        """
        parts: dict[str, Callable[[], object]] = {"quantise": self._quantise, "prepare": self._prepare_gradient}
        parts |= {kernel: self.call(kernel, self._launch(kernel)) for kernel in (FORWARD, DK_DV, DQ)}
        return operator.launched(lambda: {name: timer(part) for name, part in parts.items()})
