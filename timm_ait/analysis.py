""" What a workspace does: competition, attractors, diversity, contribution.

Small functions on any model with workspaces, AiT or a model with `add_workspace`, all without gradients and in
evaluation. `analyse` puts them together. Of Coordination, whose memory is one per image: `coordination_writes`.

Shapes: T tokens of width E; a memory of M slots of width D; A heads; B images of N tokens. Layers go by the names of
their workspaces in `model.named_modules()`.

Papers: `Associative Transformer` - https://arxiv.org/abs/2309.12862
    `Hopfield Networks is All You Need` - https://arxiv.org/abs/2008.02217
"""
import contextlib
import functools
import math
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import networkx
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_ait.layers import GlobalWorkspace
from timm_ait.models.coordination import SharedWorkspace
from timm_ait.ops import naive
from timm_ait.ops.memory import project_memory, slot_statistics

__all__ = [
    'REPLACEMENTS', 'accuracy', 'agreement', 'analyse', 'attractors', 'basins', 'collect_tokens', 'competition',
    'contribution', 'coordination_writes', 'fixed_points', 'interactions', 'kmeans', 'match_slots', 'read_shares',
    'read_weights', 'replaced_memory', 'retrieval', 'self_attention_interactions', 'slot_purity', 'workspaces',
    'write_attention', 'write_scores',
]

REPLACEMENTS = ('removed', 'constant', 'shuffled', 'random')

# tokens of a batch that iterate to their fixed points, and queries of a head whose attention is sorted: evenly spaced
_MAX_STARTS, _MAX_QUERIES = 2048, 32


# models


def workspaces(model: nn.Module) -> Dict[str, GlobalWorkspace]:
    """Workspaces of a model by module name, in the order of its layers.

    Raises:
        ValueError: It has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, GlobalWorkspace)}
    if not found:
        raise ValueError(
            f'model: {type(model).__name__} has no workspaces; give an Associative Transformer, or add them with '
            'timm_ait.add_workspace(model)')
    return found


@contextlib.contextmanager
def _observed(
        model: nn.Module,
        modules: Dict[str, nn.Module],
        hook: Optional[Callable],
        before: bool = False,
) -> Iterator[None]:
    """A model in evaluation without gradients, with a hook(name, module, inputs, output) after modules, or before them
    without the output; all is as it was afterwards.
    """
    training = [module for module in model.modules() if module.training]
    handles = [
        (module.register_forward_pre_hook if before else module.register_forward_hook)(functools.partial(hook, name))
        for name, module in modules.items()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _forward(
        model: nn.Module,
        images: torch.Tensor,
        visit: Callable[[str, torch.Tensor], Any],
        **kwargs,
) -> Dict[str, Dict[str, float]]:
    """What `read_shares` returns, in one pass that visits the tokens (B, N, E) of each layer, by name, as they come."""
    shares, reads = {}, {}

    def after_workspace(name: str, workspace: GlobalWorkspace, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor):
        x = inputs[0]
        visit(name, workspace.norm(x).float().reshape(x.shape[0], -1, x.shape[-1]))
        if workspace.retrieves:
            read = reads[name] = (output - _base(workspace, x)).float()
            energy = read.flatten(0, -2).square().sum(dim=-1).mean().clamp_min(1e-20)
            shares[name] = {
                'branch_share': _mean_ratio(read, output),
                'residual_share': float('nan'),
                'constant_share': float(read.flatten(0, -2).mean(dim=0).square().sum() / energy),
            }

    def after_block(name: str, block: nn.Module, inputs: Any, output: torch.Tensor):
        read = reads.pop(name)
        shares[name]['residual_share'] = _mean_ratio(block.ls2(read) if hasattr(block, 'ls2') else read, output)

    found, suffix = workspaces(model), '.mlp.workspace'
    blocks = {
        name: model.get_submodule(name.removesuffix(suffix))
        for name, workspace in found.items() if name.endswith(suffix) and workspace.retrieves}
    with _observed(model, found, after_workspace), _observed(model, blocks, after_block):
        model(images, **kwargs)
    return shares


def _base(workspace: GlobalWorkspace, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives without its reading."""
    return x if workspace.gated else workspace.norm(x).to(x.dtype)


