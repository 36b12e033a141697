"""Layouts against the plain model: losses, every gradient, the norm; and each bridge is needed."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import rendezvous_store
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity, parity_case
from gptface_dist.engine.parity import ParityResult, run_parity
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.engine.parity_reference import reference_steps, rounding, tolerance
from gptface_dist.errors import UserError
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import ZERO_STAGES, Layout
from gptface_dist.parallel.options import EngineOptions
from tests.objectives import parity_cases

UNEVEN = dataclasses.replace(MODEL, layers=5)
ALL = dataclasses.replace(MODEL, layers=5, activation="swiglu", qk_norm=True)

DROPOUT = dataclasses.replace(MODEL, hidden_dropout=0.2, attention_dropout=0.1)
RECOMPUTED = [
    (Layout(pp=2, vpp=2, zero=2), "attention"),
    (Layout(dp=2, pp=2, zero=3), "layer"),
    (Layout(dp=2, tp=2, sp=True, zero=3), "layer"),
]
BFLOAT16 = EngineOptions("bfloat16")
ROUNDED = [
    *(Layout(zero=zero) for zero in ZERO_STAGES),
    *(Layout(dp=2, zero=zero) for zero in (0, 2, 3)),
    Layout(dp=2, pp=2, vpp=2, zero=1),
    Layout(dp=2, tp=2, sp=True, zero=3),
]

WANTED = [
    *parity_case.matrix(),
    *(Case(Layout(zero=zero)) for zero in ZERO_STAGES),
    *(Case(Layout(pp=4, zero=zero), UNEVEN) for zero in (0, 3)),
    Case(Layout(pp=2, vpp=2, zero=2)),
    *(Case(Layout(dp=2, pp=pp, zero=3, reshard_after_forward=False)) for pp in (1, 2)),
    # Gradients of norms of queries and keys cancel: the plain model's own rounding is above 1e-5 under some seeds.
    Case(Layout(tp=2, pp=2, vpp=2, sp=True, zero=3), ALL),
    Case(Layout(tp=4, zero=1), dataclasses.replace(ALL, layers=2), seed=3),
    *(Case(layout, DROPOUT) for layout in (Layout(zero=0), Layout(pp=2, vpp=2, zero=1))),
    Case(Layout(2, 2, 2, 2, True, 3), DROPOUT),
    *(Case(layout, engine=BFLOAT16) for layout in ROUNDED),
    *(Case(layout, DROPOUT) for layout, _ in RECOMPUTED),
    *(Case(layout, DROPOUT, engine=EngineOptions(recompute=recompute)) for layout, recompute in RECOMPUTED),
]


def shortened(case: Case) -> Case:
    """Fewer micro-batches, layers and steps where a step takes long: the suite should be done in minutes on two cores.

    Not of models of many parts, whose errors are averaged over more, and of all that are compared with each other or of none.
    """
    layout, plain = case.layout, case.engine.dtype == "float32"
    if plain and case.model in (MODEL, DROPOUT) and layout.world > 2 and layout.vpp == 1:
        case = dataclasses.replace(case, model=dataclasses.replace(case.model, layers=2))
    if plain and layout.world > 2:
        # The second step has gradients of updated weights and moments, as the third.
        case = dataclasses.replace(case, steps=2)
    # Interleaved stages show their steady state only with more micro-batches than stages: with ZeRO-3, the case of ALL does.
    large = layout.world > (4 if layout.vpp > 1 and layout.zero < 3 else 2)
    short = case.model not in (UNEVEN, ALL) and (large or not plain)
    return dataclasses.replace(case, micro_batches=4) if short else case


CASES = [*(shortened(case) for case in WANTED), *parity_cases.CASES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[ParityResult]:
    return run_parity(CASES, tmp_path_factory.mktemp("parity") / "results.jsonl")


def test_every_case_was_run(found: list[ParityResult]) -> None:
    ordered = sorted(CASES, key=lambda case: case.layout.world)
    assert [one.layout for one in found] == [str(case) for case in ordered]


def test_layouts_compute_what_the_plain_model_computes(found: list[ParityResult]) -> None:
    wrong = [one for one in found if not one.ok()]
    assert wrong == []
    # A loss to six digits, in every step.
    assert all(one.loss < 1e-6 for one in found if "bfloat16" not in one.layout)


def test_micro_batches_do_not_change_the_contrast(found: list[ParityResult]) -> None:
    """The same samples, in 16, 4 and 1 micro-batches."""
    losses = [result.losses for result in found if result.layout == f"contrastive, {Layout(zero=0)}"]
    assert len(losses) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


def test_recomputing_changes_nothing_at_all(found: list[ParityResult]) -> None:
    losses = {one.layout: one.losses for one in found}
    for layout, recompute in RECOMPUTED:
        assert losses[f"{layout}, dropout, recompute {recompute}"] == losses[f"{layout}, dropout"]


def test_bfloat16_layouts_round_alike(found: list[ParityResult]) -> None:
    """Every layout is within the band of float32 (in the test of all); those that round in the same places are equal."""
    losses = {one.layout: one.losses for one in found}
    alone = losses[f"{Layout(zero=0)}, bfloat16"]
    for layout in ROUNDED:
        mine = losses[f"{layout}, bfloat16"]
        if layout.tp == 1:
            # Losses of two steps, so that the first update is the same; later ones add gradients in another order.
            assert mine[:2] == pytest.approx(alone[:2], rel=1e-6)
        # A loss is a mean over some hundred tokens. Rounding moves each one's logits by a few times 2^-9, this way or that, and
        # their mean by less than 2^-9; what two layouts round in different places differs by twice that at most.
        assert mine == pytest.approx(alone, rel=2**-8)


def test_zero3_gathers_what_it_should(found: list[ParityResult]) -> None:
    """By hand: float32, two replicas, four micro-batches each; a rank's half of 71 biases is padded to 36."""
    gathered = {one.layout: one.gathered for one in found}
    sizes = {p.name: 4 * (math.prod(p.shape) + math.prod(p.shape) % 2) for p in MilmItm().parameters(MODEL, VOCABULARY)}
    # All weights at the end of every step, and at the very beginning.
    whole = sum(sizes.values())
    assert gathered["DP2 x TP1 x PP1 x ZeRO-3 gathered once a step"] == [2 * whole, whole, whole]

    def uses(name: str) -> int:
        if name == "embeddings.word.weight":
            # Embedding, which its backward pass does without; logits of text and of image, both ways; the tied gradient.
            return 4 + 2 * 2 * 4 + 2
        if name.endswith(("out_proj.bias", "mlp_in.bias", "mlp_out.bias")):
            # Added outside of the module that owns it: DeepSpeed keeps it until the step ends.
            return 1
        # Forward and backward pass; the token head does text and image.
        return 2 * 4 * (2 if name.startswith("token_head") else 1)

    _, second, third = gathered["DP2 x TP1 x PP1 x ZeRO-3"]
    assert second == third == sum(size * uses(name) for name, size in sizes.items())


