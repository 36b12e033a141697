"""A stage's layers: megatron-core's transformer layer with norms and attention of our own."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from gptface_dist.layout import Layout
from gptface_dist.model.options import ModelOptions


def megatron_config(options: ModelOptions, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """What megatron-core is told of the model and layout; everything that needs CUDA or fuses away exactness is off."""
    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        ffn_hidden_size=options.ffn,
        layernorm_epsilon=options.norm_eps,
        activation_func=F.silu if options.activation == "swiglu" else F.gelu,
        gated_linear_unit=options.activation == "swiglu",
        qk_layernorm=options.qk_norm,
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
    )


class SharedNorm(nn.Module):
    """LayerNorm whose weights every tensor-parallel rank has, applied to a part of what they serve: a part of the
    sequence (sequence parallelism), or a part of the heads. Their gradients are summed over the ranks in the backward
    pass, before the engine shards them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, partial: bool | None = None, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.partial = config.sequence_parallel if partial is None else partial

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight, bias = copy_to_tensor_model_parallel_region(weight), copy_to_tensor_model_parallel_region(bias)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


class HeadNorm(SharedNorm):
    """Norm of queries or keys: every rank has other heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__(config, hidden_size, eps, partial=True)


class OutputLinear(RowParallelLinear):
    """Row-parallel linear layer whose bias, added to a part of the sequence, gets the whole sequence's gradient."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[L, B, K / tp] -> [L, B, H] ([L / tp, B, H]) and the bias to add."""
        output, bias = super().forward(input_)
        if bias is not None and self.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        return output, bias


class CoreAttention(nn.Module):
    """Bidirectional attention of this rank's heads; padding is not attended to."""

    def __init__(self, config: TransformerConfig, **_: Any):
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """[L, B, N, D] each, bool [B, 1, 1, L] of tokens that are seen -> [L, B, N * D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)
        return attended.permute(2, 0, 1, 3).flatten(2)


LOCAL_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "qkv",
    "self_attention.q_layernorm": "q_norm",
    "self_attention.k_layernorm": "k_norm",
    "self_attention.linear_proj": "projection",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp_in",
    "mlp.linear_fc2": "mlp_out",
}
"""Names inside megatron-core's layer -> names inside the plain one."""


def layer_spec(options: ModelOptions) -> ModuleSpec:
    """The ``local`` layer: megatron-core's own modules with our norms and attention."""
    head_norm = HeadNorm if options.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=OutputLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=SharedNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.padding}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=SharedNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=OutputLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
