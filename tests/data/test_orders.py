"""The orders of an epoch's samples."""

import doctest

import nkd_hf.data.orders


def test_docstring_examples():
    assert doctest.testmod(nkd_hf.data.orders) == (0, 4)
