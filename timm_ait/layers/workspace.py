""" Global workspace layer and the MLP that ends in it.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
import contextlib
import inspect
import math
import sys
import weakref
from contextvars import ContextVar
from fractions import Fraction
from typing import Any, ContextManager, Dict, Iterator, List, Optional, Tuple, Type, Union

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.jit import Final
from torch.utils.checkpoint import CheckpointFunction

from timm.layers import Mlp
from timm.models import register_notrace_module

from timm_ait.ops.bottleneck import write
from timm_ait.ops.memory import in_backward, keep_, project_memory, slot_statistics, update_memory
from timm_ait.ops.naive import TokenNorm, WriteWeights
from timm_ait.ops.workspace import write_and_read

from .advance import register_workspace, world_size

__all__ = [
    'GlobalWorkspace',
    'WorkspaceMlp',
    'balance_loss',
    'check_at_least',
    'memory_statistics',
    'split_workspace_kwargs',
]

MEMORY_INITS = ('normal', 'uniform', 'identity')
MEMORY_UPDATES = ('orthogonal', 'normalize')

# tokens that are read at once in evaluation: their temporaries stay in cache
_TOKENS_PER_CHUNK = 512


def check_at_least(minimum: int, **values) -> None:
    """Raise a ValueError that names the first value that is no integer, or too small."""
    for name, value in values.items():
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


def _chunks(tokens: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    return tokens.reshape(-1, tokens.shape[-1]).split(_TOKENS_PER_CHUNK)


def _version(tensor: torch.Tensor) -> float:
    """How often a tensor was changed in place; inference tensors do not count it: nan, which equals nothing."""
    return float('nan') if tensor.is_inference() else tensor._version


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is neither of a subclass (a fake one) nor of torch.func, where it ends with its transform."""
    return type(tensor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which up to torch 2.10 is true in torch.compile as well."""
    return torch.compiler._is_exporting_flag


def _without_autocast(x: torch.Tensor) -> ContextManager:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _in_reentrant_checkpoint() -> bool:
    """Whether a re-entrant checkpoint runs its first forward, the one without a graph."""
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


class _BalanceLoss:
    """Balance loss of a forward: with its graph as long as the output of the forward has one, then its value."""

    def __init__(self, loss: torch.Tensor, output: torch.Tensor) -> None:
        self.value = loss.detach()
        self.loss = self.reference = None
        if torch.compiler.is_compiling() or output.grad_fn is None:
            self.loss = loss
        else:
            output.grad_fn.metadata['balance_loss'] = loss
            self.reference = weakref.ref(loss)

    def graph(self) -> Optional[torch.Tensor]:
        return self.loss if self.reference is None else self.reference()


class Projection(nn.Module):
    """Weight of a linear map that an operator applies; calling it gives the weight, through whatever parametrises it.

    Not an `nn.Linear`, which LoRA or quantisation would replace by one that is never called.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self) -> torch.Tensor:
        return self.weight


