"""`nkd-hf export`: the plain student out of a training checkpoint."""

import argparse
import logging
import os
from pathlib import Path

from transformers import PreTrainedModel

from ..files import new_folder
from ..models.loading import open_classifier
from ..models.saving import save_image_processor, save_student

logger = logging.getLogger(__name__)


def export(checkpoint: str, output: str, overwrite: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """Writes the student of a checkpoint as a folder that transformers and, if it is one of timm's models, timm open.

    Args:
        checkpoint: a `checkpoint-*` folder. With a moving average (`ema_decay`), its student is the averaged one.
        output: a new or empty folder.
        overwrite: whether a student that is saved in `output` is replaced.
        trust_remote_code: whether code beside the weights may run.

    Returns:
        `PreTrainedModel`: the student.

    Raises:
        ValueError: the folder is no checkpoint, or is a run with several checkpoints; `output` is not empty.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f": name one of its checkpoints, {', '.join(inside)}" if inside else ""
        raise ValueError(f"{checkpoint} is no checkpoint, since it has no config.json{hint}")
    with new_folder(output, overwrite) as new:
        student = open_classifier(str(folder), trust_remote_code=trust_remote_code)
        save_student(student, new)
        try:
            save_image_processor(student, new)
        except OSError:
            logger.warning(
                "%s holds no preprocessing, so that pipeline() cannot open %s: save the student's image processor there.",
                checkpoint,
                output,
            )
    return student


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf export`."""
    parser = argparse.ArgumentParser(prog="nkd-hf export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a checkpoint-* folder")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a student that is in the folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    args = parser.parse_args(args)
    student = export(args.checkpoint, args.output, args.overwrite, args.trust_remote_code)
    print(f"{args.output}: {type(student).__name__}, {student.config.num_labels} classes; files: ", end="")
    print(", ".join(sorted(os.listdir(args.output))))
