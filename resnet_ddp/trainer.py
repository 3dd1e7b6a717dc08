"""One run from start to result: build everything, then the loop.

Between two iterations at which something is due nothing comes back from the device. Every process
runs the same loop; only the main one has files and a display, the others have stand-ins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from resnet_ddp import cadence, checkpoint, durable, machine, processes
from resnet_ddp.cadence import Cadence, is_due
from resnet_ddp.checkpoint import Progress
from resnet_ddp.datasets import Dataset
from resnet_ddp.exits import Exit, ExitCode, NotFiniteError, UserError
from resnet_ddp.experiment import Experiment, build_experiment
from resnet_ddp.models import num_parameters
from resnet_ddp.options import TrainOptions
from resnet_ddp.runs import RunDirectory, Settings
from resnet_ddp.stop import StopRequest
from resnet_ddp.tracking import (
    Display,
    JsonLines,
    NoDisplay,
    NoLines,
    Throughput,
    make_display,
)

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
        TemporaryError: no space, another process is training this run, or one of its was lost.
    """
    processes.end_with_launcher()
    recipe = directory.cell.recipe
    device = machine.pick_device(options.device)
    state = processes.join(device)
    with processes.losses_named(state):
        settings = processes.on_main(state, lambda: settle(options, directory, device))
        data = processes.in_all(state, load_data)
        processes.agree(
            state,
            {**directory.cell.identity(), **dataclasses.asdict(settings), "data": data.sha256},
        )
        processes.on_main(state, directory.acquire)
        try:
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
            if state.is_main_process and directory.config() is None:
                directory.write_config(
                    settings,
                    world_size=state.num_processes,
                    environment=machine.describe(device),
                )
            due = Cadence(
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                save_every=options.save_every or cadence.default_save_every(device),
                look_every=cadence.default_look_every(device),
                total=recipe.iterations,
                last=min(recipe.iterations, options.stop_after or recipe.iterations),
            )
            code = live(Run(directory, experiment), due)
        finally:
            directory.release()
        processes.leave_together(state)
    return code


def settle(options: TrainOptions, directory: RunDirectory, device: str) -> Settings:
    """Return the settings of this run: recorded, asked for, or what suits this machine."""
    iterations = directory.cell.recipe.iterations
    requested = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    default = Settings(
        precision=machine.pick_precision(device),
        compile=machine.pick_compile(device),
        threads=machine.pick_threads(),
        log_every=cadence.default_log_every(iterations),
        eval_every=cadence.default_eval_every(iterations),
    )
    settings = directory.settle(requested, default)
    if settings.compile and (missing := machine.missing_for_compile(device)):
        raise UserError(f"compiling needs {missing}, which this machine lacks; use --no-compile")
    return settings


