"""`nkd-hf teacher-logits`: runs the teacher ahead of time, so that training reads its logits and runs none.

    accelerate launch -m nkd_hf.cli teacher-logits --config FILE --output DIR --epochs N

FILE is the recipe's, and its arguments can be overridden as there. A second start goes on where the first one stopped; with
larger N it adds epochs, and with a smaller one takes none away. Several machines need one folder that all of them see, or
each writes its shards, which can be copied together.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from accelerate import PartialState

from ..data.arguments import DataArguments
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.repo_ids import read_repo_id
from ..models.teacher import load_teacher
from ..recipe.arguments import RecipeArguments
from ..recipe.logit_writer import _begin, _check_recipe, _finish, _store_info, _write_shards
from ..recipe.parser import parse_args
from ..recipe.recipe import Recipe
from ..recipe.teacher_accuracy import ON_STUDENT_PIXELS
from ..trainer.arguments import DistillationTrainingArguments


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
