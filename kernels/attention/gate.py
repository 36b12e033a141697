"""Cross-compiles the kernels for Hopper without a GPU and checks the machine code (``python -m`` this module).

Compiling shows that a kernel uses FP8 tensor-core instructions, fits the chip, and lets its products run beside each other and
beside the softmax; that it is right and fast, only a GPU can show.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptface_dist.kernels.attention import backward, forward, prepare, quantise
from gptface_dist.kernels.attention.launch import DK_DV, DQ, FORWARD, Key, Launch, LaunchTable, candidates, keys, load_table
from gptface_dist.kernels.attention.options import BACKWARDS, HEAD_SIZES, TILE

HOPPER = GPUTarget("cuda", 90, 32)
REGISTERS, SHARED = 255, 227 * 1024
"""Most registers a thread and bytes of shared memory a block can have on sm_90."""

_FP8, _HALF, _FLOAT = "fp8e4nv", "bf16", "fp32"

FUNCTIONS = {FORWARD: forward._forward, DK_DV: backward._dk_dv, DQ: backward._dq}
"""The jitted function of each kernel."""

PRODUCTS = {FORWARD: 2, DK_DV: 4, DQ: 3}
"""Matrix products of a tile."""

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
    in_flight: bool = False
    """Whether products must be able to run beside each other."""


@dataclass(frozen=True)
class Code:
    """What the machine code is like."""

    registers: int
    """A thread's."""
    shared: int
    """Bytes of shared memory a block."""
    counts: dict[str, int]
    """Instruction -> how often it stands in the code."""
    together: int
    """Most product instructions that are issued before one is waited for. One by one, as ptxas does where registers that a
    product reads or writes are touched while another runs, the tensor cores idle for the latency of each."""
    hidden: int
    """Exponentials of the loop that are taken while a product runs."""

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
            "products one by one": case.in_flight and self.together < 2,
        }
        return [fault for fault, wrong in checks.items() if wrong]


