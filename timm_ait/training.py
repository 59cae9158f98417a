""" The balance loss in timm's training tasks, and so in its unmodified train.py.

timm's `TrainingTask` computes the loss of a step. Importing timm_ait wraps its call: the balance loss of the workspaces
in the task's trainable module is added before anything scales or divides the loss, so that mixed precision, loss
scaling and gradient accumulation treat it as they treat the criterion.
"""
import functools
import logging
from typing import Any, Dict, List

import torch

from timm.task import TrainingTask

from timm_ait.layers import GlobalWorkspace, balance_loss
from timm_ait.layers.workspace import record_balance_losses

__all__ = ['install_balance_loss']

_logger = logging.getLogger(__name__)

# steps between two lines in the log, as timm's --log-interval
_LOG_INTERVAL = 50


def _depends_on_any(loss: torch.Tensor, parts: List[torch.Tensor]) -> bool:
    """Whether a loss was computed from one of the parts."""
    if any(loss is part for part in parts):
        return True
    wanted = {part.grad_fn for part in parts} - {None}
    todo, seen = [loss.grad_fn], set()
    while wanted and todo:
        node = todo.pop()
        if node in wanted:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return False


def _log(task: TrainingTask, loss: torch.Tensor, balance: torch.Tensor) -> None:
    """Say now and then what part of the loss is balance, since train.py reports one figure."""
    step = getattr(task, '_num_balance_losses', 0)
    task._num_balance_losses = step + 1
    if task.verbose and step % _LOG_INTERVAL == 0:
        _logger.info(f'Of the training loss {float(loss):#.4g}, {float(balance):#.4g} is the balance loss.')


def install_balance_loss() -> None:
    """Make every timm training task add the balance loss to its loss. Calling it again changes nothing.

    A task that adds `balance_loss(model)` itself is left alone. The result of a task names the part as 'balance_loss'.
    """
    call = TrainingTask.__call__
    if getattr(call, 'adds_balance_loss', False):
        return

    @functools.wraps(call)
    def call_with_balance_loss(self: TrainingTask, *args, **kwargs) -> Dict[str, Any]:
        with record_balance_losses() as asked_for:
            result = call(self, *args, **kwargs)
        model = self.get_trainable_module()
        if not model.training or not any(isinstance(m, GlobalWorkspace) and m.writes for m in model.modules()):
            return result
        balance = balance_loss(model)
        loss = result['loss']
        if not _depends_on_any(loss, asked_for):
            loss = loss + balance
        _log(self, loss.detach(), balance.detach())
        return {**result, 'loss': loss, 'balance_loss': balance.detach()}

    call_with_balance_loss.adds_balance_loss = True
    TrainingTask.__call__ = call_with_balance_loss
