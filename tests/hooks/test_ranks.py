"""Several ranks: the first decides, all end with the same weights."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torch_prepared.certify import Verdict
from torch_prepared.hooks import EditHook, EverySteps, Outcome, PreparedModule, attach
from torch_prepared.testing.hook import flipped_corner, impossible, small_network, two_moons_like

RANKS = 2


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    x, y = (part[rank::RANKS] for part in two_moons_like())
    model = DistributedDataParallel(small_network())
    hook = EditHook(
        flipped_corner(), schedule=EverySteps(2), optimizer_state="project", time_limit=20
    )
    failing = EditHook(impossible(), schedule=EverySteps(2), on_failure="warn")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with attach(hook, model, optimizer) as loop:
        for step in range(1, 5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            failing.after_step(model, step)
    prepared = DistributedDataParallel(PreparedModule(small_network(), flipped_corner()))
    F.cross_entropy(prepared(x), y).backward()
    found = {
        "weights": nn.utils.parameters_to_vector(model.parameters()).detach(),
        "gradient": torch.cat([p.grad.flatten() for p in prepared.parameters()]),
        "momentum": torch.cat(
            [optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
        ),
        "outcomes": [record.outcome.value for record in hook.records],
        "failed": [record.outcome.value for record in failing.records],
        "certified": loop.result.status is Verdict.CERTIFIED,
    }
    torch.save(found, f"{folder}/{rank}.pt")
    del model, prepared, optimizer, loop, hook, failing  # before their process group goes
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_under_distributed_data_parallel(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(RANKS))
    for name in ("weights", "gradient", "momentum"):
        assert torch.equal(first[name], second[name]), name
    for name in ("outcomes", "failed", "certified"):
        assert first[name] == second[name]
    assert Outcome.EDITED.value in first["outcomes"]
    assert first["failed"] == ["failed", "failed"]
    assert first["certified"]
