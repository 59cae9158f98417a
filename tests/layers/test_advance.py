""" When the memory moves, and that every forward of a step computes what it would alone. """
import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ModelEmaV3, freeze
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from timm_ait.layers import WorkspaceMlp, advance_memory, balance_loss
from timm_ait.ops import naive

from tests.layers import SMALL, make_workspace


def tokens():
    return torch.randn(4, 9, 24)


def step(layer, *batches, lr=0.):
    """One optimizer step of the summed loss of some forwards."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    sum(layer(x).square().sum() + balance_loss(layer) for x in batches).backward()
    optimizer.step()


class TestAdvance:

    def test_forward_leaves_the_memory_and_the_optimizer_moves_it_to_what_was_written(self):
        layer = make_workspace()
        before = layer.memory.clone()
        layer(tokens()).sum().backward()
        assert torch.equal(layer.memory, before)
        written = layer.pending.clone()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert torch.equal(layer.memory, written) and not torch.equal(written, before)

    def test_the_last_forward_of_a_step_wins(self):
        layer, alone = make_workspace(), make_workspace()
        first, last = tokens(), tokens()
        step(layer, first, last)
        step(alone, last)
        assert torch.equal(layer.memory, alone.memory)

    def test_a_second_step_without_a_forward_moves_nothing(self):
        layer = make_workspace()
        step(layer, tokens())
        before = layer.memory.clone()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert torch.equal(layer.memory, before)

    def test_an_optimizer_of_other_parameters_moves_nothing(self):
        layer, other = make_workspace(), nn.Linear(2, 2)
        before = layer.memory.clone()
        layer(tokens()).sum().backward()
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert torch.equal(layer.memory, before)

    def test_advance_memory_is_for_loops_without_an_optimizer(self):
        model = nn.Sequential(make_workspace(), make_workspace())
        model(tokens())
        written = [layer.pending.clone() for layer in model]
        advance_memory(model)
        assert all(torch.equal(layer.memory, w) for layer, w in zip(model, written))

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_advance_with_their_own_parameters(self, copied):
        layer = make_workspace()
        twin = copied(layer)
        before = layer.memory.clone()
        step(twin, tokens())
        assert torch.equal(layer.memory, before) and not torch.equal(twin.memory, before)

    @pytest.mark.parametrize('fused', [False, True])
    def test_a_step_that_the_gradient_scaler_skips_moves_nothing(self, fused):
        layer = make_workspace()
        optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
        scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10)
        before = layer.memory.clone()
        for broken in (True, False):
            assert torch.equal(layer.memory, before)
            optimizer.zero_grad()
            scaler.scale(layer(tokens()).square().mean()).backward()
            if broken:
                layer.norm.bias.grad[0] = float('inf')
            scaler.step(optimizer)
            scaler.update()
        assert not torch.equal(layer.memory, before)

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_a_non_finite_batch_shows_in_its_output_and_leaves_the_memory(self, value):
        layer = make_workspace()
        before = layer.memory.clone()
        x = tokens()
        x[2, 3, 4] = value
        assert not layer(x).isfinite().all()
        advance_memory(layer)
        assert torch.equal(layer.memory, before)

    def test_an_empty_batch_leaves_the_memory(self):
        layer = make_workspace()
        before = layer.memory.clone()
        assert layer(torch.randn(0, 9, 24)).shape == (0, 9, 24)
        advance_memory(layer)
        assert torch.equal(layer.memory, before)

    def test_optimizers_that_hold_copies_of_the_parameters_lead_to_a_warning(self):
        layer = make_workspace()
        masters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
        optimizer = torch.optim.SGD(masters, lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for count in range(1, 101):
                layer(tokens()[:1])
                optimizer.step()
                assert bool(caught) == (count == 100)
        assert 'advance_memory' in str(caught[0].message)

    def test_a_frozen_workspace_does_not_write(self):
        mlp = WorkspaceMlp(24, 48, **SMALL)
        freeze(mlp, 'workspace')
        evaluated = copy.deepcopy(mlp).eval()
        x, before = tokens(), mlp.workspace.memory.clone()
        output = mlp(x)
        output.sum().backward()
        torch.optim.SGD(mlp.parameters(), lr=0.).step()
        assert torch.equal(mlp.workspace.memory, before)
        assert torch.equal(output, evaluated(x))
        assert balance_loss(mlp) == 0.

    def test_a_workspace_whose_read_alone_is_trained_does_not_write(self):
        layer = make_workspace().requires_grad_(False)
        layer.attractors.requires_grad_(True)
        before = layer.memory.clone()
        step(layer, tokens())
        assert torch.equal(layer.memory, before)

    def test_evaluation_changes_nothing(self):
        layer = make_workspace().eval()
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        step(layer, tokens())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_evaluation_amid_a_step_changes_nothing(self):
        layer, undisturbed = make_workspace(), make_workspace()
        x = tokens()
        layer(x), undisturbed(x)
        layer.eval()(tokens())
        layer.train()
        advance_memory(layer), advance_memory(undisturbed)
        assert torch.equal(layer.memory, undisturbed.memory)

    def test_a_written_memory_is_in_no_checkpoint_and_gone_when_one_is_loaded(self):
        layer = make_workspace()
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        layer(tokens())
        assert layer.state_dict().keys() == state.keys()
        layer.load_state_dict(state)
        advance_memory(layer)
        assert torch.equal(layer.memory, state['memory'])

    def test_state_dict_round_trip_is_bit_exact(self):
        layer, other = make_workspace(), make_workspace(memory_init='uniform')
        step(layer, tokens(), lr=0.1)
        other.load_state_dict(layer.state_dict())
        x = tokens()
        assert torch.equal(layer(x), other(x))

    def test_reset_memory_starts_every_step_from_the_initial_memory(self):
        layer = make_workspace(reset_memory=True)
        before = layer.memory.clone()
        step(layer, tokens())
        assert torch.equal(layer.memory, before)


@pytest.mark.parametrize('kwargs', [{}, dict(differentiable_write=False), dict(retrieval=False)])
def test_every_parameter_that_wants_a_gradient_gets_one(kwargs):
    layer = make_workspace(**kwargs)
    (layer(tokens()).square().sum() + balance_loss(layer)).backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        name for name, p in layer.named_parameters() if p.grad is not None}


class TestRefusals:

    @pytest.mark.parametrize('retrieval_steps', [1, 2])
    def test_double_backward_of_fused_operators_raises(self, retrieval_steps):
        layer = make_workspace(retrieval_steps=retrieval_steps, bottleneck=2)
        x = tokens().requires_grad_()
        grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.square().sum().backward()

    @pytest.mark.parametrize('name', ['norm.weight', 'q.weight', 'slot_norm.bias', 'attractors.weight'])
    def test_writing_with_parameters_elsewhere_raises(self, name):
        layer = make_workspace()
        module, _, parameter = name.rpartition('.')
        setattr(layer.get_submodule(module), parameter, nn.Parameter(layer.get_parameter(name).to('meta')))
        with pytest.raises(RuntimeError, match='parameters on meta'):
            layer(tokens())


class TestBalanceLoss:

    def test_is_zero_before_a_forward_and_after_one_in_evaluation(self):
        layer = make_workspace()
        assert balance_loss(layer) == 0.
        output = layer(tokens())
        assert balance_loss(layer) > 0.
        del output
        layer.eval()(tokens())
        assert balance_loss(layer) == 0.

    def test_keeps_no_graph_alive(self):
        layer = make_workspace()
        x = (torch.zeros(4, 9, 24, requires_grad=True) + tokens())
        kept = weakref.ref(x)
        output = layer(x)
        del x
        gc.collect()
        assert kept() is not None
        del output
        gc.collect()
        assert kept() is None

    def test_is_a_value_without_gradient_once_the_output_is_gone(self):
        layer = make_workspace()
        output = layer(tokens())
        loss = balance_loss(layer)
        assert loss.requires_grad
        value = loss.item()
        del output, loss
        assert balance_loss(layer).item() == value and not balance_loss(layer).requires_grad

    def test_leaves_out_layers_that_the_last_forward_did_not_reach(self):
        first, second = make_workspace(), make_workspace()
        model = nn.Sequential(first, second)
        output = model(tokens())
        del output
        output = first(tokens())
        torch.testing.assert_close(balance_loss(model), balance_loss(first))

    def test_of_a_partly_frozen_model_is_that_of_the_rest(self):
        model = nn.Sequential(make_workspace(), make_workspace())
        model[0].requires_grad_(False)
        output = model(tokens())
        torch.testing.assert_close(balance_loss(model), balance_loss(model[1]))
        assert output.requires_grad

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_stays_behind_when_the_layer_is_copied(self, copied):
        layer = make_workspace()
        loss = layer(tokens()).sum() + balance_loss(layer)
        assert balance_loss(copied(layer)) == 0.
        loss.backward()


class Block(nn.Module):

    def __init__(self, drop=0., **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.attn = nn.Linear(24, 24)
        self.mlp = WorkspaceMlp(24, 48, drop=drop, **{**SMALL, **kwargs})
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.drop(self.mlp(self.norm(x + self.attn(x))))


class Net(nn.Module):

    def __init__(self, checkpoint=lambda block, x: block(x), **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(**kwargs) for _ in range(2)])
        self.checkpoint = checkpoint
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return x.square().mean()


def train(net, forward=None, num_steps=2):
    """Gradients and memories of steps of two forwards each before one backward."""
    forward = net if forward is None else forward
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    results = []
    for i in range(num_steps):
        torch.manual_seed(i)
        loss = sum(forward(tokens().double()) + balance_loss(net) for _ in range(2))
        optimizer.zero_grad()
        loss.backward()
        results += [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        results += [block.mlp.workspace.memory.clone() for block in net.blocks]
    return results


def assert_same(results, expected):
    for actual, wanted in zip(results, expected):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


NON_REENTRANT = functools.partial(checkpoint, use_reentrant=False)
SELECTIVE = functools.partial(NON_REENTRANT, context_fn=functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]))


class TestCheckpointing:
    """Two forwards before one backward, against the model without checkpointing."""

    @pytest.mark.parametrize('drop', [0., 0.2])
    @pytest.mark.parametrize('how', [NON_REENTRANT, SELECTIVE], ids=['non-reentrant', 'selective'])
    def test_gradients_and_memories_are_the_same(self, how, drop):
        assert_same(train(Net(how, drop=drop)), train(Net(drop=drop)))

    def test_also_where_the_recomputation_does_not_stop_early(self):
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            results = train(Net(NON_REENTRANT))
        assert_same(results, train(Net()))

    def test_reentrant_checkpointing_which_would_lose_the_balance_loss_raises(self):
        with pytest.raises(RuntimeError, match='use_reentrant'):
            train(Net(functools.partial(checkpoint, use_reentrant=True)))

    def test_reentrant_checkpointing_without_balance_loss_is_the_same(self):
        results = []
        for how in (functools.partial(checkpoint, use_reentrant=True), NON_REENTRANT):
            net = Net(how, balance_weight=0.)
            results.append(train(net, lambda x: net(x.requires_grad_())))
        assert_same(*results)


class TestCompile:

    @pytest.fixture(autouse=True)
    def reset(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize('part', ['block', 'mlp'])
    def test_checkpointed_blocks_compiled_one_by_one(self, part):
        net = Net(NON_REENTRANT)
        for block in net.blocks:
            (block if part == 'block' else block.mlp).compile(backend='aot_eager', fullgraph=True)
        assert_same(train(net), train(Net()))

    @pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
    def test_the_whole_model_compiled_without_graph_breaks(self, backend):
        net = Net()
        assert_same(train(net, torch.compile(net, backend=backend, fullgraph=True)), train(Net()))

    def test_the_whole_model_compiled_with_checkpoints(self):
        net = Net(NON_REENTRANT)
        assert_same(train(net, torch.compile(net, backend='aot_eager')), train(Net()))

    @pytest.mark.parametrize('bottleneck, dynamic', [(0.3, None), pytest.param(10, True, marks=pytest.mark.slow)])
    def test_shapes_that_change(self, bottleneck, dynamic):
        layers = [make_workspace(bottleneck=bottleneck).double() for _ in range(2)]
        runs = [torch.compile(layers[0], backend='aot_eager', fullgraph=True, dynamic=dynamic), layers[1]]
        for num_tokens in (9, 12, 7):
            x = torch.randn(4, num_tokens, 24, dtype=torch.float64)
            for layer, run in zip(layers, runs):
                layer.zero_grad()
                (run(x).square().sum() + balance_loss(layer)).backward()
                torch.optim.SGD(layer.parameters(), lr=0.01).step()
            assert_same(*([*(p.grad for p in layer.parameters()), layer.memory] for layer in layers))

    def test_evaluation_sees_the_memory_change(self):
        layer = make_workspace().eval()
        run = torch.compile(layer, backend='aot_eager', fullgraph=True)
        x = tokens()
        with torch.no_grad():
            run(x)
            layer.memory.copy_(torch.eye(8, 16))
            torch.testing.assert_close(run(x), layer(x))

    def test_exporting_a_model_in_training_is_refused(self):
        with pytest.raises(RuntimeError, match=r'model.eval\(\)'):
            torch.export.export(make_workspace(), (tokens(),))


class TestPrecision:

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_autocast_keeps_the_memory_in_float32(self, dtype):
        mlp = WorkspaceMlp(24, 48, **SMALL)
        with torch.autocast('cpu', dtype):
            output = mlp(tokens())
        advance_memory(mlp)
        assert output.dtype == dtype
        assert mlp.workspace.memory.dtype == balance_loss(mlp).dtype == torch.float32
        torch.testing.assert_close(mlp.workspace.memory @ mlp.workspace.memory.T, torch.eye(8), atol=1e-5, rtol=0)

    def test_autocast_evaluation_reads_the_memory_in_float32(self):
        layer = make_workspace().eval()
        with torch.autocast('cpu', torch.bfloat16):
            memory = layer.stored_memory()
        torch.testing.assert_close(memory @ memory.T, torch.eye(8), atol=1e-5, rtol=0)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
    def test_a_converted_layer_trains_in_its_dtype(self, dtype):
        layer = make_workspace().to(dtype)
        output = layer(tokens().to(dtype))
        output.sum().backward()
        advance_memory(layer)
        assert output.dtype == dtype and layer.memory.dtype == dtype
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])
    def test_an_ema_copy_reads_slots_as_the_update_rule_wants_them(self, memory_update):
        layer = make_workspace(memory_update=memory_update)
        ema = ModelEmaV3(layer, decay=0.5)
        for _ in range(3):
            step(layer, tokens())
            ema.update(layer)
        averaged = ema.module
        assert (averaged.memory.norm(dim=-1) < 0.999).any()
        memory = averaged.memory if memory_update == 'normalize' else naive.polar(averaged.memory)
        memory = F.normalize(memory, dim=-1)
        x = tokens()
        expected = naive.read(averaged.norm(x).view(-1, 24), averaged.attractors(memory)).view(x.shape)
        torch.testing.assert_close(averaged(x), expected, atol=1e-4, rtol=1e-4)
