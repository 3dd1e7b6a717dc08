"""Several processes as one run: joining, agreeing, and ending together.

Launchers say who a process is in its environment (RANK, WORLD_SIZE, ...). What they do not say is
whether the processes found each other, and some start several that each believe to be alone: that
is refused here. After that, only the main process touches files, and every decision that could
differ between processes is agreed on before it is acted on.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor

from resnet_ddp.durable import disk_errors_named
from resnet_ddp.exits import Exit, TemporaryError, UserError
from resnet_ddp.launcher import LAUNCH_VARIABLES
from resnet_ddp.recipe import HE2015

Value = TypeVar("Value")
Network = Callable[..., Any]  # a module, compiled and wrapped or not

TIMEOUT_VARIABLE = "RESNET_DDP_TIMEOUT"
FIRST_STEP_TIMEOUT = 1800.0  # seconds; compilation may take long
ROLL_CALL = 5.0  # seconds for the survivors of a lost process to report


def patience() -> float:
    """Return the seconds without a sign of another process after which it counts as lost."""
    text = os.environ.get(TIMEOUT_VARIABLE, "300")
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: it has to be a whole number of seconds")
    return float(text)


def join(device: str) -> PartialState:
    """Find the other processes of this launch.

    Raises:
        UserError: the environment is half a launch, or the processes do not know of each other.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    asked = _asked_of_accelerate() if announced == 1 else announced
    if asked > announced:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one, as it does with "
            "--cpu; use --config_file launch/cpu.yaml, or resnet-ddp train --processes"
        )
    is_half = "RANK" not in os.environ and ("MASTER_ADDR" in os.environ or announced > 1)
    if is_half or ("RANK" in os.environ and "LOCAL_RANK" not in os.environ):
        present = [name for name in LAUNCH_VARIABLES if name in os.environ]
        raise UserError(
            f"the environment is half a launch's ({', '.join(present)}, but not all of "
            f"{', '.join(LAUNCH_VARIABLES)}): unset them, or start with resnet-ddp train "
            "--processes, torchrun, or a configuration in launch/"
        )
    if announced > HE2015.batch_size:
        raise UserError(
            f"{announced} processes cannot share a batch of {HE2015.batch_size}: start fewer"
        )
    kwargs = (
        {"timeout": timedelta(seconds=max(patience(), FIRST_STEP_TIMEOUT))} if announced > 1 else {}
    )
    if announced > 1 and device == "mps":
        raise UserError("MPS holds one process: train with one, or with --device cpu")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", announced))
    if device == "cuda" and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes on a machine of {torch.cuda.device_count()} GPUs: start one a GPU, "
            "or use --device cpu"
        )
    # Accelerate would warn that it sets one; `build_experiment` sets what the run is to have.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    state = PartialState(cpu=device == "cpu", **kwargs)
    if state.num_processes != announced:
        raise UserError(
            f"{announced} processes were started, but this one found {state.num_processes}: they "
            "would train apart; use resnet-ddp train --processes or a configuration in launch/"
        )
    return state


def _asked_of_accelerate() -> int:
    """Return the --num_processes of the `accelerate launch` that started this process, else 1."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return 1  # not Linux: nobody to ask
    for word, following in pairwise([*words, ""]):
        flag, _, value = word.partition("=")
        if flag.replace("-", "_") == "__num_processes":
            value = value or following
            return int(value) if value.isdigit() else 1
    return 1


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Return Accelerate's front for the processes that `join` found.

    Args:
        precision: "bf16" autocasts; anything else leaves types alone.
    """
    AcceleratorState._reset_state()  # one process may build a second experiment, as the bench does
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        dynamo_backend="no",  # --compile alone decides
        # The running statistics are the same on all ranks: nothing to broadcast at each step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS would change the recipe's batch: unset it"
        )
    return accelerator


def prepare(
    accelerator: Accelerator, model: Network, optimizer: torch.optim.Optimizer
) -> tuple[Network, AcceleratedOptimizer]:
    """Have Accelerate wrap model and optimizer; the processes start from the same weights."""
    with warnings.catch_warnings():
        # torch 2.13 has a new name for it, which Accelerate and torch 2.11 do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: tuple[Network, AcceleratedOptimizer] = accelerator.prepare(model, optimizer)
    return prepared


def on_main(state: PartialState, work: Callable[[], Value]) -> Value:
    """Do something in the main process and return its value in all; so with what ends the run."""
    value, ending = _attempt(work) if state.is_main_process else (None, None)
    if state.num_processes > 1:
        shared: list[Any] = [value, ending]
        dist.broadcast_object_list(shared, src=0)
        value, ending = shared
    if ending is not None:
        raise ending if state.is_main_process else ending.told()
    return cast(Value, value)


def in_all(state: PartialState, work: Callable[[], Value]) -> Value:
    """Do something in every process; what ends the run in one of them ends it in all."""
    value, ending = _attempt(work)
    for rank, theirs in enumerate(shared(state, ending)):
        if theirs is not None:
            raise theirs if rank == state.process_index else theirs.told()
    return cast(Value, value)


def _attempt(work: Callable[[], Value]) -> tuple[Value | None, Exit | None]:
    try:
        with disk_errors_named():
            return work(), None
    except Exit as ending:
        return None, ending


def shared(state: PartialState, value: Value) -> list[Value]:
    """Return the values of all processes, by rank."""
    values = [value]
    if state.num_processes > 1:
        values = [value] * state.num_processes
        dist.all_gather_object(values, value)
    return values


def agree(state: PartialState, facts: dict[str, Any]) -> None:
    """Check that all processes hold the same facts.

    Raises:
        UserError: two of them differ; the line names the fact and both values.
    """
    everyone = shared(state, facts)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                ending = UserError(
                    f"the processes differ in {name}: {value} in process 0, {theirs.get(name)} in "
                    f"process {rank}; start all with the same command, code and data"
                )
                raise ending if state.is_main_process else ending.told()


def total(state: PartialState, value: Tensor) -> Tensor:
    """Return the sum of a number over all processes."""
    if state.num_processes > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def smallest(state: PartialState, value: Tensor) -> Tensor:
    """Return the smallest of a number over all processes."""
    if state.num_processes > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def expect_promptness(state: PartialState) -> None:
    """From now on, a process that says nothing for `patience` seconds counts as lost."""
    if state.num_processes > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience()))


@contextmanager
def losses_named(state: PartialState) -> Iterator[None]:
    """Turn the failure of a collective into a line that names the process that was lost.

    Raises:
        TemporaryError: another process died or stalled.
    """
    try:
        yield
    except RuntimeError as error:
        if state.num_processes == 1 or not _is_communication(error):
            raise
        raise TemporaryError(
            f"process {state.process_index} lost {_missing(state)}; "
            "the same command goes on from the last checkpoint"
        ) from error


def _is_communication(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "timed out")
    )


def _missing(state: PartialState) -> str:
    """Return the names of the processes that do not answer a roll call.

    The store that the processes met at outlives them all: it belongs to the launcher.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=1))
        store.set(f"survivor/{state.process_index}", "here")
        time.sleep(ROLL_CALL)
        missing = [
            str(rank)
            for rank in range(state.num_processes)
            if rank != state.process_index and not store.check([f"survivor/{rank}"])
        ]
    except (RuntimeError, dist.DistError):
        return "the process that the others meet at"
    return f"process {' and '.join(missing)}" if missing else "another process"


def leave_together(state: PartialState) -> None:
    """Wait for all: a launcher ends the siblings of the first process that leaves."""
    if state.num_processes > 1:
        dist.barrier()
        dist.destroy_process_group()
