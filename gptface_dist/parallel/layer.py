"""A stage's layers: megatron-core's transformer layer with norms and attention of our own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as groups
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.model.attention import AttentionOptions
from gptface_dist.model.attention import attend as attend_undropped
from gptface_dist.model.dropout import ATTENTION, FEED_FORWARD, Masks, attend
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel import specs
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions


def megatron_config(options: ModelOptions, layout: Layout, engine: EngineOptions) -> TransformerConfig:
    """megatron-core's configuration for model and layout; options that need CUDA or fuse away exactness are off."""
    dtype = engine.torch_dtype
    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        ffn_hidden_size=options.ffn,
        layernorm_epsilon=options.norm_eps,
        activation_func=F.silu if options.activation == "swiglu" else F.gelu,
        gated_linear_unit=options.activation == "swiglu",
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # The stage's output is a view (deepspeed_patches.begin_backward), which deallocation would break.
        deallocate_pipeline_outputs=False,
        # gloo has no batched point-to-point calls.
        batch_p2p_comm=torch.cuda.is_available(),
        # The engine already divides losses by global counts.
        calculate_per_token_loss=True,
        **specs.megatron_options(engine),
    )


class ReplicatedNorm(nn.Module):
    """LayerNorm with weights replicated over tensor-parallel ranks. With sequence parallelism, each rank normalises a part of
    the sequence, and the backward pass sums the weights' gradients over the ranks before the engine shards them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, normalise: specs.Norm, **_: Any):
        super().__init__()
        self.normalise = normalise
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.partial = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight, bias = copy_to_tensor_model_parallel_region(weight), copy_to_tensor_model_parallel_region(bias)
        return self.normalise(x, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """Weight and bias of the norm of queries or keys, which attention applies. Tensor-parallel ranks replicate them and use
    them on different heads, so the backward pass sums their gradients over the ranks.
    """

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self) -> Tensor:
        """Weight and bias as [2, D]: a copy, since ZeRO-3 frees the parameters after use."""
        return copy_to_tensor_model_parallel_region(torch.stack([self.weight, self.bias]))


class RowParallelBias:
    """Mixin of row-parallel linear layers: under sequence parallelism, sums the bias's gradient over tensor-parallel ranks."""

    config: TransformerConfig

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[L, B, K / tp] -> [L, B, H] ([L / tp, B, H]) and the bias, not yet added."""
        output, bias = super().forward(x)  # type: ignore[misc]
        if bias is not None and self.config.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        return output, bias


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)`` with activation checkpointing: keep the inputs only and recompute the rest in the backward pass.

    ``function`` must not draw random numbers: their state is not saved, unlike in megatron-core's own checkpointing.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class CoreAttention(nn.Module):
    """Bidirectional attention of this rank's heads, with QK-norm and a mask of padding."""

    def __init__(self, config: TransformerConfig, options: AttentionOptions, qk_norm: bool, **_: Any):
        super().__init__()
        self.options, self.chance, self.eps = options, config.attention_dropout, config.layernorm_epsilon
        if qk_norm:
            self.q_norm, self.k_norm = (HeadNorm(config.kv_channels, config.params_dtype) for _ in range(2))
        self.qk_norm = qk_norm
        self.masks: Masks | None = None
        """Dropout masks of the present micro-batch; None: no dropout."""
        self.recompute = False
        """Whether the backward pass recomputes attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[L, B, N, D] each, bool [B, 1, 1, L] that is false at padding (None: no padding) -> [L, B, N * D]."""
        # Outside of `_attend`: its recomputation would make ZeRO-3 gather the weights again.
        norm = QkNorm(self.q_norm(), self.k_norm(), self.eps) if self.qk_norm else None
        if self.recompute:
            return checkpointed(self._attend, query, key, value, attention_mask, self.masks, norm)
        return self._attend(query, key, value, attention_mask, self.masks, norm)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, masks: Masks | None, norm: QkNorm | None
    ) -> Tensor:
        if masks is None or self.chance == 0:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return attend_undropped(q, k, v, attn_mask, self.options, norm).transpose(0, 1).flatten(2)
        if norm is not None:
            query, key = norm(query, key)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        first = groups.get_tensor_model_parallel_rank() * q.shape[1]
        attended = attend(q, k, v, attn_mask, self.chance, masks, first)
        return attended.permute(2, 0, 1, 3).flatten(2)


