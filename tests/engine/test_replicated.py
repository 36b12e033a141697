"""Buckets of replicated gradients; their sums and norms are proven by the layouts with zero=0 (test_parity)."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptface_dist.engine.replicated import _filled


@given(sizes=st.lists(st.integers(1, 9), min_size=1), limit=st.integers(1, 20))
def test_buckets_have_every_parameter_once_in_order_and_are_bounded(sizes: list[int], limit: int) -> None:
    parameters = [nn.Parameter(nn.Parameter().new_zeros(size)) for size in sizes]
    buckets = _filled(parameters, limit)
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    for bucket in buckets:
        assert sum(p.numel() for p in bucket) <= limit or len(bucket) == 1
    for bucket, following in itertools.pairwise(buckets):
        assert sum(p.numel() for p in bucket) + following[0].numel() > limit, "no bucket is smaller than need be"
