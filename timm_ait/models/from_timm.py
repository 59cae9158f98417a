""" Any timm transformer as an Associative Transformer """
import dataclasses
import inspect
import re
import sys
from functools import partial
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, TypeVar, Union

import torch
import torch.nn as nn

from timm.layers import Mlp
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    get_model_input_config,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock

from timm_ait.layers import GlobalWorkspace, WorkspaceMlp
from timm_ait.layers._arguments import check_known, options, split_kwargs
from timm_ait.layers.advance import named_workspaces
from timm_ait.weights import check_weights

from ._builder import reject_masks
from .associative_transformer import AssociativeBlock

__all__ = ['add_workspace']

ModelT = TypeVar('ModelT', bound=nn.Module)

_WRAPPERS = ('OptimizedModule', 'DataParallel', 'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDP')
_BLOCK_MLP = re.compile(r'(^|\.)blocks(\.\d+)+\.mlp$')


def _end_in_workspace(self: nn.Module, inputs: Tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    # forward hook of an MLP; TorchScript compiles it as a method, which needs these names and types
    return self.workspace(output)


class _Unmasked:
    """Mixin for blocks that do not pass masks on to their MLP: training with one, or causal, raises an error."""

    def __call__(self, *args, **kwargs):
        if self.training:
            given = {**dict(zip(inspect.signature(self.forward).parameters, args)), **kwargs}
            reject_masks(
                given.get('attn_mask'), given.get('is_causal', False),
                'in training, masked tokens would be written (a Block with an Mlp keeps those of attn_mask out, '
                f'a {type(self).__name__.removeprefix("Unmasked")} with a {type(self.mlp).__name__} does not)')
        return super().__call__(*args, **kwargs)


class UnmaskedBlock(_Unmasked, Block): ...
class UnmaskedResPostBlock(_Unmasked, ResPostBlock): ...
class UnmaskedEvaBlock(_Unmasked, EvaBlock): ...
class UnmaskedEvaBlockPostNorm(_Unmasked, EvaBlockPostNorm): ...


_UNMASKED = {cls.__bases__[1]: cls for cls in _Unmasked.__subclasses__()}


def add_workspace(model: ModelT, blocks: Union[None, int, Sequence[int]] = None, **workspace_kwargs) -> ModelT:
    """Add gated global workspaces to the MLPs of a timm transformer, in place.

    While the gates are zero, as they start, the model computes exactly what it did before; fine-tuning opens them. Its
    state dict keeps its keys and gets new ones, `….mlp.workspace.*`. timm's training tasks add the balance loss; in
    your own training loop, add `timm_ait.balance_loss(model)`. Its gradient reaches the whole body from the first step;
    the criterion's passes a gate only once it is open.

    timm's `save_for_hf` and `push_to_hf_hub` write the result as architecture `ait_from_timm`, which `create_model`
    builds with its workspaces again.

    Call it before you compile the model or create the optimizer, which must hold the parameters of the workspaces.

    Args:
        model: Transformer with MLPs at `….blocks.<i>.mlp` whose last layer is a linear one named `fc2`, such as timm's
            ViT, DeiT, BEiT, EVA and Swin families. The workspaces get its device and dtype.
        blocks: Index or indices of the blocks that get a workspace, counted over all stages; negative ones count from
            the end. None for all.
        **workspace_kwargs: Arguments of `GlobalWorkspace` other than `dim`, `gated`, `device` and `dtype`.

    Returns:
        The same model.

    Raises:
        TypeError: An argument is unknown.
        ValueError: The model has no such MLPs or already has workspaces, or an argument is out of its range. After
            any error the model is unchanged.
    """
    if 'gated' in workspace_kwargs:
        raise TypeError('gated is not an argument of add_workspace: the workspaces that it adds are always gated.')
    check_known(workspace_kwargs, options(GlobalWorkspace), 'timm_ait.GlobalWorkspace')
    architecture = type(model).__name__
    for name, _ in named_workspaces(model):
        raise ValueError(f'{architecture} has a workspace already, {name}: give a model without workspaces.')
    for module in model.modules():
        is_traced = isinstance(module, torch.fx.GraphModule)
        if is_traced or module._compiled_call_impl or type(module).__name__.startswith(_WRAPPERS):
            raise ValueError(f'{architecture} is compiled, traced or distributed: add workspaces before that.')
    mlps = [(name, module) for name, module in model.named_modules() if _BLOCK_MLP.search(name)]
    if not mlps:
        raise ValueError(f'{architecture} has no MLPs of transformer blocks: none is named [….]blocks.<number>.mlp.')
    if blocks is not None:
        given, num_blocks = list(blocks) if isinstance(blocks, Iterable) else [blocks], len(mlps)
        numbers = range(-num_blocks, num_blocks)
        if not given or not all(i in numbers and 'bool' not in type(i).__name__ for i in given):
            raise ValueError(f'blocks must be block numbers from {-num_blocks} to {num_blocks - 1}, got {blocks!r}.')
        blocks = [int(i) for i in given]
        mlps = [mlps[i] for i in sorted({i % num_blocks for i in blocks})]
    added = []
    for name, mlp in mlps:
        last = getattr(mlp, 'fc2', None)
        if not isinstance(last, nn.Linear):
            found = 'none' if last is None else f'a {type(last).__module__}.{type(last).__name__}'
            raise ValueError(
                f'{name} of {architecture}, a {type(mlp).__name__}, is not supported: add_workspace looked for a last '
                f'linear layer named fc2 and found {found}. Select other blocks with blocks=.')
        block = model.get_submodule(name.rpartition('.')[0])
        if type(block) not in _UNMASKED and 'attn_mask' in inspect.signature(block.forward).parameters:
            raise ValueError(
                f'{name} is in a {type(block).__name__}, whose attn_mask is not supported: masked tokens would write.')
        workspace = GlobalWorkspace(
            last.out_features, gated=True, device=last.weight.device, dtype=last.weight.dtype, **workspace_kwargs)
        added.append((block, mlp, workspace))

    for block, mlp, workspace in added:
        mlp.workspace = workspace.train(mlp.training)
        if type(block) is Block and type(mlp) is Mlp:
            block.__class__, mlp.__class__ = AssociativeBlock, WorkspaceMlp
        else:
            block.__class__ = _UNMASKED.get(type(block), type(block))
            # unpickled, the handle reserves its id, so that a later hook does not replace this one
            mlp.workspace_hook = mlp.register_forward_hook(_end_in_workspace)

    pretrained_cfg = getattr(model, 'pretrained_cfg', None) or {}
    if 'architecture' in pretrained_cfg:
        arguments = dict(model=pretrained_cfg['architecture'], **workspace_kwargs)
        if blocks is not None:
            arguments['blocks'] = blocks
        model._model_args = {**getattr(model, '_model_args', {}), **arguments}
        # train.py takes the image size from here, not from what the model was built for
        input_size = get_model_input_config(model)['input_size']
        model.pretrained_cfg = model.default_cfg = {
            **pretrained_cfg, 'architecture': 'ait_from_timm', 'input_size': input_size}
    return model


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Apply the filter of the body, which timm has in the module of its class, and add fresh gated workspaces.

    A state dict with any workspace gets none, and so must have all of them.
    """
    filters = [getattr(sys.modules[cls.__module__], 'checkpoint_filter_fn', None) for cls in type(model).__mro__]
    filter_fn = next((f for f in filters if f not in (None, checkpoint_filter_fn)), None)
    if filter_fn is not None:
        state_dict = filter_fn(state_dict, model)
    if any('.workspace.' in key for key in state_dict):
        return state_dict
    fresh = {
        f'{name}.{key}': value.clone()
        for name, workspace in named_workspaces(model) if workspace.gated
        for key, value in workspace.state_dict().items()
    }
    return {**state_dict, **fresh}


# none of timm's defaults: whatever else a resolved cfg holds was given by an overlay
_NOTHING = dict.fromkeys(field.name for field in dataclasses.fields(PretrainedCfg))
default_cfgs = generate_default_cfgs({
    'ait_from_timm.untrained': {**_NOTHING, 'fixed_input_size': True, 'custom_load': False}})


@register_model
def ait_from_timm(
        pretrained: bool = False,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        model: str = '',
        blocks: Union[None, int, Sequence[int]] = None,
        **kwargs,
) -> nn.Module:
    """ Any timm transformer with gated workspaces, see `add_workspace`.

    Pretrained weights come from the given folder, repository or file, which may be without workspaces, or else from
    timm's weights for `model`.

    Args:
        model: Architecture of the transformer, with or without a tag: 'vit_tiny_patch16_224.augreg_in21k'.
        blocks: As `add_workspace`.
        **kwargs: Arguments of `add_workspace` and of the transformer.

    Raises:
        RuntimeError: The weights do not match the model.
        TypeError: An argument is unknown.
        ValueError: `model` is no architecture of timm that `add_workspace` supports, or an argument is out of range.
    """
    if not isinstance(model, str) or not is_model(model):
        raise ValueError(
            f"ait_from_timm needs model=, the name of an architecture of timm such as 'vit_tiny_patch16_224', "
            f'got {model!r}. To add workspaces to a model from elsewhere, use timm_ait.add_workspace.')
    workspace_kwargs, kwargs = split_kwargs(GlobalWorkspace, kwargs)

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        try:
            return create_model(model, pretrained, **kwargs)
        except TypeError as e:
            unknown = [name for name in kwargs if repr(name) in str(e)]
            if unknown == ['img_size'] and not getattr(get_pretrained_cfg(model), 'fixed_input_size', True):
                del kwargs['img_size']  # the body takes any size
                return create(pretrained, **kwargs)
            where = f'timm_ait.GlobalWorkspace) and, those of {model}, in help({model_entrypoint(model).__module__}'
            check_known(unknown, options(GlobalWorkspace), where)
            raise

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        # first with the original classifier: where timm adapts it, timm no longer checks the other weights
        num_classes = kwargs.pop('num_classes', None) if pretrained and 'global_pool' not in kwargs else None
        body = create(pretrained, **kwargs)
        if num_classes not in (None, body.num_classes):
            weights, body = body.state_dict(), create(num_classes=num_classes, **kwargs)
            shapes = {name: value.shape for name, value in body.state_dict().items()}
            fitting = {name: value for name, value in weights.items() if value.shape == shapes.get(name)}
            body.load_state_dict(fitting, strict=False)
        return add_workspace(body, blocks, **workspace_kwargs)

    if kwargs.get('features_only'):  # the maps of the body
        features = create(**{**kwargs, 'device': 'meta'})
        kwargs = {'out_indices': features.feature_info.out_indices, 'feature_cls': type(features), **kwargs}

    overlay, given, sources = pretrained_cfg_overlay or {}, {}, {'file', 'state_dict', 'url', 'hf_hub_id'}
    if isinstance(pretrained_cfg, str):
        get_pretrained_cfg(f'ait_from_timm.{pretrained_cfg}')  # raises an error for a tag, which belongs to `model`
    elif pretrained_cfg is not None:
        given = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg)
        defaults = [vars(get_pretrained_cfg('ait_from_timm'))] if given.get('tag') == 'untrained' else []
        if given is not pretrained_cfg:  # an object has all of timm's
            defaults.append(vars(PretrainedCfg()))
        pretrained_cfg = PretrainedCfg(**given)
        given = {
            key: value for key, value in given.items()
            if key != 'architecture' and value not in [default[key] for default in defaults]}
    is_saved = given.get('source') in ('local-dir', 'hf-hub')
    if not is_saved:
        overlay = {**given, **overlay}
        # a file has no config of its own: use the body's
        pretrained_cfg = dataclasses.replace(
            get_pretrained_cfg(model) or PretrainedCfg(),
            architecture='ait_from_timm', url=None, file=None, hf_hub_id=None, custom_load=False)
        if not any(map(overlay.get, sources)):
            build = partial(build, pretrained, pretrained_cfg_overlay=overlay, cache_dir=kwargs.get('cache_dir'))
            pretrained = False
            if not kwargs.get('features_only'):
                return build(**kwargs)
    built = build_model_with_cfg(
        build, 'ait_from_timm', pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=check_weights(checkpoint_filter_fn),
        feature_cfg=dict(flatten_sequential='hook' not in str(kwargs.get('feature_cls')).lower()),
        **kwargs,
    )
    built.pretrained_cfg['input_size'] = get_model_input_config(built)['input_size']
    return built
