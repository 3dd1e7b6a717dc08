"""BatchNorm over the global batch, or over fixed groups of it, whatever the number of processes.

Ioffe and Szegedy 2015. Every process holds a share of the batch of 128; the statistics are those of
the whole batch, forward and backward, so that the gradient is one device's. torch's SyncBatchNorm
does that on CUDA only, and knows no groups. A group is a run of `group_size` places of the global
batch that is normalised by itself: 64 is what the paper's two GPUs did. It may straddle processes.

One all-reduce of per-group sums a direction. The sums travel and are combined in float64, so that
E[x^2] - E[x]^2 loses nothing that float32 statistics would keep, and every process computes the
same running statistics from them, bit for bit.

Shapes: b images of this process, C channels, H rows, W columns, G groups in the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Groups:
    """How the global batch is cut into groups, and where this process's share lies in them.

    Attributes:
        batch_size: of the global batch.
        group_size: images normalised together; divides batch_size.
        share: the places of the global batch that are this process's.
        is_distributed: whether sums have to be exchanged.
    """

    batch_size: int
    group_size: int
    share: slice
    is_distributed: bool

    def __post_init__(self) -> None:
        # Places that belong to no group would never be written.
        assert self.batch_size % self.group_size == 0

    @property
    def num_groups(self) -> int:
        """G."""
        return self.batch_size // self.group_size

    def pieces(self) -> list[tuple[int, slice]]:
        """Return the groups that the share touches, each with its place within the share."""
        first, last = self.share.start, self.share.stop
        pieces = []
        for group in range(self.num_groups):
            start = max(first, group * self.group_size)
            stop = min(last, (group + 1) * self.group_size)
            if start < stop:
                pieces.append((group, slice(start - first, stop - first)))
        return pieces

    def sum_over_processes(self, sums: Tensor) -> Tensor:
        """Add up per-group sums in place."""
        if self.is_distributed:
            dist.all_reduce(sums)
        return sums


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of `groups`; evaluation is BatchNorm2d's.

    Running statistics are updated with the mean over groups of the groups' means and unbiased
    variances.
    """

    def __init__(self, num_features: int, groups: Groups) -> None:
        super().__init__(num_features)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, C, H, W), of the same type."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert len(x) == self.groups.share.stop - self.groups.share.start
        out, mean, unbiased_var = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.groups, self.eps
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.mean(dim=0).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(
                unbiased_var.mean(dim=0).to(self.running_var.dtype), self.momentum
            )
        result: Tensor = out
        return result


class _Normalise(torch.autograd.Function):
    """Normalise by group; statistics in float32 at least, whatever the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: Groups, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = groups.group_size * x.shape[2] * x.shape[3]
        sums = torch.zeros(2, groups.num_groups, x.shape[1], dtype=_wide(x), device=x.device)
        for group, piece in groups.pieces():
            # Mean and deviations first: exact where a bare sum of squares would cancel.
            part = x[piece]
            var, mean = torch.var_mean(part.to(weight.dtype), dim=(0, 2, 3), correction=0)
            part_count = part.numel() // x.shape[1]
            mean, var = mean.to(sums.dtype), var.to(sums.dtype)
            sums[0, group] = mean * part_count
            sums[1, group] = (var + mean.square()) * part_count
        groups.sum_over_processes(sums)
        mean = sums[0] / count  # (G, C)
        var = (sums[1] / count - mean.square()).clamp_min(0)
        invstd = (var + eps).rsqrt()
        out = torch.empty_like(x)
        for group, piece in groups.pieces():
            out[piece] = F.batch_norm(
                x[piece],
                mean[group].to(weight.dtype),
                var[group].to(weight.dtype),
                weight,
                bias,
                training=False,
                eps=eps,
            )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.groups, ctx.count = groups, count
        unbiased_var = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased_var)
        return out, mean, unbiased_var

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, invstd = ctx.saved_tensors
        groups: Groups = ctx.groups
        dtype = weight.dtype
        channels = (1, -1, 1, 1)
        sums = torch.zeros_like(mean).repeat(2, 1, 1)  # (2, G, C)
        normalised = {}
        for group, piece in groups.pieces():
            centred = x[piece].to(dtype) - mean[group].to(dtype).view(channels)
            normalised[group] = centred * invstd[group].to(dtype).view(channels)
            grad = grad_out[piece].to(dtype)
            sums[0, group] = grad.sum(dim=(0, 2, 3))
            sums[1, group] = (grad * normalised[group]).sum(dim=(0, 2, 3))
        grad_bias, grad_weight = sums.sum(dim=1).to(dtype)  # this process's; DDP adds the others'
        groups.sum_over_processes(sums)
        means = (sums / ctx.count).to(dtype)  # of the gradient, and of it times the normalised x
        grad_x = torch.empty_like(x)
        for group, piece in groups.pieces():
            grad_normalised = (
                grad_out[piece].to(dtype)
                - means[0, group].view(channels)
                - normalised[group] * means[1, group].view(channels)
            )
            scale = (weight * invstd[group].to(dtype)).view(channels)
            grad_x[piece] = (grad_normalised * scale).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _wide(x: Tensor) -> torch.dtype:
    """Return the type that sums are combined in: float64, which MPS alone does not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def convert(model: nn.Module, groups: Groups) -> None:
    """Replace every BatchNorm2d in the model by one over `groups`, parameters and buffers kept.

    With one process and one group there is nothing to replace: plain BatchNorm, at full speed.
    """
    if groups.num_groups == 1 and not groups.is_distributed:
        return
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.BatchNorm2d:
                replacement = GroupBatchNorm2d(module.num_features, groups)
                replacement.to(module.weight.device, module.weight.dtype)
                replacement.load_state_dict(module.state_dict())
                setattr(parent, name, replacement)
