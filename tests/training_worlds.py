"""What each of two processes does in the tests of distributed training; results go to files of the given folder."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_models import MODELS, WITHOUT_BATCH_NORM, batch, small

STEPS, PROCESSES = 3, 2


def model_for(name, **overrides):
    """Statistics of half a batch are not those of the whole, so batch norms are frozen."""
    model = small(name, **overrides)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def train(model, part=slice(None)):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(4, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def _ddp(name, part):
    model = model_for(name)
    train(DistributedDataParallel(model), part)
    return {n: t.detach() for n, t in model.state_dict().items()}


def _fsdp(name, part):
    model = model_for(name)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in list(model.modules()):
        if type(module).__name__ == "Block":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, part)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return {n: t.full_tensor().detach() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}


def _sync_batch_norm(name, part):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small(name))
    try:
        train(model, part)
    except ValueError as error:
        return str(error)
    return "no error"


CHECKS = {
    **{f"ddp {name}": (_ddp, name) for name in MODELS},
    **{f"fsdp {name}": (_fsdp, name) for name in ("cvt_13", *WITHOUT_BATCH_NORM[:2])},
    "sync_batch_norm cvt_13": (_sync_batch_norm, "cvt_13"),
}


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    part = slice(2 * rank, 2 * rank + 2)
    for check, (function, name) in CHECKS.items():
        try:
            result = function(name, part)
        except Exception as error:  # the other checks still run; the test of this one shows the error
            result = error.__class__(str(error))
        if rank == 0:
            torch.save(result, f"{folder}/{check}.pt")
    dist.destroy_process_group()
