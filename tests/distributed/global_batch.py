""" Training with a global batch, by one process or by each of several ranks. """
import contextlib
from functools import partial
from typing import Callable, Dict, Optional
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import timm

import timm_ait
from timm_ait.layers import GlobalWorkspace, WorkspaceMlp

from .one_memory import shard, workspaces

SMALL = dict(num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=20, global_batch=True)


def vit(depth: int = 2, **kwargs) -> nn.Module:
    return timm.create_model('test_ait', img_size=16, depth=depth, num_classes=5, **{**SMALL, **kwargs})


class MaskedClassifier(nn.Module):
    """Classifies images by those patches that are not black; the others are masked."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 4, 4)
        self.mlp = WorkspaceMlp(24, **{**SMALL, **kwargs})
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = F.max_pool2d(x.abs().amax(dim=1), 4).flatten(1) > 0
        tokens = self.mlp(self.embed(x).flatten(2).transpose(1, 2), mask) * mask.unsqueeze(-1)
        return self.head(tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1))


def images(seed: int, batch_size: int, black: bool = False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, 3, 16, 16, generator=generator, dtype=torch.float64)
    if black:
        visible = torch.rand(batch_size, 1, 4, 4, generator=generator) > 0.4
        visible[-1] = False
        x = x * visible.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return x, torch.randint(5, (batch_size,), generator=generator)


def train(
        rank: int = 0,
        num_ranks: int = 1,
        make_model: Callable[..., nn.Module] = vit,
        batch_size: int = 6,
        num_batches: int = 1,
        black: bool = False,
        checkpointing: bool = False,
        fsdp: bool = False,
        bucket_cap_mb: Optional[float] = None,
        **workspace_kwargs,
) -> Dict[str, torch.Tensor]:
    """Two steps of SGD in float64, on the rank's share of the images, by one process where there is one rank.

    Where the batch size does not divide, the last ranks get one image less; gradients of `num_batches` are accumulated
    in each step. With small buckets (`bucket_cap_mb`), DDP's collectives run between those of the workspaces, which get
    the `workspace_kwargs` and have their gates opened.

    Returns:
        'loss' per step, of this rank, 'gradient', 'memory' and 'coverage' (flat) of all steps.
    """
    torch.manual_seed(0)
    model = make_model(**workspace_kwargs).double()
    for workspace in workspaces(model):
        if workspace.gate is not None:
            nn.init.constant_(workspace.gate, 0.5)
    if checkpointing:
        model.set_grad_checkpointing()
    net = model
    if num_ranks > 1 and fsdp:
        net = shard(model)
    elif num_ranks > 1:
        net = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results = {'loss': [], 'gradient': [], 'memory': [], 'coverage': []}
    for step in range(2):
        for i in range(num_batches):
            x, y = (tensor.tensor_split(num_ranks)[rank] for tensor in images(10 * step + i, batch_size, black))
            is_last = i + 1 == num_batches
            with contextlib.nullcontext() if is_last or num_ranks == 1 else net.no_sync():
                # a rank's images count as much as any other's
                criterion = F.cross_entropy(net(x), y, reduction='sum') * num_ranks / batch_size
                loss = criterion + timm_ait.balance_loss(model)
                (loss / num_batches).backward()
        results['loss'].append(loss.detach())
        gradients = [parameter.grad for parameter in model.parameters()]
        if num_ranks > 1 and fsdp:
            gradients = [gradient.full_tensor() for gradient in gradients]
        results['gradient'] += [gradient.flatten() for gradient in gradients]
        optimizer.step()
        optimizer.zero_grad()
        results['memory'] += [workspace.memory.flatten() for workspace in workspaces(model)]
        results['coverage'] += [workspace.coverage for workspace in workspaces(model)]
    return {
        'loss': torch.stack(results['loss']),
        'gradient': torch.cat(results['gradient']),
        'memory': torch.cat(results['memory']),
        'coverage': torch.stack(results['coverage']),
    }


# arguments of `train`
TRAININGS = {
    'count': dict(),
    'more than a rank has': dict(bottleneck=60),
    'more than all have': dict(bottleneck=1000),
    'uneven shares, fraction': dict(batch_size=5, bottleneck=0.2),
    'a rank without images': dict(batch_size=1),
    'a rank without images, fraction': dict(batch_size=1, bottleneck=0.2),
    'many buckets, a rank without images': dict(depth=4, bucket_cap_mb=1e-3, batch_size=1),
    'accumulation': dict(num_batches=2),
    'checkpointing': dict(checkpointing=True),
    'masks, fraction': dict(make_model=MaskedClassifier, black=True, bottleneck=0.3),
    'gated, masks': dict(make_model=MaskedClassifier, black=True, gated=True),
    'other options': dict(num_slots=24, memory_update='normalize', retrieval_steps=2),
    'fsdp': dict(fsdp=True),
    'without': dict(global_batch=False),
}


def record_traffic(rank: int, num_ranks: int) -> Dict[str, Dict[str, int]]:
    """Bytes that a rank hands to collectives in a step of one workspace, by a bottleneck's kind and its phase."""
    sent = []

    def recording(collective):
        def record(*args, **kwargs):
            tensor = args[1] if collective.__name__ == 'all_gather' else args[0]
            sent.append(tensor.numel() * tensor.element_size())
            return collective(*args, **kwargs)
        return record

    def sent_by(function):
        sent.clear()
        result = function()
        return result, sum(sent)

    traffic = {}
    with mock.patch.multiple(dist, all_reduce=recording(dist.all_reduce), all_gather=recording(dist.all_gather)):
        for kind, kwargs in {
            'count': dict(bottleneck=20),
            'fraction': dict(bottleneck=10 / (48 * num_ranks)),
            'without': dict(global_batch=False),
        }.items():
            workspace = GlobalWorkspace(24, **{**SMALL, **kwargs})
            workspace.process_group = dist.group.WORLD
            optimizer = torch.optim.SGD(workspace.parameters(), lr=0.1)
            output, forward = sent_by(lambda: workspace(torch.randn(3, 16, 24)))
            loss = output.square().mean() + timm_ait.balance_loss(workspace)
            traffic[kind] = dict(forward=forward, backward=sent_by(loss.backward)[1], step=sent_by(optimizer.step)[1])
    return traffic


SCENARIOS = {
    **{name: partial(train, **kwargs) for name, kwargs in TRAININGS.items()},
    'traffic': record_traffic,
}
