""" Equations that models share, transcribed, and the comparison of a model with its own. """
import torch
import torch.nn.functional as F


def linear(layer, x):
    y = torch.einsum('...i,oi->...o', x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def layer_norm(layer, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * layer.weight + layer.bias


def attention(q, k, v, num_heads, scale=None, keep=None, sum_over=-1):
    """Softmax attention, one head at a time, to the largest scores alone or to all; weights sum to one over keys (-1)
    or queries (-2).
    """
    heads = []
    for q_j, k_j, v_j in zip(*(t.chunk(num_heads, -1) for t in (q, k, v))):
        scores = torch.einsum('bme,bne->bmn', q_j, k_j) * (scale or q_j.shape[-1] ** -0.5)
        weights = scores.exp()
        if keep is not None and keep < scores.shape[-1]:
            weights = weights * (scores >= scores.topk(keep).values[..., -1:])
        heads.append(torch.einsum('bmn,bne->bme', weights / weights.sum(sum_over, keepdim=True), v_j))
    return torch.cat(heads, -1)


def cross_attention(layer, x, y, num_heads, scale=None):
    k, v = linear(layer.kv, y).chunk(2, -1)
    return linear(layer.proj, attention(linear(layer.q, x), k, v, num_heads, scale))


def add_mlp(block, x):
    """The second half of a ViT's block."""
    h = linear(block.mlp.fc1, layer_norm(block.norm2, x))
    return x + linear(block.mlp.fc2, h * 0.5 * (1 + torch.erf(h / 2 ** 0.5)))


def vit_block(block, x, num_heads):
    q, k, v = linear(block.attn.qkv, layer_norm(block.norm1, x)).chunk(3, -1)
    return add_mlp(block, x + linear(block.attn.proj, attention(q, k, v, num_heads)))


def vit_tokens(model, x, question=None):
    """Patches with their position embeddings, after the class token with the question, which may have one too."""
    patches = F.unfold(x, model.patch_embed.patch_size, stride=model.patch_embed.patch_size).transpose(1, 2)
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    if model.no_embed_class:
        x = x + model.pos_embed
    if question is not None:
        x = torch.cat([model.cls_token + linear(model.question_embed.proj, question)[:, None], x], dim=1)
    return x if model.no_embed_class else x + model.pos_embed


def randomize(model):
    """The model in float64, for evaluation, with weights of which every one counts: no norm the identity, no bias zero.
    """
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_computes(reference, model, fused=True, unused=None):
    """Outputs within 1e-10, and gradients, none of which is zero but for parameters of unused layers."""
    model = randomize(model)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused
    x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64, requires_grad=True)
    asked = {}
    if hasattr(model, 'question_embed'):
        asked['question'] = torch.randn(2, model.question_embed.question_dim, dtype=torch.float64)
    actual, expected = model(x, **asked), reference(model, x, **asked)
    assert (actual - expected).abs().max() <= 1e-10
    inputs = [x, *(p for name, p in model.named_parameters() if unused is None or unused not in name)]
    seed = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad(output, inputs, seed) for output in (actual, expected)), strict=True):
        assert (a - e).abs().max() <= 1e-10 and a.abs().max() > 0
