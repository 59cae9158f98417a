""" The bodies of benchmarks.bodies against the published ones' sizes. """
import torch

import timm

from benchmarks import bodies  # noqa: F401, registers published_body


def create(body, mlp, **kwargs):
    return timm.create_model('published_body', body=body, mlp=mlp, **kwargs)


def test_parameters_are_as_many_as_in_the_published_models():
    """Those of the published files with their defaults: embeddings, tokens that the classifier reads, and all."""
    ait, vit = (
        sum(parameter.numel() for parameter in create(body, mlp).parameters())
        for body, mlp in (('ait', 'published'), ('vit', 'plain')))
    memory = 2 * 32 * 32  # a parameter there, a buffer here
    unused = 65 * 768 + 768 + 58_368  # position embedding, class token, convolution
    assert ait == 15_784_426 - unused - memory
    assert vit == 14_270_314


def test_positions_of_the_vit_begin_large():
    assert 0.9 < create('vit', 'plain', dim=128).pos_embed.std() < 1.1


def test_patches_hold_their_pixels_row_by_row_channels_last():
    embed = create('ait', 'plain', dim=64).patch_embed
    embed.norm1 = embed.proj = embed.norm2 = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(embed(images)[:, 9], images[:, :, 4:8, 4:8].permute(0, 2, 3, 1).flatten(1))
