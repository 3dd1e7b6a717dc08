"""One run's data, model, optimizer and step on their device; no records, no files.

The trainer adds a directory and a loop; the bench times the same pieces.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from resnet_ddp import batchnorm, fused, machine, processes
from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.augment import Images, Normalisation
from resnet_ddp.batches import (
    Batches,
    ImagesInFile,
    as_on_device,
    curve_samples,
    share,
    split,
)
from resnet_ddp.batchnorm import Groups
from resnet_ddp.compilation import Network, compile_checked
from resnet_ddp.datasets import Dataset
from resnet_ddp.evaluate import Pause, error_rate, never
from resnet_ddp.exits import UserError
from resnet_ddp.models import CifarNet, build_model
from resnet_ddp.recipe import Recipe
from resnet_ddp.step import CapturedStepper, CudaGraphs, Stepper, make_optimizer

CURVE_IMAGES = 5000  # training images behind a point of the training curve


@dataclass
class Experiment:
    """Ready to train and to be evaluated.

    Shapes: N training images in the file, M test images.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: CifarNet  # unwrapped
    optimizer: torch.optim.SGD  # unwrapped
    stepper: Stepper
    train_images: Images  # (N, 32, 32, 3) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Images  # (M, 32, 32, 3) uint8
    test_labels: Tensor  # (M,) int64
    samples: Tensor  # image numbers trained on
    val_samples: Tensor  # image numbers held out
    kernels: str  # "torch", or the name of our own

    def train_error_rate(self, pause: Pause = never) -> float:
        """Return the error on all images trained on, un-augmented."""
        return self._error_rate(self.train_images, self.train_labels, self.samples, pause)

    def curve_error_rate(self) -> float:
        """Return the error on the 5,000 of them that stand for all while training goes on."""
        samples = curve_samples(self.samples, num_images=CURVE_IMAGES)
        return self._error_rate(self.train_images, self.train_labels, samples)

    def val_error_rate(self, pause: Pause = never) -> float | None:
        """Return the error on the images held out, None if the recipe holds out none."""
        if not len(self.val_samples):
            return None
        return self._error_rate(self.train_images, self.train_labels, self.val_samples, pause)

    def test_error_rate(self, pause: Pause = never) -> float:
        """Return the error on the test images; called once, when training is over."""
        return self._error_rate(
            self.test_images, self.test_labels, torch.arange(len(self.test_labels)), pause
        )

    def close(self) -> None:
        """End the threads that load data, if there are any."""
        self.stepper.batches.close()

    def _error_rate(
        self, images: Images, labels: Tensor, samples: Tensor, pause: Pause = never
    ) -> float:
        return error_rate(
            self.model,
            images=images,
            labels=labels,
            samples=samples,
            normalise=self.stepper.batches.normalise,
            accelerator=self.accelerator,
            pause=pause,
        )


def build_experiment(
    recipe: Recipe,
    *,
    model_name: str,
    seed: int,
    data: Dataset,
    device: str,
    precision: str,
    compile: bool,
    threads: int,
    capture: bool = False,
    fuse: bool = True,
) -> Experiment:
    """Put data and model on the device and prepare the step.

    Images that were left in their file come through FFCV's Loader.

    Args:
        model_name: a key of `ARCHITECTURES`.
        device: "cuda", "mps" or "cpu".
        precision: "bf16" (autocast; weights, momentum, BatchNorm statistics in fp32), "fp32", or
            "fp64" to compare with.
        threads: of the CPU, for this process.
        capture: replay the step from CUDA graphs; of one process on CUDA only.
        fuse: on a CPU, train through our kernels where they can be had, unless it is compiled.

    Raises:
        UserError: the data is less than a batch, or the processes did not find each other.
    """
    torch.set_num_threads(threads)  # accelerate launch would leave us one
    machine.forbid_inexact_arithmetic()
    processes.join(device)
    accelerator = processes.make_accelerator(device, precision)
    samples, val_samples = split(recipe, len(data.train_labels))
    if len(samples) < recipe.batch_size:
        raise UserError(
            f"{len(samples)} training images are less than a batch of {recipe.batch_size}; "
            "prepare more images"
        )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = share(recipe.batch_size, rank=rank, world_size=world_size)
    model = build_model(model_name, num_classes=data.num_classes, seed=seed)
    batchnorm.convert(
        model,
        Groups(
            batch_size=recipe.batch_size,
            group_size=recipe.batchnorm_group,
            share=mine,
            is_distributed=world_size > 1,
        ),
    )
    dtype = torch.float64 if precision == "fp64" else torch.float32
    may_fuse = fuse and device == "cpu" and dtype == torch.float32 and not compile
    kernels = fused.load() if may_fuse else None
    has_kernels = processes.shared(accelerator.state, kernels is not None)
    if not all(has_kernels):
        kernels = None  # where one process has none, none uses them: all compute the same bits
    layout = fitting_layout(device, precision, is_fused=kernels is not None)
    model.to(accelerator.device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe)
    network: Network = model if kernels is None else fused.fuse(model, kernels)
    if compile:
        compiled, trouble = compile_checked(
            model,
            num_images=mine.stop - mine.start,
            num_classes=data.num_classes,
            precision=precision,
            layout=layout,
        )
        # Where one process may not, none does: they would not be the same experiment.
        if any(processes.shared(accelerator.state, trouble)):
            print(f"warning: training without compilation: {trouble}", file=sys.stderr)
        else:
            network = compiled
    prepared_model, prepared_optimizer = processes.prepare(accelerator, network, optimizer)
    train_labels, test_labels = (
        torch.from_numpy(labels).to(accelerator.device)
        for labels in (data.train_labels, data.test_labels)
    )
    train_images, test_images = (
        as_on_device(images, accelerator.device) for images in (data.train_images, data.test_images)
    )
    make_batches = Batches
    if isinstance(train_images, ImagesInFile):
        from resnet_ddp.loader import LoadedBatches  # ffcv, whose import takes seconds

        make_batches = LoadedBatches
    batches = make_batches(
        recipe,
        seed=seed,
        images=train_images,
        labels=train_labels,
        samples=samples,
        normalise=normalisation(recipe, data, train_images),
        rank=rank,
        world_size=world_size,
        dtype=dtype,
        layout=layout,
        kernels=kernels,
    )
    parts = (prepared_model, prepared_optimizer, batches, accelerator, recipe)
    depth = ARCHITECTURES[model_name].depth
    stepper = (
        CapturedStepper(*parts, depth=depth, recorder=CudaGraphs())
        if capture
        else Stepper(*parts, depth=depth)
    )
    return Experiment(
        recipe=recipe,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        samples=samples,
        val_samples=val_samples,
        kernels="torch" if kernels is None else kernels.name,
    )


def fitting_layout(device: str, precision: str, *, is_fused: bool) -> torch.memory_format:
    """Return channels-last, which is faster, unless it would cost the oracle its digits.

    On a CPU torch's BatchNorm adds up channels-last maps one number after the other: in fp32 the
    gradient of the first convolution comes out 1.7% from that of float64, 0.1% when contiguous. In
    bf16 that is far below the rounding of the maps themselves. Our kernels lose nothing.
    """
    if not is_fused and device == "cpu" and precision == "fp32":
        return torch.contiguous_format
    return torch.channels_last


def normalisation(recipe: Recipe, data: Dataset, train_images: Images) -> Normalisation:
    """Return what the recipe subtracts and divides by, measured on all training images."""
    if recipe.normalisation == "pixel-mean":
        return Normalisation.pixel_mean(train_images)
    return Normalisation.channel(data.channel_mean, data.channel_std, train_images.device)
