""" The published layer: what its implementation computes in training, and its weights.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
import math
from typing import Dict, Optional, Union

import torch

from .workspace import GlobalWorkspace, WorkspaceMlp

__all__ = ['PublishedWorkspace', 'convert_published_workspace', 'published_workspace_mlp']


class PublishedWorkspace(GlobalWorkspace):
    """The workspace exactly as the published implementation computes it in training.

    No gradient flows through the write, memory rows are normalised but not kept apart, and the memory advances in
    forward. Evaluation is ours: frozen.
    """

    def __init__(self, dim: int, bottleneck: Union[int, float] = 512, **kwargs) -> None:
        """
        Args:
            dim: Token width E.
            bottleneck: As `GlobalWorkspace`, by default the published number of tokens.
            **kwargs: As `GlobalWorkspace`, except for `memory_update` and `differentiable_write`.

        Raises:
            ValueError: An argument is out of its range.
        """
        super().__init__(dim, bottleneck=bottleneck, memory_update='normalize', differentiable_write=False, **kwargs)

    def _keep(self, memory: torch.Tensor, candidate: torch.Tensor, written: torch.Tensor) -> None:
        # it averages in place, into the memory that backward has saved for W_Q
        memory.data.lerp_(candidate, 1. - self.memory_momentum)
        self.memory.copy_(torch.where(written.isfinite().all(), written.to(self.memory.dtype), self.memory))
        self.num_writes = 0


def published_workspace_mlp(in_features: int, hidden_features: Optional[int] = None, **kwargs) -> WorkspaceMlp:
    """The MLP and workspace of the published implementation.

    Args:
        in_features: Token width E.
        hidden_features: Hidden width, E if None.
        **kwargs: Arguments of `PublishedWorkspace`.

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
        ValueError: A key is unknown or missing, the heads do not divide the projection, or the momentum (which the
            published code stores as `memoryupdate.beta`) is not 0.9.
    """
    names = {
        'fc1.weight': 'fc1.weight',
        'fc1.bias': 'fc1.bias',
        'fc2.weight': 'fc2.weight',
        'fc2.bias': 'fc2.bias',
        'norm.weight': 'workspace.norm.weight',
        'norm.bias': 'workspace.norm.bias',
        'fc3.weight': 'workspace.attractors.weight',
        'fc3.bias': 'workspace.attractors.bias',
        'memoryupdate.memory': 'workspace.memory',
        'memoryupdate.mha.w_qs.weight': 'workspace.q.weight',
        'memoryupdate.mha.w_ks.weight': 'workspace.k.weight',
        'memoryupdate.mha.w_vs.weight': 'workspace.v.weight',
        'memoryupdate.mha.fc.weight': 'workspace.proj.weight',
        'memoryupdate.mha.layer_norm.weight': 'workspace.slot_norm.weight',
        'memoryupdate.mha.layer_norm.bias': 'workspace.slot_norm.bias',
    }
    state_dict = dict(state_dict)
    momentum = state_dict.pop('memoryupdate.beta', torch.tensor(0.9))
    if not math.isclose(float(momentum), 0.9, rel_tol=1e-6):
        raise ValueError(f"state_dict['memoryupdate.beta'] must be 0.9, the published momentum, got {float(momentum)}.")
    missing, unknown = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f'state_dict is not that of a published layer: missing keys {missing}, unknown keys {unknown}.')
    output = state_dict['memoryupdate.mha.fc.weight']
    if workspace_heads < 1 or output.shape[1] % workspace_heads:
        raise ValueError(
            f'workspace_heads must divide {output.shape[1]}, the width of the heads together, got {workspace_heads}.')
    state_dict['memoryupdate.mha.fc.weight'] = output.unflatten(1, (-1, workspace_heads)).transpose(1, 2).flatten(1)
    return {names[key]: value for key, value in state_dict.items()}
