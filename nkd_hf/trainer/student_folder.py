"""Writes the files of a trained student and of its checkpoints, and loads the best checkpoint."""

import json
import logging
import os
from pathlib import Path

import yaml
from torch import Tensor
from transformers import BaseImageProcessor, TimmWrapperForImageClassification

from ..hub.student_files import SETTINGS, publishable
from .agreement import first_fault
from .arguments import DistillationTrainingArguments
from .checkpoints import find_damage
from .distillation_model import DistillationModel

logger = logging.getLogger(__name__)


def write_student(
    model: DistillationModel,
    folder: str,
    state_dict: dict[str, Tensor] | None,
    processing_class: BaseImageProcessor | None,
    args: DistillationTrainingArguments,
    in_checkpoint: bool,
) -> None:
    """Writes the plain student with its preprocessing and the settings of its run.

    Args:
        model: contains the student that is written.
        folder: the folder, which is created if it is missing.
        state_dict: the gathered weights of `model`, where it is sharded.
        processing_class: the student's image processor. Without one, a warning says that `pipeline` cannot open the folder.
        args: the settings; their tokens and paths are not written.
        in_checkpoint: whether the weights of the losses are written, too.
    """
    os.makedirs(folder, exist_ok=True)
    model.save(folder, model.state_dict() if state_dict is None else state_dict, with_losses=in_checkpoint)
    # A timm student's preprocessing is in its config.json, where transformers and timm look for it.
    if not isinstance(model.student, TimmWrapperForImageClassification):
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        elif not in_checkpoint:
            logger.warning(
                "%s holds no preprocessing, so that pipeline() cannot open it: pass the student's image processor to "
                "DistillationTrainer(processing_class=...).",
                folder,
            )
    # JSON turns objects that YAML cannot represent (paths, numpy's numbers) into text.
    settings = json.loads(json.dumps(args.to_dict(), default=str))
    text = yaml.safe_dump(publishable(settings), sort_keys=False)
    Path(folder, SETTINGS).write_text(text, encoding="utf-8")


def load_best_student(model: DistillationModel, checkpoint: str) -> bool:
    """Loads the weights of the best checkpoint, or warns and returns False if the checkpoint is damaged.

    All processes must call this.
    """
    fault = first_fault(find_damage(checkpoint))
    if fault:
        logger.warning(
            "The best model could not be loaded from %s: %s. The model keeps the weights of the last step.",
            checkpoint,
            fault,
        )
        return False
    model.load(checkpoint)
    return True
