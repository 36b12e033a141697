"""Training goes on from a checkpoint as if it had never stopped, on the layout that wrote it and on every other."""

from pathlib import Path

import pytest
import torch

from gptface_dist.engine.parity import MODEL, VOCABULARY
from gptface_dist.layout import Layout
from gptface_dist.model.plain import GPTFace
from gptface_dist.release import probe
from tests.checkpoint.worlds import PROBE, Job, tensors, train

ONE, ALL = Layout(zero=1), Layout(2, 2, 2, zero=3)
LAYOUTS = [
    *(Layout(dp, tp, pp, vpp, zero=zero) for zero in (1, 3) for dp, tp, pp, vpp in ((1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1))),
    Layout(pp=2, vpp=2, zero=3),
    Layout(tp=2, zero=3, sp=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    jobs = [Job(ONE, str(folder / "whole"), steps=8), Job(ONE, str(folder / "half"), steps=4)]
    start = str(folder / "half" / "step-00000004")
    jobs += [Job(one, str(folder / str(one)), first=4, steps=4, start=start) for one in LAYOUTS]
    train(jobs, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_goes_on_as_if_never_stopped(folder: Path, layout: Layout) -> None:
    whole, resumed = tensors(str(folder / "whole"), 8), tensors(str(folder / str(layout)), 8)
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        if layout == ONE:
            assert torch.equal(tensor, resumed[key]), key
        else:
            assert float((tensor - resumed[key]).abs().max() / tensor.abs().max()) < 1e-5, key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_plain_model_gives_the_recorded_logits(folder: Path, layout: Layout) -> None:
    checkpoint = folder / str(layout)
    model = GPTFace(MODEL, VOCABULARY)
    weights = {k.removeprefix("weights/"): v for k, v in tensors(str(checkpoint), 8).items() if k.startswith("weights/")}
    model.load_state_dict(weights)
    recorded = probe.Probe.load(checkpoint / "step-00000008" / probe.PROBE_NAME, VOCABULARY)
    errors = probe.difference(recorded.logits, probe.run(model, PROBE))
    assert all(error < 1e-5 for error in errors.values()), errors
