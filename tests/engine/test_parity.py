"""Layouts against the plain model: losses, every gradient, the norm; and each bridge is needed."""

import dataclasses
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessException, start_processes

from gptface_dist.engine import bridges, engine, parity
from gptface_dist.engine.parity import MODEL, Case, Found, prove
from gptface_dist.layout import Layout

UNEVEN = dataclasses.replace(MODEL, layers=5)
ALL = dataclasses.replace(MODEL, layers=5, activation="swiglu", qk_norm=True)

CASES = [
    *parity.matrix(),
    *(Case(Layout(zero=zero)) for zero in (1, 2, 3)),
    *(Case(Layout(pp=4, zero=zero), UNEVEN) for zero in (1, 3)),
    Case(Layout(pp=2, vpp=2, zero=2)),
    Case(Layout(dp=2, pp=2, zero=3, gathering="per_step")),
    Case(Layout(tp=2, pp=2, vpp=2, sp=True, zero=3), ALL),
    Case(Layout(tp=4, zero=1), ALL),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return prove(CASES, tmp_path_factory.mktemp("parity") / "found.jsonl")


def test_every_case_was_run(found: list[Found]) -> None:
    assert [one.layout for one in found] == [str(case.layout) for case in sorted(CASES, key=lambda case: case.layout.world)]


def test_layouts_compute_what_the_plain_model_computes(found: list[Found]) -> None:
    wrong = [one for one in found if not one.ok(1e-5)]
    assert wrong == []
    # A loss to six digits, in every step.
    assert all(one.loss < 1e-6 for one in found)


def test_the_matrix_has_every_legal_cell() -> None:
    """By hand: without TP there is no SP, without PP no VPP: (1 + 2) x (1 + 2) cells of each ZeRO stage."""
    assert len({str(case.layout) for case in parity.matrix()}) == 27


def test_every_parameter_was_compared_in_every_step(found: list[Found]) -> None:
    names = sum(1 for _ in parity.parameters(MODEL, parity.VOCABULARY))
    assert found[0].compared == 3 * names


def without_bridge(rank: int, world: int, port: int, name: str, case: Case, out: str) -> None:
    """A spawned process in which one bridge does nothing."""

    def nothing(first: object, *_: object) -> object:
        return first

    if name == "begin_backward":
        engine.bridges.begin_backward = lambda output, _: output.view_as(output)
    else:
        setattr(bridges, name, nothing)
    parity.work(rank, world, port, [case], out, timeout_s=40)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("begin_backward", Layout(pp=2, zero=3)),
        ("forget_gradients", Layout(pp=2, vpp=2, zero=3)),
        ("scope_trace_check", Layout(dp=2, pp=2, zero=3)),
    ],
)
def test_each_bridge_is_needed(tmp_path: Path, name: str, layout: Layout) -> None:
    """Taken out, a bridge's absence is a wrong gradient, a crash, or a collective that times out: never a pass."""
    out = tmp_path / "found.jsonl"
    case = Case(layout)
    arguments = (layout.world, parity.free_port(), name, case, str(out))
    try:
        start_processes(without_bridge, arguments, nprocs=layout.world, start_method="spawn")
    except ProcessException:
        return
    (result,) = [Found(**parity.json.loads(line)) for line in out.read_text().splitlines()]
    assert not result.ok(1e-3)


def test_the_comparison_can_fail() -> None:
    assert Found("x", compared=1).ok()
    assert not Found("x").ok(), "nothing compared is no proof"
    for name in ("loss", "norm", "gradient"):
        assert not Found("x", compared=1, **{name: 2e-5}).ok()
        assert not Found("x", compared=1, **{name: float("nan")}).ok()
