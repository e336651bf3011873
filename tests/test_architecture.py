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
    (
        "errors",
        "excerpts",
        "check",
        "stream",
        "load",
        "preflight",
        "save",
        "torch_seam",
        "staging",
        "digests",
        "plan",
        "formats",
        "mapping",
        "tensors",
        "failpoints",
    ),
    (
        "mapping.name_patterns",
        "tensors.boxes",
        "tensors.dtypes",
        "tensors.strided_copies",
        "formats.strict_json",
        "formats.names_on_disk",
    ),
    ("tensors.loop_nests", "mapping.symbolic_tensors"),
    ("tensors.shards",),
    ("mapping.load_spec", "mapping.hf_export"),
    ("formats.dequantize", "formats.quantized_tensors", "formats.quantized_checkpoints"),
    ("mapping.specs_from_function", "mapping.tied_names"),
    (
        "formats.encode_safetensors_header",
        "plan.layout",
        "plan.regions",
        "plan.stored_once",
        "mapping.model_entry",
        "plan.rank_report",
        "plan.encode_manifest",
    ),
    ("mapping.spec_match", "mapping.flattening"),
    ("stream.buckets", "stream.gather_steps"),
    (
        "formats.parse_safetensors_header",
        "plan.parse_manifest_blocks",
        "plan.parse_manifest",
        "digests.digest_sweep",
        "digests.problems",
    ),
    (
        "formats.restricted_unpickle",
        "formats.parse_dcp_metadata",
        "formats.parse_torch_archive",
        "load.read_plan",
        "load.exchange_plan",
    ),
    ("staging.memory_identity", "plan.global_plan", "torch_seam.plan_cache"),
    ("preflight.explanation_rows", "preflight.explanation_tables", "preflight.explanation"),
    ("stream.agreement", "stream.fill_buckets", "stream.mesh_groups", "stream.held_shards"),
    ("torch_seam.blocked_tensors", "torch_seam.planners"),
    ("staging.slab", "staging.stager", "torch_seam.frames"),
    ("storage.slot_files", "storage.write_slots"),
    ("storage", "storage.linux_calls", "storage.posix_outputs", "storage.open_outputs"),
    (
        "storage.input_contract",
        "storage.input_backends",
        "storage.open_inputs",
        "load.read_phase",
        "load.exchange",
    ),
    ("storage.listing", "check.check_dcp", "digests.recompute", "check.progress_line"),
    (
        "formats.encode_torch_archive",
        "save.tensor_source",
        "save.dcp_half",
        "save.hf_half",
        "save.export_assets",
        "preflight.writer_options",
    ),
    (
        "load.dcp_source",
        "load.hf_directory",
        "load.hf_source",
        "load.checkpoint_half",
        "load.mismatches",
    ),
    ("load.dequantized_reads", "load.verify_ranges", "load.hf_blocks", "load.planned_load"),
    ("save.rendezvous", "save.save_owner"),
    ("save.commit",),
    ("save.checksums",),
    (
        "save.attempt",
        "torch_seam.future_guard",
        "save.coordinator",
        "save.failure_explanations",
        "save.write_phase",
        "save.async_stager",
    ),
    (
        "preflight.plan_check",
        "preflight.hand_sharded",
        "preflight.drifted_ties",
        "preflight.rank_facts",
        "save.joined_save",
    ),
    ("integrations", "integrations.unsharded_twin", "integrations.base_check"),
    (
        "integrations.transformers_conversions",
        "integrations.transformers",
        "integrations.torchtitan",
    ),
    ("check.check_hf", "check.verify"),
    ("reader", "loader", "check.materialize"),
    ("preflight.dry_run",),
    ("writer", "stream.bucket_stream"),
    ("",),
)
# The package itself is "".
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}

PLANNING = (
    *(
        "tensors.boxes",
        "tensors.dtypes",
        "formats.encode_safetensors_header",
        "plan.layout",
        "mapping.model_entry",
        "plan.rank_report",
        "plan.encode_manifest",
    ),
    *("tensors.strided_copies", "plan.regions", "plan.stored_once", "mapping.name_patterns"),
    *("tensors.loop_nests", "mapping.symbolic_tensors", "mapping.specs_from_function"),
    *("tensors.shards", "mapping.spec_match", "mapping.tied_names", "mapping.flattening"),
    *("stream.buckets", "stream.gather_steps"),
    *("mapping.load_spec", "mapping.hf_export"),
    *("formats.dequantize", "formats.quantized_tensors", "formats.quantized_checkpoints"),
    "formats.names_on_disk",
    *(
        "formats.strict_json",
        "formats.parse_safetensors_header",
        "plan.parse_manifest_blocks",
        "plan.parse_manifest",
        "digests.digest_sweep",
        "digests.problems",
    ),
    *("formats.restricted_unpickle", "load.read_plan", "load.exchange_plan"),
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
    assert own_imports_of(name) <= {*PLANNING, "errors", "excerpts"}


@pytest.mark.parametrize("name", PLANNING)
def test_planning_opens_no_file(name: str) -> None:
    called = {
        node.func.id
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval"}


def test_check_sees_what_it_forbids() -> None:
    assert {"os", "dcp_hf_writer.storage.linux_calls"} <= imports_of(
        "storage.posix_outputs", with_types=False
    )
    assert "torch.distributed" in imports_of("save.rendezvous", with_types=False)
    assert "os" not in imports_of("mapping.hf_export", with_types=False)
    assert "os" in imports_of("mapping.hf_export", with_types=True)
    assert own_imports_of("formats.encode_safetensors_header") == {
        "tensors.dtypes",
        "errors",
        "tensors.boxes",
    }
