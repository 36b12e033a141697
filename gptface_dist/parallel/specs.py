"""Optional faster parts of a stage's layers: Transformer Engine's linear layers with FP8, and NVIDIA apex's fused norm and
optimizer.

The project is tested with neither package: **this code follows their documentation and megatron-core 0.16, and never ran**.
Every spec keeps our attention and placement of norms, so that dropout, recomputation and sequence parallelism work as the
parity check proves for the ``local`` one.

Importing this module imports neither package, nor megatron-core.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

FP8_MULTIPLE = 16
"""FP8 matrix products need both dimensions of a weight to be multiples of this."""

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(x [.., H], weight [H], bias [H], eps) -> [.., H]."""


def check(engine: EngineOptions, model: ModelOptions, layout: Layout) -> None:
    """Refuse options that this machine or the model does not support, before any process group exists."""
    engine.attention.check(model.head_size, model.attention_dropout)
    problems = _missing(engine) + _unfit(engine, model, layout)
    if problems:
        raise UserError("; ".join(problems))


def _missing(engine: EngineOptions) -> list[str]:
    problems = []
    if engine.spec == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        problems.append(
            "engine.spec=transformer_engine, but Transformer Engine is not installed: "
            "pip install transformer_engine[pytorch], or engine.spec=local"
        )
    for name in ("norm", "optimizer"):
        if getattr(engine, name) == "apex" and (why := _apex_problem()):
            problems.append(f"engine.{name}=apex, but {why}, or engine.{name}=torch")
    if (engine.spec != "local" or engine.norm == "apex" or engine.optimizer == "apex") and not torch.cuda.is_available():
        problems.append("engine.spec, norm and optimizer other than local and torch need CUDA, which this host has not")
    return problems


def _unfit(engine: EngineOptions, model: ModelOptions, layout: Layout) -> list[str]:
    problems: list[str] = []
    if engine.fp8 == "none":
        return problems
    if engine.spec != "transformer_engine":
        problems.append(f"engine.fp8={engine.fp8} is Transformer Engine's: it needs engine.spec=transformer_engine")
    if engine.dtype != "bfloat16":
        problems.append(f"engine.fp8={engine.fp8} needs engine.dtype=bfloat16, got {engine.dtype}")
    if engine.recompute == "layer":
        problems.append("engine.fp8 with recompute=layer would scale twice: use recompute=attention or none")
    for name, size in (("hidden", model.hidden // layout.tp), ("ffn", model.ffn // layout.tp)):
        if size % FP8_MULTIPLE:
            problems.append(f"engine.fp8 needs model.{name} / tp to be a multiple of {FP8_MULTIPLE}, got {size}")
    return problems


def _apex_problem() -> str | None:
    """Why NVIDIA's apex cannot be used; None if it can. The package ``apex`` on the package index is unrelated."""
    package = importlib.util.find_spec("apex")
    if package is None:
        return "NVIDIA's apex is not installed: build it from its source with its C++ and CUDA extensions"
    folders = [Path(folder) for folder in package.submodule_search_locations or []]
    if not any((folder / "normalization").is_dir() for folder in folders):
        return "the installed apex is an unrelated package of that name: pip uninstall apex, and build NVIDIA's from its source"
    if importlib.util.find_spec("amp_C") is None:
        return "the installed apex was built without its C++ and CUDA extensions: build it with them"
    return None


def norm(name: str) -> Norm:
    """LayerNorm of torch, or NVIDIA apex's fused kernel; ``name`` as in ``EngineOptions.norm``."""
    if name == "torch":
        return lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps)
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias, eps: fused_layer_norm_affine(x, weight, bias, weight.shape, eps)


def adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW of torch, or NVIDIA apex's fused kernel; both take torch's arguments and keep torch's state."""
    if name == "torch":
        return torch.optim.AdamW
    from apex.optimizers import FusedAdam

    class FusedAdamW(FusedAdam):
        """apex counts steps once a group; torch, and our checkpoints, once a parameter."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                counts = [self.state[p]["step"] for p in group["params"] if "step" in self.state[p]]
                group["step"] = int(counts[0]) if counts else 0
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]))
            return loss

    return FusedAdamW


def linear_layers(name: str) -> tuple[type, type]:
    """(column-parallel, row-parallel) layers: megatron-core's own, or Transformer Engine's.

    The row-parallel one returns its bias separately: see :class:`gptface_dist.parallel.layer.RowParallelBias`.
    """
    if name == "local":
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


def megatron_options(engine: EngineOptions) -> dict[str, Any]:
    """Fields of megatron-core's configuration that depend on the spec."""
    if engine.spec == "local":
        return {}
    # Transformer Engine would cache FP8 weights between micro-batches, but ZeRO-3 frees the weights in between.
    options: dict[str, Any] = {"disable_parameter_transpose_cache": True}
    return options if engine.fp8 == "none" else options | {"fp8": engine.fp8, "fp8_recipe": engine.fp8_recipe}


def precision(config: "TransformerConfig") -> AbstractContextManager[Any]:
    """Context of a stage's layers: Transformer Engine's FP8 if the configuration has it."""
    if not config.fp8:
        return nullcontext()
    from megatron.core.fp8_utils import get_fp8_context

    context: AbstractContextManager[Any] = get_fp8_context(config)
    return context
