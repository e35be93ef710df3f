"""`nkd-hf teacher-logits`: runs the teacher before the training, which then reads its logits and runs no teacher.

    accelerate launch -m nkd_hf.cli teacher-logits --config FILE --output DIR --epochs N

FILE is the recipe's, and its arguments can be overridden as in a recipe. A second start continues where the first one
stopped; with a larger N it adds epochs, and with a smaller one it removes none. With --cycle M the store has M epochs,
which training repeats, whatever its number of epochs. Several machines need one folder that all of them see, or each
writes its shards into its own folder, and the user copies them into one.
"""

import argparse
import sys
from pathlib import Path

from accelerate import PartialState

from ..data.arguments import DataArguments
from ..errors import PushError
from ..hub.teacher_logits import push_store
from ..models.repo_ids import read_repo_id
from ..recipe.arguments import RecipeArguments
from ..recipe.logit_writer import write_teacher_logits
from ..recipe.parser import parse_args
from ..recipe.store_size import check_cycle, read_top_k
from ..teacher_logits.info import StoreInfo
from ..teacher_logits.store import unfinished
from ..trainer.arguments import DistillationTrainingArguments


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf teacher-logits`.

    Args:
        args: the command line after `nkd-hf teacher-logits`; None uses `sys.argv[1:]`.

    Raises:
        SystemExit: an argument is wrong, or the push failed.
        ValueError: the folder holds another store, or the teacher cannot be used.
    """
    fault = write_store(args)
    # A process that ends while another still writes can end the whole group.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    if fault:
        sys.exit(f"nkd-hf teacher-logits: error: {fault}")


def write_store(args: list[str] | None = None) -> str | None:
    """Runs the command in one of its processes, and returns the fault at its end, or None."""
    options, rest = _make_parser().parse_known_args(args)
    _check_options(options)
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    # The result is the store: the recipe must not push a student.
    rest += ["--output_dir", options.output, "--push_to_hub", "false"]
    recipe, data, training = parse_args(types, args=rest)
    info = write_teacher_logits(
        recipe,
        data,
        training,
        options.epochs,
        cycle=options.cycle,
        top_k=read_top_k(options.top_k),
        temperatures=options.temperatures,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
    )
    return _report(Path(training.output_dir), info, options) if training.process_index == 0 else None


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nkd-hf teacher-logits",
        description="Writes the teacher's logits on the augmented images of N epochs; a recipe reads them with "
        "--teacher_logits DIR. A second start continues where the first one stopped.",
        epilog="All other arguments are the recipe's: --config FILE, and what overrides it, such as --teacher_dtype bf16, "
        "--teacher_channels_last true and --teacher_compile true.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the store")
    parser.add_argument(
        "--epochs",
        required=True,
        type=int,
        metavar="N",
        help="number of epochs; a store that has more epochs keeps them",
    )
    parser.add_argument(
        "--cycle", type=int, metavar="M",
        help="store M of the epochs, which training repeats, shuffled again each time (default: store all)",
    )  # fmt: skip
    parser.add_argument(
        "--top_k", default="all", metavar="K",
        help="number of logits stored beside the target's, in float16, from which losses of logits are approximated; all "
        "logits are float32 and exact (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[], metavar="T",
        help="temperatures of other losses that will read a store of --top_k; 1 and the recipe's are always stored",
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
    check_cycle(options.cycle, options.epochs)
    read_top_k(options.top_k)
    if options.batch_size % 2 or options.shard_size % 2:
        raise ValueError("--batch_size and --shard_size must be even: two images are mixed with each other")
    if options.push_to_hub is not None:
        options.push_to_hub = read_repo_id(options.push_to_hub, "--push_to_hub", "dataset")
    if any(not temperature > 0 for temperature in options.temperatures):
        raise ValueError(f"--temperatures must be positive, got {options.temperatures}")


def _report(folder: Path, info: StoreInfo, options: argparse.Namespace) -> str | None:
    """Prints the content of the store, pushes the store, and returns the fault, or None."""
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
    if info.cycle is not None:
        print(f"Training repeats these {info.cycle} epochs, whatever its number of epochs.")
    print(f"Train with it: --teacher_logits {folder}")
    if options.push_to_hub is None:
        return None
    try:
        print(f"It is on the Hub: {push_store(folder, options.push_to_hub, options.private)}")
    except (PushError, ValueError) as error:
        return str(error)
    return None
