"""Says in one line each what this machine lacks for `make test-gpu` and `make bench-gpu`, and ends with 1 if it is essential."""

import configparser
import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# For JPEG files, which Pillow decodes to the same values.
OPTIONAL = {"torchcodec"}
# Beside what nkd_hf requires: for the tests and the benchmarks.
BESIDE = ("pytest", "pytest-xdist", "scipy")


def find_faults(requirements: list[str]) -> tuple[list[str], list[str]]:
    """Returns the requirements that are not installed, and the requirements whose installed version is too old."""
    missing, old = [], []
    for requirement in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            old.append(f"{requirement} ({version})")
    return missing, old


def main() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requirements = config["options"]["install_requires"].split()
    missing, old = find_faults([each for each in requirements if Requirement(each).name not in OPTIONAL] + [*BESIDE])
    if old:
        print(f"note: older than setup.cfg asks for, and tried all the same: {', '.join(old)}")
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} must be installed: run `make wheels` elsewhere, and carry the folder here"
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: a GPU is needed, and PyTorch finds none on this machine")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
