"""docs/architecture.md and the README's tree name what exists, and all of the package."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ARCHITECTURE = PROJECT / "docs" / "architecture.md"
README = PROJECT / "README.md"
TOP_LEVEL = ("gptface_dist", "kernels", "launch", "tools", "configs", "docs", "tests")
LONGEST = 120
"""Lines of docs/architecture.md."""
NAMED = re.compile(r"(?<![\w./-])([\w.-]+/(?:[\w.-]+/)*(?:[\w.-]+\.\w+)?|[a-z_]\w*\.py)(?::([A-Za-z_][\w.]*))?")
"""A folder that ends in a slash, or a file, and what it defines: ``a/b/``, ``a/b.py``, ``a/b.py:Class.method``."""
TREE_LINE = re.compile(r"    ((?:  )*)(\w+)/ +\S")


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def located(path: str) -> Path | None:
    top = path.split("/")[0] in TOP_LEVEL or path == "setup.py"
    file = PROJECT / path if top else PROJECT / "gptface_dist" / path
    return file if file.exists() else None


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module defines ``name``, or ``Class.method``."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        found = [
            node
            for node in body
            if (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part)
            or (
                isinstance(node, ast.Assign)
                and any(isinstance(target, ast.Name) and target.id == part for target in node.targets)
            )
            or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == part)
        ]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def problem(path: str, name: str) -> str | None:
    """Why the code that a document names is not there."""
    file = located(path)
    if file is None:
        return f"{path} does not exist"
    if path.endswith("/") != file.is_dir():
        return f"{path}: a folder is written with a slash at its end, a file without"
    if name and not defines(ast.parse(file.read_text(encoding="utf-8")), name):
        return f"{path} defines no {name}"
    return None


def references(text: str) -> list[tuple[str, str]]:
    return [(found[1], found[2] or "") for span in code(text) for found in NAMED.finditer(span)]


def tree_folders() -> list[str]:
    """The folders of the README's tree, relative to the checkout."""
    folders: list[str] = []
    above: list[str] = []
    for line in README.read_text(encoding="utf-8").splitlines():
        if found := TREE_LINE.match(line):
            above = [*above[: len(found[1]) // 2], found[2]]
            folders.append("/".join(above))
    return folders


def package_folders() -> list[str]:
    roots = ("gptface_dist", "kernels", "launch", "tools")
    return sorted(str(file.parent.relative_to(PROJECT)) for root in roots for file in (PROJECT / root).rglob("__init__.py"))


def test_everything_that_the_architecture_names_exists() -> None:
    named = references(ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(named) > 80
    assert sum(bool(name) for _, name in named) > 40
    wrong = [found for path, name in named if (found := problem(path, name))]
    assert not wrong, f"docs/architecture.md is out of date: {'; '.join(wrong)}"


def test_the_architecture_is_short() -> None:
    assert len(ARCHITECTURE.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("`engine/engine.py:Engine.stop`", "engine/engine.py defines no Engine.stop"),
        ("`engine/engine.py:step`", "engine/engine.py defines no step"),
        ("`engine/names.py`", "engine/names.py does not exist"),
        ("`kernels/loss`: `kernels/losses/`", "kernels/losses/ does not exist"),
        ("`layout.py`", "layout.py does not exist"),
    ],
)
def test_what_does_not_exist_is_found(named: str, message: str) -> None:
    assert [problem(path, name) for path, name in references(named) if problem(path, name)] == [message]


def test_the_readme_s_tree_is_that_of_the_checkout() -> None:
    listed = tree_folders()
    assert set(TOP_LEVEL) <= set(listed), f"README.md's tree lacks {set(TOP_LEVEL) - set(listed)}"
    gone = [folder for folder in listed if not (PROJECT / folder).is_dir()]
    assert not gone, f"README.md's tree has folders that do not exist: {', '.join(gone)}"
    lacking = [folder for folder in package_folders() if folder not in listed]
    assert not lacking, f"README.md's tree lacks {', '.join(lacking)}: add each with a comment behind it"
    assert len(listed) == len(set(listed))
