"""Checks on the parameter groups of an optimizer that the trainer did not build itself."""

import torch


def check_no_group_is_empty(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a group without parameters, which is what a grouping by the wrong names ends in.

    torch accepts such a group, and what should have been in it trains with the settings of another one.
    """
    for number, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            settings = {name: value for name, value in group.items() if name in ("lr", "weight_decay")}
            raise ValueError(
                f"optimizer must have parameters in each group, got none in group {number} of "
                f"{len(optimizer.param_groups)} ({settings}). The names in trainer.model.named_parameters() begin with "
                "'student.', those in trainer.student.named_parameters() do not: group by the latter, or drop the group."
            )
