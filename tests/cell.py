"""Stands in for a run of a grid: lives as its plan says, one word a life, without training.

Usage: python cell.py RUN_DIRECTORY RECIPE_HASH PLAN
PLAN is a file: each life takes its first word away. A number is an exit code, after a line that
says so; "save" is 75, with progress; "kill" is a SIGKILL to itself; "wait" waits for a request to
stop; "stopped" was asked by a stop file. Without a word left it is done.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from resnet_ddp.exits import Exit, ExitCode
from resnet_ddp.lease import Lease
from resnet_ddp.stop import StopRequest


def end(directory: Path, code: int, reason: str) -> None:
    status = {"exit_code": code, "reason": reason, "iteration": 0}
    (directory / "status.json").write_text(json.dumps(status))
    print(f"resnet-ddp: {reason}", flush=True)
    sys.exit(code)


def live(directory: Path, recipe_hash: str, plan: Path) -> None:
    if (directory / "result.json").exists():
        return  # another was quicker
    with (directory / "lives").open("a") as lives:
        lives.write(f"{os.environ['RESNET_DDP_LAUNCHER']}\n")
    words = plan.read_text().split() if plan.exists() else []
    if words:
        plan.write_text(" ".join(words[1:]))
    match words[:1]:
        case []:
            result = {"recipe_hash": recipe_hash, "test_error_rate": 0.25}
            (directory / "result.json").write_text(json.dumps(result))
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["save"]:
            saved = len(list((directory / "checkpoints").glob("*")))
            (directory / "checkpoints" / f"iteration-{saved + 1:08d}").mkdir(parents=True)
            end(directory, ExitCode.TEMPORARY, "no space")
        case ["wait"]:
            stop = StopRequest()
            with stop.listening():
                while stop.reason is None:
                    time.sleep(0.05)
                end(directory, ExitCode.STOPPED, stop.reason)
        case ["stopped"]:
            end(directory, ExitCode.STOPPED, "the file stop")
        case [code]:
            end(directory, int(code), f"ended with {code}")


def main() -> None:
    directory, recipe_hash, plan = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    lease = Lease(directory)
    try:
        lease.acquire()
        live(directory, recipe_hash, plan)
    except Exit as error:
        print(f"resnet-ddp: {error}")
        sys.exit(error.code)
    finally:
        lease.release()


main()
