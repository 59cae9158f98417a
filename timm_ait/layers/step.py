""" What the forwards of an optimizer step leave in a workspace until it ends. """
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from torch.autograd.forward_ad import unpack_dual

from timm_ait.ops.graph import depends_on, in_backward, is_recomputed

from .advance import count_write, register_workspace


class StepwiseMemory(nn.Module):
    """Base of a layer whose buffer `memory` (M, D) moves with the parameters, to the mean of what was written."""
    is_workspace = True
    # sum (M, D) and number of the memories written since the last step; no buffers, which DDP would overwrite
    written: Optional[Tuple[torch.Tensor, torch.Tensor]] = None
    # weighted balance loss of the last forward (scalar), with its graph until its backward, train(), eval() or the step
    balance: Optional[torch.Tensor] = None
    _balance_node: Optional[Any] = None  # of autograd's graph, which gave the output
    # share of the tokens that at least one slot selected in the last forward (scalar)
    coverage: Optional[torch.Tensor] = None
    num_writes = 0  # forwards since the last step that were not compiled
    has_optimizer = False  # whether one that holds its parameters has stepped
    # ranks that train the layer together, if they are named, and those of DDP or FSDP; see `ranks.ranks_of`
    process_group: Optional[Any] = None
    wrapper_groups: Tuple[Any, ...] = ()

    def check_it_can_write(self, x: torch.Tensor, token_mask: Optional[torch.Tensor], has_parameters: bool) -> None:
        """Raise an error, with the remedy, where a training forward of x could not do all that it is to do."""
        if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]):
            raise ValueError(
                f'token_mask must be boolean, of shape {list(x.shape[:-1])}, got {token_mask.dtype} of shape '
                f'{list(token_mask.shape)}.')
        if not has_parameters:
            raise RuntimeError(
                'A workspace has no parameters of its own here and cannot write: nn.DataParallel and FSDP with flat '
                'parameters keep them elsewhere. Use DistributedDataParallel, fully_shard (FSDP2) or '
                'use_orig_params=True.')
        # torch.compiler.is_exporting is, up to torch 2.10, true in torch.compile as well
        if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
            raise RuntimeError(
                'A workspace cannot be exported or traced in training mode: its memory would not advance. Call '
                'model.eval().')
        elsewhere = {parameter.device for parameter in self.parameters()} - {x.device}
        if elsewhere:  # offloaded, by tools that bring weights back where a module is called
            raise RuntimeError(
                f'A workspace cannot write with parameters on {", ".join(map(str, elsewhere))}, tokens on {x.device}: '
                'call model.eval(), or train without offloading.')
        if self.balance_weight and not torch.compiler.is_compiling() and in_backward() and not is_recomputed():
            raise RuntimeError(
                're-entrant gradient checkpointing cuts the balance loss from its parameters: use use_reentrant=False '
                '(timm.layers.set_reentrant_ckpt(False)), or balance_weight=0.')

    def check_derivative(self, candidate: torch.Tensor) -> None:
        """Raise a RuntimeError where what was written (M, D) has a derivative that would not reach the memory."""
        if torch._C._functorch.is_functorch_wrapped_tensor(candidate) or unpack_dual(candidate).tangent is not None:
            raise RuntimeError(
                'torch.func and forward-mode derivatives do not support workspaces in training mode: their memory '
                'would not advance. Call model.eval().')

    def keep_balance(self, loss: torch.Tensor, coverage: torch.Tensor, output: torch.Tensor) -> None:
        """Keep the balance loss and coverage (scalars) of a forward that gave an output."""
        if torch.compiler.is_compiling():
            self.balance, self.coverage = loss, coverage
        elif not is_recomputed():
            if depends_on(output, {self._balance_node}):
                loss = loss + self.balance  # used once more in the same forward
            self.balance, self.coverage, self._balance_node = loss, coverage, output.grad_fn
            count_write(self)

    def written_since_step(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Sum (M, D), in at least float32, and number (scalar) of the memories written since the last step."""
        device, dtype = self.memory.device, torch.promote_types(self.memory.dtype, torch.float32)
        if self.written is None or self.written[0].is_meta or self.written[0].shape != self.memory.shape:
            total = torch.zeros_like(self.memory, dtype=dtype)
            self.written = total, torch.zeros((), dtype=torch.long, device=device)
        elif (self.written[0].device, self.written[0].dtype) != (device, dtype):
            self.written = self.written[0].to(device, dtype), self.written[1].to(device)
        return self.written

    def _apply(self, *args, **kwargs) -> 'StepwiseMemory':
        super()._apply(*args, **kwargs)
        if self.written is not None:
            self.written_since_step()  # goes where the memory went
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.written = None  # belongs to the memory before

    def end_step(self) -> None:
        """Called when the parameters have moved, and the memory if anything was written."""
        self.num_writes = 0
        self.release_balance()

    def train(self, mode: bool = True) -> 'StepwiseMemory':
        self.release_balance()  # also that of a forward that ran out of memory
        if mode and self.writes and not self.reset_memory and not torch.is_inference_mode_enabled():
            self.written_since_step()  # a compiled forward that made them would be compiled twice
        return super().train(mode)

    def release_balance(self) -> None:
        """Keep only the value of the balance loss."""
        self.balance = None if self.balance is None else self.balance.detach()
        self._balance_node = None

    def __getstate__(self) -> Dict[str, Any]:
        # what belongs to one step of one process stays behind when the layer is copied (EMA) or pickled
        return {
            **super().__getstate__(), 'written': None, 'balance': None, '_balance_node': None, 'num_writes': 0,
            'has_optimizer': False, 'process_group': None, 'wrapper_groups': ()}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        register_workspace(self)
