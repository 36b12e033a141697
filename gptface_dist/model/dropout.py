"""Stateless dropout: the mask depends on what is dropped alone, so no layout, recomputation or restart changes it.

A hash of (seed, step, number of the sequence in the global batch, layer, site, position, element) decides whether an element
is kept. A shard of a sequence or of heads thus computes its part of the whole model's mask without drawing the rest,
checkpoints save no random state, and CPUs and GPUs agree. It costs some twenty integer operations an element: more than
torch's own dropout, and nothing where the probability is 0.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptface_dist.hashing import stable_hash
from gptface_dist.model.precision import at_least_float32

_WORD = 0xFFFFFFFF
_STRIDE = 0x9E3779B1
EMBEDDINGS, WEIGHTS, ATTENTION, FEED_FORWARD = range(4)
"""Sites of dropout: embeddings, attention weights, and the outputs of attention and of the feed-forward network."""


@dataclass(frozen=True)
class Masks:
    """Dropout masks of one micro-batch in one layer."""

    seed: int
    """Seed of the run."""
    step: int
    """Optimizer steps done before this one."""
    first: int
    """Number of the micro-batch's first sequence in the global batch."""
    layer: int = 0
    """Global number of the layer; :data:`EMBEDDINGS` are dropped as part of layer 0."""

    def of_layer(self, layer: int) -> "Masks":
        """Masks of the same micro-batch in another layer (global number)."""
        return replace(self, layer=layer)

    def keep(self, chance: float, site: int, sequences: Tensor, *rows: Tensor, elements: int) -> Tensor:
        """Bool [.., elements]: true at kept elements, each with probability ``1 - chance``.

        ``sequences`` int64 number the sequences within the micro-batch; with the other ``rows`` (positions, heads) they
        broadcast to the leading axes.
        """
        key = stable_hash(f"{self.seed} {self.step} {self.layer} {site}", 4)
        state = _mix(((sequences + self.first) * _STRIDE + key) & _WORD)
        for number in rows:
            state = _mix((state + number * _STRIDE) & _WORD)
        last = torch.arange(elements, device=sequences.device) * _STRIDE
        return _mix((state.unsqueeze(-1) + last) & _WORD) >= round(chance * 2**32)

    def drop(self, x: Tensor, chance: float, site: int, sequences: Tensor, *rows: Tensor) -> Tensor:
        """Zero the dropped elements of ``x`` [.., elements] and scale the kept ones by ``1 / (1 - chance)``."""
        kept = self.keep(chance, site, sequences, *rows, elements=x.shape[-1])
        return torch.where(kept, x * (1 / (1 - chance)), 0.0)

    def hidden(self, x: Tensor, chance: float, site: int, sequence_axis: int, start: int = 0) -> Tensor:
        """Dropout of hidden states: [B, L, H] with ``sequence_axis`` 0, [L, B, H] with 1.

        ``start``: position of the first of the L, where ``x`` is a part of the sequence.
        """
        if chance == 0:
            return x
        count, length = x.shape[sequence_axis], x.shape[1 - sequence_axis]
        sequences = torch.arange(count, device=x.device).unsqueeze(1 - sequence_axis)
        positions = torch.arange(start, start + length, device=x.device).unsqueeze(sequence_axis)
        return self.drop(x, chance, site, sequences, positions)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, chance: float, masks: Masks, head: int = 0) -> Tensor:
    """Attention with dropout of its weights by ``masks``, which no fused kernel supports.

    [B, N, L, D] each, bool [B, 1, 1, L] that is false at padding (None: no padding) -> [B, N, L, D]. ``head``: number of the
    first of the N heads. The softmax is in float32.
    """
    scores = at_least_float32(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weights = (scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(-1)
    batch, heads, length, _ = q.shape
    sequences = torch.arange(batch, device=q.device)[:, None, None]
    numbers = torch.arange(head, head + heads, device=q.device)[None, :, None]
    queries = torch.arange(length, device=q.device)[None, None, :]
    return masks.drop(weights, chance, WEIGHTS, sequences, numbers, queries).to(v.dtype) @ v


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) in which every input bit moves about half of the output bits: ``lowbias32`` of
    C. Wellons, "Prospecting for hash functions" (2018).
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
