""" Turn a train.py checkpoint into Hub layout: python -m timm_ait export CHECKPOINT --model NAME --out FOLDER. """
import argparse
import contextlib
import functools
import importlib.util
import json
import os
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

from . import integer, nearest_folder, one_line, output_folder

__all__ = ['add_parser', 'export', 'write_onnx']


@torch.no_grad()
def export(
        model: nn.Module,
        folder: Path,
        dtype: torch.dtype = torch.float16,
        label_names: Optional[Sequence[str]] = None,
        onnx: bool = False,
) -> None:
    """Write config.json and model.safetensors of a model into a folder, as timm and transformers load them.

    Other files in the folder stay.

    Args:
        model: A timm model with its weights. Its floating point tensors are converted in place.
        folder: Checkpoint folder, made if it does not exist.
        dtype: Precision on disk. timm loads it into the precision of the model.
        label_names: Names of the classes. Without them the config has none: those of the weights that training started
            from are not the names of these classes.
        onnx: Also write model.onnx, see `write_onnx`.

    Raises:
        ValueError: The weights are not finite in this precision. Nothing is written.
    """
    for module in model.modules():
        if isinstance(module, GlobalWorkspace):  # averaged weights hold an averaged memory
            module.memory.copy_(module.stored_memory())
    model = model.to(dtype)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{name} has values that are not finite in {dtype}')

    # written beside, then moved, so that an interruption leaves no half file
    with tempfile.TemporaryDirectory(dir=nearest_folder(folder)) as staging:
        save_for_hf(model, staging, safe_serialization=True)
        config_file = Path(staging, 'config.json')
        config_file.write_text(json.dumps(_with_names(json.loads(config_file.read_text()), label_names), indent=2))
        shutil.copymode(config_file, Path(staging, 'model.safetensors'))  # safetensors makes its file private
        if onnx:
            write_onnx(model, Path(staging, 'model.onnx'))
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)


def _with_names(config: Dict[str, Any], label_names: Optional[Sequence[str]]) -> Dict[str, Any]:
    """timm's config of a checkpoint with these class names and no others, in a form that transformers reads too."""
    for key in ('label_names', 'label_descriptions'):
        config['pretrained_cfg'].pop(key, None)
    if label_names is None and infer_imagenet_subset(config):
        # from their number alone, timm and transformers would take the classes for ImageNet's
        label_names = [str(index) for index in range(config['num_classes'])]
    # it stands at the top too, and transformers passes both to the model
    config.get('model_args', {}).pop('num_classes', None)
    names = {} if label_names is None else {'label_names': list(label_names)}
    return {'architecture': config.pop('architecture'), 'num_classes': config.pop('num_classes'), **names, **config}


def write_onnx(model: nn.Module, file: Path) -> None:
    """Write an image model in evaluation mode and float32 as ONNX, with any batch size.

    Its input is `image` (B, C, H, W), its output `logits` (B, num_classes). Where onnxruntime is installed, it must
    compute what the model does.

    Args:
        model: Image classifier. It is converted to float32 in place.
        file: File to write.

    Raises:
        RuntimeError: onnxruntime computes other logits.
        Exception: Whatever torch raises if it cannot export the model.
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
    if importlib.util.find_spec('onnxruntime'):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        for batch in (images, images[:1]):
            logits = torch.from_numpy(session.run(['logits'], {'image': batch.numpy()})[0])
            torch.testing.assert_close(logits, model(batch), rtol=1e-3, atol=1e-4)


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
        help='turn a train.py checkpoint into Hub layout',
        description='Write config.json and model.safetensors, as local-dir: and hf-hub: load them, and as transformers '
                    'does, from a checkpoint of train.py. Other files in the folder stay.',
    )
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='checkpoint of train.py')
    parser.add_argument('--model', required=True, metavar='NAME', help='model that was trained')
    parser.add_argument('--out', required=True, type=output_folder, metavar='FOLDER', help='folder to write to')
    parser.add_argument('--num-classes', type=integer(0), metavar='N', help="number of classes, if not the model's own")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=_ParseKwargs, metavar='KEY=VALUE',
                        help='further arguments of the model, as given to train.py')
    names = parser.add_mutually_exclusive_group()
    names.add_argument('--class-map', type=Path, metavar='FILE',
                       help="names of the classes, in timm's format: a .txt file with a name in each line, or a .pkl")
    names.add_argument('--data-dir', type=Path, metavar='FOLDER',
                       help='data set that was trained on: its class folders are the names of the classes')
    parser.add_argument('--dtype', default='float16', choices=('float16', 'bfloat16', 'float32'),
                        help='precision on disk (default: %(default)s)')
    parser.add_argument('--no-ema', action='store_true', help='take the last weights where there are averaged ones')
    parser.add_argument('--onnx', action='store_true',
                        help='also write model.onnx, in float32, for images alone; needs the packages onnx and '
                             'onnxscript')
    parser.set_defaults(main=functools.partial(_main, parser))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:

    @contextlib.contextmanager
    def blame(argument: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # readers of files and models raise nearly anything
            parser.error(f'{argument}: {one_line(e)}')

    if not args.checkpoint.is_file():
        parser.error(f'CHECKPOINT: there is no file {args.checkpoint}')
    if args.data_dir and not args.data_dir.is_dir():
        parser.error(f'--data-dir: there is no folder {args.data_dir}')
    missing = [name for name in ('onnx', 'onnxscript') if args.onnx and not importlib.util.find_spec(name)]
    if missing:
        parser.error(f'--onnx needs other packages: pip install {" ".join(missing)}')

    arguments = {'num_classes': args.num_classes, **args.model_kwargs}
    with blame(f'--model {args.model} --num-classes {args.num_classes} --model-kwargs {args.model_kwargs}'):
        model = create_model(args.model, **arguments)
    if args.onnx and any('question_embed.' in key for key in model.state_dict()):
        parser.error(f'--onnx is for image models, {args.model} answers questions about images')
    names = None
    if args.class_map:
        with blame(f'--class-map {args.class_map}'):
            names = _class_names(load_class_map(str(args.class_map)), model.num_classes)
    elif args.data_dir:
        with blame(f'--data-dir {args.data_dir}'):
            dataset = create_dataset('', root=str(args.data_dir), split='train')
            names = _class_names(dataset.reader.class_to_idx, model.num_classes)
    with blame(f'CHECKPOINT {args.checkpoint} is not a complete checkpoint of {args.model}'):
        # a pickle: torch's reader of tensors alone runs no code in it
        load_checkpoint(model, str(args.checkpoint), use_ema=not args.no_ema, weights_only=True)
    with blame(f'--out {args.out}, nothing was written'):
        export(model, args.out, getattr(torch, args.dtype), names, args.onnx)
    return 0
