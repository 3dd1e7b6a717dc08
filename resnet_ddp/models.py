"""The networks of He et al. 2015, section 4.2: residual and plain nets for 32x32 images.

Shapes: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp.architectures import ARCHITECTURES, Architecture, Shortcut

WIDTHS = (16, 32, 64)  # channels of the three stages


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return the paper's convolution: 3x3, zero padding 1, no bias (BatchNorm follows)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class IdentityShortcut(nn.Module):
    """Option A: the identity, every `stride`-th pixel, new channels zero at the end; no weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + new, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class MaxPoolShortcut(IdentityShortcut):
    """Option A with max pooling in place of every second pixel (nabla0001/resnet's variant)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + new, H / stride, W / stride)."""
        return F.pad(F.max_pool2d(x, self.stride), (0, 0, 0, 0, 0, self.new_channels))


class ProjectionShortcut(nn.Sequential):
    """Option B: a 1x1 convolution and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )


SHORTCUTS: dict[Shortcut, type[nn.Module]] = {
    "A": IdentityShortcut,
    "B": ProjectionShortcut,
    "maxpool": MaxPoolShortcut,
}


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm; a residual block adds its input before the last ReLU.

    Args:
        shortcut: None makes a plain block. Where the shape stays, every shortcut is the identity.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut | None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if shortcut is not None:
            same_shape = stride == 1 and in_channels == out_channels
            self.shortcut = (
                nn.Identity()
                if same_shape
                else SHORTCUTS[shortcut](in_channels, out_channels, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            out += self.shortcut(x)  # in place: what BatchNorm saved is its input
        return F.relu(out, inplace=True)


class CifarNet(nn.Module):
    """A net of depth 6n+2: convolution, three stages of n blocks, average pooling, linear layer.

    Args:
        architecture: depth and shortcut.
        num_classes: K, from the data.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        self.conv = conv3x3(3, WIDTHS[0])
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[nn.Module] = []
        channels = WIDTHS[0]
        for width in WIDTHS:
            for index in range(architecture.blocks_per_stage):
                # The first block of the second and third stage halves the map.
                stride = 2 if index == 0 and width != WIDTHS[0] else 1
                blocks.append(Block(channels, width, stride, architecture.shortcut))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to logits (B, K)."""
        x = F.relu(self.bn(self.conv(images)), inplace=True)  # (B, 16, 32, 32)
        x = self.blocks(x)  # (B, 64, 8, 8)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build_model(name: str, *, num_classes: int, seed: int) -> CifarNet:
    """Return the named net with initial weights that depend on the seed alone.

    Convolutions are drawn from a normal distribution with deviation sqrt(2 / fan_out) (He et al.
    2015a, "Delving deep into rectifiers"), all else is PyTorch's default: the linear layer uniform
    in +-1/sqrt(fan_in), BatchNorm 1 and 0. The global generators are neither read nor moved.

    Args:
        name: a key of `ARCHITECTURES`.
        num_classes: K.
        seed: of this run.
    """
    with torch.device("meta"):  # no draws from the global generator
        model = CifarNet(ARCHITECTURES[name], num_classes)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    return model


def num_parameters(model: nn.Module) -> int:
    """Return how many numbers the optimizer changes."""
    return sum(parameter.numel() for parameter in model.parameters())
