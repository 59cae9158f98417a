""" The published layer: what its implementation computes in training, and its weights.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
import math
from typing import Dict, Optional, Union

import torch

from .workspace import GlobalWorkspace, WorkspaceMlp


class PublishedWorkspace(GlobalWorkspace):
    """The workspace exactly as the published implementation computes it in training.

    No gradient flows through the write, memory rows are normalised but not kept apart, and the memory advances in
    forward. Evaluation is ours: frozen.
    """

    def __init__(self, dim: int, bottleneck: Union[int, float] = 512, **kwargs) -> None:
        """As `GlobalWorkspace`, except for `memory_update` and `differentiable_write`, which are the published ones."""
        super().__init__(dim, bottleneck=bottleneck, memory_update='normalize', differentiable_write=False, **kwargs)

    def _keep(self, memory: torch.Tensor, candidate: torch.Tensor, written: torch.Tensor) -> None:
        # it averages in place, into the memory that backward has saved for W_Q
        memory.data.lerp_(candidate, 1. - self.memory_momentum)
        self.memory.copy_(torch.where(written.isfinite().all(), written.to(self.memory.dtype), self.memory))
        self.num_writes = 0


def published_workspace_mlp(in_features: int, hidden_features: Optional[int] = None, **kwargs) -> WorkspaceMlp:
    """The MLP and workspace of the published implementation, for tokens of width E = `in_features`.

    The hidden width is E by default; the other arguments are those of `PublishedWorkspace`.

    Raises:
        ValueError: An argument is out of its range.
    """
    mlp = WorkspaceMlp(in_features, hidden_features)
    mlp.workspace = PublishedWorkspace(in_features, **kwargs)
    return mlp


def convert_published_workspace(state_dict: Dict[str, torch.Tensor], workspace_heads: int) -> Dict[str, torch.Tensor]:
    """Turn the state dict of one published layer into one that `published_workspace_mlp` loads.

    The published code concatenates heads slot-dim-major, ours head-major, so the columns of its output projection are
    permuted.

    Args:
        state_dict: Keys fc1, fc2, norm, fc3, memoryupdate.*; without further prefix.
        workspace_heads: Number of write heads of the published layer.

    Raises:
        ValueError: A key is unknown, the heads do not divide the projection, or the momentum (which the published code
            stores as `memoryupdate.beta`) is not 0.9.
    """
    names = {
        'fc1': 'fc1',
        'fc2': 'fc2',
        'norm': 'workspace.norm',
        'fc3': 'workspace.attractors',
        'memoryupdate': 'workspace',
        'memoryupdate.mha.w_qs': 'workspace.q',
        'memoryupdate.mha.w_ks': 'workspace.k',
        'memoryupdate.mha.w_vs': 'workspace.v',
        'memoryupdate.mha.fc': 'workspace.proj',
        'memoryupdate.mha.layer_norm': 'workspace.slot_norm',
    }
    converted = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition('.')
        if module not in names:
            raise ValueError(f'state_dict is not that of a published layer: unknown key {key!r}.')
        if key == 'memoryupdate.beta':
            if not math.isclose(float(value), 0.9, rel_tol=1e-6):
                raise ValueError(f'{key} must be 0.9, the published momentum, got {float(value)}.')
            continue
        if module == 'memoryupdate.mha.fc':
            if workspace_heads < 1 or value.shape[1] % workspace_heads:
                raise ValueError(
                    f'workspace_heads must divide {value.shape[1]}, the width of the heads together, got '
                    f'{workspace_heads}.')
            value = value.unflatten(1, (-1, workspace_heads)).transpose(1, 2).flatten(1)
        converted[f'{names[module]}.{name}'] = value
    return converted
