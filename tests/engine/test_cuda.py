"""The engine without ZeRO under the rules of a GPU (tests/fake_cuda.py): devices agree, and a step waits for the device once.

DeepSpeed's engine does not run under them: it moves parameters in ways of its own.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity, parity_case
from gptface_dist.engine.parity import ParityResult
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from tests.fake_cuda import fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it stands in for CUDA")

ALONE = Layout(zero=0)
FORM = dataclasses.replace(MODEL, layers=2, activation="swiglu", qk_norm=True, hidden_dropout=0.2, attention_dropout=0.1)
CASES = [
    # The third of four micro-batches predicts no text.
    Case(ALONE, model=FORM, steps=2, micro_batches=4, engine=EngineOptions(recompute="layer")),
    Case(ALONE, model=FORM, steps=1, micro_batches=2, engine=EngineOptions("bfloat16", recompute="attention")),
    *(Case(layout, model=FORM, steps=1, micro_batches=2) for layout in (Layout(dp=2, zero=0), Layout(pp=2, zero=0))),
    Case(Layout(tp=2, sp=True, zero=0), model=FORM, steps=1, micro_batches=2),
]
RANKS = [(number, rank) for number, case in enumerate(CASES) for rank in range(case.layout.world)]
PIPELINE_WAIT = "torch.cuda.synchronize"
"""megatron-core waits for the device after every exchange between stages (``batch_p2p_sync``)."""


def waits(case: Case, gpu: Any) -> dict[str, list[str]]:
    """What the host waited for in two steps of an engine, and in an evaluation."""
    from megatron.core import parallel_state

    from gptface_dist.engine.engine import Engine

    engine = Engine(MilmItm(), case.model, VOCABULARY, case.layout, 0, OptimizerOptions(), case.engine)
    replica, each = parallel_state.get_data_parallel_rank(), case.micro_batches // case.layout.dp
    mine = slice(replica * each, (replica + 1) * each)
    batches = [parity_case.batches(case, step, engine.device)[mine] for step in range(3)]
    found = {}
    for name, act in (("first", engine.step), ("second", engine.step), ("evaluation", engine.evaluate)):
        gpu.waits.clear()
        act(batches.pop())
        found[name] = list(gpu.waits)
    engine.close()
    return found


def work(rank_info: RankInfo, folder: Path) -> None:
    """One spawned process, for all cases of a world size."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.parallel import groups

        groups.join(rank_info, None, 300)
        for number, case in enumerate(CASES):
            if case.layout.world != rank_info.world:
                continue
            groups.start(case.layout, 0)
            with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch) as gpu:
                result = {"found": dataclasses.asdict(parity.compare(case)), "waits": waits(case, gpu)}
            (folder / f"{number}-{rank_info.rank}.json").write_text(json.dumps(result))
            groups.stop_layout()
        groups.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each case and rank, how far it is from the plain model, and what it waited for."""
    folder = tmp_path_factory.mktemp("cuda")
    for world, _ in itertools.groupby(CASES, key=lambda case: case.layout.world):
        spawn(work, world, folder)
    return [json.loads((folder / f"{number}-{rank}.json").read_text()) for number, rank in RANKS]


def test_steps_on_a_gpu_are_the_plain_models(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = ParityResult(**result["found"])
        assert found.ok(), found


def test_a_step_waits_once_and_an_evaluation_never(results: list[dict[str, Any]]) -> None:
    for (number, _), result in zip(RANKS, results, strict=True):
        waits = result["waits"]
        if CASES[number].layout.pp > 1:
            waits = {name: [wait for wait in found if wait != PIPELINE_WAIT] for name, found in waits.items()}
        assert [len(waits[name]) for name in ("first", "second", "evaluation")] == [1, 1, 0], waits
        assert "engine.py" in waits["second"][0]
