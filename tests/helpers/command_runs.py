"""Runs a command of `nkd-hf` in this process."""

from nkd_hf import cli


def run(capsys, *args) -> tuple[int, str, str]:
    """The command's exit code, stdout and stderr."""
    code = 0
    try:
        cli.main(list(args))
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()
