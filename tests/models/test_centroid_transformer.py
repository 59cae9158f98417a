from functools import partial

import pytest
import torch
import torch.nn.functional as F

import timm

from tests.models import make_model
from tests.models.equations import assert_same, vit_tokens
from timm_ait.models.centroid_transformer import CentroidAttention

make_model = partial(make_model, 'test_centroid_transformer')


def linear(weight, bias, x):
    y = torch.einsum('...i,oi->...o', x, weight)
    return y if bias is None else y + bias


def projections(layer):
    """Weights and biases of queries, keys and values."""
    biases = [None] * 3 if layer.qkv.bias is None else layer.qkv.bias.chunk(3)
    return list(zip(layer.qkv.weight.chunk(3), biases))


def reference_attention(layer, queried, x, over):
    """Attention whose weights sum to one over the centroids (`over='centroids'`) or the tokens."""
    q, k, v = (
        linear(weight, bias, y).unflatten(-1, (layer.num_heads, -1))
        for (weight, bias), y in zip(projections(layer), (queried, x, x)))
    scores = torch.einsum('bmld,bnld->blmn', q, k) / q.shape[-1] ** 0.5
    sim = scores.exp()
    sim = sim / sim.sum(dim={'centroids': 2, 'tokens': 3}[over], keepdim=True)
    step = torch.einsum('blmn,bnld->bmld', sim, v).flatten(2)
    if over == 'centroids':
        step = step * queried.shape[1] / x.shape[1]
    return linear(layer.proj.weight, layer.proj.bias, step)


def reference_centroids(x, num_prefix_tokens, grid_size, pool):
    """Means of squares of the grid, of what is there at a border, after the prefix tokens."""
    grid = x[:, num_prefix_tokens:].unflatten(1, grid_size)
    means = [
        grid[:, i:i + pool, j:j + pool].mean(dim=(1, 2))
        for i in range(0, grid_size[0], pool) for j in range(0, grid_size[1], pool)]
    return torch.cat([x[:, :num_prefix_tokens], torch.stack(means, dim=1)], dim=1)


def reference_model(model, x, question=None):
    """The model's features before the norm."""
    x = vit_tokens(model, x, question)
    for i, block in enumerate(model.blocks):
        if i == model.centroid_index:
            tokens = x
            x = reference_centroids(x, question is not None, model.patch_embed.grid_size, model.centroid_pool)
            x = x + reference_attention(block.attn, block.norm1(x), block.norm1(tokens), 'centroids')
        else:
            x = x + reference_attention(block.attn, block.norm1(x), block.norm1(x), 'tokens')
        hidden = F.gelu(linear(block.mlp.fc1.weight, block.mlp.fc1.bias, block.norm2(x)))
        x = x + linear(block.mlp.fc2.weight, block.mlp.fc2.bias, hidden)
    return x


class TestEquations:

    @pytest.mark.parametrize('num_centroids, num_tokens', [(1, 6), (3, 7), (7, 7)])
    @pytest.mark.parametrize('bias', [True, False])
    def test_the_attention_computes_its_equation(self, num_centroids, num_tokens, bias):
        torch.manual_seed(0)
        layer = CentroidAttention(12, num_heads=3, qkv_bias=bias, dtype=torch.float64)
        centroids = torch.randn(2, num_centroids, 12, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, num_tokens, 12, dtype=torch.float64, requires_grad=True)
        actual, expected = layer(centroids, x), reference_attention(layer, centroids, x, 'centroids')
        # a single centroid gets every token whole, wherever it is
        inputs = [x, *layer.parameters()] if num_centroids == 1 else [centroids, x, *layer.parameters()]
        assert_same(actual, expected, inputs)

    def test_with_tied_values_it_is_the_gradient_of_soft_k_means(self):
        torch.manual_seed(0)
        layer = CentroidAttention(12, num_heads=3, dtype=torch.float64)
        centroids = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        (q, _), (k, _), _ = projections(layer)
        queries, keys = ((y @ weight.T).unflatten(-1, (3, 4)) for y, weight in ((centroids, q), (x, k)))
        scores = torch.einsum('bmld,bnld->blmn', queries, keys)
        objective = (scores / 4 ** 0.5).logsumexp(dim=2).sum()
        gradient, = torch.autograd.grad(objective, centroids)
        # V_l(x) = W_Q^T W_K x / sqrt(d): the keys are the values, and the output projection is that of the queries
        with torch.no_grad():
            layer.qkv.weight[24:] = k
            layer.proj.weight.copy_(q.T / 4 ** 0.5)
            layer.proj.bias.zero_()
        assert (layer(centroids, x) * 9 / 4 - gradient).abs().max() <= 1e-10

    @pytest.mark.parametrize('kwargs', [
        dict(),
        dict(question_dim=5),
        dict(centroid_index=0),
        dict(img_size=(28, 20), question_dim=5),
        dict(centroid_pool=3),
        dict(centroid_pool=8),
    ])
    def test_the_model_computes_its_equations(self, kwargs):
        model = make_model(global_pool='', **kwargs).double().eval()
        x = torch.randn(2, 3, *model.patch_embed.img_size).double()
        question = torch.randn(2, 5).double() if 'question_dim' in kwargs else None
        asked = {} if question is None else {'question': question}
        actual, expected = model.forward_features(x, **asked), model.norm(reference_model(model, x, question))
        parameters = [p for name, p in model.named_parameters() if not name.startswith('head')]
        assert_same(actual, expected, parameters)


class TestCentroids:

    @pytest.mark.parametrize('kwargs, grid', [
        (dict(), (4, 4)),
        (dict(centroid_pool=4), (2, 2)),
        (dict(centroid_pool=8), (1, 1)),
        (dict(centroid_pool=1), (8, 8)),
        (dict(img_size=(28, 20)), (4, 3)),
        (dict(img_size=48, patch_size=8), (3, 3)),
    ])
    def test_number_of_centroids(self, kwargs, grid):
        model = make_model(**kwargs).eval()
        x = torch.randn(2, 3, *model.patch_embed.img_size)
        assert model.forward_features(x).shape == (2, grid[0] * grid[1], 64)
        assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 64, *grid)


class TestLikeAnyTimmViT:

    def test_keys_of_a_plain_vit_match_one_to_one(self):
        kwargs = dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, mlp_ratio=4)
        vit = timm.create_model('test_vit', class_token=False, global_pool='avg', num_classes=10, **kwargs)
        make_model().load_state_dict(vit.state_dict())

    @pytest.mark.parametrize('name, value', [
        ('centroid_index', -1), ('centroid_index', 3), ('centroid_pool', 0),
        ('patch_drop_rate', 0.5), ('dynamic_img_size', True), ('attn_layer', 'diff'),
    ])
    def test_a_bad_argument_is_named(self, name, value):
        with pytest.raises(ValueError, match=f'{name}.*{value}'):
            make_model(**{name: value})
