""" A question about an image, as a token. """
import torch
import torch.nn as nn

from timm.models import register_notrace_module


@register_notrace_module  # symbolic tracing does not know the shape
class QuestionEmbed(nn.Module):
    """Linear embedding of a question vector, of width Q = `question_dim`, into a token, of width E = `embed_dim`."""

    def __init__(self, question_dim: int, embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.question_dim = question_dim
        self.proj = nn.Linear(question_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, question: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Tokens (B, 1, E) of questions (B, Q), of any real dtype, about a batch of B images.

        Raises:
            ValueError: The question has another shape.
        """
        if question.ndim != 2 or question.shape[0] != batch_size or question.shape[1] != self.question_dim:
            raise ValueError(
                f'question must have the shape ({batch_size}, {self.question_dim}), one vector per image, got '
                f'{list(question.shape)}.')
        return self.proj(question.to(self.proj.weight.dtype)).unsqueeze(1)
