"""Compile the copy kernels for GPUs that are not here, and read what the compiler made of them.

    python -m tests.support.triton_aot [--write]

prints the table of registers, spills and access widths; ``--write`` makes it the expected one,
tests/golden/kernels.json. Do that after a change of the kernels or of the pinned triton, and look at
the difference: spills must stay 0, and the 16-byte accesses of the aligned kernels must stay. A
compiler only is needed: triton's wheel brings ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from kvoffload.copy.kernels import constants
from kvoffload.copy.kernels_table import SPECS, Spec

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "kernels.json"
ARCHES = (80, 90, 100)

Figures = dict[str, int]


def name_of(spec: Spec) -> str:
    """Its row in the table."""
    shape = f"-{spec.rows}x{spec.width}" if spec.rows else ""
    return f"{spec.kernel}-align{spec.align}{shape}"


def compile_spec(spec: Spec, arch: int) -> Any:
    """The kernel compiled for sm_``arch``, with the arguments KernelMover launches it with."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvoffload.copy import kernels_jit

    fixed = constants(triton.language, spec)
    signature = {"table": "*i64", "first": "i32", "last": "i32"} | dict.fromkeys(fixed, "constexpr")
    order = list(signature)
    source = ASTSource(
        getattr(kernels_jit, spec.kernel),
        signature,
        constexprs={(order.index(k),): v for k, v in fixed.items()},
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": spec.warps}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def figures(spec: Spec, arch: int) -> tuple[Figures, str]:
    """What a row holds, and the PTX. Bytes of a thread's accesses to global memory are from SASS."""
    compiled = compile_spec(spec, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("cuobjdump", "-sass", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    loads, stores = _accesses(sass, "LDG"), _accesses(sass, "STG")
    return {
        "registers": registers,
        "spill_bytes": stack + local + 4 * len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "loads_of_16": loads[16],
        "stores_of_16": stores[16],
        "widest_load": max(loads),
        "widest_store": max(stores),
        "narrowest_store": min(stores),
    }, compiled.asm["ptx"]


def _accesses(sass: str, op: str) -> Counter[int]:
    """Instructions by the bytes a thread moves."""
    out: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{op}\.E([.\w]*)", sass):
        width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", suffixes)
        out[int(width.group(1) or width.group(2)) // 8 if width else 4] += 1
    return out


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def table() -> dict[str, Any]:
    """The whole table, as kept in GOLDEN."""
    import triton

    return {
        "triton": triton.__version__,
        **{
            f"sm_{arch}": {name_of(spec): figures(spec, arch)[0] for spec in SPECS}
            for arch in ARCHES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make it the expected table")
    text = json.dumps(table(), indent=2)
    # One row a line: the table is read by people.
    text = re.sub(
        r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text
    )
    if parser.parse_args().write:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
