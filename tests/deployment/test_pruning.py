""" Pruning and parametrisations over steps of training, beside a layer that has the effective weights. """
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.deployment import images, make_ait, train, workspaces
from tests.layers import make_workspace, written_by
from timm_ait.layers import balance_loss

NAMES = ['q', 'k', 'v', 'proj', 'attractors']


def make_layer():
    return make_workspace().double()


def prune_half(module):
    prune.l1_unstructured(module, 'weight', amount=0.5)


def prune_rows(module):
    prune.ln_structured(module, 'weight', amount=0.5, n=2, dim=0)


METHODS = pytest.mark.parametrize('method', [
    prune_half, prune_rows, weight_norm, nn.utils.weight_norm, spectral_norm, orthogonal],
    ids=['prune_half', 'prune_rows', 'weight_norm', 'old_weight_norm', 'spectral_norm', 'orthogonal'])


def apply(method, layer, names=NAMES):
    for name in names:
        method(getattr(layer, name))
    return layer


def train_beside_effective_weights(layer, num_steps=3):
    """In each step, a plain layer gets the effective weights and must compute the same output, gradients and write."""
    twin = make_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        x = torch.randn(3, 7, 24, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        with parametrize.cached():  # the spectral norm changes with each look at it
            output = layer(x)
            effective = {f'{name}.weight': getattr(layer, name).weight for name in NAMES}
            for weight in effective.values():
                weight.retain_grad()
            (output.square().sum() + balance_loss(layer)).backward()
        state = {**layer.state_dict(), **effective}
        twin.load_state_dict({name: state[name].detach() for name in twin.state_dict()})
        twin.zero_grad()
        twin_output = twin(x)
        (twin_output.square().sum() + balance_loss(twin)).backward()
        torch.testing.assert_close(output, twin_output)
        torch.testing.assert_close(written_by(layer), written_by(twin))
        for name, weight in effective.items():
            torch.testing.assert_close(weight.grad, twin.get_parameter(name).grad)
        optimizer.step()


@pytest.mark.filterwarnings('ignore')
@METHODS
class TestOfALayer:

    def test_all_weights_train_as_their_effective_values_would(self, method):
        train_beside_effective_weights(apply(method, make_layer()))

    def test_what_is_made_permanent_evaluates_the_same(self, method):
        layer = apply(method, make_layer()).eval()
        x = torch.randn(3, 7, 24, dtype=torch.float64)
        before = layer(x)
        for name in NAMES:
            module = getattr(layer, name)
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, 'weight')
            elif method is nn.utils.weight_norm:
                nn.utils.remove_weight_norm(module)
            else:
                prune.remove(module, 'weight')
        assert layer.state_dict().keys() == make_layer().state_dict().keys()
        torch.testing.assert_close(layer(x), before)


def test_pruned_weights_stay_zero_over_steps_of_a_model():
    model = make_ait()
    layers = [getattr(workspace, name) for workspace in workspaces(model) for name in NAMES]
    for layer in layers:
        prune_half(layer)
    train(model, 3)
    model.eval()(images())
    for layer in layers:
        prune.remove(layer, 'weight')
        assert (layer.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
