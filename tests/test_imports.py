"""Imports run one way, and no two modules need each other: read from the code, without running it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("routers", "backbones", "edit_cli")
"""Each may import itself and those before it."""
MAKERS = ("routers.calibrate", "routers.train", "routers.static", "routers.watch")
"""What makes bundles and observes runs; the engine and what it decides with import nothing of it."""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, recipes among them."""
    names = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def runtime_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth, those for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from runtime_imports(other)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from runtime_imports(node)


def imported(name: str) -> set[str]:
    """The product's modules that a module imports. `from package import module` counts as the module."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()
    for node in runtime_imports(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            targets.add(inner if inner in MODULES else base)
    return (targets & MODULES.keys()) - {name}


@functools.cache
def imports() -> dict[str, set[str]]:
    """What every module imports."""
    return {name: imported(name) for name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in graph[node]:
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            cut = stack.index(node)
            if len(stack) - cut > 1:
                groups.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in graph:
        if node not in order:
            visit(node)
    return groups


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_read() -> None:
    """Inside of functions and `from package import module` too; not those for type checkers."""
    assert "routers.planned.timeplan" in imports()["routers.bundle"]
    assert "routers.train.loop" in imports()["edit_cli.calibrate.training"], "imported where it is needed"
    assert "routers.paper.policy" in imports()["edit_cli.generation.session"], "from package import module"
    assert "routers.block" not in imports()["routers.cost"], "for type checkers alone"


def test_the_tool_is_ten_files_and_five_folders() -> None:
    """At its top level, so that a new module has one obvious place below it."""
    held = [path for path in (ROOT / "edit_cli").iterdir() if path.name != "__pycache__"]
    folders = [path.name for path in held if path.is_dir()]
    assert len(folders) <= 5 and len(held) - len(folders) <= 10, sorted(path.name for path in held)


def test_no_module_is_in_a_circle() -> None:
    assert circles(imports()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards(package: str) -> None:
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if name.split(".")[0] == package and target.split(".")[0] in above
    ]
    assert wrong == []


def test_the_engine_imports_nothing_that_makes_bundles() -> None:
    def makes(module: str) -> bool:
        return ".".join(module.split(".")[:2]) in MAKERS

    wrong = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if name.split(".")[0] == "routers" and not makes(name) and makes(target)
    ]
    assert wrong == []
