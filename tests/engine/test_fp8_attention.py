"""FP8 attention in a layout is that of one process: scales belong to one head of one sequence, which no ranks share."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity_case
from gptface_dist.engine.parity_case import VOCABULARY, Case
from gptface_dist.kernels.attention import emulator, operator
from gptface_dist.kernels.attention.operator import fp8_attention
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options, Sequences
from gptface_dist.model.attention import AttentionOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from tests.kernels.inputs import attention_inputs

STEPS = 2
MODEL = dataclasses.replace(parity_case.MODEL, qk_norm=True)
ALONE = Layout(zero=0)
SPREAD = Layout(tp=2, pp=2, zero=3)
KERNELS = {
    "sdpa": AttentionOptions("sdpa"),
    "rounded": AttentionOptions("fp8"),
    "bent": AttentionOptions("fp8", fp8=Fp8Options("fp8")),
}
"""``bent``: with :func:`bend` for rounding."""

Steps = list[tuple[float, float, dict[str, Tensor]]]
Errors = list[dict[str, float]]


def bend(x: Tensor, _name: str = "") -> Tensor:
    """Depends on the scale of ``x`` as rounding does, about as much and alike in every octave, but without steps: a last bit
    that comes out otherwise in another layout stays a last bit, while rounding makes 1/16 of it now and then.
    """
    return x * (1 + 0.05 * torch.sin(2 * torch.pi * torch.log2(x.abs().clamp(min=1e-30))))


def steps(layout: Layout, attention: AttentionOptions) -> Steps:
    """Loss, norm and this rank's part of every gradient, step by step."""
    from gptface_dist.engine.engine import Engine
    from gptface_dist.engine.gradients import GradientReader

    options = EngineOptions(attention=attention)
    engine = Engine(MilmItm(), MODEL, VOCABULARY, layout, 0, OptimizerOptions(eps=1e-4), options)
    reader, found = GradientReader(engine), []
    for step in range(STEPS):
        result = engine.step(parity_case.batches(Case(layout, model=MODEL, micro_batches=4), step), reader.before_update)
        found.append((result.loss, result.grad_norm, {entry.name: gradient.clone() for entry, gradient in reader.gradients()}))
    engine.close()
    return found


def distance(found: Steps, wanted: Steps, rank: int, size: int) -> Errors:
    """Relative errors step by step, of a tensor-parallel rank against the whole."""
    from gptface_dist.model.parameters import tensor_parallel_sharding

    errors = []
    for (loss, norm, mine), (true_loss, true_norm, true) in zip(found, wanted, strict=True):
        worst = 0.0
        for name, gradient in mine.items():
            how = tensor_parallel_sharding(name, MODEL)
            part = true[name] if how is None else how.shard(true[name], rank, size)
            worst = max(worst, float((gradient - part).norm() / max(float(part.norm()), 1e-3 * true_norm)))
        errors.append({"loss": abs(loss / true_loss - 1), "norm": abs(norm / true_norm - 1), "gradient": worst})
    return errors


def work(rank_info: RankInfo, layout: Layout, folder: Path) -> None:
    """One spawned process: alone it writes what it found, with others how far it is from that."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from megatron.core import parallel_state

        from gptface_dist.parallel import groups

        groups.join(rank_info, None, 300)
        errors = {}
        for name, attention in KERNELS.items():
            if name == "bent":
                operator.emulated_attention = functools.partial(emulator.emulated_attention, round8=bend)
            groups.start(layout, 0)
            found, whole = steps(layout, attention), folder / f"{name}.pt"
            if rank_info.world == 1:
                torch.save(found, whole)
            else:
                errors[name] = distance(found, torch.load(whole), parallel_state.get_tensor_model_parallel_rank(), layout.tp)
            groups.stop_layout()
        (folder / f"{rank_info.world}-{rank_info.rank}.json").write_text(json.dumps(errors))
        groups.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process found, and how far each of four is from it."""
    folder = tmp_path_factory.mktemp("fp8")
    for layout in (ALONE, SPREAD):
        spawn(work, layout.world, layout, folder)
    return folder


def ranks(folder: Path, name: str) -> list[Errors]:
    """Errors of each of the four."""
    return [json.loads((folder / f"4-{rank}.json").read_text())[name] for rank in range(4)]


def test_layouts_agree_where_rounding_has_no_steps(folder: Path) -> None:
    for errors in ranks(folder, "bent"):
        for step in errors:
            assert all(error < 1e-5 for error in step.values()), step


def test_layouts_round_alike(folder: Path) -> None:
    """But for values next to a step, which differ by 1/16 (and by the machine): little beside what rounding does at all."""
    rounded, plain = (torch.load(folder / f"{name}.pt") for name in ("rounded", "sdpa"))
    (own, _) = distance(rounded, plain, 0, 1)
    assert own["gradient"] > 0.02
    for errors in ranks(folder, "rounded"):
        assert errors[0]["loss"] < 1e-4
        assert errors[0]["norm"] < 1e-3
        assert errors[0]["gradient"] < own["gradient"] / 2


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_head_is_the_same_whoever_has_the_others(backward: str) -> None:
    """Bit for bit: what tensor parallelism divides."""
    q, k, v, dout = attention_inputs("outlier", 2, 50, 4, 16)
    sequences = Sequences.padded(torch.tensor([50, 31]), 50)

    def results(heads: slice) -> list[Tensor]:
        leaves = [x[:, :, heads].clone().requires_grad_() for x in (q, k, v)]
        out = fp8_attention(leaves[0], leaves[1], leaves[2], sequences, Fp8Options(backward))
        return [out.detach(), *torch.autograd.grad(out, leaves, dout[:, :, heads])]

    whole = results(slice(None))
    for heads in (slice(0, 2), slice(2, 4), slice(3, 4)):
        for mine, all_heads in zip(results(heads), whole, strict=True):
            assert torch.equal(mine, all_heads[:, :, heads])
