""" The balance loss in timm's training tasks, and so in its unmodified train.py.

timm's `TrainingTask` computes the loss of a step. Importing timm_ait gives every task a forward hook that adds the
balance loss of the workspaces in the task's trainable module, before anything scales or divides the loss: mixed
precision, loss scaling and gradient accumulation treat it as they treat the criterion.
"""
import functools
from typing import Any, Dict, Tuple

import torch.nn as nn

from timm.task import TrainingTask

from timm_ait.layers import GlobalWorkspace, balance_loss

__all__ = ['install_balance_loss']


def _add_balance_loss(task: TrainingTask, inputs: Tuple[Any, ...], result: Dict[str, Any]) -> Dict[str, Any]:
    model = task.get_trainable_module()
    if model.training and any(isinstance(module, GlobalWorkspace) and module.writes for module in model.modules()):
        balance = balance_loss(model)
        result = {**result, 'loss': result['loss'] + balance, 'balance_loss': balance}
    return result


def install_balance_loss() -> None:
    """Make every timm training task created from now on add the balance loss. Calling it again changes nothing."""
    init = TrainingTask.__init__
    if getattr(init, 'adds_balance_loss', False):
        return

    @functools.wraps(init)
    def init_with_balance_loss(self: nn.Module, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.register_forward_hook(_add_balance_loss)

    init_with_balance_loss.adds_balance_loss = True
    TrainingTask.__init__ = init_with_balance_loss
