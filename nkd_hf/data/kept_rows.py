"""Keeps decoded images until their last crop."""

import random

import PIL.Image
import torch

# Bytes of the images that a process keeps. With a batch of 256, `spread_crops` needs 1.2 GB for images of 500 x 375 pixels,
# which the workers share.
_MAX_BYTES = 2**30


class KeptRows:
    """Keeps the rows whose images were decoded, so that the next crop of an image is not decoded again.

    A row is kept until its last crop, or the end of its epoch. Above [`_MAX_BYTES`], random rows are removed: with a fixed
    order, such as the oldest first, a block that is slightly larger than the memory would find none of its rows.

    Args:
        crops: number of crops of a row.
    """

    def __init__(self, crops: int):
        self._crops = crops
        self._rows: dict[int, dict] = {}
        self._num_bytes, self._epoch = 0, 0
        self._random = random.Random(0)

    def take(self, epoch: int, row: int) -> dict | None:
        """Returns a row and removes it; None if it is not kept. Another epoch than before removes all rows."""
        if epoch != self._epoch:
            self._rows.clear()
            self._num_bytes, self._epoch = 0, epoch
        return self._take(row)

    def _take(self, row: int) -> dict | None:
        sample = self._rows.pop(row, None)
        if sample is not None:
            self._num_bytes -= _count_bytes(sample)
        return sample

    def put(self, row: int, sample: dict, crop: int) -> None:
        """Keeps a row after one of its crops, unless it was the last one.

        Args:
            row: number of the row.
            sample: the row, in which [`~nkd_hf.data.decoding.read_pixels`] has put the decoded image.
            crop: number of the crop.
        """
        if not 0 <= crop < self._crops - 1:
            return
        self._take(row)
        # The encoded image is no longer needed.
        self._rows[row] = sample | {"image": {"path": (sample["image"] or {}).get("path"), "bytes": None}}
        self._num_bytes += _count_bytes(sample)
        while self._num_bytes > _MAX_BYTES:
            self._take(self._random.choice(list(self._rows)))


def _count_bytes(sample: dict) -> int:
    image: PIL.Image.Image | torch.Tensor = sample["decoded"][0]
    # Pillow has four bytes for a pixel of RGB.
    return image.nbytes if isinstance(image, torch.Tensor) else 4 * image.width * image.height
