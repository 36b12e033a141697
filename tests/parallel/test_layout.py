"""Layouts: every illegal one is refused with its reason, every layer is on one chunk."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout

MODEL = ModelOptions(layers=4, hidden=16, heads=4, ffn=24)


@given(layers=st.integers(1, 40), pp=st.integers(1, 6), vpp=st.integers(1, 4))
def test_every_layer_is_on_exactly_one_chunk_in_order(layers: int, pp: int, vpp: int) -> None:
    layout = Layout(pp=pp, vpp=vpp)
    parts = [layout.layers_of(chunk, layers) for chunk in range(layout.chunks)]
    assert list(itertools.chain(*parts)) == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    chunks = sorted(layout.chunk(stage, turn) for stage in range(pp) for turn in range(vpp))
    assert chunks == list(range(layout.chunks)), "every chunk is on one rank"


@pytest.mark.parametrize(
    ("layout", "world", "micro_batches", "message"),
    [
        (Layout(dp=0), 1, 8, "dp must be at least 1, got 0"),
        (Layout(zero=4), 1, 8, r"zero must be one of \(0, 1, 2, 3\), got 4"),
        (Layout(tp=3), 3, 8, r"model.heads 4 is not a multiple of tp 3: 1, 2, 4 would do"),
        (Layout(sp=True), 1, 8, "needs tp of at least 2"),
        (Layout(vpp=2), 1, 8, "needs pp of at least 2"),
        (Layout(pp=3, vpp=2), 3, 9, "4 layers cannot fill pp 3 x vpp 2 = 6 chunks"),
        (Layout(pp=2, vpp=2), 2, 7, "multiple of pp 2 micro-batches a step, got 7: nearest is 8"),
        (Layout(dp=2, tp=2), 8, 8, "needs 4 processes, there are 8: dp 4 would fit"),
        (Layout(zero=1, reshard_after_forward=False), 1, 8, "needs zero=3, got zero=1"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(layout: Layout, world: int, micro_batches: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        layout.check(world, MODEL, micro_batches)
    assert "\n" not in str(caught.value)


def test_sequence_parallelism_divides_the_padded_length() -> None:
    Layout(tp=2, sp=True).check(2, MODEL, 8, length=48)
    with pytest.raises(UserError, match="padded length 47 must be a multiple of tp 2"):
        Layout(tp=2, sp=True).check(2, MODEL, 8, length=47)


def test_every_legal_cell_is_accepted() -> None:
    for tp, pp, vpp, zero, sp in itertools.product((1, 2), (1, 2), (1, 2), (0, 1, 2, 3), (False, True)):
        layout = Layout(2, tp, pp, vpp, sp, zero)
        legal = not (sp and tp == 1) and not (vpp == 2 and pp == 1)
        assert (list(layout.problems(MODEL, 8)) == []) == legal, str(layout)
