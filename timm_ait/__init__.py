""" Associative Transformer (AiT) for timm. Importing this package registers its models with timm. """
import importlib
from types import ModuleType
from typing import List

from .layers import GlobalWorkspace, advance_memory, balance_loss, memory_statistics
from .models import AssociativeTransformer, add_workspace
from .training import install_balance_loss
from .version import __version__

install_balance_loss()


def __getattr__(name: str) -> ModuleType:
    if name == 'analysis':  # imported when it is first used
        return importlib.import_module('.analysis', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), 'analysis'})
