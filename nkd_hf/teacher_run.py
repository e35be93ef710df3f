"""`nkd-hf teacher-logits`: runs the teacher ahead of time, so that training reads its logits and runs none.

    accelerate launch -m nkd_hf.cli teacher-logits --config FILE --output DIR --epochs N

FILE is the recipe's, and its arguments can be overridden as there. A second start goes on where the first one stopped; with
larger N it adds epochs, and with a smaller one takes none away. Several machines need one folder that all of them see, or
each writes its shards, which can be copied together.
"""

import argparse
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .agreement import decide_in_first
from .architectures import is_architecture
from .batches import epoch_order
from .data import DataArguments
from .hub import PushError
from .losses import NKDLoss
from .model_card.facts import describe_teacher
from .parser import parse_args
from .preprocessing import read_preprocessing
from .recipe import Recipe
from .recipe_args import RecipeArguments
from .repo_ids import read_repo_id
from .store_fingerprint import fingerprint_differences, library_versions, public_name, teacher_fingerprint
from .store_hub import push_store
from .students import load_image_processor
from .teacher import Teacher, load_teacher
from .teacher_accuracy import ON_STUDENT_PIXELS
from .teacher_logits import STORE, StoreInfo, shard_path, sparse_logits, unfinished, write_shard
from .training_args import DistillationTrainingArguments

logger = logging.getLogger(__name__)


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf teacher-logits`.

    Args:
        args: the command line after `nkd-hf teacher-logits`; None takes `sys.argv[1:]`.

    Raises:
        SystemExit: an argument is wrong, or the push failed.
        ValueError: the folder holds another store, or the teacher cannot be used.
    """
    fault = write_store(args)
    # A process that leaves while another still writes can take the whole group down.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    if fault:
        sys.exit(f"nkd-hf teacher-logits: error: {fault}")


def write_store(args: list[str] | None = None) -> str | None:
    """Does what `nkd-hf teacher-logits` does in one of the processes; what came in the way at its end is returned."""
    options, rest = _parser().parse_known_args(args)
    _check_options(options)
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    # The recipe's own results are not made here.
    rest += ["--output_dir", options.output, "--push_to_hub", "false"]
    recipe, data, training = parse_args(types, args=rest)
    _check_recipe(recipe, data, training, options)
    recipe = dataclasses.replace(recipe, teacher_logits=None)

    run = Recipe(recipe, data, training)
    run.check(trains_student=False)
    run.train_teacher()
    run.open_teacher()
    run.data_args = dataclasses.replace(data, mix_pairs=True)
    student = run.create(recipe.student, recipe.student_args)
    teacher = load_teacher(run.teacher)
    teacher.align(read_preprocessing(student, load_image_processor(student)), run.id2label)
    info = _store_info(run, options, teacher, run.fingerprint(student))
    # The weights that are hashed in the fingerprint are those before they are rounded.
    teacher.for_inference(
        training.teacher_dtype, channels_last=training.teacher_channels_last, compile=training.teacher_compile
    )
    teacher.to(training.device)

    folder = Path(options.output)
    info = _begin(folder, info)
    train, _ = run.datasets(student)
    _write_shards(folder, info, run, teacher, train, options.batch_size)
    if info.teacher_accuracy is None or info.teacher_own_accuracy is None:
        run.measure_teacher()
        info.teacher_accuracy, info.teacher_own_accuracy = run.results[ON_STUDENT_PIXELS], run.results["teacher"]
    PartialState().wait_for_everyone()
    return _finish(folder, info, options) if training.process_index == 0 else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nkd-hf teacher-logits",
        description="Writes the teacher's logits on the augmented images of N epochs; a recipe reads them with "
        "--teacher_logits DIR. A second start goes on where the first one stopped.",
        epilog="All other arguments are the recipe's: --config FILE, and what overrides it, such as --teacher_dtype bf16, "
        "--teacher_channels_last true and --teacher_compile true.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the store")
    parser.add_argument(
        "--epochs", required=True, type=int, metavar="N", help="how many epochs; a store of more keeps them"
    )
    parser.add_argument(
        "--top_k", default="all", metavar="K",
        help="how many logits are stored beside the target's, in float16: 10 and 100 serve NKD alone; all of them are "
        "float32 and serve every loss of logits (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[], metavar="T",
        help="of NKD, for --top_k; the recipe's and 1 are always there",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=256, help="images, even (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, default=32768, help="samples in a file, even (default: %(default)s)")
    parser.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="dataset on the Hub, owner/name or the address of its page; made if it does not exist",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the dataset private")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    for name in ("epochs", "batch_size", "shard_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
    if options.top_k != "all" and not (options.top_k.isdecimal() and int(options.top_k) > 0):
        raise ValueError(f"--top_k must be a positive integer or all, got {options.top_k!r}")
    if options.batch_size % 2 or options.shard_size % 2:
        raise ValueError("--batch_size and --shard_size must be even: two images are mixed with each other")
    if options.push_to_hub is not None:
        options.push_to_hub = read_repo_id(options.push_to_hub, "--push_to_hub", "dataset")
    if any(not temperature > 0 for temperature in options.temperatures):
        raise ValueError(f"--temperatures must be positive, got {options.temperatures}")


def _check_recipe(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, options: argparse.Namespace
) -> None:
    if not recipe.needs_teacher or recipe.teacher is None:
        raise ValueError("the recipe has no teacher: set teacher, and a distillation_loss such as nkd")
    if recipe.needs_teacher_layers:
        raise ValueError(
            f"distillation_loss={recipe.distillation_loss} reads layers of the teacher, and a store has its logits alone"
        )
    others = set(recipe.losses) - {"nkd", "uskd"}
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
    losses, loss_args = run.args.losses, run.args.loss_args or {}
    nkd_args = loss_args if len(losses) == 1 else loss_args.get("nkd", {})
    own = [NKDLoss(**nkd_args).temperature] if "nkd" in losses else []
    name = None if is_architecture(run.args.teacher) else public_name(run.args.teacher)
    return StoreInfo(
        num_classes=num_classes,
        num_samples=len(run.data["train"]),
        epochs=options.epochs,
        # More there are not beside the target.
        top_k=None if options.top_k == "all" else min(int(options.top_k), num_classes - 1),
        temperatures=sorted({1.0, *map(float, own), *options.temperatures}),
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
