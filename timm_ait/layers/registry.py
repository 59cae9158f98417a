""" Which workspaces there are. """
import threading
import weakref
from typing import List, Tuple

import torch.nn as nn

__all__ = ['all_workspaces', 'named_workspaces', 'register_workspace']

# both outlive a reload of this module
_lock = globals().setdefault('_lock', threading.Lock())
_registered = globals().setdefault('_registered', weakref.WeakSet())


def register_workspace(workspace: nn.Module) -> None:
    """Note a workspace, also a copied or unpickled one."""
    with _lock:
        _registered.add(workspace)


def all_workspaces() -> List[nn.Module]:
    """Every workspace there is; other threads may make and drop some meanwhile."""
    with _lock:
        return list(_registered)


def named_workspaces(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Workspaces of a model, also those of a class that was reloaded since."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, 'is_workspace', False)]