class BiasDropoutAdd:
    """Adds a sublayer's output to the residual stream, after its bias and dropout.

    megatron-core calls it once per sublayer and forward pass, and then the function that it returns.
    """

    def __init__(self, site: int, config: TransformerConfig):
        self.site, self.sequence_parallel = site, config.sequence_parallel
        self.masks: Masks | None = None
        """Dropout masks of the present micro-batch; None: no dropout."""

    def __call__(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Function of (output [L, B, H] ([L / tp, B, H]), bias), residual and dropout probability -> new residual [L, B, H]."""
        return self._add

    def _add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, chance: float) -> Tensor:
        x, bias = output
        x = x if bias is None else x + bias
        if self.masks is not None:
            start = groups.get_tensor_model_parallel_rank() * len(x) if self.sequence_parallel else 0
            x = self.masks.hidden(x, chance, self.site, sequence_axis=1, start=start)
        return residual + x


class StageLayer(TransformerLayer):
    """megatron-core's layer with our dropout masks and recomputation."""

    recompute = "none"
    """Part that the backward pass recomputes: see :class:`gptface_dist.parallel.options.EngineOptions`."""

    def set_recompute(self, recompute: str) -> None:
        """Set the part to recompute, from the next forward pass on."""
        self.recompute = recompute
        self.self_attention.core_attention.recompute = recompute == "attention"

    def forward(self, x: Tensor, attn_mask: Tensor | None, masks: Masks | None) -> Tensor:
        """[L, B, H] ([L / tp, B, H]) -> the same; ``attn_mask`` as in :class:`CoreAttention`; no dropout without ``masks``."""
        if self.recompute == "layer":
            return checkpointed(self._run, x, attn_mask, masks)
        return self._run(x, attn_mask, masks)

    def _run(self, x: Tensor, attn_mask: Tensor | None, masks: Masks | None) -> Tensor:
        # Inside of `_run`: recomputation comes after other micro-batches and sets the masks again.
        layer_masks = None if masks is None else masks.of_layer(self.layer_number - 1)
        for part in (self.self_attention.core_attention, self.self_attn_bda, self.mlp_bda):
            part.masks = layer_masks
        hidden, _ = super().forward(x, attention_mask=attn_mask)
        return hidden


LOCAL_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "qkv",
    "self_attention.core_attention.q_norm": "q_norm",
    "self_attention.core_attention.k_norm": "k_norm",
    "self_attention.linear_proj": "out_proj",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp_in",
    "mlp.linear_fc2": "mlp_out",
}
"""Names in megatron-core's layer -> names in the plain model's layer."""


def layer_spec(options: ModelOptions, config: TransformerConfig, engine: EngineOptions) -> ModuleSpec:
    """megatron-core's layer with our norms and attention, and the linear layers of ``engine.spec``."""
    column, row = specs.linear_layers(engine.spec)
    output = type("OutputLinear", (RowParallelBias, row), {})
    normalise = {"normalise": specs.norm(engine.norm)}
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=ModuleSpec(CoreAttention, params={"options": engine.attention, "qk_norm": options.qk_norm}),
        linear_proj=output,
    )
    return ModuleSpec(
        module=StageLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ModuleSpec(ReplicatedNorm, params=normalise),
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.padding}, submodules=attention
            ),
            self_attn_bda=ModuleSpec(BiasDropoutAdd, params={"site": ATTENTION, "config": config}),
            pre_mlp_layernorm=ModuleSpec(ReplicatedNorm, params=normalise),
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=output)),
            mlp_bda=ModuleSpec(BiasDropoutAdd, params={"site": FEED_FORWARD, "config": config}),
        ),
    )
