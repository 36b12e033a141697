"""Choices of dropout: any part of a model computes its part of the same choices, and they look random."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.model.dropout import ATTENTION, FEED_FORWARD, Masks, attend
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import Layer

MASKS = Masks(seed=1, step=2, first=4, layer=3)


@given(first=st.integers(0, 6), start=st.integers(0, 9), length=st.integers(1, 6), padding=st.integers(0, 5))
def test_a_part_drops_what_the_whole_drops(first: int, start: int, length: int, padding: int) -> None:
    """Parts of the sequence (sequence parallelism), of the batch (micro-batches, replicas), and any padded length."""
    whole = Masks(1, 2, 0, 3).hidden(torch.ones(8, 15 + padding, 5), 0.5, ATTENTION, sequence_axis=0)
    part = Masks(1, 2, first, 3).hidden(torch.ones(length, 2, 5), 0.5, ATTENTION, sequence_axis=1, start=start)
    assert torch.equal(part.transpose(0, 1), whole[first : first + 2, start : start + length])


def test_what_is_kept_is_scaled_and_the_share_is_as_asked() -> None:
    x = torch.full((64, 32, 128), 3.0)
    dropped = MASKS.hidden(x, 0.25, ATTENTION, sequence_axis=0)
    assert dropped.unique().tolist() == [0, 4]
    # 262,144 coins: five standard deviations.
    assert abs((dropped == 0).float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / x.numel())


@pytest.mark.parametrize("other", [Masks(2, 2, 4, 3), Masks(1, 3, 4, 3), Masks(1, 2, 36, 3), Masks(1, 2, 4, 2), None])
def test_choices_are_independent(other: Masks | None) -> None:
    """Of those of another seed, step, sequence, layer and site, and along each axis: products of signs average to zero."""
    shape, site = (32, 32, 64), ATTENTION if other else FEED_FORWARD
    mine = MASKS.hidden(torch.ones(shape), 0.5, ATTENTION, sequence_axis=0) - 1
    theirs = (other or MASKS).hidden(torch.ones(shape), 0.5, site, sequence_axis=0) - 1
    bound = 5 / math.sqrt(mine.numel())
    assert abs((mine * theirs).mean()) < bound
    for axis in range(3):
        for distance in (1, 2, 7):
            assert abs((mine * mine.roll(distance, axis)).mean()) < bound


def test_attention_without_dropout_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    seen = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None, :]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.allclose(attend(q, k, v, seen, 0.0, MASKS), wanted, atol=1e-6)


def test_a_shard_of_heads_drops_what_all_heads_drop() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    whole = attend(q, k, v, seen, 0.5, MASKS)
    assert torch.equal(attend(q[:, 2:], k[:, 2:], v[:, 2:], seen, 0.5, MASKS, head=2), whole[:, 2:])
    longer = F.pad(q, (0, 0, 0, 3)), F.pad(k, (0, 0, 0, 3)), F.pad(v, (0, 0, 0, 3))
    padded = attend(*longer, F.pad(seen, (0, 3)), 0.5, MASKS)
    assert torch.allclose(padded[:, :, :7], whole, atol=1e-6)


def test_the_plain_model_follows_masks_in_training_only() -> None:
    layer = Layer(ModelOptions(layers=1, hidden=16, heads=4, ffn=24, hidden_dropout=0.5, attention_dropout=0.5))
    x, seen = torch.randn(2, 5, 16), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(layer(x, seen, MASKS), layer(x, seen, MASKS))
    assert not torch.allclose(layer(x, seen, MASKS), layer(x, seen, MASKS.of_layer(0)))
    assert not torch.allclose(layer(x, seen), layer(x, seen)), "without masks, torch's generator draws"
    layer.eval()
    assert torch.equal(layer(x, seen, MASKS), layer(x, seen))
