""" Associative Transformer (AiT) for timm. Importing this package registers its models with timm, adds the balance loss
to timm's training tasks, and lets optimizers, DDP and FSDP keep the memories in step. """
from . import analysis
from .layers import GlobalWorkspace, advance_memory, balance_loss, memory_statistics
from .models import AssociativeTransformer, add_workspace
from .training import install_balance_loss
from .version import __version__

install_balance_loss()
