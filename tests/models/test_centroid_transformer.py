from functools import partial

import pytest
import torch

from tests.models import make_model
from tests.models.equations import add_mlp, assert_computes, attention, layer_norm, linear, vit_block, vit_tokens
from timm_ait.models.centroid_transformer import CentroidAttention

make_model = partial(make_model, 'test_centroid_transformer')


def centroid_attention(layer, centroids, x):
    """Attention whose weights sum to one over the centroids."""
    (q, _, _), (_, k, v) = (linear(layer.qkv, y).chunk(3, -1) for y in (centroids, x))
    step = attention(q, k, v, num_heads=4, sum_over=-2)
    return linear(layer.proj, step * centroids.shape[1] / x.shape[1])


def grid_means(grid, pool):
    """Means of squares of the grid, of what is there at a border."""
    return torch.stack([
        grid[:, i:i + pool, j:j + pool].mean(dim=(1, 2))
        for i in range(0, grid.shape[1], pool) for j in range(0, grid.shape[2], pool)], dim=1)


def classify(centroid_index, centroid_pool, model, x, question=None):
    """Logits of each centroid."""
    num_questions = int(question is not None)
    x = vit_tokens(model, x, question)
    for i, block in enumerate(model.blocks):
        if i == centroid_index:
            grid = x[:, num_questions:].unflatten(1, model.patch_embed.grid_size)
            centroids = torch.cat([x[:, :num_questions], grid_means(grid, centroid_pool)], dim=1)
            step = centroid_attention(block.attn, layer_norm(block.norm1, centroids), layer_norm(block.norm1, x))
            x = add_mlp(block, centroids + step)
        else:
            x = vit_block(block, x, num_heads=4)
    return linear(model.head, layer_norm(model.norm, x))


@pytest.mark.parametrize('index, pool, kwargs', [
    (1, 2, dict()), (1, 2, dict(question_dim=5)), (1, 2, dict(qkv_bias=False)),
    (1, 2, dict(img_size=(28, 20), question_dim=5)), (0, 2, dict()), (1, 1, dict()), (1, 3, dict()), (1, 8, dict()),
])
def test_outputs_and_gradients_are_those_of_the_equations(index, pool, kwargs):
    model = make_model(num_heads=4, global_pool='', centroid_index=index, centroid_pool=pool, **kwargs)
    assert_computes(partial(classify, index, pool), model)


def test_with_tied_values_the_attention_is_the_gradient_of_soft_k_means():
    layer = CentroidAttention(12, num_heads=3, dtype=torch.float64)
    centroids = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, _ = layer.qkv.weight.chunk(3)
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


@pytest.mark.parametrize('kwargs, grid', [
    (dict(), (4, 4)), (dict(centroid_pool=4), (2, 2)), (dict(centroid_pool=8), (1, 1)), (dict(centroid_pool=1), (8, 8)),
    (dict(img_size=(28, 20)), (4, 3)), (dict(img_size=48, patch_size=8), (3, 3)),
])
def test_number_of_centroids(kwargs, grid):
    model = make_model(**kwargs).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    assert model.forward_features(x).shape == (2, grid[0] * grid[1], 64)
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 64, *grid)
