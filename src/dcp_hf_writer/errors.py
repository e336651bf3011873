"""Every error that this package raises, under one root.

    CheckpointError
    ├── ConfigError (ValueError)               an option is invalid
    ├── PlanningError (ValueError)             the state dict or checkpoint does not fit the request
    │   ├── ModelKeyError                      it is unclear which entry is the model
    │   ├── SpecError                          a LoadSpec does not fit its tensor
    │   ├── LayoutError                        safetensors cannot hold a name, dtype or size
    │   └── MismatchError                      a checkpoint does not fit the state dict to load into
    ├── UnsupportedTorchError (RuntimeError)   a check cannot run with this version of torch
    ├── StagingError (RuntimeError)            copying to host memory failed
    │   └── StagingBusyError                   an earlier save is still running
    ├── StorageError (OSError)                 the storage refused an operation
    │   ├── TargetExistsError (FileExistsError)  the target exists and may not be replaced
    │   ├── NodeLocalPathError                 ranks see different directories under one path
    │   ├── IncoherentStorageError             several hosts may not write one file here
    │   ├── WriteError                         a write, fsync or close failed; not repeated
    │   ├── ReadError                          a file is missing, or a read of it failed
    │   └── CommitError                        publishing the checkpoint failed
    ├── CoverageError (RuntimeError)           parts do not cover a tensor or file exactly once
    ├── CorruptCheckpointError (ValueError)    the stored data is damaged or contradicts itself
    ├── PickledObjectError (ValueError)        loading a stored object would run code
    ├── SlotTimeoutError (TimeoutError)        no write slot became free in time
    ├── SaveTimeoutError (TimeoutError)        the deadline of the save passed
    │   └── RankLostError                      one or more ranks did not answer
    ├── SaveAbortedError (RuntimeError)        this save was given up; its late work is refused
    ├── ExportError (RuntimeError)             the DCP half is committed, the export is not
    └── CallbackError (RuntimeError)           a callback of the manager raised an error

Each error carries its facts as attributes: rank, phase, path, FQN, key, what was expected, what was
found, what to do. Its text lists the facts that are known. Every error survives pickling, because
DCP sends the exception of one rank to the others.
"""

from __future__ import annotations

from typing import Any

FACTS = ("rank", "phase", "path", "fqn", "key", "expected", "found", "hint", "errno")
"""Attributes of each error, besides `problem`."""


def _rebuild(cls: type[CheckpointError], problem: str, facts: dict[str, Any]) -> CheckpointError:
    return cls(problem, **facts)


class CheckpointError(Exception):
    """Root of the tree in the module docstring.

    Args:
        problem: What went wrong, in one clause.
        rank: Rank that raised the error, within the process group of the save.
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
        facts = {name: getattr(self, name) for name in FACTS}
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
    """An option is invalid; nothing was started."""


class PlanningError(CheckpointError, ValueError):
    """The state dict or the checkpoint does not fit what the caller asked for.

    Planning finds most such problems before anything is written or loaded.
    """


class ModelKeyError(PlanningError):
    """It is unclear which entry of the state dict is the model."""


class SpecError(PlanningError):
    """A `LoadSpec` does not fit the tensor it names."""


class LayoutError(PlanningError):
    """A safetensors directory cannot hold a name, dtype or size."""


class MismatchError(PlanningError):
    """A checkpoint does not fit the state dict to load into; nothing was loaded."""


class UnsupportedTorchError(CheckpointError, RuntimeError):
    """A check cannot run with this version of torch; nothing was published or loaded."""


class StagingError(CheckpointError, RuntimeError):
    """Copying the state dict to host memory failed."""


class StagingBusyError(StagingError):
    """The deadline passed while an earlier save still ran and used the staging memory."""


class StorageError(CheckpointError, OSError):
    """The storage refused an operation."""


class TargetExistsError(StorageError, FileExistsError):
    """The target exists and may not be replaced."""


class NodeLocalPathError(StorageError):
    """Ranks see different directories under one path."""


class IncoherentStorageError(StorageError):
    """This file system does not let several hosts write parts of one file safely."""


class WriteError(StorageError):
    """A write, fsync or close failed; it is not repeated."""


class ReadError(StorageError):
    """A file is missing, or a read of it failed."""


class CommitError(StorageError):
    """The finished checkpoint could not be published, or may not survive a power cut."""


class CoverageError(CheckpointError, RuntimeError):
    """Parts do not cover a tensor or an output file exactly once."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """The stored data is damaged, incomplete or hostile, or contradicts itself."""


class PickledObjectError(CheckpointError, ValueError):
    """Loading a stored object would run code that the checkpoint names."""


class SlotTimeoutError(CheckpointError, TimeoutError):
    """No write slot became free in time."""


class SaveTimeoutError(CheckpointError, TimeoutError):
    """The deadline of the save passed."""


class RankLostError(SaveTimeoutError):
    """One or more ranks did not answer."""


class SaveAbortedError(CheckpointError, RuntimeError):
    """This save was given up; whatever it still tries to do is refused."""


class ExportError(CheckpointError, RuntimeError):
    """The DCP half of the checkpoint is committed, the HuggingFace half is not.

    The writer and `warm_up` raise it too, before any save, if an asset cannot be read.
    """


class CallbackError(CheckpointError, RuntimeError):
    """A callback of the manager raised an error; the checkpoint is committed all the same."""
