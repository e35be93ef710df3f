"""How the trainer saves and resumes: a checkpoint is whole or absent, and a resumed run goes on as if nothing had been."""

import functools
import json
import logging
import math
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.seeding import derived_seeds
from ..errors import CheckpointError, failed_write
from ..files import remove_leftovers
from .agreement import decide_in_first, first_fault
from .checkpoints import (
    REPLACED,
    UNFINISHED,
    checkpoints,
    fault_of,
    is_model_only,
    is_of_trainer,
    last_whole_checkpoint,
    put_aside,
    remove_old,
    remove_unfinished,
    write_files,
)
from .hub_trainer import PUSH_COPY, HubTrainer
from .sigterm import EXIT_CODE, Sigterm, shield_worker

logger = logging.getLogger(__name__)

# What was summed up for the log since its last entry, a list with an entry per process.
_SUMS = "sums_since_log.json"
_OF_TRAINER = (
    "saved by transformers.Trainer, whose checkpoints this trainer does not resume. Pass its model "
    "(AutoModelForImageClassification.from_pretrained of that folder) as model, and train without resume_from_checkpoint."
)
_MODEL_ONLY = (
    "cannot be resumed: saved with save_only_model, which leaves the optimiser's state out. Train anew without "
    "resume_from_checkpoint, and without save_only_model if it is to be resumed later"
)
_SHARE = "Put it on a file system that all nodes share"
# Seconds in which a file is surely seen on a file system that is shared.
_PATIENCE = 30.0


