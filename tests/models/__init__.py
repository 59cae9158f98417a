""" Small models and images of these tests. """
import torch
import torch.nn as nn

import timm

import timm_ait  # noqa: F401, registers the models


def make_model(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(
        batch_size: int = 4,
        size: int = 32,
        in_chans: int = 3,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    return torch.randn(batch_size, in_chans, size, size, dtype=dtype)
