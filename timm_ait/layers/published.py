""" The published layer: what its implementation computes in training.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
from typing import Optional, Union

import torch

from timm_ait.ops.graph import is_recomputed

from .workspace import GlobalWorkspace, WorkspaceMlp


class PublishedWorkspace(GlobalWorkspace):
    """The workspace as the published implementation computes it in training, without its dropout.

    No gradient flows through the write, memory rows are normalised but not kept apart, and the memory advances in
    forward. Evaluation is ours: frozen.
    """

    def __init__(self, dim: int, bottleneck: Union[int, float] = 512, **kwargs) -> None:
        """As `GlobalWorkspace`, also in errors; `memory_update` and `differentiable_write` are fixed as published."""
        super().__init__(dim, bottleneck=bottleneck, memory_update='normalize', differentiable_write=False, **kwargs)

    def check_it_can_write(self, x: torch.Tensor, token_mask: Optional[torch.Tensor], has_parameters: bool) -> None:
        super().check_it_can_write(x, token_mask, has_parameters)
        if not torch.compiler.is_compiling() and is_recomputed():
            raise RuntimeError(
                'Gradient checkpointing does not support the published workspace: its memory has moved since the first '
                'forward. Train without checkpointing, or use GlobalWorkspace.')

    def _keep(self, memory: torch.Tensor, candidate: torch.Tensor, written: torch.Tensor) -> None:
        # it averages in place, into the memory that backward has saved for W_Q
        if not self.reset_memory:
            memory.data.lerp_(candidate, 1. - self.memory_momentum)
            self.memory.copy_(torch.where(written.isfinite().all(), written.to(self.memory.dtype), self.memory))
        self.num_writes = 0


def published_workspace_mlp(in_features: int, hidden_features: Optional[int] = None, **kwargs) -> WorkspaceMlp:
    """The MLP and workspace of the published implementation, for tokens of width E = `in_features`.

    The hidden width is E by default; other arguments and errors are those of `PublishedWorkspace`.
    """
    mlp = WorkspaceMlp(in_features, hidden_features, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
    mlp.workspace = PublishedWorkspace(in_features, **kwargs)
    return mlp
