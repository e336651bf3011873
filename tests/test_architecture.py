"""Imports point one way, and planning touches nothing."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import dcp_hf_writer

PACKAGE = "dcp_hf_writer"
ROOT = Path(dcp_hf_writer.__file__).parent

# Each module may import from its own layer and from those above it, in the order of the design.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "excerpts", "_hooks"),
    ("_name_patterns", "_boxes", "_dtypes", "_copies", "_strict_json"),
    ("_affine", "_symbolic"),
    ("_shards",),
    ("spec", "export"),
    ("_dequantize", "_stored", "_quantized"),
    ("_derivation", "mapping", "mapping.tied_names"),
    ("_header", "_layout", "_regions", "_once", "_model_entry", "_report", "_manifest"),
    ("_spec_match",),
    ("_buckets", "_rounds"),
    ("_parse_header", "_parse_blocks", "_parse_manifest", "_sweep", "_problems"),
    ("_unpickle", "_dcp_metadata", "_archived", "_read_plan", "_exchange_plan"),
    ("_tensors", "_plan_data", "_plan_cache"),
    ("_explanation", "_explanation_table", "explain"),
    ("_agreement", "_fill", "_groups", "_stock"),
    ("_blocked", "planner"),
    ("_slab", "staging", "_caller"),
    ("_slot_files", "slots"),
    ("storage", "storage._libc", "storage._posix", "_writes"),
    ("_input_files", "_input_stores", "_open_inputs", "_read_phase", "_exchange"),
    ("_listing", "_check_dcp", "_recompute", "_progress"),
    ("_archive", "_source", "_dcp_half", "_hf_half", "_assets", "_options"),
    ("_dcp_source", "_hf_directory", "_hf_source", "_sources", "_fit"),
    ("_dequantize_load", "_verify_ranges", "_load_blocks", "_loads"),
    ("_rendezvous", "_owner"),
    ("_commit",),
    ("_checksums",),
    ("_attempt", "_watchdog", "_coordinator", "_guards", "_write_phase", "_stager"),
    ("_plan_check", "_hand_sharded", "_ties", "_local_facts", "_joined_save"),
    ("integrations", "integrations._twin", "integrations._base_check"),
    ("integrations._conversions", "integrations.transformers", "integrations.torchtitan"),
    ("_check_hf", "_verify"),
    ("reader", "load", "_materialize"),
    ("_dry_run",),
    ("writer", "stream"),
    ("",),
)
# The package itself is "".
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}

PLANNING = (
    *("_boxes", "_dtypes", "_header", "_layout", "_model_entry", "_report", "_manifest"),
    *("_copies", "_regions", "_once", "_name_patterns"),
    *("_affine", "_symbolic", "_derivation"),
    *("_shards", "_spec_match", "mapping.tied_names"),
    *("_buckets", "_rounds"),
    *("spec", "export"),
    *("_dequantize", "_stored", "_quantized"),
    *("_strict_json", "_parse_header", "_parse_blocks", "_parse_manifest", "_sweep", "_problems"),
    *("_unpickle", "_read_plan", "_exchange_plan"),
)
# Storage, processes, other machines.
EFFECTS = frozenset(
    {
        *("os", "io", "pathlib", "shutil", "tempfile", "glob", "mmap", "fcntl", "ctypes"),
        *("socket", "subprocess", "multiprocessing", "threading", "concurrent", "time", "random"),
        *("torch.distributed", "torch.multiprocessing", "fsspec", "filelock", "safetensors"),
    }
)


@functools.cache
def tree_of(name: str) -> ast.Module:
    path = ROOT / (name.replace(".", "/") or "__init__")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def module_names() -> list[str]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


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
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports_of(name: str) -> set[str]:
    """Return the modules of the package that a module imports, also for its types alone."""
    known = set(module_names())
    named = imports_of(name, with_types=True)
    found = {one.removeprefix(f"{PACKAGE}.") for one in named if one.startswith(f"{PACKAGE}.")}
    return (found & known) - {name}


def test_every_module_has_its_layer() -> None:
    assert sorted(LAYER) == module_names()


@pytest.mark.parametrize("name", module_names())
def test_imports_point_one_way(name: str) -> None:
    below = {other for other in own_imports_of(name) if LAYER[other] > LAYER[name]}
    assert below == set()


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


@pytest.mark.parametrize("name", PLANNING)
def test_planning_imports_nothing_that_has_effects(name: str) -> None:
    touched = {
        one
        for one in imports_of(name, with_types=False)
        if any(one == effect or one.startswith(f"{effect}.") for effect in EFFECTS)
    }
    assert touched == set()
    assert {
        other for other in own_imports_of(name) if other not in (*PLANNING, "errors", "excerpts")
    } == set()


@pytest.mark.parametrize("name", PLANNING)
def test_planning_opens_no_file(name: str) -> None:
    called = {
        node.func.id
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval"}


def test_check_sees_what_it_forbids() -> None:
    assert {"os", "dcp_hf_writer.storage._libc"} <= imports_of("storage._posix", with_types=False)
    assert "torch.distributed" in imports_of("_rendezvous", with_types=False)
    assert "os" not in imports_of("export", with_types=False)
    assert "os" in imports_of("export", with_types=True)
    assert own_imports_of("_header") == {"_dtypes", "errors", "_boxes"}