def _mean_ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Norm of the part of each token relative to that of the whole, mean over tokens."""
    part, whole = (x.float().norm(dim=-1).flatten() for x in (part, whole))
    return float((part / whole.clamp_min(1e-20)).mean())


def collect_tokens(model: nn.Module, images: torch.Tensor, **kwargs) -> Dict[str, torch.Tensor]:
    """What enters each workspace, normed as it writes and reads it, (B, N, E) in float32.

    Args:
        model: Model with workspaces.
        images: (B, C, H, W).
        **kwargs: Passed to the model with the images, such as the question.

    Raises:
        ValueError: The model has no workspaces, or asks for a question.
    """
    tokens = {}
    _forward(model, images, tokens.__setitem__, **kwargs)
    return tokens


# competition


@torch.no_grad()
def write_scores(workspace: GlobalWorkspace, tokens: torch.Tensor) -> torch.Tensor:
    """Scores q k / sqrt(D) of tokens for the slots that they compete for, (A, M, T).

    Source: bottleneck attention, section 3 of the paper; `naive.attend`.

    Args:
        workspace: Layer that writes.
        tokens: Normed tokens (T, E), or (B, N, E) for those of a batch.

    Raises:
        ValueError: The layer does not write.
    """
    if not workspace.writes:
        raise ValueError('workspace: it was made with write=False, no tokens compete for it')
    slots, tokens = workspace.stored_memory(), tokens.flatten(0, -2).float()
    queries, keys = (
        F.linear(x, projection.weight.float()).unflatten(-1, (workspace.workspace_heads, -1)).transpose(0, 1)
        for x, projection in ((slots, workspace.q), (tokens, workspace.k)))
    return queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5


def write_attention(
        workspace: GlobalWorkspace,
        tokens: torch.Tensor,
        bottleneck: Optional[Union[int, float]] = None,
) -> torch.Tensor:
    """Weights with which tokens would write into the slots, (A, M, T), zero where a token is not selected.

    All tokens compete with each other.

    Args:
        workspace: As `write_scores`.
        tokens: As `write_scores`.
        bottleneck: Tokens that each slot and head keep, a float is a share of T; by default the layer's own.

    Raises:
        ValueError: The layer does not write, or the bottleneck is not positive.
    """
    bottleneck = workspace.bottleneck if bottleneck is None else bottleneck
    if bottleneck <= 0 or (isinstance(bottleneck, float) and bottleneck > 1):
        raise ValueError(f'bottleneck must be a positive integer or a share in (0, 1], got {bottleneck!r}')
    scores = write_scores(workspace, tokens)
    num_kept = bottleneck if isinstance(bottleneck, int) else max(1, round(bottleneck * scores.shape[-1]))
    kept = scores.topk(min(num_kept, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(dim=-1))


def coordination_writes(model: nn.Module, images: torch.Tensor) -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
    """What each block of a Coordination writes into the memories of images.

    Args:
        model: Coordination without questions.
        images: (B, C, H, W).

    Returns:
        By layer, write weights (B, A, M, N), as `competition` takes them, and the memory written (B, M, D).

    Raises:
        ValueError: The model is no Coordination, or asks for a question.
    """
    shared = {name: module for name, module in model.named_modules() if isinstance(module, SharedWorkspace)}
    if not shared:
        raise ValueError(f'model: {type(model).__name__} is no Coordination; for workspaces see write_attention')
    weights, result = {}, {}

    def before_dropout(name: str, dropout: nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
        weights.setdefault(name, inputs[0])  # the write comes first, the broadcast may come after

    def after_write(name: str, workspace: nn.Module, inputs: Any, output: Tuple[torch.Tensor, torch.Tensor]) -> None:
        result[name] = (weights[name], output[1])

    dropouts = {name: module.attn_drop for name, module in shared.items()}
    with _observed(model, dropouts, before_dropout, before=True), _observed(model, shared, after_write):
        model(images)
    return result


def competition(attention: torch.Tensor) -> Dict[str, float]:
    """How tokens compete for slots and slots share tokens.

    Args:
        attention: Write weights, zero outside the selected tokens, (..., A, M, T).

    Returns:
        'coverage': Share of tokens that at least one slot and head selected.
        'overlap': Mean Jaccard index of the tokens that two slots of a head selected: 1 if all select the same.
        'chance_overlap': What the overlap is if each slot selects as many tokens at random, k / (2 T - k).
        'effective_tokens': Mean over slots and heads of exp(entropy of the weights), 1 to k.
        'largest_weight': Mean over slots and heads of the largest weight.
    """
    selected = attention > 0
    num_slots, num_tokens = attention.shape[-2:]
    counts = selected.to(attention.dtype)
    common = counts @ counts.transpose(-2, -1)
    size = common.diagonal(dim1=-2, dim2=-1)
    jaccard = common / (size.unsqueeze(-1) + size.unsqueeze(-2) - common).clamp_min(1.)
    others = ~torch.eye(num_slots, dtype=torch.bool, device=attention.device)
    kept = float(size.mean())
    return {
        'coverage': float(selected.flatten(-3, -2).any(dim=-2).double().mean()),
        'overlap': float(jaccard[..., others].mean()),
        'chance_overlap': kept / (2 * num_tokens - kept),
        'effective_tokens': float(_perplexity(attention).mean()),
        'largest_weight': float(attention.amax(dim=-1).mean()),
    }


def _perplexity(weights: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of weights that sum to one over the last dimension: how many they effectively are."""
    return torch.special.entr(weights).sum(dim=-1).exp()


