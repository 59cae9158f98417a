""" Pruning and parametrisations in training, beside a layer that has the effective weights. """
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.layers import make_workspace, written_by
from timm_ait.layers import balance_loss

NAMES = ['q', 'k', 'v', 'proj', 'attractors']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('method', [
    partial(prune.l1_unstructured, name='weight', amount=0.5),
    partial(prune.ln_structured, name='weight', amount=0.5, n=2, dim=0),
    weight_norm, nn.utils.weight_norm, spectral_norm, orthogonal],
    ids=['prune_half', 'prune_rows', 'weight_norm', 'old_weight_norm', 'spectral_norm', 'orthogonal'])
def test_weights_train_as_their_effective_values_would(method):
    layer, plain = make_workspace().double(), make_workspace().double()
    for name in NAMES:
        method(getattr(layer, name))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    for _ in range(3):
        x = torch.randn(3, 7, 24, dtype=torch.float64)
        optimizer.zero_grad()
        with parametrize.cached():  # the spectral norm changes with each look at it
            output = layer(x)
            effective = {f'{name}.weight': getattr(layer, name).weight for name in NAMES}
            for weight in effective.values():
                weight.retain_grad()
            (output.square().sum() + balance_loss(layer)).backward()
        state = {**layer.state_dict(), **effective}
        plain.load_state_dict({name: state[name].detach() for name in plain.state_dict()})
        plain.zero_grad()
        expected = plain(x)
        (expected.square().sum() + balance_loss(plain)).backward()
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(written_by(layer), written_by(plain))
        for name, weight in effective.items():
            torch.testing.assert_close(weight.grad, plain.get_parameter(name).grad)
        optimizer.step()
