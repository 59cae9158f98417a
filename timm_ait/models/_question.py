""" Models that take a question about each image. """
import copy
from functools import partial
from typing import Any, Dict, List, Optional, Union

import torch
import torch.nn as nn

from timm.models import checkpoint_seq, register_notrace_module
from timm.models.vision_transformer import VisionTransformer


@register_notrace_module  # symbolic tracing does not know the shape
class QuestionEmbed(nn.Module):
    """Linear embedding of a question vector, of width Q = `question_dim`, into a token, of width E = `embed_dim`."""

    def __init__(self, question_dim: int, embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.question_dim = question_dim
        self.proj = nn.Linear(question_dim, embed_dim, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """PyTorch's own rule, in place of timm's; called by `init_weights` of the model."""
        self.proj.reset_parameters()

    def forward(self, question: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1, E) of questions (B, Q), of any real dtype, about B images, in the dtype of these.

        Raises:
            ValueError: The question has another shape.
        """
        if question.ndim != 2 or question.shape[0] != images.shape[0] or question.shape[1] != self.question_dim:
            raise ValueError(
                f'question must have the shape ({images.shape[0]}, {self.question_dim}), one vector per image, got '
                f'{list(question.shape)}.')
        return self.proj(question.to(images.dtype)).unsqueeze(1)


class QuestionViT(VisionTransformer):
    """Mixin for models that take a question, which is added to the class token.

    `question` is a keyword argument of every forward. `create_model` with `question_dim` builds these models.
    """

    def __init__(self, *args, question_dim: int, **kwargs) -> None:
        """As the family's class, for questions of width Q = `question_dim`."""
        super().__init__(*args, **{**kwargs, 'class_token': True})
        self.question_embed = QuestionEmbed(
            question_dim, self.embed_dim, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        self.add_module('head', self._modules.pop('head'))  # last, as timm's `exclude_head` expects

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        """Create regex patterns for parameter grouping."""
        matcher = super().group_matcher(coarse)
        return {**matcher, 'stem': matcher['stem'] + '|question_embed'}

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
            *,
            question: torch.Tensor,
    ) -> torch.Tensor:
        """Features (B, N, E) after all blocks and the norm; arguments as `forward`."""
        asked = self.question_embed(question, x)
        x = self._pos_embed(self.patch_embed(x))
        x = torch.cat([x[:, :1] + asked, x[:, 1:]], dim=1)
        x = self.norm_pre(self.patch_drop(x))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
            *,
            question: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (B, num_classes) that answer a question (B, Q) about each image, x (B, C, H, W).

        Raises:
            ValueError: The question has another shape, or the model does not support masks.
        """
        return self.forward_head(self.forward_features(x, attn_mask, is_causal, question=question))

    def forward_intermediates(self, x: torch.Tensor, *args, question: torch.Tensor, **kwargs) -> Any:
        """As the family's class, with a question (B, Q)."""
        # a shallow copy with one class token per image, so that the model itself keeps no state of a call
        asking = copy.copy(self)
        cls_token = self.cls_token + self.question_embed(question, x)
        asking._parameters = {**self._parameters, 'cls_token': cls_token}
        return super(QuestionViT, asking).forward_intermediates(x, *args, **kwargs)

    def get_intermediate_layers(self, x: torch.Tensor, *args, question: torch.Tensor, **kwargs) -> List[Any]:
        """As `VisionTransformer`, with a question (B, Q)."""
        asking = copy.copy(self)
        asking.forward_intermediates = partial(self.forward_intermediates, question=question)
        return super(QuestionViT, asking).get_intermediate_layers(x, *args, **kwargs)
