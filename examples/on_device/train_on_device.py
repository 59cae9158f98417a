r""" Train a timm model on a data set that fits on the accelerator.

The images lie on the device as bytes; each batch is gathered, augmented and mixed there, so that no loader has to keep
up with the device. The budget is a time (--seconds) or a number of epochs (--epochs), and the learning rate follows the
share of it that is spent: a run of a given time needs no known number of steps.

    python examples/on_device/train_on_device.py --config examples/on_device/cifar10_teacher.yaml --data-dir CIFAR10 \
        --output output/cifar10_teacher

The data set is an ImageFolder of images of one size. Written are the averaged weights (model.safetensors), a checkpoint
to resume from (last.pth.tar), what was measured (log.jsonl) and the options (args.yaml). Options are named as in timm's
train.py where it has the same.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from glob import escape, glob
from importlib import import_module
from itertools import count
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from augment_on_device import Augmentation
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import save_file

import timm
from timm.data import ImageDataset, Mixup, create_dataset
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, ParseKwargs, random_seed

import timm_ait

# steps by which the device may be behind the program, at least
CLOCK_STEPS = 10
# steps before the clock starts, which compile; what they trained is undone
WARM_UP_STEPS = 3
# of images in evaluation, as timm names it
PREPROCESSING = dict(crop_pct=1., crop_mode='squash', interpolation='bicubic')
EVAL_BATCH_SIZE = 500
# options that a resumed run cannot change: its checkpoint holds what follows from them, or its steps count batches
_FIXED = (
    'model', 'model_kwargs', 'num_classes', 'img_size', 'train_split', 'holdout', 'seed', 'batch_size', 'opt',
    'opt_kwargs', 'momentum', 'weight_decay', 'layer_decay', 'bn_bias_lr_scale')


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--config', metavar='FILE', help='YAML file with defaults of these options')
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', help='ImageFolder: <split>/<class>/*')
    group.add_argument('--train-split', default='train', metavar='NAME')
    group.add_argument('--val-split', default='validation', metavar='NAME', help="'' for no evaluation")
    group.add_argument('--holdout', type=float, default=0., metavar='SHARE',
                       help='evaluate on this share of the training images, on which it then does not train')
    group.add_argument('--cache', metavar='DIR', help='keep the decoded images here for other runs')
    group.add_argument('--workers', type=int, default=16, metavar='N', help='threads that decode')

    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--num-classes', type=int, metavar='N', help='default: as many as folders')
    group.add_argument('--img-size', type=int, metavar='PIXELS',
                       help='side of the images it sees, of models that take any; others: --model-kwargs img_size=…')
    group.add_argument('--init', metavar='FILE', help='checkpoint to start from; if of fewer blocks, they are grown')
    group.add_argument('--device-modules', nargs='+', default=[], metavar='MODULE', help='that register models')
    group.add_argument('--device', default='cuda')
    group.add_argument('--amp-dtype', default='bfloat16', choices=['bfloat16', 'float32'])
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True, help='torch.compile')

    group = parser.add_argument_group('optimizer and schedule')
    group.add_argument('--opt', default='adamw', metavar='NAME', help='as timm names it')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--lr', type=float, default=1e-3)
    group.add_argument('--momentum', type=float, default=0.9)
    group.add_argument('--weight-decay', type=float, default=0.05)
    group.add_argument('--layer-decay', type=float)
    group.add_argument('--bn-bias-lr-scale', type=float, default=1., metavar='X', help='of the biases of batch norms')
    group.add_argument('--clip-grad', type=float, metavar='NORM')
    group.add_argument('--batch-size', type=int, default=512, metavar='N')
    group.add_argument('--seconds', type=float, help='budget: time, evaluations included')
    group.add_argument('--epochs', type=float,
                       help='budget: passes over the images; of two budgets the one that is spent first counts')
    group.add_argument('--warmup', type=float, default=0.05, metavar='SHARE', help='share of the budget, rising from 0')
    group.add_argument('--decay-from', type=float, default=0.2, metavar='SHARE',
                       help='share of the budget after which the learning rate decays to 0, until then it is constant')
    group.add_argument('--decay', default='linear', choices=['linear', 'cosine'])
    group.add_argument('--seed', type=int, default=0)

    group = parser.add_argument_group('augmentation')
    group.add_argument('--crop-padding', type=int, default=0, metavar='PIXELS', help='shift by at most so much')
    group.add_argument('--scale', type=float, nargs=2, metavar=('MIN', 'MAX'), help='random resized crop: area')
    group.add_argument('--ratio', type=float, nargs=2, default=(3 / 4, 4 / 3), metavar=('MIN', 'MAX'))
    group.add_argument('--train-interpolation', default='bilinear', choices=['bilinear', 'bicubic'])
    group.add_argument('--aa-prob', type=float, default=0., metavar='P',
                       help='of one random colour operation, and likewise of one geometric, per image')
    group.add_argument('--aa-strength', type=float, default=0.5, metavar='X', help='of these, 0 to 1')
    group.add_argument('--mixup', type=float, default=0., metavar='ALPHA')
    group.add_argument('--cutmix', type=float, default=0., metavar='ALPHA')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P')
    group.add_argument('--mixup-off', type=float, default=1., metavar='SHARE', help='of the budget, no mixing after it')
    group.add_argument('--all-patches-from', type=float, default=1., metavar='SHARE',
                       help='of the budget, after which a model with patch_drop_rate drops none')

    group = parser.add_argument_group('loss')
    group.add_argument('--smoothing', type=float, default=0.1)
    group.add_argument('--kd-model-name', nargs='+', default=[], metavar='NAME',
                       help="teachers, whose logits are averaged; 'ema' is the average of the model itself")
    group.add_argument('--kd-model-file', nargs='+', default=[], metavar='FILE',
                       help="checkpoints of the teachers but 'ema', in place of timm's weights")
    group.add_argument('--kd-temperature', type=float, default=2.)
    group.add_argument('--task-loss-weight', type=float, default=0.1, metavar='SHARE',
                       help='of the cross entropy with the labels, the rest is that with the teacher')

    group = parser.add_argument_group('run')
    group.add_argument('--output', metavar='DIR')
    group.add_argument('--model-ema-decay', type=float, default=0.999)
    group.add_argument('--evals', type=int, default=4, metavar='N', help='evaluations, equally spaced, one at the end')
    group.add_argument('--save-dtype', default='float32', choices=['float32', 'float16', 'bfloat16'])
    group.add_argument('--resume', action='store_true', help="go on from the output's last.pth.tar")
    group.add_argument('--lock', metavar='FILE',
                       help='once compiled, wait until no other run holds this lock; --init and --kd-model-file, which '
                            'the others may write, are read only then')
    return parser


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = get_parser()
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument('--config')
    file = config.parse_known_args(argv)[0].config
    if file:
        defaults = yaml.safe_load(Path(file).read_text(encoding='utf-8')) or {}
        unknown = set(defaults) - set(vars(parser.parse_args([])))
        if unknown:
            parser.error(f'{file} has unknown options: {", ".join(sorted(unknown))}.')
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for action in parser._actions:  # argparse checks the choices of the command line alone
        if action.choices and getattr(args, action.dest) not in action.choices:
            parser.error(f'{action.option_strings[0]} must be one of {", ".join(action.choices)}, got '
                         f'{getattr(args, action.dest)}.')
    for name in ('data_dir', 'model', 'output'):
        if not getattr(args, name):
            parser.error(f'--{name.replace("_", "-")} is missing.')
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        parser.error(f'--device {args.device}: {str(e).splitlines()[0]}; --device cpu always works.')
    for name in ('seconds', 'epochs', 'batch_size', 'workers', 'evals', 'clip_grad', 'kd_temperature'):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f'--{name.replace("_", "-")} must be above 0, got {getattr(args, name)}.')
    if args.seconds is None and args.epochs is None:
        parser.error('a budget is missing: give --seconds, --epochs, or both.')
    for name in ('device_modules', 'kd_model_name', 'kd_model_file'):
        if isinstance(getattr(args, name), str):  # in the config
            setattr(args, name, [getattr(args, name)])
    others = [name for name in args.kd_model_name if name != 'ema']
    if args.kd_model_file and len(args.kd_model_file) != len(others):
        parser.error(f'--kd-model-file must have a file for each teacher but ema, there are {len(others)}, got '
                     f'{", ".join(args.kd_model_file)}.')
    if args.batch_size % 2:
        parser.error(f'--batch-size must be even, since images are mixed in pairs, got {args.batch_size}.')
    if not 0 <= args.warmup <= args.decay_from <= 1:
        parser.error(f'0 <= --warmup <= --decay-from <= 1, got {args.warmup} and {args.decay_from}.')
    for name in (
            'aa_prob', 'aa_strength', 'mixup_prob', 'mixup_off', 'all_patches_from', 'smoothing', 'task_loss_weight',
            'holdout', 'model_ema_decay'):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f'--{name.replace("_", "-")} must be in [0, 1], got {getattr(args, name)}.')
    if args.scale and args.crop_padding:
        parser.error(f'--crop-padding {args.crop_padding}: --scale places the crops, give one of the two.')
    if args.scale and not 0 < args.scale[0] <= args.scale[1] <= 1:
        parser.error(f'0 < --scale MIN <= MAX <= 1, got {args.scale[0]} and {args.scale[1]}.')
    has_checkpoint = (Path(args.output) / 'last.pth.tar').is_file()
    if args.resume and not has_checkpoint:
        parser.error(f'--resume: there is no last.pth.tar in {args.output}.')
    if has_checkpoint and not args.resume:
        parser.error(f'--output {args.output} holds a run: continue it with --resume, or use another folder.')
    if args.resume:
        before = yaml.safe_load((Path(args.output) / 'args.yaml').read_text())
        for name in _FIXED:
            if before[name] != plain(args)[name]:
                parser.error(f'--resume: the run in {args.output} has {name} {before[name]}, got {plain(args)[name]}.')
    return args


def plain(args: argparse.Namespace) -> Dict[str, Any]:
    """Options as YAML writes and reads them."""
    return json.loads(json.dumps(vars(args)))


# data

class Images(NamedTuple):
    """Images (N, 3, H, W), bytes, and their labels (N,)."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: List[str]

    def to(self, device: torch.device) -> 'Images':
        return Images(self.images.to(device), self.labels.to(device), self.classes)

    def select(self, indices: torch.Tensor) -> 'Images':
        return Images(self.images[indices], self.labels[indices], self.classes)


