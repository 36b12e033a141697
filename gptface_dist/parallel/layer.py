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
    """What megatron-core is told of the model and layout; everything that needs CUDA or fuses away exactness is off."""
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
        # The stage's output passes through a view (the boundary to the engine), which deallocation would break.
        deallocate_pipeline_outputs=False,
        # gloo has no batched point-to-point calls.
        batch_p2p_comm=torch.cuda.is_available(),
        # Our losses are divided by global counts already.
        calculate_per_token_loss=True,
        **specs.megatron_options(engine),
    )


class ReplicatedNorm(nn.Module):
    """LayerNorm whose weights every tensor-parallel rank has. With sequence parallelism each applies them to a part of the
    sequence, and their gradients are summed over the ranks in the backward pass, before the engine shards them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, normalise: specs.Norm, **_: Any):
        super().__init__()
        self.normalise = normalise
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.partial = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight, bias = copy_to_tensor_model_parallel_region(weight), copy_to_tensor_model_parallel_region(bias)
        return self.normalise(x, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """Weight and bias of the norm of queries or keys, which attention applies. Every tensor-parallel rank has them, for other
    heads, so their gradients are summed over the ranks.
    """

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self) -> Tensor:
        """[2, D]: a copy, since ZeRO-3 takes the parameters away again."""
        return copy_to_tensor_model_parallel_region(torch.stack([self.weight, self.bias]))


class RowParallelBias:
    """Before a row-parallel linear layer: its bias, added to a part of the sequence, gets the whole sequence's gradient."""

    config: TransformerConfig

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[L, B, K / tp] -> [L, B, H] ([L / tp, B, H]) and the bias to add."""
        output, bias = super().forward(x)  # type: ignore[misc]
        if bias is not None and self.config.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        return output, bias


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, of which the backward pass keeps the inputs alone and computes the rest again.

    It must not draw from a random generator: ours do not. megatron-core's own way saves CUDA's random states.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class CoreAttention(nn.Module):
    """Bidirectional attention of this rank's heads, QK-norm included; padding is not attended to."""

    def __init__(self, config: TransformerConfig, options: AttentionOptions, qk_norm: bool, **_: Any):
        super().__init__()
        self.options, self.chance, self.eps = options, config.attention_dropout, config.layernorm_epsilon
        if qk_norm:
            self.q_norm, self.k_norm = (HeadNorm(config.kv_channels, config.params_dtype) for _ in range(2))
        self.qk_norm = qk_norm
        self.masks: Masks | None = None
        """What dropout drops in the present micro-batch; None drops nothing."""
        self.recompute = False
        """Whether the backward pass attends again, rather than keep what attention computed."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[L, B, N, D] each, bool [B, 1, 1, L] of tokens that may be attended to (None: all) -> [L, B, N * D]."""
        # Here, so that recomputation does not ask ZeRO-3 for the weights again.
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
    """What a sublayer gives is added to the residual stream: its bias added first, and a part dropped.

    megatron-core asks for this once a sublayer and calls what it gets.
    """

    def __init__(self, site: int, config: TransformerConfig):
        self.site, self.sequence_parallel = site, config.sequence_parallel
        self.masks: Masks | None = None
        """What dropout drops in the present micro-batch; None drops nothing."""

    def __call__(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The operation: ([L, B, H] ([L / tp, B, H]), bias), residual, chance of being dropped -> [L, B, H]."""
        return self._add

    def _add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, chance: float) -> Tensor:
        x, bias = output
        x = x if bias is None else x + bias
        if self.masks is not None:
            start = groups.get_tensor_model_parallel_rank() * len(x) if self.sequence_parallel else 0
            x = self.masks.hidden(x, chance, self.site, sequence_axis=1, start=start)
        return residual + x


class StageLayer(TransformerLayer):
    """megatron-core's layer, told of each micro-batch's dropout."""

    recompute = "none"
    """What the backward pass computes again: see :class:`gptface_dist.parallel.options.EngineOptions`."""

    def set_recompute(self, recompute: str) -> None:
        """From the next forward pass on."""
        self.recompute = recompute
        self.self_attention.core_attention.recompute = recompute == "attention"

    def forward(self, x: Tensor, attn_mask: Tensor | None, masks: Masks | None) -> Tensor:
        """Hidden states [L, B, H] ([L / tp, B, H]), ``attn_mask`` as of :class:`CoreAttention` -> hidden states."""
        if self.recompute == "layer":
            return checkpointed(self._run, x, attn_mask, masks)
        return self._run(x, attn_mask, masks)

    def _run(self, x: Tensor, attn_mask: Tensor | None, masks: Masks | None) -> Tensor:
        # Here, so that the layer is told again when it runs again, after other micro-batches.
        mine = None if masks is None else masks.of_layer(self.layer_number - 1)
        for part in (self.self_attention.core_attention, self.self_attn_bda, self.mlp_bda):
            part.masks = mine
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
"""Names inside megatron-core's layer -> names inside the plain one."""


def layer_spec(options: ModelOptions, config: TransformerConfig, engine: EngineOptions) -> ModuleSpec:
    """megatron-core's layer with our norms and attention, and the linear layers that ``engine`` names."""
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
