"""What a loss of one's own must return."""

import pytest
import torch
from tiny import digits, make_trainer, timm_cnn
from torch import nn

SCALAR = torch.tensor(1.0, requires_grad=True)


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, student_logits):
        return self.result


class ReturnsWithTask(Returns):
    def forward(self, student_logits, label_smoothing):
        return self.result


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            Returns(SCALAR),
            TypeError,
            "forward of Returns must return a dictionary of scalar tensors by name, got Tensor",
        ),
        (Returns({}), TypeError, "got an empty one. Return, for example"),
        (Returns({"mimic": 1.0}), TypeError, "'mimic', which the forward of Returns returned, must be .* got float"),
        (ReturnsWithTask({"mimic": SCALAR}), ValueError, "it must return the task loss as 'task', got mimic"),
    ],
)
def test_the_result_of_a_loss_of_ones_own_is_checked(tmp_path, loss, error, message):
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 16), distillation_loss=loss)
    with pytest.raises(error, match=message):
        trainer.train()
