""" Write a checkpoint in Hub layout: python -m timm_ait export CHECKPOINT|MODEL --out FOLDER. """
import argparse
import contextlib
import importlib.util
import json
import os
import pickle
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, infer_imagenet_subset
from timm.models import create_model, get_model_input_config, load_checkpoint, resolve_model_input_args, save_for_hf
from timm.utils import ParseKwargs
from timm.utils.onnx import onnx_export

from timm_ait.layers.advance import named_workspaces

from . import blame, integer, output_folder, quietly, staged

# entries of a pretrained config that describe its task
_TASK = ('label_names', 'label_descriptions', 'tag', 'license', 'description', 'origin_url', 'notes')

# train.py's arguments that say how its images are read for evaluation
_PREPROCESSING = ('input_size', 'img_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


@torch.no_grad()
def export(
        model: nn.Module,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        fine_tuned: bool = True,
        onnx: bool = False,
) -> Dict[str, Any]:
    """Write config.json, whose contents are returned, and model.safetensors, as timm and transformers load them.

    Args:
        model: A timm model with its weights. It is converted to `dtype` in place.
        label_names: Names of the classes, by default those of the pretrained config unless `fine_tuned`.
        data_config: Preprocessing that differs from the pretrained config, as in `timm.models.save_for_hf`.
        fine_tuned: The model was trained further or from scratch, so that class names and tag of its pretrained config
            no longer apply. They are left out, and the license, which is yours to state.
        onnx: Also write model.onnx, in float32 for any batch size, from `image` (B, C, H, W) to `logits`
            (B, num_classes). If onnxruntime is installed, its logits are compared with the model's.

    Raises:
        ValueError: Some weights are not finite in this precision, the preprocessing does not fit the model, or the
            folder holds an ONNX file of other weights. Nothing is written.
    """
    if not onnx and (folder / 'model.onnx').exists():
        raise ValueError('its model.onnx would no longer match the new weights: write both (--onnx), or move it')
    for _, workspace in named_workspaces(model):  # averaged weights hold an averaged memory
        workspace.memory.copy_(workspace.stored_memory())
    model = model.to(dtype)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} has values that are not finite in {dtype}')

    with staged(folder) as staging:
        save_for_hf(model, staging, safe_serialization=True, data_config=data_config)
        config_file = staging / 'config.json'
        config = _complete(json.loads(config_file.read_text()), label_names, fine_tuned)
        config_file.write_text(json.dumps(config, indent=2))
        shutil.copymode(config_file, staging / 'model.safetensors')  # safetensors makes its file private
        if onnx:
            onnx_export(
                model.float(), str(staging / 'model.onnx'), batch_size=2,
                input_size=get_model_input_config(model)['input_size'], use_dynamo=True, input_names=['image'],
                output_names=['logits'], check_forward=importlib.util.find_spec('onnxruntime') is not None)
    return config


def _complete(config: Dict[str, Any], label_names: Optional[Sequence[str]], fine_tuned: bool) -> Dict[str, Any]:
    """timm's config.json with the class names, and with what transformers reads: names and dtype at the top level."""
    pretrained_cfg = config['pretrained_cfg']
    if fine_tuned:
        for key in _TASK:
            pretrained_cfg.pop(key, None)
    own_names = pretrained_cfg.pop('label_names', None)
    if label_names is not None:
        pretrained_cfg.pop('label_descriptions', None)
    elif own_names is not None:
        label_names = own_names
    elif fine_tuned and infer_imagenet_subset(config):
        # by their number, timm and transformers would take the classes for ImageNet's
        label_names = [str(index) for index in range(config['num_classes'])]
    # also at the top level, and transformers would pass both to the model
    config.get('model_args', {}).pop('num_classes', None)
    return {
        'architecture': config.pop('architecture'),
        'num_classes': config.pop('num_classes'),
        **({} if label_names is None else {'label_names': label_names}),
        'dtype': 'float32',  # else transformers trains a half-precision file in half precision, where AdamW diverges
        **config,
    }


def _assignment(text: str) -> str:
    """Type of an argument: KEY=VALUE, or nothing."""
    if text and '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    return text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'export',
        help='write a checkpoint of train.py, or a pretrained model, in Hub layout and as ONNX',
        description='Write config.json and model.safetensors, as timm (local-dir:, hf-hub:) and transformers load '
                    'them, from a checkpoint of train.py or of a pretrained model. Other files in the folder stay. A '
                    'checkpoint of train.py holds the arguments of its training: they are the defaults of --model, '
                    '--num-classes, --model-kwargs and --data-dir, and say how images are preprocessed.',
    )
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT',
                        help='checkpoint of train.py, folder in Hub layout, or name of a pretrained model, which keeps '
                             'its class names, tag and license')
    parser.add_argument('--out', required=True, type=output_folder, metavar='FOLDER', help='folder to write to')
    parser.add_argument('--model', metavar='NAME', help='model that was trained')
    parser.add_argument('--num-classes', type=integer(0), metavar='N', help='number of classes')
    parser.add_argument('--model-kwargs', nargs='*', type=_assignment, action=ParseKwargs, metavar='KEY=VALUE',
                        help='further arguments of the model, as given to train.py')
    parser.add_argument('--data-dir', type=Path, metavar='FOLDER',
                        help='data set that was trained on: its class folders are the names of the classes')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'),
                        help='precision on disk (default: %(default)s)')
    parser.add_argument('--no-ema', action='store_true', help='use the last weights even if there are averaged ones')
    parser.add_argument('--onnx', action='store_true',
                        help='also write model.onnx, in float32, for models of images; needs onnx and onnxscript')
    parser.set_defaults(main=lambda args: quietly(_main, parser, args))


