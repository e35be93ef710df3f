"""Class names: their normal form, two lists of them matched, and names from a file."""

import json
import logging
import time

import numpy as np
import pytest
import torch

from nkd_hf.models.label_file import read_label_file
from nkd_hf.models.labels import (
    check_class_order,
    class_numbers,
    match_labels,
    normalize_id2label,
    whole_numbers,
)

TWELVE = {i: f"class {i}" for i in range(12)}


@pytest.mark.parametrize(
    "id2label",
    [
        TWELVE,
        json.loads(json.dumps(TWELVE)),
        json.loads(json.dumps(TWELVE, sort_keys=True)),
        json.loads(json.dumps({str(i): name for i, name in TWELVE.items()}, sort_keys=True)),
        dict(reversed(TWELVE.items())),
        {np.int64(i): np.str_(name) for i, name in TWELVE.items()},
        {torch.tensor(i): name for i, name in TWELVE.items()},
        {f"{i:02d}": name for i, name in TWELVE.items()},
        list(TWELVE.values()),
        tuple(TWELVE.values()),
    ],
)
def test_every_way_to_write_names_has_one_normal_form(id2label):
    names = normalize_id2label(id2label, 12)
    assert list(names.items()) == list(TWELVE.items())
    assert {type(key) for key in names} == {int}
    assert {type(name) for name in names.values()} == {str}
    assert match_labels(id2label, TWELVE) is None
    assert match_labels(TWELVE, id2label) is None
    shuffled = dict(enumerate(reversed(TWELVE.values())))
    assert match_labels(id2label, shuffled) == match_labels(shuffled, id2label) == list(range(11, -1, -1))


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        (None, "a dict of class names by number or a list of them, got None (NoneType)"),
        ("cat", "a dict of class names by number or a list of them, got 'cat' (str)"),
        ({"cat", "dog"}, "a dict of class names by number or a list of them"),
        (3, "a dict of class names by number or a list of them, got 3 (int)"),
        ({}, "at least one class"),
        ([], "at least one class"),
        ({0: "cat", 2: "dog"}, "number its 2 classes from 0 to 1, got the number 2"),
        ({1: "cat", 2: "dog"}, "number its 2 classes from 0 to 1, got the number 2"),
        ({-1: "cat", 0: "dog"}, "number its 2 classes from 0 to 1, got the number -1"),
        ({"1": "cat", 1: "dog"}, "name each class once, got class 1 twice"),
        ({"1": "cat", "01": "dog", 0: "cow"}, "name each class once, got class 1 twice"),
        ({"-1": "cat"}, "the numbers of the classes, got '-1' (str)"),
        ({"cat": 0, "dog": 1}, "the numbers of the classes, got 'cat' (str)"),
        ({" 0": "cat"}, "the numbers of the classes, got ' 0' (str)"),
        ({"1.0": "cat"}, "the numbers of the classes, got '1.0' (str)"),
        ({"\u0660": "cat"}, "the numbers of the classes"),
        ({0.0: "cat"}, "the numbers of the classes, got 0.0 (float)"),
        ({None: "cat"}, "the numbers of the classes, got None (NoneType)"),
        ({False: "cat", True: "dog"}, "the numbers of the classes, got False (bool)"),
        ({np.bool_(0): "cat"}, "the numbers of the classes"),
        ({torch.tensor(False): "cat"}, "the numbers of the classes"),
        ({torch.tensor([0, 1]): "cat"}, "the numbers of the classes"),
        ({0: "cat", 1: 1}, "hold text, got 1 (int) for class 1"),
        (["cat", None], "hold text, got None (NoneType) for class 1"),
        ([b"cat"], "hold text, got b'cat' (bytes) for class 0"),
        (["cat", "dog", "cow"], "name 2 classes, got 3"),
    ],
)
def test_names_that_are_no_classes_are_refused(id2label, message):
    with pytest.raises(ValueError, match="must") as error:
        normalize_id2label(id2label, 2, of="the model's id2label")
    assert message in str(error.value)
    assert "the model's id2label" in str(error.value)


def test_an_odd_name_is_cut_short_in_the_message():
    with pytest.raises(ValueError, match="must hold text") as error:
        normalize_id2label([["x"] * 10_000])
    assert len(str(error.value)) < 200


