""" The fused write against naive.py. """
import inspect

import pytest
import torch
import torch.nn.functional as F

from timm_ait.ops import bottleneck, naive, selection, workspace

TOLERANCE = {
    torch.float64: dict(atol=1e-9, rtol=1e-7),
    torch.float32: dict(atol=2e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=3e-2, rtol=3e-2),
    torch.float16: dict(atol=5e-3, rtol=5e-3),
}

# tokens, width, slots, slot width, heads, bottleneck
GRID = [
    (64, 24, 8, 16, 4, 20),
    (63, 24, 8, 16, 4, 1),
    (37, 13, 5, 7, 3, 36),
    (37, 13, 5, 7, 3, 37),
    (9, 24, 8, 16, 4, 512),
    (50, 24, 8, 16, 1, 10),
    (50, 24, 1, 16, 4, 10),
    (1, 24, 8, 16, 4, 4),
    (257, 24, 12, 8, 2, 30),
    (256, 24, 12, 8, 2, 30),
]


def make_inputs(num_tokens, dim, num_slots, slot_dim, num_heads, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(torch.promote_types(dtype, torch.float32))

    inner = num_heads * slot_dim
    return dict(
        tokens=(3 * randn(num_tokens, dim) + 1).to(dtype),
        token_norm_weight=1 + 0.1 * randn(dim),
        token_norm_bias=0.1 * randn(dim),
        memory=torch.nn.functional.normalize(randn(num_slots, slot_dim), dim=-1),
        query=randn(inner, slot_dim) * 2,
        key=randn(inner, dim) / dim ** 0.5,
        value=randn(inner, dim) / dim ** 0.5,
        output=randn(slot_dim, inner) / inner ** 0.5,
        norm_weight=1 + 0.1 * randn(slot_dim),
        norm_bias=0.1 * randn(slot_dim),
    )


def grouped(token_norm_weight, token_norm_bias, **inputs):
    """Inputs by name as the functions take them."""
    weights = naive.WriteWeights(**{name: inputs.pop(name) for name in naive.WriteWeights._fields})
    return dict(inputs, norm=naive.TokenNorm(token_norm_weight, token_norm_bias, 1e-5), weights=weights)


def fused_write(**inputs):
    return bottleneck.write(**grouped(**inputs))[:3]


def naive_write(**inputs):
    inputs = grouped(**inputs)
    norm, tokens = inputs.pop('norm'), inputs.pop('tokens')
    return naive.write(F.layer_norm(tokens, norm.weight.shape, *norm), **inputs)


def run(write, inputs, num_heads, k):
    inputs = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    candidate, balance, coverage = write(**inputs, num_heads=num_heads, bottleneck=k)
    loss = (candidate * torch.linspace(-1, 1, candidate.numel(), dtype=candidate.dtype).view_as(candidate)).sum()
    (loss + 0.1 * balance).backward()
    return (candidate.detach(), balance.detach(), coverage), {name: value.grad for name, value in inputs.items()}


def as_naive(inputs):
    """naive.py computes in one dtype: that of the weights."""
    return {name: value.to(inputs['memory'].dtype) for name, value in inputs.items()}


@pytest.mark.parametrize('n, k', [(64, 8), (64, 1), (512, 60), (63, 5), (64, 64)])
@pytest.mark.parametrize('scores', ['distinct', 'tied', 'equal', 'infinite'])
def test_top_k_finds_the_largest(scores, n, k):
    scores = {
        'distinct': lambda: torch.randn(6, n),
        'tied': lambda: torch.randint(3, (6, n)).float(),
        'equal': lambda: torch.zeros(6, n),
        'infinite': lambda: torch.randn(6, n).masked_fill(torch.rand(6, n) < 0.9, -torch.inf),
    }[scores]()
    values, indices = selection._top_k(scores, k)
    assert torch.equal(values.sort(descending=True).values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('grid', GRID)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_write_matches_naive(grid, dtype):
    *shape, k = grid
    inputs = make_inputs(*shape, dtype=dtype)
    outputs, grads = run(fused_write, inputs, shape[-1], k)
    expected_outputs, expected_grads = run(naive_write, inputs, shape[-1], k)
    for output, expected in zip(outputs, expected_outputs):
        torch.testing.assert_close(output, expected, **TOLERANCE[dtype])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **TOLERANCE[dtype], msg=lambda m: f'{name}: {m}')


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_write_is_naive_within_rounding(dtype):
    # every token is kept, since rounding the scores may change which ones are
    inputs = make_inputs(40, 24, 8, 16, 4, dtype=dtype)
    outputs, grads = run(fused_write, inputs, 4, 40)
    expected_outputs, expected_grads = run(naive_write, as_naive(inputs), 4, 40)
    for output, expected in zip(outputs, expected_outputs):
        torch.testing.assert_close(output, expected, **TOLERANCE[dtype])
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(
            grad.float() / scale, expected_grads[name] / scale, **TOLERANCE[dtype], msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('num_tokens, k', [(50, 7), (50, 12), (64, 16), (33, 1)])
def test_writing_streams_over_chunks(monkeypatch, num_tokens, k):
    inputs = make_inputs(num_tokens, 24, 8, 16, 4)
    expected_outputs, expected_grads = run(fused_write, inputs, 4, k)
    monkeypatch.setattr(selection, '_SELECTION_CHUNK', 16)
    monkeypatch.setattr(selection, 'chunk_size', lambda tokens: 5)
    outputs, grads = run(fused_write, inputs, 4, k)
    for output, expected in zip(outputs, expected_outputs):
        torch.testing.assert_close(output, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('k', [5, 30])
@pytest.mark.parametrize('chunk', [7, 64])
def test_a_step_matches_naive(monkeypatch, chunk, k, gated, masked):
    monkeypatch.setattr(selection, 'chunk_size', lambda tokens: chunk)
    inputs = make_inputs(50, 24, 8, 16, 4, dtype=torch.float64)
    inputs.update(x=inputs.pop('tokens'))
    if gated:
        inputs.update(gate=torch.linspace(-1, 1, 24, dtype=torch.float64))
    lift = torch.randn(16, 24, dtype=torch.float64)
    token_mask = torch.arange(50) % 3 > 0 if masked else None
    results = []
    for step in (workspace.write_and_read, naive.write_and_read):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
        outputs = step(
            **grouped(**leaves), num_heads=4, bottleneck=k, lift=lambda memory: memory @ lift, momentum=0.8,
            rule='orthogonal', beta=0.7, token_mask=token_mask)
        cotangent = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
        kept = cotangent.clone()
        torch.autograd.backward((outputs[0], outputs[3]), (cotangent, torch.tensor(0.1, dtype=torch.float64)))
        assert torch.equal(cotangent, kept)  # gradients are added up in place, but not in this one
        results.append((outputs, {name: leaf.grad for name, leaf in leaves.items()}))
    (outputs, grads), (expected_outputs, expected_grads) = results
    for output, expected in zip(outputs, expected_outputs):
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)  # two ways to the polar factor
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-5, msg=lambda m: f'{name}: {m}')


def test_the_signature_is_that_of_naive():
    parameters = list(inspect.signature(naive.write_and_read).parameters)
    assert list(inspect.signature(workspace.write_and_read).parameters)[:len(parameters)] == parameters


def test_selection_and_pooling_are_well_formed_operators():
    queries, tokens, norm = torch.randn(6, 5), torch.randn(11, 5), (torch.ones(5), torch.zeros(5), 1e-5)
    args = (queries, tokens, None, *norm, 4)
    torch.library.opcheck(torch.ops.timm_ait.select, args)
    scores, indices = torch.ops.timm_ait.select(*args)
    torch.library.opcheck(torch.ops.timm_ait.pool, (tokens, *norm, scores.exp(), indices))


@pytest.mark.usefixtures('on_every_device')
def test_non_contiguous_tokens():
    inputs = make_inputs(40, 24, 8, 16, 4)
    expected, _ = run(fused_write, inputs, 4, 10)
    strided = inputs['tokens'].T.contiguous().T
    assert not strided.is_contiguous()
    candidate, balance, coverage = fused_write(**{**inputs, 'tokens': strided}, num_heads=4, bottleneck=10)
    torch.testing.assert_close((candidate, balance, coverage), expected)


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('write', [naive_write, fused_write])
def test_tied_scores_keep_exactly_k_tokens(write):
    inputs = make_inputs(40, 24, 8, 16, 4)
    inputs['tokens'] = inputs['tokens'][:1].expand(40, -1)
    outputs, grads = run(write, inputs, 4, 10)
    every_token, _ = run(write, inputs, 4, 40)
    torch.testing.assert_close(outputs[0], every_token[0])
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('write', [naive_write, fused_write])
def test_no_tokens_propose_the_memory_itself(write):
    inputs = make_inputs(0, 24, 8, 16, 4)
    candidate, balance, coverage = write(**inputs, num_heads=4, bottleneck=10)
    torch.testing.assert_close(candidate, inputs['memory'])
    assert balance == 0 and coverage == 0


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('write', [naive_write, fused_write])
def test_masked_tokens_alone_propose_the_memory_itself(write):
    inputs = make_inputs(6, 24, 8, 16, 4)
    inputs.update(num_heads=4, bottleneck=10, token_mask=torch.zeros(6, dtype=torch.bool))
    candidate, balance, coverage = write(**inputs)
    assert torch.equal(candidate, inputs['memory'])
    assert balance == 0 and coverage == 0


def test_nothing_dense_is_kept_for_backward():
    num_tokens, num_slots, num_heads = 4096, 16, 8
    inputs = make_inputs(num_tokens, 8, num_slots, 4, num_heads)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        fused_write(**inputs, num_heads=num_heads, bottleneck=64)
    assert max(saved) < num_tokens * num_slots * num_heads / 8


@pytest.mark.usefixtures('on_every_device')
def test_coverage_counts_selected_tokens():
    inputs = make_inputs(100, 24, 2, 16, 1)
    *_, coverage = fused_write(**inputs, num_heads=1, bottleneck=1)
    assert coverage in (torch.tensor(0.01), torch.tensor(0.02))


def test_balance_loss_of_even_attention_is_zero():
    attention = torch.full((2, 4, 10), 0.1)
    assert naive.balance_loss(attention) == pytest.approx(0., abs=1e-6)


def test_balance_loss_is_the_squared_coefficient_of_variation():
    attention = torch.zeros(1, 2, 4)
    attention[0, :, 0] = 1.
    # importance and load are both (2, 0, 0, 0): mean 0.5, unbiased variance 1
    assert naive.balance_loss(attention) == pytest.approx(2 * 1. / 0.25, rel=1e-5)
