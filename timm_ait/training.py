""" The balance loss in timm's training tasks, and so in its unmodified train.py.

timm's `TrainingTask` computes the loss of a step. Importing timm_ait wraps its call: the balance loss of the workspaces
in the task's trainable module is added before anything scales or divides the loss, so that mixed precision, loss
scaling and gradient accumulation treat it as they treat the criterion.
"""
import functools
import logging
from typing import Any, Dict

from timm.task import TrainingTask

from timm_ait.layers.advance import named_workspaces
from timm_ait.layers.balance import balance_loss, record_balance_losses
from timm_ait.ops.graph import depends_on

_logger = logging.getLogger(__name__)
_LOG_INTERVAL = 50  # batches, as timm's --log-interval


def install_balance_loss() -> None:
    """Make every timm training task add the balance loss to its 'loss', and name it as 'balance_loss'.

    Tasks that add `balance_loss(model)` themselves are left alone. Calling it again changes nothing.
    """
    call = TrainingTask.__call__
    if getattr(call, 'adds_balance_loss', False):
        return

    @functools.wraps(call)
    def call_and_add(self: TrainingTask, *args, **kwargs) -> Dict[str, Any]:
        with record_balance_losses() as asked_for:
            result = call(self, *args, **kwargs)
        model = self.get_trainable_module()
        if model is None or not model.training or not any(layer.writes for _, layer in named_workspaces(model)):
            return result
        balance, loss = balance_loss(model), result['loss']
        is_added = any(loss is part for part in asked_for) or depends_on(loss, {part.grad_fn for part in asked_for})
        if not is_added:
            loss = loss + balance.to(loss.device)
        batch = self._num_balance_losses = getattr(self, '_num_balance_losses', -1) + 1
        if self.verbose and batch % _LOG_INTERVAL == 0:  # since train.py reports one figure
            whole, part = float(loss.detach()), float(balance.detach())
            _logger.info(f'Of the training loss {whole:#.4g}, {part:#.4g} is the balance loss.')
        return {**result, 'loss': loss, 'balance_loss': balance.detach()}

    call_and_add.adds_balance_loss = True
    TrainingTask.__call__ = call_and_add