class CheckpointTrainer(HubTrainer):
    """A `Trainer` that is stopped and resumed with nothing lost.

    A checkpoint takes its name `checkpoint-*` when all of it is written, so that a run that is killed in between leaves
    none that is half there; one that was damaged later is recognised by its files' sizes. SIGTERM ends training after
    the step, with a checkpoint.
    """

    def __init__(self, *args, **kwargs):
        self._saving_checkpoint = False
        self._resumed_from: str | None = None
        self._shared_folder: str | None = None
        # The components of the loss since the last log, and the steps, of which one of accumulation is a part.
        self._component_sums: dict[str, Tensor] = {}
        self._component_steps = 0.0
        # The steps that no mean of the log counts.
        self._skipped_steps = 0
        self._loaders: list[torch.utils.data.DataLoader] = []
        super().__init__(*args, **kwargs)
        self._pace = _KeepPace(self)
        self.add_callback(self._pace)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last one in `output_dir` that is whole. Nothing is
                resumed unasked.
            trial, ignore_keys_for_eval: as in `Trainer`.

        Raises:
            ValueError: the checkpoint is not whole, holds the model only (`save_only_model`), or there is none.
            CheckpointError: a checkpoint could not be written; the ones before it are as they were.
            SystemExit: with code 143, when SIGTERM came; the last checkpoint is of the last step.
        """
        # The default takes a checkpoint that is half there.
        checkpoint = self._resumed_from = self._whole_checkpoint(resume_from_checkpoint)
        with Sigterm(self.args.world_size, self.args.ddp_timeout) as self._sigterm:
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            except pickle.UnpicklingError as error:  # whose advice is to run what the file says
                raise ValueError(
                    f"{checkpoint} is not resumed, since a file of it holds more than tensors and could run code: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            finally:
                self._end_workers()
            self.end_run()
        return output._replace(training_loss=output.metrics["train_loss"])

    def begin_attempt(self) -> None:
        """Prepares a run whose model and optimizer are made, again for each batch size that `auto_find_batch_size` tries."""
        self._end_workers()
        # An interrupted run, or an attempt before this one, may have left some.
        self._component_sums, self._component_steps, self._skipped_steps = {}, 0.0, 0
        self._load_sums()

    def end_run(self) -> None:
        """Checks what came after the last step of a run."""
        # Twice, since several processes are answered one call late.
        if any([self._sigterm.came(), self._sigterm.came()]):
            logger.warning("SIGTERM came: training had just ended, and the process ends. Start it again to go on.")
            raise SystemExit(EXIT_CODE)

    def last_checkpoint(self) -> str | None:
        """The last checkpoint in `output_dir` that is whole; damaged ones after it are put aside, and said.

        One that holds the model only (`save_only_model`) is passed over. To be called in all processes.
        """
        return decide_in_first(self._last_checkpoint)

    def _last_checkpoint(self) -> str | None:
        checkpoint, faults = last_whole_checkpoint(self.args.output_dir)
        for damaged, fault in faults.items():
            logger.warning(
                "%s is not whole: %s. It is passed over, and now called %s.", damaged, fault, put_aside(damaged)
            )
        return checkpoint

    def _whole_checkpoint(self, wanted: str | bool | None) -> str | None:
        checkpoint = decide_in_first(functools.partial(self._find_checkpoint, wanted))
        fault = checkpoint and first_fault(fault_of(str(checkpoint)))
        if fault:
            raise ValueError(f"the checkpoint {checkpoint} must be whole for all processes: {fault}. {_SHARE}")
        return checkpoint

    def _find_checkpoint(self, wanted: str | bool | None) -> str | None:
        folder = self.args.output_dir
        remove_leftovers(PUSH_COPY, folder)
        for name in remove_unfinished(folder):
            logger.warning("%s in %s is half-written: it is passed over, and removed.", name, folder)
        if wanted is True:
            wanted = self._last_checkpoint()
            if wanted is None and any(map(is_model_only, checkpoints(folder))):
                raise ValueError(f"the checkpoints in {folder} {_MODEL_ONLY}")
            if wanted is None and any(map(is_of_trainer, checkpoints(folder))):
                raise ValueError(f"the checkpoints in {folder} cannot be resumed: {_OF_TRAINER}")
            if wanted is None:
                raise ValueError(f"{folder} holds no whole checkpoint: train without resume_from_checkpoint")
        elif wanted and is_of_trainer(str(wanted)):
            raise ValueError(f"the checkpoint {wanted} cannot be resumed: {_OF_TRAINER}")
        elif wanted and (fault := fault_of(str(wanted))):
            raise ValueError(f"the checkpoint {wanted} is not whole: {fault}. Resume from another one")
        elif wanted and is_model_only(str(wanted)):
            raise ValueError(f"the checkpoint {wanted} {_MODEL_ONLY}")
        return wanted or None

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        # Resumed at its end in the middle of an epoch, the default trains for a step more.
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        own = loader.base_dataloader  # accelerate's is around it
        if self.args.dataloader_persistent_workers:
            # A generator of its own: a resumed process makes new iterators where persistent workers keep theirs, and each
            # would take a number from the generator that drop path and masks draw from.
            own.generator = torch.Generator().manual_seed(derived_seeds(self.args.seed, self.args.process_index)[0])
        own.worker_init_fn = functools.partial(shield_worker, own.worker_init_fn)
        self._loaders.append(own)
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self._end_workers()

    def _end_workers(self) -> None:
        # Persistent workers would live as long as the trainer, and it ends as garbage: its queues may be closed before
        # it tells them to leave, and it then waits for five seconds for each.
        for loader in self._loaders:
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()
                loader._iterator = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The components stand beside `loss` and are averaged as it is: over steps, accumulation and processes.
        if "loss" in logs and self._component_sums:
            sums = torch.stack(list(self._component_sums.values()))
            means = nested_gather(sums.unsqueeze(0), self.args.parallel_mode).mean(dim=0) / self._component_steps
            logs = {"loss": logs["loss"], **dict(zip(self._component_sums, means.tolist(), strict=True)), **logs}
            self._component_sums, self._component_steps = {}, 0.0
        # The default divides what was summed up since the resume by the steps since then; here both are the run's.
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._skipped_steps, 1)
        super().log(logs, start_time)

    def _sums(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "components": {name: value.item() for name, value in self._component_sums.items()},
            "component_steps": self._component_steps,
            "skipped_steps": self._skipped_steps,
        }

    def _load_sums(self) -> None:
        path = Path(self._resumed_from or "", _SUMS)
        if self._resumed_from is None or not path.is_file():
            return
        sums = json.loads(path.read_text(encoding="utf-8"))
        if len(sums) != self.args.world_size:
            return
        sums = sums[self.args.process_index]
        self._tr_loss += sums["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = sums["logged_loss"], sums["logged_step"]
        self._component_sums = {name: self._tr_loss.new_tensor(value) for name, value in sums["components"].items()}
        self._component_steps, self._skipped_steps = sums["component_steps"], sums.get("skipped_steps", 0)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The default writes in place, so that a checkpoint that is half there looks like one, and counts as one when
        # older ones are deleted.
        run_folder = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        written, target = os.path.join(run_folder, UNFINISHED, name), os.path.join(run_folder, name)
        self._saving_checkpoint = True
        try:
            self._check_folder(run_folder)
            super()._save_checkpoint(model, trial)
            self._complete(written, target)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(os.path.dirname(written), ignore_errors=True)
            cause, advice = failed_write(error, run_folder)
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {run_folder} ({cause}). The "
                f"checkpoints before it are as they were: {advice}, and resume from the last one"
            ) from error
        finally:
            self._saving_checkpoint = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(target)
        if self.args.should_save:
            remove_old(
                run_folder, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint
            )

    def _check_folder(self, folder: str) -> None:
        """Raises CheckpointError, in all processes, where one of them does not see what the first one writes."""
        if self.args.world_size == 1 or folder == self._shared_folder:
            return
        mark = decide_in_first(functools.partial(_make_mark, folder))
        until = time.monotonic() + _PATIENCE
        while not (seen := os.path.exists(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        fault = first_fault(None if seen else f"{folder} lacks a file that the first process has written there")
        if fault:
            raise CheckpointError(f"output_dir must be one folder for all processes: {fault}. {_SHARE}")
        self._shared_folder = folder
        if self.args.should_save:
            os.remove(mark)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # With save_strategy=best the answer takes the place of what SIGTERM has asked for.
        is_best = super()._determine_best_metric(*args, **kwargs)
        return is_best or (self._pace.leaving and not self._pace.save_after_epoch)

    def _complete(self, written: str, target: str) -> None:
        """Gives a checkpoint its place, when all processes have written their part."""
        sums = gather_object([self._sums()])
        is_best = self.state.best_model_checkpoint == written
        if is_best:
            self.state.best_model_checkpoint = target
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            Path(written, _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            if is_best:
                # In the text: save_to_json takes seconds, where the log is long, and Trainer has called it.
                state = Path(written, TRAINER_STATE_NAME)
                text = state.read_text(encoding="utf-8").replace(json.dumps(written), json.dumps(target))
                state.write_text(text, encoding="utf-8")
            write_files(written)
            if os.path.isdir(target):  # The same step, saved by an earlier run or a moment ago.
                os.rename(target, os.path.join(os.path.dirname(written), REPLACED))
            os.rename(written, target)
            shutil.rmtree(os.path.dirname(written))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The default's call comes before all is written.
        if not self._saving_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)


def _make_mark(folder: str) -> str:
    """Writes an empty file into a folder's unfinished part; its path."""
    os.makedirs(os.path.join(folder, UNFINISHED), exist_ok=True)
    number, path = tempfile.mkstemp(prefix="seen-by-all-", dir=os.path.join(folder, UNFINISHED))
    os.close(number)
    return path


