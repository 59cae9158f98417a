""" Write a checkpoint in Hub layout: python -m timm_ait export CHECKPOINT|MODEL --out FOLDER. """
import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn

from timm.data import create_dataset, infer_imagenet_subset, resolve_model_data_config
from timm.data.readers.class_map import load_class_map
from timm.models import create_model, load_checkpoint, save_for_hf
from timm.utils import ParseKwargs

from timm_ait.layers import GlobalWorkspace

from . import integer, nearest_folder, one_line, output_folder, quietly
from .images import answers_questions

__all__ = ['add_parser', 'export', 'write_onnx']

# entries of a pretrained config that describe its task
_TASK = ('label_names', 'label_descriptions', 'tag', 'license', 'description', 'origin_url', 'notes')

# train.py's arguments that say how its images are read for evaluation
_PREPROCESSING = ('input_size', 'img_size', 'mean', 'std', 'interpolation', 'crop_pct')


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
    """Write config.json and model.safetensors of a model into a folder, as timm and transformers load them.

    Other files in the folder stay. Both libraries load the weights in float32 unless told otherwise.

    Args:
        model: A timm model with its weights. It is converted to `dtype` in place.
        folder: Checkpoint folder, created if it does not exist.
        dtype: Precision on disk.
        label_names: Names of the classes, by default those of the pretrained config unless `fine_tuned`.
        data_config: Preprocessing that differs from the pretrained config, as in `timm.models.save_for_hf`.
        fine_tuned: The model was trained further or from scratch, so that class names, tag and license of its
            pretrained config no longer apply and are left out.
        onnx: Also write model.onnx, see `write_onnx`.

    Returns:
        The contents of config.json.

    Raises:
        ValueError: Some weights are not finite in this precision, or the preprocessing does not fit the model. Nothing
            is written.
    """
    for module in model.modules():
        if isinstance(module, GlobalWorkspace):  # averaged weights hold an averaged memory
            module.memory.copy_(module.stored_memory())
    model = model.to(dtype)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} has values that are not finite in {dtype}')

    # written to a temporary folder first, so that an interruption leaves no half-written files
    with tempfile.TemporaryDirectory(dir=nearest_folder(folder)) as staging:
        save_for_hf(model, staging, safe_serialization=True, data_config=data_config)
        config_file = Path(staging, 'config.json')
        config = _complete(json.loads(config_file.read_text()), label_names, fine_tuned)
        config_file.write_text(json.dumps(config, indent=2))
        shutil.copymode(config_file, Path(staging, 'model.safetensors'))  # safetensors makes its file private
        if onnx:
            write_onnx(model, Path(staging, 'model.onnx'))
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)
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
        # from their number alone, timm and transformers would take the classes for ImageNet's
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


def write_onnx(model: nn.Module, file: Path) -> None:
    """Write an image model in evaluation mode and float32 as ONNX, for any batch size.

    Its input is `image` (B, C, H, W), its output `logits` (B, num_classes). If onnxruntime is installed, its logits are
    compared with the model's.

    Args:
        model: Image classifier. It is converted to float32 in place.
        file: File to write.

    Raises:
        AssertionError: onnxruntime computes other logits.
        Exception: Any error of `torch.onnx.export`.
    """
    model = model.float().eval()
    images = torch.randn(3, *resolve_model_data_config(model)['input_size'])
    torch.onnx.export(
        model,
        (images[:2],),
        str(file),
        dynamo=True,
        external_data=False,
        input_names=['image'],
        output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        verbose=False,
    )
    if importlib.util.find_spec('onnxruntime'):  # else the file is not compared with the model
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        for batch in (images, images[:1]):
            logits = torch.from_numpy(session.run(['logits'], {'image': batch.numpy()})[0])
            torch.testing.assert_close(logits, model(batch), rtol=1e-3, atol=1e-4)