def open_split(data_dir: str, split: str) -> ImageDataset:
    """A split of an ImageFolder.

    Raises:
        ValueError: There is no such folder or split.
    """
    if not Path(data_dir).is_dir():
        raise ValueError(f'--data-dir {data_dir} is no folder.')
    dataset = create_dataset('', root=data_dir, split=split, input_img_mode='RGB')
    if Path(dataset.reader.root) == Path(data_dir):  # where timm reads if there is no folder of the split
        raise ValueError(f'{data_dir} has no folder {split}: --train-split and --val-split name the folders.')
    return dataset


def read_images(dataset: ImageDataset, num_threads: int) -> Images:
    """Decode a split.

    Raises:
        ValueError: An image is damaged, or they are of several sizes.
    """
    def read(index: int) -> Tuple[np.ndarray, int]:
        file, label = dataset.reader[index]  # the data set would give the next image for one that is damaged
        try:
            return np.asarray(Image.open(file).convert('RGB')), label
        except Exception as e:  # Pillow raises many kinds
            raise ValueError(f'{file.name} is no image that can be read: {e}') from e

    with ThreadPool(num_threads) as pool:
        images, labels = zip(*pool.map(read, range(len(dataset)), chunksize=64))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        sizes = ', '.join(f'{width}x{height}' for height, width, _ in sorted(shapes)[:3])
        raise ValueError(
            f'The images in {dataset.reader.root} must be of one size, they are {sizes}: resize them first.')
    classes = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(labels), list(classes))


