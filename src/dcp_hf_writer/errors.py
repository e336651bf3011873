"""Every error this package raises, under one root.

    CheckpointError
    ├── ConfigError (ValueError)               an option that cannot be used as given
    ├── PlanningError (ValueError)             the state dict cannot be planned; nothing written
    │   ├── ModelKeyError                      which entry holds the model is not clear
    │   ├── SpecError                          a LoadSpec does not fit its tensor
    │   ├── LayoutError                        names, dtypes or sizes that the format cannot hold
    │   └── MismatchError                      a checkpoint does not fit what it is loaded into
    ├── UnsupportedTorchError (RuntimeError)   torch does not give what a check needs; refused
    ├── StagingError (RuntimeError)            the host copy could not be taken
    │   └── StagingBusyError                   an earlier save still uses the memory for it
    ├── StorageError (OSError)                 the storage refused an operation
    │   ├── TargetExistsError (FileExistsError)  the target is there, may not be replaced
    │   ├── NodeLocalPathError                 ranks see different directories under one path
    │   ├── IncoherentStorageError             hosts may not share pages of a file here
    │   ├── WriteError                         a write, fsync or close failed; final
    │   ├── ReadError                          a file is missing, or a read of it failed
    │   └── CommitError                        the checkpoint could not be published
    ├── CoverageError (RuntimeError)           reported bytes do not tile the files
    ├── CorruptCheckpointError (ValueError)    what is stored is damaged, or not what it says it is
    ├── PickledObjectError (ValueError)        a stored object cannot be loaded without running code
    ├── SlotTimeoutError (TimeoutError)        no write slot became free in time
    ├── SaveTimeoutError (TimeoutError)        the deadline of the save passed
    │   └── RankLostError                      one or more ranks did not answer
    ├── SaveAbortedError (RuntimeError)        this attempt was given up; its late work is refused
    └── ExportError (RuntimeError)             the DCP half is committed, the export is not

Each error carries the facts as attributes and prints those that are known: rank, phase, path or
FQN, what was expected, what was found, and what to do. All of them survive pickling, since DCP
sends a rank's exception to the others.
"""

from __future__ import annotations

from typing import Any

_FACTS = ("rank", "phase", "path", "fqn", "key", "expected", "found", "hint", "errno")


def _rebuild(cls: type[CheckpointError], problem: str, facts: dict[str, Any]) -> CheckpointError:
    return cls(problem, **facts)


class CheckpointError(Exception):
    """Root of the tree in the module docstring.

    Args:
        problem: What went wrong, in one clause.
        rank: Rank on which it happened, within the process group of the save.
        phase: Phase of the save (`stage`, `plan`, `write`, `finish`, `commit`) or of the load
            (`plan`, `read`).
        path: File or directory concerned.
        fqn: State-dict name of the tensor concerned.
        key: HuggingFace name of the tensor concerned.
        expected: What should have been there.
        found: What was there.
        hint: What the caller can do.
        errno: The operating system's error number, where there is one.
    """

    def __init__(
        self,
        problem: str,
        *,
        rank: int | None = None,
        phase: str | None = None,
        path: str | None = None,
        fqn: str | None = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.rank = rank
        self.phase = phase
        self.path = path
        self.fqn = fqn
        self.key = key
        self.expected = expected
        self.found = found
        self.hint = hint
        # OSError declares `errno` itself: assigning keeps both views of it equal.
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {name: getattr(self, name) for name in _FACTS}
        return _rebuild, (type(self), self.problem, facts)

    def __str__(self) -> str:
        where = [f"rank {self.rank}" if self.rank is not None else "", self.phase or ""]
        subject = [self.path or "", f"tensor {self.fqn!r}" if self.fqn is not None else ""]
        subject.append(f"key {self.key!r}" if self.key is not None else "")
        text = ": ".join(part for part in (" ".join(filter(None, where)), self.problem) if part)
        shown = ", ".join(filter(None, subject))
        if shown:
            text += f" ({shown})"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f"; found {self.found}"
        if self.hint:
            text += f"; {self.hint}"
        return text


class ConfigError(CheckpointError, ValueError):
    """An option cannot be used as given; nothing was started."""


class PlanningError(CheckpointError, ValueError):
    """The state dict cannot be planned as asked; nothing was written."""


class ModelKeyError(PlanningError):
    """Which entry of the state dict holds the model is not clear."""


class SpecError(PlanningError):
    """A `LoadSpec` does not fit the tensor it names."""


class LayoutError(PlanningError):
    """Names, dtypes or sizes that a safetensors directory cannot hold."""


class MismatchError(PlanningError):
    """A checkpoint does not fit the state dict that it is loaded into; nothing was read."""


class UnsupportedTorchError(CheckpointError, RuntimeError):
    """This torch does not give what a check needs; nothing was published, or loaded."""


class StagingError(CheckpointError, RuntimeError):
    """The host copy of the state dict could not be taken."""


class StagingBusyError(StagingError):
    """An earlier save still uses the staging memory at the deadline."""


class StorageError(CheckpointError, OSError):
    """The storage refused an operation."""


class TargetExistsError(StorageError, FileExistsError):
    """The target exists and may not be replaced."""


class NodeLocalPathError(StorageError):
    """Ranks see different directories under one path."""


class IncoherentStorageError(StorageError):
    """Several hosts may not write parts of one file on this file system."""


class WriteError(StorageError):
    """A write, fsync or close failed; final for this attempt."""


class ReadError(StorageError):
    """A file is missing, or a read of it failed."""


class CommitError(StorageError):
    """The finished checkpoint could not be published."""


class CoverageError(CheckpointError, RuntimeError):
    """What the ranks report to have written does not tile the output files."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """What is stored is damaged, incomplete, hostile, or not what it says it is."""


class PickledObjectError(CheckpointError, ValueError):
    """A stored object cannot be loaded without running code that the checkpoint names."""


class SlotTimeoutError(CheckpointError, TimeoutError):
    """No write slot became free in time."""


class SaveTimeoutError(CheckpointError, TimeoutError):
    """The deadline of the save passed."""


class RankLostError(SaveTimeoutError):
    """One or more ranks did not answer."""


class SaveAbortedError(CheckpointError, RuntimeError):
    """This attempt was given up; what it still tries to do is refused."""


class ExportError(CheckpointError, RuntimeError):
    """The DCP half of the checkpoint is committed, the HuggingFace half is not."""
