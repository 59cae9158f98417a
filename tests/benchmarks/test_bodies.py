""" The bodies of benchmarks.bodies against the published ones' sizes. """
import pytest
import torch

import timm

from benchmarks import bodies  # noqa: F401, registers published_body


def create(body, mlp, **kwargs):
    return timm.create_model('published_body', body=body, mlp=mlp, **kwargs)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class TestPublishedSizes:
    """Parameters of the published models, made from the published files with their defaults."""

    def test_ait(self):
        memory = 2 * 32 * 32  # a parameter there, a buffer here
        unused = 65 * 768 + 768 + 58_368  # position embedding, class token, convolution
        assert num_parameters(create('ait', 'published')) == 15_784_426 - unused - memory

    def test_vit(self):
        assert num_parameters(create('vit', 'plain')) == 14_270_314


def test_the_ait_has_no_position_embedding_and_reads_all_tokens():
    model = create('ait', 'plain', dim=128)
    assert model.pos_embed is None and model.cls_token is None
    assert model.head[1].weight.shape == (10, 64 * 128)


def test_the_vit_reads_a_class_token_beside_large_positions():
    model = create('vit', 'plain', dim=128)
    assert model.pos_embed.shape == (1, 65, 128) and 0.9 < model.pos_embed.std() < 1.1
    assert model.head[1].weight.shape == (10, 128)


def test_patches_hold_their_pixels_row_by_row_channels_last():
    embed = create('ait', 'plain', dim=64).patch_embed
    embed.norm1 = embed.proj = embed.norm2 = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(embed(images)[:, 9], images[:, :, 4:8, 4:8].permute(0, 2, 3, 1).flatten(1))


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match='depth'):
        create('ait', 'plain', depth=3)