def load_images(data_dir: str, split: str, num_threads: int, cache: Optional[str]) -> Images:
    """`read_images`, or what an earlier run kept of it. Runs that start together decode once."""
    dataset = open_split(data_dir, split)
    if cache is None:
        return read_images(dataset, num_threads)
    Path(cache).mkdir(parents=True, exist_ok=True)
    folder = Path(dataset.reader.root).resolve()
    paths = map(Path, sorted(glob(f'{escape(str(folder))}/**', recursive=True)))  # also behind links
    files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]
    file = Path(cache) / f'{folder.name}_{hashlib.sha256(repr((folder, files)).encode()).hexdigest()[:12]}.pt'
    with FileLock(f'{file}.lock'):
        if not file.exists():
            write_whole(torch.save, tuple(read_images(dataset, num_threads)), file)
    return Images(*torch.load(file))


def hold_out(data: Images, share: float, seed: int) -> Tuple[Images, Images]:
    """Split images at random into those to train on and those to evaluate on."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    num_held_out = math.ceil(share * len(order))
    return data.select(order[num_held_out:]), data.select(order[:num_held_out])


# weights

def grow_blocks(state_dict: Dict[str, torch.Tensor], depth: int) -> Dict[str, torch.Tensor]:
    """Weights of a deeper model that computes the same.

    After each block come new ones: copies, in turn, of all blocks, whose branches end in zeros. These are the output
    projection of attention, and of the MLP the norm and the attractors that a workspace adds up, or else its output
    layer. As such layers' inputs are not zero, they learn from the first step.

    Raises:
        ValueError: The depth is no multiple of the weights' own.
    """
    pattern = re.compile(r'blocks\.(\d+)\.(.+)')
    num_blocks = 1 + max(int(match[1]) for match in map(pattern.match, state_dict) if match)
    if depth % num_blocks:
        raise ValueError(f'{num_blocks} blocks grow into a multiple of them, not into {depth}.')
    if any(name.endswith('workspace.gate') for name in state_dict):
        raise ValueError('gated workspaces do not grow: their MLPs end in a layer and a gate.')
    has_workspaces = any('.mlp.workspace.' in name for name in state_dict)
    last = ('mlp.workspace.norm.', 'mlp.workspace.attractors.') if has_workspaces else ('mlp.fc2.',)
    grown = {name: value for name, value in state_dict.items() if not pattern.match(name)}
    for i in range(depth):
        block, num_after = divmod(i, depth // num_blocks)
        source = f'blocks.{(block + max(num_after - 1, 0)) % num_blocks}.'
        for name, value in state_dict.items():
            if name.startswith(source):
                name = name[len(source):]
                is_zero = num_after > 0 and name.startswith(('attn.proj.', *last))
                grown[f'blocks.{i}.{name}'] = torch.zeros_like(value) if is_zero else value
    return grown


def load_weights(model: nn.Module, file: str, name: str, **kwargs) -> int:
    """Load a checkpoint as timm loads pretrained weights: positions are resampled, other classes get a new head.

    Returns:
        Number of the checkpoint's classes, 0 if it has no classifier.

    Raises:
        FileNotFoundError: The file is not there.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f'{file}, the weights for {name}, is not there.')
    state_dict = {key: value.float() for key, value in load_state_dict(file).items()}
    depth = len(getattr(model, 'blocks', ()))
    if depth and 'blocks.0.norm2.weight' in state_dict and f'blocks.{depth - 1}.norm2.weight' not in state_dict:
        state_dict = grow_blocks(state_dict, depth)
    classifier = model.pretrained_cfg['classifier']
    classifier = state_dict.get(f'{classifier if isinstance(classifier, str) else classifier[0]}.weight', ())
    # without a source, or a name of the Hub or of a folder would load what is there
    overlay = dict(state_dict=state_dict, source='', num_classes=len(classifier))
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model.load_state_dict(loaded.state_dict())
    return len(classifier)


