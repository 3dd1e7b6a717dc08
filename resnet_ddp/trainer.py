"""One run from start to result: build everything, then the loop.

Between two iterations at which something is due nothing comes back from the device. Every process
runs the same loop; only the main one has files and a display, the others have stand-ins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from resnet_ddp import __version__, cadence, checkpoint, machine, processes
from resnet_ddp.cadence import Cadence, is_due
from resnet_ddp.checkpoint import Checkpoints, Progress
from resnet_ddp.datasets import Dataset
from resnet_ddp.display import Display, NoDisplay, make_display
from resnet_ddp.durable import disk_errors_named
from resnet_ddp.exits import Exit, ExitCode, NotFiniteError, TemporaryError
from resnet_ddp.experiment import Experiment, build_experiment
from resnet_ddp.launcher import is_main_process
from resnet_ddp.logs import JsonLines, NoLines, Throughput
from resnet_ddp.models import num_parameters
from resnet_ddp.options import TrainOptions
from resnet_ddp.runs import IDENTITY, RunDirectory, Settings
from resnet_ddp.stop import Deadline, StopRequest, slurm_deadline
from resnet_ddp.tracking.mirror import Mirrors
from resnet_ddp.tracking.plan import Plan


def train(
    options: TrainOptions,
    directory: RunDirectory,
    load_data: Callable[[], Dataset],
    plans: Sequence[Plan] = (),
) -> ExitCode:
    """Train one run to its end, or go on with it.

    Args:
        directory: where the run lies; its identity has been checked.
        load_data: returns the data, verified.
        plans: what it is tracked with.

    Returns:
        DONE or STOPPED.

    Raises:
        UserError: bad options, data or run directory.
        NotFiniteError: the loss was not finite.
        TemporaryError: no space, another process is training this run, or one of its was lost.
    """
    stop = stop_request(options, directory)
    device = machine.pick_device(options.device)
    state = processes.join(device)
    with processes.losses_named(state):
        data = processes.in_all(state, load_data)
        default = processes.in_all(state, lambda: fitting_settings(options, directory, device))
        settings = processes.on_main(
            state, lambda: take(options, directory, default, state.num_processes)
        )
        try:
            code = ExitCode.DONE  # another launch was quicker
            if settings is not None:
                with disk_errors_named(), processes.losses_named(state):
                    code = train_alone(options, directory, data, device, settings, stop, plans)
        except BaseException as error:
            if state.is_main_process:
                record_failure(directory, error)
            raise
        finally:
            directory.release()
        processes.leave_together(state)
    return code


def take(
    options: TrainOptions, directory: RunDirectory, default: Settings, world_size: int
) -> Settings | None:
    """Lock the directory and settle what to run with; None if the run is done.

    All that was found there before is looked at again: now nobody else changes it.
    """
    try:
        directory.acquire()
        directory.check_identity()
        if directory.result() is not None:
            return None
        asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
        return directory.settle(asked, default, world_size=world_size)
    except BaseException:
        directory.release()
        raise


def train_alone(
    options: TrainOptions,
    directory: RunDirectory,
    data: Dataset,
    device: str,
    settings: Settings,
    stop: StopRequest,
    plans: Sequence[Plan],
) -> ExitCode:
    """Train the run that lies in a directory which is ours alone."""
    state, recipe = PartialState(), directory.cell.recipe
    due = Cadence(
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        save_every=options.save_every or cadence.default_save_every(device),
        look_every=cadence.default_look_every(device),
        total=recipe.iterations,
        last=min(recipe.iterations, options.stop_after or recipe.iterations),
    )
    processes.agree(
        state,
        {
            **directory.cell.identity(),
            **dataclasses.asdict(settings),
            **dataclasses.asdict(due),
            "device": device,
            "version": __version__,
        },
    )
    experiment = build_experiment(
        recipe,
        model_name=directory.cell.model,
        seed=directory.cell.seed,
        data=data,
        device=device,
        precision=settings.precision,
        compile=settings.compile,
        threads=settings.threads,
        capture=machine.settle_capture(device, options.capture, data_path=options.data_path),
    )
    environment = machine.describe(device) | {"kernels": experiment.kernels}
    processes.on_main(
        state,
        lambda: directory.settle_config(
            settings, world_size=state.num_processes, environment=environment
        ),
    )
    run = Run(directory, experiment, quiet=options.quiet, plans=plans)
    with contextlib.closing(experiment):
        # Not in config.json: a run may change it, and keeps its bits.
        return live(run, due, environment | {"data_path": options.data_path}, stop)


def stop_request(options: TrainOptions, directory: RunDirectory) -> StopRequest:
    """Return what this process listens to; a file and deadlines only the main one, for all."""
    if not is_main_process():
        return StopRequest()
    deadlines = [slurm_deadline()]
    if options.max_minutes is not None:
        deadlines.append(Deadline("--max-minutes", 60 * options.max_minutes))
    return StopRequest(directory.stop_path, *(one for one in deadlines if one is not None))


def record_failure(directory: RunDirectory, error: BaseException) -> None:
    """Say in status.json how this life ended, as far as the disk and the lease let us."""
    code = error.code if isinstance(error, Exit) else ExitCode.FAILED
    with contextlib.suppress(OSError, TemporaryError):
        directory.write_status(code, reason=str(error) or type(error).__name__, iteration=None)


def fitting_settings(options: TrainOptions, directory: RunDirectory, device: str) -> Settings:
    """Return what a first start takes where the options leave it open."""
    iterations = directory.cell.recipe.iterations
    return Settings(
        precision=machine.pick_precision(device),
        compile=machine.settle_compile(device, options.compile),
        threads=machine.pick_threads(),
        log_every=cadence.default_log_every(iterations),
        eval_every=cadence.default_eval_every(iterations),
    )


@dataclass(frozen=True)
class Run:
    """An experiment, the directory that its records go to, and who is told of it.

    Attributes:
        quiet: no progress is shown.
        plans: what it is tracked with.
    """

    directory: RunDirectory
    experiment: Experiment
    quiet: bool = False
    plans: Sequence[Plan] = ()

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
            never = torch.full_like(stepper.bad_iteration, self.experiment.recipe.iterations)
            first = torch.where(stepper.bad_iteration < 0, never, stepper.bad_iteration)
            bad_iteration = int(processes.smallest(self.state, first))
            samples = stepper.batches.order[bad_iteration].tolist()
            raise NotFiniteError(
                f"{self.directory.path}: the loss of iteration {bad_iteration} is not finite; "
                f"nothing after it was saved. The numbers of its images: {samples}"
            )
        return loss, stops > 0

    def save(self, iteration: int, metrics: JsonLines, timing: JsonLines) -> None:
        """Write a checkpoint; the losses so far were looked at."""
        began = time.perf_counter()
        model, optimizer = self.experiment.model, self.experiment.optimizer
        progress = Progress(iteration, *metrics.sync())
        processes.on_main(self.state, lambda: self.checkpoints().save(model, optimizer, progress))
        timing.write(event="saved", iteration=iteration, seconds=time.perf_counter() - began)

    def resume(self) -> Progress:
        """Load the newest checkpoint, the same in all processes."""
        stored = processes.on_main(self.state, lambda: self.checkpoints().newest())
        if stored is None:
            return Progress()
        checkpoint.restore(self.experiment.model, self.experiment.optimizer, stored)
        return stored.progress

    def checkpoints(self) -> Checkpoints:
        """Return this run's checkpoints; for the main process."""
        directory = self.directory
        identity = directory.cell.identity()
        return Checkpoints(
            directory.checkpoints_path,
            metrics_path=directory.metrics_path,
            owner={key: identity[key] for key in IDENTITY},
            check_lease=directory.lease.check,
            warn=lambda line: print(line, file=sys.stderr, flush=True),
        )


