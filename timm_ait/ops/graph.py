""" What autograd's graph tells of a forward. """
from typing import Optional, Set

import torch
from torch.autograd.graph import Node


def in_backward() -> bool:
    """Whether a backward is running: a forward inside of it is one that gradient checkpointing computes again."""
    return torch._C._current_graph_task_id() != -1


def is_recomputed() -> bool:
    """Whether this forward is computed again by gradient checkpointing, after a first time with gradient.

    Not in re-entrant checkpointing, whose first forward has none.
    """
    return in_backward() and type(torch._C._current_autograd_node()).__name__ != 'CheckpointFunctionBackward'


def depends_on(x: torch.Tensor, nodes: Set[Optional[Node]]) -> bool:
    """Whether a tensor was computed, with gradient, by one of some nodes or from what they gave."""
    nodes = nodes - {None}
    todo, seen = [x.grad_fn], set()
    while nodes and todo:
        node = todo.pop()
        if node in nodes:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return False