def test_the_matrix_has_every_legal_cell() -> None:
    """By hand: without TP there is no SP, without PP no VPP: (1 + 2) x (1 + 2) cells of each ZeRO stage."""
    assert len({str(case.layout) for case in parity_case.matrix()}) == 36


def test_every_parameter_was_compared_in_every_step(found: list[ParityResult]) -> None:
    names = sum(1 for _ in MilmItm().parameters(MODEL, VOCABULARY))
    assert found[0].compared == 3 * names


NEEDED = {
    "begin_backward": Case(Layout(dp=2, pp=2), steps=1),
    "forget_gradients": Case(Layout(dp=2, pp=2, vpp=2), steps=2),
    # The stages wait for each other until the time-out, which ends this world: it comes last.
    "scope_trace_check": Case(Layout(dp=2, pp=2)),
}


def without_bridges(rank_info: RankInfo, meetings: list[list[RankInfo]], folder: Path, turn: Any) -> None:
    """One of four spawned processes: each case without its bridge; what comes of it is written down."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

        from gptface_dist.engine import deepspeed_patches

    compare, over_the_world = parity.compare, coordinator.assert_ints_same_as_other_ranks
    for (name, case), ranks in zip(NEEDED.items(), meetings, strict=True):
        stuck = name == "scope_trace_check"

        def caught(case: Case, name: str = name, stuck: bool = stuck) -> ParityResult:
            try:
                result = compare(case)
            except RuntimeError as error:
                result = ParityResult(str(case), gradient=math.inf, worst=str(error), compared=1)
            (folder / f"{name}-{rank_info.rank}").write_text(json.dumps(dataclasses.asdict(result)))
            if stuck:
                # Collectives of a world that timed out meet others than their own: no gathering, no orderly end.
                os._exit(0)
            return result

        parity.compare = caught
        coordinator.assert_ints_same_as_other_ranks = over_the_world
        turn.wait()
        kept = getattr(deepspeed_patches, name)
        setattr(deepspeed_patches, name, lambda first, *_: first)
        parity.work(ranks[rank_info.rank], [case], str(folder / "all"), timeout_s=15 if stuck else 300)
        setattr(deepspeed_patches, name, kept)


def test_each_bridge_is_needed(tmp_path: Path) -> None:
    """Taken out, a bridge's absence is a wrong gradient, a crash, or a collective that times out: never a pass."""
    turn = multiprocessing.get_context("spawn").Barrier(4)
    with contextlib.ExitStack() as stores:
        meetings = [stores.enter_context(rendezvous_store(4)) for _ in NEEDED]
        spawn(without_bridges, 4, meetings, tmp_path, turn)
    found = {
        name: [ParityResult(**json.loads((tmp_path / f"{name}-{rank}").read_text())) for rank in range(4)] for name in NEEDED
    }
    for name, ranks in found.items():
        assert not all(one.ok() for one in ranks), name
    assert max(one.gradient for one in found["forget_gradients"]) < math.inf, "wrong, not a crash"
    assert any("Timed out" in one.worst for one in found["scope_trace_check"])


