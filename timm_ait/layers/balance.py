""" The balance loss of a model, and how its memories are. """
import contextlib
import warnings
import weakref
from contextvars import ContextVar
from functools import partial
from typing import Dict, Iterator, List, Optional

import torch
import torch.nn as nn

from .advance import named_workspaces

_record: ContextVar[Optional[List[torch.Tensor]]] = ContextVar('balance_losses', default=None)


def _release(of_workspace: weakref.ref, of_loss: weakref.ref, grad: torch.Tensor) -> None:
    """Hook of a loss: let its workspace keep only the value once the gradient was computed."""
    workspace = of_workspace()
    if workspace is not None and workspace.balance is of_loss():
        workspace.release_balance()


def _warn_of_a_value(grad: torch.Tensor) -> None:
    warnings.warn(
        'The balance loss in this backward is that of an earlier step and has no gradient: call balance_loss(model) '
        'after each forward, and before its backward.', stacklevel=2)


def balance_loss(model: nn.Module) -> torch.Tensor:
    """Weighted balance loss (scalar), summed over the workspaces, each of its last training forward with gradient.

    In your own training loop, add it to the criterion after each forward; timm's training tasks do so themselves. It is
    zero if no workspace wrote: in evaluation, or where the write is frozen. A workspace that the forward used several
    times, each use feeding the next, counts with all of them; compiled or parallel uses count with the last. The graph
    is kept until the backward, the next forward, `train()`, `eval()` or the optimizer's step; from then on the loss is
    only its value, and a backward through it warns.
    """
    losses = [
        (workspace, workspace.balance) for _, workspace in named_workspaces(model)
        if workspace.training and workspace.balance is not None]
    # values beside losses with a gradient are of an earlier forward
    alive = [(workspace, loss) for workspace, loss in losses if loss.requires_grad]
    if not torch.compiler.is_compiling():
        for workspace, loss in alive:
            loss.register_hook(partial(_release, weakref.ref(workspace), weakref.ref(loss)))
            workspace._balance_node = None  # asked for, so the next forward does not add it
    device = losses[0][1].device if losses else next((parameter.device for parameter in model.parameters()), None)
    total = sum([loss.to(device) for _, loss in alive or losses], torch.zeros((), device=device))
    is_weighted = any(workspace.balance_weight for workspace, _ in losses)
    if is_weighted and not alive and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        total = total.detach().requires_grad_()
        total.register_hook(_warn_of_a_value)
    record = _record.get()
    if record is not None:
        record.append(total)
    return total


@contextlib.contextmanager
def record_balance_losses() -> Iterator[List[torch.Tensor]]:
    """List the balance losses that are asked for meanwhile."""
    token = _record.set([])
    try:
        yield _record.get()
    finally:
        _record.reset(token)


def memory_statistics(model: nn.Module) -> Dict[str, Dict[str, float]]:
    """`GlobalWorkspace.memory_statistics` of every workspace of a model, by module name."""
    return {name: module.memory_statistics() for name, module in named_workspaces(model)}
