"""vLLM's sources as syntax trees: nothing is imported, so every version can be read anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameters:
    """A function's parameters without self or cls."""

    positional: tuple[str, ...]
    required: frozenset[str]
    keyword_only: frozenset[str]
    star: bool
    star_star: bool

    @classmethod
    def of(cls, function: Function, method: bool = True) -> Parameters:
        a = function.args
        names = [p.arg for p in (*a.posonlyargs, *a.args)]
        optional = set(names[len(names) - len(a.defaults) :]) if a.defaults else set()
        skip = 1 if method and names[:1] in (["self"], ["cls"]) else 0
        names = names[skip:]
        required = {n for n in names if n not in optional}
        required |= {p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None}
        return cls(
            tuple(names),
            frozenset(required),
            frozenset(p.arg for p in a.kwonlyargs),
            a.vararg is not None,
            a.kwarg is not None,
        )

    def accepts_calls_for(self, base: Parameters) -> str:
        """Empty when whoever may call ``base`` may call this; else why not."""
        for at, name in enumerate(base.positional):
            if at < len(self.positional):
                if self.positional[at] != name:  # vLLM may pass it by keyword
                    return f"parameter {at + 1} is {name!r}, ours is {self.positional[at]!r}"
            elif not self.star:
                return f"parameter {name!r} is not taken"
        extra = self.required - set(base.positional) - base.keyword_only
        if extra:
            return f"we require {sorted(extra)}, which is not passed"
        if base.star_star and not self.star_star:
            return "**kwargs may be passed, ours takes none"
        missing = base.keyword_only - self.keyword_only - set(self.positional)
        if missing and not self.star_star:
            return f"keywords {sorted(missing)} are not taken"
        return ""


class Module:
    """One file's syntax tree."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)

    @cached_property
    def names(self) -> frozenset[str]:
        """Everything bound at module level, in whatever branch."""
        found: set[str] = set()
        for node in _module_level(self.tree.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(a.asname or a.name).split(".")[0] for a in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        return frozenset(found) | self._lazy_names()

    def _lazy_names(self) -> set[str]:
        # A package with __getattr__ serves names from a table of strings.
        if not any(
            isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in self.tree.body
        ):
            return set()
        return {
            n.value
            for n in ast.walk(self.tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }

    @cached_property
    def star_imports(self) -> tuple[tuple[int, str], ...]:
        """(dots, module) of every ``from module import *``."""
        return tuple(
            (n.level, n.module or "")
            for n in _module_level(self.tree.body)
            if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)
        )

    def cls(self, name: str) -> ast.ClassDef | None:
        return next(
            (
                n
                for n in _module_level(self.tree.body)
                if isinstance(n, ast.ClassDef) and n.name == name
            ),
            None,
        )

    def function(self, name: str) -> Function | None:
        return next(
            (
                n
                for n in _module_level(self.tree.body)
                if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name
            ),
            None,
        )

    def methods(self, cls_name: str) -> dict[str, Function]:
        """Methods of a class and of its bases in the same file."""
        cls = self.cls(cls_name)
        if cls is None:
            return {}
        found: dict[str, Function] = {}
        for base in cls.bases:
            if isinstance(base, ast.Name) and base.id != cls_name:
                found.update(self.methods(base.id))
        for node in cls.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = node
        return found

    def fields(self, cls_name: str) -> set[str]:
        """Annotated fields, properties and ``self.x = `` of a class and its bases in this file."""
        cls = self.cls(cls_name)
        if cls is None:
            return set()
        found: set[str] = set()
        for base in cls.bases:
            if isinstance(base, ast.Name) and base.id != cls_name:
                found |= self.fields(base.id)
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
                found |= _self_assigned(node)
        return found


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _module_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _module_level(handler.body)


def _self_assigned(function: ast.FunctionDef) -> set[str]:
    return {
        n.attr
        for n in ast.walk(function)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }


class Source:
    """The tree of one vLLM version. ``changed`` replaces files, for tests of the tests."""

    def __init__(self, version: str, root: Path, changed: dict[str, str] | None = None) -> None:
        self.version = version
        self.minor = tuple(int(n) for n in version.split(".")[:2])
        self.root = root
        self.changed = changed or {}
        self._modules: dict[str, Module | None] = {}

    def path(self, module: str) -> str | None:
        """``vllm.a.b`` -> its file's path inside the tree."""
        base = module.replace(".", "/")
        for candidate in (f"{base}.py", f"{base}/__init__.py"):
            if candidate in self.changed or (self.root / candidate).is_file():
                return candidate
        return None

    def text(self, module: str) -> str:
        path = self.path(module)
        assert path is not None, f"{self.version}: no module {module}"
        return self.changed.get(path) or (self.root / path).read_text(encoding="utf-8")

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = Module(self.text(name)) if self.path(name) else None
        return self._modules[name]

    def binds(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` works, star imports and submodules included."""
        parsed = self.module(module)
        if parsed is None:
            return False
        if name in parsed.names or self.path(f"{module}.{name}") is not None:
            return True
        package = (self.path(module) or "").endswith("__init__.py")
        for dots, target in parsed.star_imports:
            up = dots - 1 if package else dots
            parts = module.split(".")
            start = parts[: len(parts) - up] if dots else []
            if self.binds(".".join([*start, *filter(None, [target])]), name):
                return True
        return False

    def need(self, name: str) -> Module:
        module = self.module(name)
        assert module is not None, f"vLLM {self.version} has no module {name}"
        return module

    def mutated(self, module: str, old: str, new: str) -> Source:
        """A copy in which ``old`` reads ``new`` in one module."""
        text = self.text(module)
        assert old in text, f"nothing to mutate: {old!r} is not in {module}"
        path = self.path(module)
        assert path is not None
        return Source(self.version, self.root, {**self.changed, path: text.replace(old, new)})


def calls_in(node: ast.AST) -> list[tuple[tuple[int, int], str, str]]:
    """(position, receiver's last name, method) of every ``x.y.method(...)``, in source order."""
    found = []
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            found.append(((call.lineno, call.col_offset), name, call.func.attr))
    return sorted(found)
