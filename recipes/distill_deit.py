"""Distils a teacher into a DeiT with NKD (arXiv 2303.13005, table 2).

    accelerate launch recipes/distill_deit.py
    accelerate launch --config_file recipes/accelerate/eight_gpus.yaml recipes/distill_deit.py --config my.yaml

With no arguments it runs on scikit-learn's digits in minutes: a CNN teacher, then the same small DeiT from the same seed
without and with NKD. `--distillation_loss none` trains the baseline of any configuration; `--help` lists everything.
With --dataset_name, NKD with gamma 1.0 and the comparison with the baseline stay; the rest of
configs/digits_distill_deit.yaml (student, teacher, image size, augmentation, epochs, batch, optimiser, evaluations) belongs to the digits
alone, and is set on the command line or in a YAML of yours.
Without a file of `recipes/accelerate`, accelerate reads the file that `accelerate config` wrote. Without that
file, it uses all GPUs of the machine, or one process on the CPU.
"""

from pathlib import Path

import nkd_hf

DIGITS = Path(__file__).parent / "configs" / "digits_distill_deit.yaml"
# The keys of it that belong to the method, and hold for other data too.
METHOD = (("distillation_loss", "loss_args"), ("compare_with_baseline",))


def main() -> None:
    nkd_hf.start_recipe()
    arguments = (nkd_hf.RecipeArguments, nkd_hf.DataArguments, nkd_hf.DistillationTrainingArguments)
    recipe = nkd_hf.Recipe(*nkd_hf.parse_args(arguments, default_config=DIGITS, default_config_keeps=METHOD))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    recipe.report()


if __name__ == "__main__":
    with nkd_hf.one_line_errors():
        main()
