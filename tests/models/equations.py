""" Comparison of a model with its equations, transcribed. """
from functools import partial

import torch
import torch.nn.functional as F


def randomize(model, scale=0.1, fused=True):
    """The model in float64, for evaluation, with weights of which every one counts: no norm the identity, no bias zero.
    """
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    return model


class Equations:
    """What the transcriptions of models of sets share, over the parameters of a model."""

    def __init__(self, model, num_heads):
        self.tokens = partial(vit_tokens, model)
        self.p = dict(model.named_parameters())
        self.num_heads = num_heads

    def linear(self, name, x):
        return torch.einsum('bnd,ed->bne', x, self.p[f'{name}.weight']) + self.p[f'{name}.bias']

    def layer_norm(self, name, x, eps=1e-6):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * self.p[f'{name}.weight'] + self.p[f'{name}.bias']


def vit_tokens(model, x, question=None):
    """Patches with their position embeddings, after the class token with the question, which may have one too."""
    patches = F.unfold(x, model.patch_embed.patch_size, stride=model.patch_embed.patch_size).transpose(1, 2)
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    if model.no_embed_class:
        x = x + model.pos_embed
    if question is not None:
        embed = model.question_embed.proj
        asked = model.cls_token + torch.einsum('bi,oi->bo', question, embed.weight)[:, None] + embed.bias
        x = torch.cat([asked, x], dim=1)
    return x if model.no_embed_class else x + model.pos_embed


def assert_same(actual, expected, inputs):
    """Values within 1e-10, and gradients to the inputs, none of which is zero."""
    assert (actual - expected).abs().max() <= 1e-10
    seed = torch.randn_like(actual)
    actual_grads = torch.autograd.grad(actual, inputs, seed)
    expected_grads = torch.autograd.grad(expected, inputs, seed)
    assert all((a - e).abs().max() <= 1e-10 for a, e in zip(actual_grads, expected_grads, strict=True))
    assert all(a.abs().max() > 0 for a in actual_grads)
