from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.models import images, make_model
from tests.models.equations import assert_same, vit_tokens
from timm_ait.models.coordination import SharedWorkspace

make_model = partial(make_model, 'test_coordination')


def linear(layer, x):
    y = torch.einsum('...i,oi->...o', x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1))


def reference_workspace(layer, x, memory):
    """The equations of SharedWorkspace, one after the other, over a layer's parameters."""
    queries = heads(linear(layer.write_q, memory), layer.slot_heads)
    keys, values = (heads(y, layer.slot_heads) for y in linear(layer.write_kv, x).chunk(2, dim=-1))
    scores = torch.einsum('bmad,bnad->bamn', queries, keys) / queries.shape[-1] ** 0.5
    if layer.bottleneck < x.shape[1]:
        kth = scores.topk(layer.bottleneck, dim=-1).values[..., -1:]
        selected = scores >= kth
    else:
        selected = torch.ones_like(scores, dtype=torch.bool)
    exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp() * selected
    weights = exponentials / exponentials.sum(dim=-1, keepdim=True)
    update = torch.einsum('bamn,bnad->bmad', weights, values).flatten(2)

    gate = linear(layer.gate_in, x).relu().sum(dim=1, keepdim=True) / x.shape[1] + memory.tanh()
    gate = linear(layer.gates, gate)
    input_gate = gate[..., :layer.slot_dim].sigmoid()
    forget_gate = (gate[..., layer.slot_dim:] + 1).sigmoid()
    memory = input_gate * update.tanh() + forget_gate * memory

    queries = heads(linear(layer.read_q, x), layer.num_heads)
    keys, values = (heads(y, layer.num_heads) for y in linear(layer.read_kv, memory).chunk(2, dim=-1))
    weights = (torch.einsum('bnhd,bmhd->bhnm', queries, keys) / queries.shape[-1] ** 0.5).softmax(dim=-1)
    received = linear(layer.proj, torch.einsum('bhnm,bmhd->bnhd', weights, values).flatten(2))
    return received, memory, selected


def reference_model(model, x, question=None):
    """The model's features, with the reference workspace in every block."""
    x = vit_tokens(model, x, question)
    memory = model.norm_pre.memory.slots.expand(x.shape[0], -1, -1)
    for block in model.blocks:
        received, memory, _ = reference_workspace(block.attn, block.norm1(x), memory)
        x = x + received
        x = x + linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, block.norm2(x))))
    return x


class TestEquations:

    @pytest.mark.parametrize('num_tokens, bottleneck', [(7, 1), (7, 3), (7, 7), (3, 5)])
    @pytest.mark.parametrize('bias', [True, False])
    def test_the_workspace_computes_its_equations(self, num_tokens, bottleneck, bias):
        torch.manual_seed(0)
        layer = SharedWorkspace(
            12, num_heads=3, slot_dim=8, slot_heads=2, bottleneck=bottleneck, qkv_bias=bias, dtype=torch.float64)
        x = torch.randn(2, num_tokens, 12, dtype=torch.float64, requires_grad=True)
        memory = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
        received, updated = layer(x, memory)
        expected_received, expected_memory, _ = reference_workspace(layer, x, memory)
        assert (updated - expected_memory).abs().max() <= 1e-10
        # where a slot keeps one token, its weight is one whatever the query
        parameters = [p for name, p in layer.named_parameters() if bottleneck > 1 or not name.startswith('write_q')]
        assert_same(received, expected_received, [x, memory, *parameters])

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('question_dim', [0, 5])
    def test_the_model_computes_its_equations(self, fused, question_dim):
        model = make_model(question_dim=question_dim, global_pool='').double().eval()
        for block in model.blocks:
            block.attn.fused_attn = fused
        x = images(2).double()
        question = torch.randn(2, 5).double() if question_dim else None
        asked = {'question': question} if question_dim else {}
        actual = model.forward_features(x, **asked)[:, model.num_prefix_tokens:]
        expected = model.norm(reference_model(model, x, question))[:, int(question_dim > 0):]
        parameters = [p for name, p in model.named_parameters() if not name.startswith('head')]
        assert_same(actual, expected, parameters)


class TestLikeAnyTimmViT:

    @pytest.mark.parametrize('name, value', [
        ('num_slots', 0), ('slot_dim', -1), ('slot_heads', 3), ('bottleneck', 0), ('bottleneck', 0.5),
        ('qk_norm', True), ('attn_layer', 'diff'),
    ])
    def test_a_bad_argument_is_named(self, name, value):
        with pytest.raises(ValueError, match=f'{name}.*{value}'):
            make_model(**{name: value})

    @pytest.mark.parametrize('fused', [True, False])
    def test_attention_dropout_acts_on_write_and_broadcast(self, fused):
        layer = SharedWorkspace(16, num_heads=2, slot_dim=8, slot_heads=2, attn_drop=0.5)
        layer.fused_attn = fused
        x, memory = torch.randn(1, 30, 16), torch.randn(1, 3, 8)
        for step in (layer.write, layer.broadcast):
            layer.eval()
            assert torch.equal(step(x, memory), step(x, memory))
            layer.train()
            assert not torch.equal(step(x, memory), step(x, memory))
