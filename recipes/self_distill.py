"""Distils a student into itself with USKD (arXiv 2303.13005, table 3): there is no teacher.

    accelerate launch recipes/self_distill.py
    accelerate launch --config_file recipes/accelerate/eight_gpus.yaml recipes/self_distill.py --config my.yaml

With no arguments it runs on scikit-learn's digits in minutes: the same small ResNet from the same seed
without and with USKD. `--distillation_loss none` trains the baseline of any configuration; `--help` lists everything.
With --dataset_name, USKD and the comparison with the baseline stay; the rest of
configs/digits_self_distill.yaml (student, image size, augmentation, epochs, batch, optimiser, evaluations) belongs to the digits
alone, and is set on the command line or in a YAML of yours.
Without a file of `recipes/accelerate`, accelerate reads the file that `accelerate config` wrote. Without that
file, it uses all GPUs of the machine, or one process on the CPU.
"""

from pathlib import Path

import nkd_hf

DIGITS = Path(__file__).parent / "configs" / "digits_self_distill.yaml"
# The keys of it that belong to the method, and hold for other data too.
METHOD = (("distillation_loss", "loss_args"), ("compare_with_baseline",))


def main() -> None:
    nkd_hf.start_recipe()
    arguments = (nkd_hf.RecipeArguments, nkd_hf.DataArguments, nkd_hf.DistillationTrainingArguments)
    recipe = nkd_hf.Recipe(*nkd_hf.parse_args(arguments, default_config=DIGITS, default_config_keeps=METHOD))
    recipe.train_baseline()
    recipe.train_student()
    recipe.report()


if __name__ == "__main__":
    with nkd_hf.one_line_errors():
        main()
