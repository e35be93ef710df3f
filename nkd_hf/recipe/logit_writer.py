"""Runs a teacher ahead of time and writes its logits."""

import argparse
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.arguments import DataArguments
from ..data.sampler import epoch_order
from ..errors import PushError
from ..hub.model_card.facts import describe_teacher
from ..hub.teacher_logits import push_store
from ..models.architectures import is_architecture
from ..models.teacher import Teacher
from ..teacher_logits.compression import sparse_logits
from ..teacher_logits.store import STORE, StoreInfo, shard_path, unfinished, write_shard
from ..trainer.agreement import decide_in_first
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .fingerprint import fingerprint_differences, library_versions, public_name, teacher_fingerprint
from .recipe import Recipe

logger = logging.getLogger(__name__)


def _check_recipe(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, options: argparse.Namespace
) -> None:
    if not recipe.needs_teacher or recipe.teacher is None:
        raise ValueError("the recipe has no teacher: set teacher, and a distillation_loss such as nkd")
    if recipe.needs_teacher_layers:
        raise ValueError(
            f"distillation_loss={recipe.distillation_loss} reads layers of the teacher, and a store has its logits alone"
        )
    others = recipe.losses_of_all_logits
    if options.top_k != "all" and others:
        raise ValueError(f"{', '.join(sorted(others))} needs top_k = all: leave --top_k out")
    if data.streaming:
        raise ValueError("teacher logits need streaming off: a stream has no order in which they could be stored")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training.world_size:
        raise ValueError(
            f"{started} processes were started, and each would work alone: on the CPU, set --use_cpu true"
        )


def _store_info(run: Recipe, options: argparse.Namespace, teacher: Teacher, fingerprint: dict[str, Any]) -> StoreInfo:
    num_classes = len(run.id2label)
    name = None if is_architecture(run.args.teacher) else public_name(run.args.teacher)
    return StoreInfo(
        num_classes=num_classes,
        num_samples=len(run.data["train"]),
        epochs=options.epochs,
        # More there are not beside the target.
        top_k=None if options.top_k == "all" else min(int(options.top_k), num_classes - 1),
        temperatures=sorted({1.0, *run.args.top_k_temperatures, *options.temperatures}),
        shard_size=options.shard_size,
        fingerprint=fingerprint | teacher_fingerprint(run.args, teacher.model, run.training_args.teacher_dtype),
        teacher=describe_teacher(teacher.model, name),
        versions=library_versions(),
    )


def _begin(folder: Path, info: StoreInfo) -> StoreInfo:
    """Writes `store.json`, or looks whether the store in the folder can go on."""
    try:
        return decide_in_first(functools.partial(_opened, folder, info))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def _opened(folder: Path, info: StoreInfo) -> StoreInfo:
    if (folder / STORE).exists():
        earlier = StoreInfo.read(folder)
        shape = ("num_classes", "top_k", "temperatures", "shard_size")
        before, now = ({name: getattr(each, name) for name in shape} | each.fingerprint for each in (earlier, info))
        # The hash of the weights says more.
        del now["teacher_revision"]
        if differences := fingerprint_differences(
            before | {"versions": earlier.versions}, now | {"versions": info.versions}
        ):
            raise ValueError(
                f"{folder} holds another store ({differences}): set another --output, or the arguments as they were"
            )
        info.teacher_accuracy, info.teacher_own_accuracy = earlier.teacher_accuracy, earlier.teacher_own_accuracy
        if earlier.epochs > info.epochs:
            logger.warning(
                "%s is a store of %d epochs, not %d, and goes on as one", folder, earlier.epochs, info.epochs
            )
            info.epochs = earlier.epochs
    info.write(folder)
    return info


