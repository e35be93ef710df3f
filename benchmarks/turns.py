"""Training loops that take turns, step by step, in one process: what disturbs the machine disturbs all alike."""

import threading
from collections.abc import Callable

import common
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from nkd_hf.data.sampler import EpochDataset

# Teacher, student, and the width of the student's mid feature.
PAIRS = {
    "resnet34 -> resnet18": ("resnet34", "resnet18", 256),
    "deit_small -> deit_tiny": ("deit_small_patch16_224", "deit_tiny_patch16_224", 192),
    "deit3_small -> deit_tiny": ("deit3_small_patch16_224", "deit_tiny_patch16_224", 192),
    "deit3_large -> deit_base": ("deit3_large_patch16_224", "deit_base_patch16_224", 768),
}
# A loop is a function of a callback that it calls at the end of each step.
Loop = Callable[[Callable[[], None]], None]
_NUM_PIXELS = 64


class Turns:
    """Runs training loops side by side, one step of each at a time, and measures the steps.

    A loop may be a `Trainer`, whose loop is its own: each runs in a thread, of which only one is awake.

    Args:
        rounds: steps that are measured.
        warmup: steps before them that are not.
        device: whose work a step waits for.
        clock: seconds. Default: that of [`common.make_clock`].
    """

    def __init__(self, rounds: int, warmup: int = 2, device: str = "cpu", clock: Callable[[], float] | None = None):
        self.rounds, self.warmup = rounds, warmup
        self.clock = clock or common.make_clock(device)

    @property
    def steps(self) -> int:
        """How many steps a loop must make."""
        return self.rounds + self.warmup

    def run(self, loops: dict[str, Loop]) -> dict[str, list[float]]:
        """Milliseconds of each step, by loop."""
        names = list(loops)
        turns = {name: threading.Semaphore(0) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        errors: list[BaseException] = []
        started = {}

        def go(name: str) -> None:
            following = turns[names[(names.index(name) + 1) % len(names)]]

            def step_is_over() -> None:
                times[name].append(1e3 * (self.clock() - started[name]))
                following.release()
                turns[name].acquire()
                if errors:
                    raise errors[0]
                started[name] = self.clock()

            turns[name].acquire()
            started[name] = self.clock()
            try:
                if not errors:
                    loops[name](step_is_over)
            except BaseException as error:
                errors.append(error)
            # The others still wait in their last step.
            for turn in turns.values():
                turn.release(self.steps)

        threads = [threading.Thread(target=go, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        turns[names[0]].release()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return {name: values[self.warmup : self.warmup + self.rounds] for name, values in times.items()}


class Images(EpochDataset):
    """Random images in memory, of which 64 are different, with random labels.

    Args:
        length: of an epoch.
        num_labels: number of classes.
        size: height and width.
        with_keys: whether samples carry `epoch` and `index`, which a plain model does not take.
        device: where the pixels are, so that a step on a GPU does not measure how they get there.
    """

    def __init__(
        self, length: int, num_labels: int = 1000, size: int = 224, with_keys: bool = False, device: str = "cpu"
    ):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(min(length, _NUM_PIXELS), 3, size, size, generator=generator).to(device)
        self.labels = torch.randint(num_labels, (length,), generator=generator).tolist()
        self.with_keys = with_keys

    def __len__(self) -> int:
        return len(self.labels)

    def get_sample(self, epoch: int, index: int) -> dict:
        sample = {"pixel_values": self.pixels[index % len(self.pixels)], "labels": self.labels[index]}
        return sample | {"epoch": epoch, "index": index} if self.with_keys else sample


class Data(torch.utils.data.Dataset):
    """The samples of [`Images`] for any sampler: what the trainers are compared on."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        sample = self.images.get_sample(0, index)
        return {"pixel_values": sample["pixel_values"], "labels": sample["labels"]}


def training_arguments(kind: type, folder: str, batch_size: int, steps: int, device: str, **kwargs):
    """Arguments of a `Trainer` that does nothing but steps of SGD, with gradient clipping."""
    settings = {
        "per_device_train_batch_size": batch_size, "max_steps": steps, "optim": "sgd", "learning_rate": 1e-4,
        "max_grad_norm": 1.0, "logging_steps": 10, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": device == "cpu", "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip
    return kind(folder, **settings | kwargs)


def trainer_loop(trainer: Trainer) -> Loop:
    trainer.remove_callback(PrinterCallback)

    def run(over: Callable[[], None]) -> None:
        trainer.add_callback(_StepIsOver(over))
        trainer.train()

    return run


class _StepIsOver(TrainerCallback):
    def __init__(self, over: Callable[[], None]):
        self.over = over

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.over()
