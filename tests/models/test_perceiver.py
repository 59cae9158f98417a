from functools import partial

import pytest
import torch

import timm
from timm.models import save_for_hf

from tests.models import images, make_model
from tests.models.equations import (
    add_mlp,
    assert_computes,
    cross_attention,
    layer_norm,
    linear,
    vit_block,
    vit_tokens,
)

make_model = partial(make_model, 'test_perceiver')


def classify(num_iterations, model, x, question=None):
    """Appendix C of the paper. The first cross-attention has weights of its own, the others share theirs; so do all
    latent transformers.
    """
    tokens, encoder = vit_tokens(model, x, question), model.blocks[0]
    x = encoder.latents.repeat(len(tokens), 1, 1)
    for iteration in range(num_iterations):
        cross = encoder.cross_attns[min(iteration, 1)]
        read = cross_attention(cross.attn, layer_norm(cross.norm1, x), layer_norm(cross.norm_tokens, tokens), 1)
        x = add_mlp(cross, x + read)
        for block in encoder.latent_transformers[0]:
            x = vit_block(block, x, num_heads=4)
    return linear(model.head, x.mean(1))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('question_dim', [0, 5])
@pytest.mark.parametrize('num_iterations', [1, 3])
def test_outputs_and_gradients_are_those_of_the_paper(fused, question_dim, num_iterations):
    model = make_model(num_heads=4, question_dim=question_dim, num_iterations=num_iterations)
    assert_computes(partial(classify, num_iterations), model, fused)


@pytest.mark.parametrize('index', [0, 1])
def test_pruned_and_saved_it_runs_as_many_iterations(index, tmp_path):
    model, x = make_model().eval(), images(2)
    expected = model.forward_intermediates(x, [index], output_fmt='NLC', intermediates_only=True)[0]
    model.prune_intermediate_layers([index])
    save_for_hf(model, tmp_path)
    torch.testing.assert_close(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)


def test_features_only_raises():
    with pytest.raises(RuntimeError, match='features_only is not implemented for Perceiver'):
        make_model(features_only=True)


def test_there_are_no_grids():
    with pytest.raises(AssertionError, match='latents are not on a grid'):
        make_model().forward_intermediates(images(2), output_fmt='NCHW')