def _write_shards(
    folder: Path, info: StoreInfo, run: Recipe, teacher: Teacher, train: torch.utils.data.Dataset, batch_size: int
) -> None:
    """Each process writes every n-th shard, but for those that are there."""
    training = run.training_args
    shards = [(epoch, shard) for epoch in range(info.epochs) for shard in range(info.num_shards)]
    missing = set(unfinished(folder, info, info.epochs))
    shards = [key for key in shards[training.process_index :: training.world_size] if key in missing]
    batches = _ShardBatches(shards, info, batch_size)
    loader = iter(
        DataLoader(
            train, batch_sampler=batches, collate_fn=run.collator(), num_workers=training.dataloader_num_workers
        )
    )
    total = sum(len(positions_of(info, shard)) for _, shard in shards)
    silent = training.disable_tqdm or training.process_index > 0
    with tqdm(total=total, desc="Running the teacher", unit="image", disable=silent) as bar:
        for epoch, shard in shards:
            positions, parts = positions_of(info, shard), []
            for _ in range(0, len(positions), batch_size):
                batch = next(loader)
                logits = teacher(batch["pixel_values"].to(training.device)).float()
                labels = batch["labels"]
                target = labels if labels.ndim == 1 else labels.argmax(-1)
                rows = sparse_logits(logits, target.to(logits.device), info.top_k, info.temperatures)
                _check_finite(logits, epoch, positions)
                parts.append({name: value.cpu() for name, value in rows.items()})
                bar.update(len(labels))
            # Without the second one of an odd dataset's last sample.
            rows = {name: torch.cat([part[name] for part in parts])[: len(positions)] for name in parts[0]}
            write_shard(shard_path(folder, epoch, shard), rows)


def positions_of(info: StoreInfo, shard: int) -> range:
    """The positions of a shard."""
    return range(info.num_samples)[shard * info.shard_size : (shard + 1) * info.shard_size]


class _ShardBatches:
    """The keys of the samples of some shards, batch by batch: a batch ends where its shard ends."""

    def __init__(self, shards: list[tuple[int, int]], info: StoreInfo, batch_size: int):
        self.shards, self.info, self.batch_size = shards, info, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        known, order = None, []
        for epoch, shard in self.shards:
            if epoch != known:
                fingerprint = self.info.fingerprint
                order = epoch_order(self.info.num_samples, fingerprint["data_seed"], epoch, fingerprint["shuffle"])
                known = epoch
            positions = list(positions_of(self.info, shard))
            # The last sample of an odd dataset stands twice, as EpochSampler hands it out, and is not mixed.
            positions += positions[-1:] * (len(positions) % 2)
            for start in range(0, len(positions), self.batch_size):
                yield [(epoch, order[position], position) for position in positions[start : start + self.batch_size]]


def _check_finite(logits: torch.Tensor, epoch: int, positions: range) -> None:
    # A class may be masked with -inf.
    if logits.isnan().any() or (logits == torch.inf).any():
        raise ValueError(
            f"the teacher's logits are not finite, in epoch {epoch} between the positions {positions.start} and "
            f"{positions.stop}: try --teacher_dtype float32, or bf16 in place of fp16"
        )


def _finish(folder: Path, info: StoreInfo, options: argparse.Namespace) -> str | None:
    """Says what there is, and pushes it; what came in the way is returned."""
    info.write(folder)
    missing = unfinished(folder, info, info.epochs)
    if missing:
        return f"{len(missing)} shards are not in {folder}: copy those of the other machines into it"
    size = sum(path.stat().st_size for path in folder.glob("epoch-*/shard-*.safetensors"))
    samples = info.epochs * info.num_samples
    print(
        f"\nThe teacher's top-1 accuracy is {info.teacher_own_accuracy:.2%} with its own preprocessing, "
        f"{info.teacher_accuracy:.2%} on the student's pixels."
    )
    print(
        f"{folder}: {info.epochs} epochs of {info.num_samples} images, {size / 1e6:.1f} MB, {size / samples:.0f} bytes each."
    )
    print(f"Train with it: --teacher_logits {folder}")
    if options.push_to_hub is None:
        return None
    try:
        print(f"It is on the Hub: {push_store(folder, options.push_to_hub, options.private)}")
    except (PushError, ValueError) as error:
        return str(error)
    return None
