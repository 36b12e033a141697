"""Small image tokenizers with random weights."""

from typing import Any

import torch
from diffusers import VQModel


def small_model(codes: int = 16, seed: int = 0, **config: Any) -> VQModel:
    """A ``VQModel`` of two levels (factor 2) whose codes are about as far apart as its latents, so that many are used."""
    options: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "num_vq_embeddings": codes,
        "norm_num_groups": 4,
        "vq_embed_dim": 4,
        "sample_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VQModel(**{**options, **config}).eval()
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model
