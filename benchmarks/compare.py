""" Train registered models on one data set with equal budgets, and compare them.

    python benchmarks/compare.py examples/compare_cifar10.yaml --data-dir CIFAR10 --output output/compare_cifar10

A recipe names the data set, the budget and the runs, each a model of timm's registry with its arguments. Every run is
trained for the same steps on the same batches with the same augmentation, once a seed. Runs that are finished are kept,
one that was interrupted goes on from its last checkpoint; when all are there the command writes `results.json`,
`table.md` and figures. Built on timm's training task, optimisers, scheduler and checkpoints, in memory and by steps.

Recipe, YAML:
    dataset: cifar10, triangle (ImageFolders) or sort_of_clevr (written by `python -m timm_ait data`)
    image_size, in_chans: of the models' input; images are scaled to it
    mean, std: what pixels in [0, 1] are normalised with
    kinds: of Sort-of-CLEVR's questions, all by default
    runs: {label: {model: NAME, ARGUMENT: VALUE, …}, …}, with seeds of its own where a run has the key seeds
    model_kwargs: arguments of every run's model, which may take them back with null
    conv_stem: channels of convolutions of stride 2 that embed the patches of every model, in place of linear patches
    steps, batch_size, opt, lr, weight_decay, warmup_steps, clip_grad, amp_dtype, seeds, eval_every
    hflip, vflip, transpose: flip images at random; crop_padding: shift them by up to as many pixels
    place: move what stands on a black ground to a random place of the image, whole
"""
import argparse
import copy
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_dataset
from timm.layers import HybridEmbed
from timm.models import resume_checkpoint
from timm.models.vision_transformer_hybrid import ConvStem
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver
from torch.utils.flop_counter import FlopCounterMode

import timm_ait
from timm_ait.data import SortOfClevr
from timm_ait.data.sort_of_clevr import ANSWERS, KINDS, QUESTION_DIM

_DEFAULTS = dict(
    image_size=None,
    in_chans=3,
    mean=0.5,
    std=0.5,
    kinds=list(KINDS),
    model_kwargs={},
    conv_stem=None,
    steps=1000,
    batch_size=128,
    opt='adamw',
    lr=1e-3,
    weight_decay=0.05,
    warmup_steps=100,
    clip_grad=1.,
    amp_dtype='bfloat16',
    seeds=[0],
    eval_every=250,
    hflip=False,
    vflip=False,
    transpose=False,
    crop_padding=0,
    place=False,
)
_DATA_SETS = ('cifar10', 'triangle', 'sort_of_clevr')


class Split(NamedTuple):
    """Images (n, C, H, W) uint8, and per item the image it shows, its target, question (Q,) and group."""
    images: torch.Tensor
    image_of: torch.Tensor
    targets: torch.Tensor
    questions: Optional[torch.Tensor]
    groups: torch.Tensor
    group_names: Tuple[str, ...]
    num_classes: int


def load_split(recipe: Dict[str, Any], data_dir: str, split: str) -> Split:
    """Read one split into memory, scaled to the recipe's image size."""
    if recipe['dataset'] == 'sort_of_clevr':
        data = SortOfClevr(data_dir, split, recipe['kinds'])
        num_questions = data.answers.shape[1]
        images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous()
        return Split(
            images=images,
            image_of=torch.arange(len(images)).repeat_interleave(num_questions),
            targets=torch.from_numpy(data.answers.reshape(-1)).long(),
            questions=torch.from_numpy(data.questions.reshape(-1, QUESTION_DIM)),
            groups=torch.from_numpy(data.questions.reshape(-1, QUESTION_DIM)[:, 12:15].argmax(-1)),
            group_names=KINDS,
            num_classes=len(ANSWERS),
        )
    dataset = create_dataset('', data_dir, split=split, input_img_mode='L' if recipe['in_chans'] == 1 else 'RGB')
    size, images, targets = recipe['image_size'], [], []
    for image, target in dataset:
        image = np.asarray(image if image.size == (size, size) else image.resize((size, size)))
        images.append(image.reshape(size, size, -1))
        targets.append(target)
    return Split(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        image_of=torch.arange(len(images)),
        targets=torch.tensor(targets),
        questions=None,
        groups=torch.zeros(len(images), dtype=torch.long),
        group_names=('all',),
        num_classes=max(targets) + 1,
    )