def live(run: Run, due: Cadence, environment: dict[str, Any], stop: StopRequest) -> ExitCode:
    """Go on from the newest checkpoint until the run is done or asked to stop; record the end."""
    with contextlib.ExitStack() as leaving:
        leaving.enter_context(stop.listening())
        progress = run.resume()
        metrics, timing, display = records(run, progress, due)
        plans = run.plans if run.state.is_main_process else ()
        mirrors = Mirrors(run.directory.path, plans, display.note)
        for thing in (metrics, timing, display, mirrors):
            leaving.callback(thing.close)
        start = progress.iteration
        record_start(run, start, environment, timing, display)
        iteration = loop(run, start, due, metrics, timing, display, stop)
        if iteration == due.total and finish(run, metrics, stop):
            run.directory.release()  # done: nobody else needs to wait for a tracker
            mirrors.finish()
            return ExitCode.DONE
        asked = iteration < due.last or iteration == due.total
        reason = (stop.reason or "another process") if asked else "--stop-after"
        display.note(
            f"stopped by {reason}, saved at iteration {iteration:,} in {run.directory.path}; "
            "the same command goes on"
        )
        if run.state.is_main_process:
            run.directory.write_status(ExitCode.STOPPED, reason=reason, iteration=iteration)
        return ExitCode.STOPPED


