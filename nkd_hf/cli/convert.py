"""`nkd-hf convert`: an official checkpoint of cls_KD (mmcls), or a timm checkpoint, becomes a transformers folder."""

import argparse

from ..files import new_folder
from ..models.label_file import read_label_file
from ..models.mmcls import OFFICIAL_ARCHITECTURES, create_official_student
from ..models.mmcls_checkpoint import read_mmcls_checkpoint
from ..models.saving import save_image_processor, save_student
from ..models.timm_checkpoint import create_timm_student, read_timm_checkpoint


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf convert`."""
    parser = argparse.ArgumentParser(prog="nkd-hf convert", description=__doc__, allow_abbrev=False)
    checkpoint = parser.add_mutually_exclusive_group(required=True)
    checkpoint.add_argument("--mmcls", metavar="FILE", help="cls_KD's checkpoint of training, or its student alone")
    checkpoint.add_argument(
        "--timm",
        metavar="FILE",
        help="timm's checkpoint (.pth.tar), or a state_dict (.safetensors, .pth); its moving average, if it has one",
    )
    parser.add_argument(
        "--architecture",
        required=True,
        help=f"the student's. With --mmcls, one of {', '.join(OFFICIAL_ARCHITECTURES)}. With --timm, one of timm's: its "
        "preprocessing is saved, and the number of classes is the checkpoint's",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="class names, one a line, in order. Default: ImageNet's; LABEL_0, LABEL_1, ... for another number of classes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a student that is in the folder")
    args = parser.parse_args(args)

    id2label = None
    if args.labels is not None:
        id2label = dict(enumerate(read_label_file(args.labels)))
    with new_folder(args.output, args.overwrite) as folder:
        if args.timm is not None:
            student = create_timm_student(read_timm_checkpoint(args.timm), args.architecture, id2label)
        else:
            student = create_official_student(read_mmcls_checkpoint(args.mmcls), args.architecture, id2label)
        save_student(student, folder)
        save_image_processor(student, folder)
    print(f"{args.output}: {args.architecture} as {type(student).__name__}, {student.config.num_labels} classes")
