""" A linear map that an operator applies. """
import math

import torch
import torch.nn as nn

__all__ = ['Projection']


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