def _batch(
        split: Split,
        items: torch.Tensor,
        recipe: Dict[str, Any],
) -> Tuple[torch.Tensor, torch.Tensor, Dict[str, torch.Tensor]]:
    """Normalised images, targets, and the further arguments of the model."""
    images = split.images[split.image_of[items]].float().div_(255.).sub_(recipe['mean']).div_(recipe['std'])
    kwargs = {} if split.questions is None else {'question': split.questions[items].float()}
    return images, split.targets[items], kwargs


def _windows(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Windows (B, C, height, width) of images, whose other side follows on their edge, at corners (B, 1)."""
    batch_size, channels, rows, columns = images.shape
    return images[
        torch.arange(batch_size)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        ((top + torch.arange(height)) % rows)[:, None, :, None],
        ((left + torch.arange(width)) % columns)[:, None, None, :],
    ]


def _random_corner(images: torch.Tensor, axis: int, generator: torch.Generator) -> torch.Tensor:
    """Where along an axis a window has to begin (B, 1) to have all that is not black at a random place."""
    shown = images.amax(dim=(1, axis)) > images.min()
    first = shown.int().argmax(dim=1, keepdim=True)
    free = first + shown.flip(1).int().argmax(dim=1, keepdim=True)
    place = (torch.rand(len(images), 1, generator=generator) * (free + 1)).long()
    return first - place


def _augment(images: torch.Tensor, recipe: Dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    batch_size, _, height, width = images.shape
    for name, flip in (
            ('hflip', lambda x: x.flip(-1)), ('vflip', lambda x: x.flip(-2)), ('transpose', lambda x: x.mT)):
        if recipe[name]:
            flipped = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
            images = torch.where(flipped, flip(images), images)
    padding = recipe['crop_padding']
    if padding:
        images = F.pad(images, (padding,) * 4, mode='reflect')
        top, left = torch.randint(2 * padding + 1, (2, batch_size, 1), generator=generator)
        images = _windows(images, top, left, height, width)
    if recipe['place']:
        top, left = (_random_corner(images, axis, generator) for axis in (-1, -2))
        images = _windows(images, top, left, height, width)
    return images


class _QuestionTask(ClassificationTask):
    """timm's classification task with further arguments for the model."""

    def forward(self, input: torch.Tensor, target: torch.Tensor, **kwargs) -> Dict[str, torch.Tensor]:
        output = self.trainable_module(input, **kwargs)
        return {'loss': self.criterion(output, target), 'output': output}


def create_run_model(recipe: Dict[str, Any], run: Dict[str, Any], num_classes: int) -> torch.nn.Module:
    """The model of a run, made for the recipe's input unless that is its own."""
    kwargs = {**recipe['model_kwargs'], **run}
    kwargs.pop('seeds', None)
    if recipe['conv_stem']:
        channels = recipe['conv_stem']
        stem = ConvStem(
            recipe['in_chans'], len(channels), channels, stride=(2,) * len(channels), act_layer=torch.nn.ReLU)
        embed_layer = functools.partial(HybridEmbed, backbone=stem, proj=False)
        kwargs = {'embed_layer': embed_layer, 'patch_size': 1, 'embed_dim': channels[-1], **kwargs}
    name = kwargs.pop('model')
    size = recipe['image_size']
    # a model that was designed for this input keeps its front end
    if timm.get_pretrained_cfg_value(name, 'input_size')[-1] != size:
        kwargs = {'img_size': size, **kwargs}
    if recipe['in_chans'] != 3:
        kwargs = {'in_chans': recipe['in_chans'], **kwargs}
    if recipe['dataset'] == 'sort_of_clevr':
        kwargs = {'question_dim': QUESTION_DIM, **kwargs}
    return timm.create_model(name, num_classes=num_classes, **kwargs)  # timm leaves out what is None


def _embed_patches_in_float32(model: torch.nn.Module) -> None:
    """In bfloat16, oneDNN's gradient of a convolution with large strides takes many times as long."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == module.stride:
            module.forward = torch.autocast('cpu', enabled=False)(module.forward)


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        split: Split,
        recipe: Dict[str, Any],
        batch_size: int = 250,
) -> Tuple[Dict[str, float], float]:
    """Accuracy in percent, in all and by group, and images a second (median over batches)."""
    model.eval()
    correct, rates = [], []
    for items in torch.arange(len(split.targets)).split(batch_size):
        images, targets, kwargs = _batch(split, items, recipe)
        start = time.perf_counter()
        logits = model(images, **kwargs)
        rates.append(len(items) / (time.perf_counter() - start))
        correct.append(logits.argmax(-1) == targets)
    correct = torch.cat(correct).float() * 100
    accuracy = {'all': correct.mean().item()}
    if len(split.group_names) > 1:
        for i in split.groups.unique().tolist():
            accuracy[split.group_names[i]] = correct[split.groups == i].mean().item()
    return accuracy, statistics.median(rates)


def _multiply_adds(model: torch.nn.Module, split: Split, recipe: Dict[str, Any]) -> int:
    images, _, kwargs = _batch(split, torch.arange(1), recipe)
    # the counter's hooks stumble over parameters with gradients, and it counts nothing inside of a fused attention
    model = copy.deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images, **kwargs)
    return counter.get_total_flops() // 2


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_text(text)
    os.replace(partial, path)


def _settings(recipe: Dict[str, Any], run: Dict[str, Any]) -> Dict[str, Any]:
    """What the result of a run depends on, besides its seed."""
    settings = {key: value for key, value in recipe.items() if key not in ('runs', 'seeds')}
    return {**settings, 'run': {key: value for key, value in run.items() if key != 'seeds'}}


def train_run(recipe: Dict[str, Any], run: Dict[str, Any], seed: int, folder: Path, train: Split, test: Split) -> None:
    """Train one model with one seed; leaves `result.json` in the folder once it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / 'settings.json', json.dumps(_settings(recipe, run)))
    torch.manual_seed(seed)
    model = create_run_model(recipe, run, train.num_classes)
    _embed_patches_in_float32(model)
    task = _QuestionTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt=recipe['opt'], lr=recipe['lr'], weight_decay=recipe['weight_decay'])
    steps, batch_size = recipe['steps'], recipe['batch_size']
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=recipe['warmup_steps'],
        warmup_lr_init=recipe['lr'] / 100,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(model=run['model']), checkpoint_dir=str(folder), max_history=1, task=task)
    log: List[Dict[str, Any]] = []
    step = 0
    if (folder / 'last.pth.tar').is_file():
        step = resume_checkpoint(model, str(folder / 'last.pth.tar'), optimizer, log_info=False)
        log = [entry for entry in json.loads((folder / 'log.json').read_text()) if entry['step'] <= step]

    num_items = len(train.targets)
    steps_an_epoch = num_items // batch_size
    rates: List[float] = []
    while step < steps:
        epoch, position = divmod(step, steps_an_epoch)
        order = torch.randperm(num_items, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        for items in order.split(batch_size)[position:steps_an_epoch]:
            images, targets, kwargs = _batch(train, items, recipe)
            images = _augment(images, recipe, torch.Generator().manual_seed(1_000_003 * seed + step))
            start = time.perf_counter()
            scheduler.step_update(step)
            model.train()
            with torch.autocast('cpu', getattr(torch, recipe['amp_dtype']), recipe['amp_dtype'] != 'float32'):
                result = task(images, targets, **kwargs)
            optimizer.zero_grad()
            result['loss'].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe['clip_grad'])
            optimizer.step()
            rates.append(batch_size / (time.perf_counter() - start))
            step += 1
            if step % recipe['eval_every'] == 0 or step == steps:
                accuracy, _ = evaluate(model, test, recipe)
                log.append(dict(step=step, loss=result['loss'].item(), accuracy=accuracy))
                _write(folder / 'log.json', json.dumps(log))
                saver.save_checkpoint(step - 1, accuracy['all'])
                print(f'{folder}: step {step}/{steps}', ', '.join(f'{k} {v:.2f}' for k, v in accuracy.items()),
                      f'{statistics.median(rates):.0f} images/s', flush=True)
            if step == steps:
                break
    accuracy, inference_rate = evaluate(model, test, recipe)
    ranks = [layer['effective_rank'] for layer in timm_ait.memory_statistics(model).values()]
    _write(folder / 'result.json', json.dumps(dict(
        accuracy=accuracy,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=_multiply_adds(model, test, recipe),
        training_rate=statistics.median(rates) if rates else None,
        inference_rate=inference_rate,
        lowest_rank=min(ranks) if ranks else None,
        log=log,
    ), indent=2))


