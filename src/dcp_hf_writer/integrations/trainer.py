"""HFDualCallback: `transformers.Trainer` saves and resumes through a `CheckpointManager`.

Trainer passes callbacks the model and the optimizer, but it has no event that replaces a save or a
load. So the callback replaces methods of the Trainer object itself. It refuses a Trainer that lacks
one of them, because then a save or a load would silently go the old way.

Looked at: transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from dcp_hf_writer.errors import CheckpointError, ConfigError, MismatchError
from dcp_hf_writer.integrations import peft
from dcp_hf_writer.integrations.new_manager import check_free, new_manager
from dcp_hf_writer.integrations.state_of_training import DeferredRNG, set_state, state_of
from dcp_hf_writer.manager.retention import KeepBest
from dcp_hf_writer.manager.step_names import StepNames
from dcp_hf_writer.manager.trainer_state import RNG_NAME
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.preflight.check_options import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import Trainer
    from typing_extensions import Self

_log = logging.getLogger(__name__)

REPLACED = (
    *("train", "_save_checkpoint", "_load_from_checkpoint"),
    *("_load_rng_state", "_load_best_model"),
)
"""Methods of Trainer that the callback replaces."""

_STATE_FILE = "trainer_state.json"
_FIXED = {
    "save_every": "TrainingArguments(save_strategy=..., save_steps=...)",
    "trainer_state": "nothing: the callback saves Trainer's own state",
    "save_rng": "nothing: the callback always saves the random number generators",
    "staging": "nothing: Trainer steps its optimizer itself, so staging must be over before",
    "optimizers": "nothing: Trainer makes its optimizer itself",
}


class HFDualCallback(TrainerCallback):
    """Lets `transformers.Trainer` save both halves, and resume from them.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[HFDualCallback()])
        trainer.train(resume_from_checkpoint=True)

    `TrainingArguments` still decide when to save (`save_strategy`, `save_steps`), how many steps to
    keep (`save_total_limit`), and which step is the best (`load_best_model_at_end`). Each save goes
    to `<output_dir>/step-<n>`, with model, optimizer, scheduler, Trainer's state and the random
    number generators of each rank in one commit. It is written while training goes on, so
    `on_save` of other callbacks comes before the commit. `on_saved` of the manager comes after it.

    Works with one process, with DistributedDataParallel, and with FSDP2. Refuses DeepSpeed, FSDP1,
    hyperparameter search, and pushing each checkpoint to the hub.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        export: HFExport | str | None = "auto",
        resume: bool = False,
        verify: bool = False,
        **options: Any,
    ) -> None:
        """Keep the options; nothing happens before training.

        Args:
            root: Directory of the run; `None` means `output_dir`.
            export: Options of the HuggingFace half. `"auto"` derives them from the model and its
                tokenizer; `None` writes none.
            resume: Whether `train()` resumes from the newest checkpoint, if there is one.
            verify: Whether a resume compares what it reads with the digests of the manifest.
            **options: Other options of `CheckpointManager`.

        Raises:
            ConfigError: If an option cannot be used as given.
        """
        check_free(options, _FIXED)
        if isinstance(export, str) and export != "auto":
            raise ConfigError(
                "export cannot be used as given",
                expected='"auto", an HFExport, or None',
                found=repr(export),
            )
        self._root = None if root is None else local_path(root)
        self._export, self._options = export, options
        self._resumes, self._verifies = resume, verify
        # Typed loosely: Trainer declares attributes optional that are there while it trains.
        self._trainer: Any = None
        self._original: dict[str, Callable[..., Any]] = {}
        self._manager: Any = None
        self._rng = DeferredRNG()
        self._loading: int | None = None
        self._saved_step: int | None = None
        self._metrics: tuple[int, dict[str, float]] | None = None

    def attach(self, trainer: Trainer) -> Self:
        """Take over the saves and loads of a Trainer. `Trainer(callbacks=[...])` does this itself.

        Raises:
            ConfigError: If the Trainer uses what the callback does not support.
        """
        if self._trainer is trainer:
            return self
        _check_supported(trainer)
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._original = {name: getattr(trainer, name) for name in REPLACED}
        for name in REPLACED:
            setattr(trainer, name, getattr(self, name.lstrip("_") + "_instead"))
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer whose constructor calls this."""
        del args, state, control, kwargs
        frame = inspect.currentframe()
        while frame is not None:
            handler = getattr(frame.f_locals.get("self"), "callback_handler", None)
            if self in getattr(handler, "callbacks", ()):
                self.attach(frame.f_locals["self"])
                return
            frame = frame.f_back

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the checkpoint that training resumes from.

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        del args, control, kwargs
        if self._manager is None:
            raise ConfigError(
                "the callback is not attached to its Trainer, so Trainer would save by itself",
                expected="Trainer(..., callbacks=[HFDualCallback()]), or callback.attach(trainer)",
            )
        if self._loading is not None:
            self._load(self._loading)
        self._saved_step = state.global_step if self._loading is not None else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step to the manager, which raises what went wrong and looks for signals.

        Raises:
            CheckpointError: The failure of an earlier save, as `on_failure` says.
            SystemExit: After a stop signal, when the last save is over.
        """
        del args, kwargs
        if not control.should_save:
            self._manager.step(state.global_step, self._state)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Note the metrics of a step, for `keep_best`."""
        del args, control, kwargs
        numbers = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, (int, float))}
        self._metrics = (state.global_step, numbers)

    def train_instead(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Do what `Trainer.train` does, with a manager.

        Args:
            resume_from_checkpoint: `True`, or the path of a step. A checkpoint that Trainer wrote
                itself is loaded by Trainer.
            **kwargs: As Trainer's.
        """
        trainer, self._saved_step, self._metrics = self._attached, None, None
        self._rng, self._loading = DeferredRNG(), None
        with self._open(trainer) as manager, tempfile.TemporaryDirectory() as scratch:
            self._manager = manager
            try:
                source = self._source_of_resume(resume_from_checkpoint, Path(scratch))
                return self._original["train"](resume_from_checkpoint=source, **kwargs)
            finally:
                self._manager = None

    def save_checkpoint_instead(self, model: Any, trial: Any) -> None:
        """Begin the save of this step, unless it is saved already."""
        del model
        trainer, manager = self._attached, self._manager
        step = trainer.state.global_step
        if trial is not None or manager is None:
            raise ConfigError("the callback does not save the steps of a hyperparameter search")
        if step == self._saved_step:
            return
        trainer.store_flos()
        best = trainer.state.best_global_step
        if best:
            trainer.state.best_model_checkpoint = self._path_of(best)
        metrics = self._metrics[1] if self._metrics and self._metrics[0] == step else None
        manager.save(step, self._state, metrics=metrics)
        self._saved_step = step

    def load_from_checkpoint_instead(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Leave the weights to `on_train_begin`, when the optimizer is there too."""
        if self._loading is None:
            self._original["_load_from_checkpoint"](resume_from_checkpoint, model)

    def load_rng_state_instead(self, checkpoint: str | None) -> None:
        """Set the random number generators, when Trainer has skipped the batches it has seen."""
        if self._loading is None:
            self._original["_load_rng_state"](checkpoint)
        elif not self._rng.apply():
            _log.warning("the number of ranks has changed: random numbers start anew")

    def load_best_model_instead(self) -> None:
        """Load the weights of the best step.

        Raises:
            MismatchError: If the best step was not kept.
        """
        trainer, manager = self._attached, self._manager
        step = trainer.state.best_global_step
        state = _state_of(trainer.model, None)
        if manager.restore(state, step=step, verify=self._verifies) is None:
            raise MismatchError(
                "the step with the best model is gone",
                path=self._path_of(step),
                hint="pass keep_best= to the callback, or do not set it: the default keeps it",
            )
        _set_state(trainer.model, None, state)

    @property
    def _attached(self) -> Any:
        assert self._trainer is not None
        return self._trainer

    @property
    def _run_root(self) -> str:
        return local_path(self._root or self._attached.args.output_dir)

    @property
    def _names(self) -> StepNames:
        names = self._options.get("names", StepNames())
        assert isinstance(names, StepNames)
        return names

    def _path_of(self, step: int) -> str:
        return os.path.join(self._run_root, self._names.name_of(step))

    def _open(self, trainer: Any) -> Any:
        args = trainer.args
        defaults: dict[str, Any] = {"keep_last": args.save_total_limit}
        if args.load_best_model_at_end and args.metric_for_best_model:
            metric = "eval_" + args.metric_for_best_model.removeprefix("eval_")
            defaults["keep_best"] = KeepBest(metric, "max" if args.greater_is_better else "min")
        mine = {
            "export": self._export_of(trainer),
            "trainer_state": self._trainer_state,
            "rank_state": {**self._options.get("rank_state", {}), RNG_NAME: self._rng},
            "save_rng": False,
        }
        return new_manager(self._run_root, options={**defaults, **self._options, **mine})

    def _export_of(self, trainer: Any) -> HFExport | None:
        if not isinstance(self._export, str):
            return self._export
        # One object serves every save of a run, also of further calls of `train`.
        model, tokenizer = trainer.model, trainer.processing_class
        if peft.is_peft_model(model):
            tensors = peft.adapter_state(model, None, adapter=model.active_adapter)["model"]
            self._export = peft.adapter_export(model, tensors, adapter=model.active_adapter)
        else:
            self._export = HFExport.from_transformers(model, tokenizer)
        return self._export

    def _source_of_resume(self, given: Any, scratch: Path) -> str | None:
        """Return the directory that Trainer takes its own state from; `None` to start anew."""
        path: str | None = None
        if given is not None and not isinstance(given, bool):
            path = local_path(given)
        step = None if path is None else self._names.step_of(os.path.basename(path))
        if path is not None and (step is None or os.path.dirname(path) != self._run_root):
            return path
        if not given and not (given is None and self._resumes):
            return None
        found = self._manager.restore({}, step=step, verify=self._verifies)
        if found is None and given:
            raise ConfigError(
                "there is no checkpoint to resume from",
                path=path or self._run_root,
                hint="HFDualCallback(resume=True) starts anew if there is none",
            )
        if found is None:
            return None
        state = self._manager.restored.trainer_state
        if "global_step" not in state:
            raise MismatchError(
                "the checkpoint holds no state of a Trainer",
                path=self._manager.restored.path,
                expected="a checkpoint that this callback saved",
            )
        (scratch / _STATE_FILE).write_text(json.dumps(dict(state)))
        self._loading = found
        return str(scratch)

    def _trainer_state(self) -> Mapping[str, Any]:
        """Return Trainer's state as Trainer would write it."""
        trainer = self._attached
        handler = trainer.callback_handler
        found: dict[str, Any] = {}
        for one in [*handler.callbacks, trainer.control]:
            if isinstance(one, ExportableState):
                found.setdefault(type(one).__name__, []).append(one.state())
        single = {name: states[0] if len(states) == 1 else states for name, states in found.items()}
        return {**dataclasses.asdict(trainer.state), "stateful_callbacks": single}

    def _state(self) -> dict[str, Any]:
        trainer = self._attached
        if trainer.args.save_only_model:
            return _state_of(trainer.model, None)
        state = _state_of(trainer.model, _bare(trainer.optimizer))
        state["lr_scheduler"] = trainer.lr_scheduler.state_dict()
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.state_dict():
            state["scaler"] = scaler.state_dict()
        return state

    def _load(self, step: int) -> None:
        trainer = self._attached
        state = self._state()
        if self._manager.restore(state, step=step, verify=self._verifies) is None:
            raise CheckpointError("the checkpoint is gone", path=self._path_of(step))
        has_optimizer = "optim" in state
        _set_state(trainer.model, _bare(trainer.optimizer) if has_optimizer else None, state)
        if has_optimizer:
            trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if "scaler" in state:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])


def _state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    if peft.is_peft_model(model):
        return peft.adapter_state(model, optimizer, adapter=model.active_adapter)
    return state_of(model, optimizer)


def _set_state(model: Any, optimizer: Any, state: Mapping[str, Any]) -> None:
    if peft.is_peft_model(model):
        peft.set_adapter_state(model, optimizer, state)
    else:
        set_state(model, optimizer, state)


def _bare(optimizer: Any) -> Any:
    """Return the optimizer that accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def _check_supported(trainer: Any) -> None:
    missing = [name for name in REPLACED if not callable(getattr(trainer, name, None))]
    args = trainer.args
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    refused = {
        f"a Trainer without the methods {missing}": bool(missing),
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1": plugin is not None and getattr(plugin, "fsdp_version", 1) != 2,  # noqa: PLR2004
        "push_to_hub with each save": args.push_to_hub and str(args.hub_strategy.value) != "end",
    }
    found = [name for name, is_used in refused.items() if is_used]
    if found:
        raise ConfigError(
            "HFDualCallback cannot save for this Trainer",
            expected='one process, DistributedDataParallel or FSDP2 (fsdp_config={"fsdp_version": '
            '2}), and hub_strategy="end"',
            found=", ".join(found),
        )
