"""Keeps the last rows of a dataset with their decoded images."""

from collections import OrderedDict

from datasets import Dataset

# As many rows as lie side by side in the order of several crops.
_NUM_KEPT = 3


class KeptRows:
    """The rows that were read last, so that the next crop of an image needs no other decoding.

    [`~nkd_hf.data.decoding.read_pixels`] puts the decoded image into the row.
    """

    def __init__(self):
        self._rows: OrderedDict[int, dict] = OrderedDict()

    def read(self, dataset: Dataset, row: int) -> dict:
        """Reads a row, or returns the one that is kept."""
        if row not in self._rows:
            self._rows[row] = dataset[row]
            if len(self._rows) > _NUM_KEPT:
                self._rows.popitem(last=False)
        return self._rows[row]
