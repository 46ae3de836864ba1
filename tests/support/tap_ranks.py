"""Run one process of test_tap_distributed.py and write each case's largest error: ``torchrun tap_ranks.py FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import leave
from torch import Tensor, nn

ROWS = (torch.tensor([1, 4, 5, 12, 14]), torch.tensor([0, 2, 3, 9, 13]))  # scored rows of each rank
DDP: dict[str, dict[str, Any]] = {"ddp": {}, "ddp, unused": {"find_unused_parameters": True}, "ddp, static": {"static_graph": True}}


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Return token ids and a teacher's logits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(4, 96, (2, 8), generator=generator), 3 * torch.randn(5, 96, generator=generator)


def loss_of(side: Any, teacher: Tensor) -> Tensor:
    import kdkernels as kd

    return kd.distillation_loss(side, teacher, temperature=2.0, backend="torch")


def expected(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the mean over both ranks' losses, computed in this process from the model's logits."""
    model.zero_grad()
    for rank, rows in enumerate(ROWS):
        ids, teacher = batch(rank)
        (loss_of(model(input_ids=ids).logits.flatten(0, 1)[rows], teacher) / len(ROWS)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def error_of(actual: dict[str, Tensor], expected_gradients: dict[str, Tensor]) -> float:
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    return max((actual[name] - g).abs().max().item() for name, g in expected_gradients.items()) / largest


def replicated(rank: int, options: dict[str, Any]) -> float:
    from families import build

    from kdkernels.tap.head import HeadTap

    model = build("llama")
    expected_gradients = expected(model)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    tap = HeadTap(wrapped)
    ids, teacher = batch(rank)
    errors = []
    for _ in range(2):  # DDP rebuilds its buckets after the first step
        model.zero_grad()
        tap(wrapped, lambda tapped: loss_of(tapped.side(ROWS[rank]), teacher), input_ids=ids).backward()
        errors.append(error_of({name: p.grad for name, p in model.named_parameters()}, expected_gradients))
    assert tap.fallback_reason is None
    return max(errors)


def sharded(rank: int, tied: bool, reshard: bool) -> float:
    from families import build
    from torch.distributed.fsdp import fully_shard

    from kdkernels.tap.head import HeadTap

    model = build("llama", tie_word_embeddings=tied)
    expected_gradients = expected(model)
    model.zero_grad()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=reshard)
    tap = HeadTap(model)
    ids, teacher = batch(rank)
    errors = []
    for _ in range(2):
        model.zero_grad()  # parameters are sharded here
        loss = tap(model, lambda tapped: loss_of(tapped.side(ROWS[rank]), teacher), input_ids=ids)
        loss.backward()
        errors.append(error_of({name: p.grad.full_tensor() for name, p in model.named_parameters()}, expected_gradients))
    assert tap.fallback_reason is None
    with pytest.raises(ValueError, match=r"is sharded .*give the head tap a finish"):
        tap(model, input_ids=ids)
    with torch.no_grad():  # as a teacher is used
        errors.append(abs(loss_of(tap(model, input_ids=ids).side(ROWS[rank]), teacher).item() / loss.item() - 1))
    return max(errors)


def unsharded_weight(rank: int) -> float:
    """Return the error of an unsharded weight and of its sharded gradient, the mean over ranks that use it differently."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from kdkernels.tap.weights import sharded_like, whole

    full = torch.arange(24.0).view(6, 4)
    parameter = nn.Parameter(distribute_tensor(full, init_device_mesh("cpu", (2,)), [Shard(0)]))
    weight = whole(parameter)
    assert type(weight) is Tensor
    (weight.square() * (1 + 2 * rank)).sum().backward()
    assert torch.equal(sharded_like(parameter, full).to_local(), parameter.to_local())
    return max((weight - full).abs().max().item(), (parameter.grad.full_tensor() - 4 * full).abs().max().item())


def cases(rank: int) -> dict[str, Callable[[], float]]:
    by_name: dict[str, Callable[[], float]] = {name: lambda o=options: replicated(rank, o) for name, options in DDP.items()}
    for tied in (False, True):
        for reshard in (False, True):
            by_name[f"fsdp2, tied={tied}, reshard={reshard}"] = lambda t=tied, r=reshard: sharded(rank, t, r)
    by_name["whole"] = lambda: unsharded_weight(rank)
    return by_name


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = {name: case() for name, case in cases(rank).items()}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
    leave()
