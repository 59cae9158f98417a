from functools import partial

import pytest
import torch

from tests.models import make_model
from tests.models.equations import add_mlp, assert_computes, attention, layer_norm, linear, vit_tokens
from timm_ait.models.coordination import SharedWorkspace

make_model = partial(make_model, 'test_coordination')


def workspace(layer, x, memory, bottleneck):
    """The equations of SharedWorkspace, one after the other."""
    k, v = linear(layer.write_kv, x).chunk(2, -1)
    update = attention(linear(layer.write_q, memory), k, v, num_heads=2, keep=bottleneck)
    gates = linear(layer.gates, linear(layer.gate_in, x).relu().mean(1, keepdim=True) + memory.tanh())
    input_gate, forget_gate = gates.chunk(2, -1)
    memory = input_gate.sigmoid() * update.tanh() + (forget_gate + 1).sigmoid() * memory
    k, v = linear(layer.read_kv, memory).chunk(2, -1)
    return linear(layer.proj, attention(linear(layer.read_q, x), k, v, num_heads=8)), memory


def classify(bottleneck, model, x, question=None):
    num_questions = int(question is not None)
    x, memory = vit_tokens(model, x, question), model.norm_pre.memory.slots.repeat(len(x), 1, 1)
    for block in model.blocks:
        received, memory = workspace(block.attn, layer_norm(block.norm1, x), memory, bottleneck)
        x = add_mlp(block, x + received)
    return linear(model.head, layer_norm(model.fc_norm, x[:, num_questions:].mean(1)))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bottleneck, kwargs', [
    (3, dict()), (3, dict(question_dim=5)), (3, dict(qkv_bias=False, proj_bias=False)), (1, dict()), (64, dict()),
    (1000, dict()), (3, dict(num_slots=3)),
])
def test_outputs_and_gradients_are_those_of_the_equations(fused, bottleneck, kwargs):
    model = make_model(num_heads=8, bottleneck=bottleneck, **kwargs)
    # where a slot keeps one token, its weight is one whatever the query
    assert_computes(partial(classify, bottleneck), model, fused, unused='write_q' if bottleneck == 1 else None)


@pytest.mark.parametrize('fused', [True, False])
def test_attention_dropout_acts_on_write_and_broadcast(fused):
    layer = SharedWorkspace(16, num_heads=2, slot_dim=8, slot_heads=2, attn_drop=0.5)
    layer.fused_attn = fused
    x, memory = torch.randn(1, 30, 16), torch.randn(1, 3, 8)
    write, layer.write = layer.write, lambda x, memory: memory
    for step in (write, lambda *inputs: layer(*inputs)[0]):
        layer.eval()
        assert torch.equal(step(x, memory), step(x, memory))
        layer.train()
        assert not torch.equal(step(x, memory), step(x, memory))


@pytest.mark.parametrize('kwargs', [dict(pool_include_prefix=True), dict(global_pool='prr')])
def test_the_memory_is_not_pooled(kwargs):
    with pytest.raises(ValueError, match='pool_include_prefix.*prr'):
        make_model(**kwargs)