def records(run: Run, progress: Progress, due: Cadence) -> tuple[JsonLines, JsonLines, Display]:
    """Return metrics.jsonl, cut back to the checkpoint, timing.jsonl, and the display."""
    if not run.state.is_main_process:
        return NoLines(), NoLines(), NoDisplay()
    directory, check_lease = run.directory, run.directory.lease.check
    name = f"{directory.cell.model} seed {directory.cell.seed}"
    return (
        JsonLines(directory.metrics_path, length=progress.metrics_bytes, check_lease=check_lease),
        JsonLines(directory.timing_path, check_lease=check_lease),
        make_display(name, start=progress.iteration, total=due.total, quiet=run.quiet),
    )


def record_start(
    run: Run, start: int, environment: dict[str, Any], timing: JsonLines, display: Display
) -> None:
    """Say where this life begins, and on what."""
    directory, world_size = run.directory, run.state.num_processes
    timing.write(event="start", iteration=start, world_size=world_size, **environment)
    if not run.state.is_main_process:
        return
    # What stands there if this life ends without a word.
    directory.write_status(None, reason="running", iteration=start)
    if start:
        display.note(f"{directory.path}: going on from iteration {start:,}")
        if changes := directory.changes(world_size=world_size, environment=environment):
            display.note(f"the same experiment, but not its bits: {changes}")


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
            lr = stepper.learning_rate
            images_per_second = throughput.read()
            metrics.write(iteration=iteration, **{"train/loss": loss, "lr": lr})
            timing.write(iteration=iteration, images_per_second=images_per_second)
            display.update(iteration, loss=loss, lr=lr, images_per_second=images_per_second)
        if is_due(iteration, due.eval_every, due.total):
            metrics.write(iteration=iteration, **curve_point(run.experiment))
        if is_due(iteration, due.save_every, due.last) or is_asked_to_stop:
            run.save(iteration, metrics, timing)
    return iteration


def curve_point(experiment: Experiment) -> dict[str, Any]:
    """Return the errors that the curves of Fig. 6 are drawn from."""
    return {
        "train/error_rate": experiment.curve_error_rate(),
        "val/error_rate": experiment.val_error_rate(),
    }


class AskedToStop(Exception):
    """In the middle of the last evaluation, all of which the next life does again."""


def finish(run: Run, metrics: JsonLines, stop: StopRequest) -> bool:
    """Measure the final errors, the test error for the only time, and write weights and result.

    Returns:
        Whether it was done; not if something asked to stop.
    """
    experiment, iterations = run.experiment, run.experiment.recipe.iterations

    def pause() -> None:
        is_asked = torch.full_like(experiment.stepper.loss, stop.reason is not None)
        if processes.total(run.state, is_asked) > 0:  # device synchronisation; all agree
            raise AskedToStop

    try:
        test_error_rate = experiment.test_error_rate(pause)
        errors = {
            "train_error_rate": experiment.train_error_rate(pause),
            "val_error_rate": experiment.val_error_rate(pause),
            "test_error_rate": test_error_rate,
        }
    except AskedToStop:
        return False
    metrics.write(iteration=iterations, **{"test/error_rate": test_error_rate})
    if run.state.is_main_process:
        metrics.sync()
        run.directory.write_weights(checkpoint.weights(experiment.model))
        # The result comes last: nobody looks into the directory of a run that has one.
        run.directory.write_status(ExitCode.DONE, reason="done", iteration=iterations)
        run.directory.write_result(
            iterations=iterations, **errors, num_parameters=num_parameters(experiment.model)
        )
    return True
