""" When the memory moves: with the parameters, once per optimizer step. """
import sys
import warnings
import weakref
from typing import Any, List

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from timm_ait.ops.memory import project_memory

__all__ = ['advance_memory', 'register_workspace', 'world_size']

# steps of optimizers that leave a written memory where it is, before a warning
_MAX_STEPS_WITHOUT_ADVANCE = 100

# every workspace there is, also copied and unpickled ones
_workspaces: 'weakref.WeakSet[nn.Module]' = weakref.WeakSet()


def register_workspace(workspace: nn.Module) -> None:
    """Let the memory of a layer advance with its parameters.

    It has the buffers `memory` and `pending`, the written memory, which is not finite where there is none.
    """
    workspace.steps_without_advance = 0
    _workspaces.add(workspace)


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def advance_memory(model: nn.Module) -> None:
    """Make what the last training forward wrote the memory of every workspace of a model.

    PyTorch's optimizers do this when they step, for the workspaces whose parameters they hold: this is for loops
    without one, and for optimizers that hold copies of the parameters. Under a process group every rank must call it,
    since the ranks' memories are averaged.
    """
    _advance([module for module in model.modules() if module in _workspaces])


@torch.no_grad()
def _advance(workspaces: List[nn.Module]) -> None:
    if workspaces and world_size() > 1:
        _average_over_ranks(workspaces)
    for workspace in workspaces:
        memory, pending = workspace.memory, workspace.pending
        # a non-finite batch shows in its own loss; the memory must outlive it
        memory.copy_(torch.where(pending.isfinite().all(), pending, memory))
        pending.fill_(float('nan'))
        workspace.steps_without_advance = 0


def _average_over_ranks(workspaces: List[nn.Module]) -> None:
    """Average what the ranks wrote, in one collective of M * D + 1 numbers per workspace."""
    parts = []
    for workspace in workspaces:
        finite = workspace.pending.isfinite().all()
        parts += [torch.where(finite, workspace.pending, 0.).flatten(), finite.view(1)]
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.cat([part.to(dtype) for part in parts])
    dist.all_reduce(total)
    sums = total.split([part.numel() for part in parts])
    for workspace, written, num_ranks in zip(workspaces, sums[::2], sums[1::2]):
        # not finite where no rank wrote
        mean = (written / num_ranks).view_as(workspace.pending)
        if not workspace.global_batch:  # else all ranks wrote the same, and a second projection may move it (M > D)
            mean = project_memory(mean, workspace.memory_update)
        workspace.pending.copy_(mean)


def _held_workspaces(optimizer: torch.optim.Optimizer) -> List[nn.Module]:
    """Workspaces of which an optimizer holds parameters, in the order of these, which is that of all ranks."""
    owners = {parameter: workspace for workspace in _workspaces for parameter in workspace.parameters()}
    held = (owners.get(parameter) for group in optimizer.param_groups for parameter in group['params'])
    return list(dict.fromkeys(workspace for workspace in held if workspace is not None))


def _is_within_another_step() -> bool:
    """Whether another optimizer, which calls the hook after this one, makes this step (`ZeroRedundancyOptimizer`).

    This one then holds parameters of other layers on each rank, and the ranks must not average those.
    """
    frame = sys._getframe(2)  # PyTorch's wrapper of a step, which called the hook
    wrapper = frame.f_code
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is wrapper:
            return True
    return False


def _advance_with_parameters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _workspaces:
        return
    # fused optimizers are called for a step that the gradient scaler skips, and skip it themselves
    found_inf = getattr(optimizer, 'found_inf', None)
    if found_inf is not None and float(found_inf) > 0:
        return
    if world_size() > 1 and _is_within_another_step():
        return
    held = _held_workspaces(optimizer)
    _advance(held)
    for workspace in set(_workspaces).difference(held):
        workspace.steps_without_advance += 1
        if workspace.steps_without_advance == _MAX_STEPS_WITHOUT_ADVANCE:
            workspace.steps_without_advance = 0
            if workspace.training and bool(workspace.pending.isfinite().all()):
                warnings.warn(
                    f'The memory of a workspace was written, but did not advance in {_MAX_STEPS_WITHOUT_ADVANCE} steps '
                    'of optimizers, since none holds its parameters (copies of them, perhaps). Call '
                    'timm_ait.advance_memory(model) after each step.')


register_optimizer_step_post_hook(_advance_with_parameters)
