"""Which images an iteration sees: a pure function of (recipe, seed, iteration), shared out by rank.

The training set is gone through in passes, each in an order of its own (a permutation keyed by seed
and pass), laid end to end: every batch is exactly `batch_size` images, and one that begins in a
pass may end in the next. Within a pass each image comes exactly once.

Shapes: N images in the training file, n of them trained on, B images in a global batch, b this
rank's share of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_ddp import beton
from resnet_ddp.augment import Images, Normalisation, as_network_input, crop_and_flip, draw
from resnet_ddp.beton import MappedImages
from resnet_ddp.counter_rng import Stream, philox4x32
from resnet_ddp.kernels import Kernels
from resnet_ddp.recipe import Recipe

PERMUTED_AT_ONCE = 1 << 20  # numbers; bounds the memory that the orders take to compute


def permutations(size: int, *, seed: int, stream: Stream, passes: Tensor) -> Tensor:
    """Return a permutation of 0..size-1 for each pass, (P, size) int64, keyed by (seed, pass).

    It is the order of `size` keyed 63-bit numbers.

    Args:
        passes: (P,) int64; the result lies on the same device.
    """
    numbers = torch.arange(size, device=passes.device).expand(len(passes), size)
    zero = torch.zeros_like(numbers)
    high, low, _, _ = philox4x32((zero + passes[:, None], numbers, zero, zero), (seed, stream))
    # Ties (odds about 1e-10 a pass) go by number, so the order is defined on every device.
    return torch.argsort((high << 31) | (low >> 1), dim=1, stable=True)


def split(recipe: Recipe, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the image numbers trained on and those held out, each ascending (int64).

    The split belongs to the recipe and not to the seed: every seed of a grid is validated on the
    same images.
    """
    order = permutations(num_images, seed=0, stream=Stream.SPLIT, passes=torch.tensor([0]))[0]
    num_val = recipe.num_val(num_images)
    return order[num_val:].sort().values, order[:num_val].sort().values


def curve_samples(samples: Tensor, *, num_images: int) -> Tensor:
    """Return the images behind a point of the training curve, ascending (int64).

    Drawn from those trained on, the same for every seed: a file may well be sorted by class.
    """
    order = permutations(len(samples), seed=0, stream=Stream.CURVE, passes=torch.tensor([0]))[0]
    return samples[order[:num_images]].sort().values


def sample_order(
    recipe: Recipe, *, seed: int, samples: Tensor, device: torch.device | str
) -> Tensor:
    """Return the image numbers of all batches, (iterations, B) int32.

    Args:
        samples: (n,) the image numbers trained on.
    """
    total = recipe.iterations * recipe.batch_size
    samples = samples.to(device=device, dtype=torch.int32)
    passes = torch.arange(-(-total // len(samples)), device=device)
    at_once = max(1, PERMUTED_AT_ONCE // len(samples))
    orders = [
        samples[permutations(len(samples), seed=seed, stream=Stream.ORDER, passes=some)].flatten()
        for some in torch.split(passes, at_once)
    ]
    return torch.cat(orders)[:total].view(recipe.iterations, recipe.batch_size)


def share(batch_size: int, *, rank: int, world_size: int) -> slice:
    """Return which places of the global batch are this rank's; shares differ by one at the most."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class ImagesInFile:
    """Images that stay in their file, had on the device when asked for; see `Images`."""

    def __init__(self, images: MappedImages, device: torch.device) -> None:
        self.images = images
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice, /) -> Tensor:
        return torch.from_numpy(self.images[which]).to(self.device)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return the images of these numbers (n,), (n, H, W, 3)."""
        assert dim == 0
        return torch.from_numpy(self.images[index.cpu().numpy()]).to(self.device)


def as_on_device(images: beton.Images, device: torch.device) -> Images:
    """Put images on the device, or leave them in their file if that is where they are."""
    if isinstance(images, MappedImages):
        return ImagesInFile(images, device)
    return torch.from_numpy(images).to(device)


class Batches:
    """`batches(iteration)` -> this rank's images and labels, made on the device.

    Args:
        images: (N, 32, 32, 3) uint8, the whole training file.
        labels: (N,) int64, on the device.
        samples: (n,) int64, the image numbers to train on.
        normalise: of the recipe and this data.
        dtype, layout: of the images that come out; normalised in float32, rows of pixels,
            whatever they are.
        kernels: to augment with on a CPU; the bits are the same without.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        seed: int,
        images: Images,
        labels: Tensor,
        samples: Tensor,
        normalise: Normalisation,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
        kernels: Kernels | None = None,
    ) -> None:
        self.kernels = kernels
        self.dtype = dtype
        self.layout = layout
        self.recipe = recipe
        self.seed = seed
        self.images = images
        self.labels = labels
        self.normalise = normalise
        self.samples_per_pass = len(samples)
        # 33 MB for 64,000 iterations; with it, picking a batch is one look-up on the device.
        self.order = sample_order(recipe, seed=seed, samples=samples, device=labels.device)
        self.share = share(recipe.batch_size, rank=rank, world_size=world_size)
        self.places = torch.arange(recipe.batch_size, device=labels.device)[self.share]

    def seek(self, iteration: int) -> None:
        """Hear which iteration comes next, when it is not the one after the last."""

    def close(self) -> None:
        """Give back what a thread or a file took."""

    def load(self, samples: Tensor) -> tuple[Images, Tensor, Tensor]:
        """Return images, which of them are those of these numbers (b,), and their labels (b,)."""
        return self.images, samples, self.labels[samples]

    def samples_at(self, iteration: int | Tensor) -> Tensor:
        """Return this rank's image numbers of one iteration, (b,) int64."""
        return self.order.index_select(0, self._on_device(iteration))[0, self.share].long()

    def __call__(self, iteration: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return images (b, 3, 32, 32) and labels (b,) int64.

        Args:
            iteration: (1,) int64 on the device, for a step that must not wait for the host.
        """
        iteration = self._on_device(iteration)
        samples = self.samples_at(iteration)
        passes = (iteration * self.recipe.batch_size + self.places) // self.samples_per_pass
        draws = draw(self.recipe, seed=self.seed, passes=passes, samples=samples)
        images, which, labels = self.load(samples)
        padding = self.recipe.padding
        if self.kernels is not None and isinstance(images, Tensor):
            crops = self.kernels.augment(images, which, draws, self.normalise, padding)
        else:
            pixels = images.index_select(0, which)
            crops = crop_and_flip(self.normalise(pixels), draws, padding)
        crops = as_network_input(crops).to(self.dtype, memory_format=self.layout)
        return crops, labels

    def _on_device(self, iteration: int | Tensor) -> Tensor:
        if isinstance(iteration, Tensor):
            return iteration
        return torch.tensor([iteration], device=self.order.device)
