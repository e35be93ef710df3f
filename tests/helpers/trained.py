"""A small classifier that was trained on digits, and batches of them."""

import torch
from tiny import digits, timm_cnn
from transformers import PreTrainedModel


def trained_cnn() -> PreTrainedModel:
    """Some 80 % of the digits that it was not trained on are right."""
    model = timm_cnn().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = digit_batches(0, 1152)
    for _ in range(4):
        for batch in batches:
            torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def digit_batches(start: int, stop: int, size: int = 64) -> list[dict[str, torch.Tensor]]:
    rows = digits(start, stop)
    return [
        {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows[i : i + size]]),
            "labels": torch.tensor([row["labels"] for row in rows[i : i + size]]),
        }
        for i in range(0, len(rows), size)
    ]
