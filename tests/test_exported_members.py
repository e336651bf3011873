from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import dcp_hf_writer


def test_all_is_sorted_and_has_no_duplicates() -> None:
    assert list(dcp_hf_writer.__all__) == sorted(set(dcp_hf_writer.__all__))


def test_all_names_exactly_the_public_members() -> None:
    # Submodules become attributes as soon as anyone imports them, so only those that are listed
    # count; any other public attribute that is not listed is a leak.
    # A name is imported when it is used first.
    for name in dcp_hf_writer.__all__:
        getattr(dcp_hf_writer, name)
    submodules = {module.name for module in pkgutil.iter_modules(dcp_hf_writer.__path__)}
    attributes = {
        name
        for name, value in vars(dcp_hf_writer).items()
        if not name.startswith("_")
        and name not in {"annotations", "TYPE_CHECKING"}
        and not (
            isinstance(value, types.ModuleType)
            and name in submodules
            and name not in dcp_hf_writer.__all__
        )
    }
    assert attributes == set(dcp_hf_writer.__all__) - {"__version__"}


def test_names_for_type_checkers_are_those_that_are_imported_late() -> None:
    source = Path(dcp_hf_writer.__file__).read_text()
    imports = re.findall(r"^    from dcp_hf_writer(\.\S+)? import (.+)$", source, re.MULTILINE)
    homes = {name: home[1:] or name for home, names in imports for name in names.split(", ")}
    assert homes == dcp_hf_writer._HOME
    assert sorted(homes) == dcp_hf_writer.__all__
    assert set(dcp_hf_writer.__all__) <= set(dir(dcp_hf_writer))


def test_unknown_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="HFDualWritter"):
        exec("from dcp_hf_writer import HFDualWritter")  # noqa: S102 - a typing error of a user
    assert not hasattr(dcp_hf_writer, "HFDualWritter")


def test_listed_objects_say_where_they_are_defined() -> None:
    homes = {
        name: getattr(dcp_hf_writer, name).__module__
        for name in dcp_hf_writer.__all__
        if name != "__version__" and not isinstance(getattr(dcp_hf_writer, name), types.ModuleType)
    }
    assert homes
    for name, home in homes.items():
        assert home.split(".")[0] == "dcp_hf_writer", name
        assert getattr(importlib.import_module(home), name) is getattr(dcp_hf_writer, name)


def test_star_import_binds_every_listed_name() -> None:
    code = (
        "from dcp_hf_writer import *\n"
        "import dcp_hf_writer\n"
        "print(sorted(set(dcp_hf_writer.__all__) - set(globals())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_import_starts_no_thread_and_no_process_group() -> None:
    code = (
        "import threading, torch\n"
        "before = set(threading.enumerate())\n"
        "import dcp_hf_writer\n"
        "print(set(threading.enumerate()) == before, torch.distributed.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True", "False"]