def interactions(attention: torch.Tensor) -> torch.Tensor:
    """Smallest number of keys that carry 90 % of each query's attention.

    Source: figure 5 of the paper, after section 3 of `Hopfield Networks is All You Need`.

    Args:
        attention: Weights that sum to one over the last dimension, (..., queries, keys).

    Returns:
        Counts (..., queries), from 1 to the number of keys.
    """
    carried = attention.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return ((carried < 0.9 - 1e-6).sum(dim=-1) + 1).clamp_max(attention.shape[-1])


def self_attention_interactions(model: nn.Module, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """`interactions` of every self-attention of a timm transformer, mean per head (A,), in units of tokens.

    Up to 32 queries of each head, evenly spaced, are counted.

    Args:
        model: Transformer with timm's attention, with workspaces or without.
        images: (B, C, H, W).

    Returns:
        By module name of the attention; nothing for models without.
    """
    found = {
        name: module for name, module in model.named_modules()
        if hasattr(module, 'fused_attn') and hasattr(module, 'qkv')}
    fused = {name: module.fused_attn for name, module in found.items()}
    counts = {}

    def before_dropout(name: str, dropout: nn.Module, inputs: Tuple[torch.Tensor, ...]):
        weights = inputs[0]  # (B, A, N, N)
        queries = weights[..., ::math.ceil(weights.shape[-2] / _MAX_QUERIES), :]
        counts[name] = interactions(queries.float()).float().mean(dim=(0, -1))

    try:
        for module in found.values():
            module.fused_attn = False  # the fused operator does not give its weights
        dropouts = {name: module.attn_drop for name, module in found.items()}
        with _observed(model, dropouts, before_dropout, before=True):
            model(images)
    finally:
        for name, module in found.items():
            module.fused_attn = fused[name]
    return counts


# attractors


@torch.no_grad()
def attractors(workspace: GlobalWorkspace) -> torch.Tensor:
    """Slots as evaluation reads them, lifted to token width, (M, E) in float32.

    Raises:
        ValueError: The layer does not read.
    """
    if not workspace.retrieves:
        raise ValueError('workspace: it was made with retrieval=False, no token reads from it')
    lift = workspace.attractors
    return lift(workspace.stored_memory().to(lift.weight.dtype)).float()


def read_weights(workspace: GlobalWorkspace, tokens: torch.Tensor) -> torch.Tensor:
    """Weights softmax(beta xi X^T) with which tokens read the slots in the first step, (..., M).

    Args:
        workspace: Layer that reads.
        tokens: Normed tokens, (..., E).
    """
    return (workspace.beta * tokens.float() @ attractors(workspace).T).softmax(dim=-1)


@torch.no_grad()
def fixed_points(
        state: torch.Tensor,
        attractors: torch.Tensor,
        beta: float = 1.,
        max_steps: int = 100,
        tolerance: float = 1e-3,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Repeat Hopfield retrieval until it moves no more.

    Source: section 3 of the paper and theorem 2 of `Hopfield Networks is All You Need`. After one step the state is
    p X, so that the others need the products of attractors alone: p <- softmax(beta p X X^T).

    Args:
        state: Where to start, (T, E).
        attractors: X (M, E).
        beta: Inverse temperature.
        max_steps: Steps at most, at least 1.
        tolerance: Length of a step that counts as none, relative to the largest norm of an attractor.

    Returns:
        Where it ends (T, E), and the number of steps until one moves less than the tolerance (T,), nan where none did.
    """
    gram = attractors @ attractors.T
    limit = tolerance * float(attractors.norm(dim=-1).max())
    weights = (beta * state @ attractors.T).softmax(dim=-1)
    moves = (weights @ attractors - state).norm(dim=-1)
    steps = torch.where(moves <= limit, 0., float('nan'))
    for step in range(1, max_steps):
        if not steps.isnan().any():
            break
        previous, weights = weights, (beta * weights @ gram).softmax(dim=-1)
        change = weights - previous
        moves = (change @ gram * change).sum(dim=-1).clamp_min(0.).sqrt()
        steps = torch.where(steps.isnan() & (moves <= limit), float(step), steps)
    return weights @ attractors, steps


def retrieval(workspace: GlobalWorkspace, tokens: torch.Tensor) -> Dict[str, float]:
    """What tokens read, and where reading again and again would lead.

    Args:
        workspace: Layer that reads.
        tokens: Normed tokens, (..., E). Fixed points are those of up to 2,048 of them, evenly spaced.

    Returns:
        'effective_slots': Mean over tokens of exp(entropy of the read weights), 1 to M.
        'largest_read_weight': Mean over tokens.
        'energy_before', 'energy_after': Mean over tokens, around one step (`naive.energy`).
        'energy_rises': Share of tokens whose energy a step raises, beyond rounding: 0 in theory.
        'converged': Share of tokens that reach a fixed point within 100 steps.
        'steps': Mean steps to it, of those.
        'distance': Mean distance to it, relative to the norm of the token.
        'num_fixed_points': Number of distinct ones, further apart than 1 % of the largest norm of an attractor.
    """
    stored, beta = attractors(workspace), workspace.beta
    tokens = tokens.flatten(0, -2).float()
    weights = read_weights(workspace, tokens)
    before = naive.energy(tokens, stored, beta)
    after = naive.energy(weights @ stored, stored, beta)
    starts = tokens[::math.ceil(len(tokens) / _MAX_STARTS)]
    ends, steps = fixed_points(starts, stored, beta)
    num_distinct, left = 0, ends
    while len(left):  # each takes those that are close to it away
        left = left[(left - left[0]).norm(dim=-1) > 0.01 * stored.norm(dim=-1).max()]
        num_distinct += 1
    return {
        'effective_slots': float(_perplexity(weights).mean()),
        'largest_read_weight': float(weights.amax(dim=-1).mean()),
        'energy_before': float(before.mean()),
        'energy_after': float(after.mean()),
        'energy_rises': float((after > before + 1e-5 * before.abs().clamp_min(1.)).double().mean()),
        'converged': float((~steps.isnan()).double().mean()),
        'steps': float(steps.nanmean()),
        'distance': float(((ends - starts).norm(dim=-1) / starts.norm(dim=-1)).mean()),
        'num_fixed_points': float(num_distinct),
    }


@torch.no_grad()
def basins(
        attractors: torch.Tensor,
        beta: float = 1.,
        noise: float = 0.,
        num_trials: int = 32,
        generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """Share of perturbed priors that retrieval brings back, by slot (M,).

    One is back if its fixed point is less than a quarter as far from the prior as the nearest other prior. A mixture of
    several is none of them; a prior that does not even return without noise is not an attractor.

    Args:
        attractors: Priors (M, E), at least two.
        beta: Inverse temperature.
        noise: Length of the perturbations relative to the norm of the prior. Their directions are random within the
            span of the differences between priors: what is orthogonal to it changes no read weight.
        num_trials: Perturbations of each prior.
        generator: Source of the directions.
    """
    num_slots = len(attractors)
    distances = torch.cdist(attractors, attractors, compute_mode='donot_use_mm_for_euclid_dist')
    reach = 0.25 * distances.fill_diagonal_(float('inf')).amin(dim=-1)
    directions = torch.randn(num_trials, num_slots, num_slots, generator=generator).to(attractors)
    directions = directions @ (attractors - attractors.mean(dim=0))
    starts = attractors + noise * attractors.norm(dim=-1, keepdim=True) * F.normalize(directions, dim=-1)
    ends = fixed_points(starts.flatten(0, 1), attractors, beta)[0].view_as(starts)
    return ((ends - attractors).norm(dim=-1) < reach).float().mean(dim=0)


def match_slots(similarity: torch.Tensor) -> torch.Tensor:
    """Assign a column to each row so that the sum of the similarities is the largest, (M,) column numbers.

    Args:
        similarity: (M, M') with M <= M', finite.

    Raises:
        ValueError: It has more rows than columns, or is not finite.
    """
    num_rows, num_columns = similarity.shape
    if num_rows > num_columns or not bool(similarity.isfinite().all()):
        raise ValueError(f'similarity must be finite, with no more rows than columns, got {num_rows} x {num_columns}')
    graph = networkx.Graph()
    graph.add_weighted_edges_from(
        (i, num_rows + j, weight) for i, row in enumerate(similarity.tolist()) for j, weight in enumerate(row))
    pairs = map(sorted, networkx.max_weight_matching(graph, maxcardinality=True))
    return torch.tensor([column - num_rows for _, column in sorted(pairs)], dtype=torch.long)


def agreement(
        a: torch.Tensor,
        b: torch.Tensor,
        generator: Optional[torch.Generator] = None,
) -> Tuple[float, float, torch.Tensor]:
    """How far two sets of slots do the same, whatever their order.

    Args:
        a: What each slot does, (M, F): of models of different seeds, its weights on the same F tokens.
        b: Likewise for the slots to match, (M', F), M <= M'.
        generator: Source of the permutation of features whose matches give the chance level.

    Returns:
        Mean Pearson correlation over the pairs that `match_slots` finds, the same for b with its features permuted, and
        the slot of b for each of a.
    """
    a, b = (F.normalize(x - x.mean(dim=-1, keepdim=True), dim=-1) for x in (a.double(), b.double()))
    order = torch.randperm(b.shape[-1], generator=generator).to(b.device)
    similarities = [(a @ other.T).cpu() for other in (b, b[:, order])]
    matches = [match_slots(similarity) for similarity in similarities]
    mean, chance = (float(x[torch.arange(len(y)), y].mean()) for x, y in zip(similarities, matches))
    return mean, chance, matches[0]


# diversity


def slot_purity(weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of each slot's weight that is on its favourite label, (M,).

    Args:
        weights: Of the slots on tokens, (M, T), not negative.
        labels: Type of each token, (T,): the label of its image, or its cluster.
    """
    by_label = weights @ F.one_hot(labels).to(weights)
    return by_label.amax(dim=-1) / weights.sum(dim=-1).clamp_min(1e-20)


@torch.no_grad()
def kmeans(points: torch.Tensor, num_clusters: int, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Cluster (T,) of each point by Lloyd's algorithm, at most 50 steps, started from points far from each other.

    Args:
        points: (T, E), at least as many as clusters.
        num_clusters: Number of clusters.
        generator: Source of the start (k-means++).

    Raises:
        ValueError: There are fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f'num_clusters must be from 1 to the number of points {len(points)}, got {num_clusters}')
    centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    while len(centres) < num_clusters:
        nearest = torch.cdist(points, centres).amin(dim=-1).square().cpu() + 1e-20
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator).to(points.device)]])
    previous = None
    for _ in range(50):
        labels = torch.cdist(points, centres).argmin(dim=-1)
        if previous is not None and torch.equal(labels, previous):
            break
        members, previous = F.one_hot(labels, num_clusters).to(points), labels
        sizes = members.sum(dim=0).unsqueeze(-1)
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp_min(1.), centres)
    return labels


