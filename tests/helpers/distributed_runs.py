"""What test_distributed.py compares, as it runs in one, two and three real processes."""

import functools
import json
import os
import random
import signal
import types
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from tiny import accuracy, digits, make_trainer, native_vit, timm_cnn, timm_deit
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainerCallback

from nkd_hf import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    USKDLoss,
    load_image_dataset,
    train_transform,
)
from nkd_hf.cli.teacher_logits import write_store
from nkd_hf.losses import ViTKDLoss, vitkd
from nkd_hf.models.saving import save_student
from nkd_hf.trainer.checkpoints import find_damage
from nkd_hf.trainer.distillation_model import DistillationModel

STEPS = 10
# Number of processes -> batch of each and accumulation: global batches of 16 and 32.
SPLITS = {1: [(8, 2), (8, 4), (16, 1)], 2: [(8, 1), (8, 2)]}
STUDENTS = {"nkd": native_vit, "uskd": native_vit, "vitkd": native_vit, "batch_norm": timm_cnn}
TEACHERS = {"nkd": lambda: timm_cnn(seed=1), "vitkd": lambda: timm_deit(seed=1, width=48)}
LOSSES = {
    "nkd": NKDLoss,
    "uskd": lambda: USKDLoss(32, 10, mu=0.1),
    "vitkd": lambda: ViTKDLoss(32, 48, alpha=1e-3, beta=1e-3),
    "batch_norm": lambda: USKDLoss(32, 10),
}
EVALUATION_SIZES = (31, 16, 5)


def read(folder: Path, world_size: int, name: str):
    return json.loads((folder / str(world_size) / "results.json").read_text())[name]


def train(case: str, folder: Path, batch: int, accumulation: int) -> dict:
    """A few steps of one loss; the weights go into a file beside what was logged."""
    student, teacher = STUDENTS[case](), TEACHERS.get(case, lambda: None)()
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, student, digits(0, 32 * STEPS), teacher=teacher, distillation_loss=LOSSES[case](), optim="sgd",
        optim_args="momentum=0.9", learning_rate=0.05, max_steps=STEPS, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
    )  # fmt: skip
    with fixed_masks():
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / f"{case}-{batch}-{accumulation}.safetensors")
    return {
        "log": trainer.state.log_history[:STEPS],
        "parameters_equal": equal_everywhere(trainer, trainer.model.parameters()),
    }


class fixed_masks:
    """ViTKD's masks are drawn by each process for its own images: here all images have one, so that runs compare."""

    def __enter__(self):
        self.draw = vitkd.random_token_mask
        vitkd.random_token_mask = lambda noise, ratio: self.draw(noise.cumsum(1), ratio)

    def __exit__(self, *_):
        vitkd.random_token_mask = self.draw


def equal_everywhere(trainer, tensors) -> bool:
    values = torch.cat([value.detach().double().flatten() for value in tensors])
    everywhere = trainer.accelerator.gather(values[None])
    return bool((everywhere == everywhere[0]).all())


class Stream(IterableDataset):
    def __init__(self, samples: list[dict]):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def evaluate(folder: Path) -> dict:
    """How often each held-out image was counted, and the loss, by the size of the set."""
    results = {}
    for drop_last in (False, True):
        trainer = make_trainer(
            folder, native_vit(), digits(0, 64), compute_metrics=accuracy, per_device_eval_batch_size=8,
            dataloader_drop_last=drop_last,
        )  # fmt: skip
        for size in EVALUATION_SIZES:
            samples = digits(64, 64 + size)
            for kind in (list, Stream):
                prediction = trainer.predict(kind(samples))
                results[f"{size} {kind.__name__} {'drop_last' if drop_last else ''}".strip()] = {
                    "labels": prediction.label_ids.tolist(),
                    "logits": prediction.predictions.tolist(),
                    "loss": prediction.metrics["test_loss"],
                }
    return results


