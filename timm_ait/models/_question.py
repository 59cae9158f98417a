""" What the models share: questions about images, and how models of small images are configured and built. """
import copy
import inspect
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, Union

import torch

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer

from timm_ait.layers import QuestionEmbed
from timm_ait.layers._arguments import check_at_least
from timm_ait.weights import check_weights

__all__ = ['QuestionViT', 'build_vit', 'cifar_cfg', 'refuse_arguments', 'refuse_masks']


def cifar_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    """Pretrained cfg of a model for images of 32 px in 10 classes."""
    return {
        'url': url,
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': IMAGENET_INCEPTION_MEAN,
        'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


def build_vit(
        model_cls: Type[VisionTransformer],
        filter_fn: Callable,
        variant: str,
        pretrained: bool = False,
        **kwargs,
) -> VisionTransformer:
    """Build a registered model, of as few as one block, whose checkpoint filter refuses weights of other models."""
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=check_weights(filter_fn),
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', min(3, kwargs['depth'])), feature_cls='getter'),
        **kwargs,
    )


def refuse_arguments(args: Tuple[Any, ...], kwargs: Dict[str, Any], reason: str, **fixed) -> Dict[str, Any]:
    """Arguments of a ViT by name, without those that in a model have one value, the fixed one.

    Raises:
        ValueError: One of them is given another value.
    """
    kwargs = {**inspect.signature(VisionTransformer).bind_partial(*args).arguments, **kwargs}
    for name, value in fixed.items():
        given = kwargs.pop(name, value)
        if given != value and (given or value):  # None, 0 and False are all off
            raise ValueError(f'{name}={given!r} cannot be had: {reason}.')
    return kwargs


def refuse_masks(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Called by blocks without self-attention.

    Raises:
        ValueError: There is a mask.
    """
    # symbolic tracing has a proxy for each, which is not known to be set
    if isinstance(attn_mask, torch.Tensor) or (isinstance(is_causal, bool) and is_causal):
        raise ValueError('attn_mask and is_causal are of self-attention, which not every block of this model has.')


class QuestionViT(VisionTransformer):
    """timm's `VisionTransformer` that takes a question about each image, which is added to the class token.

    With `question_dim` the model has a class token. Without, it is the plain ViT and takes no question.
    """

    def __init__(self, *args, question_dim: int = 0, **kwargs) -> None:
        """
        Args:
            *args: As `VisionTransformer`.
            question_dim: Width Q of the question vector that `forward` takes; 0 for none.
            **kwargs: As `VisionTransformer`.

        Raises:
            ValueError: `question_dim` is out of its range.
        """
        check_at_least(0, question_dim=question_dim)
        if question_dim:
            kwargs['class_token'] = True
        super().__init__(*args, **kwargs)
        self.question_embed = QuestionEmbed(
            question_dim, self.embed_dim, device=kwargs.get('device'), dtype=kwargs.get('dtype'))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, which on an error leaves what it has loaded by then: here the model is as it was."""
        before = self.state_dict(keep_vars=True) if assign else copy.deepcopy(self.state_dict())
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except Exception:
            super().load_state_dict(before, assign=assign)
            raise

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        """Create regex patterns for parameter grouping."""
        matcher = super().group_matcher(coarse)
        return {**matcher, 'stem': matcher['stem'] + '|question_embed'}

    def _embed(self, x: torch.Tensor, question: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens (B, N, E) of images, the first of them with the question."""
        x = self._pos_embed(self.patch_embed(x))
        asked = self.question_embed(question, x.shape[0])
        if self.question_embed.proj is not None:
            assert asked is not None
            x = torch.cat([x[:, :1] + asked, x[:, 1:]], dim=1)
        return self.norm_pre(self.patch_drop(x))

    def _forward_blocks(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor],
            is_causal: bool,
            num_blocks: int,
            take_indices: Optional[List[int]] = None,
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Output of the first blocks for the tokens x (B, N, E), and that of each block that is to be taken."""
        taken: List[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < num_blocks:  # torchscript can neither slice the blocks nor leave their loop
                if attn_mask is not None or is_causal:
                    x = block(x, attn_mask=attn_mask, is_causal=is_causal)
                elif self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
                if take_indices is not None and i in take_indices:
                    taken.append(x)
        return x, taken

    def _num_blocks(self) -> int:
        return len(self.blocks)

    def _feature_size(self, index: int, height: int, width: int) -> Tuple[int, int]:
        """Size of the grid of features after a block, for images of a size."""
        return self.patch_embed.dynamic_feat_size((height, width))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
            question: Optional[torch.Tensor] = None,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """As `VisionTransformer`, with a question (B, Q) for models that take one."""
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(self._num_blocks(), indices)
        B, _, height, width = x.shape
        num_blocks = max_index + 1 if stop_early else self._num_blocks()
        x, taken = self._forward_blocks(self._embed(x, question), attn_mask, is_causal, num_blocks, take_indices)
        if norm:
            taken = [self.norm(y) for y in taken]
        prefix_tokens = [y[:, :self.num_prefix_tokens] for y in taken]
        intermediates = [y[:, self.num_prefix_tokens:] for y in taken]
        if output_fmt == 'NCHW':
            sizes = [self._feature_size(i, height, width) for i in sorted(set(take_indices))]
            intermediates = [
                y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y, (H, W) in zip(intermediates, sizes)]

        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {'image_intermediates': intermediates}
            if return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
            self,
            x: torch.Tensor,
            n: Union[int, List[int], Tuple[int]] = 1,
            reshape: bool = False,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            **kwargs,
    ) -> List[torch.Tensor]:
        """Intermediate layer outputs by the interface of DINO, see `forward_intermediates`."""
        return self.forward_intermediates(
            x, n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt='NCHW' if reshape else 'NLC',
            intermediates_only=True,
            **kwargs,
        )

    def forward_features(
            self,
            x: torch.Tensor,
            question: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Features (B, N, E) after all blocks and the norm; arguments as `forward`."""
        x, _ = self._forward_blocks(self._embed(x, question), attn_mask, is_causal, self._num_blocks())
        return self.norm(x)

    def forward(
            self,
            x: torch.Tensor,
            question: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Classify images, or answer questions about them.

        The question comes second here, as in every model of the package, and the mask, which is second in timm's ViT,
        by keyword.

        Args:
            x: Images (B, C, H, W).
            question: (B, Q), for models with questions.
            attn_mask: As `VisionTransformer`, for models with self-attention throughout.
            is_causal: As `VisionTransformer`, likewise.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError: The question is missing, misshapen or not wanted, or a mask is not.
        """
        return self.forward_head(self.forward_features(x, question, attn_mask, is_causal))
