"""The batch norms inside ConvProjectionAttention behave as `nn.BatchNorm2d` does, whatever is set on them."""

from __future__ import annotations

import plain_cvt
import pytest
import torch
from torch import nn

from fastvit_kernels.nn import ConvProjectionAttention
from fastvit_kernels.testing import relative_l2

CHANNELS, H, W = 8, 5, 4


def pair(change=None, dtype=torch.float64):
    """Our module and the plain one with the same weights, the batch norms of both passed to `change`."""
    torch.manual_seed(0)
    ours = ConvProjectionAttention(CHANNELS, CHANNELS, 2, stride_kv=2)
    plain = plain_cvt.Attention(CHANNELS, CHANNELS, 2, stride_kv=2)
    for module in (ours, plain):
        for name in ("q", "k", "v"):
            step = getattr(module, f"conv_proj_{name}")
            if change is not None:
                step.bn = change(step.bn) or step.bn
        module.to(dtype)
    plain_cvt.randomize(plain)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def batch(seed, size=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1 + H * W, CHANNELS, generator=generator, dtype=torch.float64) + 0.5


def run(module, x, dtype=torch.float64):
    return module(x.to(dtype), H, W)


def assert_same_buffers(ours, plain, tolerance=1e-14):
    for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        if a.is_floating_point():
            assert relative_l2(a, b) <= tolerance, name
        else:
            assert torch.equal(a, b), name


def fresh(**arguments):
    return lambda bn: nn.BatchNorm2d(CHANNELS, **arguments)


def untrack(bn):
    bn.track_running_stats = False


SETTINGS = {
    "default": None,
    "momentum 0.3": fresh(momentum=0.3),
    "momentum 0": fresh(momentum=0.0),
    "cumulative average": fresh(momentum=None),
    "no running statistics": fresh(track_running_stats=False),
    "tracking switched off later": untrack,
    "not affine": fresh(affine=False),
    "eps 0.01": fresh(eps=1e-2),
    "synchronised, one process": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_running_statistics_over_training_and_evaluation(setting):
    ours, plain = pair(SETTINGS[setting])
    assert ours.fusion_obstacles() == []
    for step in range(3):
        x = batch(step)
        assert relative_l2(run(ours, x), run(plain, x)) <= 1e-13
        assert_same_buffers(ours, plain)
    ours.eval(), plain.eval()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    assert relative_l2(run(ours, batch(9)), run(plain, batch(9))) <= 1e-13
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())


def test_statistics_of_the_cpu_kernels():
    ours, plain = pair(dtype=torch.float32)
    ours.backend = "cpu"
    exact = pair()[1]
    for step in range(3):
        run(ours, batch(step), torch.float32), run(exact, batch(step))
    assert_same_buffers(ours, exact, tolerance=1e-6)


def test_without_gradients_statistics_are_updated_as_well():
    ours, plain = pair()
    with torch.no_grad():
        run(ours, batch(0)), run(plain, batch(0))
    assert_same_buffers(ours, plain)


def test_frozen_in_a_training_model():
    ours, plain = pair()
    for module in (ours, plain):
        for submodule in module.modules():
            if isinstance(submodule, nn.BatchNorm2d):
                submodule.eval()
    assert ours.training and ours.fusion_obstacles() == []
    assert relative_l2(run(ours, batch(0)), run(plain, batch(0))) <= 1e-13
    assert_same_buffers(ours, plain)
    assert int(ours.conv_proj_q.bn.num_batches_tracked) == 0


def test_one_frozen_branch_runs_unfused():
    ours, plain = pair()
    for module in (ours, plain):
        module.conv_proj_k.bn.eval()
    assert ours.fusion_obstacles() == ["the batch norms of q, k and v are in different modes"]
    for step in range(2):
        assert relative_l2(run(ours, batch(step)), run(plain, batch(step))) <= 1e-13
    assert_same_buffers(ours, plain)


class FrozenBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, CHANNELS))

    def forward(self, x):
        return x * 2 + self.shift[:, None, None]


@pytest.mark.parametrize("replacement", [nn.Identity, FrozenBatchNorm, lambda: nn.InstanceNorm2d(CHANNELS)])
def test_a_foreign_normalisation_is_called(replacement):
    ours, plain = pair(lambda bn: replacement())
    name = type(replacement()).__name__
    assert f"q's batch norm is a {name}, expected BatchNorm2d or SyncBatchNorm" in ours.fusion_obstacles()
    assert relative_l2(run(ours, batch(0)), run(plain, batch(0))) <= 1e-13


def test_a_single_value_per_channel_cannot_be_trained_on():
    ours, _ = pair()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.zeros(1, 2, CHANNELS, dtype=torch.float64), 1, 1)


def test_gradients_of_one_image_do_not_depend_on_fusion():
    # What PyTorch's CPU batch norm gets wrong with gradients in some memory layouts must not show in the unfused path.
    fused, _ = pair()
    unfused, _ = pair()
    unfused.conv_proj_q.register_forward_hook(lambda *_: None)
    assert unfused.fusion_obstacles() == ["conv_proj_q has hooks"]
    for mode in (True, False):
        grads = []
        for module in (fused.train(mode), unfused.train(mode)):
            x = batch(0, size=1).requires_grad_()
            y = run(module, x)
            grads.append(torch.autograd.grad((y * batch(5, size=1)).sum(), x)[0])
        assert relative_l2(*grads) <= 1e-12


@pytest.fixture
def process_group(request):
    """A process group of as many processes as asked for, of which only this one exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_synchronised_in_a_group_of_one_is_fused(process_group):
    ours, _ = pair(nn.SyncBatchNorm.convert_sync_batchnorm)
    _, plain = pair()
    assert ours.fusion_obstacles() == []
    assert relative_l2(run(ours, batch(0)), run(plain, batch(0))) <= 1e-13
    assert_same_buffers(ours, plain)


@pytest.mark.parametrize("process_group", [2], indirect=True)
def test_synchronised_among_processes_calls_the_modules(process_group):
    ours, _ = pair(nn.SyncBatchNorm.convert_sync_batchnorm)
    assert "q's batch norm exchanges statistics between processes" in ours.fusion_obstacles()
    # Its own forward answers: between processes it takes GPU tensors only.
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        run(ours, batch(0))
    ours.eval()
    assert ours.fusion_obstacles() == []
    _, plain = pair()
    assert relative_l2(run(ours, batch(0)), run(plain.eval(), batch(0))) <= 1e-13
