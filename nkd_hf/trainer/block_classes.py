"""Finds the blocks of a student that FSDP shards one by one."""

from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

_STACKS = (nn.Sequential, nn.ModuleList)


def block_classes(student: PreTrainedModel) -> set[str]:
    """Returns the class names of the modules that FSDP shards one by one; an empty set keeps the student whole."""
    if isinstance(student, TimmWrapperForImageClassification):
        # TimmWrapper's own _no_split_modules names a class that no classifier has, and FSDP fails on it.
        return _stacked_classes(student.timm_model)
    return set(student._no_split_modules or ()) & {type(module).__name__ for module in student.modules()}


def _stacked_classes(module: nn.Module) -> set[str]:
    """Returns the class names of the outermost modules that are in a list and have submodules."""
    classes = set()
    for part in module.children():
        if isinstance(module, _STACKS) and not isinstance(part, _STACKS) and any(part.children()):
            classes.add(type(part).__name__)
        else:
            classes |= _stacked_classes(part)
    return classes
