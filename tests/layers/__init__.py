""" The layer of these tests. """
import torch

from timm_ait.layers import GlobalWorkspace

SMALL = dict(num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=10)


def make_workspace(dim: int = 24, **kwargs) -> GlobalWorkspace:
    """A workspace whose gate, if it has one, is open."""
    torch.manual_seed(0)
    workspace = GlobalWorkspace(dim, **{**SMALL, **kwargs})
    if workspace.gate is not None:
        torch.nn.init.normal_(workspace.gate)
    return workspace


def written_by(workspace: GlobalWorkspace) -> torch.Tensor:
    """Mean of what was written since the last step, (M, D); nan where nothing was."""
    total, count = workspace.written_since_step()
    return total / count
