"""The writers and readers of a run: one place for the options that they share. Wiring only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.manager.planned_size import planned_export_files, planned_nbytes
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.mapping.option_values import check_word
from dcp_hf_writer.preflight.check_export_place import refuse_export_path
from dcp_hf_writer.reader import HFDualReader
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.tensors.dtypes import export_dtype
from dcp_hf_writer.writer import HFDualWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch.distributed as dist

    from dcp_hf_writer.manager.run_mirror import RunMirror
    from dcp_hf_writer.manager.run_storage import Address


_SHARED = (
    "staging",
    "slots",
    "strategy",
    "timeout_s",
    "host_budget_bytes",
    "report_to",
    "page_cache",
)


def writer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a manager that every writer of its run gets as they are.

    Args:
        given: Each option of the manager by its name.

    Raises:
        ConfigError: If copies are made while training goes on, and no optimizer waits for them.
    """
    if given["staging"] == "overlap" and not given["optimizers"]:
        msg = 'staging="overlap" copies while training goes on, so optimizers must wait for it'
        raise ConfigError(msg, expected="optimizers=[optimizer]", found="none")
    return {name: given[name] for name in _SHARED}


class RunWriters:
    """Makes the writer of each save and the reader of each load of a run."""

    def __init__(
        self,
        export: HFExport | None,
        *,
        address: Callable[[str], Address],
        weights: str,
        allow_pickled_objects: bool,
        step_to_reuse: Callable[..., str | None] | None = None,
        options: Mapping[str, Any],
        mirror: RunMirror | None = None,
    ) -> None:
        """Keep the options; `writer` checks them.

        Args:
            export: Options of the HuggingFace half; `None` writes none.
            address: Says how to reach a path of the run.
            weights: As in `HFDualWriter`, for saves with an export.
            allow_pickled_objects: As in `HFDualReader`.
            step_to_reuse: Returns the path that a save may reuse, from `has_export`.
            options: Other options of every writer.
            mirror: The mirror of the run.

        Raises:
            ConfigError: If `weights` is not a known word, or the export has a place of its own.
        """
        check_word("weights", weights, ("both", "once"))
        refuse_export_path(
            export,
            what="CheckpointManager",
            hint="leave path out: retention deletes both halves of a step; mirror= uploads them",
        )
        self.export = export
        self._address = address
        self._weights, self._allow_pickled_objects = weights, allow_pickled_objects
        self._step_to_reuse = step_to_reuse
        self._options, self._mirror = dict(options), mirror
        self._export_files: int | None = None

    @property
    def subdir(self) -> str:
        """Directory of the HuggingFace half within a checkpoint."""
        return HFExport.subdir if self.export is None else self.export.subdir

    def writer(
        self,
        path: str,
        *,
        has_export: bool,
        overwrite: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> HFDualWriter:
        """Make the writer of one save.

        Args:
            path: Path of the checkpoint.
            has_export: Whether it writes the HuggingFace half, if the run has one.
            overwrite: Whether it replaces an existing checkpoint.
            group: Process group of the save.

        Raises:
            ConfigError: If an option cannot be used as given.
        """
        has_export = has_export and self.export is not None
        place, storage_options = self._address(path)
        choose = self._step_to_reuse
        return HFDualWriter(
            place,
            reuse=None if choose is None else choose(has_export=has_export),
            storage_options=storage_options,
            export=self.export if has_export else None,
            weights="once" if has_export and self._weights == "once" else "both",
            overwrite=overwrite,
            process_group=group,
            mirror=None if self._mirror is None else self._mirror.of_path(path),
            **self._options,
        )

    def reader(self, path: str, source: Any, *, verify: bool) -> HFDualReader:
        """Make the reader of one load.

        Args:
            path: A checkpoint, or a part of one.
            source: As in `HFDualReader`.
            verify: Compare what is read with the digests, if the checkpoint has any.
        """
        place, storage_options = self._address(path)
        has_digests = verify and open_directory(place, storage_options).has(MANIFEST_NAME)
        return HFDualReader(
            place,
            storage_options=storage_options,
            source=source,
            specs=None if self.export is None else self.export.specs,
            verify=has_digests,
            allow_pickled_objects=self._allow_pickled_objects,
        )

    def planned_nbytes(self, state_dict: Mapping[str, Any], *, has_export: bool) -> int:
        """Return the bytes that a save writes, all ranks together; a lower bound."""
        export = self.export if has_export else None
        return planned_nbytes(
            state_dict,
            export_dtype=None if export is None else export_dtype(export.dtype),
            has_second_copy=export is not None and self._weights == "both",
        )

    def export_files(self, state_dict: Mapping[str, Any], *, has_export: bool) -> int:
        """Return the number of files of an export, or a little less; 0 without an export."""
        if self.export is None or not has_export:
            return 0
        if self._export_files is None:
            # Counted once: the model of a run does not change, and walking a large one takes time.
            self._export_files = planned_export_files(
                state_dict,
                export_dtype=export_dtype(self.export.dtype),
                max_shard_nbytes=self.export.max_shard_nbytes,
            )
        return self._export_files
