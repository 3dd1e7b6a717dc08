"""Error rates: every image once, nothing left behind."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from resnet_ddp.augment import Normalisation
from resnet_ddp.evaluate import error_rate
from resnet_ddp.models import build_model

PLAIN = Normalisation(mean=torch.zeros(3), scale=torch.ones(3))


class ReadsLabel(nn.Module):
    """Answers with the value of the first pixel, and counts what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.blocks.append(len(images))
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 10) * self.scale


def rate(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> float:
    accelerator = Accelerator(cpu=True)
    return error_rate(
        model,
        images=images,
        labels=labels,
        samples=samples,
        normalise=PLAIN,
        accelerator=accelerator,
    )


def labelled(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    return images, labels


def test_every_image_counts_once_in_blocks_of_500() -> None:
    images, labels = labelled(1_203)
    labels[-217:] = (labels[-217:] + 1) % 10  # wrong to the very end
    model = ReadsLabel()
    assert rate(model, images, labels, torch.arange(1_203)) == 217 / 1_203
    assert model.blocks == [500, 500, 203]


def test_only_the_chosen_images_count() -> None:
    images, labels = labelled(20)
    labels[:10] = (labels[:10] + 1) % 10
    assert rate(ReadsLabel(), images, labels, torch.tensor([3, 12, 15, 19])) == 0.25


def test_mode_and_buffers_stay_as_they_were() -> None:
    model = build_model("resnet20", num_classes=10, seed=0)
    images, labels = labelled(40)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        rate(model, images, labels, torch.arange(40))
        assert {module.training for module in model.modules()} == {training}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
