""" Global workspace layer and the MLP that ends in it.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
import math
import os
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from torch.jit import Final

from timm.layers import Mlp
from timm.models import register_notrace_module

from timm_ait.ops.bottleneck import write_unnormed
from timm_ait.ops.hopfield import norm_read, read, retrieve
from timm_ait.ops.memory import project_memory, slot_statistics, snapshot, update_memory

__all__ = [
    'GlobalWorkspace',
    'WorkspaceMlp',
    'balance_loss',
    'convert_published_workspace',
    'memory_statistics',
    'published_workspace_mlp',
]

MEMORY_INITS = ('normal', 'uniform', 'identity')
MEMORY_UPDATES = ('orthogonal', 'normalize')
BACKENDS = ('torch', 'triton')
# forwards whose memory is remembered for gradient checkpointing to recompute
_MAX_PENDING_FORWARDS = 8


def _check_int(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')


def _check_float(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not (low < value if low_open else low <= value) or value > high:
        bracket = '(' if low_open else '['
        raise ValueError(f'{name} must be a number in {bracket}{low}, {high}], got {value!r}.')


def _check_choice(name: str, value: str, choices: Tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}.')


@register_notrace_module  # its write depends on the number of tokens, which symbolic tracing cannot know
class GlobalWorkspace(nn.Module):
    """Shared memory that tokens write into through a bottleneck and read from by Hopfield retrieval.

    The squashed tokens of the whole batch, xi = LayerNorm(x), compete for the memory: for each head and slot only the k
    best-scored tokens are written. Every token then retrieves from the attractors, the slots lifted to token width. In
    evaluation the memory is frozen: tokens only read.

    Shapes: x is (B, N, E) or any (..., E), the memory (M, D) with M = num_slots, D = slot_dim.

    Source: section 3 of the paper. Differences from its published implementation: the gradient flows through the write
    within the step, evaluation does not write, and by default slots are kept orthonormal, since the published update
    (`memory_update='normalize'`) lets them collapse onto each other within tens of steps.
    """
    writes: Final[bool]
    retrieves: Final[bool]
    backend: Final[str]
    balance_loss: Optional[torch.Tensor]
    coverage: Optional[torch.Tensor]

    def __init__(
            self,
            dim: int,
            num_slots: int = 32,
            slot_dim: int = 32,
            num_heads: int = 8,
            bottleneck: Union[int, float] = 512,
            beta: float = 1.,
            retrieval_steps: int = 1,
            momentum: float = 0.9,
            memory_init: str = 'normal',
            memory_update: str = 'orthogonal',
            balance_weight: float = 1e-2,
            write: bool = True,
            retrieval: bool = True,
            differentiable_write: bool = True,
            gated: bool = False,
            reset_memory: bool = False,
            backend: Optional[str] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Token width E.
            num_slots: Number of slots M.
            slot_dim: Slot width D, also the width of a write head.
            num_heads: Number of write heads A.
            bottleneck: Tokens k a slot and head keep out of all B * N; a float in (0, 1] is a fraction of them.
            beta: Inverse temperature of the retrieval.
            retrieval_steps: Number of retrieval steps.
            momentum: Weight of the memory before a write in the memory after it.
            memory_init: Initial memory, 'normal', 'uniform' or 'identity'.
            memory_update: 'orthogonal' keeps the slots orthonormal, 'normalize' (published) only of unit norm.
            balance_weight: Weight of the balance loss.
            write: Write in training. If False, the memory stays as it is.
            retrieval: Read from the memory. If False, the layer only normalises (or, if gated, does nothing).
            differentiable_write: Let the gradient flow from the retrieval through the write of the same step.
            gated: Residual form `x + gate * retrieve(xi)` with a gate a channel that starts at zero, for transformers
                trained without a workspace, instead of the paper's `xi + retrieve(xi)`.
            reset_memory: Start every write from the initial memory, which evaluation reads; nothing is remembered.
            backend: Fused operators, 'torch' or 'triton' (CUDA, not yet timed on a GPU). None takes that of the
                environment variable TIMM_AIT_BACKEND, else 'torch'.

        Raises:
            ValueError: An argument is out of its range.
        """
        super().__init__()
        _check_int('dim', dim, 1)
        _check_int('num_slots', num_slots, 1)
        _check_int('slot_dim', slot_dim, 1)
        _check_int('num_heads', num_heads, 1)
        if isinstance(bottleneck, float):
            _check_float('bottleneck', bottleneck, 0., 1., low_open=True)
        else:
            _check_int('bottleneck', bottleneck, 1)
        _check_float('beta', beta, 0., float('inf'), low_open=True)
        _check_int('retrieval_steps', retrieval_steps, 1)
        _check_float('momentum', momentum, 0., 1.)
        _check_choice('memory_init', memory_init, MEMORY_INITS)
        if memory_init == 'identity' and num_slots > slot_dim:
            raise ValueError(
                f"memory_init='identity' needs num_slots <= slot_dim, got {num_slots} slots of width {slot_dim}.")
        _check_choice('memory_update', memory_update, MEMORY_UPDATES)
        _check_float('balance_weight', balance_weight, 0., float('inf'))
        backend = backend or os.environ.get('TIMM_AIT_BACKEND', 'torch')
        _check_choice('backend (or the environment variable TIMM_AIT_BACKEND)', backend, BACKENDS)
        dd = {'device': device, 'dtype': dtype}

        self.dim = dim
        self.num_slots = num_slots
        self.slot_dim = slot_dim
        self.num_heads = num_heads
        self.bottleneck = bottleneck
        self.beta = float(beta)
        self.retrieval_steps = retrieval_steps
        self.momentum = float(momentum)
        self.memory_init = memory_init
        self.memory_update = memory_update
        self.balance_weight = float(balance_weight)
        self.writes = write
        self.retrieves = retrieval
        self.differentiable_write = differentiable_write
        self.backend = backend

        self.norm = nn.LayerNorm(dim, **dd)
        if write:
            self.q = nn.Linear(slot_dim, num_heads * slot_dim, bias=False, **dd)
            self.k = nn.Linear(dim, num_heads * slot_dim, bias=False, **dd)
            self.v = nn.Linear(dim, num_heads * slot_dim, bias=False, **dd)
            self.proj = nn.Linear(num_heads * slot_dim, slot_dim, bias=False, **dd)
            self.slot_norm = nn.LayerNorm(slot_dim, eps=1e-6, **dd)
        self.register_buffer('memory', torch.empty(num_slots, slot_dim, **dd))
        if retrieval:
            self.attractors = nn.Linear(slot_dim, dim, **dd)
        self.gate = nn.Parameter(torch.empty(dim, **dd)) if gated and retrieval else None
        self.gated = gated
        self.reset_memory = reset_memory

        # of the last training forward
        self.balance_loss = None
        self.coverage = None
        self._pending_forwards: Deque[Tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=_MAX_PENDING_FORWARDS)
        self._published_query_gradient = False

        self.reset_parameters()

    def init_weights(self) -> None:
        """Called by timm's ViT initialisation, which would otherwise leave its own in the projections."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise parameters and memory."""
        for module in self.children():
            module.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        memory = torch.empty_like(self.memory, dtype=torch.float32)
        if self.memory_init == 'normal':
            nn.init.normal_(memory)
        elif self.memory_init == 'uniform':
            nn.init.uniform_(memory, -1., 1.)
        else:
            nn.init.eye_(memory)
        self.memory.copy_(project_memory(memory, self.memory_update, num_iterations=32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Write (in training) and read.

        Args:
            x: (..., E).

        Returns:
            Same shape and dtype as x.
        """
        # the one-step read norms its tokens itself
        reads_unnormed = self.retrieves and self.retrieval_steps == 1
        tokens = x.reshape(-1, self.dim)
        if not reads_unnormed:
            # under autocast a norm may return float32; the workspace computes in the dtype that came in
            tokens = self.norm(tokens).to(x.dtype)
        if self.training and self.writes and tokens.shape[0] > 0:
            memory, tokens = self._write(tokens, reads_unnormed)
        else:
            memory = self.stored_memory()
        if not self.retrieves:
            return x if self.gated else tokens.view(x.shape)
        attractors = self.attractors(memory.to(self.attractors.weight.dtype))
        if reads_unnormed:
            return norm_read(
                tokens,
                self.norm.weight,
                self.norm.bias,
                self.norm.eps,
                attractors,
                self.beta,
                self.gate,
                self.backend,
            ).view(x.shape)
        state = tokens
        for _ in range(self.retrieval_steps - 1):
            state = retrieve(state, attractors, self.beta)
        residual = tokens if self.gate is None else x.reshape(-1, self.dim)
        return read(state, attractors, self.beta, residual, self.gate, self.backend).view(x.shape)

    def stored_memory(self) -> torch.Tensor:
        """The memory (M, D) that evaluation reads, at least float32.

        Its slots are orthonormal, or of unit norm, also where those in the buffer are not any more: in averaged copies
        (EMA), and in half precision.
        """
        return torch.ops.timm_ait.frozen_memory(self.memory, self.memory_update)

    @torch.jit.unused
    def _write(self, tokens: torch.Tensor, unnormed: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """Write tokens (B * N, E) into the stored memory.

        Args:
            tokens: Normed, or still unnormed.
            unnormed: Which of them.

        Returns:
            The memory (M, D) that the tokens read from, and the tokens; unnormed ones may go to `norm_read` alone.
        """
        # gradient checkpointing runs a forward again inside backward: same result, and the memory moves once
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if recomputing:
            memory = self._recall_memory(tokens)
        else:
            memory = snapshot(self.memory)  # backward needs the memory before the write
            if not torch.compiler.is_compiling():
                self._pending_forwards.append((tokens[0].detach().clone(), memory.clone()))
        bottleneck = self.bottleneck
        if isinstance(bottleneck, float):
            bottleneck = max(1, round(bottleneck * tokens.shape[0]))
        # the memory accumulates small steps: at least float32, whatever the model or autocast computes in
        dtype = torch.promote_types(memory.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            memory = memory.to(dtype)
            candidate, balance, coverage, read_tokens = write_unnormed(
                tokens,
                self.norm.weight if unnormed else None,
                self.norm.bias if unnormed else None,
                self.norm.eps,
                memory,
                self.q.weight.to(dtype),
                self.k.weight.to(dtype),
                self.v.weight.to(dtype),
                self.proj.weight.to(dtype),
                self.slot_norm.weight.to(dtype),
                self.slot_norm.bias.to(dtype),
                self.num_heads,
                bottleneck,
                self.backend,
            )
            written = update_memory(memory, candidate, self.momentum, self.memory_update)
        if not recomputing:
            self.balance_loss = self.balance_weight * balance
            self.coverage = coverage.detach()
        if not recomputing and not self.reset_memory:
            with torch.no_grad():
                # a non-finite batch shows in its own loss; the memory must outlive it
                self.memory.copy_(torch.where(written.isfinite().all(), written.to(self.memory.dtype), self.memory))
        if self._published_query_gradient:
            # the published code averages in place, into the memory that backward has saved for W_Q
            memory.data.lerp_(candidate.detach(), 1. - self.momentum)
        return written if self.differentiable_write else written.detach(), read_tokens if unnormed else tokens

    def _recall_memory(self, tokens: torch.Tensor) -> torch.Tensor:
        """The memory that the forward of these tokens started from."""
        for token, memory in reversed(self._pending_forwards):
            if token.device == tokens.device and torch.allclose(token, tokens[0], rtol=1e-3, atol=1e-5, equal_nan=True):
                return memory.clone()
        raise RuntimeError(
            'Gradient checkpointing recomputes a forward whose memory is no longer known. At most '
            f'{_MAX_PENDING_FORWARDS} forwards can precede a backward; run backward after each forward.')

    @torch.jit.ignore
    def memory_statistics(self) -> Dict[str, float]:
        """How distinct the slots that evaluation reads are, and how many tokens they see.

        Returns:
            'effective_rank' (1 to min(M, D)), 'mean_cosine' of distinct slots, and 'coverage': share of tokens that at
            least one slot selected in the last write, nan before the first.
        """
        coverage = float('nan') if self.coverage is None else float(self.coverage)
        return {**slot_statistics(self.stored_memory()), 'coverage': coverage}

    def __getstate__(self) -> Dict[str, Any]:
        # what belongs to one forward stays behind when the layer is copied (EMA) or pickled
        return {**self.__dict__, 'balance_loss': None, '_pending_forwards': deque(maxlen=_MAX_PENDING_FORWARDS)}

    def extra_repr(self) -> str:
        names = ('num_slots', 'slot_dim', 'num_heads', 'bottleneck', 'beta', 'momentum', 'memory_update')
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)


class WorkspaceMlp(Mlp):
    """timm's MLP, ending in a global workspace. Its own keys are those of the plain MLP."""

    def __init__(
            self,
            in_features: int,
            hidden_features: Optional[int] = None,
            out_features: Optional[int] = None,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Optional[Type[nn.Module]] = None,
            bias: Union[bool, Tuple[bool, bool]] = True,
            drop: Union[float, Tuple[float, float]] = 0.,
            device=None,
            dtype=None,
            **workspace_kwargs,
    ) -> None:
        """
        Args:
            in_features: Input width.
            hidden_features: Hidden width, the input width if None.
            out_features: Output and token width E, the input width if None.
            act_layer: Activation layer.
            norm_layer: Norm of the hidden layer.
            bias: Use biases.
            drop: Dropout rate.
            **workspace_kwargs: Arguments of `GlobalWorkspace`.
        """
        super().__init__(
            in_features,
            hidden_features,
            out_features,
            act_layer=act_layer,
            norm_layer=norm_layer,
            bias=bias,
            drop=drop,
            device=device,
            dtype=dtype,
        )
        self.workspace = GlobalWorkspace(out_features or in_features, device=device, dtype=dtype, **workspace_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return self.workspace(x)


def published_workspace_mlp(
        in_features: int,
        hidden_features: Optional[int] = None,
        num_slots: int = 32,
        slot_dim: int = 32,
        num_heads: int = 8,
        bottleneck: int = 512,
        beta: float = 1.,
) -> WorkspaceMlp:
    """The MLP and workspace exactly as the published implementation computes them in training.

    No gradient flows through the write, and memory rows are normalised but not kept apart. Evaluation is ours: frozen.
    """
    mlp = WorkspaceMlp(
        in_features,
        hidden_features,
        num_slots=num_slots,
        slot_dim=slot_dim,
        num_heads=num_heads,
        bottleneck=bottleneck,
        beta=beta,
        memory_update='normalize',
        differentiable_write=False,
    )
    mlp.workspace._published_query_gradient = True
    return mlp


def convert_published_workspace(state_dict: Dict[str, torch.Tensor], num_heads: int) -> Dict[str, torch.Tensor]:
    """Turn the state dict of one published layer into one that `published_workspace_mlp` loads.

    The published code concatenates heads slot-dim-major, ours head-major, so the columns of its output projection are
    permuted.

    Args:
        state_dict: Keys fc1, fc2, norm, fc3, memoryupdate.*; without further prefix.
        num_heads: Number of write heads of the published layer.

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
    _check_int('num_heads', num_heads, 1)
    state_dict = dict(state_dict)
    momentum = state_dict.pop('memoryupdate.beta', torch.tensor(0.9))
    if not math.isclose(float(momentum), 0.9, rel_tol=1e-6):
        raise ValueError(f"state_dict['memoryupdate.beta'] must be 0.9, the published momentum, got {float(momentum)}.")
    missing, unknown = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f'state_dict is not that of a published layer: missing keys {missing}, unknown keys {unknown}.')
    output = state_dict['memoryupdate.mha.fc.weight']
    if output.shape[1] % num_heads:
        raise ValueError(f'num_heads must divide {output.shape[1]}, the width of the heads together, got {num_heads}.')
    state_dict['memoryupdate.mha.fc.weight'] = output.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)
    return {names[key]: value for key, value in state_dict.items()}


def _workspaces(model: nn.Module) -> List[Tuple[str, GlobalWorkspace]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, GlobalWorkspace)]


def balance_loss(model: nn.Module) -> torch.Tensor:
    """Weighted balance loss of the last training forward, summed over the workspaces of a model (scalar).

    Raises:
        RuntimeError: There was no training forward, or it ran in re-entrant gradient checkpointing, which cuts the
            balance loss from its parameters.
    """
    layers = [(name, module) for name, module in _workspaces(model) if module.writes]
    for name, module in layers:
        if module.balance_loss is None:
            raise RuntimeError(f'{name} has no balance loss: run a forward in training mode before asking for it.')
        if torch.is_grad_enabled() and module.q.weight.requires_grad and not module.balance_loss.requires_grad:
            raise RuntimeError(
                f'{name} computed its balance loss without gradient. The forward ran under no_grad, or in re-entrant '
                'gradient checkpointing: use timm.layers.set_reentrant_ckpt(False).')
    return sum((module.balance_loss for _, module in layers), torch.zeros(()))


def memory_statistics(model: nn.Module) -> Dict[str, Dict[str, float]]:
    """`GlobalWorkspace.memory_statistics` of every workspace of a model, by module name."""
    return {name: module.memory_statistics() for name, module in _workspaces(model)}