def resume(folder: Path) -> dict:
    """A run with drop path, augmentation and mixup that goes on in the middle of its second epoch of six steps."""
    data = load_image_dataset(DataArguments(max_train_samples=96))
    transform = train_transform(DataArguments(horizontal_flip=0.0), 32, [0.5] * 3, [0.5] * 3)

    def run(**kwargs):
        torch.manual_seed(0)
        trainer = make_trainer(
            folder, timm_deit(drop_path=0.1), ImageDataset(data["train"], transform), distillation_loss=USKDLoss(32, 10),
            data_collator=ImageCollator(10, mixup_alpha=0.8), per_device_train_batch_size=8, max_steps=10,
            save_strategy="steps", save_steps=8,
        )  # fmt: skip
        trainer.train(**kwargs)
        return {key: value.clone() for key, value in trainer.model.state_dict().items()}

    whole, resumed = run(), run(resume_from_checkpoint=str(folder / "checkpoint-8"))
    return {
        "differ": [key for key in whole if not torch.equal(whole[key], resumed[key])],
        "checkpoint": sorted(path.name for path in (folder / "checkpoint-8").iterdir()),
    }


def statistics(folder: Path) -> dict:
    """BatchNorm's statistics, the moving average and the rate that is scaled to the global batch."""
    trainer = make_trainer(
        folder, timm_cnn(), digits(0, 64), digits(64, 95), per_device_train_batch_size=8, max_steps=2, optim="sgd",
        learning_rate=0.05, base_batch_size=32, precise_bn_images=64, ema_decay=0.9, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    network = trainer.student.timm_model
    with torch.no_grad():
        outputs = network.conv1(torch.stack([sample["pixel_values"] for sample in digits(0, 64)]))
    means = outputs.mean(dim=(0, 2, 3))
    own = make_trainer(folder, timm_cnn(), digits(0, 64), digits(64, 95), per_device_train_batch_size=8, max_steps=2)
    own.train()
    differed = not equal_everywhere(own, own.student.buffers())
    own.evaluate()
    return {
        "equal": equal_everywhere(trainer, trainer.student.state_dict().values()),
        "differed_before_evaluation": differed,
        "equal_after_evaluation": equal_everywhere(own, own.student.buffers()),
        "error": ((network.bn1.running_mean - means).abs().max() / means.abs().max()).item(),
        "learning_rate": trainer.state.log_history[0]["learning_rate"],
    }


class Draws(TrainerCallback):
    """The first numbers that a process draws in training."""

    def __init__(self):
        self.drawn = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.drawn is None:
            self.drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Permutation(Sampler):
    """An order from the generator of the process, as samplers of one's own draw it."""

    def __len__(self):
        return 64

    def __iter__(self):
        return iter(torch.randperm(64).tolist())


def own_loader(trainer):
    """A loader that the user makes, as an overridden get_train_dataloader returns it."""
    return trainer.accelerator.prepare(
        DataLoader(trainer.train_dataset, 8, shuffle=True, collate_fn=trainer.data_collator)
    )


def streams(folder: Path) -> dict:
    """What each process draws for itself, and the rows that each gets in two epochs of two trainings.

    All trainers are made before the first of them trains.
    """
    collator, made = ImageCollator(10), {}
    for name in ("own sampler", "random", "own loader"):
        rows, draws = [], Draws()

        def collate(samples: list[dict], rows: list = rows) -> dict:
            rows.append([sample["row"] for sample in samples])
            return collator(samples)

        samples = [sample | {"row": row} for row, sample in enumerate(digits(0, 64))]
        trainer = make_trainer(
            folder, timm_deit(drop_path=0.3), samples, distillation_loss=USKDLoss(32, 10), data_collator=collate,
            per_device_train_batch_size=8, max_steps=8, callbacks=[draws],
        )  # fmt: skip
        if name == "own sampler":
            trainer._get_train_sampler = lambda dataset=None: Permutation()
        elif name == "own loader":
            trainer.get_train_dataloader = functools.partial(own_loader, trainer)
        made[name] = trainer, rows, draws
    result = {}
    for name, (trainer, rows, draws) in made.items():
        equal = equal_everywhere(trainer, trainer.model.parameters())
        trainer.train()
        trainer.train()
        result[name] = {
            "equal_at_start": equal,
            "equal_at_end": equal_everywhere(trainer, trainer.model.parameters()),
            "draws": gather_object([draws.drawn]),
            "rows": gather_object([rows]),
        }
    return result


class Terminate(TrainerCallback):
    """Sends SIGTERM to the first process, at the nth call of one event."""

    def __init__(self, event: str, nth: int):
        self.calls, self.nth = 0, nth
        setattr(self, event, self.call)

    def call(self, args, state, control, **kwargs) -> None:
        self.calls += 1
        if self.calls == self.nth and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def sigterm(folder: Path) -> dict:
    """How processes end and what they have saved, when one of them gets a SIGTERM at the end of training."""
    ends = {}
    for event, nth in (("on_step_begin", 4), ("on_evaluate", 2), ("on_save", 2)):
        trainer = make_trainer(
            folder / event, native_vit(), digits(0, 64), digits(64, 80), max_steps=4, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, per_device_train_batch_size=8, callbacks=[Terminate(event, nth)],
        )  # fmt: skip
        try:
            trainer.train()
            code = 0
        except SystemExit as exit:
            code = exit.code
        ends[event] = {
            "codes": trainer.accelerator.gather(torch.tensor([code])).tolist(),
            "steps": trainer.state.global_step,
            "fault": find_damage(str(folder / event / "checkpoint-4")),
        }
    return ends


def shard(folder: Path) -> dict:
    """FSDP2's sharding by hand: on the CPU the Trainer turns FSDP into DDP without a word."""
    samples = digits(0, 8)
    batch = {key: [sample[key] for sample in samples] for key in ("pixel_values", "labels")}
    pixels, labels = torch.stack(batch["pixel_values"]), torch.tensor(batch["labels"])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )

    def gradients(prepare) -> tuple[float, dict]:
        torch.manual_seed(0)
        model = prepare(DistillationModel(timm_deit(), {"uskd": USKDLoss(32, 10)}))
        loss = sum(model(pixels, labels, {})["losses"].values())
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}

    state = types.SimpleNamespace(fsdp_plugin=plugin)
    accelerator = types.SimpleNamespace(state=state, mixed_precision="no", device="cpu", is_main_process=True)
    loss, whole = gradients(lambda model: model)
    sharded_loss, sharded = gradients(lambda model: fsdp2_prepare_model(accelerator, model))
    return {
        "losses": [loss, sharded_loss],
        "sharded": all(isinstance(gradient, DTensor) for gradient in sharded.values()),
        "error": max((whole[name] - sharded[name].full_tensor()).abs().max().item() for name in whole),
    }


