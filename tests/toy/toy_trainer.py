"""Stands in for `resnet_ddp.trainer` where many lives are to be cheap: the same files, no training.

Its weights are a chain of hashes, one link an iteration, so that an iteration that was left out or
done twice ends in other bits. How long an iteration takes says TOY_SECONDS. A file `plan` in the
run directory has a word for each life: an exit code that it ends with, "kill", or "freeze".
"""

import hashlib
import os
import platform
import signal
import time
from pathlib import Path

from resnet_ddp import durable
from resnet_ddp.exits import ExitCode, NotFiniteError, TemporaryError, UserError
from resnet_ddp.runs import Settings
from resnet_ddp.stop import StopRequest, slurm_deadline

ENDINGS = {2: UserError, 65: NotFiniteError, 75: TemporaryError}
SETTINGS = Settings(precision="fp32", compile=False, threads=1, log_every=1, eval_every=10)


def train(options, directory, load_data, plans=()):
    load_data()
    deadline = slurm_deadline()
    stop = StopRequest(directory.stop_path, *([deadline] if deadline else []))
    try:
        directory.acquire()
        if directory.result() is not None:
            return ExitCode.DONE
        return live(options, directory, stop)
    except tuple(ENDINGS.values()) as error:
        directory.write_status(error.code, reason=str(error), iteration=None)
        raise
    finally:
        directory.release()


def live(options, directory, stop):
    path, total = directory.path, directory.cell.recipe.iterations
    directory.settle_config(
        SETTINGS, world_size=1, environment={"hardware": "toy", "versions": {}, "kernels": None}
    )
    job = "_".join(os.environ.get(f"SLURM_ARRAY_{name}_ID", "-") for name in ("JOB", "TASK"))
    iteration, digest = newest(path)
    with (path / "lives").open("a") as lives:
        lives.write(
            f"{job} {os.environ.get('SLURM_RESTART_COUNT', 0)} {platform.node()} {iteration}\n"
        )
    directory.write_status(None, reason="running", iteration=iteration)
    obey(path)
    with stop.listening():
        while iteration < total:
            time.sleep(float(os.environ.get("TOY_SECONDS", "0.05")))
            directory.lease.check()
            digest = hashlib.sha256(f"{digest} {path.parent.name} {path.name} {iteration}".encode())
            digest = digest.hexdigest()
            iteration += 1
            reason = stop.reason
            if reason or iteration % (options.save_every or 5) == 0:
                save(path, iteration, digest)
            if reason:
                directory.write_status(ExitCode.STOPPED, reason=reason, iteration=iteration)
                return ExitCode.STOPPED
        directory.write_weights(digest.encode())
        directory.write_status(ExitCode.DONE, reason="done", iteration=total)
        rate = int(digest[:4], 16) / 0x10000
        directory.write_result(
            iterations=total,
            test_error_rate=rate,
            train_error_rate=rate / 2,
            val_error_rate=None,
            num_parameters=1,
        )
        with (path / "done").open("a") as done:
            done.write(f"{job}\n")
    return ExitCode.DONE


def obey(path: Path) -> None:
    plan = path / "plan"
    words = plan.read_text().split() if plan.exists() else []
    if not words:
        return
    plan.write_text(" ".join(words[1:]))
    if words[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif words[0] == "freeze":
        while True:
            time.sleep(1)
    raise ENDINGS[int(words[0])](f"{path}: planned to end with {words[0]}")


def newest(path: Path) -> tuple[int, str]:
    found = sorted((path / "checkpoints").glob("iteration-*"))
    return (int(found[-1].name[10:]), (found[-1] / "digest").read_text()) if found else (0, "")


def save(path: Path, iteration: int, digest: str) -> None:
    temporary = path / "checkpoints" / "saving"
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / "digest").write_text(digest)
    final = path / "checkpoints" / f"iteration-{iteration:08d}"
    if not final.exists():
        durable.publish_directory(temporary, final)