def write_whole(save, content: Any, file: Path) -> None:
    """Save so that nobody finds half a file."""
    save(content, f'{file}.part')
    os.replace(f'{file}.part', file)


@contextlib.contextmanager
def only_run_in(output: str) -> Iterator[None]:
    """Let no other run write into a folder.

    Raises:
        ValueError: One does.
    """
    try:
        with FileLock(Path(output) / 'run.lock', timeout=0):
            yield
    except Timeout as e:
        raise ValueError(f'--output {output}: another run writes there, take another folder.') from e


# training

def input_size(model: nn.Module) -> Tuple[int, int]:
    """Height and width of the images that a model is for. A ViT may have another size than its cfg says."""
    return tuple(
        getattr(getattr(model, 'patch_embed', None), 'img_size', None) or model.pretrained_cfg['input_size'][-2:])


class Schedule:
    """What share of the budget is spent, and the learning rate that goes with it."""

    def __init__(self, args: argparse.Namespace, steps_per_epoch: int) -> None:
        self.args = args
        self.seconds = 0.  # spent
        self.num_steps = math.inf if args.epochs is None else max(1, round(args.epochs * steps_per_epoch))

    def start(self) -> None:
        self.started = time.perf_counter() - self.seconds

    def progress(self, step: int) -> float:
        self.seconds = time.perf_counter() - self.started
        return min(1., max(step / self.num_steps, self.seconds / (self.args.seconds or math.inf)))

    def lr_scale(self, progress: float) -> float:
        warmup, decay_from = self.args.warmup, self.args.decay_from
        if progress < warmup:
            return progress / warmup
        decayed = max(0., progress - decay_from) / max(1 - decay_from, 1e-9)
        return 1 - decayed if self.args.decay == 'linear' else 0.5 + 0.5 * math.cos(math.pi * decayed)


