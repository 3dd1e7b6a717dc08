"""The loop that ours is measured against: CIFAR training as most people write it.

torchvision transforms on PIL images, a DataLoader with two workers, eager fp32, NCHW.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnet_ddp.datasets import Dataset
from resnet_ddp.vision import import_torchvision


class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images (N, 32, 32, 3) uint8 as PIL images through a transform, as torchvision's CIFAR10."""

    def __init__(self, data: Dataset, transform: Any) -> None:
        from PIL import Image

        self.images, self.labels = data.train_images[:], data.train_labels
        self.from_array, self.transform = Image.fromarray, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.from_array(self.images[index])), int(self.labels[index])


def make_loader(data: Dataset) -> torch.utils.data.DataLoader[tuple[torch.Tensor, int]]:
    """Return a loader of batches of 128."""
    t = import_torchvision().transforms
    normalise = t.Normalize(data.channel_mean, data.channel_std)
    augment = [t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), t.ToTensor(), normalise]
    images = Images(data, t.Compose(augment))
    return torch.utils.data.DataLoader(images, 128, shuffle=True, num_workers=2, drop_last=True)


def train(model: nn.Module, data: Dataset, device: str) -> Iterator[float]:
    """Train for ever on batches of 128; yield each step's loss."""
    loader = make_loader(data)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.item()