def _types(kernel: Any, element: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments in order: those given, and the usual ones of the rest."""
    usual = {"factor": _FLOAT, "log2_factor": _FLOAT}
    usual |= dict.fromkeys(("capacity", "blocks", "tiles", "heads", "items"), "i32")
    usual |= dict.fromkeys(("starts", "lengths", "tiled_starts"), "*i32")
    usual |= {f"{name}_{axis}": "i32" for name in ("stride", "raw") for axis in "bth"} | {"eps": _FLOAT, "raw": f"*{_HALF}"}
    return {name: element.get(name) or usual.get(name) or f"*{_FLOAT}" for name in kernel.arg_names if name not in constants}


def _blocks(key: Key, launch: Launch) -> dict[str, str]:
    """Types of the tiled copies: blocks of what a kernel streams, pointers to the queries or keys that it keeps."""
    m, n, size = launch.queries, launch.keys, key.head_size
    value = _FP8 if key.backward in ("fp8", "any") else _HALF
    transposed = f"tensordesc<{_FP8}[{size},%d]>" if key.backward != "bf16" else f"tensordesc<{_HALF}[%d,{size}]>"
    of_queries = {"q_rows": _FP8, "dout_rows": value} | dict.fromkeys(("lse", "delta", "dout_scale"), _FLOAT)
    of_keys = {"k_rows": _FP8, "v_back": value}
    kept, streamed, count = (of_keys, of_queries, m) if key.kernel == DK_DV else (of_queries, of_keys, n)
    return {
        **{name: f"*{kind}" for name, kind in kept.items()},
        **{name: f"tensordesc<{kind}[{count}{'' if kind == _FLOAT else f',{size}'}]>" for name, kind in streamed.items()},
        "v_columns": f"tensordesc<{_FP8}[{size},{n}]>",
        "dout_columns": f"tensordesc<{_FP8}[{size},{m}]>",
        "q_back": transposed % m,
        "k_back": transposed % n,
    }


def case(key: Key, launch: Launch, normed: bool = False) -> Case:
    """A kernel with products, as a launch compiles it; ``normed``: with QK-norm, of the backward kernels."""
    constants: dict[str, Any] = launch.arguments() | {"D": key.head_size}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    if key.kernel == FORWARD:
        constants |= {"TILE": TILE, "PERSISTENT": launch.persistent}
    else:
        constants |= {"BACKWARD": key.backward} | ({} if normed else dict.fromkeys(("raw", "affine", "partial")))
    outputs = dict.fromkeys(("out", "dk", "dv", "dq"), f"*{_HALF}")
    types = _types(FUNCTIONS[key.kernel], _blocks(key, launch) | outputs, constants)
    half = {"any": 0, "fp8": 0, "mixed": 1, "bf16": PRODUCTS[key.kernel] - 1}[key.backward]
    title = f"{key}{NORMED * normed}"
    return Case(title, FUNCTIONS[key.kernel], types, constants, options, PRODUCTS[key.kernel] - half, half, launch.overlap)


def cases(table: LaunchTable, specialize: bool) -> Iterator[Case]:
    """Every kernel with products as a table launches it, with or without warp specialisation."""
    for key in keys():
        if key.specialize == specialize:
            yield case(key, table.launches[key])
            # Triton 3.7.1 cannot share out the sums of the norm's gradient among specialised warps.
            if key.kernel != FORWARD and not specialize:
                yield case(key, table.launches[key], normed=True)


def alternatives() -> Iterator[Case]:
    """Every launch that the tuner may try, by its key and what it is."""
    for key in keys():
        for launch in candidates(key):
            yield replace(case(key, launch), name=f"{key}: {launch}")


def preparations() -> Iterator[Case]:
    """The kernels that make and prepare the copies: no matrix products, but no spills either."""
    for size in HEAD_SIZES:
        constants: dict[str, Any] = quantise.copying_launch(size)
        options = {"num_warps": constants.pop("num_warps"), "num_stages": 2}
        inputs = dict.fromkeys(("q", "k", "v", "out", "dout"), f"*{_HALF}")

        def copying(
            name: str, kernel: Any, kinds: dict[str, str], more: dict[str, Any], size: int = size,
            constants: dict[str, Any] = constants, options: dict[str, int] = options,
        ) -> Case:  # fmt: skip
            chosen = constants | more
            return Case(name.format(size), kernel, _types(kernel, kinds, chosen), chosen, options, 0, 0)

        yield copying("scales D{}", quantise._scales, {}, {"SMOOTH": True})
        for words, norm in (("", {"affine": None}), (NORMED, {})):
            yield copying("statistics D{}" + words, quantise._statistics, inputs, norm)
        for back in BACKWARDS:
            more, kind = {"BACKWARD": back, "TILE": TILE}, _HALF if back == "bf16" else _FP8
            copies = dict.fromkeys(("q_rows", "k_rows", "v_columns", "dout_columns"), f"*{_FP8}")
            copies |= dict.fromkeys(("q_back", "k_back"), f"*{kind}")
            copies |= dict.fromkeys(("v_back", "dout_rows"), f"*{_FP8 if back == 'fp8' else _HALF}")
            yield copying(f"prepare {back} D{{}}", prepare._prepare, inputs | copies, more)
            for words, norm in (("", {"affine": None}), (NORMED, {})):
                yield copying(f"write {back} D{{}}" + words, quantise._write, inputs | copies, more | norm)


def compiled(case: Case) -> Code:
    """Compile one case for Hopper and read its machine code."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    # As in PyTorch's calls: pointers, strides and capacities are multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    binary = triton.compile(source, target=HOPPER, options=case.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        # nvdisasm, unlike cuobjdump, can leave the instructions' bytes out, which are three quarters of the text.
        usage, code = (
            subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "--print-code"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    names = ("QGMMA", "HGMMA", "HMMA", "LDL", "STL", "UTMALDG")
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in names}
    return Code(int(registers[1]), binary.metadata.shared, counts, *_in_flight(code))


def _in_flight(code: str) -> tuple[int, int]:
    """Of machine code: most products issued before one is waited for, and exponentials between a product and its wait.

    ``WARPGROUP.DEPBAR`` waits for products; code is read in its order, which is that of a loop's body.
    """
    running = together = hidden = 0
    for instruction in re.findall(r"\b[QH]GMMA\b|WARPGROUP\.DEPBAR|MUFU\.EX2", code):
        if instruction.endswith("GMMA"):
            running += 1
            together = max(together, running)
        elif instruction.startswith("WARPGROUP"):
            running = 0
        elif running:
            hidden += 1
    return together, hidden


def main() -> None:
    """Compile everything that is launched by default (or what is named by ``plain``, ``specialised``, ``preparations``, or
    ``alternatives``: all that the tuner may try); exit status 1 with faults.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels that are interpreted cannot be compiled")
    table = load_table()
    made = {"plain": lambda: cases(table, False), "specialised": lambda: cases(table, True), "preparations": preparations}
    named = made | {"alternatives": alternatives}
    faulty = False
    print(f"triton {triton.__version__}, sm_90\n{'kernel':64s} registers  shared  QGMMA  HGMMA  TMA  together  hidden  faults")
    for name in sys.argv[1:] or made:
        for case in named[name]():
            code = compiled(case)
            faults = code.faults(case)
            faulty = faulty or bool(faults)
            counts = code.counts
            print(
                f"{case.name:64s} {code.registers:9d} {code.shared:7d} {counts['QGMMA']:6d} {counts['HGMMA']:6d} "
                f"{counts['UTMALDG']:4d} {code.together:9d} {code.hidden:7d}  {'; '.join(faults) or '-'}",
                flush=True,
            )
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
