"""The engine under the rules of a GPU (tests/fake_cuda.py): devices agree, and a step waits for the device once."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from gptface_dist import host, meeting
from gptface_dist.engine import parity
from gptface_dist.engine.options import EngineOptions, LossWeights, OptimizerOptions
from gptface_dist.engine.parity import MODEL, VOCABULARY, Case, Found
from gptface_dist.layout import Layout
from gptface_dist.place import Place
from tests.fake_cuda import fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it stands in for CUDA")

ALONE = Layout(zero=0)
FORM = dataclasses.replace(MODEL, layers=2, activation="swiglu", qk_norm=True, hidden_dropout=0.2, attention_dropout=0.1)
CASES = [
    Case(ALONE, micro_batches=4),
    Case(ALONE, FORM, steps=2, micro_batches=4, engine=EngineOptions(recompute="layer")),
    Case(ALONE, FORM, steps=2, micro_batches=4, engine=EngineOptions("bfloat16", recompute="attention")),
]


def waits(case: Case, gpu: Any) -> dict[str, list[str]]:
    """What the host waited for in two steps of an engine, and in an evaluation."""
    from gptface_dist.engine.engine import Engine

    engine = Engine(case.model, VOCABULARY, case.layout, 0, OptimizerOptions(), LossWeights(), case.engine)
    batches = [parity.batches(case, step, engine.device) for step in range(3)]
    found = {}
    for name, act in (("first", engine.step), ("second", engine.step), ("evaluation", engine.evaluate)):
        gpu.waits.clear()
        act(batches.pop())
        found[name] = list(gpu.waits)
    engine.close()
    return found


def work(rank: int, port: int, folder: Path) -> None:
    """One spawned process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with host.hushed():
        host.import_libraries()
        from gptface_dist.engine import groups

        groups.join(Place(rank, 1, rank, port=port, held=True), None, 300)
        for number, case in enumerate(CASES):
            groups.start(case.layout, 0)
            with pytest.MonkeyPatch.context() as monkeypatch, fake_cuda(monkeypatch) as gpu:
                result = {"found": dataclasses.asdict(parity.compare(case)), "waits": waits(case, gpu)}
            (folder / f"{number}.json").write_text(json.dumps(result))
            groups.stop_layout()
        groups.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each case, how far it is from the plain model, and what it waited for."""
    folder = tmp_path_factory.mktemp("cuda")
    with meeting.held() as port:
        start_processes(work, (port, folder), nprocs=1, start_method="spawn")
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(CASES))]


def test_steps_on_a_gpu_are_the_plain_models(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = Found(**result["found"])
        assert found.ok(), found


def test_a_step_waits_once_and_an_evaluation_never(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert [len(result["waits"][name]) for name in ("first", "second", "evaluation")] == [1, 1, 0], result["waits"]
        assert "engine.py" in result["waits"]["second"][0]
