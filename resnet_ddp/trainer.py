"""One run from start to result: build everything, then the loop.

Between two iterations at which something is due nothing comes back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from resnet_ddp import cadence, checkpoint, durable, machine
from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.augment import Normalisation
from resnet_ddp.batches import Batches, split
from resnet_ddp.cadence import Cadence, is_due
from resnet_ddp.checkpoint import Progress
from resnet_ddp.datasets import Dataset
from resnet_ddp.evaluate import error_rate
from resnet_ddp.exits import Exit, ExitCode, NotFiniteError, UserError
from resnet_ddp.models import CifarNet, build_model, num_parameters
from resnet_ddp.options import TrainOptions
from resnet_ddp.recipe import Recipe
from resnet_ddp.runs import RunDirectory, Settings
from resnet_ddp.step import Stepper, make_optimizer
from resnet_ddp.stop import StopRequest
from resnet_ddp.tracking import Display, JsonLines, Throughput, make_display

CURVE_IMAGES = 5000  # training images behind a point of the training curve


def train(
    options: TrainOptions, directory: RunDirectory, load_data: Callable[[], Dataset]
) -> ExitCode:
    """Train one run to its end, or go on with it.

    Args:
        directory: where the run lies; its identity has been checked.
        load_data: returns the data, verified.

    Returns:
        DONE or STOPPED.

    Raises:
        UserError: bad options, data or run directory.
        NotFiniteError: the loss was not finite.
        TemporaryError: no space, or another process is training this run.
    """
    recipe = directory.cell.recipe
    device = machine.pick_device(options.device)
    settings = directory.settle(
        requested={
            "precision": options.precision,
            "compile": options.compile,
            "threads": options.threads,
            "log_every": options.log_every,
            "eval_every": options.eval_every,
        },
        default=Settings(
            precision=machine.pick_precision(device),
            compile=machine.pick_compile(device),
            threads=machine.pick_threads(),
            log_every=cadence.default_log_every(recipe.iterations),
            eval_every=cadence.default_eval_every(recipe.iterations),
        ),
    )
    data = load_data()
    directory.create()
    with directory.lock():
        run = build(directory, settings, data, device)
        due = Cadence(
            log_every=settings.log_every,
            eval_every=settings.eval_every,
            save_every=options.save_every or cadence.default_save_every(device),
            total=recipe.iterations,
            last=min(recipe.iterations, options.stop_after or recipe.iterations),
        )
        return live(run, due)


@dataclass
class Run:
    """One cell on its device, ready to train and to be evaluated.

    Shapes: N training images in the file, M test images.
    """

    directory: RunDirectory
    accelerator: Accelerator
    model: CifarNet  # unwrapped
    optimizer: torch.optim.SGD  # unwrapped
    stepper: Stepper
    train_images: Tensor  # (N, 32, 32, 3) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 32, 32, 3) uint8
    test_labels: Tensor  # (M,) int64
    samples: Tensor  # image numbers trained on
    val_samples: Tensor  # image numbers held out

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.directory.cell.recipe

    def train_error_rate(self, *, num_images: int | None = None) -> float:
        """Return the error on the first `num_images` images trained on, or all; un-augmented."""
        return self._error_rate(self.train_images, self.train_labels, self.samples[:num_images])

    def val_error_rate(self) -> float | None:
        """Return the error on the images held out, None if the recipe holds out none."""
        if not len(self.val_samples):
            return None
        return self._error_rate(self.train_images, self.train_labels, self.val_samples)

    def test_error_rate(self) -> float:
        """Return the error on the test images; called once, when training is over."""
        return self._error_rate(
            self.test_images, self.test_labels, torch.arange(len(self.test_labels))
        )

    def _error_rate(self, images: Tensor, labels: Tensor, samples: Tensor) -> float:
        return error_rate(
            self.model,
            images=images,
            labels=labels,
            samples=samples,
            normalise=self.stepper.batches.normalise,
            accelerator=self.accelerator,
        )

    def check_finite(self) -> None:
        """Raise if any loss so far was not finite; nothing is logged or saved after that."""
        bad_iteration = int(self.stepper.bad_iteration)  # device synchronisation
        if bad_iteration >= 0:
            samples = self.stepper.batches.samples_at(bad_iteration).tolist()
            raise NotFiniteError(
                f"{self.directory.path}: the loss of iteration {bad_iteration} is not finite; "
                f"nothing after it was saved. The numbers of its images: {samples}"
            )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        self.check_finite()
        checkpoint.save(self.directory.checkpoints_path, self.model, self.optimizer, progress)


def build(directory: RunDirectory, settings: Settings, data: Dataset, device: str) -> Run:
    """Put data and model on the device, prepare the step, settle config.json."""
    cell, recipe = directory.cell, directory.cell.recipe
    torch.set_num_threads(settings.threads)  # accelerate launch would leave us one
    machine.forbid_inexact_arithmetic()
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision="bf16" if settings.precision == "bf16" else "no"
    )
    if accelerator.num_processes > 1:
        raise UserError("one process trains one run for now: launch it with --num_processes 1")
    samples, val_samples = split(recipe, len(data.train_labels))
    if len(samples) < recipe.batch_size:
        raise UserError(
            f"{len(samples)} training images are less than a batch of {recipe.batch_size}; "
            "prepare more images"
        )
    model = build_model(cell.model, num_classes=data.num_classes, seed=cell.seed)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe)
    prepared_model, prepared_optimizer = accelerator.prepare(
        torch.compile(model) if settings.compile else model, optimizer
    )
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(array).to(accelerator.device)
        for array in (data.train_images, data.train_labels, data.test_images, data.test_labels)
    )
    batches = Batches(
        recipe,
        seed=cell.seed,
        images=train_images,
        labels=train_labels,
        samples=samples,
        normalise=normalisation(recipe, data, train_images),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    stepper = Stepper(
        prepared_model,
        prepared_optimizer,
        batches,
        accelerator,
        recipe,
        depth=ARCHITECTURES[cell.model].depth,
    )
    if directory.config() is None:
        directory.write_config(
            settings, world_size=accelerator.num_processes, environment=machine.describe(device)
        )
    return Run(
        directory=directory,
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
    )


def normalisation(recipe: Recipe, data: Dataset, train_images: Tensor) -> Normalisation:
    """Return what the recipe subtracts and divides by, measured on all training images."""
    if recipe.normalisation == "pixel-mean":
        return Normalisation.pixel_mean(train_images)
    return Normalisation.channel(data.channel_mean, data.channel_std, train_images.device)


def live(run: Run, due: Cadence) -> ExitCode:
    """Go on from the newest checkpoint until the run is done or asked to stop; record the end."""
    directory = run.directory
    resumed = checkpoint.load_newest(directory.checkpoints_path, run.model, run.optimizer)
    progress = resumed or Progress(iteration=0, metrics_bytes=0)
    metrics = JsonLines(directory.metrics_path, length=progress.metrics_bytes)
    timing = JsonLines(directory.timing_path)
    name = f"{directory.cell.model} seed {directory.cell.seed}"
    display = make_display(name, start=progress.iteration, total=due.total)
    if resumed:
        display.note(f"{directory.path}: going on from iteration {progress.iteration:,}")
    stop = StopRequest()
    try:
        with stop.listening():
            iteration = loop(run, progress.iteration, due, metrics, timing, display, stop)
        if iteration == due.total:
            finish(run, metrics)
            code, reason = ExitCode.DONE, "done"
        else:
            code, reason = ExitCode.STOPPED, stop.reason or "--stop-after"
            display.note(
                f"stopped by {reason}, saved at iteration {iteration:,} in {directory.path}; "
                "the same command goes on"
            )
        directory.write_status(code, reason=reason, iteration=iteration)
        return code
    except Exit as error:
        directory.write_status(error.code, reason=str(error), iteration=None)
        raise
    finally:
        display.close()
        metrics.close()
        timing.close()


def loop(
    run: Run,
    iteration: int,
    due: Cadence,
    metrics: JsonLines,
    timing: JsonLines,
    display: Display,
    stop: StopRequest,
) -> int:
    """Train until the end of this life, and return the iteration that it reached."""
    throughput = Throughput(run.recipe.batch_size)
    while iteration < due.last:
        with throughput.measured(due.next_due(iteration) - iteration):
            iteration = run.stepper.advance(iteration, until=due.next_due(iteration))
            loss = float(run.stepper.loss)  # device synchronisation
        if is_due(iteration, due.log_every, due.total):
            run.check_finite()
            lr = run.recipe.lr_at(iteration - 1, depth=run.stepper.depth)
            metrics.write(iteration=iteration, **{"train/loss": loss, "lr": lr})
            images_per_second = throughput.read()
            timing.write(iteration=iteration, images_per_second=images_per_second)
            display.update(iteration, loss=loss, lr=lr, images_per_second=images_per_second)
        if is_due(iteration, due.eval_every, due.total):
            metrics.write(iteration=iteration, **curve_point(run))
        if is_due(iteration, due.save_every, due.last) or stop.reason:
            run.save(Progress(iteration, metrics_bytes=metrics.sync()))
        if stop.reason:
            break
    return iteration


def curve_point(run: Run) -> dict[str, Any]:
    """Return the errors that the curves of Fig. 6 are drawn from."""
    return {
        "train/error_rate": run.train_error_rate(num_images=CURVE_IMAGES),
        "val/error_rate": run.val_error_rate(),
    }


def finish(run: Run, metrics: JsonLines) -> None:
    """Measure the final errors, the test error for the only time, and write weights and result."""
    run.check_finite()
    test_error_rate = run.test_error_rate()
    metrics.write(iteration=run.recipe.iterations, **{"test/error_rate": test_error_rate})
    metrics.sync()
    durable.write_bytes(run.directory.weights_path, checkpoint.weights(run.model))
    run.directory.write_result(
        iterations=run.recipe.iterations,
        train_error_rate=run.train_error_rate(),
        val_error_rate=run.val_error_rate(),
        test_error_rate=test_error_rate,
        num_parameters=num_parameters(run.model),
    )
