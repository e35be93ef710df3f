"""Makes the dataset `digits`, scikit-learn's 1797 handwritten digits."""

import functools
import io

import datasets
import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict


def load_digits_dataset() -> DatasetDict:
    return DatasetDict(_encode_digits())


@functools.cache
def _encode_digits() -> DatasetDict:
    # Imported here, since scikit-learn takes a second to import, and other datasets do not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    # The seed is fixed, since figures on the held-out digits must be comparable between runs.
    train, validation = train_test_split(
        np.arange(len(bunch.target)), test_size=0.2, random_state=0, stratify=bunch.target
    )

    def encoded(rows: np.ndarray) -> Dataset:
        images = []
        for row in rows:
            buffer = io.BytesIO()
            PIL.Image.fromarray(np.rint(bunch.images[row] * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": f"digit-{row:04d}.png"})
        return Dataset.from_dict({"image": images, "label": bunch.target[rows].tolist()}, features=features)

    return DatasetDict(train=encoded(train), validation=encoded(validation))
