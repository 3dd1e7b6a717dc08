"""Lives of a run that end at a chosen moment, or on a disk that fails: for tests.

    python faulty.py        one order a line on stdin, one answer a line on stdout
    python faulty.py ORDER  one life in this very process

An order is a JSON object (see `Order`). Each is a process of its own, forked once torch has been
imported, which is what a life mostly waits for; where one is told to die it is by SIGKILL.

Everything that a run does to its files goes through a few functions of `os`. They are wrapped and
counted, and so are training steps and evaluations: the n-th such event is the moment.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECIPE = "faulty"  # of 15 iterations of 8 images
CALLS = (
    *("open", "close", "write", "pwrite", "fsync", "ftruncate", "mkdir", "rename", "replace"),
    *("link", "unlink", "rmdir"),
)
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Order:
    """One life.

    Attributes:
        arguments: of `resnet-ddp`.
        runs: files below this directory are watched.
        at: the event that is to fail, counted from 0; None for an undisturbed life.
        fault: "before", "half" (of a write) or "after": killed there; or the name of an errno,
            which a write meets halfway.
        seconds: killed after so long, whatever it is doing.
        clock: have the wall clock jump.
        log: a file that gets the events, one a line.
    """

    arguments: list[str]
    runs: str
    at: int | None = None
    fault: str = "before"
    seconds: float = 0.0
    clock: bool = False
    log: str = os.devnull


class Faults:
    """Counts events and lets one of them fail."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.count = 0
        self.paths: dict[int, str] = {}  # of open descriptors
        self.original = {name: getattr(os, name) for name in CALLS}
        self.log = self.original["open"](order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        from resnet_ddp import experiment
        from resnet_ddp.step import Stepper

        for name in CALLS:
            setattr(os, name, self.wrapped(name))
        step, evaluate = Stepper.step, experiment.error_rate
        Stepper.step = lambda stepper: self.event("step", "", step, stepper)  # type: ignore
        experiment.error_rate = lambda *args, **kwargs: self.event(  # type: ignore[assignment]
            "evaluation", "", evaluate, *args, **kwargs
        )

    def wrapped(self, name: str) -> Callable[..., Any]:
        original = self.original[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            where = self.path(args[0], kwargs)
            is_harmless = name == "close" or (name == "open" and not args[1] & WRITING)
            # The lease's beat, in a thread of its own, comes when it comes.
            is_ours = where is not None and threading.current_thread() is threading.main_thread()
            if is_ours and not is_harmless:
                result = self.event(name, str(where), original, *args, **kwargs)
            else:
                result = original(*args, **kwargs)
            if name == "open" and where is not None:
                self.paths[result] = where
            elif name == "close":
                self.paths.pop(args[0], None)
            return result

        return call

    def path(self, target: Any, kwargs: dict[str, Any]) -> str | None:
        """Return what a call is about, relative to the runs, None if it is about something else."""
        if kwargs.get("dir_fd") is not None:
            there = self.paths.get(kwargs["dir_fd"])
            return None if there is None else os.path.join(there, target)
        if isinstance(target, int):
            return self.paths.get(target)
        path = os.path.abspath(os.fspath(target))
        return os.path.relpath(path, self.order.runs) if path.startswith(self.order.runs) else None

    def event(self, kind: str, where: str, work: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        number, self.count = self.count, self.count + 1
        self.original["write"](self.log, f"{kind} {where}\n".encode())
        if number != self.order.at:
            return work(*args, **kw)
        fault = self.order.fault
        if kind == "write" and fault not in ("before", "after"):
            work(args[0], bytes(args[1])[: len(args[1]) // 2])
        elif fault == "after":
            work(*args, **kw)
        if fault not in ("before", "half", "after"):
            code = getattr(errno, fault)
            raise OSError(code, os.strerror(code), where)
        os.kill(os.getpid(), signal.SIGKILL)


def jumping(seed: int) -> Callable[[], float]:
    clock = random.Random(seed)
    return lambda: clock.uniform(0, 4e9)


def live(order: Order) -> int:
    import torch

    from resnet_ddp.cli import main
    from resnet_ddp.recipe import RECIPES, Recipe

    torch.set_num_threads(1)
    RECIPES[RECIPE] = Recipe(
        name=RECIPE, iterations=15, batch_size=8, batchnorm_group=8, drops=(7, 11)
    )
    Faults(order).install()
    if order.clock:
        time.time = jumping(0)
        time.time_ns = lambda: int(1e9 * time.time())
    return main(order.arguments)


def serve() -> None:
    import torch

    import resnet_ddp.trainer  # noqa: F401 what takes its time, once for all

    # What torch imports at the first optimizer and the first net on no device, most of a life.
    layer = torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    for line in sys.stdin:
        order = Order(**json.loads(line))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(read)
            code = 1
            try:
                code = live(order)
            except SystemExit as end:
                code = int(str(end.code))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(write)
        kill_after(order.seconds, child)
        with open(read, "rb") as pipe:
            output = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "output": output}), flush=True)


def kill_after(seconds: float, child: int) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def as_line(order: Order) -> str:
    return json.dumps(asdict(order)) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if sys.argv[1:]:
        sys.exit(live(Order(**json.loads(sys.argv[1]))))
    serve()
