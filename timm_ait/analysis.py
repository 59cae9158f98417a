""" What a workspace does: how tokens compete for it, what they read, and how much that adds.

Functions on any model with workspaces, without gradients and in evaluation mode. `analyse` puts them together.

Shapes: T tokens of width E; a memory of M slots of width D; A heads; B images of N tokens. Layers are named as their
workspaces in `model.named_modules()`.

Papers: `Associative Transformer` - https://arxiv.org/abs/2309.12862
    `Hopfield Networks is All You Need` - https://arxiv.org/abs/2008.02217
"""
import contextlib
import functools
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.models.eva import EvaBlock
from timm.models.swin_transformer import SwinTransformerBlock

from timm_ait.layers import GlobalWorkspace
from timm_ait.layers.advance import named_workspaces
from timm_ait.ops import naive
from timm_ait.ops.memory import slot_statistics

# an analysis changes what the process shares: modes of a model, whether compiled code runs
_LOCK = threading.RLock()


def workspaces(model: nn.Module) -> Dict[str, GlobalWorkspace]:
    """Workspaces of a model by module name, in the order of its layers.

    Raises:
        ValueError: It has none.
    """
    found = dict(named_workspaces(model))
    if not found:
        raise ValueError(f'model: {type(model).__name__} has no workspaces; timm_ait.add_workspace(model) adds them')
    return found


@contextlib.contextmanager
def observed(model: nn.Module, modules: Dict[str, nn.Module], hook: Optional[Callable] = None) -> Iterator[None]:
    """A model in evaluation mode without gradients, with hook(name, module, inputs, output) after modules.

    The modes of all modules are restored afterwards, and the hooks removed.
    """
    with _LOCK, contextlib.ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, 'training', module.training)
        for name, module in modules.items():
            undo.callback(module.register_forward_hook(functools.partial(hook, name)).remove)
        model.eval()
        undo.enter_context(torch.compiler.set_stance('force_eager'))  # compiled code does not look for new hooks
        yield


def read_shares(
        model: nn.Module,
        images: torch.Tensor,
        visit: Optional[Callable[[str, torch.Tensor], Any]] = None,
        **kwargs,
) -> Dict[str, Dict[str, float]]:
    """How much the reading of each layer adds, for images (B, C, H, W).

    Args:
        visit: Called in the same pass with each layer's name and normed tokens (B, N, E) in float32.
        **kwargs: Passed to the model with the images, such as the question.

    Returns:
        By layer, where it reads:
        'residual_share': Norm of the reading, after the block's layer scale, relative to that of the block's output,
            mean over tokens; nan unless the layer ends the MLP of a pre-norm block, such as ViT's, EVA's or Swin's.
        'constant_share': Share of the readings' squared norm in their mean: 1 if all are equal, nan if all are 0.

    Raises:
        ValueError: The model has no workspaces or uses one several times, or there is a mask.
    """
    shares, reads, seen = {}, {}, set()

    def after_workspace(name: str, workspace: GlobalWorkspace, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor):
        if name in seen:
            raise ValueError(f'model: {name} is used several times in a forward, figures would be of one of them')
        seen.add(name)
        x = inputs[0]
        normed = workspace.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            if visit is not None:
                visit(name, normed.float().reshape(x.shape[0], -1, x.shape[-1]))
            if workspace.retrieves:
                # not by difference, which half precision would round away
                read = fixed_points(normed.float(), attractors(workspace), workspace.beta, workspace.retrieval_steps)
                read = reads[name] = read if workspace.gate is None else read * workspace.gate.float()
                tokens = read.flatten(0, -2)
                constant = float(tokens.mean(dim=0).square().sum() / tokens.square().sum(dim=-1).mean())
                shares[name] = {'residual_share': float('nan'), 'constant_share': constant}

    def after_block(name: str, block: nn.Module, inputs: Any, output: torch.Tensor):
        read = reads.pop(name)
        if hasattr(block, 'ls2'):
            read = block.ls2(read)
        elif getattr(block, 'gamma_2', None) is not None:
            read = block.gamma_2 * read
        elif not isinstance(block, (EvaBlock, SwinTransformerBlock)):
            return
        ratios = read.float().norm(dim=-1).flatten(1) / output.float().norm(dim=-1).flatten(1).clamp_min(1e-20)
        shares[name]['residual_share'] = float(ratios.mean())

    if isinstance(images, dict) or any(kwargs.get(name) is not None for name in ('attn_mask', 'patch_valid')):
        raise ValueError('images, attn_mask: dicts and masks are not supported, since masked tokens would count')
    found, suffix = workspaces(model), '.mlp.workspace'
    blocks = {
        name: model.get_submodule(name.removesuffix(suffix))
        for name, workspace in found.items() if name.endswith(suffix) and workspace.retrieves}
    with observed(model, found, after_workspace), observed(model, blocks, after_block):
        model(images, **kwargs)
    return shares