def report(recipe: Dict[str, Any], output: Path) -> None:
    """Gather the runs' results into `results.json`, `table.md` and the figures."""
    results = {}
    for label, run in recipe['runs'].items():
        runs = [json.loads((output / label / f'seed{seed}' / 'result.json').read_text()) for seed in run['seeds']]
        results[label] = {'model': run, 'runs': runs}
    _write(output / 'results.json', json.dumps({'recipe': recipe, 'results': results}, indent=2))

    groups = list(next(iter(results.values()))['runs'][0]['accuracy'])
    numbers_differ = len({len(result['runs']) for result in results.values()}) > 1
    header = ['', *(['seeds'] if numbers_differ else []),
              *(f'accuracy, {group}' if len(groups) > 1 else 'accuracy' for group in groups),
              'lowest rank', 'parameters', 'MACs', 'training images/s', 'inference images/s']
    rows = []
    for label, result in results.items():
        runs = result['runs']
        cells = [label, *([str(len(runs))] if numbers_differ else [])]
        for group in groups:
            values = [run['accuracy'][group] for run in runs]
            deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{deviation}')
        ranks = [run['lowest_rank'] for run in runs if run['lowest_rank'] is not None]
        rates = [run['training_rate'] for run in runs if run['training_rate'] is not None]
        cells += [
            f'{min(ranks):.1f}' if ranks else '',
            f"{runs[0]['parameters'] / 1e6:.2f}M",
            f"{runs[0]['macs'] / 1e6:.1f}M",
            f'{statistics.median(rates):.0f}' if rates else '',
            f"{statistics.median(run['inference_rate'] for run in runs):.0f}",
        ]
        rows.append(cells)
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    table = ''.join(f"| {' | '.join(cells)} |\n" for cells in lines)
    _write(output / 'table.md', table)
    print(table)
    _figures(results, output)


