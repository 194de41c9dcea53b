"""The house: which room may import from which. The table of docs/design.md, as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "surgery"

# From bottom to top. A room imports only from rooms in lines above its own, or from rooms earlier in its own line.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("tensor", "report"),
    ("names", "roles"),
    ("formats",),
    ("numerics", "delta", "scaling"),
    ("algorithms", "methods"),
    ("passes", "merged"),
    ("sources",),
    ("provenance", "journal", "plan", "kept", "writer", "execute"),
    ("checkpoint", "history", "adapter", "binding", "lossy", "exact", "rounding", "undo"),
    ("operations",),
    ("cli",),
)
TORCH_ROOMS = {"numerics", "delta", "scaling", "algorithms", "passes", "merged", "rounding", "undo"}
"""Rooms that import torch at their top; in operations those that compute do too."""
HEADER_ONLY_OPERATIONS = {
    "info", "convert", "diff", "verify", "verify_serving", "algorithms", "add", "methods", "remove", "remove_keep", "extract_delta", "merge_delta",
    "delta_report", "delta_outline", "delta_sample", "delta_coding", "delta_compare", "delta_squash", "delta_switch",
    "merge_rules",
}  # fmt: skip
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base", "misc", "types"}

ORDER = {room: (number, place) for number, layer in enumerate(LAYERS) for place, room in enumerate(layer)}
FILES = sorted(
    path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py") or path.parent != ROOT
)


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path, *, top_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_below_it(path):
    room = room_of(path)
    if room == "__main__":
        return
    for name in imports(path):
        if not name.startswith("surgery."):
            continue
        other = name.split(".")[1]
        if other not in ORDER or other == room:
            continue
        assert ORDER[other] < ORDER[room], f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_stands_in_the_table():
    assert {room_of(path) for path in FILES} - {"__main__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_is_imported_at_the_top_only_where_the_table_allows_it(path):
    names = [name.split(".")[0] for name in imports(path, top_only=True)]
    if "torch" not in names:
        return
    room = room_of(path)
    assert room in TORCH_ROOMS or (room == "operations" and path.stem not in HEADER_ONLY_OPERATIONS), path


def test_only_the_hub_room_may_import_huggingface_hub():
    users = {room_of(path) for path in FILES if any(name.startswith("huggingface_hub") for name in imports(path))}
    assert users <= {"sources"}


def test_no_room_is_named_after_nothing():
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(ROOT).parts}
    assert not names & FORBIDDEN_NAMES


def test_errors_are_never_caught_wholesale_outside_the_command_line():
    for path in FILES:
        text = path.read_text()
        if path.name == "main.py" and room_of(path) == "cli":
            continue
        assert "except Exception" not in text, path
        assert "except:" not in text, path


def test_pickled_files_are_never_given_to_torch_load():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("torch", "pickle"), f"{path}:{node.lineno}"