# contribution


def read_shares(model: nn.Module, images: torch.Tensor, **kwargs) -> Dict[str, Dict[str, float]]:
    """How much the reading of each layer adds; arguments and errors as `collect_tokens`.

    Returns:
        By layer, where it reads:
        'branch_share': Norm of the reading relative to that of what the layer gives, mean over tokens.
        'residual_share': Norm of the reading, after the block's layer scale, relative to that of the residual stream
            behind the block, mean over tokens; nan where the layer is not at the end of a block's MLP.
        'constant_share': Share of the readings' energy in their mean over all tokens: 1 if all tokens read the same.
    """
    return _forward(model, images, lambda name, tokens: None, **kwargs)


@contextlib.contextmanager
def replaced_memory(
        model: nn.Module,
        how: str,
        layers: Optional[Sequence[str]] = None,
        generator: Optional[torch.Generator] = None,
) -> Iterator[None]:
    """Let a model in evaluation read something else than its memory, for as long as the context lasts.

    The order of slots does not matter to retrieval, so there is nothing to learn from shuffling them.

    Args:
        model: Model with workspaces.
        how: 'removed': no reading is added. 'constant': all tokens get the mean reading of their batch. 'shuffled': the
            features of all slots in another order, the same for each, which leaves norms and angles between slots.
            'random': random slots, orthonormal or of unit norm as the layer's rule has it.
        layers: Names of the layers, by default all that read.
        generator: Source of the order and of the random slots.

    Raises:
        ValueError: The model has no workspaces, there is no such layer that reads, or no such replacement.
    """
    if how not in REPLACEMENTS:
        raise ValueError(f'how must be one of {REPLACEMENTS}, got {how!r}')
    found = {name: workspace for name, workspace in workspaces(model).items() if workspace.retrieves}
    layers = list(found) if layers is None else layers
    unknown = sorted(set(layers) - found.keys())
    if unknown:
        raise ValueError(f'layers: the model has no reading workspace {", ".join(unknown)}; it has {", ".join(found)}')

    def without_reading(workspace: GlobalWorkspace, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor):
        base = _base(workspace, inputs[0])
        read = output - base
        return base if how == 'removed' else base + read.flatten(0, -2).mean(dim=0)

    def other_slots(workspace: GlobalWorkspace) -> torch.Tensor:
        if how == 'shuffled':
            order = torch.randperm(workspace.slot_dim, generator=generator).to(workspace.memory.device)
            return workspace.stored_memory()[:, order]
        slots = torch.randn(workspace.memory.shape, generator=generator)
        return project_memory(slots, workspace.memory_update, num_iterations=32)

    with contextlib.ExitStack() as undo:
        for workspace in map(found.get, layers):
            if how in ('removed', 'constant'):
                undo.callback(workspace.register_forward_hook(without_reading).remove)
            else:
                undo.callback(workspace.memory.copy_, workspace.memory.clone())
                workspace.memory.copy_(other_slots(workspace))
        yield


