"""Runs a teacher before the training, and writes its logits into a store."""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.arguments import DataArguments
from ..data.collator import ImageCollator
from ..data.image_datasets import ImageDataset
from ..data.sampler import EpochSampler
from ..data.student_datasets import make_collator
from ..data.unlabeled_images import UNLABELED
from ..hub.model_card.facts import describe_teacher
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.teacher import Teacher
from ..models.teacher_loading import load_teacher
from ..teacher_logits.compression import sparse_logits
from ..teacher_logits.info import STORE, StoreInfo
from ..teacher_logits.store import shard_path, unfinished, write_shard
from ..trainer.agreement import decide_in_first
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .disk import check_disk, check_own_disk, group_by_folder
from .fingerprint import compare_fingerprints, fingerprint_teacher, hide_path, read_versions
from .progress import shows_bars
from .recipe import Recipe
from .report import ON_STUDENT_PIXELS
from .store_size import check_cycle, check_storable, choose_temperatures, count_sample_bytes

logger = logging.getLogger(__name__)


def write_teacher_logits(
    recipe: RecipeArguments,
    data: DataArguments,
    training: DistillationTrainingArguments,
    epochs: int,
    *,
    cycle: int | None = None,
    top_k: int | None = None,
    temperatures: Sequence[float] = (),
    batch_size: int = 256,
    shard_size: int = 32768,
) -> StoreInfo:
    """Runs a recipe's teacher on the augmented images of its epochs, and writes the logits into a store.

    All processes call this, and each writes its part of the shards. Shards that are in the folder already are not
    written again.

    Args:
        recipe: names the teacher. A teacher that is an architecture is trained first.
        data: the dataset and its augmentation; images are mixed in pairs.
        training: `output_dir` is the folder of the store. It must not push.
        epochs: number of epochs; a store that has more keeps them.
        cycle: number of epochs that are stored, which training repeats; None stores all.
        top_k: number of logits that are stored beside the target's; None stores all.
        temperatures: temperatures at which losses read a store of `top_k`; 1 and the temperatures of the recipe's
            losses are always there.
        batch_size: images of a forward pass, even.
        shard_size: samples in a file, even.

    Returns:
        The content of `store.json`, with the teacher's accuracies.

    Raises:
        ValueError: the recipe has no teacher whose logits could be stored, its arguments, models and data do not fit each
            other, or `cycle` is not between 1 and `epochs` or no multiple of `crops_per_image`.
        SystemExit: with a message, when the folder holds another store.
    """
    check_cycle(cycle, epochs, data.crops_per_image)
    check_storable(recipe, data, top_k)
    _check_processes(training)
    run = Recipe(dataclasses.replace(recipe, teacher_logits=None), data, training)
    _refuse_finetuning(run)
    run.check(trains_student=False)
    # Beside the target there are no more classes.
    top_k = None if top_k is None else min(top_k, len(run.id2label) - 1)
    shape = {"epochs": epochs if cycle is None else cycle, "shard_size": shard_size, "top_k": top_k}
    shape |= choose_temperatures(recipe, top_k, temperatures)
    store_bytes = _count_missing_bytes(run, **shape)
    check_disk(run, [name for name in run.stages if name == "teacher"], decide_in_first(lambda: store_bytes))
    check_own_disk(run.folder, store_bytes)
    run.train_teacher()
    run.open_teacher()
    student = run.create(recipe.student, recipe.student_args)
    teacher = load_teacher(run.teacher)
    teacher.align(read_preprocessing(student, load_image_processor(student)), run.id2label)
    info = _describe_store(run, student, teacher, cycle=cycle, **shape)
    info = _run_teacher(run, student, teacher, info, batch_size)
    if info.teacher_accuracy is None or info.teacher_own_accuracy is None:
        run.measure_teacher()
        info.teacher_accuracy, info.teacher_own_accuracy = run.results[ON_STUDENT_PIXELS], run.results["teacher"]
    PartialState().wait_for_everyone()
    if training.process_index == 0:
        info.write(run.folder)
    return info


