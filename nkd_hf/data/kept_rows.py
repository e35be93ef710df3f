"""Keeps the last rows of a dataset with their decoded images."""

from collections import OrderedDict

from datasets import Dataset

# In the order of several crops, the crops of up to three rows alternate.
_NUM_KEPT = 3


class KeptRows:
    """Keeps the rows that were read last, so that the next crop of an image is not decoded again.

    [`~nkd_hf.data.decoding.read_pixels`] puts the decoded image into the row.
    """

    def __init__(self):
        self._rows: OrderedDict[int, dict] = OrderedDict()

    def read(self, dataset: Dataset, row: int) -> dict:
        """Returns a row, which is read from the dataset if it is not kept."""
        if row not in self._rows:
            self._rows[row] = dataset[row]
            if len(self._rows) > _NUM_KEPT:
                self._rows.popitem(last=False)
        return self._rows[row]
