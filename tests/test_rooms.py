"""The rooms form one order: an import goes to the same room or a lower one, and two laws say where big packages are imported.

docs/architecture.md draws the rooms. Imports under ``if TYPE_CHECKING`` are not made and do not count; those inside functions
do.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
FOLDERS = {
    "gptface_dist": "gptface_dist",
    "kernels": "gptface_dist.kernels",
    "launch": "gptface_dist.launch",
    "tools": "gptface_dist.tools",
}
"""Folder of the checkout -> name it is imported by (setup.py)."""
BASE = "gptface_dist/__init__.py"
ROOMS = [
    BASE,
    "errors",
    "files",
    "folder_lock",
    "differences",
    "hashing",
    "host",
    "config",
    "kernels",
    "distributed",
    "tokenizers",
    "sequence",
    "data",
    "faces",
    "model",
    "objectives",
    "parallel",
    "checkpoint",
    "engine",
    "release",
    "training",
    "generation",
    "benchmarks",
    "launch",
    "tools",
]
"""Folders and files of the package, from the lowest to the highest."""
LAWS = {
    "megatron": {"parallel", "engine", "benchmarks"},
    "deepspeed": {"parallel", "engine", "benchmarks"},
    "triton": {"kernels"},
}
"""Package -> the only rooms that may import it."""
WITHOUT_LIBRARIES = ("model", "sequence", "objectives", "release", "generation")
"""Rooms that must be importable where none of :data:`LAWS` is installed."""
Import = tuple[str, int, str]
"""File, line and module that is imported."""


def module_name(folder: str, file: Path) -> str:
    parts = [part for part in file.relative_to(PROJECT / folder).with_suffix("").parts if part != "__init__"]
    return ".".join([FOLDERS[folder], *parts])


MODULES = {module_name(folder, file): file for folder in FOLDERS for file in sorted((PROJECT / folder).rglob("*.py"))}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else BASE


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from nodes(other)
        else:
            yield child
            yield from nodes(child)


def imports_of(module: str, source: str, relative_file: str) -> Iterator[Import]:
    package = module if relative_file.endswith("__init__.py") else module.rpartition(".")[0]
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield relative_file, node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, *filter(None, [origin])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield relative_file, node.lineno, whole if whole in MODULES else origin


IMPORTS: dict[str, list[Import]] = {
    module: list(imports_of(module, file.read_text(encoding="utf-8"), str(file.relative_to(PROJECT))))
    for module, file in MODULES.items()
}
OWN = {module: [found for found in imports if found[2].split(".")[0] == "gptface_dist"] for module, imports in IMPORTS.items()}


def upward(module: str, imports: list[Import]) -> list[str]:
    """A line for each import of a higher room."""
    own = room(module)
    return [
        f"{file}:{line} imports {imported}: {own} must not import {room(imported)}, which is above it. Move what is needed to "
        f"{own} or a lower room, or pass it as an argument"
        for file, line, imported in imports
        if ROOMS.index(room(imported)) > ROOMS.index(own)
    ]


def unlawful(module: str, imports: list[Import]) -> list[str]:
    """A line for each import that :data:`LAWS` forbid."""
    found = []
    for file, line, imported in imports:
        rooms = LAWS.get(imported.split(".")[0])
        if rooms is not None and room(module) not in rooms:
            where = ", ".join(f"{name}/" for name in sorted(rooms))
            found.append(f"{file}:{line} imports {imported}, which belongs in {where} only. Move the code that needs it there")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle through every module that reaches itself, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        came_from: dict[str, str] = {}
        queue = [start]
        for module in queue:
            for following in sorted(graph.get(module, ())):
                if following not in came_from:
                    came_from[following] = module
                    queue.append(following)
        if start in came_from:
            path = [start]
            while (before := came_from[path[-1]]) != start:
                path.append(before)
            found.setdefault(frozenset(path), [*path, start][::-1])
    return list(found.values())


def test_every_folder_and_file_is_a_room() -> None:
    there = {room(module) for module in MODULES}
    assert there == set(ROOMS), (
        f"without a place in ROOMS: {sorted(there - set(ROOMS))}; no longer there: {sorted(set(ROOMS) - there)}. "
        "Put a new room above all that it imports and below all that import it, and draw it in docs/architecture.md"
    )


def test_imports_go_to_the_same_room_or_a_lower_one() -> None:
    wrong = [line for module, imports in OWN.items() for line in upward(module, imports)]
    assert not wrong, "\n".join(wrong)


def test_big_packages_are_imported_in_their_rooms() -> None:
    wrong = [line for module, imports in IMPORTS.items() for line in unlawful(module, imports)]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {imported for _, _, imported in imports} - {module} for module, imports in OWN.items()}
    wrong = [
        " -> ".join(circle) + ": move what both sides need to a module of its own, or put an import that only annotations use "
        "under `if TYPE_CHECKING`"
        for circle in circles(graph)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_import_is_found_and_named() -> None:
    source = "def f():\n    from gptface_dist.engine import engine\n    import triton.language\n"
    source += "if TYPE_CHECKING:\n    import deepspeed\nelse:\n    from megatron import core\n"
    imports = list(imports_of("gptface_dist.model.new", source, "gptface_dist/model/new.py"))
    own = [found for found in imports if found[2].startswith("gptface_dist")]
    (line,) = upward("gptface_dist.model.new", own)
    assert line.startswith("gptface_dist/model/new.py:2 imports gptface_dist.engine.engine: model must not import engine")
    lines = unlawful("gptface_dist.model.new", imports)
    assert [line.split(",")[0] for line in lines] == [
        "gptface_dist/model/new.py:3 imports triton.language",
        "gptface_dist/model/new.py:7 imports megatron",
    ]
    relative = list(imports_of("gptface_dist.model.new", "from . import plain\nfrom ..engine import zero\n", "new.py"))
    assert [found[2] for found in relative] == ["gptface_dist.model.plain", "gptface_dist.engine.zero"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d2"}}) == [["b", "c", "b"]]


def test_rooms_of_a_release_need_neither_megatron_nor_deepspeed() -> None:
    rooms: defaultdict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        rooms[room(module)].append(module)
    modules = [module for name in WITHOUT_LIBRARIES for module in rooms[name]]
    program = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(LAWS)!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        sys.exit(
            f"{{module}} cannot be imported without megatron, deepspeed and triton: {{error!r}}. Import them in a room of LAWS"
        )
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-2000:])
