"""Between gradients and update: nothing of a skipped step is kept, and a scaled one is scaled, at any ZeRO stage."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity_case
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions

WORLD = 4
SMALL = dataclasses.replace(MODEL, layers=2)
LAYOUTS = [Layout(dp=2, pp=2, zero=zero) for zero in (0, 1, 2, 3)] + [Layout(dp=4, zero=3, reshard_after_forward=False)]
# bfloat16 where float32 master weights are apart: emulated on many CPUs, and slow there.
CASES = [(layout, "float32") for layout in LAYOUTS] + [(LAYOUTS[zero], "bfloat16") for zero in (1, 3)]


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's master weights and moments, and the updates done."""
    found = {"updates": torch.tensor(engine.state.updates)}
    for number, local_shard in enumerate(engine.state.local_shards()):
        found |= {f"{number} {local_shard.entry.name} {kind}": value.clone() for kind, value in local_shard.values.items()}
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check(layout: Layout, dtype: str) -> dict[str, Any]:
    """What came of it on this rank."""
    from megatron.core import parallel_state as groups

    from gptface_dist.engine.engine import Engine

    case, replica = Case(layout, SMALL, micro_batches=4), groups.get_data_parallel_rank()
    each = case.micro_batches // layout.dp

    def build() -> Any:
        options = OptimizerOptions(eps=1e-4, max_grad_norm=0.5)
        return Engine(MilmItm(), SMALL, VOCABULARY, layout, 0, options, EngineOptions(dtype))

    def mine(step: int) -> Any:
        return parity_case.batches(case, step)[replica * each : (replica + 1) * each]

    plain, tried = build(), build()
    results: dict[str, Any] = {}
    # Skipped in the very first step, when moments have only just been made, and later; the averages too.
    for engine in (plain, tried):
        engine.state.begin_ema()
    before = snapshot(tried)
    skipped = tried.step(mine(7), lambda result: 0.0)
    results["the first step skipped"] = equal(before, snapshot(tried))
    plain.step(mine(0))
    tried.step(mine(0))
    before = snapshot(tried)
    results["a skipped step is none"] = equal(before, snapshot(plain)) and int(before["updates"]) == 1
    tried.step(mine(8), lambda result: 0.0)
    results["a later step skipped"] = equal(before, snapshot(tried))
    losses = [engine.step(mine(1)).loss for engine in (plain, tried)]
    results["goes on as if nothing were"] = losses[0] == losses[1] and equal(snapshot(plain), snapshot(tried))
    results["the norm was known"] = skipped.grad_norm > 0

    class Stop(Exception):
        pass

    def stop(result: Any) -> float:
        assert result.loss > 0
        raise Stop

    before = snapshot(tried)
    try:
        tried.step(mine(2), stop)
    except Stop:
        results["a step that ends the run leaves the weights"] = equal(before, snapshot(tried))
    plain.close()
    tried.close()
    halves = []
    for factor in (1.0, 0.5):
        engine = build()
        engine.step(mine(0), lambda result, factor=factor: factor)  # type: ignore[misc]
        halves.append({name: value for name, value in snapshot(engine).items() if name.endswith("exp_avg")})
        engine.close()
    results["half of the clipped gradient"] = all(
        torch.allclose(halves[0][name] / 2, halves[1][name], rtol=1e-6, atol=1e-12) for name in halves[0]
    )
    return results


def work(rank_info: RankInfo, folder: Path) -> None:
    """One spawned process, for all cases."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.parallel import groups

        groups.join(rank_info, None, 300)
        for number, (layout, dtype) in enumerate(CASES):
            groups.start(layout, 0)
            (folder / f"{number}-{rank_info.rank}").write_text(json.dumps(check(layout, dtype)))
            groups.stop_layout()
        groups.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("updates")
    spawn(work, WORLD, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{layout} {dtype}" for layout, dtype in CASES])
def test_nothing_of_a_skipped_step_is_kept(results: Path, number: int) -> None:
    for rank in range(WORLD):
        found = json.loads((results / f"{number}-{rank}").read_text())
        assert len(found) == 7
        assert [name for name, right in found.items() if not right] == []
