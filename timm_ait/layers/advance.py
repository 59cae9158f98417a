""" When the memory moves: with the parameters, once per optimizer step. """
import functools
import sys
import warnings
import weakref
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from timm_ait.ops.memory import project_memory

from .ranks import ProcessGroups, ranks_of
from .registry import all_workspaces, named_workspaces

__all__ = ['advance_memory', 'count_write']

# forwards that write without the memory moving, before a warning
_MAX_WRITES = 100

_state = globals().setdefault('_state', {  # outlives a reload of this module
    'held': weakref.WeakKeyDictionary(),  # by optimizer, see `_held_workspaces`
    'parts': weakref.WeakSet(),  # optimizers inside of others, which make their steps
    'num_steps': 0,  # of optimizers
    'warned_at': None,  # number of steps then
    'hooks': [],
})


def count_write(workspace: nn.Module) -> None:
    """Count a forward that wrote, and warn if the memory does not move though optimizers step."""
    if workspace.num_writes == 0:
        workspace.num_steps = _state['num_steps']
    workspace.num_writes += 1
    others_stepped = not workspace.has_optimizer and _state['num_steps'] > workspace.num_steps
    has_stalled = workspace.num_writes == _MAX_WRITES and others_stepped
    if has_stalled and _state['warned_at'] != _state['num_steps']:  # once for all workspaces of a model
        _state['warned_at'] = _state['num_steps']
        warnings.warn(
            f'The memory of a workspace was written in {_MAX_WRITES} forwards and did not move: no optimizer that has '
            'stepped holds its parameters. Create the optimizer after the workspaces; where it holds copies of the '
            'parameters, call timm_ait.advance_memory(model) after each step; freeze a workspace that is not to be '
            'trained, by requires_grad_(False) or eval().',
            stacklevel=2)


def advance_memory(model: nn.Module) -> None:
    """Move the memories of a model to the mean of what its training forwards wrote since the last step.

    PyTorch's optimizers do this when they step, for the workspaces whose parameters they hold. Call it in a training
    loop without such an optimizer, or if the optimizer holds copies of the parameters. If several processes train the
    model, all of them must call it, since their memories are averaged.
    """
    _advance([workspace for _, workspace in named_workspaces(model)])


@torch.no_grad()
def _advance(workspaces: List[nn.Module], found_inf: Optional[torch.Tensor] = None) -> None:
    """Move memories to the mean of what was written, unless a scaler has found its gradients not to be finite."""
    together: Dict[Tuple, Tuple[ProcessGroups, List[nn.Module]]] = {}
    for workspace in workspaces:
        ranks = ranks_of(workspace)
        if ranks is not None:
            together.setdefault(ranks.groups, (ranks, []))[1].append(workspace)
        elif workspace.written is not None:
            total, count = workspace.written
            if count.device.type != 'cpu' or count > 0:  # to ask another device is to wait for it
                _move(workspace, total, count, found_inf)
    for ranks, members in together.values():
        for workspace, (total, count) in zip(members, _sum_over_ranks(members, ranks)):
            _move(workspace, total, count, found_inf)


def _sum_over_ranks(workspaces: List[nn.Module], ranks: ProcessGroups) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """What all ranks wrote, (M, D), and how often (scalar), in one collective of M * D + 1 numbers per workspace."""
    parts = [part.flatten() for workspace in workspaces for part in workspace.written_since_step()]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    sums = ranks.sum(torch.cat([part.to(dtype) for part in parts])).split([part.numel() for part in parts])
    return [
        (total.view_as(workspace.memory), count.view(()))
        for workspace, total, count in zip(workspaces, sums[::2], sums[1::2])]


def _move(
        workspace: nn.Module,
        total: torch.Tensor,
        count: torch.Tensor,
        found_inf: Optional[torch.Tensor],
) -> None:
    moves = count > 0
    if found_inf is not None:
        moves = moves & (found_inf.to(count.device) == 0)
    mean = project_memory(total / count.clamp_min(1), workspace.memory_update)
    workspace.memory.copy_(torch.where(moves, mean.to(workspace.memory.dtype), workspace.memory))
    if workspace.written is not None:
        for part in workspace.written:
            part.masked_fill_(moves, 0)
    workspace.end_step()


def _held_workspaces(optimizer: torch.optim.Optimizer) -> List[nn.Module]:
    """Workspaces of which an optimizer holds parameters, in the order of these, which is that of all ranks.

    Looked up once, and again where its parameters are others.
    """
    identities = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    known, references = _state['held'].get(optimizer, (None, ()))
    if known != identities:
        owners: Dict[torch.Tensor, List[nn.Module]] = {}
        for workspace in all_workspaces():
            for parameter in workspace.parameters():
                owners.setdefault(parameter, []).append(workspace)
        held = [
            workspace for group in optimizer.param_groups for parameter in group['params']
            for workspace in owners.get(parameter, ())]
        for workspace in held:
            workspace.has_optimizer = True
        references = [weakref.ref(workspace) for workspace in dict.fromkeys(held)]
        _state['held'][optimizer] = identities, references
    return [workspace for workspace in (reference() for reference in references) if workspace is not None]


def _before_step(optimizer: torch.optim.Optimizer) -> None:
    """Note the part of a `ZeroRedundancyOptimizer`: it holds other layers' parameters on each rank, its whole all."""
    part = getattr(optimizer, 'optim', None)
    if isinstance(part, torch.optim.Optimizer):
        _state['parts'].add(part)


def _after_step(optimizer: torch.optim.Optimizer) -> None:
    _state['num_steps'] += 1
    if optimizer not in _state['parts']:
        held = _held_workspaces(optimizer)
        if held:
            # fused optimizers are called for a step that the gradient scaler skips, and skip it themselves
            _advance(held, getattr(optimizer, 'found_inf', None))


for hook in _state['hooks']:
    hook.remove()
_state['hooks'] = [
    register_optimizer_step_pre_hook(lambda optimizer, *_: sys.modules[__name__]._before_step(optimizer)),
    register_optimizer_step_post_hook(lambda optimizer, *_: sys.modules[__name__]._after_step(optimizer)),
]
