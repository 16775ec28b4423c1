#!/usr/bin/env python3
"""Check who imports whom in kvoffload; one line per broken rule, exit status 1 when there is any.

Rules (docs/architecture.md has the reasons):

- vllm is imported inside ``engines/`` only; torch inside ``copy/``, ``tiers/dram`` and
  ``engines/`` only; triton and cupy inside ``copy/`` only.
- types, errors, files and memory import nothing of ours; config and metrics only the first two
  (and config: memory).
- core imports leaves and ``tiers.base`` (protocols) only: no tiers, copies, engine, native core.
- copy imports leaves, files and the native core; tiers import leaves, copy and the native core.
- replay imports leaves, core and tiers.
- the rest of the package imports ``engines/`` inside functions only.
- ``kvoffload/__init__.py`` imports lazily whatever is not light.

Imports under ``if TYPE_CHECKING:`` cost nothing at run time: for them only the rules about our own
layers hold.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kvoffload"
LEAVES = ("kvoffload.types", "kvoffload.errors", "kvoffload.config", "kvoffload.metrics")
NATIVE = "kvoffload._core"

# Module prefix -> our modules (prefixes) it may import; the longest matching prefix decides.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kvoffload.types": (),
    "kvoffload.errors": (),
    "kvoffload.files": (),
    "kvoffload.memory": (),
    "kvoffload.config": ("kvoffload.errors", "kvoffload.memory", "kvoffload.types"),
    "kvoffload.metric_table": ("kvoffload.types",),
    "kvoffload.metrics": ("kvoffload.metric_table", "kvoffload.types"),
    "kvoffload.core": (*LEAVES, "kvoffload.core", "kvoffload.tiers.base"),
    "kvoffload.copy": (*LEAVES, NATIVE, "kvoffload.files", "kvoffload.copy"),
    "kvoffload.tiers": (*LEAVES, NATIVE, "kvoffload.copy", "kvoffload.tiers"),
    "kvoffload.replay": (*LEAVES, "kvoffload.core", "kvoffload.tiers", "kvoffload.replay"),
    "kvoffload.engines": (PACKAGE,),
    "kvoffload": (PACKAGE,),
}
# Third-party module -> prefixes of ours that may import it.
RESTRICTED: dict[str, tuple[str, ...]] = {
    "vllm": ("kvoffload.engines",),
    "lmcache": ("kvoffload.engines",),
    "torch": ("kvoffload.copy", "kvoffload.tiers.dram", "kvoffload.engines"),
    "triton": ("kvoffload.copy",),
    "cupy": ("kvoffload.copy",),
}
# Too heavy for `import kvoffload`: allowed there inside functions only.
HEAVY = ("numpy", "typer", "rich", "zmq", "prometheus_client", NATIVE)


@dataclass(frozen=True)
class Import:
    """One imported module, as seen in a file."""

    name: str
    line: int
    typing_only: bool
    in_function: bool


def matches(name: str, prefix: str) -> bool:
    """True when ``name`` is the module ``prefix`` or inside it."""
    return name == prefix or name.startswith(prefix + ".")


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file of the package below ``root``."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import statement of a file, relative ones resolved."""
    found: list[Import] = []
    _walk(ast.parse(source), module, is_package, False, False, found)
    return found


def _walk(
    node: ast.AST,
    module: str,
    is_package: bool,
    typing_only: bool,
    inside: bool,
    found: list[Import],
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            for name in _names(child, module, is_package):
                found.append(Import(name, child.lineno, typing_only, inside))
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                _walk(ast.Module([statement], []), module, is_package, True, inside, found)
            for statement in child.orelse:
                _walk(ast.Module([statement], []), module, is_package, typing_only, inside, found)
            continue
        nested = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        _walk(child, module, is_package, typing_only, nested, found)


def _names(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        keep = len(parts) - node.level + (1 if is_package else 0)
        base = ".".join([*parts[:keep], *([base] if base else [])])
    if not matches(base, PACKAGE):
        yield base
        return
    # `from kvoffload import core` imports kvoffload.core: look at each name.
    yield from (f"{base}.{alias.name}" for alias in node.names)


def problems_of(module: str, imports: list[Import]) -> list[tuple[int, str]]:
    """Broken rules of one module: (line, what)."""
    layer = max((p for p in ALLOWED if matches(module, p)), key=len)
    allowed = ALLOWED[layer]
    found: list[tuple[int, str]] = []
    for item in imports:
        name = item.name
        if matches(name, PACKAGE):
            if (
                not any(matches(name, prefix) for prefix in allowed)
                and name != "kvoffload.__version__"
            ):
                found.append((item.line, f"{layer} may not import {name}"))
            elif (
                matches(name, "kvoffload.engines")
                and layer == PACKAGE
                and not item.in_function
                and not item.typing_only
            ):
                found.append((item.line, f"{module} may import {name} inside a function only"))
        elif not item.typing_only:
            for restricted, owners in RESTRICTED.items():
                if matches(name, restricted) and not any(matches(module, o) for o in owners):
                    found.append((item.line, f"{module} may not import {name}"))
        if module == PACKAGE and not item.in_function and not item.typing_only:
            found += [
                (item.line, f"{PACKAGE} must import {name} lazily")
                for h in HEAVY
                if matches(name, h)
            ]
    return found


def check(root: Path) -> list[str]:
    """All broken rules of the package below ``root``, as ``path:line: text``."""
    lines: list[str] = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = module_name(path, root)
        imports = imports_of(path.read_text(), module, path.name == "__init__.py")
        lines += [
            f"{path.relative_to(root)}:{n}: {text}" for n, text in problems_of(module, imports)
        ]
    return lines


def long_modules(root: Path, limit: int) -> list[str]:
    """Modules over ``limit`` lines, longest first: growth means something belongs elsewhere."""
    sizes = [
        (len(path.read_text().splitlines()), path.relative_to(root))
        for path in (root / PACKAGE).rglob("*.py")
    ]
    return [f"{size:5d} {path}" for size, path in sorted(sizes, reverse=True) if size > limit]


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--sizes", type=int, metavar="N", help="also list modules over N lines")
    args = parser.parse_args()
    lines = check(args.root)
    print("\n".join(lines) or "layers: ok")
    if args.sizes:
        print("\n".join(long_modules(args.root, args.sizes)))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
