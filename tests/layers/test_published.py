from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from timm_ait.layers import balance_loss, published_workspace_mlp

PARITY = Path(__file__).parents[1] / 'data' / 'published_workspace_parity.safetensors'

# modules of the published layer by ours
NAMES = {
    'fc1': 'fc1',
    'fc2': 'fc2',
    'norm': 'workspace.norm',
    'fc3': 'workspace.attractors',
    'memoryupdate': 'workspace',
    'memoryupdate.mha.w_qs': 'workspace.q',
    'memoryupdate.mha.w_ks': 'workspace.k',
    'memoryupdate.mha.w_vs': 'workspace.v',
    'memoryupdate.mha.fc': 'workspace.proj',
    'memoryupdate.mha.layer_norm': 'workspace.slot_norm',
}


def convert(state_dict, num_heads):
    """A published state dict as ours. Heads are concatenated slot-dim-major there, head-major here."""
    converted = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition('.')
        if module == 'memoryupdate.mha.fc':
            value = value.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)
        converted[f'{NAMES[module]}.{name}'] = value
    return converted


class TestPublishedParity:
    """The recorded numbers of the published layer, to float32 rounding."""
    recorded = load_file(PARITY)
    weights = {k.removeprefix('weights.'): v for k, v in recorded.items() if k.startswith('weights.')}

    def run(self):
        """Yields the layer, recorded step and the step's results, after its backward."""
        mlp = published_workspace_mlp(64, 128, num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=20, beta=1.)
        weights = {key: value for key, value in self.weights.items() if key != 'memoryupdate.beta'}  # the momentum
        mlp.load_state_dict(convert(weights, num_heads=4))
        for s in range(3):
            prefix = f'step{s}.'
            step = {k.removeprefix(prefix): v for k, v in self.recorded.items() if k.startswith(prefix)}
            x = step['input'].clone().requires_grad_()
            output = mlp(x)
            mlp.zero_grad()
            ((output * step['cotangent']).mean() + balance_loss(mlp)).backward()
            yield mlp, step, x, output

    def test_outputs_balance_loss_and_memory(self):
        for mlp, step, _, output in self.run():
            torch.testing.assert_close(output, step['output'], atol=1e-5, rtol=0)
            torch.testing.assert_close(balance_loss(mlp), step['balance_loss'][0], atol=1e-5, rtol=0)
            torch.testing.assert_close(mlp.workspace.memory, step['memory_after'], atol=1e-5, rtol=0)
            assert mlp.workspace.written is None  # by which an optimizer's step would move it again

    def test_gradient_checkpointing_is_refused(self):
        mlp = published_workspace_mlp(16, num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=5)
        output = checkpoint(mlp, torch.randn(2, 9, 16), use_reentrant=False)
        with pytest.raises(RuntimeError, match='Gradient checkpointing'):
            output.sum().backward()

    @pytest.mark.parametrize('reset_memory, value', [(True, 1.), (False, float('nan'))])
    def test_reset_or_not_finite_it_keeps_the_memory(self, reset_memory, value):
        mlp = published_workspace_mlp(16, num_slots=4, slot_dim=8, workspace_heads=2, reset_memory=reset_memory)
        before = mlp.workspace.memory.clone()
        mlp(value * torch.randn(2, 9, 16))
        assert torch.equal(mlp.workspace.memory, before)

    def test_has_one_dtype(self):
        mlp = published_workspace_mlp(16, num_slots=4, dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in mlp.state_dict().values()} == {torch.bfloat16}

    def test_gradients_and_their_absence(self):
        for mlp, step, x, _ in self.run():
            recorded = convert({
                name.removeprefix('grad.'): grad for name, grad in step.items() if name.startswith('grad.')}, 4)
            torch.testing.assert_close(x.grad, step['grad_input'], atol=1e-8, rtol=1e-5)
            assert {n for n, p in mlp.named_parameters() if p.grad is not None} == recorded.keys()
            for name, grad in recorded.items():
                actual = mlp.get_parameter(name).grad
                torch.testing.assert_close(actual, grad, atol=2e-8, rtol=1e-4, msg=lambda m: f'{name}: {m}')
