"""Two gloo processes train as one process does on the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
import training_worlds
from training_models import assert_close


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes, started once, left the results of all checks."""
    folder = str(tmp_path_factory.mktemp("world"))
    torch.multiprocessing.spawn(training_worlds.run, (folder,), nprocs=training_worlds.PROCESSES)
    return folder


@pytest.mark.parametrize("check", [c for c in training_worlds.CHECKS if not c.startswith("sync")])
def test_parameters_after_steps(folder, check):
    found = torch.load(f"{folder}/{check}.pt", weights_only=False)
    if isinstance(found, Exception):
        raise found
    model = training_worlds.model_for(check.split()[1])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "proj_norm" not in n}
    training_worlds.train(model)
    after = {n: p.detach() for n, p in model.named_parameters()}
    moves = {n: after[n] - p for n, p in before.items()}
    assert max(float(m.norm()) for m in moves.values()) > 1e-4
    # What the steps did, not the parameters: those hardly move. Adding to a parameter rounds at its own size.
    for n, move in moves.items():
        rounding = 10 * torch.finfo(torch.float32).eps * float(after[n].norm())
        assert float((found[n] - after[n]).norm()) <= 1e-3 * float(move.norm()) + rounding, n
    assert_close({n: t for n, t in found.items() if n in before}, {n: after[n] for n in before}, 1e-6)


def test_synchronised_batch_norm_takes_gpus(folder):
    message = torch.load(f"{folder}/sync_batch_norm cvt_13.pt", weights_only=False)
    assert "SyncBatchNorm expected input tensor to be on" in message
