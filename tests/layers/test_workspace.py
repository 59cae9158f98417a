import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.layers import make_workspace, written_by
from timm_ait.layers import GlobalWorkspace, WorkspaceMlp, advance_memory, balance_loss
from timm_ait.ops import naive


class TestForward:

    @pytest.mark.parametrize('gated', [False, True])
    @pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])
    @pytest.mark.parametrize('shape', [(4, 9, 24), (1, 9, 24), (2, 3, 5, 24), (7, 24)])
    def test_training_is_naive_write_then_read(self, shape, memory_update, gated):
        layer = make_workspace(
            memory_update=memory_update, gated=gated, bottleneck=2, beta=2., retrieval_steps=2, memory_momentum=0.7)
        before = layer.memory.clone()
        layer(torch.randn(5, 24))
        layer.written = None
        x = torch.randn(shape)
        output = layer(x)

        tokens = F.layer_norm(x, (24,), layer.norm.weight, layer.norm.bias).view(-1, 24)
        candidate, balance, coverage = naive.write(
            tokens, before, naive.WriteWeights(
                layer.q.weight, layer.k.weight, layer.v.weight, layer.proj.weight, layer.slot_norm.weight,
                layer.slot_norm.bias), num_heads=4, bottleneck=2)
        memory = naive.update_memory(before, candidate, 0.7, memory_update)
        residual = x.view(-1, 24) if gated else None
        expected = naive.read(tokens, layer.attractors(memory), 2., 2, residual, layer.gate)
        torch.testing.assert_close(output, expected.view(shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(written_by(layer), memory.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(balance_loss(layer), 1e-2 * balance, atol=1e-6, rtol=1e-4)
        assert layer.memory_statistics()['coverage'] == pytest.approx(coverage.item())

    @pytest.mark.parametrize('gated', [False, True])
    @pytest.mark.parametrize('retrieval_steps', [1, 2])
    def test_masked_tokens_neither_write_nor_count(self, retrieval_steps, gated):
        kwargs = dict(gated=gated, retrieval_steps=retrieval_steps, bottleneck=2)
        layer, without = (make_workspace(**kwargs).double() for _ in range(2))
        x = torch.randn(4, 9, 24, dtype=torch.float64)
        token_mask = torch.rand(4, 9) < 0.7
        output = layer(100 * x.masked_fill(token_mask.unsqueeze(-1), 0.) + x, token_mask)
        torch.testing.assert_close(output[token_mask], without(x[token_mask]))
        torch.testing.assert_close(written_by(layer), written_by(without))
        torch.testing.assert_close(balance_loss(layer), balance_loss(without))
        assert layer.coverage == without.coverage
        assert torch.equal(layer.eval()(x, token_mask), layer(x))

    @pytest.mark.parametrize('gated', [False, True])
    @pytest.mark.parametrize('retrieval_steps', [1, 2, 3])
    @pytest.mark.parametrize('shape', [(4, 9, 24), (0, 9, 24)])
    def test_evaluation_is_naive_read_of_the_stored_slots_at_unit_norm(self, shape, retrieval_steps, gated):
        layer = make_workspace(retrieval_steps=retrieval_steps, beta=2., gated=gated).eval()
        layer.memory.mul_(torch.rand(8, 1) + 0.5)  # an averaged copy (EMA) has slots of other norms
        x = torch.randn(shape)
        expected = naive.read(
            layer.norm(x).view(-1, 24), layer.attractors(F.normalize(layer.memory, dim=-1)), 2., retrieval_steps,
            x.view(-1, 24) if gated else None, layer.gate)
        output = layer(x)
        torch.testing.assert_close(output, expected.view(x.shape), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(layer(x), output)

    @pytest.mark.parametrize('kwargs, untrained', [
        ({}, []), (dict(gated=True), []),
        (dict(differentiable_write=False), ['v.weight', 'proj.weight', 'slot_norm.weight', 'slot_norm.bias']),
        (dict(retrieval=False), ['v.weight', 'proj.weight', 'slot_norm.weight', 'slot_norm.bias']),
    ])
    def test_every_parameter_is_trained_but_for_those_that_are_frozen_from_the_start(self, kwargs, untrained):
        layer = make_workspace(**kwargs)
        (layer(torch.randn(4, 9, 24)).pow(3).sum() + balance_loss(layer)).backward()
        assert [name for name, p in layer.named_parameters() if not p.requires_grad] == untrained
        assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == untrained

    @pytest.mark.parametrize('kwargs', [dict(write=False), dict(reset_memory=True), dict(memory_momentum=1.)])
    def test_options_that_keep_the_memory(self, kwargs):
        layer = make_workspace(**kwargs)
        before = layer.memory.clone()
        layer(torch.randn(4, 9, 24)).sum().backward()
        advance_memory(layer)
        torch.testing.assert_close(layer.memory, before, atol=1e-5, rtol=1e-5)
        assert (balance_loss(layer) == 0.) == ('write' in kwargs)

    @pytest.mark.parametrize('gated', [False, True])
    def test_without_retrieval_tokens_are_only_normalised_or_stay_as_they_are(self, gated):
        layer = make_workspace(retrieval=False, gated=gated)
        x = torch.randn(4, 9, 24)
        before = layer.memory.clone()
        for mode in (False, True):
            torch.testing.assert_close(layer.train(mode)(x), x if gated else layer.norm(x))
        advance_memory(layer)
        assert not torch.equal(layer.memory, before)

    def test_a_width_that_is_not_the_layers_is_named(self):
        layer = make_workspace()
        for mode in (True, False):
            with pytest.raises(ValueError, match='48 wide.*width 24'):
                layer.train(mode)(torch.randn(4, 9, 48))

    def test_by_default_the_bottleneck_is_the_papers_share_of_the_tokens(self):
        assert GlobalWorkspace(24).bottleneck * 32768 == 512

    @pytest.mark.parametrize('token_mask', [torch.ones(4, 9), torch.ones(9, dtype=torch.bool)])
    def test_a_mask_that_is_not_the_tokens_is_named(self, token_mask):
        with pytest.raises(ValueError, match=r'token_mask must be boolean, of shape \[4, 9\]'):
            make_workspace()(torch.randn(4, 9, 24), token_mask)


class TestMemory:

    def test_reset_parameters_forgets_what_was_written(self):
        layer = make_workspace()
        layer(torch.randn(4, 9, 24))
        layer.reset_parameters()
        memory = layer.memory.clone()
        advance_memory(layer)
        assert torch.equal(layer.memory, memory)

    @pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])
    def test_initialisations_have_rows_of_unit_norm_and_differ(self, memory_update):
        normal, uniform, identity = (
            make_workspace(memory_init=init, memory_update=memory_update).memory
            for init in ('normal', 'uniform', 'identity'))
        for memory in (normal, uniform):
            torch.testing.assert_close(memory.norm(dim=-1), torch.ones(8))
        assert not torch.allclose(normal, uniform) and torch.equal(identity, torch.eye(8, 16))

    @pytest.mark.parametrize('num_slots', [8, 16, 24])
    @pytest.mark.parametrize('memory_update, memory_momentum', [
        ('orthogonal', 0.), ('orthogonal', 0.9), ('normalize', 0.9)])
    def test_slots_stay_distinct_unlike_those_of_the_published_update(self, num_slots, memory_update, memory_momentum):
        layer = make_workspace(num_slots=num_slots, memory_update=memory_update, memory_momentum=memory_momentum)
        for _ in range(50):
            layer(torch.randn(4, 9, 24))
            advance_memory(layer)
        rank = layer.memory_statistics()['effective_rank'] / min(num_slots, 16)
        assert rank > 0.99 if memory_update == 'orthogonal' else rank < 0.8

    def test_coverage_is_unknown_before_the_first_write(self):
        assert torch.tensor(make_workspace().memory_statistics()['coverage']).isnan()


BAD = dict(
    num_slots=[0, 2.5], slot_dim=[0], workspace_heads=[-1], bottleneck=[0, 0., 1.5, True, '1/32'], retrieval_steps=[0],
    beta=[0., float('nan')], memory_momentum=[-0.1, 1.1], memory_init=['zeros'], memory_update=['svd'],
    balance_weight=[-1.], gated=['false'], write=[None])


@pytest.mark.parametrize('argument, value', [(argument, value) for argument in BAD for value in BAD[argument]])
def test_a_bad_argument_is_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        GlobalWorkspace(24, **{argument: value})


@pytest.mark.parametrize('value', [486.4, numpy.int64(8)])
def test_a_bad_bottleneck_that_is_set_later_is_named(value):
    layer = make_workspace()
    layer.bottleneck = value
    with pytest.raises(ValueError, match='bottleneck.*got'):
        layer(torch.randn(4, 9, 24))


def test_a_subclass_has_its_own_initialisation_and_layers_without_one():
    class Open(GlobalWorkspace):

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.drop = nn.Dropout(0.1)

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.ones_(self.gate)

    layer = Open(24, gated=True)
    nn.init.zeros_(layer.gate)
    layer.init_weights()
    assert layer.gate.eq(1.).all()


@pytest.mark.parametrize('training', [True, False])
def test_the_inverse_temperature_may_be_a_parameter(training):
    layer = make_workspace().train(training)
    layer.beta = nn.Parameter(torch.ones(()))
    layer(torch.randn(4, 9, 24)).square().sum().backward()
    assert layer.beta.grad.abs() > 0.


def test_convolutions_are_refused():
    with pytest.raises(ValueError, match='use_conv'):
        WorkspaceMlp(24, use_conv=True)


def test_identity_memory_needs_no_more_slots_than_their_width():
    with pytest.raises(ValueError, match="memory_init='identity'"):
        GlobalWorkspace(24, num_slots=9, slot_dim=8, memory_init='identity')
