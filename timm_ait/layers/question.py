""" A question about an image, as a token. """
from typing import Optional

import torch
import torch.nn as nn

from timm.models import register_notrace_function, register_notrace_module

__all__ = ['QuestionEmbed']


@torch.fx.wrap  # so that a traced graph refuses it too
@register_notrace_function
def refuse_question(question: Optional[torch.Tensor]) -> None:
    if question is not None:
        raise ValueError('This model takes no question: create it with question_dim=…, the width of yours.')


@register_notrace_module  # symbolic tracing cannot know whether there is a question
class QuestionEmbed(nn.Module):
    """Linear embedding of a question vector into a token.

    Every model of the package has one; with `question_dim=0` it has no parameters and takes no question.
    """

    def __init__(self, question_dim: int, embed_dim: int, device=None, dtype=None) -> None:
        """
        Args:
            question_dim: Width Q of the question vector, 0 for a model without questions.
            embed_dim: Token width E.
        """
        super().__init__()
        self.question_dim = question_dim
        self.proj = nn.Linear(question_dim, embed_dim, device=device, dtype=dtype) if question_dim else None

    def forward(self, question: Optional[torch.Tensor], batch_size: int) -> Optional[torch.Tensor]:
        """Embed one question per image.

        Args:
            question: (B, Q) of any real dtype, or None for a model without questions.
            batch_size: Number of images B.

        Returns:
            Question tokens (B, 1, E), or None for a model without questions.

        Raises:
            ValueError: The question is missing, misshapen, or not wanted.
        """
        if self.proj is None:
            refuse_question(question)
            return None
        if question is None:
            raise ValueError(
                f'This model answers questions: call it as model(x, question=…) with a tensor of shape '
                f'({batch_size}, {self.question_dim}).')
        if question.ndim != 2 or question.shape[0] != batch_size or question.shape[1] != self.question_dim:
            raise ValueError(
                f'question must have the shape ({batch_size}, {self.question_dim}), one vector per image, got '
                f'{list(question.shape)}.')
        return self.proj(question.to(self.proj.weight.dtype)).unsqueeze(1)