def collect_tokens(model: nn.Module, images: torch.Tensor, **kwargs) -> Dict[str, torch.Tensor]:
    """Input tokens of each workspace after its norm, (B, N, E) in float32; arguments and errors as in `read_shares`."""
    tokens: Dict[str, torch.Tensor] = {}
    read_shares(model, images, tokens.__setitem__, **kwargs)
    return tokens


@torch.no_grad()
def write_attention(
        workspace: GlobalWorkspace,
        tokens: torch.Tensor,
        bottleneck: Optional[Union[int, float]] = None,
) -> torch.Tensor:
    """Weights with which tokens would write into the slots, (A, M, T), zero where a token is not selected.

    Args:
        tokens: Normed tokens (T, E), or (B, N, E) for those of a batch, which all compete with each other.
        bottleneck: Tokens that each slot and head keep, a float is a share of T; by default the layer's own.

    Raises:
        ValueError: The layer does not write, or the bottleneck is out of its range.
    """
    if not workspace.writes:
        raise ValueError('workspace: it has write=False, so no tokens compete for it')
    bottleneck = workspace.bottleneck if bottleneck is None else bottleneck
    queries, keys = (
        F.linear(x.float(), projection().float()).unflatten(-1, (workspace.workspace_heads, -1)).transpose(0, 1)
        for x, projection in ((workspace.stored_memory(), workspace.q), (tokens.flatten(0, -2), workspace.k)))
    return naive.attend(queries, keys, keys, bottleneck)[1]


def _chance_overlap(num_kept: int, num_tokens: int) -> float:
    """Mean Jaccard index of two random selections of tokens: how many they share is hypergeometric."""
    k, n = torch.tensor([[num_kept], [num_tokens]], dtype=torch.float64)
    shared = torch.arange(1, num_kept + 1, dtype=torch.float64)
    choices = ((k, shared, 1), (n - k, k - shared, 1), (n, k, -1))
    logs = [sign * ((a + 1).lgamma() - (b + 1).lgamma() - (a - b + 1).lgamma()) for a, b, sign in choices]
    return float((sum(logs).exp() * shared / (2 * k - shared)).sum())


def competition(attention: torch.Tensor) -> Dict[str, float]:
    """How tokens compete for slots and slots share tokens, by their write weights (..., A, M, T).

    Returns:
        'coverage': Share of tokens that at least one slot and head selected.
        'overlap': Mean Jaccard index of the tokens that two slots of a head selected: 1 if all select the same,
            nan for a single slot.
        'chance_overlap': What the overlap is if each slot selects as many tokens at random.
        'effective_tokens': Mean over slots and heads of exp(entropy of the weights), 1 to k.
    """
    selected = attention > 0
    num_slots, num_tokens = attention.shape[-2:]
    counts = selected.to(attention.dtype)
    common = counts @ counts.transpose(-2, -1)
    size = common.diagonal(dim1=-2, dim2=-1)
    jaccard = common / (size.unsqueeze(-1) + size.unsqueeze(-2) - common).clamp_min(1.)
    others = ~torch.eye(num_slots, dtype=torch.bool, device=attention.device)
    return {
        'coverage': float(selected.flatten(-3, -2).any(dim=-2).float().mean()),
        'overlap': float(jaccard[..., others].mean()),
        'chance_overlap': _chance_overlap(round(float(size.mean())), num_tokens),
        'effective_tokens': float(torch.special.entr(attention).sum(dim=-1).exp().mean()),
    }


