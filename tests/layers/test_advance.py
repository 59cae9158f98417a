""" When the memory moves, and that every forward of a step computes what it would alone. """
import copy
import functools
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from timm.utils import freeze

from tests.layers import SMALL, make_workspace, written_by
from timm_ait.layers import GlobalWorkspace, WorkspaceMlp, advance, advance_memory, balance_loss
from timm_ait.ops import naive


def tokens():
    return torch.randn(4, 9, 24)


def broken_tokens(value):
    """Tokens of which one has a value that is not finite."""
    x = tokens()
    x[2, 3, 4] = value
    return x


def sgd(model, lr=0.):
    return torch.optim.SGD(model.parameters(), lr=lr)


def step(layer, *batches):
    """One optimizer step of the summed loss of some forwards."""
    sum(layer(x).square().sum() + balance_loss(layer) for x in batches).backward()
    sgd(layer).step()


def step_of_other_parameters(layer):
    other = nn.Linear(2, 2)
    (layer(tokens()).sum() + other(torch.ones(2)).sum()).backward()
    sgd(other).step()


def step_of_the_read_alone(layer):
    layer.requires_grad_(False).attractors.requires_grad_(True)
    step(layer, tokens())


def load_amid_a_step(layer):
    layer(tokens())
    layer.load_state_dict(layer.state_dict())
    advance_memory(layer)


class TestAdvance:

    @pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])
    def test_a_step_moves_the_memory_to_the_mean_of_what_its_forwards_wrote(self, memory_update):
        layer, alone = make_workspace(memory_update=memory_update), make_workspace(memory_update=memory_update)
        before, batches, written = layer.memory.clone(), [tokens() for _ in range(3)], []
        for x in batches:
            alone(x)
            written.append(written_by(alone))
            alone.written = None
        assert torch.equal(alone.memory, before)
        step(layer, *batches)
        mean = torch.stack(written).mean(dim=0)
        expected = F.normalize(naive.polar(mean) if memory_update == 'orthogonal' else mean, dim=-1)
        torch.testing.assert_close(layer.memory, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
    def test_a_forward_without_gradient_computes_the_same_and_leaves_no_trace(self, no_grad):
        layer, undisturbed = make_workspace(), make_workspace()
        x = tokens()
        with no_grad():
            layer.train()
        expected = layer(x), undisturbed(x)
        loss = balance_loss(layer)
        with no_grad():
            assert torch.equal(layer(x), expected[0])
            layer(tokens())
        assert balance_loss(layer) == loss and balance_loss(layer).grad_fn is not None
        advance_memory(layer), advance_memory(undisturbed)
        assert torch.equal(layer.memory, undisturbed.memory)

    @pytest.mark.parametrize('disturb', [
        lambda layer: layer(broken_tokens(float('nan'))),
        lambda layer: layer(broken_tokens(float('inf'))),
        lambda layer: layer(tokens()[:0]),
        lambda layer: layer(tokens(), torch.zeros(4, 9, dtype=torch.bool)),
        lambda layer: (layer.eval()(tokens()), layer.train()),
        lambda layer: layer.eval()(tokens()),
    ], ids=['nan', 'inf', 'no tokens', 'all masked', 'evaluation', 'evaluation at the step'])
    def test_a_forward_that_does_not_write_is_left_out_of_the_mean(self, disturb):
        layer, undisturbed = make_workspace(), make_workspace()
        x = tokens()
        layer(x), undisturbed(x)
        disturb(layer)
        advance_memory(layer), advance_memory(undisturbed)
        assert torch.equal(layer.memory, undisturbed.memory)

    @pytest.mark.parametrize('act', [
        lambda layer: sgd(layer).step(),
        lambda layer: step(layer, tokens()[:0]),
        lambda layer: step(layer, broken_tokens(float('nan'))),
        lambda layer: step(layer.eval(), tokens()),
        step_of_other_parameters,
        step_of_the_read_alone,
        load_amid_a_step,
    ], ids=['no forward', 'no tokens', 'not finite', 'evaluation', 'other parameters', 'the read alone', 'loaded'])
    def test_the_memory_stays_where_nothing_was_written_or_no_step_made(self, act):
        layer = make_workspace()
        step(layer, tokens())
        before = layer.memory.clone()
        act(layer)
        assert torch.equal(layer.memory, before)

    @pytest.mark.parametrize('is_compiled', [False, True])
    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_a_copy_amid_a_step_makes_steps_of_its_own(self, copied, is_compiled):
        layer = make_workspace()
        if is_compiled:
            layer.compile(backend='eager')
        output = layer(tokens()).sum()
        twin, before = copied(layer), layer.memory.clone()
        loss = output + balance_loss(layer)
        assert twin.written is None and balance_loss(twin) == 0.
        step(twin, tokens())
        assert torch.equal(layer.memory, before) and not torch.equal(twin.memory, before)
        loss.backward()

    def test_a_copy_that_is_made_without_setstate_makes_steps_too(self):
        layer = make_workspace(gated=True)
        parametrize.register_parametrization(layer, 'gate', nn.Tanh())
        twin = copy.deepcopy(layer)
        step(twin, tokens())
        assert not torch.equal(twin.memory, layer.memory)

    @pytest.mark.parametrize('fused', [False, True])
    def test_a_step_that_the_gradient_scaler_skips_moves_nothing_and_its_forward_counts_in_the_next(self, fused):
        layer = make_workspace()
        optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
        scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10)
        before = layer.memory.clone()
        for broken in (True, False):
            assert torch.equal(layer.memory, before)
            optimizer.zero_grad()
            scaler.scale(layer(tokens()).square().mean()).backward()
            assert layer.written[1] == 1 + (not broken)
            if broken:
                layer.norm.bias.grad[0] = float('inf')
            expected = written_by(layer)
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(layer.memory, naive.polar(expected))
        assert layer.written[1] == 0

    def test_a_frozen_workspace_reads_as_in_evaluation_and_does_not_write(self):
        mlp = WorkspaceMlp(24, 48, **SMALL)
        step(mlp, tokens())
        freeze(mlp, 'workspace')
        evaluated = copy.deepcopy(mlp).eval()
        x, before = tokens(), mlp.workspace.memory.clone()
        output = mlp(x)
        output.sum().backward()
        sgd(mlp).step()
        assert torch.equal(mlp.workspace.memory, before)
        assert torch.equal(output, evaluated(x))
        assert balance_loss(mlp) == 0.

    def test_a_workspace_may_be_frozen_between_forwards_that_train_it(self):
        layer = make_workspace()
        x = layer(tokens())
        with torch.no_grad():
            layer.requires_grad_(False)(tokens())
        assert balance_loss(layer.requires_grad_(True)).grad_fn is not None
        layer.requires_grad_(False)(x)
        layer.requires_grad_(True)(x)
        loss = balance_loss(layer)
        alone = make_workspace()
        alone(x.detach())
        torch.testing.assert_close(loss, balance_loss(alone))


