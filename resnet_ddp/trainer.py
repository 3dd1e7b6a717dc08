"""One run from start to result: build everything, then the loop.

Between two iterations at which something is due nothing comes back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resnet_ddp import cadence, checkpoint, durable, machine
from resnet_ddp.cadence import Cadence, is_due
from resnet_ddp.checkpoint import Progress
from resnet_ddp.datasets import Dataset
from resnet_ddp.exits import Exit, ExitCode, NotFiniteError
from resnet_ddp.experiment import Experiment, build_experiment
from resnet_ddp.models import num_parameters
from resnet_ddp.options import TrainOptions
from resnet_ddp.runs import RunDirectory, Settings
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
        experiment = build_experiment(
            recipe,
            model_name=directory.cell.model,
            seed=directory.cell.seed,
            data=data,
            device=device,
            precision=settings.precision,
            compile=settings.compile,
            threads=settings.threads,
        )
        if directory.config() is None:
            directory.write_config(
                settings,
                world_size=experiment.accelerator.num_processes,
                environment=machine.describe(device),
            )
        due = Cadence(
            log_every=settings.log_every,
            eval_every=settings.eval_every,
            save_every=options.save_every or cadence.default_save_every(device),
            total=recipe.iterations,
            last=min(recipe.iterations, options.stop_after or recipe.iterations),
        )
        return live(Run(directory, experiment), due)


@dataclass
class Run:
    """An experiment and the directory that its records go to."""

    directory: RunDirectory
    experiment: Experiment

    def check_finite(self) -> None:
        """Raise if any loss so far was not finite; nothing is logged or saved after that."""
        stepper = self.experiment.stepper
        bad_iteration = int(stepper.bad_iteration)  # device synchronisation
        if bad_iteration >= 0:
            samples = stepper.batches.samples_at(bad_iteration).tolist()
            raise NotFiniteError(
                f"{self.directory.path}: the loss of iteration {bad_iteration} is not finite; "
                f"nothing after it was saved. The numbers of its images: {samples}"
            )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        self.check_finite()
        checkpoint.save(
            self.directory.checkpoints_path,
            self.experiment.model,
            self.experiment.optimizer,
            progress,
        )


def live(run: Run, due: Cadence) -> ExitCode:
    """Go on from the newest checkpoint until the run is done or asked to stop; record the end."""
    directory, experiment = run.directory, run.experiment
    resumed = checkpoint.load_newest(
        directory.checkpoints_path, experiment.model, experiment.optimizer
    )
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
    recipe, stepper = run.experiment.recipe, run.experiment.stepper
    throughput = Throughput(recipe.batch_size)
    while iteration < due.last:
        with throughput.measured(due.next_due(iteration) - iteration):
            iteration = stepper.advance(iteration, until=due.next_due(iteration))
            loss = float(stepper.loss)  # device synchronisation
        if is_due(iteration, due.log_every, due.total):
            run.check_finite()
            lr = recipe.lr_at(iteration - 1, depth=stepper.depth)
            metrics.write(iteration=iteration, **{"train/loss": loss, "lr": lr})
            images_per_second = throughput.read()
            timing.write(iteration=iteration, images_per_second=images_per_second)
            display.update(iteration, loss=loss, lr=lr, images_per_second=images_per_second)
        if is_due(iteration, due.eval_every, due.total):
            metrics.write(iteration=iteration, **curve_point(run.experiment))
        if is_due(iteration, due.save_every, due.last) or stop.reason:
            run.save(Progress(iteration, metrics_bytes=metrics.sync()))
        if stop.reason:
            break
    return iteration


def curve_point(experiment: Experiment) -> dict[str, Any]:
    """Return the errors that the curves of Fig. 6 are drawn from."""
    return {
        "train/error_rate": experiment.train_error_rate(num_images=CURVE_IMAGES),
        "val/error_rate": experiment.val_error_rate(),
    }


def finish(run: Run, metrics: JsonLines) -> None:
    """Measure the final errors, the test error for the only time, and write weights and result."""
    run.check_finite()
    experiment, iterations = run.experiment, run.experiment.recipe.iterations
    test_error_rate = experiment.test_error_rate()
    metrics.write(iteration=iterations, **{"test/error_rate": test_error_rate})
    metrics.sync()
    durable.write_bytes(run.directory.weights_path, checkpoint.weights(experiment.model))
    run.directory.write_result(
        iterations=iterations,
        train_error_rate=experiment.train_error_rate(),
        val_error_rate=experiment.val_error_rate(),
        test_error_rate=test_error_rate,
        num_parameters=num_parameters(experiment.model),
    )