@dataclass(frozen=True)
class Run:
    """An experiment and the directory that its records go to."""

    directory: RunDirectory
    experiment: Experiment

    @property
    def state(self) -> PartialState:
        """The processes that share this run."""
        return PartialState()  # Accelerate keeps one

    def look(self, stop: StopRequest) -> tuple[float, bool]:
        """Return the last step's loss over the global batch, and whether to stop; all agree.

        Raises:
            NotFiniteError: a loss so far was not finite; nothing may be logged or saved.
        """
        stepper = self.experiment.stepper
        numbers = torch.stack(
            [
                stepper.loss,
                torch.full_like(stepper.loss, stop.reason is not None),
                (stepper.bad_iteration >= 0).to(stepper.loss.dtype),
            ]
        )
        # Device synchronisation.
        loss, stops, is_bad = processes.total(self.state, numbers).tolist()
        processes.expect_promptness(self.state)  # compiled, if it was to be
        if is_bad:
            bad_iteration = int(processes.largest(self.state, stepper.bad_iteration))
            samples = stepper.batches.order[bad_iteration].tolist()
            raise NotFiniteError(
                f"{self.directory.path}: the loss of iteration {bad_iteration} is not finite; "
                f"nothing after it was saved. The numbers of its images: {samples}"
            )
        return loss, stops > 0

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; the losses so far were looked at."""
        experiment = self.experiment
        processes.on_main(
            self.state,
            lambda: checkpoint.save(
                self.directory.checkpoints_path, experiment.model, experiment.optimizer, progress
            ),
        )

    def resume(self) -> Progress:
        """Load the newest checkpoint, the same in all processes."""
        stored = processes.on_main(
            self.state,
            lambda: checkpoint.read_newest(
                self.directory.checkpoints_path, metrics_path=self.directory.metrics_path
            ),
        )
        if stored is None:
            return Progress(iteration=0, metrics_bytes=0)
        checkpoint.restore(self.experiment.model, self.experiment.optimizer, stored)
        return stored.progress


def live(run: Run, due: Cadence) -> ExitCode:
    """Go on from the newest checkpoint until the run is done or asked to stop; record the end."""
    directory, is_main = run.directory, run.state.is_main_process
    progress = run.resume()
    metrics = (
        JsonLines(directory.metrics_path, length=progress.metrics_bytes) if is_main else NoLines()
    )
    timing = JsonLines(directory.timing_path) if is_main else NoLines()
    name = f"{directory.cell.model} seed {directory.cell.seed}"
    display: Display = NoDisplay()
    if is_main:
        display = make_display(name, start=progress.iteration, total=due.total)
    stop = StopRequest()
    iteration: int | None = None
    try:
        timing.write(
            event="start", iteration=progress.iteration, world_size=run.state.num_processes
        )
        if progress.iteration:
            display.note(f"{directory.path}: going on from iteration {progress.iteration:,}")
        with stop.listening():
            iteration = loop(run, progress.iteration, due, metrics, timing, display, stop)
        if iteration == due.total:
            finish(run, metrics)
            code, reason = ExitCode.DONE, "done"
        else:
            asked = iteration < due.last
            code = ExitCode.STOPPED
            reason = (stop.reason or "another process") if asked else "--stop-after"
            display.note(
                f"stopped by {reason}, saved at iteration {iteration:,} in {directory.path}; "
                "the same command goes on"
            )
        if is_main:
            directory.write_status(code, reason=reason, iteration=iteration)
        return code
    except BaseException as error:
        if is_main:
            code = error.code if isinstance(error, Exit) else ExitCode.FAILED
            reason = f"{type(error).__name__}: {error}"
            directory.write_status(code, reason=reason, iteration=iteration)
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
    is_asked_to_stop = False
    while iteration < due.last and not is_asked_to_stop:
        with throughput.measured(due.next_due(iteration) - iteration):
            iteration = stepper.advance(iteration, until=due.next_due(iteration))
            loss, is_asked_to_stop = run.look(stop)
        if is_due(iteration, due.log_every, due.total):
            lr = recipe.lr_at(iteration - 1, depth=stepper.depth)
            images_per_second = throughput.read()
            metrics.write(iteration=iteration, **{"train/loss": loss, "lr": lr})
            timing.write(iteration=iteration, images_per_second=images_per_second)
            display.update(iteration, loss=loss, lr=lr, images_per_second=images_per_second)
        if is_due(iteration, due.eval_every, due.total):
            metrics.write(iteration=iteration, **curve_point(run.experiment))
        if is_due(iteration, due.save_every, due.last) or is_asked_to_stop:
            run.save(Progress(iteration, metrics_bytes=metrics.sync()))
    return iteration


def curve_point(experiment: Experiment) -> dict[str, Any]:
    """Return the errors that the curves of Fig. 6 are drawn from."""
    return {
        "train/error_rate": experiment.train_error_rate(num_images=CURVE_IMAGES),
        "val/error_rate": experiment.val_error_rate(),
    }


def finish(run: Run, metrics: JsonLines) -> None:
    """Measure the final errors, the test error for the only time, and write weights and result."""
    experiment, iterations = run.experiment, run.experiment.recipe.iterations
    test_error_rate = experiment.test_error_rate()
    errors = {
        "train_error_rate": experiment.train_error_rate(),
        "val_error_rate": experiment.val_error_rate(),
        "test_error_rate": test_error_rate,
    }
    metrics.write(iteration=iterations, **{"test/error_rate": test_error_rate})
    if run.state.is_main_process:
        metrics.sync()
        durable.write_bytes(run.directory.weights_path, checkpoint.weights(experiment.model))
        run.directory.write_result(
            iterations=iterations, **errors, num_parameters=num_parameters(experiment.model)
        )