@pytest.mark.parametrize('write', [
    lambda layer, memory: layer.memory.copy_(memory),
    lambda layer, memory: setattr(layer.memory, 'data', memory),
    lambda layer, memory: setattr(layer, 'memory', memory),
    lambda layer, memory: layer.load_state_dict({**layer.state_dict(), 'memory': memory}),
    lambda layer, memory: layer.load_state_dict({**layer.state_dict(), 'memory': memory}, assign=True),
    torch.inference_mode()(lambda layer, memory: layer.memory.copy_(memory)),
], ids=['in place', 'data', 'replaced', 'loaded', 'assigned', 'inference mode'])
def test_whoever_writes_the_memory_it_is_read_at_once_and_trained_from(write):
    layer, other = make_workspace().eval(), make_workspace(memory_init='uniform').eval()
    x = tokens()
    assert not torch.equal(layer(x), other(x))
    write(layer, other.memory.clone())
    assert torch.equal(layer(x), other(x))
    step(layer.train(), x), step(other.train(), x)
    assert torch.equal(layer.memory, other.memory)


class TestHook:

    def test_an_optimizer_per_parameter_moves_the_memory_once(self):
        layer, together = make_workspace(), make_workspace()
        x = tokens()
        optimizers = [torch.optim.SGD([parameter], lr=0.) for parameter in layer.parameters()]
        layer(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        step(together, x)
        torch.testing.assert_close(layer.memory, together.memory)

    @pytest.mark.parametrize('give', [
        lambda optimizer, parameters: optimizer.add_param_group(dict(params=parameters)),
        lambda optimizer, parameters: optimizer.param_groups[0].update(params=parameters),
    ], ids=['added', 'replaced'])
    def test_parameters_that_an_optimizer_gets_later_are_found(self, give):
        layer, other = make_workspace(), make_workspace()
        optimizer = sgd(other)
        optimizer.step()
        give(optimizer, list(layer.parameters()))
        before = layer.memory.clone()
        layer(tokens()).sum().backward()
        optimizer.step()
        assert not torch.equal(layer.memory, before)

    def test_workspaces_that_share_their_write_both_advance(self):
        model = nn.Sequential(make_workspace(), make_workspace())
        for name in ('q', 'k', 'v', 'proj', 'slot_norm'):
            setattr(model[1], name, getattr(model[0], name))
        before = [layer.memory.clone() for layer in model]
        step(model[1], tokens())  # the other has written nothing
        assert torch.equal(model[0].memory, before[0]) and not torch.equal(model[1].memory, before[1])
        before = model[1].memory.clone()
        model(tokens()).sum().backward()
        sgd(model[0]).step()
        assert not torch.equal(model[1].memory, before)

    def test_what_was_written_goes_where_the_layer_goes(self):
        layer, x = make_workspace(), tokens()
        layer(x)
        written = written_by(layer)
        layer.double()
        assert layer.written[0].dtype == torch.float64
        torch.testing.assert_close(written_by(layer), written.double())

    def test_what_was_written_to_a_memory_of_fewer_slots_is_dropped(self):
        layer = make_workspace()
        layer(tokens())
        layer.memory = layer.memory.repeat(2, 1)
        layer(tokens())
        advance_memory(layer)
        assert layer.memory.shape == (16, 16)

    def test_an_optimizers_parameters_are_looked_at_once(self, monkeypatch):
        layer, looks = make_workspace(), []
        optimizer = sgd(layer)
        monkeypatch.setattr(advance, 'all_workspaces', lambda: looks.append(True) or [layer])
        for _ in range(3):
            layer(tokens()).sum().backward()
            optimizer.step()
        assert len(looks) == 1

    def test_a_dropped_workspace_is_freed_though_its_optimizer_is_not(self):
        layer = make_workspace()
        optimizer, dropped = sgd(layer), weakref.ref(layer)
        optimizer.step()
        del layer
        gc.collect()
        assert dropped() is None

    def test_models_that_train_in_threads_do_not_disturb_each_other(self):
        def register_and_list():
            for _ in range(300):
                advance.register_workspace(nn.Identity())
                advance.all_workspaces()

        others = [nn.Identity() for _ in range(300)]  # which take their time to list
        for module in others:
            advance.register_workspace(module)
        with ThreadPoolExecutor(8) as pool:
            for thread in [pool.submit(register_and_list) for _ in range(8)]:
                thread.result()

    def test_reloads_leave_models_as_they_were_and_the_hooks_once(self):
        code = (
            'import importlib, sys, timm, torch, timm_ait\n'
            'from timm.task import ClassificationTask\n'
            'from torch.optim.optimizer import _global_optimizer_post_hooks\n'
            'model = timm.create_model("test_ait", depth=1).train()\n'
            'num_hooks, names = len(_global_optimizer_post_hooks), list(sys.modules)\n'
            'for name in names:\n'
            '    if name.startswith("timm_ait.layers.") or name == "timm_ait.training":\n'
            '        importlib.reload(sys.modules[name])\n'
            'timm_ait.install_balance_loss()\n'
            'assert len(_global_optimizer_post_hooks) == num_hooks\n'
            'x, y = torch.randn(2, 3, 32, 32), torch.arange(2)\n'
            'result = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)(x, y)\n'
            'expected = torch.nn.functional.cross_entropy(result["output"], y) + result["balance_loss"]\n'
            'torch.testing.assert_close(result["loss"], expected)\n'
            'assert result["balance_loss"] > 0.\n'
            'memory = model.blocks[0].mlp.workspace.memory.clone()\n'
            'torch.optim.SGD(model.parameters(), lr=0.1).step()\n'
            'assert not torch.equal(model.blocks[0].mlp.workspace.memory, memory)\n'
        )
        subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2])