def _check_processes(training: DistillationTrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training.world_size:
        raise ValueError(
            f"{started} processes were started, and each would work alone: on the CPU, set --use_cpu true"
        )


def _refuse_finetuning(run: Recipe) -> None:
    """Raises ValueError if the run would fine-tune its pretrained teacher first."""
    if run.args.names_new_teacher or not run.trains_teacher:
        return
    if run.args.finetune_teacher == "always":
        fault = "finetune_teacher must not be always for a store of logits, which a teacher writes as it is. Omit it, or fine-tune"
    else:
        fault = f"the teacher {run.args.teacher} must have a classifier of the data's classes for a store of logits. Fine-tune"
    raise ValueError(f"{fault} the teacher first with nkd-hf distill, and name the folder of the fine-tuned teacher")


def _count_missing_bytes(
    run: Recipe, epochs: int, shard_size: int, top_k: int | None, **temperatures: list[float]
) -> int:
    """Counts the bytes of the shards that are yet to be written into this process's folder."""
    sample_bytes = count_sample_bytes(len(run.id2label), top_k, **temperatures)
    written = {path: path.stat().st_size for path in run.folder.glob("epoch-*/shard-*.safetensors")}
    folders = group_by_folder(run.folder)
    own = folders[PartialState().process_index]
    starts = range(0, len(run.data["train"]), shard_size)
    missing = 0
    for number, (epoch, shard) in enumerate(itertools.product(range(epochs), range(len(starts)))):
        if folders[number % len(folders)] == own:  # as _write_shards divides the shards
            size = min(shard_size, len(run.data["train"]) - starts[shard]) * sample_bytes
            missing += max(0, size - written.get(shard_path(run.folder, epoch, shard), 0))
    return missing


def _describe_store(run: Recipe, student: PreTrainedModel, teacher: Teacher, **shape) -> StoreInfo:
    """Describes a store whose shards are to be written, by a teacher before for_inference rounds its weights."""
    recipe = run.args
    names = [None if recipe.names_new_teacher else hide_path(name) for name in recipe.teachers]
    return StoreInfo(
        num_classes=len(run.id2label),
        num_samples=len(run.data["train"]),
        fingerprint=run.fingerprint(student) | fingerprint_teacher(recipe, teacher, run.training_args.teacher_dtype),
        teacher=describe_teacher(teacher, names),
        versions=read_versions(),
        **shape,
    )


def _run_teacher(
    run: Recipe, student: PreTrainedModel, teacher: Teacher, info: StoreInfo, batch_size: int
) -> StoreInfo:
    """Makes or continues the store, and returns its content; the teacher changes to its dtype for inference."""
    training = run.training_args
    teacher.for_inference(
        training.teacher_dtype, channels_last=training.teacher_channels_last, compile=training.teacher_compile
    )
    teacher.to(training.device)
    try:
        info = decide_in_first(functools.partial(_open_store, run.folder, info))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    images, _ = run.datasets(student)
    collator = make_collator(run.data_args, info.num_classes, training.seed, mix_pairs=True)
    _write_shards(run.folder, info, teacher, training, images, collator, batch_size)
    return info


def _open_store(folder: Path, info: StoreInfo) -> StoreInfo:
    """Writes `store.json`, or checks that the store in the folder can be continued, and returns its content."""
    if (folder / STORE).exists():
        earlier = StoreInfo.read(folder)
        shape = ("num_classes", "top_k", "temperatures", "standardized_temperatures", "shard_size", "cycle")
        before, now = ({name: getattr(each, name) for name in shape} | each.fingerprint for each in (earlier, info))
        # The hash of the weights, which is compared, says more than the revision.
        del now["teacher_revision"]
        if differences := compare_fingerprints(
            before | {"versions": earlier.versions}, now | {"versions": info.versions}
        ):
            raise ValueError(
                f"{folder} holds another store ({differences}): set another --output, or the arguments as they were"
            )
        info.teacher_accuracy, info.teacher_own_accuracy = earlier.teacher_accuracy, earlier.teacher_own_accuracy
        if earlier.epochs > info.epochs:
            logger.warning("%s has %d epochs, not %d, and keeps them", folder, earlier.epochs, info.epochs)
            info.epochs = earlier.epochs
    info.write(folder)
    return info


def _write_shards(
    folder: Path,
    info: StoreInfo,
    teacher: Teacher,
    training: DistillationTrainingArguments,
    images: ImageDataset,
    collator: ImageCollator,
    batch_size: int,
) -> None:
    """Writes every n-th shard in each of n processes, except the shards that exist."""
    shards = [(epoch, shard) for epoch in range(info.epochs) for shard in range(info.num_shards)]
    missing = set(unfinished(folder, info, info.epochs))
    shards = [key for key in shards[training.process_index :: training.world_size] if key in missing]
    batches = _ShardBatches(shards, info, batch_size, images)
    workers = training.dataloader_num_workers
    loader = iter(DataLoader(images, batch_sampler=batches, collate_fn=collator, num_workers=workers))
    total = sum(len(_shard_positions(info, shard)) for _, shard in shards)
    silent = training.disable_tqdm or training.process_index > 0
    interval = 0.1 if shows_bars(training) else 60  # seconds; in a file, each update is a line
    with tqdm(total=total, desc="Running the teacher", unit="image", disable=silent, mininterval=interval) as bar:
        for epoch, shard in shards:
            positions, parts = _shard_positions(info, shard), []
            for _ in range(0, len(positions), batch_size):
                batch = next(loader)
                logits = teacher(batch.get(UNLABELED, batch["pixel_values"]).to(training.device)).float()
                # Without labels, the teacher's most probable class is the target.
                labels = logits if UNLABELED in batch else batch["labels"]
                target = labels if labels.ndim == 1 else labels.argmax(-1)
                temperatures = info.temperatures, info.standardized_temperatures
                rows = sparse_logits(logits, target.to(logits.device), info.top_k, *temperatures)
                _check_finite(logits, epoch, positions, info)
                parts.append({name: value.cpu() for name, value in rows.items()})
                bar.update(len(labels))
            # An odd dataset's last sample is computed twice; its second row is cut off.
            rows = {name: torch.cat([part[name] for part in parts])[: len(positions)] for name in parts[0]}
            write_shard(shard_path(folder, epoch, shard), rows)


def _shard_positions(info: StoreInfo, shard: int) -> range:
    """Returns the positions of a shard's samples in the order of an epoch."""
    return range(info.num_samples)[shard * info.shard_size : (shard + 1) * info.shard_size]


class _ShardBatches:
    """Yields the keys of the samples of some shards, batch by batch. A batch ends where its shard ends."""

    def __init__(self, shards: list[tuple[int, int]], info: StoreInfo, batch_size: int, images: ImageDataset):
        self.shards, self.info, self.batch_size = shards, info, batch_size
        seed, shuffle = info.fingerprint["data_seed"], info.fingerprint["shuffle"]
        order = {"labels": images.sampling_labels, "crops": images.crops_per_image}
        self.sampler = EpochSampler(info.num_samples, seed, shuffle, positions=True, **order)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        known, keys = None, []
        for epoch, shard in self.shards:
            if epoch != known:
                self.sampler.set_epoch(epoch)
                known, keys = epoch, list(self.sampler)
            positions = list(_shard_positions(self.info, shard))
            # The last sample of an odd dataset is repeated, as in EpochSampler, and is not mixed.
            positions += positions[-1:] * (len(positions) % 2)
            for start in range(0, len(positions), self.batch_size):
                yield [keys[position] for position in positions[start : start + self.batch_size]]


def _check_finite(logits: torch.Tensor, epoch: int, positions: range, info: StoreInfo) -> None:
    # A class may be masked with -inf.
    if logits.isnan().any() or (logits == torch.inf).any():
        raise ValueError(
            f"the teacher's logits are not finite, in epoch {epoch} between the positions {positions.start} and "
            f"{positions.stop}: try --teacher_dtype float32, or bf16 in place of fp16"
        )
    if info.standardized_temperatures and (logits == -torch.inf).any():
        raise ValueError(
            f"the teacher's logits must be finite for standardize, got -inf in epoch {epoch} between the positions "
            f"{positions.start} and {positions.stop}. Set standardize to false, since a masked class leaves no mean"
        )
