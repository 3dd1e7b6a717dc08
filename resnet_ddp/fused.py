"""On a CPU: BatchNorm, the addition of the shortcut and ReLU in one pass a direction.

`fuse(model)` returns the same network, parameters and names of `CifarNet` kept, whose training
steps go through the kernels of fused.cpp. They are compiled by the machine's own compiler at first
use, in seconds, and kept in the user's cache; where there is no compiler the model is left as it
is. It is the mathematics of `batchnorm`, whose groups and exchange of sums serve here too. Gains:

- Eager bf16 passes over each map nine times where three suffice.
- In fp32 channels-last maps become possible: torch's BatchNorm adds those up one number after the
  other, and loses digits.
- In bf16 the gradient of a 3x3 convolution's weight is found faster, and is not rounded to bf16.

Shapes: b images of this process, C channels, H rows, W columns, G groups in the global batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups
from resnet_ddp.compilation import compile_checked
from resnet_ddp.models import Block, CifarNet, build_model

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
)
CHANNELS = (16, 32, 64)  # of `models.WIDTHS`
COMPILING = "compiling-"  # how the folders are called in which it is done
FORGOTTEN = 3600.0  # seconds after which such a folder is nobody's
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Kernels:
    """The compiled functions; maps go in channels-last."""

    library: ctypes.CDLL
    name: str

    def statistics(self, x: Tensor, sums: Tensor) -> None:
        """Write the sums of x (b, C, H, W) and of its square to sums (2, C) float64."""
        self._call("statistics", x, _at(x), _rows(x), _at(sums))

    def apply(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor
    ) -> None:
        """Write relu(scale * x + shift + residual) to `out`; scale and shift (C,) float32."""
        self._call(
            "apply", x, _at(x), _at(scale), _at(shift), _at(residual), _at(out), _rows(x), _int(1)
        )

    def grad_statistics(
        self,
        grads: tuple[Tensor, Tensor | None],
        x: Tensor,
        out: Tensor | None,
        affine: tuple[Tensor, Tensor, Tensor],
        masked: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Write to sums (2, C) those of the masked gradient and of it times x - mean.

        Args:
            grads: what flows into the output, from one consumer or two.
            out: tells where ReLU let through; None finds it from x, which needs no residual.
            affine: mean, scale, shift (C,) float32.
            masked: where the masked gradient is written, for two consumers or a residual.
        """
        mean, scale, shift = affine
        maps = [_at(map_) for map_ in (*grads, x, out, mean, scale, shift, masked)]
        self._call("grad_statistics", x, *maps, _rows(x), _at(sums), _int(1))

    def grad_apply(
        self,
        grad: Tensor,
        x: Tensor,
        affine: tuple[Tensor, Tensor, Tensor],
        means: tuple[Tensor, Tensor],
        grad_x: Tensor,
        *,
        mask: bool,
    ) -> None:
        """Write scale * (grad - means[0] - (x - mean) * means[1]); mask: as ReLU let through."""
        pointers = [_at(map_) for map_ in (grad, x, *affine, *means, grad_x)]
        self._call("grad_apply", x, *pointers, _rows(x), _int(mask))

    @property
    def has_bf16_products(self) -> bool:
        """Whether `weight_gradient` is there."""
        return bool(self.library.has_bf16_products())

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return that of a 3x3 convolution, stride 1, C to C channels: (C, C, 3, 3) float32."""
        images, channels, height, width = x.shape
        assert height == width and width % 2 == 0 and grad.shape == x.shape
        result = torch.empty(channels, 3, 3, channels)
        self._call("weight_gradient", x, _at(x), _at(grad), _at(result), _int(images), _int(height))
        return result.permute(0, 3, 1, 2)

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        # The kernels know these alone, and would leave others undone in silence.
        assert x.shape[1] in CHANNELS and x.is_contiguous(memory_format=torch.channels_last)
        function = getattr(self.library, f"{name}_{NAMES[x.dtype]}")
        function(_int(x.shape[1]), *arguments, _int(torch.get_num_threads()))


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _rows(x: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(x.numel() // x.shape[1])


def _int(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)


def load() -> Kernels | None:
    """Return the kernels, compiled if they are not in the cache; None where they cannot be had.

    They are tried on random images before they are put there. The cache's key is the source, the
    flags and the processor: a home directory may be shared by machines.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    cpu = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=False
    ).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + cpu).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resnet_ddp"
    path = cache / f"fused-{key}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(cache)
            # Several processes may compile at once.
            with tempfile.TemporaryDirectory(dir=cache, prefix=COMPILING) as folder:
                target = Path(folder) / path.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
                subprocess.run(command, check=True, capture_output=True)
                if trouble := trouble_with(Kernels(ctypes.CDLL(str(target)), path.stem)):
                    print(f"warning: training without our kernels: {trouble}", file=sys.stderr)
                    return None
                target.replace(path)
        return Kernels(ctypes.CDLL(str(path)), path.stem)
    except (OSError, subprocess.CalledProcessError):
        return None


