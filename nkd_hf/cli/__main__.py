"""Runs `python -m nkd_hf.cli`."""

from . import main

main()