def test_the_comparison_can_fail() -> None:
    assert ParityResult("x", compared=1).ok()
    assert not ParityResult("x").ok(), "nothing compared is no proof"
    for name in ("loss", "norm", "gradient"):
        assert not ParityResult("x", compared=1, **{name: 2e-5}).ok()
        assert not ParityResult("x", compared=1, **{name: float("nan")}).ok()


@pytest.mark.parametrize("name", ["loss", "norm", "gradient"])
@pytest.mark.parametrize("rank", range(3))
def test_nan_of_any_rank_is_kept(name: str, rank: int) -> None:
    results = [ParityResult("x", loss=1e-7, norm=2e-7, gradient=3e-7, worst="a", compared=2, gathered=[n]) for n in range(3)]
    results[rank] = dataclasses.replace(results[rank], **{name: math.nan}, worst="b")
    merged = parity.merged(results)
    assert math.isnan(getattr(merged, name))
    assert not merged.ok()
    assert name != "gradient" or merged.worst == "b"
    assert merged.compared == 6
    assert merged.gathered == [2]


def test_the_largest_error_of_all_ranks_counts() -> None:
    results = [ParityResult("x", gradient=error, worst=str(error), compared=1) for error in (1e-7, 3e-7, 2e-7)]
    assert parity.merged(results).worst == "3e-07"


def test_replicas_share_all_micro_batches() -> None:
    with pytest.raises(UserError, match="8 micro-batches cannot be shared by 3 replicas"):
        Case(Layout(dp=3))


def test_the_truth_is_in_float64() -> None:
    """Float32 is off by some roundings of 2^-24, bfloat16 by some of 2^-9; dropout and its masks are the same."""
    case = Case(Layout(zero=0), dataclasses.replace(DROPOUT, layers=2), steps=1, micro_batches=4)
    (truth,) = reference_steps(case, parity.OPTIMIZER)
    assert {gradient.dtype for gradient in truth.gradients.values()} == {torch.float64}
    assert 2**-26 < rounding(case, parity.OPTIMIZER) < 2**10 * 2**-24
    bfloat16 = dataclasses.replace(case, engine=BFLOAT16)
    assert 2**-11 < rounding(bfloat16, parity.OPTIMIZER) < 2**6 * 2**-9


def test_the_bound_is_that_of_rounding() -> None:
    case = Case(Layout())
    assert tolerance(case, 1e-6) == 1e-5
    assert tolerance(case, 2e-5) == pytest.approx(8e-5)
    assert tolerance(dataclasses.replace(case, tolerance=1e-7), 2e-5) == 1e-7
    assert not tolerance(case, math.nan) >= 1e-5, "a reference that is not finite proves nothing"