class _KeepPace(TrainerCallback):
    """Where the trainer's loop must be met: after its sums are set to 0, at the end of steps and of epochs."""

    def __init__(self, trainer: CheckpointTrainer):
        self.trainer = trainer
        self.save_after_epoch = self.leaving = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.save_after_epoch = self.leaving = False
        self.trainer.begin_attempt()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer._sigterm.came():
            control.should_save = self.leaving = True
        # What the end of an epoch logs and evaluates belongs to a checkpoint of its last step.
        if control.should_save and (state.epoch.is_integer() or state.global_step >= state.max_steps):
            control.should_save, self.save_after_epoch = False, True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_save or self.save_after_epoch
        self.save_after_epoch = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        losses = {name: value for name, value in (metrics or {}).items() if name.endswith("_loss")}
        bad = [f"{name}={value:g}" for name, value in losses.items() if not math.isfinite(value)]
        if bad and state.is_world_process_zero:
            logger.warning(
                "the evaluation after step %d is not finite (%s): the student's logits are NaN or infinite for some of "
                "its images, or none of them has a label. Look whether their pixel values are finite; if they are, it "
                "diverges: lower learning_rate",
                state.global_step,
                ", ".join(bad),
            )

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.leaving:
            if state.is_world_process_zero:
                logger.warning(
                    "SIGTERM came: the run is saved as %s of %d steps, and the process ends. Resume to go on.",
                    os.path.join(args.output_dir, f"checkpoint-{state.global_step}"),
                    state.max_steps,
                )
            raise SystemExit(EXIT_CODE)
