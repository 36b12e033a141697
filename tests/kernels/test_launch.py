"""The table of launches, and that whatever tiles and orders the tuner may choose, the same is computed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.kernels.attention import backward as kernels
from gptface_dist.kernels.attention import operator
from gptface_dist.kernels.attention.forward import forward
from gptface_dist.kernels.attention.launch import (
    DK_DV,
    DQ,
    FORWARD,
    PACKAGED,
    Key,
    Launch,
    LaunchTable,
    candidates,
    keys,
    load_table,
)
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import Fp8Options, Sequences
from gptface_dist.kernels.attention.prepare import Result, prepare
from gptface_dist.kernels.attention.quantise import Tiles, quantise
from gptface_dist.kernels.attention.reference import exact
from tests.kernels.inputs import attention_inputs, relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (1, 64, 0, 129, 193, 30)
"""Ends of sequences before, at and behind the ends of tiles of 32, 64 and 128; the copies of one follow those of another."""


def orders(kernel: str) -> list[Launch]:
    """The candidates that differ in what they compute when: how many warps and stages do it is the compiler's."""
    found = [replace(launch, num_warps=8, num_stages=2) for launch in candidates(Key(kernel, 64, "mixed", False))]
    return list(dict.fromkeys(found))


CASES = [
    *((kernel, "mixed", launch) for kernel in (FORWARD, DK_DV, DQ) for launch in orders(kernel)),
    # What else is in FP8 changes no tile: once each way.
    *((kernel, backward, launch) for kernel in (DK_DV, DQ) for backward in ("fp8", "bf16") for launch in orders(kernel)[:2]),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled, products of float32 are in TF32; the tuner compares every launch there")
@pytest.mark.parametrize(("kernel", "backward", "launch"), CASES, ids=[f"{k}-{b}-{x}" for k, b, x in CASES])
def test_every_launch_is_exact(kernel: str, backward: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 in place of FP8 and bf16, in memory that holds no numbers: what is read must have been written."""
    longest, size, factor = max(LENGTHS), 64, 64**-0.5
    q, k, v, dout = (x.to(DEVICE) for x in attention_inputs("channel", len(LENGTHS), longest, 1, size))
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    affine = torch.randn(2, 2, size, generator=generator).to(DEVICE) * 0.3 + torch.tensor([[1.0], [0.0]], device=DEVICE)
    norm = QkNorm(affine[0].requires_grad_(), affine[1].requires_grad_(), 0.05)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(math.nan))

    def run() -> list[Tensor]:
        tiles = Tiles.of(Sequences.padded(lengths, longest), q.shape[:2].numel())
        table = load_table().changed(Key(kernel, size, "any" if kernel == FORWARD else backward, False), launch)
        x = quantise(q, k, v, tiles, True, backward, torch.float32, norm.affine(), norm.eps)
        result = Result(*forward(x, tiles, q, factor * math.log2(math.e), table.of(FORWARD, size, backward, False)))
        normalised = kernels.Normalised(q, k, norm.affine(), norm.eps)
        given = kernels.Inputs(prepare(dout, x, result, tiles, backward), x, result, tiles, factor, backward, normalised)
        dq, dk, dv, d_affine = kernels.backward(given, table, False)
        return [result.out, dq, dk, dv, *d_affine.split(2)]

    with torch.no_grad():
        found = operator.launched(run)
    seen = (torch.arange(longest, device=DEVICE) < lengths[:, None])[..., None, None]
    raw = [torch.where(seen, x, 0).double().requires_grad_() for x in (q, k)]
    given = norm(*raw)
    true = exact(given[0].detach(), given[1].detach(), v, lengths, dout)
    d_raw = torch.autograd.grad(given, [*raw, norm.q, norm.k], [true.dq, true.dk])
    for a, b in zip(found, [true.out, *d_raw[:2], true.dv, *d_raw[2:]], strict=True):
        assert relative(a, b) < 2e-5


@pytest.mark.parametrize("specialize", [False, True])
def test_options_choose_the_table(specialize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are launched as the named file says."""
    if specialize and DEVICE == "cuda":
        pytest.skip("tiles that no specialised kernel is compiled for")
    launched: list[tuple[int, int, bool]] = []
    rows = {FORWARD: (64, 32), DK_DV: (32, 64), DQ: (64, 32)}
    table = LaunchTable({key: Launch(*rows[key.kernel], 4, specialize=key.specialize) for key in keys()})
    table.save(tmp_path / "launches.json")
    arguments = Launch.arguments

    def watched(launch: Launch) -> dict[str, object]:
        launched.append((launch.queries, launch.keys, launch.specialize))
        return arguments(launch)

    monkeypatch.setattr(Launch, "arguments", watched)
    q, k, v, dout = (x.bfloat16().to(DEVICE) for x in attention_inputs("normal", 1, 40, 1, 64))
    options = Fp8Options("fp8", warp_specialize=specialize, launches=str(tmp_path / "launches.json"))
    leaf = q.requires_grad_()
    out = operator.fp8_attention(leaf, k, v, Sequences.padded(torch.tensor([40], device=DEVICE), 40), options)
    torch.autograd.grad(out, leaf, dout)
    assert launched == [(64, 32, specialize), (32, 64, specialize), (64, 32, specialize)]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = replace(load_table(), device="NVIDIA H200", date="2026-12-01", versions="torch 2.11.0, triton 3.6.0")
    changed = table.changed(Key(DQ, 64, "fp8", False), Launch(64, 64, 4, 3, True))
    changed.save(tmp_path / "new" / "launches.json")
    assert load_table(str(tmp_path / "new" / "launches.json")) == changed
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["launches.json"]


def test_the_packages_table_was_written_by_it(tmp_path: Path) -> None:
    load_table().save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == PACKAGED.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format=2), "format 2, this version reads 1"),
        (lambda table: table["launches"].pop(0), "no launch for forward D64"),
        (lambda table: table["launches"][0]["launch"].update(queries=48), "queries must be 32, 64 or 128, got 48"),
        (lambda table: table["launches"][0]["launch"].update(specialize=True, num_warps=4, overlap=False), "specialize=True"),
        (lambda table: table["launches"][0]["launch"].update(speed=1), "speed"),
        (lambda table: table["launches"][0].pop("kernel"), "kernel"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    table = json.loads(PACKAGED.read_text(encoding="utf-8"))
    change(table)
    (tmp_path / "bad.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_table(str(tmp_path / "bad.json"))
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json is no table of launches"):
        load_table(str(tmp_path / "none.json"))
