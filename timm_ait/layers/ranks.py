""" Which processes train a model together, and what their workspaces exchange. """
import functools
from typing import NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad, ctx.group), None


class ProcessGroups(NamedTuple):
    """The ranks of one group, or of the dimensions of a mesh, and what they exchange."""
    groups: Tuple['dist.ProcessGroup', ...]

    @property
    def rank(self) -> int:
        rank, size = 0, 1
        for group in self.groups:
            rank, size = rank + size * dist.get_rank(group), size * dist.get_world_size(group)
        return rank

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """What all give, added up. So is the gradient, since every rank's loss depends on what each of them gives."""
        for group in self.groups:
            x = _AllReduce.apply(x, group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """What all give, of one shape (R, n), side by side, without gradient."""
        for group in self.groups:
            gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, x.contiguous(), group=group)
            x = torch.cat(gathered, dim=1)
        return x


def ranks_of(workspace: nn.Module) -> Optional[ProcessGroups]:
    """The ranks that train a workspace together: those of its `process_group`, of DDP, or of FSDP's mesh.

    Where none of these is known and the layer has a global batch, all ranks, as in `torch.nn.SyncBatchNorm`. None for a
    workspace that a single process trains.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    meshes = [parameter.device_mesh for parameter in workspace.parameters() if hasattr(parameter, 'device_mesh')]
    groups = (workspace.process_group,) if workspace.process_group else workspace.wrapper_groups
    if not groups and meshes:
        groups = meshes[0].get_all_groups()
    elif not groups and workspace.global_batch:
        groups = (dist.group.WORLD,)
    groups = tuple(group for group in groups if dist.get_world_size(group) > 1)
    return ProcessGroups(groups) if groups else None


def _wrap(cls: type, name: str) -> None:
    """Let this method of a wrapper tell the workspaces inside of it over which processes it averages gradients."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def call_and_note_group(self, *args, **kwargs) -> None:
        method(self, *args, **kwargs)
        # FSDP shards over one group and, if it is hybrid, averages over another
        groups = tuple(filter(None, (getattr(self, group, None) for group in ('process_group', '_inter_node_pg'))))
        for module in self.modules():
            if getattr(type(module), 'is_workspace', False):
                module.wrapper_groups = groups

    setattr(cls, name, call_and_note_group)


if dist.is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for wrapper_cls in (DistributedDataParallel, FullyShardedDataParallel):
        _wrap(wrapper_cls, '__init__')
        _wrap(wrapper_cls, '__setstate__')  # of a copy
