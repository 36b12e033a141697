"""Cross-compiles the kernels for Hopper without a GPU and checks the machine code (``python -m`` this module).

Compiling shows that a kernel uses FP8 tensor-core instructions and fits the chip; that it is right and fast, only a GPU
can show.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptface_dist.kernels.attention import backward, forward, prepare, quantise
from gptface_dist.kernels.attention.options import BACKWARDS, HEAD_SIZES, TILE

HOPPER = GPUTarget("cuda", 90, 32)
REGISTERS, SHARED = 255, 227 * 1024
"""Most registers a thread and bytes of shared memory a block can have on sm_90."""

_FP8, _HALF, _FLOAT = "fp8e4nv", "bf16", "fp32"

GRADIENTS = (
    (backward._dk_dv, backward.dk_dv_launch, "dK, dV", "keys"),
    (backward._dq, backward.dq_launch, "dQ", "queries"),
)
"""Kernel, how it is launched, name, and what it keeps."""

NORMED = ", QK-norm"
"""Ends the name of a kernel that applies it."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is compiled."""

    name: str
    """What is printed."""
    kernel: Any
    """The jitted function."""
    types: dict[str, str]
    """Argument -> Triton's name of its type, without the compile-time ones."""
    constants: dict[str, Any]
    """Compile-time arguments."""
    options: dict[str, int]
    """``num_warps`` and ``num_stages``."""
    fp8_products: int
    """Matrix products in FP8 that the code must have at least."""
    half_products: int
    """Matrix products in bf16 that it must have; with 0 it must have none."""


@dataclass(frozen=True)
class Code:
    """What the machine code is like."""

    registers: int
    """A thread's."""
    shared: int
    """Bytes of shared memory a block."""
    counts: dict[str, int]
    """Instruction -> how often it stands in the code."""

    def faults(self, case: Case) -> list[str]:
        """What is wrong with it."""
        fp8, half = self.counts["QGMMA"], self.counts["HGMMA"]
        checks = {
            f"{fp8} FP8 products, not {case.fp8_products} or more": fp8 < case.fp8_products or (not case.fp8_products and fp8),
            f"{half} bf16 products": half < case.half_products or (not case.half_products and half),
            f"{self.counts['HMMA']} products of the generation before": self.counts["HMMA"],
            f"{self.counts['LDL'] + self.counts['STL']} spills": self.counts["LDL"] + self.counts["STL"],
            f"{self.registers} registers": self.registers > REGISTERS,
            f"{self.shared} bytes of shared memory": self.shared > SHARED,
        }
        return [fault for fault, wrong in checks.items() if wrong]


