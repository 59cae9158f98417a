""" What benchmarks/analysis.py measures beyond `timm_ait.analysis`: attention, basins, agreement, other memories.

Shapes: T tokens of width E; a memory of M slots of width D; A heads; B images of N tokens.
"""
import contextlib
import math
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import networkx  # comes with torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_ait.analysis import fixed_points, observed, workspaces
from timm_ait.layers import GlobalWorkspace
from timm_ait.models.coordination import SharedWorkspace
from timm_ait.ops import naive

REPLACEMENTS = ('removed', 'constant', 'shuffled', 'random')
MAX_QUERIES = 32  # queries of a head whose attention is sorted, evenly spaced
NUM_TRIALS = 32  # perturbations of each prior

Batches = Sequence[Tuple[torch.Tensor, torch.Tensor]]  # images (B, C, H, W) and labels (B,)


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in evaluation, 0 to 1."""
    with observed(model, {}):
        correct = [model(images).argmax(dim=-1) == labels for images, labels in batches]
    return float(torch.cat(correct).double().mean())


@contextlib.contextmanager
def replaced_memory(model: nn.Module, how: str) -> Iterator[None]:
    """Let a model in evaluation read something else than its memory, for as long as the context lasts.

    Args:
        model: Model with workspaces.
        how: 'removed': no reading is added. 'constant': all tokens get the mean reading of their batch. 'shuffled': the
            features of all slots in another order, the same for each, which keeps norms and angles between slots.
            'random': random slots, orthonormal or of unit norm as the layer's rule has it.
    """
    generator = torch.Generator().manual_seed(0)

    def without_reading(workspace: GlobalWorkspace, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor):
        base = inputs[0] if workspace.gated else workspace.norm(inputs[0])
        return base if how == 'removed' else base + (output - base).flatten(0, -2).mean(dim=0)

    def other_slots(workspace: GlobalWorkspace) -> torch.Tensor:
        if how == 'shuffled':
            return workspace.stored_memory()[:, torch.randperm(workspace.slot_dim, generator=generator)]
        slots = torch.randn(workspace.memory.shape, generator=generator)
        return F.normalize(naive.polar(slots) if workspace.memory_update == 'orthogonal' else slots, dim=-1)

    with contextlib.ExitStack() as undo, torch.no_grad():
        for workspace in workspaces(model).values():
            if not workspace.retrieves:
                continue
            if how in ('removed', 'constant'):
                undo.callback(workspace.register_forward_hook(without_reading).remove)
            else:
                undo.callback(workspace.memory.copy_, workspace.memory.clone())
                workspace.memory.copy_(other_slots(workspace))
        yield


def coordination_writes(model: nn.Module, images: torch.Tensor) -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
    """Write weights (B, A, M, N) and the memory written (B, M, D) of each block of a Coordination, by name."""
    shared = {name: module for name, module in model.named_modules() if isinstance(module, SharedWorkspace)}
    weights, result = {}, {}

    def after_dropout(name: str, dropout: nn.Module, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weights.setdefault(name, inputs[0])  # the write comes first, the broadcast may come after

    def after_write(name: str, workspace: nn.Module, inputs: Any, output: Tuple[torch.Tensor, torch.Tensor]) -> None:
        result[name] = (weights[name], output[1])

    dropouts = {name: module.attn_drop for name, module in shared.items()}
    with observed(model, dropouts, after_dropout), observed(model, shared, after_write):
        model(images)
    return result


def self_attention_interactions(model: nn.Module, images: torch.Tensor) -> Dict[str, List[float]]:
    """Smallest number of keys that carry 90 % of a query's attention, mean over the queries of each head.

    Of every self-attention of a timm transformer, by module name.

    Source: figure 5 of the paper, after section 3 of `Hopfield Networks is All You Need`.
    """
    found = {
        name: module for name, module in model.named_modules()
        if hasattr(module, 'fused_attn') and hasattr(module, 'qkv')}
    counts = {}

    def after_dropout(name: str, dropout: nn.Module, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        queries = inputs[0][..., ::math.ceil(inputs[0].shape[-2] / MAX_QUERIES), :]  # of (B, A, N, N)
        carried = queries.float().sort(dim=-1, descending=True).values.cumsum(dim=-1)
        num_keys = ((carried < 0.9 - 1e-6).sum(dim=-1) + 1).clamp_max(carried.shape[-1])
        counts[name] = num_keys.float().mean(dim=(0, -1)).tolist()

    with contextlib.ExitStack() as undo:
        for module in found.values():  # the fused operator does not give its weights
            undo.callback(setattr, module, 'fused_attn', module.fused_attn)
            module.fused_attn = False
        with observed(model, {name: module.attn_drop for name, module in found.items()}, after_dropout):
            model(images)
    return counts


@torch.no_grad()
def basins(attractors: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """Share of perturbed priors that retrieval brings back, by slot (M,).

    A prior is back if its fixed point is less than a quarter as far from it as the nearest other prior.

    Args:
        attractors: Priors (M, E), at least two.
        beta: Inverse temperature.
        noise: Length of the perturbations relative to the norm of the prior. Their directions are random within the
            span of the differences between priors: what is orthogonal to it changes no read weight.
    """
    num_slots = len(attractors)
    distances = torch.cdist(attractors, attractors, compute_mode='donot_use_mm_for_euclid_dist')
    reach = 0.25 * distances.fill_diagonal_(float('inf')).amin(dim=-1)
    directions = torch.randn(NUM_TRIALS, num_slots, num_slots, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(directions.to(attractors) @ (attractors - attractors.mean(dim=0)), dim=-1)
    starts = attractors + noise * attractors.norm(dim=-1, keepdim=True) * directions
    ends = fixed_points(starts.flatten(0, 1), attractors, beta).view_as(starts)
    return ((ends - attractors).norm(dim=-1) < reach).float().mean(dim=0)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far the slots of two models do the same, whatever their order, by what each does to the same tokens (M, T).

    Returns:
        Mean Pearson correlation over the pairs of slots whose assignment makes it the largest.
    """
    a, b = (F.normalize(x - x.mean(dim=-1, keepdim=True), dim=-1) for x in (a.double(), b.double()))
    correlations = (a @ b.T).tolist()
    graph = networkx.Graph()
    graph.add_weighted_edges_from(
        (i, len(a) + j, correlation) for i, row in enumerate(correlations) for j, correlation in enumerate(row))
    pairs = map(sorted, networkx.max_weight_matching(graph, maxcardinality=True))
    return sum(correlations[i][j - len(a)] for i, j in pairs) / len(a)


def slot_purity(weights: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Share of each slot's weight on tokens (M, T) that is on its favourite kind of token (T,), (M,)."""
    by_kind = weights @ F.one_hot(kinds).to(weights)
    return by_kind.amax(dim=-1) / weights.sum(dim=-1).clamp_min(1e-20)


@torch.no_grad()
def kmeans(points: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Cluster (T,) of each point (T, E) by at most 50 steps of Lloyd's algorithm, started from points far apart."""
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < num_clusters:
        nearest = torch.cdist(points, centres).amin(dim=-1).square() + 1e-20
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator)]])
    clusters = torch.full((len(points),), -1)
    for _ in range(50):
        previous, clusters = clusters, torch.cdist(points, centres).argmin(dim=-1)
        if torch.equal(clusters, previous):
            break
        members = F.one_hot(clusters, num_clusters).to(points)
        sizes = members.sum(dim=0).unsqueeze(-1)
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp_min(1.), centres)
    return clusters
