"""`nkd-hf plan`: prints what a run will do, from its arguments alone."""

import json
from dataclasses import dataclass, field

from ..data.arguments import DataArguments
from ..recipe.arguments import RecipeArguments
from ..recipe.parser import parse_args
from ..recipe.plan import PlannedTrainingArguments, make_plan
from .plan_text import format_plan


@dataclass
class PlanArguments:
    """Arguments of the plan: its format, and the store of the teacher's logits that it counts."""

    json: bool = field(default=False, metadata={"help": "Print JSON."})
    top_k: str | None = field(
        default=None,
        metadata={
            "help": "Also count the bytes of a store with this --top_k of `nkd-hf teacher-logits`: a number of logits or `all`."
        },
    )
    cycle: int | None = field(
        default=None, metadata={"help": "Count the bytes of a store of this many epochs, which training repeats."}
    )


def main(args: list[str] | None = None) -> None:
    """Prints the plan of a run.

    Args:
        args: the command line after `nkd-hf plan`; None uses `sys.argv[1:]`. It has `--config FILE` and the arguments
            that override it, as for a recipe. `--json` prints the plan as JSON (see [`make_plan`]). `--top_k` and
            `--cycle` are those of `nkd-hf teacher-logits`.

    Raises:
        SystemExit: with code 2 and a message, where an argument is wrong.
        ValueError: as [`make_plan`].
    """
    types = (RecipeArguments, DataArguments, PlannedTrainingArguments, PlanArguments)
    recipe, data, training, output = parse_args(types, args=args)
    plan = make_plan(recipe, data, training, output.top_k, output.cycle)
    print(json.dumps(plan, indent=2) if output.json else format_plan(plan))