def _types(kernel: Any, element: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments in order: those given, and the usual ones of the rest."""
    usual = {"factor": _FLOAT, "log2_factor": _FLOAT, "capacity": "i32", "blocks": "i32"}
    usual |= dict.fromkeys(("starts", "lengths", "tiled_starts"), "*i32")
    usual |= {f"{name}_{axis}": "i32" for name in ("stride", "raw") for axis in "bth"} | {"eps": _FLOAT, "raw": f"*{_HALF}"}
    return {name: element.get(name) or usual.get(name) or f"*{_FLOAT}" for name in kernel.arg_names if name not in constants}


def _blocks(launch: forward.Launch, size: int, back: str, keep: str) -> dict[str, str]:
    """Types of the tiled copies: blocks of what a kernel streams, pointers to the ``keep`` (queries, keys) it keeps."""
    m, n = launch.queries, launch.keys
    value = _FP8 if back == "fp8" else _HALF
    transposed = f"tensordesc<{_FP8}[{size},%d]>" if back != "bf16" else f"tensordesc<{_HALF}[%d,{size}]>"
    of_queries = {"q_rows": _FP8, "dout_rows": value} | dict.fromkeys(("lse", "delta", "dout_scale"), _FLOAT)
    of_keys = {"k_rows": _FP8, "v_back": value}
    kept, streamed, count = (of_queries, of_keys, n) if keep == "queries" else (of_keys, of_queries, m)
    return {
        **{name: f"*{kind}" for name, kind in kept.items()},
        **{name: f"tensordesc<{kind}[{count}{'' if kind == _FLOAT else f',{size}'}]>" for name, kind in streamed.items()},
        "v_columns": f"tensordesc<{_FP8}[{size},{n}]>",
        "dout_columns": f"tensordesc<{_FP8}[{size},{m}]>",
        "q_back": transposed % m,
        "k_back": transposed % n,
    }


def cases(specialize: bool) -> Iterator[Case]:
    """Every kernel of every option, for both head sizes, with or without warp specialisation."""
    words = "specialised" if specialize else "plain"
    for size in HEAD_SIZES:
        launch = forward.forward_launch(specialize)
        constants = launch.arguments() | {"D": size}
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        blocks = _blocks(launch, size, "fp8", "queries")
        types = _types(forward._forward, blocks | {"out": f"*{_HALF}"}, constants)
        yield Case(f"forward D{size} {words}", forward._forward, types, constants, options, 2, 0)
        # Triton 3.7.1 cannot share out the sums of the norm's gradient among specialised warps.
        norms = (False,) if specialize else (False, True)
        for normed, back, (kernel, made, name, keep) in itertools.product(norms, BACKWARDS, GRADIENTS):
            launch = made(specialize)
            constants = launch.arguments() | {"D": size, "BACKWARD": back}
            if not normed:
                constants |= dict.fromkeys(("raw", "affine", "partial"))
            options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
            outputs = dict.fromkeys(("dk", "dv", "dq"), f"*{_HALF}")
            types = _types(kernel, _blocks(launch, size, back, keep) | outputs, constants)
            products = 4 if name == "dK, dV" else 3
            half = {"fp8": 0, "mixed": 1, "bf16": products - 1}[back]
            title = f"{name} {back} D{size} {words}{NORMED * normed}"
            yield Case(title, kernel, types, constants, options, products - half, half)


def preparations() -> Iterator[Case]:
    """The kernels that make and prepare the copies: no matrix products, but no spills either."""
    for size in HEAD_SIZES:
        constants: dict[str, Any] = quantise.copying_launch(size)
        options = {"num_warps": constants.pop("num_warps"), "num_stages": 2}
        inputs = dict.fromkeys(("q", "k", "v", "out", "dout"), f"*{_HALF}")

        def case(
            name: str, kernel: Any, kinds: dict[str, str], more: dict[str, Any], size: int = size,
            constants: dict[str, Any] = constants, options: dict[str, int] = options,
        ) -> Case:  # fmt: skip
            chosen = constants | more
            return Case(name.format(size), kernel, _types(kernel, kinds, chosen), chosen, options, 0, 0)

        yield case("scales D{}", quantise._scales, {}, {"SMOOTH": True})
        for words, norm in (("", {"affine": None}), (NORMED, {})):
            yield case("statistics D{}" + words, quantise._statistics, inputs, norm)
        for back in BACKWARDS:
            more, kind = {"BACKWARD": back, "TILE": TILE}, _HALF if back == "bf16" else _FP8
            copies = dict.fromkeys(("q_rows", "k_rows", "v_columns", "dout_columns"), f"*{_FP8}")
            copies |= dict.fromkeys(("q_back", "k_back"), f"*{kind}")
            copies |= dict.fromkeys(("v_back", "dout_rows"), f"*{_FP8 if back == 'fp8' else _HALF}")
            yield case(f"prepare {back} D{{}}", prepare._prepare, inputs | copies, more)
            for words, norm in (("", {"affine": None}), (NORMED, {})):
                yield case(f"write {back} D{{}}" + words, quantise._write, inputs | copies, more | norm)


def compiled(case: Case) -> Code:
    """Compile one case for Hopper and read its machine code."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    # What PyTorch gives: pointers, strides and capacities that are multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    found = triton.compile(source, target=HOPPER, options=case.options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(found.asm["cubin"])
        usage, code = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    names = {"QGMMA": "QGMMA", "HGMMA": "HGMMA", "HMMA": "HMMA", "LDL": r"LDL", "STL": r"STL", "UTMALDG": "UTMALDG"}
    counts = {name: len(re.findall(rf"\b{pattern}\b", code)) for name, pattern in names.items()}
    return Code(int(registers[1]), found.metadata.shared, counts)


def main() -> None:
    """Compile everything (or what is named by ``plain``, ``specialised``, ``preparations``); exit status 1 with faults."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels that are interpreted cannot be compiled")
    made = {"plain": lambda: cases(False), "specialised": lambda: cases(True), "preparations": preparations}
    faulty = False
    print(f"triton {triton.__version__}, sm_90\n{'kernel':40s} registers  shared  QGMMA  HGMMA  TMA  faults")
    for name in sys.argv[1:] or made:
        for case in made[name]():
            code = compiled(case)
            faults = code.faults(case)
            faulty = faulty or bool(faults)
            counts = code.counts
            print(
                f"{case.name:40s} {code.registers:9d} {code.shared:7d} {counts['QGMMA']:6d} {counts['HGMMA']:6d} "
                f"{counts['UTMALDG']:4d}  {'; '.join(faults) or '-'}",
                flush=True,
            )
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
