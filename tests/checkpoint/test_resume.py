"""Training goes on from a checkpoint as if it had never stopped, on the layout that wrote it and on every other."""

import dataclasses
from pathlib import Path

import pytest
import torch

from gptface_dist.checkpoint.folder import name_of
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.engine.parity_case import MODEL, VOCABULARY
from gptface_dist.model.plain import GPTFace
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs, difference, reference_outputs
from gptface_dist.parallel.layout import Layout
from tests.checkpoint.job_pool import REFERENCE, Job, tensors, train

# Swiglu has fused halves; of 5 layers, stages have different numbers.
FULL = dataclasses.replace(MODEL, layers=5, activation="swiglu", qk_norm=True)
STRAIGHT = {
    **{f"one{zero}": Layout(zero=zero) for zero in (1, 3)},
    **{f"tp{zero}": Layout(tp=2, zero=zero) for zero in (1, 3)},
    **{f"pp{zero}": Layout(pp=2, zero=zero) for zero in (1, 3)},
    **{f"dp{zero}": Layout(dp=2, zero=zero) for zero in (0, 1, 3)},
    "vpp3": Layout(pp=2, vpp=2, zero=3),
    "all3": Layout(2, 2, 2, zero=3),
}
LAYOUTS = STRAIGHT | {
    "vpp1": Layout(pp=2, vpp=2, zero=1),
    "all1": Layout(2, 2, 2, zero=1),
    "dp2": Layout(dp=2, zero=2),
    "tp2sp": Layout(tp=2, sp=True, zero=2),
}
# From one layout to another, ZeRO 1 to 3 and back.
RESHARDED = [
    ("one1", "all3"),
    ("all3", "one1"),
    ("tp3", "pp1"),
    ("pp1", "dp3"),
    ("dp3", "vpp1"),
    ("vpp3", "tp1"),
    ("dp0", "pp3"),
    ("tp1", "dp0"),
]
# A checkpoint read and written at once, layout by layout.
CHAIN = ["all1", "tp3", "one3", "pp3", "vpp1", "dp3", "dp0", "tp1", "pp1", "dp2", "one1", "vpp3", "tp2sp", "one3"]
BF16 = ["dp3", "vpp1", "dp0"]


LONG = {"one1", "tp1", "pp1", "dp0", "dp1"}


def steps(*names: str) -> tuple[int, int]:
    """Steps before the checkpoint, and in all: fewer where a step takes long."""
    return (10, 20) if LONG.issuperset(names) else (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs of this module; those of eight processes after each other, once their sources are there."""
    folder = tmp_path_factory.mktemp("resume")
    jobs: list[Job] = []
    for name, layout in STRAIGHT.items():
        jobs.append(Job(layout, str(folder / name), saves=(2, 4, 10, 20) if name in LONG else (2, 4)))
    first = str(folder / "first")
    jobs.insert(0, Job(LAYOUTS["tp3"], first, saves=(2,), model=FULL, ema=True, full=1, poisoned="exp_avg_sq"))
    resumed, chain = [], []
    for of, to in [*((name, name) for name in STRAIGHT), *RESHARDED]:
        half, whole = steps(of, to)
        resumed.append(Job(LAYOUTS[to], str(folder / f"{of}-{to}"), half, (whole,), str(folder / of)))
    for number, name in enumerate(CHAIN):
        start = str(folder / f"chain{number - 1}") if number else first
        chain.append(Job(LAYOUTS[name], str(folder / f"chain{number}"), 2, (2,), start, FULL, ema=True))
    # The largest worlds first, beside that of the last job.
    jobs += sorted([*resumed, chain[0]], key=lambda job: -job.layout.world) + chain[1:]
    for name in BF16:
        out = str(folder / f"bf16{name}")
        jobs.append(Job(LAYOUTS[name], out, saves=(2, 4), dtype="bfloat16", ema=True))
        jobs.append(Job(LAYOUTS[name], f"{out}-again", 2, (4,), out, dtype="bfloat16", ema=True))
    train(jobs, folder)
    return folder


@pytest.mark.parametrize("name", STRAIGHT)
def test_on_the_same_layout_bit_for_bit(folder: Path, name: str) -> None:
    half, whole = steps(name)
    straight, resumed = tensors(folder / name, whole), tensors(folder / f"{name}-{name}", whole)
    assert straight.keys() == resumed.keys()
    assert [key for key, tensor in straight.items() if not torch.equal(tensor, resumed[key])] == []
    before = tensors(folder / name, half)
    assert [key for key, tensor in straight.items() if torch.equal(tensor, before[key])] == [], "training changes everything"


@pytest.mark.parametrize(("of", "to"), RESHARDED)
def test_on_another_layout(folder: Path, of: str, to: str) -> None:
    whole = steps(of, to)[1]
    straight, resumed = tensors(folder / of, whole), tensors(folder / f"{of}-{to}", whole)
    assert straight.keys() == resumed.keys()
    for key, tensor in straight.items():
        assert float((tensor - resumed[key]).norm() / tensor.norm()) < 1e-5, key
    assert RunRecord.read(folder / f"{of}-{to}" / name_of(whole)).updates == whole


def test_read_and_written_by_every_layout_nothing_changes(folder: Path) -> None:
    first = Manifest.read(folder / "first" / name_of(2))
    assert {key.split("/")[0] for key in first.tensors} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    for number, name in enumerate(CHAIN):
        path = folder / f"chain{number}" / name_of(2)
        assert Manifest.read(path).tensors == first.tensors, (number, name)
        assert RunRecord.read(path).updates == 2
    # Fingerprints may be right and files wrong; torch's own reader has the last word.
    written, last = tensors(folder / "first", 2), tensors(folder / f"chain{len(CHAIN) - 1}", 2)
    assert all(torch.equal(tensor, last[key]) for key, tensor in written.items())
    assert not torch.equal(written["ema/layers.0.qkv.weight"], written["weights/layers.0.qkv.weight"])


@pytest.mark.parametrize("name", BF16)
def test_in_bfloat16_bit_for_bit(folder: Path, name: str) -> None:
    """Weights are rounded anew from the float32 ones, which are those that were saved."""
    straight, resumed = tensors(folder / f"bf16{name}", 4), tensors(folder / f"bf16{name}-again", 4)
    assert [key for key, tensor in straight.items() if not torch.equal(tensor, resumed[key])] == []
    assert bool((straight["weights/layers.0.qkv.weight"].bfloat16().float() != straight["weights/layers.0.qkv.weight"]).any())


@pytest.mark.parametrize("name", ["one3", "tp1", "pp3", "vpp3", "dp0", "all3", "chain0", "chain4", "chain12"])
def test_the_plain_model_gives_the_recorded_logits(folder: Path, name: str) -> None:
    model = GPTFace(FULL if name.startswith("chain") else MODEL, VOCABULARY)
    found = tensors(folder / name, 2)
    model.load_state_dict({key.removeprefix("weights/"): v for key, v in found.items() if key.startswith("weights/")})
    recorded = ReferenceOutputs.load(folder / name / name_of(2) / REFERENCE_NAME)
    errors = difference(recorded.outputs, reference_outputs(MilmItm(), model, REFERENCE))
    assert all(error < 1e-5 for error in errors.values()), errors