def _training_args(file: Path) -> Dict[str, Any]:
    """Arguments of train.py in its checkpoint; empty for other files of weights."""
    if file.suffix == '.safetensors':
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(file, map_location='meta', weights_only=True)
    args = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def _in_hub_layout(checkpoint: Path) -> Optional[Path]:
    """The checkpoint itself or its folder, if in Hub layout; else None."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    is_weights = checkpoint.is_dir() or checkpoint.name == 'model.safetensors'
    return folder if is_weights and (folder / 'config.json').is_file() else None


def _class_names(class_to_idx: Dict[Any, int], num_classes: int) -> List[str]:
    """Names by index from timm's class map."""
    names = {index: str(name) for name, index in class_to_idx.items() if name != ''}
    if len(names) != num_classes:
        raise ValueError(f'there are names for {len(names)} classes, the model has {num_classes}')
    if names.keys() != set(range(num_classes)):
        raise ValueError(f'the names must be of the classes 0 to {num_classes - 1}')
    return [names[index] for index in range(num_classes)]


class _ParseKwargs(ParseKwargs):

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value and '=' not in value:
                raise argparse.ArgumentError(self, f'{value!r} is not KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'export',
        help='write a checkpoint of train.py, or a pretrained model, in Hub layout and as ONNX',
        description='Write config.json and model.safetensors, as timm (local-dir:, hf-hub:) and transformers load '
                    'them, from a checkpoint of train.py or of a pretrained model. Other files in the folder stay. A '
                    'checkpoint of train.py holds the arguments of its training: they are the defaults of --model, '
                    '--num-classes, --model-kwargs and --data-dir, and say how images are preprocessed.',
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='checkpoint of train.py, folder in Hub layout, or name of a pretrained model, which keeps '
                             'its class names, tag and license')
    parser.add_argument('--out', required=True, type=output_folder, metavar='FOLDER', help='folder to write to')
    parser.add_argument('--model', metavar='NAME', help='model that was trained')
    parser.add_argument('--num-classes', type=integer(0), metavar='N', help='number of classes')
    parser.add_argument('--model-kwargs', nargs='*', action=_ParseKwargs, metavar='KEY=VALUE',
                        help='further arguments of the model, as given to train.py')
    names = parser.add_mutually_exclusive_group()
    names.add_argument('--class-map', type=Path, metavar='FILE',
                       help="names of the classes, in timm's format: a .txt file with a name in each line, or a .pkl")
    names.add_argument('--data-dir', type=Path, metavar='FOLDER',
                       help='data set that was trained on: its class folders are the names of the classes')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'),
                        help='precision on disk (default: %(default)s)')
    parser.add_argument('--no-ema', action='store_true', help='use the last weights even if there are averaged ones')
    parser.add_argument('--onnx', action='store_true',
                        help='also write model.onnx, in float32, for images alone; needs the packages onnx and '
                             'onnxscript')
    parser.set_defaults(main=functools.partial(quietly, _main, parser))


