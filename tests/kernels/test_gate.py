"""The machine code for Hopper, made without one; and that nothing of ours imports triton unasked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, in which kernels are not interpreted."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=inherited | environment
    )


@pytest.mark.parametrize("which", ["plain", "specialised", "preparations"])
def test_kernels_compile_for_hopper(which: str, tmp_path: Path) -> None:
    """FP8 tensor-core instructions where promised and no others, no spills, within the registers and shared memory."""
    found = python("-m", "gptface_dist.kernels.attention.gate", which, TRITON_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    # 13 (7 without QK-norm) kernels with products or 12 without, for 2 head sizes, each a line that ends without faults.
    cases = found.stdout.splitlines()[2:]
    assert len(cases) == {"plain": 26, "specialised": 14, "preparations": 24}[which]
    assert all(line.endswith(" -") for line in cases)


def test_the_gate_finds_faults() -> None:
    code = (
        "from gptface_dist.kernels.attention.gate import Case, Code\n"
        "case = Case('', None, {}, {}, {}, 2, 0, in_flight=True)\n"
        "good = dict(QGMMA=2, HGMMA=0, HMMA=0, LDL=0, STL=0)\n"
        "print(len(Code(255, 1000, good, 2, 9).faults(case)))\n"
        "for change in (dict(QGMMA=1), dict(HGMMA=1), dict(HMMA=1), dict(LDL=1), dict(STL=3)):\n"
        "    print(len(Code(255, 1000, good | change, 2, 9).faults(case)))\n"
        "print(len(Code(256, 1000, good, 2, 9).faults(case)), len(Code(9, 228 * 1024, good, 2, 9).faults(case)))\n"
        "print(len(Code(9, 1000, good, 1, 9).faults(case)))\n"
    )
    assert python("-c", code).stdout.split() == ["0", "1", "1", "1", "1", "1", "1", "1", "1"]


def test_what_runs_beside_products_is_counted() -> None:
    """Two products, three exponentials, a wait; a product and its wait; an exponential beside nothing."""
    code = (
        "from gptface_dist.kernels.attention.gate import _in_flight\n"
        "lines = ['QGMMA.64x128x32.F32', 'QGMMA.64x128x32', '@!P0 MUFU.EX2 R1', 'MUFU.EX2 R2', 'MUFU.RCP R7', 'MUFU.EX2 R3',\n"
        "         'WARPGROUP.DEPBAR.LE gsb0, 0x0', 'HGMMA.64x64x16', 'WARPGROUP.DEPBAR.LE gsb0, 0x0', 'MUFU.EX2 R4']\n"
        "print(_in_flight('\\n'.join(lines)))\n"
    )
    found = python("-c", code)
    assert found.stdout.strip() == "(2, 3)", found.stderr


def test_the_gate_refuses_to_interpret() -> None:
    found = python("-m", "gptface_dist.kernels.attention.gate", TRITON_INTERPRET="1")
    assert found.returncode == 1
    assert "TRITON_INTERPRET" in found.stderr


def test_attention_on_a_cpu_needs_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from gptface_dist.kernels.attention.operator import fp8_attention\n"
        "from gptface_dist.kernels.attention.options import Fp8Options, Sequences\n"
        "x = torch.randn(1, 9, 1, 32, requires_grad=True)\n"
        "fp8_attention(x, x, x, Sequences.padded(torch.tensor([9]), 9), Fp8Options()).sum().backward()\n"
        "print(bool(x.grad.isfinite().all()))\n"
    )
    found = python("-c", code)
    assert found.stdout.strip() == "True", found.stderr
