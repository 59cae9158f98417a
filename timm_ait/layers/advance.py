""" When the memory moves: with the parameters, once per optimizer step. """
import threading
import warnings
import weakref
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from timm_ait.ops.memory import project_memory

from .ranks import ranks_of

_MAX_WRITES = 100  # forwards that write without the memory moving, before a warning

_state = globals().setdefault('_state', {  # outlives a reload of this module
    'lock': threading.Lock(),  # of the workspaces
    'workspaces': weakref.WeakKeyDictionary(),  # all there are, in the order in which they were made
    'held': weakref.WeakKeyDictionary(),  # by optimizer, see `_held_workspaces`
    'parts': weakref.WeakSet(),  # optimizers inside of others, which make their steps
    'num_steps': 0,  # of optimizers
    'warned_at': None,  # number of steps then
    'hooks': [],
})


def register_workspace(workspace: nn.Module) -> None:
    """Note a workspace, also a copied or unpickled one."""
    with _state['lock']:
        _state['workspaces'][workspace] = None


def all_workspaces() -> List[nn.Module]:
    """Every workspace there is, in an order that all ranks have; other threads may make and drop some meanwhile."""
    with _state['lock']:
        return list(_state['workspaces'])


def named_workspaces(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Workspaces of a model, also those of a class that was reloaded since, without wrappers that pass for one."""
    return [(name, module) for name, module in model.named_modules() if getattr(type(module), 'is_workspace', False)]


def count_write(workspace: nn.Module) -> None:
    """Count a forward that wrote, and warn if the memory does not move though optimizers step."""
    register_workspace(workspace)  # a copy may have been made without `__setstate__`
    if workspace.num_writes == 0:
        workspace.num_steps = _state['num_steps']
    workspace.num_writes += 1
    if workspace.num_writes < _MAX_WRITES or workspace.has_optimizer or workspace.num_steps == _state['num_steps']:
        return
    workspace.num_writes = float('-inf')  # no more until the memory moves
    if _state['warned_at'] != _state['num_steps']:  # once for all workspaces of a model
        _state['warned_at'] = _state['num_steps']
        warnings.warn(
            f'The memory of a workspace was written in {_MAX_WRITES} forwards and did not move: no optimizer that has '
            'stepped holds its parameters. Create the optimizer after the workspaces; where it holds copies of the '
            'parameters, call timm_ait.advance_memory(model) after each step (on several ranks, name their '
            'process_group); freeze a workspace that is not to be trained, by requires_grad_(False) or eval().',
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
    written, together = [], {}
    for workspace in workspaces:
        ranks = ranks_of(workspace) if workspace.writes and not workspace.reset_memory else None
        if ranks is not None:
            together.setdefault((ranks.groups, workspace.memory.device), (ranks, []))[1].append(workspace)
        elif workspace.written is not None:
            total, count = workspace.written_since_step()
            if count.device.type != 'cpu' or count > 0:  # to ask another device is to wait for it
                written.append((workspace, total, count))
    for ranks, members in together.values():
        # one collective of M * D + 1 numbers per workspace
        parts = [part.flatten() for workspace in members for part in workspace.written_since_step()]
        sums = ranks.sum(torch.cat(parts)).split([part.numel() for part in parts])
        written += zip(members, sums[::2], sums[1::2])
    for workspace, total, count in written:
        memory, count = workspace.memory, count.view(())
        moves = count > 0
        if found_inf is not None:
            moves = moves & (found_inf.to(count.device) == 0)
        mean = project_memory(total.view_as(memory) / count.clamp_min(1), workspace.memory_update)
        memory.copy_(torch.where(moves, mean.to(memory.dtype), memory))
        for part in workspace.written:
            part.masked_fill_(moves, 0)
    for workspace in workspaces:
        workspace.end_step()


def _held_workspaces(optimizer: torch.optim.Optimizer) -> List[nn.Module]:
    """Workspaces of which an optimizer holds parameters.

    Looked up once, and again when the optimizer's parameters have changed.
    """
    identities = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    known, references = _state['held'].get(optimizer, (None, ()))
    if known != identities:
        of_optimizer = set(identities)
        held = [w for w in all_workspaces() if not of_optimizer.isdisjoint(map(id, w.parameters()))]
        for workspace in held:
            workspace.has_optimizer = True
        references = [weakref.ref(workspace) for workspace in held]
        _state['held'][optimizer] = identities, references
    return [workspace for workspace in (reference() for reference in references) if workspace is not None]


def _before_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """Note the part of a `ZeroRedundancyOptimizer`, which holds a rank's share of the parameters, the whole all."""
    part = getattr(optimizer, 'optim', None)
    if isinstance(part, torch.optim.Optimizer):
        _state['parts'].add(part)


def _after_step(optimizer: torch.optim.Optimizer, *_) -> None:
    _state['num_steps'] += 1
    if optimizer not in _state['parts']:
        # fused optimizers are called for a step that the gradient scaler skips, and skip it themselves
        _advance(_held_workspaces(optimizer), getattr(optimizer, 'found_inf', None))


for hook in _state['hooks']:
    hook.remove()
_state['hooks'] = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
