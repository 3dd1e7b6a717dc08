"""Make training steps on a CUDA device that is not there, and end with 1 at what a graph forbids.

    LD_PRELOAD=LIBRARY python on_fake_cuda.py LIBRARY [PLANTED]     (LIBRARY: see fake_cuda.cpp)

Under FakeTensorMode every operation is shaped, typed and placed but not computed. A captured step
may not read a number back, make a tensor on the host, or have shapes that depend on data.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.augment import Normalisation
from resnet_ddp.batches import Batches
from resnet_ddp.batchnorm import Groups, convert
from resnet_ddp.models import CifarNet
from resnet_ddp.recipe import RECIPES
from resnet_ddp.step import Stepper, make_optimizer

CUDA = torch.device("cuda:0")
DYNAMIC = ("nonzero", "masked_select", "_unique2", "unique_dim")


class ForbiddenError(Exception):
    """What could not be captured."""


class OnDeviceOnly(TorchDispatchMode):
    """Let through what can be captured, and count it."""

    kernels = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in DYNAMIC:
            raise ForbiddenError(f"{function}: its shape depends on data")
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                raise ForbiddenError(f"{function}: a tensor on {tensor.device}")
        self.kernels += 1
        return result


class Accelerator:
    """As much of Accelerate as a step of one process uses."""

    num_processes = 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


def make_stepper(group_size: int) -> Stepper:
    recipe = RECIPES["he2015-smoke"]
    model = CifarNet(ARCHITECTURES["resnet20"], num_classes=10)
    for module in model.modules():  # `.to` swaps what fake tensors do not let be swapped
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(there)
        for name, buffer in module._buffers.items():
            assert buffer is not None
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    convert(model, Groups(128, group_size, slice(0, 128), is_distributed=False))

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits: Tensor = model(images)
        return logits.float()

    batches = Batches(
        recipe,
        seed=0,
        images=torch.empty(300, 32, 32, 3, dtype=torch.uint8, device=CUDA),
        labels=torch.empty(300, dtype=torch.int64, device=CUDA),
        samples=torch.arange(300, device=CUDA),
        normalise=Normalisation(torch.empty(3, device=CUDA), torch.empty(3, device=CUDA)),
    )
    optimizer: Any = make_optimizer(model, recipe)
    accelerator: Any = Accelerator()
    return Stepper(forward, optimizer, batches, accelerator, recipe, depth=20)


def plant(what: str) -> None:
    """Have each step do something that cannot be captured."""
    original = Stepper.note

    def note(stepper: Stepper, loss: Tensor) -> None:
        if what == "item":
            loss.item()
        elif what == "host tensor":
            loss = loss + torch.tensor(1.0).to(CUDA)
        elif what == "copy to the host":
            loss.cpu()
        elif what == "shape":
            stepper.iteration.nonzero()
        original(stepper, loss)

    Stepper.note = note  # type: ignore[method-assign]


def main(library: str, planted: str = "") -> int:
    if library:  # a torch with CUDA needs none
        ctypes.CDLL(library).install()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *_: True  # type: ignore[assignment]
    # Both write what they are given and return nothing: all that a shape needs to know.
    sgd = torch.library.Library("aten", "IMPL", "Meta")
    for overload in ("_fused_sgd_", "_fused_sgd_.tensor_lr"):
        with contextlib.suppress(RuntimeError):  # later versions know it
            sgd.impl(overload, lambda *_, **__: None)
    plant(planted)
    for group_size in (128, 64):
        with FakeTensorMode():
            stepper = make_stepper(group_size)
            try:
                with OnDeviceOnly() as mode:
                    stepper.advance(0, until=2)
            except (ForbiddenError, DataDependentOutputException) as error:
                print(error)
                return 1
            print(f"groups of {group_size}: {mode.kernels // 2} operations a step")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
