"""Compiling the network, never at the price of wrong numbers.

What the compiler made is tried before it trains: a step on random images, compared with the eager
network in float64. Where it is further off than the eager network in the run's own precision, or
does not compile at all, training goes on without it. What was compiled is kept on disk across runs.

Shapes: b images of this process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FACTOR = 2.0  # how much further off than the eager network the compiled one may be
# Roundings fall differently; relative to a tensor's norm.
SLACK = {"bf16": 2e-2, "fp32": 1e-3, "fp64": 1e-9}

Network = Callable[[Tensor], Tensor]


def keep_cache() -> None:
    """Have the compiler keep its work below the user's cache, unless another place is named."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault(CACHE_VARIABLE, str(cache / "resnet_ddp" / "inductor"))


def compile_checked(
    model: nn.Module,
    *,
    num_images: int,
    num_classes: int,
    precision: str,
    layout: torch.memory_format,
    compile: Callable[[nn.Module], Network] = torch.compile,
) -> tuple[Network, str]:
    """Compile the network and try it.

    Every process calls it, since the statistics of BatchNorm may have to be exchanged.

    Args:
        model: on its device; its parameters, buffers and gradients are the same afterwards.
        num_images: b.
        compile: stands in for the compiler in tests.

    Returns:
        The compiled network and "", or the model itself and what is wrong with the compiled one.
    """
    keep_cache()
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, 32, 32, generator=generator).to(weight)
    images = images.contiguous(memory_format=layout)
    labels = torch.randint(num_classes, (num_images,), generator=generator).to(weight.device)

    def gradients(network: Network, owner: nn.Module) -> dict[str, Tensor]:
        """Return those of the owner's parameters, by name."""
        dtype = next(owner.parameters()).dtype
        is_bf16 = precision == "bf16" and owner is model
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=is_bf16):
            logits = network(images.to(dtype))
        F.cross_entropy(logits.to(dtype), labels).backward()  # type: ignore[no-untyped-call]
        found = {
            name: parameter.grad.cpu().double()
            for name, parameter in owner.named_parameters()
            if parameter.grad is not None
        }
        owner.zero_grad()
        return found

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # MPS has no float64.
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    reference = copy.deepcopy(model).to(wide)
    try:
        exact = gradients(reference, reference)
        eager = gradients(model, model)
        compiled_model = compile(model)
        compiled = gradients(compiled_model, model)
    # Whatever the compiler does not know, it says by exceptions of many kinds.
    except RuntimeError as error:
        return model, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for name, expected in exact.items():
        if name not in compiled:
            return model, f"no gradient of {name}"
        norm = float(expected.norm()) or 1.0
        far = float((compiled[name] - expected).norm()) / norm
        near = float((eager[name] - expected).norm()) / norm
        if not far <= FACTOR * near + SLACK[precision]:  # also where it is not a number
            return model, f"the gradient of {name} is {far:.1e} from float64, {near:.1e} without"
    return compiled_model, ""