def test_numbers_match_as_numbers(caplog):
    as_text = sorted(map(str, range(12)))
    numbers = [int(name) for name in as_text]
    generic = [f"LABEL_{i}" for i in range(12)]
    # Names in another order, and numbers that are written differently, tell all that there is to know.
    assert match_labels(list(map(str, range(12))), as_text) == np.argsort(numbers).tolist()
    assert match_labels([f"{i:03d}" for i in range(12)], list(map(str, range(12)))) is None
    assert match_labels([f"{i:03d}" for i in range(12)], as_text) == np.argsort(numbers).tolist()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert match_labels(as_text, generic) == numbers
        assert match_labels(generic, as_text) == np.argsort(numbers).tolist()
        assert match_labels(generic, list(map(str, range(12)))) is None
        assert match_labels(generic, sorted(generic)) == np.argsort(numbers).tolist()
        assert match_labels(TWELVE, sorted(generic)) == np.argsort(numbers).tolist()
    assert caplog.text.count("class names are generic") == 5
    # 12 is no class of twelve, and as text the numbers stand in another order.
    with pytest.raises(ValueError, match="must be from 0 to 11 to be taken as the numbers of 12 classes, got 1 to 12"):
        match_labels([str(i) for i in range(1, 13)], generic)
    # Here they do not, and nobody could mean anything else.
    assert match_labels([f"{i:02d}" for i in range(1, 13)], generic) is None


def test_numbers_of_classes():
    assert whole_numbers(["000", "001", "011"]) == [0, 1, 11]
    assert whole_numbers(["LABEL_1", "LABEL_10"]) == [1, 10]
    for names in (["1", "LABEL_2"], ["1", "01"], ["-1", "2"], ["1.5"], ["\u0663"], ["1 "], ["9" * 5000]):
        assert whole_numbers(names) is None
        assert class_numbers(names, 1) == list(range(len(names)))
    assert class_numbers(["3", "7"], 10) == [3, 7]
    assert class_numbers(["1001", "1002", "2001"], 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="got 2 to 10"):
        class_numbers(["2", "10"], 2)


def test_an_order_of_classes_that_was_saved_is_kept(tmp_path):
    check_class_order(tmp_path, TWELVE)  # no model, no names
    for names in ({"id2label": {str(i): name for i, name in TWELVE.items()}}, {"label_names": list(TWELVE.values())}):
        (tmp_path / "config.json").write_text(json.dumps(names, sort_keys=True))
        check_class_order(tmp_path, TWELVE)
        check_class_order(str(tmp_path), [f"other {i}" for i in range(12)])
        with pytest.raises(ValueError, match="got 'class 10' for class 2, which is 'class 2' there"):
            check_class_order(tmp_path, sorted(TWELVE.values()))
    (tmp_path / "config.json").write_text("{}")
    check_class_order(tmp_path, TWELVE)


def test_different_numbers_of_classes_are_told_in_linear_time():
    def seconds(count: int) -> float:
        start = time.process_time()
        with pytest.raises(ValueError, match=rf"has {count + 2} classes and the student {count}.*'class {count}'"):
            match_labels([f"class {i}" for i in range(count)], [f"class {i}" for i in range(count + 2)])
        return time.process_time() - start

    # 21 times the names: 441 times the work, if each name is looked for in the other list.
    few, many = (min(seconds(count) for _ in range(3)) for count in (1_000, 21_000))
    assert many < 100 * few


@pytest.mark.parametrize(
    "content",
    [
        "cat\ngrüner Hund\n",
        "cat\ngrüner Hund",
        "cat\r\ngrüner Hund\r\n",
        "cat\rgrüner Hund\r",
        "  cat \n\tgrüner Hund\n\n \n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_label_files_are_read_however_editors_write_them(tmp_path, content, encoding):
    (tmp_path / "labels.txt").write_bytes(content.encode(encoding))
    assert read_label_file(tmp_path / "labels.txt") == ["cat", "grüner Hund"]


def test_names_of_a_file_may_repeat_and_hold_odd_characters(tmp_path):
    names = ["crane", "crane", "a\fb", "c\u2028d", "0,1; x"]
    (tmp_path / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    assert read_label_file(str(tmp_path / "labels.txt")) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ngrüner Hund\n".encode("latin-1"), "must be UTF-8 text, got other bytes in line 2"),
        ("cat\ndog\n".encode("utf-16-le"), "must be UTF-8 text, got zero bytes"),
        (b"\xff\xfec\x00\x00", "must be UTF-16 text"),
        (b"cat\n\ndog\n", "got a blank line 2"),
        (b"\r\n  \r\ncat\r\n", "got a blank line 1"),
        (b"", "got none"),
        (b"\n \n", "got none"),
        (b"\xef\xbb\xbf", "got none"),
    ],
)
def test_label_files_that_name_no_classes_are_refused(tmp_path, content, message):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_label_file(tmp_path / "labels.txt")
    with pytest.raises(ValueError, match="could not be read"):
        read_label_file(tmp_path / "missing.txt")