class TestWarning:

    def write(self, layer, number, optimizer=None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(number):
                layer(tokens()[:1])
                if optimizer is not None:
                    optimizer.step()
        return [str(warning.message) for warning in caught]

    def test_an_optimizer_of_copies_of_the_parameters_warns_once_and_names_the_remedies(self):
        layer = nn.Sequential(make_workspace(), make_workspace())
        sgd(layer).step()
        layer = copy.deepcopy(layer)
        masters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
        optimizer = torch.optim.SGD(masters, lr=0.1)
        assert self.write(layer, 99, optimizer) == []
        (message,) = self.write(layer, 201, optimizer)
        assert all(remedy in message for remedy in ('after the workspaces', 'advance_memory', 'freeze', 'eval()'))

    def test_a_copy_counts_its_own_forwards(self):
        layer = make_workspace()
        self.write(layer, 99)
        sgd(nn.Linear(2, 2)).step()
        assert self.write(copy.deepcopy(layer), 1) == []

    def test_a_model_that_is_trained_beside_others_does_not_warn(self):
        layer, other = make_workspace(), nn.Linear(2, 2)
        assert self.write(layer, 150, sgd(layer)) == []
        assert self.write(layer, 150, sgd(other)) == []  # an accumulation

    def test_beside_an_accumulation_it_warns_too(self):
        layer, optimizer = make_workspace(), sgd(nn.Linear(2, 2))
        self.write(layer, 128)
        optimizer.step()
        assert len(self.write(layer, 128)) == 1

    def test_a_memory_that_is_always_reset_does_not_warn(self):
        layer, optimizer = make_workspace(reset_memory=True), sgd(nn.Linear(2, 2))
        for _ in range(3):
            assert self.write(layer, 50, optimizer) == []
            advance_memory(layer)


class TestRefusals:

    @pytest.mark.parametrize('transform', [
        lambda layer: torch.func.jvp(layer, (tokens(),), (tokens(),)),
        lambda layer: torch.func.vmap(layer)(tokens()),
        lambda layer: torch.func.grad(lambda weight: torch.func.functional_call(
            layer, {'k.weight': weight}, (tokens(),)).sum())(layer.k.weight.detach()),
        lambda layer: torch.export.export(layer, (tokens(),)),
        lambda layer: torch.jit.trace(layer, tokens()),
    ], ids=['jvp', 'vmap', 'grad', 'export', 'trace'])
    def test_transforms_and_programs_of_a_layer_in_training_are_refused(self, transform):
        layer = make_workspace()
        with pytest.raises(RuntimeError, match=r'model.eval\(\)'):
            transform(layer)
        assert layer.written is None

    def test_a_replica_of_dataparallel_raises(self):
        model = nn.Sequential(nn.Linear(24, 24), make_workspace())
        layer = model[1]._replicate_for_data_parallel()
        for module in (layer, *layer.children()):
            module._parameters = {}
        with pytest.raises(RuntimeError, match='DataParallel.*DistributedDataParallel'):
            layer(tokens())


class TestBalanceLoss:

    def test_is_zero_before_a_forward_and_in_evaluation(self):
        layer = make_workspace()
        assert balance_loss(layer) == 0.
        layer(tokens())
        assert balance_loss(layer) > 0.
        layer.eval()
        assert balance_loss(layer) == 0.

    def test_is_on_the_models_device_where_nothing_writes(self):
        assert balance_loss(nn.Linear(2, 2, device='meta')).device.type == 'meta'

    def test_is_summed_where_the_first_workspace_is(self):
        layers = nn.Sequential(make_workspace(), make_workspace())
        for layer, device in zip(layers, ('meta', 'cpu')):
            layer.balance = torch.ones((), device=device)
        assert balance_loss(layers).device.type == 'meta'

    def test_has_its_gradient_until_the_backward_and_then_is_its_value(self):
        layer = make_workspace()
        output = layer(tokens()).sum()
        loss = balance_loss(layer)
        (output + loss).backward()
        layer.zero_grad()
        assert balance_loss(layer) == loss
        with pytest.warns(UserWarning, match='after each forward'):
            balance_loss(layer).backward()
        assert all(parameter.grad is None for parameter in layer.parameters())

    @pytest.mark.parametrize('end, kwargs', [
        (advance_memory, {}), (advance_memory, dict(reset_memory=True)), (nn.Module.eval, {}),
        (GlobalWorkspace.train, {})])
    def test_keeps_no_graph_beyond_the_step_or_a_change_of_mode(self, end, kwargs):
        layer = make_workspace(**kwargs)
        x = torch.zeros(4, 9, 24, requires_grad=True) + tokens()
        kept = weakref.ref(x)
        layer(x)
        del x
        gc.collect()
        assert kept() is not None
        end(layer)
        gc.collect()
        assert kept() is None

    def test_of_two_forwards_each_has_its_own_value_and_gradient(self):
        layer, alone = make_workspace(), make_workspace()
        losses = []
        for x in (tokens(), tokens()):
            layer(x), alone(x)
            losses.append(balance_loss(layer))
            assert torch.equal(losses[-1], balance_loss(alone))
            balance_loss(alone).backward()
        losses[0].backward()
        assert balance_loss(layer).grad_fn is not None
        losses[1].backward()
        torch.testing.assert_close(layer.q.weight.grad, alone.q.weight.grad)

    @pytest.mark.parametrize('asks_between', [False, True])
    def test_a_workspace_used_several_times_counts_once_with_each_of_its_uses(self, asks_between):
        layer, first, second = make_workspace(), make_workspace(), make_workspace()
        x = tokens()
        y = layer(x)
        loss = balance_loss(layer) if asks_between else 0.
        layer(y), second(first(x))
        loss, expected = loss + balance_loss(layer), balance_loss(first) + balance_loss(second)
        torch.testing.assert_close(loss, expected)
        loss.backward(), expected.backward()
        torch.testing.assert_close(layer.q.weight.grad, first.q.weight.grad + second.q.weight.grad)

    def test_leaves_out_layers_that_the_last_forward_did_not_reach(self):
        first, second = make_workspace(), make_workspace()
        model = nn.Sequential(first, second)
        (model(tokens()).sum() + balance_loss(model)).backward()
        first(tokens())
        torch.testing.assert_close(balance_loss(model), balance_loss(first))


class Net(nn.Module):

    def __init__(self, checkpoint=lambda mlp, x: mlp(x), depth=2, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList([WorkspaceMlp(24, 48, **SMALL, **kwargs) for _ in range(depth)])
        self.checkpoint = checkpoint
        self.double()

    def forward(self, x):
        for mlp in self.mlps:
            x = x + self.checkpoint(mlp, x)
        return x.square().mean()


def train(net, forward=None):
    """Gradients and memories of two steps of two forwards each before one backward."""
    forward = net if forward is None else forward
    optimizer = sgd(net, lr=0.05)
    results = []
    for i in range(2):
        torch.manual_seed(i)
        loss = sum(forward(tokens().double()) + balance_loss(net) for _ in range(2))
        optimizer.zero_grad()
        loss.backward()
        results += [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        results += [mlp.workspace.memory.clone() for mlp in net.mlps]
    return results


def assert_same(results, expected):
    for actual, wanted in zip(results, expected):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


REENTRANT, NON_REENTRANT = (functools.partial(checkpoint, use_reentrant=reentrant) for reentrant in (True, False))
SELECTIVE = functools.partial(NON_REENTRANT, context_fn=functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]))


class TestCheckpointing:
    """Two forwards before one backward, against the model without checkpointing."""

    @pytest.mark.parametrize('how', [NON_REENTRANT, SELECTIVE], ids=['non-reentrant', 'selective'])
    @pytest.mark.parametrize('stops_early', [True, False])
    def test_gradients_and_memories_are_the_same(self, how, stops_early):
        with torch.utils.checkpoint.set_checkpoint_early_stop(stops_early):
            results = train(Net(how, drop=0.2))
        assert_same(results, train(Net(drop=0.2)))

    def test_a_forward_that_is_computed_again_counts_once_and_leaves_no_graph(self):
        net = Net(NON_REENTRANT, depth=1)
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            loss = net(tokens().double()) + balance_loss(net)
        loss.backward()
        workspace = net.mlps[0].workspace
        assert workspace.num_writes == 1 and not workspace.balance.requires_grad

    def test_reentrant_checkpointing_which_would_lose_the_balance_loss_raises(self):
        net = Net(REENTRANT)
        with pytest.raises(RuntimeError, match='use_reentrant'):
            train(net, lambda x: net(x.requires_grad_()))

    @pytest.mark.filterwarnings('error:The balance loss')
    def test_reentrant_checkpointing_without_balance_loss_is_the_same(self):
        net = Net(REENTRANT, balance_weight=0.)
        assert_same(train(net, lambda x: net(x.requires_grad_())), train(Net(balance_weight=0.)))


class Operators(TorchDispatchMode):
    """Lists the operators that PyTorch runs, except for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(argument.alias_info is not None and not argument.alias_info.is_write
                      for argument in function._schema.arguments)
        if not is_view and function is not torch.ops.aten.promote_types.default:
            self.names.append(function.name())
        return result


class TestOperators:

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('gated', [False, True])
    def test_a_training_step_launches_few(self, gated, dtype):
        layer = make_workspace(gated=gated, bottleneck=0.1)
        x = tokens().to(dtype).requires_grad_()
        with Operators() as forward:
            output = layer(x)
        loss = output.float().square().mean() + balance_loss(layer)
        with Operators() as backward:
            loss.backward()
        assert len(forward.names) <= 60 and len(backward.names) <= 70

    @pytest.mark.parametrize('bottleneck', [0.1, 10])
    def test_a_training_step_with_a_mask_does_not_wait_for_a_value(self, bottleneck):
        layer, mask = make_workspace(bottleneck=bottleneck), torch.ones(4, 9, dtype=torch.bool).tril(4)
        with Operators() as operators:
            (layer(tokens(), mask).square().mean() + balance_loss(layer)).backward()
        assert 'aten::_local_scalar_dense' not in operators.names


class TestCompile:

    @pytest.fixture(autouse=True)
    def reset(self):
        torch._dynamo.reset()

    def test_a_checkpointed_part(self):
        net = Net(NON_REENTRANT, depth=1)
        net.mlps[0].compile(backend='aot_eager', fullgraph=True)
        assert_same(train(net), train(Net(depth=1)))

    @pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
    def test_the_whole_model_without_graph_breaks(self, backend):
        net = Net()
        assert_same(train(net, torch.compile(net, backend=backend, fullgraph=True)), train(Net()))

    def test_several_steps_are_compiled_once(self):
        layer, counter = make_workspace().train(), CompileCounter()
        run = torch.compile(layer, backend=counter)
        for _ in range(3):
            run(tokens()).sum().backward()
            sgd(layer).step()
        assert counter.frame_count == 1

    def test_the_whole_model_with_checkpoints(self):
        net = Net(NON_REENTRANT, depth=1)
        assert_same(train(net, torch.compile(net, backend='aot_eager')), train(Net(depth=1)))

    @pytest.mark.skipif(not hasattr(torch._dynamo.config, 'skip_fwd_side_effects_in_bwd_under_checkpoint'),
                        reason='the checkpointed blocks run eagerly in this version of PyTorch')
    def test_the_whole_model_with_checkpoints_as_one_graph(self):
        net = Net(NON_REENTRANT, depth=1)
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            assert_same(train(net, torch.compile(net, backend='aot_eager', fullgraph=True)), train(Net(depth=1)))

    @pytest.mark.parametrize('bottleneck, dynamic', [(0.3, None), pytest.param(10, True, marks=pytest.mark.slow)])
    def test_shapes_that_change(self, bottleneck, dynamic):
        layers = [make_workspace(bottleneck=bottleneck).double() for _ in range(2)]
        runs = [torch.compile(layers[0], backend='aot_eager', fullgraph=True, dynamic=dynamic), layers[1]]
        for num_tokens in (9, 12, 7):
            x = torch.randn(4, num_tokens, 24, dtype=torch.float64)
            for layer, run in zip(layers, runs):
                layer.zero_grad()
                (run(x).square().sum() + balance_loss(layer)).backward()
                sgd(layer, lr=0.01).step()
            assert_same(*([*(p.grad for p in layer.parameters()), layer.memory] for layer in layers))

    def test_evaluation_sees_the_memory_change(self):
        layer = make_workspace().eval()
        run = torch.compile(layer, backend='aot_eager', fullgraph=True)
        x = tokens()
        with torch.no_grad():
            run(x)
            layer.memory.copy_(torch.eye(8, 16))
            torch.testing.assert_close(run(x), layer(x))


class TestPrecision:

    @pytest.mark.parametrize('training', [True, False])
    def test_autocast_leaves_a_float32_residual_as_it_is(self, training):
        layer, x = make_workspace(gated=True).train(training), tokens()
        nn.init.zeros_(layer.gate)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(layer(x), x)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_autocast_leaves_the_write_in_float32(self, dtype):
        layer, plain = make_workspace(), make_workspace()
        x = tokens()
        with torch.autocast('cpu', dtype):
            layer(x)
            assert make_workspace()(x.to(dtype)).dtype == dtype
        plain(x)
        torch.testing.assert_close([written_by(layer), balance_loss(layer)], [written_by(plain), balance_loss(plain)])

    @pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)])
    def test_a_converted_layer_trains_and_evaluates_in_its_dtype(self, dtype, tolerance):
        layer = make_workspace().to(dtype)
        output = layer(tokens().to(dtype))
        output.sum().backward()
        advance_memory(layer)
        assert output.dtype == dtype and layer.memory.dtype == dtype
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        x = tokens()
        expected = copy.deepcopy(layer).eval().float()(x)
        torch.testing.assert_close(layer.eval()(x.to(dtype)).float(), expected, atol=tolerance, rtol=tolerance)