def _remove_leftovers(cache: Path) -> None:
    """Remove what processes left that were killed while they compiled."""
    for folder in cache.glob(f"{COMPILING}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(folder)


def trouble_with(kernels: Kernels) -> str:
    """Say what is wrong with a step through the kernels, "" if nothing is."""
    for precision in ("fp32", "bf16"):
        model = build_model("resnet20", num_classes=10, seed=0)
        _, trouble = compile_checked(
            model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            num_images=16,
            num_classes=10,
            precision=precision,
            layout=torch.channels_last,
            compile=lambda model: fuse(cast(CifarNet, model), kernels),
        )
        if trouble:
            return f"{precision}: {trouble}"
    return ""


class _FusedBatchNorm(torch.autograd.Function):
    """relu(BatchNorm(x) + residual), twice: for the next convolution and for the shortcut.

    Two outputs of the same memory, so that backward is given the two gradients apart and adds them
    while it reads them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: Groups,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
        count = groups.group_size * x.shape[2] * x.shape[3]
        sums = torch.zeros(groups.num_groups, 2, x.shape[1], dtype=torch.float64)
        for group, piece in groups.pieces():
            kernels.statistics(x[piece], sums[group])
        groups.sum_over_processes(sums)
        mean = sums[:, 0] / count  # (G, C)
        var = (sums[:, 1] / count - mean.square()).clamp_min(0)
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        shift = (bias - mean * scale).float()
        affine = (mean.float(), scale.float(), shift)  # each (G, C)
        out = torch.empty_like(x)
        for group, piece in groups.pieces():
            part = None if residual is None else residual[piece]
            kernels.apply(x[piece], affine[1][group], shift[group], part, out[piece])
        # The next convolution keeps the output anyway; without a residual x tells the mask.
        ctx.save_for_backward(x, None if residual is None else out, *affine, invstd)
        ctx.kernels, ctx.groups, ctx.count = kernels, groups, count
        ctx.set_materialize_grads(False)
        unbiased_var = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased_var)
        return out, out.view_as(out), mean, unbiased_var

    @staticmethod
    def backward(
        ctx: Any, grad1: Tensor | None, grad2: Tensor | None, *_: Tensor
    ) -> tuple[None, Tensor, Tensor | None, Tensor, Tensor, None, None]:
        x, out, *affine, invstd = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        groups: Groups = ctx.groups
        grads = [
            grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
            for grad in (grad1, grad2)
            if grad is not None
        ]
        first, second = grads[0], grads[1] if len(grads) == 2 else None
        masked = None if out is None and second is None else torch.empty_like(x)
        sums = torch.zeros(groups.num_groups, 2, x.shape[1], dtype=torch.float64)
        for group, piece in groups.pieces():
            kernels.grad_statistics(
                (first[piece], None if second is None else second[piece]),
                x[piece],
                None if out is None else out[piece],
                (affine[0][group], affine[1][group], affine[2][group]),
                None if masked is None else masked[piece],
                sums[group],
            )
        # This process's; DDP adds the others'.
        grad_bias = sums[:, 0].sum(dim=0).float()
        grad_weight = (sums[:, 1] * invstd).sum(dim=0).float()
        groups.sum_over_processes(sums)
        mean_grad = (sums[:, 0] / ctx.count).float()
        mean_dot = (sums[:, 1] / ctx.count * invstd.square()).float()
        grad_x = torch.empty_like(x)
        for group, piece in groups.pieces():
            kernels.grad_apply(
                first[piece] if masked is None else masked[piece],
                x[piece],
                (affine[0][group], affine[1][group], affine[2][group]),
                (mean_grad[group], mean_dot[group]),
                grad_x[piece],
                mask=masked is None,
            )
        grad_residual = masked if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_residual, grad_weight, grad_bias, None, None


class _Convolution(torch.autograd.Function):
    """3x3, stride 1, C to C channels, in bf16; its weight's gradient comes out in float32."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.kernels = kernels
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
        )
        return None, grad_x, ctx.kernels.weight_gradient(x, grad)


