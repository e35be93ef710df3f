"""`nkd-hf distill`: own images, a pretrained teacher, and a small model that is ready to deploy."""

from ..recipe.defaults import fixed_defaults
from ..recipe.distill import DISTILL_ARGUMENTS, run_distillation
from ..recipe.parser import parse_with_defaults


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf distill`.

    Args:
        args: the command line after `nkd-hf distill`; None uses `sys.argv[1:]`.

    Raises:
        SystemExit: with code 2 and a message, where an argument is wrong; with code 1 where a push failed.
        ValueError: arguments, data and models do not fit each other.
    """
    arguments, given = parse_with_defaults(
        DISTILL_ARGUMENTS, fixed_defaults, prog="nkd-hf distill", required=("dataset_name", "output_dir"), args=args
    )
    run_distillation(*arguments, given=given)
