from functools import partial

import pytest
import torch

from tests.models import images, make_model
from tests.models.equations import assert_computes, cross_attention, layer_norm, linear, vit_tokens

make_model = partial(make_model, 'test_set_transformer')


def mab(block, x, y):
    """Equations 6 and 7 of the paper, whose scores are divided by the root of the full width."""
    h = layer_norm(block.norm1, x + cross_attention(block.attn, x, y, num_heads=4, scale=x.shape[-1] ** -0.5))
    return layer_norm(block.norm2, h + linear(block.rff[0], h).relu())


def classify(model, x, question=None):
    """Equations 9 to 11: induced set attention blocks, then pooling by multihead attention."""
    x = vit_tokens(model, x, question)
    for block in model.blocks:
        h = mab(block.induce, block.inducing_points.repeat(len(x), 1, 1), x)
        x = mab(block.attend, x, h)
    pool = model.attn_pool
    return linear(model.head, mab(pool.mab, pool.seeds.repeat(len(x), 1, 1), linear(pool.rff[0], x).relu())[:, 0])


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('question_dim', [0, 5])
def test_outputs_and_gradients_are_those_of_the_paper(fused, question_dim):
    assert_computes(classify, make_model(depth=2, num_heads=4, question_dim=question_dim), fused)


def test_average_pooling_takes_the_patches_and_token_pooling_the_question():
    x, question = images(2), torch.randn(2, 5)
    for pool, expected in (('avg', lambda f: f[:, 1:].mean(1)), ('token', lambda f: f[:, 0])):
        model = make_model(question_dim=5, global_pool=pool, num_classes=0).eval()
        features = model.forward_features(x, question=question)
        torch.testing.assert_close(model(x, question=question), expected(features))