def _figures(results: Dict[str, Any], output: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def mean_and_deviation(values: List[float]) -> Tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.

    figure, axes = plt.subplots(figsize=(6.4, 1 + 0.3 * len(results)), layout='constrained')
    for position, result in enumerate(results.values()):
        accuracy, deviation = mean_and_deviation([run['accuracy']['all'] for run in result['runs']])
        axes.errorbar(accuracy, position, xerr=deviation, fmt='o', capsize=3, color='tab:blue')
    axes.set(xlabel='accuracy (%)', yticks=range(len(results)), yticklabels=list(results))
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    figure.savefig(output / 'accuracy.svg')
    plt.close(figure)
    for quantity, label in (('parameters', 'parameters'), ('macs', 'multiply-adds an image')):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
        for name, result in results.items():
            accuracy, deviation = mean_and_deviation([run['accuracy']['all'] for run in result['runs']])
            axes.errorbar(result['runs'][0][quantity], accuracy, deviation, fmt='o', capsize=3)
            axes.annotate(name, (result['runs'][0][quantity], accuracy), xytext=(5, 4), textcoords='offset points',
                          fontsize=8)
        axes.set(xlabel=label, ylabel='accuracy (%)', xscale='log')
        axes.margins(x=0.2)
        figure.savefig(output / f'accuracy_{quantity}.svg')
        plt.close(figure)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    for i, (name, result) in enumerate(results.items()):
        logs = [run['log'] for run in result['runs']]
        accuracies = [statistics.mean(entry['accuracy']['all'] for entry in entries) for entries in zip(*logs)]
        style = '-' if i < 10 else '--'  # there are ten colours
        axes.plot([entry['step'] for entry in logs[0]], accuracies, style, label=name)
    axes.set(xlabel='step', ylabel='accuracy (%)')
    axes.legend(fontsize=8)
    figure.savefig(output / 'learning_curves.svg')
    plt.close(figure)


def _are_integers(values: Any, minimum: int) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(type(x) is int and x >= minimum for x in values)


def read_recipe(path: Path, changes: Dict[str, Any]) -> Dict[str, Any]:
    """Read and check a recipe.

    Raises:
        ValueError: A key is unknown or missing, a model is not registered, or a list is none of integers.
    """
    recipe = {**_DEFAULTS, **yaml.safe_load(path.read_text()), **changes}
    known = {*_DEFAULTS, 'dataset', 'runs'}
    missing, unknown = sorted(known - recipe.keys()), sorted(recipe.keys() - known)
    if missing or unknown:
        raise ValueError(f'{path}: missing keys {missing}, unknown keys {unknown}; known are {sorted(known)}')
    if recipe['dataset'] not in _DATA_SETS:
        raise ValueError(f"{path}: dataset must be one of {_DATA_SETS}, got {recipe['dataset']!r}")
    channels = recipe['conv_stem']
    if channels is not None and not _are_integers(channels, 1):
        raise ValueError(f'{path}: conv_stem must be a list of numbers of channels, got {channels!r}')
    for label, run in recipe['runs'].items():
        if not timm.is_model(run.get('model', '')):
            raise ValueError(f"{path}: run {label!r} names the model {run.get('model')!r}, which is not registered")
        run['seeds'] = changes.get('seeds') or run.get('seeds', recipe['seeds'])
        if not _are_integers(run['seeds'], 0):
            raise ValueError(f"{path}: seeds of run {label!r} must be a list of integers, got {run['seeds']!r}")
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('recipe', type=Path, help='YAML file')
    parser.add_argument('--data-dir', required=True, help='folder of the data set')
    parser.add_argument('--output', required=True, type=Path, help='folder of the results')
    parser.add_argument('--runs', nargs='+', metavar='LABEL', help="these of the recipe's runs alone")
    parser.add_argument('--seeds', nargs='+', type=int, help="in place of the recipe's")
    parser.add_argument('--steps', type=int, help="in place of the recipe's")
    args = parser.parse_args()
    changes = {key: getattr(args, key) for key in ('seeds', 'steps') if getattr(args, key) is not None}
    try:
        recipe = read_recipe(args.recipe, changes)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    if args.runs:
        unknown = sorted(set(args.runs) - recipe['runs'].keys())
        if unknown:
            parser.error(f"--runs: {unknown} are not in {args.recipe}; it has {sorted(recipe['runs'])}")
        recipe['runs'] = {label: recipe['runs'][label] for label in args.runs}

    folders = {
        (label, seed): args.output / label / f'seed{seed}'
        for label, run in recipe['runs'].items() for seed in run['seeds']}
    for (label, _), folder in folders.items():
        file = folder / 'settings.json'
        if file.is_file() and json.loads(file.read_text()) != _settings(recipe, recipe['runs'][label]):
            parser.error(f'--output: {folder} was trained with other settings; choose another folder, or delete it')
    todo = {run: folder for run, folder in folders.items() if not (folder / 'result.json').is_file()}
    if todo:
        train, test = (load_split(recipe, args.data_dir, split) for split in ('train', 'validation'))
        for (label, seed), folder in todo.items():
            train_run(recipe, recipe['runs'][label], seed, folder, train, test)
    report(recipe, args.output)


if __name__ == '__main__':
    main()
