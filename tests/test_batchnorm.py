"""BatchNorm over groups of the global batch, against torch's own on each group."""

import pytest
import torch
from torch import Tensor, nn

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.batches import share
from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups, convert
from resnet_ddp.models import CifarNet


def groups(size: int, *, batch_size: int = 128) -> Groups:
    return Groups(batch_size, size, slice(0, batch_size), is_distributed=False)


def outcome(module: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward once, with weights that are not 1 and 0."""
    module.weight.data.copy_(torch.linspace(0.5, 2, len(module.weight)))
    module.bias.data.copy_(torch.linspace(-1, 1, len(module.bias)))
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    assert x.grad is not None and module.weight.grad is not None and module.bias.grad is not None
    assert module.running_mean is not None and module.running_var is not None
    return {
        "out": out.detach(),
        "grad_x": x.grad,
        "grad_weight": module.weight.grad,
        "grad_bias": module.bias.grad,
        "running_mean": module.running_mean,
        "running_var": module.running_var,
    }


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    """Maps far from zero, where a naive variance would cancel, and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 128, 5, 4, 4, generator=generator, dtype=torch.float64)
    return 1000 + 3 * x, grad


def test_one_group_is_torchs(maps: tuple[Tensor, Tensor]) -> None:
    expected = outcome(nn.BatchNorm2d(5).double(), *maps)
    actual = outcome(GroupBatchNorm2d(5, groups(128)).double(), *maps)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("size", [64, 32])
def test_each_group_is_torchs(maps: tuple[Tensor, Tensor], size: int) -> None:
    """Running statistics are the groups' mean; weights see all groups."""
    x, grad = maps
    parts = [
        outcome(nn.BatchNorm2d(5).double(), *pair)
        for pair in zip(x.split(size), grad.split(size), strict=True)
    ]
    actual = outcome(GroupBatchNorm2d(5, groups(size)).double(), x, grad)
    join = {"out": torch.cat, "grad_x": torch.cat, "grad_weight": sum, "grad_bias": sum}
    for name in actual:
        values = [part[name] for part in parts]
        expected = join[name](values) if name in join else torch.stack(values).mean(dim=0)
        torch.testing.assert_close(actual[name], expected, rtol=1e-8, atol=1e-8, msg=name)


def test_a_bf16_map_is_normalised_by_fp32_statistics(maps: tuple[Tensor, Tensor]) -> None:
    x = maps[0].bfloat16()
    module = GroupBatchNorm2d(5, groups(64))
    out = module(x.contiguous(memory_format=torch.channels_last))
    assert out.dtype is torch.bfloat16 and module.running_var.dtype is torch.float32
    mean = torch.stack([part.double().mean(dim=(0, 2, 3)) for part in x.split(64)]).mean(dim=0)
    torch.testing.assert_close(module.running_mean.double(), 0.1 * mean, rtol=1e-6, atol=0)


def test_evaluation_uses_the_running_statistics(maps: tuple[Tensor, Tensor]) -> None:
    module, reference = GroupBatchNorm2d(5, groups(64)).double(), nn.BatchNorm2d(5).double()
    module(maps[0])
    reference.load_state_dict(module.state_dict())
    part = maps[0][:3]  # of any size
    assert torch.equal(module.eval()(part), reference.eval()(part))


def test_pieces_of_a_share_that_straddles_groups() -> None:
    """Three processes share 128 places in two groups of 64: the second has places of both."""
    pieces = []
    for rank in range(3):
        places = share(128, rank=rank, world_size=3)
        pieces.append(Groups(128, 64, places, is_distributed=True).pieces())
    assert pieces == [
        [(0, slice(0, 42))],
        [(0, slice(0, 22)), (1, slice(22, 43))],
        [(1, slice(0, 43))],
    ]


def test_conversion() -> None:
    """One process and one group keep plain BatchNorm, at full speed; else every one is replaced."""
    model = CifarNet(ARCHITECTURES["resnet20-b"], num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, groups(128))
    assert not any(isinstance(module, GroupBatchNorm2d) for module in model.modules())
    convert(model, groups(64))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 21 and all(type(norm) is GroupBatchNorm2d for norm in norms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