def accuracy(model: nn.Module, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Top-1 accuracy in evaluation, 0 to 1, over batches of images (B, C, H, W) and labels (B,)."""
    right = total = 0
    with _observed(model, {}, hook=None):
        for images, labels in batches:
            right += int((model(images).argmax(dim=-1) == labels).sum())
            total += len(labels)
    return right / total


def contribution(
        model: nn.Module,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        each_layer: bool = False,
        seed: int = 0,
) -> Dict[str, float]:
    """Accuracy of a model as it is, and with each of the replacements of `replaced_memory`.

    Args:
        model: Image classifier with workspaces.
        batches: Images (B, C, H, W) and labels (B,); gone through several times, such as a list or a loader.
        each_layer: Also with the reading removed in one layer alone, 'removed in <layer>'.
        seed: Of the random replacements.
    """
    result = {'unchanged': accuracy(model, batches)}
    trials = [(how, how, None) for how in REPLACEMENTS]
    if each_layer:
        reading = [name for name, workspace in workspaces(model).items() if workspace.retrieves]
        trials += [(f'removed in {name}', 'removed', [name]) for name in reading]
    for key, how, layers in trials:
        with replaced_memory(model, how, layers, torch.Generator().manual_seed(seed)):
            result[key] = accuracy(model, batches)
    return result


# all together


def analyse(
        model: nn.Module,
        batches: Iterable[torch.Tensor],
        bottleneck: Optional[Union[int, float]] = None,
) -> Dict[str, Dict[str, float]]:
    """Figures of every workspace over images in batches, the tokens of each of which compete with each other.

    Args:
        model: Model with workspaces that takes images alone.
        batches: Images (B, C, H, W), normalised as the model wants them; at least one batch.
        bottleneck: As `write_attention`.

    Returns:
        By layer, means over the batches: what `competition`, `retrieval` and `read_shares` return, as far as the layer
        writes and reads; 'effective_rank' and 'mean_cosine' of its slots, and of the attractors lifted from them
        ('attractor_…').

    Raises:
        ValueError: The model has no workspaces, or asks for a question; or there are no batches.
    """
    found = workspaces(model)
    figures: Dict[str, List[Dict[str, float]]] = {name: [] for name in found}

    def visit(name: str, tokens: torch.Tensor) -> None:
        workspace = found[name]
        figures[name].append({
            **(competition(write_attention(workspace, tokens, bottleneck)) if workspace.writes else {}),
            **(retrieval(workspace, tokens) if workspace.retrieves else {}),
        })

    for images in batches:
        for name, shares in _forward(model, images, visit).items():
            figures[name][-1].update(shares)
    result = {}
    for name, workspace in found.items():
        if not figures[name]:
            raise ValueError('batches: there are none')
        result[name] = {key: sum(f[key] for f in figures[name]) / len(figures[name]) for key in figures[name][0]}
        result[name].update(slot_statistics(workspace.stored_memory()))
        if workspace.retrieves:
            statistics = slot_statistics(attractors(workspace))
            result[name].update({f'attractor_{key}': value for key, value in statistics.items()})
    return result
