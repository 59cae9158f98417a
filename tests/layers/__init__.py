""" The layer of these tests. """
import torch

from timm_ait.layers import GlobalWorkspace

SMALL = dict(num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=10)


def make_workspace(dim: int = 24, **kwargs) -> GlobalWorkspace:
    torch.manual_seed(0)
    return GlobalWorkspace(dim, **{**SMALL, **kwargs})


def written_by(workspace: GlobalWorkspace) -> torch.Tensor:
    """Mean of what was written since the last step, (M, D); nan where nothing was."""
    total, count = workspace.written_since_step()
    return total / count