def teacher_logits(folder: Path) -> str | None:
    """A store of three shards in each of two epochs; the fault is returned, if there is one."""
    if PartialState().is_main_process:
        save_student(timm_cnn(seed=1), str(folder / "teacher"))
    PartialState().wait_for_everyone()
    return write_store(
        ["--output", str(folder / "store"), "--epochs", "2", "--batch_size", "16", "--shard_size", "16",
         "--student", "resnet18", "--student_args", '{"channels": [4, 8, 8, 8]}', "--teacher", str(folder / "teacher"),
         "--image_size", "32", "--max_train_samples", "47", "--max_eval_samples", "31", "--mixup_alpha", "0.8",
         "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
    )  # fmt: skip


def run(folder: Path) -> None:
    """All of it, in each of the processes that are joined."""
    state = PartialState(cpu=True)
    world_size, folder = state.num_processes, folder / str(state.num_processes)
    folder.mkdir(exist_ok=True)
    results = {"world_size": world_size, "evaluation": evaluate(folder)}
    for batch, accumulation in SPLITS.get(world_size, []):
        for case in STUDENTS:
            if world_size == 1 and case == "batch_norm" and (batch, accumulation) != (8, 2):
                continue  # it has nothing to be compared with
            results[f"{case} {batch} x {accumulation}"] = train(case, folder, batch, accumulation)
    if world_size == 2:
        results |= {part.__name__: part(folder) for part in (resume, statistics, streams, sigterm, shard)}
    if world_size < 3:
        results["teacher_logits"] = teacher_logits(folder)
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