@contextlib.contextmanager
def _blame(parser: argparse.ArgumentParser, argument: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # readers of files and models raise many kinds of errors
        parser.error(f'{argument}: {one_line(e)}')


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.data_dir and not args.data_dir.is_dir():
        parser.error(f'--data-dir: there is no folder {args.data_dir}')
    missing = [name for name in ('onnx', 'onnxscript') if args.onnx and not importlib.util.find_spec(name)]
    if missing:
        parser.error(f'--onnx needs other packages: pip install {" ".join(missing)}')

    checkpoint = Path(args.checkpoint)
    fine_tuned = checkpoint.is_file() and not _in_hub_layout(checkpoint)
    trained = {}
    if fine_tuned:
        with _blame(parser, f'CHECKPOINT {checkpoint} cannot be read'):
            trained = _training_args(checkpoint)
        model = _load_trained(parser, args, trained)
    else:
        model = _load_pretrained(parser, args)
    if args.onnx and answers_questions(model):
        parser.error(f'--onnx is for image models, {checkpoint} answers questions about images')

    names, data_dir = None, args.data_dir or _data_dir(trained)
    if args.class_map:
        with _blame(parser, f'--class-map {args.class_map}'):
            names = _class_names(load_class_map(str(args.class_map)), model.num_classes)
    elif data_dir:
        with _blame(parser, f'--data-dir {data_dir}'):
            dataset = create_dataset(
                '', str(data_dir), trained.get('train_split') or 'train', class_map=trained.get('class_map') or '')
            names = _class_names(dataset.reader.class_to_idx, model.num_classes)
    data_config = {key: trained[key] for key in _PREPROCESSING if trained.get(key)}
    with _blame(parser, f'--out {args.out}, nothing was written'):
        config = export(model, args.out, getattr(torch, args.dtype), names, data_config, fine_tuned, args.onnx)
    _report(model, config, args)
    return 0


def _load_trained(parser: argparse.ArgumentParser, args: argparse.Namespace, trained: Dict[str, Any]) -> nn.Module:
    """Model with the weights of a training."""
    name = args.model or trained.get('model')
    if not name:
        parser.error(f'--model is needed: {args.checkpoint} does not contain the name of its model')
    arguments = {
        'num_classes': trained.get('num_classes') if args.num_classes is None else args.num_classes,
        'in_chans': trained['input_size'][0] if trained.get('input_size') else trained.get('in_chans'),
        'global_pool': trained.get('gp'),
        **((trained.get('model_kwargs') or {}) if args.model_kwargs is None else args.model_kwargs),
    }
    given = ' '.join(f'{key}={value}' for key, value in arguments.items() if value is not None)
    with _blame(parser, f'--model {name}, --num-classes and --model-kwargs ({given or "none"})'):
        model = create_model(name, **arguments)
    with _blame(parser, f'CHECKPOINT {args.checkpoint} is not a complete checkpoint of {name}'):
        # a pickle: torch's reader of tensors alone runs no code in it
        load_checkpoint(model, args.checkpoint, use_ema=not args.no_ema, weights_only=True)
    return model


def _load_pretrained(parser: argparse.ArgumentParser, args: argparse.Namespace) -> nn.Module:
    """Pretrained model, by its name or from a folder in Hub layout."""
    folder = _in_hub_layout(Path(args.checkpoint))
    problem = 'cannot be loaded' if folder else 'is no file, folder in Hub layout or pretrained model'
    with _blame(parser, f'CHECKPOINT {args.checkpoint} {problem}'):
        model = create_model(
            f'local-dir:{folder}' if folder else args.checkpoint, pretrained=True, **(args.model_kwargs or {}))
    architecture = model.pretrained_cfg['architecture']
    if args.model and args.model.partition('.')[0] != architecture:
        parser.error(f'--model {args.model}: {args.checkpoint} is of {architecture}')
    if args.num_classes not in (None, model.num_classes):
        parser.error(f'--num-classes {args.num_classes}: {args.checkpoint} has {model.num_classes} classes')
    if args.no_ema:
        parser.error(f'--no-ema is for checkpoints of train.py, {args.checkpoint} has one set of weights')
    return model


def _data_dir(trained: Dict[str, Any]) -> Optional[Path]:
    """Folder of images that was trained on, if it still exists."""
    folder = trained.get('data_dir') or trained.get('data')
    return Path(folder) if folder and os.path.isdir(folder) and not trained.get('dataset') else None


def _report(model: nn.Module, config: Dict[str, Any], args: argparse.Namespace) -> None:
    """Print what was written, and a command to try it."""
    names, num_classes = config.get('label_names'), config['num_classes']
    if names is not None:
        names = list(names.values() if isinstance(names, dict) else names)
        shown = ', '.join(names[:5]) + (', …' if len(names) > 5 else '')
    elif infer_imagenet_subset(config):
        shown = "ImageNet's"
    else:
        shown = 'without names; --class-map or --data-dir gives them'
    channels, height, width = config['pretrained_cfg']['input_size']
    print(f'{args.out}: {config["architecture"]} in {args.dtype}' + (', model.onnx in float32' if args.onnx else ''))
    print(f'classes: {num_classes} ({shown})')
    print(f'input: {channels} x {height} x {width}')
    if num_classes > 0 and channels in (1, 3) and not answers_questions(model):
        print(f'try: python -m timm_ait predict IMAGE --model {shlex.quote(f"local-dir:{args.out}")}')
