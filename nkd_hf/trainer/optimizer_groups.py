"""Checks on the parameter groups of an optimizer that the trainer did not build itself."""

import torch


def check_no_group_is_empty(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a group without parameters, the result of grouping by the wrong names.

    torch accepts such a group, and its intended parameters then train with the settings of another group.
    """
    for number, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            settings = {name: value for name, value in group.items() if name in ("lr", "weight_decay")}
            raise ValueError(
                f"optimizer must have parameters in each group, got none in group {number} of "
                f"{len(optimizer.param_groups)} ({settings}). The names in trainer.model.named_parameters() begin with "
                "'student.', those in trainer.student.named_parameters() do not: group by the latter, or drop the group."
            )
