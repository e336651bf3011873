"""Imports point one way, and planning touches nothing."""

from __future__ import annotations

import ast
import functools

import pytest

from support.folders import ENTRIES, FOLDERS, LEAVES, PURE, SOURCE, table, written_table

PACKAGE = "dcp_hf_writer"

# Modules that are imported by name when they are asked for, against the order of the folders.
LATE = {
    ("mapping.hf_export", "integrations.transformers"),
    ("mapping.hf_export", "integrations.state_dict_adapter"),
    ("save.export_assets", "integrations.architecture_of_config"),
    ("integrations.new_manager", "checkpoint_manager"),
    ("integrations.new_manager", "reader"),
}

# Storage, processes, other machines.
EFFECTS = frozenset(
    {
        *("os", "pathlib", "shutil", "tempfile", "glob", "mmap", "fcntl", "ctypes"),
        *("socket", "subprocess", "multiprocessing", "threading", "concurrent", "time", "random"),
        *("torch.distributed", "torch.multiprocessing", "fsspec", "filelock", "safetensors"),
    }
)
# Values without effects: what DCP plans with and what its metadata is made of, and pure paths.
VALUES = frozenset(
    {
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "pathlib.PurePosixPath",
    }
)


@functools.cache
def tree_of(name: str) -> ast.Module:
    path = SOURCE / (name.replace(".", "/") or "__init__")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


@functools.cache
def module_names() -> tuple[str, ...]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return tuple(found)


def modules_within(folders: tuple[str, ...]) -> list[str]:
    return [name for name in module_names() if folder_of(name) in folders]


def folder_of(name: str) -> str:
    """Return the folder of a module; of one at the top, its own name."""
    return name.partition(".")[0]


def imports_of(name: str, *, with_types: bool) -> set[str]:
    """Return the modules that a module names in its imports, `a.b` for `from a import b` too."""
    types = {
        id(inner)
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree_of(name)):
        if id(node) in types and not with_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_within(name: str, modules: frozenset[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def late_imports_of(name: str) -> set[str]:
    """Return the modules of the package whose names a module holds as text."""
    texts = {
        node.value.removeprefix(f"{PACKAGE}.")
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(f"{PACKAGE}.")
    }
    return texts & (set(module_names()) - {""})


@functools.cache
def own_imports_of(name: str) -> set[str]:
    """Return the modules of the package that a module imports, also for its types alone."""
    known = set(module_names())
    named = imports_of(name, with_types=True)
    found = {one.removeprefix(f"{PACKAGE}.") for one in named if one.startswith(f"{PACKAGE}.")}
    # `from a.b import c` names the module `a.b`, or the module `a.b.c`.
    found |= {one.rpartition(".")[0] for one in found}
    modules = (found & known) - {name, ""} - set(FOLDERS)
    return modules | {one for one in late_imports_of(name) if (name, one) not in LATE}


def order_of(name: str) -> int:
    """Return the place of a module in the one order that imports follow."""
    order = ("leaves", *FOLDERS, "entries", "")
    folder = folder_of(name)
    if folder in LEAVES:
        return order.index("leaves")
    return order.index("entries" if folder in ENTRIES else folder)


def test_every_module_lies_in_a_folder_of_the_list() -> None:
    assert {folder_of(name) for name in module_names()} == {"", *LEAVES, *FOLDERS, *ENTRIES}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_says_what_it_owns_and_what_it_must_not_do(name: str) -> None:
    tree = tree_of(name)
    assert len(tree.body) == 1, "an __init__ holds a docstring and nothing else"
    owns, _, rule = (ast.get_docstring(tree) or "").partition("\n\n")
    assert owns.endswith(".")
    assert rule.endswith(".")


def test_table_in_the_design_is_made_from_the_folders() -> None:
    assert written_table() == table(), "run tests/support/folders.py"


@pytest.mark.parametrize("name", module_names())
def test_module_has_no_leading_underscore(name: str) -> None:
    assert not name.rpartition(".")[2].startswith("_")


@pytest.mark.parametrize("name", module_names())
def test_imports_point_one_way(name: str) -> None:
    below = {other for other in own_imports_of(name) if order_of(other) > order_of(name)}
    assert below == set()


def test_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for name in module_names():
        for node in tree_of(name).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    assert {key: where for key, where in homes.items() if len(where) > 1} == {}


def test_late_imports_are_those_that_are_listed() -> None:
    late = {(name, other) for name in module_names() for other in late_imports_of(name)}
    assert late == LATE


def test_imports_form_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in sorted(own_imports_of(name)):
                visit(other, (*path, name))
            done.add(name)

    for name in module_names():
        visit(name, ())


@pytest.mark.parametrize("name", modules_within(PURE))
def test_planning_imports_nothing_that_has_effects(name: str) -> None:
    touched = {
        one
        for one in imports_of(name, with_types=False)
        if is_within(one, EFFECTS) and not is_within(one, VALUES)
    }
    assert touched == set()
    assert {folder_of(one) for one in own_imports_of(name)} <= {*PURE, *LEAVES}


@pytest.mark.parametrize("name", modules_within(PURE))
def test_planning_opens_no_file(name: str) -> None:
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    }
    assert not called & {"open", "print", "input", "exec", "eval"}


def test_check_sees_what_it_forbids() -> None:
    outputs = imports_of("storage.posix_outputs", with_types=False)
    assert {"os", "dcp_hf_writer.storage.linux_calls.reserve"} <= outputs
    assert is_within("torch.distributed", EFFECTS)
    assert "torch.distributed" in imports_of("save.rank_progress", with_types=False)
    assert "os" not in imports_of("mapping.hf_export", with_types=False)
    assert "os" in imports_of("mapping.hf_export", with_types=True)
    assert own_imports_of("formats.encode_safetensors_header") == {
        *("errors", "tensors.boxes", "tensors.dtype_names", "tensors.dtypes"),
    }
    assert order_of("errors") < order_of("tensors.boxes") < order_of("save.commit")
    assert order_of("save.commit") < order_of("writer") < order_of("")


@pytest.mark.parametrize("name", [one for one in module_names() if one != "save.attempt"])
def test_nothing_of_an_attempt_is_set_from_outside(name: str) -> None:
    targets = (
        target
        for node in ast.walk(tree_of(name))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )
    found = [ast.unparse(inner) for target in targets for inner in ast.walk(target)]
    assert [text for text in found if text.startswith(("attempt.", "self.attempt."))] == []


# Where the folders before the seam hold what torch writes, or call it.
PRIVATE_ELSEWHERE = {
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._save",
}


@pytest.mark.parametrize("name", [one for one in module_names() if folder_of(one) != "torch_seam"])
def test_private_names_of_torch_are_imported_in_the_seam_alone(name: str) -> None:
    private = {
        one
        for one in imports_of(name, with_types=False)
        if one.startswith(("torch.", "concurrent."))
        and any(part.startswith("_") for part in one.split("."))
    }
    assert private <= PRIVATE_ELSEWHERE
