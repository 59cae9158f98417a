""" Global workspace layer and the MLP that ends in it.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
"""
import contextlib
import math
from typing import Dict, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.jit import Final

from timm.layers import Mlp

from timm_ait.ops.memory import add_written_, project_memory, slot_statistics, update_memory
from timm_ait.ops.naive import WriteWeights, num_kept
from timm_ait.ops.workspace import read, write

from ._arguments import check_at_least, check_choice, check_known, check_number, options, split_kwargs
from .advance import register_workspace
from .ranks import ranks_of
from .step import StepwiseMemory

MEMORY_INITS = {
    'normal': nn.init.normal_,
    'uniform': lambda memory: nn.init.uniform_(memory, -1., 1.),
    'identity': nn.init.eye_,
}


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


class GlobalWorkspace(StepwiseMemory):
    """Shared memory that tokens write into through a bottleneck and read from by Hopfield retrieval.

    The squashed tokens of the whole batch, xi = LayerNorm(x), compete for the memory: for each head and slot only the k
    best-scored tokens are written. Every token then retrieves from the attractors, the slots lifted to token width.

    The layer returns `xi + retrieve(xi)`: in a block of your own write `x = x + workspace(x)`. With `gated=True` it
    returns `x + gate * retrieve(xi)`, which takes the place of x.

    A training forward starts from the stored memory and reads what it has just written. When an optimizer that holds
    the workspace's parameters steps, or at `advance_memory`, the memory becomes the mean of what the forwards since the
    last step wrote. A forward without gradient leaves no trace. In evaluation, and where the write is frozen, tokens
    only read. In your own training loop, add `timm_ait.balance_loss(model)` to the loss, and create the optimizer after
    the workspaces.

    Shapes: x is (B, N, E) or any (..., E), the memory (M, D) with M = num_slots, D = slot_dim.

    Source: section 3 of the paper. Differences from its published implementation: the gradient flows through the write
    within the step, evaluation does not write, and by default slots are kept orthonormal, since the published update
    (`memory_update='normalize'`) lets them collapse onto each other within tens of steps.
    """
    writes: Final[bool]
    retrieves: Final[bool]
    gated: Final[bool]

    def __init__(
            self,
            dim: int,
            num_slots: int = 32,
            slot_dim: int = 32,
            workspace_heads: int = 8,
            bottleneck: Union[int, float] = 1 / 64,
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
            bottleneck: Tokens k that each slot and head keep of all T = B * N: a fraction in (0, 1], as a float, or
                their number (1 is one token, 1. is all). By default the paper's share, 512 of 32,768. With a fixed
                number, the balance loss grows with the batch, about as T / (M * k), and in small batches every token is
                kept.
            beta: Inverse temperature of the retrieval.
            retrieval_steps: Number of retrieval steps.
            memory_momentum: Weight of the memory before a write in the memory after it.
            memory_init: Initial memory, 'normal', 'uniform' or 'identity'.
            memory_update: 'orthogonal' makes slots orthonormal (if M > D their columns, then slots of unit norm),
                'normalize' (published) only of unit norm.
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
        num_kept(bottleneck, 1)  # checks it
        check_number('beta', beta, 0., float('inf'), low_open=True)
        check_number('memory_momentum', memory_momentum, 0., 1.)
        check_choice('memory_init', memory_init, tuple(MEMORY_INITS))
        if memory_init == 'identity' and num_slots > slot_dim:
            raise ValueError(
                f"memory_init='identity' needs num_slots <= slot_dim, got {num_slots} slots of width {slot_dim}.")
        check_choice('memory_update', memory_update, ('orthogonal', 'normalize'))
        check_number('balance_weight', balance_weight, 0., float('inf'))
        for name in ('write', 'retrieval', 'differentiable_write', 'gated', 'reset_memory', 'global_batch'):
            check_choice(name, locals()[name], (True, False))
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
        if retrieval:
            self.attractors = nn.Linear(slot_dim, dim, **dd)
        self.gate = nn.Parameter(torch.empty(dim, **dd)) if gated and retrieval else None

        self.reset_parameters()
        register_workspace(self)  # other threads may look into it from here on

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise parameters and memory."""
        for module in self.children():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        memory = MEMORY_INITS[self.memory_init](torch.empty_like(self.memory, dtype=torch.float32))
        self.memory.copy_(project_memory(memory, self.memory_update))
        self.written = None
        self.end_step()

    def init_weights(self) -> None:
        """For timm's ViT initialisation, which would leave its own in the projections."""
        self.reset_parameters()

    def forward(self, x: torch.Tensor, token_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Write (in training) and read.

        Args:
            x: (..., E).
            token_mask: Valid tokens, (...), boolean; the others neither write nor count. All if None.

        Returns:
            `LayerNorm(x) + retrieve(LayerNorm(x))`, or gated `x + gate * retrieve(LayerNorm(x))`: the shape and dtype
            of x.

        Raises:
            ValueError: The tokens are not E wide, or in training the mask is not theirs.
            RuntimeError: The layer cannot write where it is: inside of `nn.DataParallel`, of FSDP with flat parameters,
                of re-entrant checkpointing, TorchScript, `torch.export` or `torch.func`, or with offloaded parameters.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):  # symbolic tracing keeps the layer whole
                return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x, token_mask), {})
        if x.shape[-1] != self.dim:
            raise ValueError(f'The tokens are {x.shape[-1]} wide, this workspace takes tokens of width {self.dim}.')
        if self.training and self.writes:
            if torch.jit.is_scripting():
                raise RuntimeError(
                    'TorchScript does not support workspaces in training mode: call model.eval(), or drop '
                    '--torchscript.')
            return self._write_and_read(x, token_mask)
        return self._read(x)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        if not self.retrieves:
            return x if self.gated else self.norm(x).to(x.dtype)
        tokens = self.norm(x).to(x.dtype).reshape(-1, self.dim)
        attractors = self.attractors(F.normalize(self.memory, dim=-1).to(self.norm.weight.dtype))
        residual = x.reshape(-1, self.dim) if self.gated else None
        if not torch.jit.is_scripting():
            if not x.is_meta and torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):  # it would round the residual
                    return read(tokens, attractors, self.beta, self.retrieval_steps, residual, self.gate).view(x.shape)
        output = read(tokens, attractors, self.beta, self.retrieval_steps, residual, self.gate)
        return output.view(x.shape).to(x.dtype)

    @torch.jit.unused
    def _write_and_read(self, x: torch.Tensor, token_mask: Optional[torch.Tensor]) -> torch.Tensor:
        write_modules = (self.q, self.k, self.v, self.proj, self.slot_norm)
        is_trained = [parameter.requires_grad for module in write_modules for parameter in module.parameters()]
        if is_trained and not any(is_trained):
            if torch.is_grad_enabled():
                self.balance = self._balance_node = None
            return self._read(x)
        self.check_it_can_write(x, token_mask, has_parameters=bool(is_trained))

        normed = self.norm(x).to(x.dtype).reshape(-1, self.dim)
        tokens, mask = x.reshape(-1, self.dim), None if token_mask is None else token_mask.reshape(-1)
        if x.numel() == 0:
            # a token that is masked: a rank without images must have gradients (DDP), and take part in a global batch
            tokens, normed = F.pad(tokens, (0, 0, 0, 1)), F.pad(normed, (0, 0, 0, 1))
            mask = torch.zeros(1, dtype=torch.bool, device=x.device)
        # the memory accumulates small steps: at least float32, whatever the model or autocast computes in
        dtype = torch.promote_types(self.memory.dtype, torch.float32)
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            # a copy, since backward needs the memory before the write
            memory = self.memory.to(dtype, copy=True)
            weights = WriteWeights(*[parameter.to(dtype) for parameter in (
                self.q(), self.k(), self.v(), self.proj(), self.slot_norm.weight, self.slot_norm.bias)])
            ranks = ranks_of(self) if self.global_batch else None
            candidate, balance, coverage = write(
                normed, memory, weights, self.workspace_heads, self.bottleneck, mask, ranks)
            if not torch.compiler.is_compiling():
                self.check_derivative(candidate)
            written = update_memory(memory, candidate, self.memory_momentum, self.memory_update)
            output = tokens if self.gated else normed
            if self.retrieves:
                lifted = written if self.differentiable_write else written.detach()
                attractors = self.attractors(lifted.to(self.norm.weight.dtype))
                output = read(normed, attractors, self.beta, self.retrieval_steps, output, self.gate)
        output = (output if x.numel() else output[:0]).view(x.shape)
        if torch.is_grad_enabled():
            self.keep_balance(self.balance_weight * balance, coverage, output)
            written = written.detach()
            if mask is not None:  # where no token is valid nothing was written
                written = torch.where(coverage > 0, written, float('nan'))
            self._keep(memory, candidate.detach(), written)
        return output

    def _keep(self, memory: torch.Tensor, candidate: torch.Tensor, written: torch.Tensor) -> None:
        """Keep what a forward wrote until the parameters move."""
        if not self.reset_memory:
            add_written_(*self.written_since_step(), written)

    def stored_memory(self) -> torch.Tensor:
        """The memory (M, D) that evaluation reads, in at least float32: unit rows, also where an average (EMA) or half
        precision has moved them."""
        memory = self.memory.detach()
        return F.normalize(memory.to(torch.promote_types(memory.dtype, torch.float32)), dim=-1)

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
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """As `Mlp`, whose output width is the token width E, with arguments of `GlobalWorkspace` among its own."""
        check_known(kwargs, options(Mlp) | options(GlobalWorkspace), 'timm_ait.GlobalWorkspace')
        workspace_kwargs, kwargs = split_kwargs(GlobalWorkspace, kwargs)
        if kwargs.get('use_conv'):
            raise ValueError('use_conv=True is not supported: a workspace takes tokens, their width last.')
        super().__init__(in_features, hidden_features, out_features, device=device, dtype=dtype, **kwargs)
        self.workspace = GlobalWorkspace(out_features or in_features, device=device, dtype=dtype, **workspace_kwargs)

    def forward(self, x: torch.Tensor, token_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Tokens (..., E) after MLP and workspace, for tokens x (..., E); mask and errors as `GlobalWorkspace`."""
        x = self.drop1(self.act(self.fc1(x)))
        x = self.drop2(self.fc2(self.norm(x)))
        return self.workspace(x) if token_mask is None else self.workspace(x, token_mask)