@torch.no_grad()
def attractors(workspace: GlobalWorkspace) -> torch.Tensor:
    """Slots as evaluation reads them, lifted to token width, (M, E) in float32.

    Raises:
        ValueError: The layer does not read.
    """
    if not workspace.retrieves:
        raise ValueError('workspace: it has retrieval=False, so no token reads from it')
    return workspace.attractors(workspace.stored_memory().to(workspace.norm.weight.dtype)).float()


def read_weights(workspace: GlobalWorkspace, tokens: torch.Tensor) -> torch.Tensor:
    """Weights softmax(beta xi X^T) with which normed tokens (..., E) read the slots in the first step, (..., M)."""
    return (workspace.beta * tokens.float() @ attractors(workspace).T).softmax(dim=-1)


@torch.no_grad()
def fixed_points(state: torch.Tensor, attractors: torch.Tensor, beta: float = 1., num_steps: int = 100) -> torch.Tensor:
    """Where repeated Hopfield retrieval takes each state (T, E) from attractors (M, E), (T, E).

    Source: theorem 2 of `Hopfield Networks is All You Need`, by which it converges.
    """
    for _ in range(num_steps):
        state = naive.retrieve(state, attractors, beta)
    return state


def retrieval(workspace: GlobalWorkspace, tokens: torch.Tensor) -> Dict[str, float]:
    """What normed tokens (..., E) read, and the fixed points that repeated reading reaches.

    Up to 2,048 of the tokens, drawn at random, are followed for 100 steps, to their fixed points.

    Returns:
        'effective_slots': Mean over tokens of exp(entropy of the read weights), 1 to M.
        'distance': Mean distance to the fixed point, relative to the norm of the token.
        'num_fixed_points': Number of fixed points, those within 1 % of the largest attractor norm counted once.
    """
    stored, beta = attractors(workspace), workspace.beta
    tokens = tokens.flatten(0, -2).float()
    starts = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0), device='cpu')[:2048]]
    ends = fixed_points(starts, stored, beta)
    num_distinct, left = 0, ends
    while len(left):
        left = left[(left - left[0]).norm(dim=-1) > 0.01 * stored.norm(dim=-1).max()]
        num_distinct += 1
    return {
        'effective_slots': float(torch.special.entr(read_weights(workspace, tokens)).sum(dim=-1).exp().mean()),
        'distance': float(((ends - starts).norm(dim=-1) / starts.norm(dim=-1)).mean()),
        'num_fixed_points': float(num_distinct),
    }


def analyse(
        model: nn.Module,
        batches: Iterable[torch.Tensor],
        bottleneck: Optional[Union[int, float]] = None,
) -> Dict[str, Dict[str, float]]:
    """Figures of every workspace, for batches of images (B, C, H, W), normalised for the model.

    The tokens of a batch compete with each other, for the bottleneck of `write_attention`.

    Returns:
        By layer, means over the batches: what `competition`, `retrieval` and `read_shares` return, as far as the layer
        writes and reads; 'effective_rank' and 'mean_cosine' of its slots.

    Raises:
        ValueError: There are no batches, or as `read_shares`.
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
        for name, shares in read_shares(model, images, visit).items():
            figures[name][-1].update(shares)
    if not any(figures.values()):
        raise ValueError('batches: at least one is needed, got none')
    return {
        name: {
            **{key: sum(f[key] for f in of_layer) / len(of_layer) for key in of_layer[0]},
            **slot_statistics(found[name].stored_memory()),
        }
        for name, of_layer in figures.items() if of_layer  # not those that no forward reaches
    }
