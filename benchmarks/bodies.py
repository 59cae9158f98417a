""" published_body: the published AiT's body, the published ViT's, and two in between, each with any MLP. """
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn

from timm.layers import Mlp, PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block

from timm_ait.layers import WorkspaceMlp, published_workspace_mlp

default_cfgs = generate_default_cfgs({'published_body': dict(input_size=(3, 32, 32))})

HEAD_DIM = 64
DEPTH = 2
MLP_RATIO = 4


class PublishedPatchEmbed(nn.Module):
    """Patches, normed before and after the linear map; the pixels of a patch row by row, channels last."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        num_values = 3 * patch_size ** 2
        self.norm1 = nn.LayerNorm(num_values)
        self.proj = nn.Linear(num_values, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, N, E)."""
        patches = images.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return self.norm2(self.proj(self.norm1(patches)))


# what stands around the blocks, as arguments of `Transformer`
BODIES: Dict[str, Dict[str, Any]] = {
    'ait': dict(pool='flat'),
    'vit': dict(pool='cls', pos_std=1.),
    'timm': dict(pool='avg', pos_std=0.02),
    'ait_conv': dict(pool='flat', convolution=True),
}
# each makes the MLP of a block from its token width and hidden width
MLPS: Dict[str, Callable[[int, int], nn.Module]] = {
    'plain': Mlp,
    # with what a workspace adds to an MLP besides its memory
    'plain_norm': lambda dim, hidden_dim: nn.Sequential(Mlp(dim, hidden_dim), nn.LayerNorm(dim)),
    'published': published_workspace_mlp,
    'ours': WorkspaceMlp,
}


class Transformer(nn.Module):
    """Two pre-norm blocks with heads of 64, without dropout. A question, if there is one, is one more token."""

    def __init__(
            self,
            pool: str,
            pos_std: Optional[float] = None,
            convolution: bool = False,
            mlp: str = 'published',
            dim: int = 768,
            img_size: int = 32,
            patch_size: int = 4,
            num_classes: int = 10,
            question_dim: int = 0,
    ) -> None:
        """
        Args:
            pool: What the classifier reads: all tokens flattened ('flat'), a class token ('cls') or their mean ('avg').
            pos_std: Deviation that the position embedding is drawn with, None for no position embedding.
            convolution: Embed patches with timm's convolution, in place of the published norm, linear map and norm.
            mlp: MLP of the blocks, a name in `MLPS`.
            dim: Token width E, a multiple of 64.
            img_size: Height and width in pixels.
            patch_size: Height and width of a patch in pixels.
            num_classes: Number of classes.
            question_dim: Length of a question, 0 for none.
        """
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f'dim must be a multiple of {HEAD_DIM}, got {dim}')
        self.pool = pool
        if convolution:
            self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=dim)
        else:
            self.patch_embed = PublishedPatchEmbed(patch_size, dim)
        num_tokens = (img_size // patch_size) ** 2
        self.question_embed = None
        if question_dim:
            self.question_embed = nn.Sequential(
                nn.LayerNorm(question_dim), nn.Linear(question_dim, dim), nn.LayerNorm(dim))
            num_tokens += 1
        self.cls_token = None
        if pool == 'cls':
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
            num_tokens += 1
        self.pos_embed = None
        if pos_std is not None:
            self.pos_embed = nn.Parameter(pos_std * torch.randn(1, num_tokens, dim))
        self.blocks = nn.Sequential(*[
            Block(dim, dim // HEAD_DIM, mlp_ratio=MLP_RATIO, norm_layer=nn.LayerNorm) for _ in range(DEPTH)])
        for block in self.blocks:
            block.mlp = MLPS[mlp](dim, MLP_RATIO * dim)
        num_features = num_tokens * dim if pool == 'flat' else dim
        self.head = nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, num_classes))

    def forward(self, images: torch.Tensor, question: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Images (B, 3, H, W) and questions (B, Q) to logits (B, classes)."""
        x = self.patch_embed(images)
        if self.question_embed is not None:
            x = torch.cat([self.question_embed(question).unsqueeze(1), x], dim=1)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.blocks(x)
        if self.pool == 'flat':
            x = x.flatten(1)
        elif self.pool == 'cls':
            x = x[:, 0]
        else:
            x = x.mean(dim=1)
        return self.head(x)


@register_model
def published_body(pretrained: bool = False, body: str = 'ait', **kwargs) -> Transformer:
    """A body by its name, with other arguments of `Transformer`; by default the published AiT, without weights."""
    if pretrained:
        raise RuntimeError('published_body has no pretrained weights')
    for key in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'):
        kwargs.pop(key, None)
    return Transformer(**BODIES[body], **kwargs)