class FusedBlock(Block):
    """A block that takes and gives the pair of outputs of `batchnorm_relu`."""

    kernels: Kernels

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two of (b, C, H, W) -> two of (b, C', H / stride, W / stride)."""
        x, for_shortcut = pair
        out, _ = batchnorm_relu(self.kernels, self.bn1, convolve(self.kernels, self.conv1, x))
        out = convolve(self.kernels, self.conv2, out)
        residual = None if self.shortcut is None else self.shortcut(for_shortcut)
        return batchnorm_relu(self.kernels, self.bn2, out, residual)


class FusedNet(CifarNet):
    """`CifarNet` of fused blocks."""

    kernels: Kernels

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, 32, 32) to logits (b, K)."""
        pair = batchnorm_relu(self.kernels, self.bn, self.conv(images))
        x, _ = self.blocks(pair)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def convolve(kernels: Kernels, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the convolution of x, by the kernel where it is of the kind that has one."""
    if (
        x.dtype == torch.bfloat16
        and conv.stride == (1, 1)
        and conv.in_channels == conv.out_channels
        and torch.is_grad_enabled()
        and kernels.has_bf16_products
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        result: Tensor = _Convolution.apply(kernels, x, conv.weight)  # type: ignore[no-untyped-call]
        return result
    out: Tensor = conv(x)
    return out


def batchnorm_relu(
    kernels: Kernels, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return relu(bn(x) + residual), twice, and update the running statistics in training."""
    if not bn.training:
        out = bn(x)
        out = F.relu(out if residual is None else out + residual)
        return out, out
    assert bn.running_mean is not None and bn.running_var is not None
    assert bn.num_batches_tracked is not None and bn.momentum is not None
    if isinstance(bn, GroupBatchNorm2d):
        groups = bn.groups
    else:
        groups = Groups(len(x), len(x), slice(0, len(x)), is_distributed=False)
    out1, out2, mean, unbiased_var = _FusedBatchNorm.apply(  # type: ignore[no-untyped-call]
        kernels, x, residual, bn.weight, bn.bias, groups, bn.eps
    )
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
        bn.running_mean.lerp_(mean.mean(dim=0).float(), bn.momentum)
        bn.running_var.lerp_(unbiased_var.mean(dim=0).float(), bn.momentum)
    return out1, out2


def fuse(model: CifarNet, kernels: Kernels) -> FusedNet:
    """Return the network through the kernels, with the model's own parameters and buffers."""
    fused: FusedNet = _as(FusedNet, model, kernels)
    fused.blocks = nn.Sequential(
        *(_as(FusedBlock, block, kernels) for block in model.blocks.children())
    )
    return fused


def _as(cls: type[Any], module: nn.Module, kernels: Kernels) -> Any:
    """Return a module of the class with the module's children; the kernels are no child."""
    result: Any = object.__new__(cls)
    nn.Module.__init__(result)
    for name, child in module.named_children():
        result.add_module(name, child)
    if not hasattr(result, "shortcut") and isinstance(module, Block):
        result.shortcut = None
    result.kernels = kernels
    return result