def _main(args: argparse.Namespace) -> int:
    if args.checkpoint.name == 'model.safetensors' and args.checkpoint.with_name('config.json').is_file():
        args.checkpoint = args.checkpoint.parent
    fine_tuned = args.checkpoint.is_file()
    model, trained = _load_trained(args) if fine_tuned else (_load_pretrained(args), {})
    if args.onnx and hasattr(model, 'question_embed'):
        raise ValueError(f'--onnx is for image models, {args.checkpoint} answers questions about images')

    names, data_dir = None, args.data_dir
    trained_on = trained.get('data_dir') or trained.get('data') or ''
    if not data_dir and not trained.get('dataset') and os.path.isdir(trained_on):
        data_dir = trained_on
    if data_dir:
        # a folder that the checkpoint names may have changed
        with blame(f'--data-dir {data_dir}') if args.data_dir else contextlib.suppress(Exception):
            if not os.path.exists(data_dir):
                raise ValueError('it does not exist')
            split, class_map = trained.get('train_split') or 'train', trained.get('class_map') or ''
            data = create_dataset(trained.get('dataset') or '', str(data_dir), split, class_map=class_map)
            indices = getattr(data, 'reader', data).class_to_idx
            if len(indices) != model.num_classes:
                raise ValueError(f'there are names for {len(indices)} classes, the model has {model.num_classes}')
            names = sorted(indices, key=indices.get)
    data_config = {key: trained[key] for key in _PREPROCESSING if trained.get(key)}
    with blame(f'--out {args.out}, nothing was written'):
        config = export(model, args.out, getattr(torch, args.dtype), names, data_config, fine_tuned, args.onnx)

    num_classes, input_size = config['num_classes'], config['pretrained_cfg']['input_size']
    names = config.get('label_names') or ()
    shown = textwrap.shorten(', '.join(names.values() if isinstance(names, dict) else names), 60, placeholder=' …')
    if not names:
        shown = "ImageNet's" if infer_imagenet_subset(config) else 'without names; --data-dir gives them'
    print(f'{args.out}: {config["architecture"]} in {args.dtype}' + (', model.onnx in float32' if args.onnx else ''))
    print(f'classes: {num_classes} ({shown})')
    print('input: ' + ' x '.join(map(str, input_size)))
    if num_classes > 1 and input_size[0] in (1, 3) and not hasattr(model, 'question_embed'):
        print(f'try: python -m timm_ait predict IMAGE --model {shlex.quote(f"local-dir:{args.out.as_posix()}")}')
    return 0


def _load_trained(args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any]]:
    """Model with the weights of a training, and the arguments of train.py as far as its checkpoint has them."""
    with blame(f'CHECKPOINT {args.checkpoint} cannot be read'):
        trained = _training_args(args.checkpoint)
    name = args.model or trained.get('model')
    if not name:
        raise ValueError(f'--model is needed: {args.checkpoint} does not contain the name of its model')
    arguments = {
        'num_classes': trained.get('num_classes') if args.num_classes is None else args.num_classes,
        'in_chans': trained['input_size'][0] if trained.get('input_size') else trained.get('in_chans'),
        'global_pool': trained.get('gp'),
        'pretrained_cfg_overlay': trained.get('pretrained_cfg_overlay') or None,
        **((trained.get('model_kwargs') or {}) if args.model_kwargs is None else args.model_kwargs),
    }
    with blame(f'--model {name}, --num-classes and --model-kwargs, together {arguments}'):
        size = None if 'img_size' in arguments else trained.get('img_size') or (trained.get('input_size') or [])[1:]
        model = create_model(**resolve_model_input_args(name, {'img_size': size or None}, **arguments))
    with blame(f'CHECKPOINT {args.checkpoint} is not a complete checkpoint of {name}'):
        load_checkpoint(model, args.checkpoint, use_ema=not args.no_ema)
    return model, trained


def _training_args(file: Path) -> Dict[str, Any]:
    """Arguments of train.py, or of a program like it, in its checkpoint; empty for other files of weights."""
    if file.suffix == '.safetensors':
        return {}
    try:
        # a pickle: torch's weights-only reader, also timm's default, runs no code in it
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location='meta', weights_only=True)
    except (EOFError, LookupError, pickle.UnpicklingError) as e:  # text is read as a pickle, too
        raise ValueError('it is not a checkpoint, or it holds more than weights and could run code') from e
    args = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    args = dict(vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {})
    if isinstance(args.get('input_size'), int):  # as in the programs of DeiT and MAE, which fix what else timm asks for
        size = args['img_size'] = args.pop('input_size')
        args = {
            'dataset': 'torch/image_folder', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
            'crop_pct': args.get('eval_crop_ratio', 0.875 if size <= 224 else 1.) if size > 32 else 1., **args}
    return args


def _load_pretrained(args: argparse.Namespace) -> nn.Module:
    """Pretrained model, by its name or from a folder in Hub layout."""
    given = {'model': args.model, 'num-classes': args.num_classes, 'no-ema': args.no_ema or None,
             'model-kwargs num_classes': (args.model_kwargs or {}).get('num_classes')}
    for option, value in given.items():
        if value is not None:
            raise ValueError(f'--{option} is for checkpoints of train.py, not {args.checkpoint}')
    is_folder = (args.checkpoint / 'config.json').is_file()
    problem = 'cannot be loaded' if is_folder else 'is no file, folder in Hub layout or pretrained model'
    with blame(f'CHECKPOINT {args.checkpoint} {problem}'):
        name = f'local-dir:{args.checkpoint}' if is_folder else args.checkpoint.as_posix()
        return create_model(name, pretrained=True, **(args.model_kwargs or {}))