def create_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    fused = {'fused': True} if args.opt in ('sgd', 'adamw') else {}
    optimizer = create_optimizer_v2(
        model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum,
        layer_decay=args.layer_decay, **{**fused, **args.opt_kwargs})
    if args.bn_bias_lr_scale != 1:
        biases = [m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        ids = set(map(id, biases))
        for group in optimizer.param_groups:
            group['params'] = [parameter for parameter in group['params'] if id(parameter) not in ids]
        # the weights' decay per step
        decay = args.weight_decay / args.bn_bias_lr_scale
        optimizer.add_param_group(dict(params=biases, lr_scale=args.bn_bias_lr_scale, weight_decay=decay))
    return optimizer


class Trainer:
    """Model, teacher, average and optimizer, and the steps they take together."""

    def __init__(self, args: argparse.Namespace, train: Images, val: Optional[Images]) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.train_data, self.val_data = train.to(self.device), val and val.to(self.device)
        self.num_classes = args.num_classes or len(train.classes)
        if self.num_classes < len(train.classes):
            raise ValueError(f'--num-classes {self.num_classes}: the data have {len(train.classes)} classes.')
        self.generator = torch.Generator(self.device)
        self.kwargs = dict(args.model_kwargs, num_classes=self.num_classes)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = timm.create_model(args.model, **self.kwargs).to(self.device, memory_format=memory_format)
        if args.img_size:
            self.model.pretrained_cfg = {**self.model.pretrained_cfg, 'input_size': (3, args.img_size, args.img_size)}
            if input_size(self.model) != (args.img_size, args.img_size):
                raise ValueError(f'--img-size {args.img_size}: {args.model} was created for another size, say '
                                 f'--model-kwargs img_size={args.img_size} instead.')
        self.patch_drop = getattr(self.model, 'patch_drop', None)
        if args.all_patches_from < 1 and not getattr(self.patch_drop, 'prob', 0.):
            raise ValueError(f'--all-patches-from {args.all_patches_from}: {args.model} drops no patches, say '
                             f'--model-kwargs patch_drop_rate=0.5.')
        self.augment = Augmentation(args, input_size(self.model), self.generator)
        self.statistics: Dict[nn.Module, List[torch.Tensor]] = {}
        if hasattr(self.model, 'init_from_images'):
            some = self.train_data.images[::math.ceil(len(train.labels) / 5000)]  # of all classes
            self.model.init_from_images(self.prepare(some.float() / 255, self.model))
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=True, foreach=True)
        self.optimizer = create_optimizer(self.model, args)
        self.criterion = SoftTargetCrossEntropy()
        self.mixup = None
        if args.mixup > 0 or args.cutmix > 0:
            self.mixup = Mixup(
                args.mixup, args.cutmix, prob=args.mixup_prob, label_smoothing=args.smoothing,
                num_classes=self.num_classes)
        self.teachers = [self.create_teacher(name) for name in args.kd_model_name]
        self.run_model, self.run_teachers = self.model, self.teachers
        if args.compile:
            self.run_model, self.run_teachers = torch.compile(self.model), [torch.compile(t) for t in self.teachers]
        self.schedule = Schedule(args, self.steps_per_epoch)
        self.step_count, self.mixes, self.event = 0, True, None
        self.totals = torch.zeros(2, device=self.device)  # loss and balance loss of the steps since the last report
        self.reported = (0, 0.)  # steps and seconds

    def create_teacher(self, name: str) -> nn.Module:
        if name == 'ema':
            return self.ema.module
        pretrained = not self.args.kd_model_file  # or the weights are read in load()
        teacher = timm.create_model(name, pretrained=pretrained, num_classes=self.num_classes)
        if pretrained:
            self.check_teacher(name, teacher.pretrained_cfg['num_classes'])
        return teacher.to(self.device).eval().requires_grad_(False)

    def check_teacher(self, name: str, num_classes: int) -> None:
        if num_classes != self.num_classes:
            raise ValueError(f'The teacher {name} has {num_classes} classes, the data {self.num_classes}: it must have '
                             f'been trained on these.')

    @property
    def steps_per_epoch(self) -> int:
        steps = len(self.train_data.labels) // self.args.batch_size
        if steps == 0:
            raise ValueError(f'--batch-size {self.args.batch_size} must be at most the number of training images, '
                             f'{len(self.train_data.labels)}.')
        return steps

    def autocast(self):
        dtype = getattr(torch, self.args.amp_dtype)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def prepare(self, images: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """Images in [0, 1], of any size, as a model expects them."""
        if images.shape[-2:] != input_size(model):
            images = F.interpolate(images, size=input_size(model), mode='bicubic', antialias=True).clamp(0., 1.)
        if model not in self.statistics:
            self.statistics[model] = [
                torch.tensor(model.pretrained_cfg[name], device=self.device).view(1, -1, 1, 1)
                for name in ('mean', 'std')]
        mean, std = self.statistics[model]
        return (images - mean) / std

    def teach(self, images: torch.Tensor) -> torch.Tensor:
        """Mean of the teachers' logits (B, num_classes) for images in [0, 1]."""
        logits = [
            run(self.prepare(images, teacher)).float() for run, teacher in zip(self.run_teachers, self.teachers)]
        return sum(logits) / len(logits)

    def step(self, indices: torch.Tensor, flip: torch.Tensor) -> None:
        """
        Args:
            indices: Of the images to train on (B,).
            flip: Which of them to mirror (B,).
        """
        args = self.args
        with torch.no_grad():
            images, labels = self.augment(self.train_data.images[indices], flip), self.train_data.labels[indices]
            if self.mixup is not None and self.mixes:
                images, targets = self.mixup(images, labels)
            else:
                targets = mixup_target(labels, self.num_classes, smoothing=args.smoothing)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.run_model(self.prepare(images, self.model))
            if self.teachers:
                with torch.no_grad():
                    taught = self.teach(images)
        logits = logits.float()
        loss = self.criterion(logits, targets)
        if self.teachers:
            t = args.kd_temperature
            distance = F.kl_div(
                F.log_softmax(logits / t, dim=-1), F.log_softmax(taught / t, dim=-1), reduction='batchmean',
                log_target=True)
            loss = args.task_loss_weight * loss + (1 - args.task_loss_weight) * t ** 2 * distance
        balance = timm_ait.balance_loss(self.model)
        loss = loss + balance
        loss.backward()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count += 1
        self.ema.update(self.model, step=self.step_count)
        self.totals += torch.stack([loss.detach(), balance.detach()])

    def set_progress(self, progress: float) -> None:
        self.mixes = progress < self.args.mixup_off
        if self.args.all_patches_from < 1 and progress >= self.args.all_patches_from:
            self.patch_drop.prob = 0.
        scale = self.args.lr * self.schedule.lr_scale(progress)
        for group in self.optimizer.param_groups:
            group['lr'] = scale * group.get('lr_scale', 1.)

    def warm_up(self) -> None:
        """Take steps so that all is compiled, and undo them."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        self.model.train()
        self.set_progress(0.)
        indices = torch.arange(self.args.batch_size, device=self.device)
        for mixes in range(WARM_UP_STEPS):
            self.mixes = mixes > 0
            self.step(indices, indices % 2 == 0)
        if self.val_data is not None:
            self.evaluate(self.model, self.val_data.select(torch.arange(1, device=self.device)))
        self.model.load_state_dict(before)
        self.ema.set(self.model)
        self.optimizer.load_state_dict(optimizer)
        self.step_count = 0
        self.totals.zero_()

    def seed(self) -> None:
        """Seed what is random from here on by the step, so that it is the same in a run that is resumed here."""
        self.generator.manual_seed(self.args.seed + self.step_count)
        random_seed(self.args.seed, self.step_count)

    def draw_order(self, epoch: int) -> torch.Tensor:
        """Order of the images in an epoch (N,), which depends on it and the seed alone."""
        # the CPU's generator takes 32 bits
        generator = torch.Generator().manual_seed((1_000_003 * self.args.seed + epoch) % 2 ** 32)
        return torch.randperm(len(self.train_data.labels), generator=generator).to(self.device)

    def fit(self) -> None:
        """Train until the budget is spent."""
        args, steps = self.args, self.steps_per_epoch
        flips = self.draw_order(-1) % 2 == 0  # half of the images, by an order that no epoch has

        def following(progress: float) -> float:
            return (math.floor(progress * args.evals) + 1) / args.evals

        self.model.train()
        self.seed()
        self.schedule.start()
        next_eval = following(self.schedule.progress(self.step_count))
        for epoch in count(self.step_count // steps):
            for indices in self.draw_order(epoch).split(args.batch_size)[self.step_count % steps:steps]:
                if self.step_count % CLOCK_STEPS == 0:
                    self.keep_pace()
                progress = self.schedule.progress(self.step_count)
                if progress >= next_eval:
                    self.report(progress)
                    progress = self.schedule.progress(self.step_count)  # an evaluation takes time
                    next_eval = following(progress)
                if progress >= 1:
                    return
                self.set_progress(progress)
                # every second epoch sees the mirror image of what the one before saw
                self.step(indices, flips[indices] ^ (epoch % 2 == 1))

    def keep_pace(self) -> None:
        """Let the device be behind by no more than the steps since the last call, or the clock would say little."""
        if self.device.type == 'cuda':
            if self.event is not None:
                self.event.synchronize()
            self.event = torch.cuda.Event()
            self.event.record()

    def accuracy(self, classify: Callable[[torch.Tensor], torch.Tensor], data: Images) -> float:
        """Top-1 accuracy on whole images, in percent, in the dtype of training, of logits for images in [0, 1]."""
        with torch.no_grad(), self.autocast():
            correct = torch.stack([
                (classify(images.float() / 255).argmax(-1) == labels).sum()
                for images, labels in zip(data.images.split(EVAL_BATCH_SIZE), data.labels.split(EVAL_BATCH_SIZE))])
        return 100 * correct.sum().item() / len(data.labels)

    def evaluate(self, model: nn.Module, data: Images) -> float:
        """Accuracy of a model in evaluation mode."""
        training = model.training
        model.eval()
        accuracy = self.accuracy(lambda images: model(self.prepare(images, self.model)), data)
        model.train(training)
        return accuracy

    def report(self, progress: float) -> None:
        """Evaluate, append to the log, and save."""
        num_steps = self.step_count - self.reported[0]
        loss, balance = (self.totals / max(num_steps, 1)).tolist()  # waits for the device
        self.schedule.progress(self.step_count)
        seconds = self.schedule.seconds - self.reported[1]
        record = dict(
            progress=round(progress, 4), seconds=round(self.schedule.seconds, 2), step=self.step_count,
            epoch=round(self.step_count / self.steps_per_epoch, 2), loss=loss, balance_loss=balance,
            images_per_second=round(num_steps * self.args.batch_size / max(seconds, 1e-9)))
        if self.val_data is not None:
            record['top1'] = self.evaluate(self.model, self.val_data)
            record['top1_ema'] = self.evaluate(self.ema.module, self.val_data)
        ranks = [layer['effective_rank'] for layer in timm_ait.memory_statistics(self.model).values()]
        if ranks:
            record['lowest_rank'] = min(ranks)
        log(record, self.args.output)
        if not math.isfinite(loss):
            raise ValueError(f'the loss is {loss} at step {self.step_count}: nothing is saved since the last report.')
        self.totals.zero_()
        self.schedule.progress(self.step_count)
        self.reported = (self.step_count, self.schedule.seconds)
        self.save()
        self.seed()

    def save(self) -> None:
        output, args = Path(self.args.output), self.args
        write_whole(torch.save, dict(
            arch=args.model, args=dict(vars(args), num_classes=self.num_classes, **PREPROCESSING),  # which export reads
            state_dict=self.model.state_dict(), state_dict_ema=self.ema.module.state_dict(),
            optimizer=self.optimizer.state_dict(), step=self.step_count, seconds=self.schedule.seconds),
            output / 'last.pth.tar')
        dtype = getattr(torch, args.save_dtype)
        weights = {
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for name, value in self.ema.module.state_dict().items()}
        write_whole(save_file, weights, output / 'model.safetensors')
        shutil.copymode(output / 'last.pth.tar', output / 'model.safetensors')  # save_file writes for the owner alone

    def load(self) -> None:
        """Load what the run starts from."""
        args = self.args
        others = [(name, teacher) for name, teacher in zip(args.kd_model_name, self.teachers) if name != 'ema']
        for (name, teacher), file in zip(others, args.kd_model_file):
            self.check_teacher(file, load_weights(teacher, file, name, num_classes=self.num_classes))
        if args.init and not args.resume:
            load_weights(self.model, args.init, args.model, **self.kwargs)
            self.ema.set(self.model)
        if args.resume:
            checkpoint = torch.load(Path(args.output) / 'last.pth.tar', map_location=self.device)
            self.model.load_state_dict(checkpoint['state_dict'])
            self.ema.module.load_state_dict(checkpoint['state_dict_ema'])
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            self.step_count, self.schedule.seconds = checkpoint['step'], checkpoint['seconds']
            self.reported = (self.step_count, self.schedule.seconds)


def log(record: Dict[str, Any], output: str) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    with open(Path(output) / 'log.jsonl', 'a') as file:
        file.write(line + '\n')


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    begin = time.perf_counter()
    for module in args.device_modules:
        import_module(module)
    random_seed(args.seed)
    train = load_images(args.data_dir, args.train_split, args.workers, args.cache)
    if args.holdout > 0:
        train, val = hold_out(train, args.holdout, seed=0)
    else:
        val = load_images(args.data_dir, args.val_split, args.workers, args.cache) if args.val_split else None
        if val is not None and val.classes != train.classes:
            raise ValueError(f'{args.train_split} and {args.val_split} in {args.data_dir} must have the same classes.')
    trainer = Trainer(args, train, val)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with only_run_in(args.output):
        trainer.warm_up()
        log(dict(ready=round(time.perf_counter() - begin, 1)), args.output)
        with FileLock(args.lock) if args.lock else contextlib.nullcontext():
            trainer.load()
            (Path(args.output) / 'args.yaml').write_text(yaml.safe_dump(plain(args)))
            if trainer.teachers and val is not None:
                log(dict(teachers_top1=trainer.accuracy(trainer.teach, trainer.val_data)), args.output)
            trainer.fit()


if __name__ == '__main__':
    main()