@register_notrace_module  # its write depends on the number of tokens, which symbolic tracing cannot know
class GlobalWorkspace(nn.Module):
    """Shared memory that tokens write into through a bottleneck and read from by Hopfield retrieval.

    The squashed tokens of the whole batch, xi = LayerNorm(x), compete for the memory: for each head and slot only the k
    best-scored tokens are written. Every token then retrieves from the attractors, the slots lifted to token width.

    A training forward starts from the stored memory and reads what it has just written. The written memory becomes the
    stored one when an optimizer that holds the workspace's parameters has stepped, or at `advance_memory`; the last
    forward before that wins. In evaluation, and where nothing of the write is trained, tokens only read.

    Shapes: x is (B, N, E) or any (..., E), the memory (M, D) with M = num_slots, D = slot_dim.

    Source: section 3 of the paper. Differences from its published implementation: the gradient flows through the write
    within the step, evaluation does not write, and by default slots are kept orthonormal, since the published update
    (`memory_update='normalize'`) lets them collapse onto each other within tens of steps.
    """
    writes: Final[bool]
    retrieves: Final[bool]
    gated: Final[bool]
    beta: Final[float]
    retrieval_steps: Final[int]
    dim: Final[int]
    num_slots: Final[int]

    def __init__(
            self,
            dim: int,
            num_slots: int = 32,
            slot_dim: int = 32,
            workspace_heads: int = 8,
            bottleneck: Union[int, float] = 512,
            beta: float = 1.,
            retrieval_steps: int = 1,
            memory_momentum: float = 0.9,
            memory_init: str = 'normal',
            memory_update: str = 'orthogonal',
            balance_weight: float = 1e-2,
            write: bool = True,
            retrieval: bool = True,
            differentiable_write: bool = True,
            gated: bool = False,
            reset_memory: bool = False,
            global_batch: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Token width E.
            num_slots: Number of slots M.
            slot_dim: Slot width D, also the width of a write head.
            workspace_heads: Number of write heads A.
            bottleneck: Tokens k that each slot and head keep of all B * N; a float in (0, 1] is a fraction of them.
            beta: Inverse temperature of the retrieval.
            retrieval_steps: Number of retrieval steps.
            memory_momentum: Weight of the memory before a write in the memory after it.
            memory_init: Initial memory, 'normal', 'uniform' or 'identity'.
            memory_update: 'orthogonal' keeps the slots orthonormal, 'normalize' (published) only of unit norm.
            balance_weight: Weight of the balance loss.
            write: Write in training. If False, the memory stays as it is.
            retrieval: Read from the memory. If False, the layer only normalises (or, if gated, does nothing).
            differentiable_write: Let the gradient flow from the retrieval through the write of the same step.
            gated: Residual form `x + gate * retrieve(xi)` with a gate per channel that starts at zero, for transformers
                trained without a workspace, instead of the paper's `xi + retrieve(xi)`.
            reset_memory: Start every write from the initial memory, which evaluation reads; nothing is remembered.
            global_batch: In distributed training, let the tokens of all ranks compete, not those of each rank.

        Raises:
            ValueError: An argument is out of its range.
        """
        super().__init__()
        check_at_least(
            1, dim=dim, num_slots=num_slots, slot_dim=slot_dim, workspace_heads=workspace_heads,
            retrieval_steps=retrieval_steps)
        if isinstance(bottleneck, float):
            _check_float('bottleneck', bottleneck, 0., 1., low_open=True)
        else:
            check_at_least(1, bottleneck=bottleneck)
        _check_float('beta', beta, 0., float('inf'), low_open=True)
        _check_float('memory_momentum', memory_momentum, 0., 1.)
        _check_choice('memory_init', memory_init, MEMORY_INITS)
        if memory_init == 'identity' and num_slots > slot_dim:
            raise ValueError(
                f"memory_init='identity' needs num_slots <= slot_dim, got {num_slots} slots of width {slot_dim}.")
        _check_choice('memory_update', memory_update, MEMORY_UPDATES)
        _check_float('balance_weight', balance_weight, 0., float('inf'))
        dd = {'device': device, 'dtype': dtype}

        self.dim = dim
        self.num_slots = num_slots
        self.slot_dim = slot_dim
        self.workspace_heads = workspace_heads
        self.bottleneck = bottleneck
        self.beta = float(beta)
        self.retrieval_steps = retrieval_steps
        self.memory_momentum = float(memory_momentum)
        self.memory_init = memory_init
        self.memory_update = memory_update
        self.balance_weight = float(balance_weight)
        self.writes = write
        self.retrieves = retrieval
        self.differentiable_write = differentiable_write
        self.gated = gated
        self.reset_memory = reset_memory
        self.global_batch = global_batch

        self.norm = nn.LayerNorm(dim, **dd)
        if write:
            self.q = Projection(slot_dim, workspace_heads * slot_dim, **dd)
            self.k = Projection(dim, workspace_heads * slot_dim, **dd)
            self.v = Projection(dim, workspace_heads * slot_dim, **dd)
            self.proj = Projection(workspace_heads * slot_dim, slot_dim, **dd)
            self.slot_norm = nn.LayerNorm(slot_dim, eps=1e-6, **dd)
            if not (differentiable_write and retrieval):
                # no gradient reaches them, for which distributed training would wait
                for module in (self.v, self.proj, self.slot_norm):
                    module.requires_grad_(False)
        self.register_buffer('memory', torch.empty(num_slots, slot_dim, **dd))
        # what the last training forward wrote; not finite where there is nothing
        self.register_buffer('pending', torch.empty(num_slots, slot_dim, **dd), persistent=False)
        # the memory as evaluation reads it, see `_current_slots`
        self.register_buffer('slots', torch.empty(num_slots, slot_dim, **dd), persistent=False)
        if retrieval:
            self.attractors = nn.Linear(slot_dim, dim, **dd)
        self.gate = nn.Parameter(torch.empty(dim, **dd)) if gated and retrieval else None

        # of the last training forward
        self._balance: Optional[_BalanceLoss] = None
        self.coverage: Optional[torch.Tensor] = None
        register_workspace(self)

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
        self.pending.fill_(float('nan'))
        self._refresh_slots()

    def forward(self, x: torch.Tensor, token_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Write (in training) and read.

        Args:
            x: (..., E).
            token_mask: Which tokens there are, (...), boolean; the others neither write nor count. All if None.

        Returns:
            Same shape and dtype as x.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):  # when it writes, and what the memory is, is not for a graph to say
                return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x, token_mask), {})
        if self.training and self.writes:
            if torch.jit.is_scripting():
                raise RuntimeError('TorchScript does not support workspaces in training mode: call model.eval().')
            return self._write_and_read(x, token_mask)
        return self._read(x)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """Retrieve from the stored memory, in plain PyTorch."""
        if not torch.jit.is_scripting():
            self._balance = None
        if not self.retrieves:
            # under autocast a norm may return float32; the workspace computes in the dtype that came in
            return x if self.gated else self.norm(x).to(x.dtype)
        slots = self.slots
        if not torch.jit.is_scripting():
            slots = self._current_slots()
        attractors = self.attractors(slots).to(x.dtype)
        if not torch.jit.is_scripting():
            if self._is_unobserved(x) and x.numel() > self.dim * _TOKENS_PER_CHUNK:
                output = torch.empty_like(x, memory_format=torch.contiguous_format)
                for chunk, part in zip(_chunks(x), _chunks(output)):
                    part.copy_(self._retrieve(chunk, self.norm(chunk).to(x.dtype), attractors))
                return output
        return self._retrieve(x, self.norm(x).to(x.dtype), attractors)

    def _is_unobserved(self, x: torch.Tensor) -> bool:
        """Whether nothing records how tokens are read (gradient, trace, hook), on the CPU, where caches count."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        hooks = self.norm._forward_hooks or self.norm._forward_pre_hooks
        return x.device.type == 'cpu' and _is_plain(x) and not hooks

    def _retrieve(self, x: torch.Tensor, tokens: torch.Tensor, attractors: torch.Tensor) -> torch.Tensor:
        """Add to x or to the normed tokens, both (..., E), what the latter retrieve from the attractors (M, E)."""
        keys = attractors if self.beta == 1. else self.beta * attractors
        state = tokens
        for _ in range(self.retrieval_steps - 1):
            state = F.linear(state, keys).softmax(dim=-1).to(x.dtype) @ attractors
        association = F.linear(state, keys).softmax(dim=-1).to(x.dtype)
        # the gate on the few attractors, and the residual in the product, are fewer passes over the tokens
        values = attractors if self.gate is None else (attractors * self.gate).to(x.dtype)
        residual = tokens if self.gate is None else x
        output = torch.addmm(residual.reshape(-1, self.dim), association.reshape(-1, self.num_slots), values)
        return output.view(x.shape).to(x.dtype)

    @torch.jit.unused
    def _write_and_read(self, x: torch.Tensor, token_mask: Optional[torch.Tensor]) -> torch.Tensor:
        write_modules = (self.q, self.k, self.v, self.proj, self.slot_norm)
        is_trained = any(parameter.requires_grad for module in write_modules for parameter in module.parameters())
        if not is_trained:
            return self._read(x)
        if _is_exporting():
            raise RuntimeError(
                'A workspace cannot be exported in training mode: its memory would never advance. Call model.eval().')
        if self.balance_weight and not torch.compiler.is_compiling() and _in_reentrant_checkpoint():
            raise RuntimeError(
                're-entrant gradient checkpointing cuts the balance loss from its parameters: use use_reentrant=False '
                '(timm.layers.set_reentrant_ckpt(False)), or balance_weight=0.')

        elsewhere = {parameter.device for parameter in self.parameters()} - {x.device}
        if elsewhere:  # offloaded, by tools that bring weights back where a module is called
            raise RuntimeError(
                f'A workspace cannot write with parameters on {", ".join(map(str, elsewhere))}, tokens on {x.device}: '
                'call model.eval(), or train without offloading.')

        tokens = x.reshape(-1, self.dim)
        mask = None if token_mask is None else token_mask.reshape(-1)
        if x.numel() == 0:
            # a token that is masked: a rank without images must have gradients (DDP), and take part in a global batch
            tokens, mask = F.pad(tokens, (0, 0, 0, 1)), torch.zeros(1, dtype=torch.bool, device=x.device)
        global_batch = self.global_batch and world_size() > 1
        # the memory accumulates small steps: at least float32, whatever the model or autocast computes in
        dtype = torch.promote_types(self.memory.dtype, torch.float32)
        with _without_autocast(x):
            norm = TokenNorm(self.norm.weight, self.norm.bias, self.norm.eps)
            # a copy, since backward needs the memory before the write
            memory = self.memory.to(dtype, copy=True)
            weights = WriteWeights(*[parameter.to(dtype) for parameter in (
                self.q(), self.k(), self.v(), self.proj(), self.slot_norm.weight, self.slot_norm.bias)])
            num_kept = self._num_kept(tokens, mask, global_batch)
            if self.retrieves and self.retrieval_steps == 1 and mask is None:
                output, written, candidate, balance, coverage = write_and_read(
                    tokens,
                    norm,
                    memory,
                    weights,
                    self.workspace_heads,
                    num_kept,
                    self._lift,
                    self.memory_momentum,
                    self.memory_update,
                    self.beta,
                    self.gate,
                    global_batch=global_batch,
                )
            else:
                # padding may be anything, also nan
                written_from = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.)
                candidate, balance, coverage, _ = write(
                    written_from, norm, memory, weights, self.workspace_heads, num_kept, mask, global_batch)
                written = update_memory(memory, candidate, self.memory_momentum, self.memory_update)
                normed = self.norm(tokens.to(self.norm.weight.dtype)).to(x.dtype)
                if self.retrieves:
                    output = self._retrieve(tokens, normed, self._lift(written).to(x.dtype))
                else:
                    output = tokens if self.gated else normed
        if x.numel() == 0:
            output = output[:0]
        output = output.view(x.shape)
        if torch.compiler.is_compiling() or not in_backward():
            self.coverage = coverage.detach()
            self._balance = _BalanceLoss(self.balance_weight * balance, output)
        with torch.no_grad():
            if x.numel() > 0 or global_batch:
                self._keep(memory, candidate, written)
        return output

    def _num_kept(self, tokens: torch.Tensor, mask: Optional[torch.Tensor], global_batch: bool) -> int:
        """Number k of tokens that each slot and head keep."""
        if isinstance(self.bottleneck, int):
            return self.bottleneck
        num_tokens = tokens.shape[0] if mask is None else int(mask.sum())
        if global_batch:
            count = torch.tensor(num_tokens, device=tokens.device)
            dist.all_reduce(count)
            num_tokens = int(count)
        # integers, since compilers do not carry a float into a shape
        share = Fraction(self.bottleneck).limit_denominator(2 ** 20)
        numerator, denominator = share.numerator, share.denominator
        return max(1, (2 * num_tokens * numerator + denominator) // (2 * denominator))

    def _lift(self, memory: torch.Tensor) -> torch.Tensor:
        """Attractors (M, E) of a memory that was just written (M, D)."""
        memory = memory if self.differentiable_write else memory.detach()
        return self.attractors(memory.to(self.norm.weight.dtype))

    def _keep(self, memory: torch.Tensor, candidate: torch.Tensor, written: torch.Tensor) -> None:
        """Keep what a forward wrote until the parameters move."""
        if not self.reset_memory:
            keep_(self.pending, written)

    def stored_memory(self) -> torch.Tensor:
        """The memory (M, D) that evaluation reads, in at least float32.

        Its slots are orthonormal, or of unit norm, also where those in the buffer are not any more: in averaged copies
        (EMA), and in half precision.
        """
        with _without_autocast(self.memory):
            memory = self.memory.detach().to(torch.promote_types(self.memory.dtype, torch.float32))
            return project_memory(memory, self.memory_update)

    @torch.jit.unused
    def _current_slots(self) -> torch.Tensor:
        """`stored_memory` in the dtype of the parameters, made when the memory has changed and not in every forward.

        A change through `.data` shows after the next `eval()` alone, since PyTorch does not count it.
        """
        memory = self._projected if _is_exporting() else self.memory
        if torch.compiler.is_dynamo_compiling():  # a compiled graph outlives what it cannot see change
            slots = self.stored_memory()
        elif memory is not None and memory is self._projected and _version(memory) == self._projected_version:
            slots = self.slots
        elif torch.jit.is_tracing() or _is_exporting() or not _is_plain(memory):
            slots = self.stored_memory()
        else:
            self._refresh_slots()
            slots = self.slots
        return slots.to(self.norm.weight.dtype)

    @torch.no_grad()
    def _refresh_slots(self) -> None:
        with torch.inference_mode(False):
            self.slots = self.stored_memory().to(self.memory.dtype)
        self._projected, self._projected_version = self.memory, _version(self.memory)

    def train(self, mode: bool = True) -> 'GlobalWorkspace':
        super().train(mode)
        if not mode:
            self._refresh_slots()  # also after changes through .data, which no version counts
        return self

    def _apply(self, fn, recurse: bool = True) -> 'GlobalWorkspace':
        was_meta = self.pending.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.pending.is_meta:
            # not what happened to be there: `to_empty` leaves the memory to a checkpoint
            self.pending.fill_(float('nan'))
            self.memory.data.fill_(float('nan'))
        self._refresh_slots()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.pending = torch.full_like(self.memory, float('nan'))
        self._refresh_slots()

    def __prepare_scriptable__(self) -> 'GlobalWorkspace':
        if self.training and self.writes:
            raise RuntimeError(
                'torch.jit.script does not support workspaces in training mode: call model.eval() first, or train '
                'without TorchScript (train.py: drop --torchscript).')
        self._refresh_slots()
        return self

    def __getstate__(self) -> Dict[str, Any]:
        # what belongs to one forward stays behind when the layer is copied (EMA) or pickled
        return {**self.__dict__, '_balance': None, '_projected': None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._refresh_slots()
        register_workspace(self)

    @torch.jit.ignore
    def memory_statistics(self) -> Dict[str, float]:
        """How distinct the slots that evaluation reads are, and how many tokens they see.

        Returns:
            'effective_rank' (1 to min(M, D)), 'mean_cosine' of distinct slots, and 'coverage': share of tokens that at
            least one slot selected in the last write, nan before the first.
        """
        coverage = float('nan') if self.coverage is None else float(self.coverage)
        return {**slot_statistics(self.stored_memory()), 'coverage': coverage}

    def extra_repr(self) -> str:
        names = ('num_slots', 'slot_dim', 'workspace_heads', 'bottleneck', 'beta', 'memory_momentum', 'memory_update')
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

    def forward(self, x: torch.Tensor, token_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return self.workspace(x, token_mask)


_WORKSPACE_ARGUMENTS = frozenset(inspect.signature(GlobalWorkspace).parameters) - {'dim', 'device', 'dtype'}


def split_workspace_kwargs(kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Split keyword arguments into those of `GlobalWorkspace` and the others."""
    workspace_kwargs = {name: value for name, value in kwargs.items() if name in _WORKSPACE_ARGUMENTS}
    return workspace_kwargs, {name: value for name, value in kwargs.items() if name not in workspace_kwargs}


def _named_workspaces(model: nn.Module) -> List[Tuple[str, GlobalWorkspace]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, GlobalWorkspace)]


def balance_loss(model: nn.Module) -> torch.Tensor:
    """Weighted balance loss of the last forward (scalar), summed over the workspaces that wrote in it.

    Zero where none did: in evaluation, or where nothing of the write is trained. It has its gradient as long as the
    output of the forward, or a loss made of it, is there; without, it is the value alone.
    """
    losses = [workspace._balance for _, workspace in _named_workspaces(model) if workspace._balance is not None]
    graphs = [loss.graph() for loss in losses]
    # a value without its graph beside others that have theirs is of an earlier forward
    alive = [graph for graph in graphs if graph is not None] or [loss.value for loss in losses]
    total = sum(alive, torch.zeros((), device=alive[0].device if alive else None))
    record = _record.get()
    if record is not None:
        record.append(total)
    return total


_record: ContextVar[Optional[List[torch.Tensor]]] = ContextVar('balance_losses', default=None)


@contextlib.contextmanager
def record_balance_losses() -> Iterator[List[torch.Tensor]]:
    """List the balance losses that are asked for meanwhile."""
    token = _record.set([])
    try:
        yield _record.get()
    finally:
        _record.reset(token)


def memory_statistics(model: nn.Module) -> Dict[str, Dict[str, float]]:
    """`GlobalWorkspace.memory_statistics` of every workspace of a model, by module name."""
    return {name: module.memory_statistics() for name, module in _named_workspaces(model)}
