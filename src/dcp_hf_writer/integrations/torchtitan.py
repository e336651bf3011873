"""DualCheckpointer: torchtitan's checkpointer interface over a `CheckpointManager`.

torchtitan's own classes are not imported: the trainer calls `load`, `save`,
`maybe_wait_for_staging`, `maybe_wait_for_saving` and `close`, and its config has a method `build`.

Looked at: torchtitan 0.3.0, `components/checkpointer` and `trainer.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import ConfigError, MismatchError, ReadError
from dcp_hf_writer.integrations.new_manager import check_free, load_from, new_manager
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.preflight.check_options import local_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_log = logging.getLogger(__name__)

MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER = "model", "optimizer", "lr_scheduler", "dataloader"
"""Names that torchtitan gives the parts of its state. It saves the model's tensors at the top."""

_NEWEST = -1
_FIXED = {
    "save_every": "checkpoint.interval, checkpoint.enable_first_step_checkpoint",
    "keep_last": "checkpoint.keep_latest_k",
    "optimizers": "nothing: the optimizers of the trainer are used",
}


class DualCheckpointer:
    """Saves and resumes a torchtitan run; each save writes the HuggingFace half too.

    The DCP half has the layout of torchtitan's own checkpoints, so either resumes from the other's.
    What decides when to save, how many steps to keep and what to load first are the fields of
    torchtitan's config. Where it differs from torchtitan's own:

    - The last save keeps the dtype of the model in the DCP half; `export_dtype` casts the
      HuggingFace half, at every save.
    - A save is visible only when it is whole. `load` passes over what is damaged.
    - `close` waits for the last save, and raises what went wrong.
    """

    def __init__(
        self,
        config: Any,
        *,
        model_parts: Sequence[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        dataloader: Any,
        states: dict[str, Any],
        sd_adapter: Any = None,
        base_folder: str = "",
        export: HFExport | None = None,
        **options: Any,
    ) -> None:
        """Prepare the run; all ranks call it together.

        Args:
            config: The checkpoint config of torchtitan.
            model_parts: The parts of the model that this rank holds.
            optimizers: The optimizers, as one object with `state_dict` and `load_state_dict`.
            lr_schedulers: The schedulers, likewise.
            dataloader: The dataloader, likewise; `None` if it has no state.
            states: Other objects to save, by name, likewise; such as `{"train_state": trainer}`.
            sd_adapter: The adapter to the layout of the hub; `None` writes no HuggingFace half.
            base_folder: Directory that holds the folder of the checkpoints.
            export: Options of the HuggingFace half, instead of those that follow from `sd_adapter`.
                Under pipeline parallelism, make them from the state dict of the whole model.
            **options: Other options of `CheckpointManager`.

        Raises:
            ConfigError: If an option cannot be used as given.
            CheckpointError: As `CheckpointManager`.
        """
        check_free(options, _FIXED)
        self.enable = bool(config.enable)
        self.save_future = None
        self._config = config
        self._manager: Any = None
        if not self.enable:
            return
        self._parts = list(model_parts)
        self._states: dict[str, Any] = {
            **states,
            OPTIMIZER: optimizers,
            LR_SCHEDULER: lr_schedulers,
            DATALOADER: dataloader,
        }
        self._adapter = sd_adapter
        self._export = export if export is not None else self._export_of(sd_adapter)
        if config.last_save_in_hf and self._export is None:
            msg = "checkpoint.last_save_in_hf needs to know the layout of the hub"
            raise ConfigError(msg, expected="a model with a state_dict_adapter, or export=")
        if options.get("staging") == "overlap":
            options["optimizers"] = list(optimizers)
        self._manager = new_manager(
            local_path(os.path.join(base_folder, config.folder)),
            options={"keep_last": config.keep_latest_k or None, **options, "export": self._export},
        )

    def save(self, curr_step: int, last_step: bool = False) -> bool:  # noqa: FBT001, FBT002 - torchtitan's
        """Begin a save if one is due at this step; the last step of a run is always saved.

        Args:
            curr_step: Step that has just ended.
            last_step: Whether it is the last step of the run. This save is over on return.

        Returns:
            Whether a save began.

        Raises:
            CheckpointError: The failure of an earlier save, as `on_failure` says, or of this one.
        """
        if not self._is_due(curr_step, is_last=last_step):
            return False
        if last_step:
            content = self._model if self._config.last_save_model_only else self._everything
            has_export = self._export is not None
            self._manager.save(curr_step, content, export=has_export, wait=True)
        else:
            self._manager.save(curr_step, self._everything)
        return True

    def load(self, step: int = _NEWEST) -> bool:
        """Load a step of this run, or what the config says a new run begins with.

        Args:
            step: The step; -1 means the newest that is good.

        Returns:
            Whether anything was loaded.

        Raises:
            ReadError: If there is no such step.
            CheckpointError: As `CheckpointManager.restore`.
        """
        if not self.enable:
            return False
        # A checkpoint of step 0 is a seed, which holds nothing but the model.
        newest = self._manager.latest() if step == _NEWEST else step
        state = self._model() if newest == 0 else self._wanted()
        is_named = step != _NEWEST
        if self._manager.restore(state, step=step if is_named else None) is not None:
            self._set(state)
            return True
        if is_named:
            raise ReadError("there is no checkpoint of this step", path=self._manager.path_of(step))
        return self._load_first()

    def maybe_wait_for_staging(self) -> None:
        """Do nothing: `save` returns after staging, or the optimizers wait for it by themselves."""

    def maybe_wait_for_saving(self) -> None:
        """Wait until no save is in flight.

        Raises:
            CheckpointError: What went wrong.
        """
        if self._manager is not None:
            self._manager.wait()

    def close(self) -> None:
        """Wait for the save in flight and end the run.

        Raises:
            CheckpointError: What went wrong.
        """
        if self._manager is not None:
            self._manager.close()

    def _is_due(self, step: int, *, is_last: bool) -> bool:
        config = self._config
        if not self.enable or config.load_only:
            return False
        is_first = step == 1 and config.enable_first_step_checkpoint
        return is_first or is_last or step % config.interval == 0

    def _export_of(self, adapter: Any) -> HFExport | None:
        if adapter is None:
            return None
        dtype = getattr(torch, self._config.export_dtype)
        return HFExport.from_state_dict_adapter(adapter, self._model(), dtype=dtype)

    def _model(self) -> dict[str, Any]:
        return {fqn: one for part in self._parts for fqn, one in part.state_dict().items()}

    def _everything(self) -> dict[str, Any]:
        # torchtitan saves None in place of an object that there is not.
        states = {k: None if one is None else one.state_dict() for k, one in self._states.items()}
        return {**self._model(), **states}

    def _wanted(self) -> dict[str, Any]:
        """Return the state dict to load into, without what the config leaves out."""
        left = set(self._config.exclude_from_loading)
        if unknown := sorted(left - self._states.keys()):
            raise ConfigError(
                "checkpoint.exclude_from_loading names what is not saved",
                expected=f"some of {sorted(self._states)}",
                found=str(unknown),
            )
        return {name: one for name, one in self._everything().items() if name not in left}

    def _set(self, state: Mapping[str, Any]) -> None:
        """Give what was loaded to the objects that hold it."""
        for part in self._parts:
            part.load_state_dict({fqn: state[fqn] for fqn in part.state_dict()})
        for name, one in self._states.items():
            if one is not None and name in state:
                one.load_state_dict(state[name])

    def _load_first(self) -> bool:
        """Load what a run without checkpoints begins with, if the config names it."""
        config = self._config
        path = config.initial_load_path
        if config.initial_load_in_hf and not path:
            path = getattr(self._adapter, "hf_assets_path", None)
        if not path:
            if config.initial_load_in_hf:
                raise ConfigError(
                    "checkpoint.initial_load_in_hf needs a directory to load from",
                    expected="checkpoint.initial_load_path, or model.hf_assets_path",
                )
            return False
        if not os.path.isdir(path):
            msg = "the initial checkpoint is no directory"
            raise ReadError(msg, path=path, hint="set checkpoint.initial_load_path")
        state = self._model() if config.initial_load_model_only else self._wanted()
        if config.initial_load_in_hf and self._export is None:
            raise MismatchError(
                "the layout of the hub is not known", expected="a state_dict_adapter"
            )
        source = "hf" if config.initial_load_in_hf else "dcp"
        specs = None if self._export is None else self._export.specs
        load_from(path, state, source=source, specs=specs)
        self._set(state)
        _log.info("the run begins with %s", path)
        return True


def checkpoint_config(config: Any, **options: Any) -> Any:
    """Return a copy of a checkpoint config of torchtitan that builds a `DualCheckpointer`.

        trainer_config.checkpoint = checkpoint_config(CheckpointManager.Config(enable=True))

    Args:
        config: A `CheckpointManager.Config` of torchtitan.
        **options: Options of `DualCheckpointer` and of `CheckpointManager`.

    Raises:
        ConfigError: If `config` is no config of torchtitan, or an option cannot be used.
    """
    check_free(options, _FIXED)
    kind: Any = type(config)
    if not dataclasses.is_dataclass(config) or not callable(getattr(config, "build", None)):
        raise ConfigError(
            "config must be a checkpoint config of torchtitan",
            expected="a CheckpointManager.Config",
            found=kind.__name__,
        )

    class DualConfig(kind):  # type: ignore[misc]
        def build(self, **parts: Any) -> DualCheckpointer:
            return DualCheckpointer(self, **parts, **options)

    # The class is known at run time only.
    names = (one.name for one in dataclasses.fields(config) if one.init)
    return DualConfig(**{name: getattr(config, name) for name in names})
