""" What the memory holds, measured: benchmarks/ANALYSIS.md.

    python -m benchmarks.analysis --data-dir CIFAR10 --second-data-dir FLOWERS12 --pets-dir PETS

Trains the short runs, about half an hour on one core, measures them and the shipped checkpoints, and writes the page
and its figures. Data sets are ImageFolders, train/<class>/* and validation/<class>/*; the second, photographs of
flowers, is resized to 64 px. What was trained or measured once is kept in the output folder.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from tqdm import tqdm

import timm_ait
from timm_ait import analysis
from timm_ait.data import triangle
from timm_ait.layers.published import PublishedWorkspace
from timm_ait.models.coordination import SharedWorkspace
from timm_ait.ops.memory import slot_statistics
from timm_ait.weights import weights_dir

STEPS, WARMUP_STEPS, BATCH_SIZE, LEARNING_RATE = 240, 20, 64, 1e-3
TOKENS = 16  # of an image, in both data sets
CURVE_EVERY = 20  # steps between two looks at the memory
NUM_BATCHES = 8  # for figures of tokens; accuracies are of more images
MAX_IMAGES = 2048  # of a shipped checkpoint
NUM_CLUSTERS = 16
SPEED_MODEL = 'ait_vit_small_patch14_dinov2.pets'  # 12 blocks
NOISES, BETAS = (0., 0.25, 0.5, 0.75, 1., 1.5, 2., 3.), (0.5, 1., 2., 4., 8., 16.)

Batches = List[Tuple[torch.Tensor, torch.Tensor]]  # images (B, C, S, S), normalised, and labels (B,)

# px, patch
INPUTS = {'cifar10': (32, 8), 'flowers12': (64, 16)}
TITLES = {'cifar10': 'CIFAR-10', 'flowers12': 'Flowers'}
BODY = dict(embed_dim=128, depth=3, num_heads=4)

# as shares of a batch's tokens; the paper's is 512 of 32,768, or 1/64
BOTTLENECKS = {'1/512': 1 / 512, '1/256': 1 / 256, '1/128': 1 / 128, '1/64': 1 / 64, '1/16': 1 / 16, '1/4': 1 / 4}
GRID_BOTTLENECKS = ('1/256', '1/64', '1/8')
SLOTS = (8, 32, 64)
BALANCE = (0., 0.01, 0.1)
BASE = dict(num_slots=32, bottleneck=1 / 64)


class Run(NamedTuple):
    """ A short training run: data set, seed, model and its arguments. """
    data: str
    seed: int
    model: str
    arguments: Dict[str, Any]

    @property
    def name(self) -> str:
        arguments = [f'{key}={round(value, 6) if isinstance(value, float) else value}'
                     for key, value in self.arguments.items()]
        return '-'.join([self.data, self.model, *arguments, f'seed={self.seed}'])

    def file(self, folder: Path) -> Path:
        """Where its weights are."""
        return folder / f'{self.name}.pt'


def _ait(data: str, seed: int = 0, **arguments) -> Run:
    return Run(data, seed, 'ait_small', {**BASE, **arguments})


def _share(text: str) -> float:
    numerator, denominator = map(int, text.split('/'))
    return numerator / denominator


MEMORIES = {
    'orthogonal (default)': _ait('cifar10'),
    'published layer': _ait('cifar10', published=True),
    'learned, never written': _ait('cifar10', write=False),
    'reset before every write': _ait('cifar10', reset_memory=True),
    'written, never read': _ait('cifar10', retrieval=False),
    'Coordination, one per image': Run('cifar10', 0, 'coordination_small', {'slot_dim': 80}),
    'none (ViT)': Run('cifar10', 0, 'ait_small', {'workspace': False}),
}


def default_free(run: Run) -> Run:
    """A run without the arguments that have their defaults."""
    return run._replace(arguments={
        key: value for key, value in run.arguments.items()
        if (key, value) not in (('memory_update', 'orthogonal'), ('balance_weight', 0.01))})


def runs() -> List[Run]:
    """All runs, each once."""
    listed = [_ait(data, seed) for data, seeds in (('cifar10', 3), ('flowers12', 2)) for seed in range(seeds)]
    listed += [run._replace(seed=seed) for seed in range(2) for run in MEMORIES.values()]
    listed += [_ait('cifar10', bottleneck=_share(text)) for text in BOTTLENECKS]
    for data in INPUTS:
        listed += [
            _ait(data, memory_update=rule, balance_weight=weight)
            for rule in ('orthogonal', 'normalize') for weight in BALANCE]
        listed += [
            _ait(data, num_slots=slots, bottleneck=_share(text)) for slots in SLOTS for text in GRID_BOTTLENECKS]
        listed += [
            _ait(data, num_slots=slots, memory_update='normalize', balance_weight=weight)
            for slots in SLOTS for weight in BALANCE[:2]]
    return list({run.name: run for run in map(default_free, listed)}.values())


# data


class Split(NamedTuple):
    """ Images (n, 3, S, S), uint8, and labels (n,). """
    images: torch.Tensor
    labels: torch.Tensor

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def load_split(folder: Path, split: str, size: int) -> Split:
    dataset = create_dataset('', root=folder, split=split)
    images, labels = [], []
    for image, label in dataset:
        image = image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(label)
    return Split(torch.stack(images), torch.tensor(labels))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1.


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images flipped at random, and shifted by up to an eighth of their size."""
    size = images.shape[-1]
    padding = size // 8
    padded = F.pad(images, (padding,) * 4, mode='reflect')
    shifts = torch.randint(2 * padding + 1, (len(images), 2), generator=generator).tolist()
    flips = torch.rand(len(images), generator=generator) < 0.5
    cut = torch.stack([image[:, y:y + size, x:x + size] for image, (y, x) in zip(padded, shifts)])
    return torch.where(flips.view(-1, 1, 1, 1), cut.flip(-1), cut)


def shuffled_batches(split: Split, generator: torch.Generator) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Batches for ever, each epoch in another order."""
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for indices in order.split(BATCH_SIZE):
            if len(indices) == BATCH_SIZE:
                yield normalised(augmented(split.images[indices].float(), generator)), split.labels[indices]


# training


def create_run_model(run: Run, num_classes: int) -> torch.nn.Module:
    size, patch_size = INPUTS[run.data]
    arguments = dict(run.arguments)
    published = arguments.pop('published', False)
    model = timm.create_model(
        run.model, num_classes=num_classes, img_size=size, patch_size=patch_size, **BODY, **arguments)
    if published:
        for block in model.blocks:
            block.mlp.workspace = PublishedWorkspace(BODY['embed_dim'], **BASE)
    return model


def train(run: Run, splits: Dict[str, Split], folder: Path) -> None:
    """Train a run and write its weights and curves, unless they are there."""
    file = run.file(folder)
    if file.exists():
        return
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = create_run_model(run, splits['train'].num_classes)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LEARNING_RATE, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=STEPS, warmup_t=WARMUP_STEPS, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False)
    curve, start = [], time.perf_counter()
    batches = shuffled_batches(splits['train'], generator)
    for step, (images, labels) in enumerate(itertools.islice(batches, STEPS)):
        scheduler.step_update(step)
        loss = F.cross_entropy(model(images), labels)
        balance = timm_ait.balance_loss(model)
        optimizer.zero_grad()
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        if step % CURVE_EVERY == CURVE_EVERY - 1 or step == 0:
            curve.append({
                'step': step + 1,
                'loss': loss.item(),
                'balance_loss': balance.item(),
                'memory': timm_ait.memory_statistics(model),
            })
    temporary = file.with_suffix('.tmp')
    torch.save({'state_dict': model.state_dict(), 'curve': curve, 'seconds': time.perf_counter() - start}, temporary)
    os.replace(temporary, file)


# measuring


def evaluation_batches(split: Split) -> Batches:
    """All images in batches of the size of training, classes mixed; the last may be smaller."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))
    return [(normalised(split.images[indices]), split.labels[indices]) for indices in order.split(BATCH_SIZE)]


def model_batches(model: torch.nn.Module, folder: Path, number: int) -> Batches:
    """Validation images as a model wants them, `number` of them or all, classes mixed."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', root=folder, split='validation')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:number]
    samples = [dataset[index] for index in order.tolist()]
    images = torch.stack([transform(image.convert('RGB')) for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE)))


def triangle_batches(model: torch.nn.Module, number: int) -> Batches:
    """Validation images of Triangle of seed 0, as its model wants them."""
    config = resolve_model_data_config(model)
    images, labels, _ = triangle.triangles(0, triangle.NUM_TRAIN + np.arange(number))
    x = (torch.from_numpy(images)[:, None].float() / 255. - config['mean'][0]) / config['std'][0]
    x = x.expand(-1, config['input_size'][0], -1, -1)
    return list(zip(x.split(BATCH_SIZE), torch.from_numpy(labels).split(BATCH_SIZE)))


def load_run(run: Run, folder: Path, num_classes: int) -> Tuple[torch.nn.Module, Dict[str, Any]]:
    """Model of a trained run in evaluation mode, and what `train` wrote beside it."""
    trained = torch.load(run.file(folder))
    model = create_run_model(run, num_classes)
    model.load_state_dict(trained.pop('state_dict'))
    return model.eval(), trained


def purities(model: torch.nn.Module, batches: Batches) -> Dict[str, Dict[str, float]]:
    """Preferences of the slots of each layer for classes of images and for clusters of tokens, beside chance."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    for name, tokens in analysis.collect_tokens(model, images).items():
        workspace = model.get_submodule(name)
        if not workspace.writes:
            continue
        weights = analysis.write_attention(workspace, tokens).mean(dim=0)
        tokens = tokens.flatten(0, 1)
        kinds = {
            'class': labels.repeat_interleave(len(tokens) // len(labels)),
            'cluster': analysis.kmeans(tokens, NUM_CLUSTERS, generator=generator),
        }
        result[name] = {}
        for kind, types in kinds.items():
            shuffled = types[torch.randperm(len(types), generator=generator)]
            result[name][kind] = float(analysis.slot_purity(weights, types).mean())
            result[name][f'{kind}_by_chance'] = float(analysis.slot_purity(weights, shuffled).mean())
    return result


def measure_model(model: torch.nn.Module, batches: Batches) -> Dict[str, Any]:
    """All figures of an image classifier, those of tokens over the first NUM_BATCHES batches."""
    few = batches[:NUM_BATCHES]
    result: Dict[str, Any] = {
        'num_images': sum(len(labels) for _, labels in batches),
        'interactions': {
            name: counts.tolist() for name, counts in analysis.self_attention_interactions(model, few[0][0]).items()},
    }
    if any(isinstance(module, SharedWorkspace) for module in model.modules()):
        result['layers'] = {
            name: {**analysis.competition(attention), **_mean(list(map(slot_statistics, memories)))}
            for name, (attention, memories) in analysis.coordination_writes(model, few[0][0]).items()}
    elif timm_ait.memory_statistics(model):
        result['layers'] = analysis.analyse(model, (images for images, _ in few))
        result['purity'] = purities(model, few)
        if any(module.retrieves for module in analysis.workspaces(model).values()):
            result['contribution'] = analysis.contribution(model, batches)
    if 'contribution' in result:
        result['accuracy'] = result['contribution']['unchanged']
    else:
        result['accuracy'] = analysis.accuracy(model, batches)
    return result


def _mean(parts: List[Dict[str, float]]) -> Dict[str, float]:
    return {key: statistics.fmean(part[key] for part in parts) for key in parts[0]}


def measure_run(run: Run, data: Dict[str, Dict[str, Split]], folder: Path) -> Dict[str, Any]:
    """Figures of a trained run, read where they have been measured before."""
    file = run.file(folder).with_suffix('.json')
    if not file.exists():
        splits = data[run.data]
        model, trained = load_run(run, folder, splits['train'].num_classes)
        write_json({**trained, **measure_model(model, evaluation_batches(splits['validation']))}, file)
    return json.loads(file.read_text())


def measure_basins(model: torch.nn.Module) -> Dict[str, Dict[str, List[float]]]:
    """Share of the priors of each layer that come back, by beta, for each of NOISES."""
    result = {}
    for name, workspace in analysis.workspaces(model).items():
        priors = analysis.attractors(workspace)
        result[name] = {
            f'{beta:g}': [
                float(analysis.basins(priors, beta, noise, generator=torch.Generator().manual_seed(0)).mean())
                for noise in NOISES]
            for beta in BETAS}
    return result


def measure_shipped(name: str, folders: Dict[str, Optional[Path]], folder: Path) -> Dict[str, Any]:
    """Figures of a shipped checkpoint `<arch>.<data set>`; those of its memory alone where there are no images."""
    model = timm.create_model(name, pretrained=True).eval()
    file = folder / f'shipped-{name}.json'
    data = name.rpartition('.')[2]
    if data != 'triangle' and folders.get(data) is None:
        measured: Dict[str, Any] = {
            'layers': {
                layer: {
                    **slot_statistics(workspace.stored_memory()),
                    **{f'attractor_{key}': value
                       for key, value in slot_statistics(analysis.attractors(workspace)).items()},
                } for layer, workspace in analysis.workspaces(model).items()}}
    else:
        if not file.exists():
            # a large model gets fewer images
            number = MAX_IMAGES if len(model.blocks) < 6 else MAX_IMAGES // 8
            batches = triangle_batches(model, number) if data == 'triangle' else \
                model_batches(model, folders[data], number)
            write_json(measure_model(model, batches), file)
        measured = json.loads(file.read_text())
    return {**measured, 'basins': measure_basins(model)}


def measure_agreement(runs_: List[Run], data: Dict[str, Dict[str, Split]], folder: Path) -> List[Dict[str, Any]]:
    """Agreement of the slots of each layer between seeds, of trained models and of the same before training."""
    split = data[runs_[0].data]['validation']
    images = torch.cat([images for images, _ in evaluation_batches(split)[:NUM_BATCHES]])
    rows = []
    for trained in (False, True):
        maps = []
        for run in runs_:
            torch.manual_seed(run.seed)
            num_classes = data[run.data]['train'].num_classes
            model = load_run(run, folder, num_classes)[0] if trained else create_run_model(run, num_classes).eval()
            maps.append({
                name: {
                    'written': analysis.write_attention(model.get_submodule(name), tokens, 0.1).mean(dim=0),
                    'read': analysis.read_weights(model.get_submodule(name), tokens.flatten(0, 1)).T,
                } for name, tokens in analysis.collect_tokens(model, images).items()})
        for name in maps[0]:
            row: Dict[str, Any] = {'trained': trained, 'layer': name}
            for kind in ('written', 'read'):
                found = [
                    analysis.agreement(a[name][kind], b[name][kind], torch.Generator().manual_seed(0))
                    for a, b in itertools.combinations(maps, 2)]
                row[kind] = statistics.fmean(mean for mean, _, _ in found)
                row[f'{kind}_by_chance'] = statistics.fmean(chance for _, chance, _ in found)
            rows.append(row)
    return rows


def measure_bottlenecks(run: Run, data: Dict[str, Dict[str, Split]], folder: Path) -> Dict[str, Dict[str, float]]:
    """Competition in one trained model for several bottlenecks, mean over layers."""
    splits = data[run.data]
    model, _ = load_run(run, folder, splits['train'].num_classes)
    images = evaluation_batches(splits['validation'])[0][0]
    tokens = analysis.collect_tokens(model, images)
    return {
        text: _mean([
            analysis.competition(analysis.write_attention(model.get_submodule(name), x, _share(text)))
            for name, x in tokens.items()])
        for text in BOTTLENECKS}


def analyse_files(name: str, folder: Path, number: int) -> Tuple[int, float]:
    """Analyse validation images with a checkpoint; returns how many, and the peak memory of this process in GB."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', root=folder, split='validation')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:number]
    analysis.analyse(model, (
        torch.stack([transform(dataset[index][0].convert('RGB')) for index in indices])
        for indices in order.split(BATCH_SIZE)))
    peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]
    return len(order), int(peak) * 1024 / 1e9


def measure_speed(folders: Dict[str, Optional[Path]], folder: Path) -> Dict[str, Dict[str, float]]:
    """Seconds and peak memory in GB of analyses of numbers of images, each in a process of its own, from its start."""
    file = folder / 'speed.json'
    if not file.exists() and folders['pets']:
        measured = {}
        for number in (1, 1000):
            start = time.perf_counter()
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
                count, peak = pool.submit(analyse_files, SPEED_MODEL, folders['pets'], number).result()
            measured[str(count)] = {'seconds': time.perf_counter() - start, 'peak': peak}
        write_json({'threads': torch.get_num_threads(), 'numbers': measured}, file)
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(content: Any, file: Path) -> None:
    temporary = file.with_suffix('.tmp')
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


# the page


def table(header: List[str], rows: List[List[Any]]) -> str:
    """Markdown table; numbers at the right."""
    lines = [header, ['---'] + ['--:'] * (len(header) - 1), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def percent(value: float, digits: int = 1) -> str:
    return 'n/a' if value != value else f'{100. * value:.{digits}f}'


def plus_minus(values: List[float]) -> str:
    """Mean of seeds, with the standard deviation where there are several."""
    mean = f'{statistics.fmean(values):.1f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.1f}'


def over_layers(measured: Dict[str, Any], key: str, choose: Callable = statistics.fmean) -> float:
    return choose([figures[key] for figures in measured['layers'].values() if key in figures] or [float('nan')])


class Results:
    """ Figures of all runs and shipped checkpoints, measured or read. """

    def __init__(self, data: Dict[str, Dict[str, Split]], folders: Dict[str, Optional[Path]], folder: Path) -> None:
        self.data, self.folder = data, folder
        self.runs = {run.name: measure_run(run, data, folder) for run in tqdm(runs(), unit='run measured')}
        shipped = sorted(path.name for path in weights_dir().iterdir() if (path / 'model.safetensors').is_file())
        self.shipped = {
            name: measure_shipped(name, folders, folder) for name in tqdm(shipped, unit='checkpoint measured')}
        self.speed = measure_speed(folders, folder)

    def run(self, run: Run) -> Dict[str, Any]:
        return self.runs[default_free(run).name]

    def seeds(self, run: Run) -> List[Dict[str, Any]]:
        """Figures of a run's seeds, as many as were trained."""
        names = [default_free(run._replace(seed=seed)).name for seed in range(3)]
        return [self.runs[name] for name in names if name in self.runs]


def section(title: str, *paragraphs: str) -> str:
    return '\n\n'.join([f'## {title}', *paragraphs]) + '\n'


def competition_section(results: Results, figures: Path) -> str:
    fixed = measure_bottlenecks(default_free(_ait('cifar10')), results.data, results.folder)
    rows, ratios, even, accuracies = [], [], [], []
    for text in BOTTLENECKS:
        measured = results.run(_ait('cifar10', bottleneck=_share(text)))
        kept = round(_share(text) * BATCH_SIZE * TOKENS)
        effective, overlap, chance = (
            over_layers(measured, key) for key in ('effective_tokens', 'overlap', 'chance_overlap'))
        ratios.append(overlap / chance)
        even.append(effective / kept)
        accuracies.append(measured['accuracy'])
        rows.append([
            text,
            f'{effective:.1f} of {kept}',
            percent(over_layers(measured, 'coverage')),
            percent(overlap, 2),
            percent(chance, 2),
            percent(fixed[text]['coverage']),
            percent(fixed[text]['overlap'], 2),
            percent(measured['accuracy']),
        ])
    draw_bottlenecks(results, fixed, figures / 'analysis_bottleneck.svg')
    header = [
        'bottleneck', 'effective tokens', 'coverage', 'overlap', 'by chance', 'coverage, one model',
        'overlap, one model', 'accuracy']
    return section(
        'Do tighter bottlenecks mean more competition?',
        f"Models trained with a bottleneck of a share of a batch's {BATCH_SIZE * TOKENS} tokens (the paper's is 1/64), "
        'one seed each, beside one model, trained with 1/64, in which the other bottlenecks are tried. Coverage is the '
        'share of the tokens that any slot and head selects; overlap is the Jaccard index of the tokens that two slots '
        'of a head select; effective tokens are exp of the entropy of the write weights. All are means over layers.',
        table(header, rows),
        '![Coverage and overlap against the bottleneck](figures/analysis_bottleneck.svg)',
        '**Answer.** Of tokens for a place yes, of slots for tokens no. A tighter bottleneck leaves more tokens out: '
        f'coverage falls to {rows[0][2]} %. But slots do not divide those that are left, they want the same: two share '
        f'{ratios[-1]:.1f} times the tokens that they would by chance with the widest bottleneck, {ratios[0]:.1f} '
        'times with the tightest. Nor do tokens compete within a slot once they are selected: their weights are as '
        f'good as even ({percent(min(even))} to {percent(max(even))} % of them count), since the scores of slots of '
        f'unit norm hardly differ. Accuracy goes from {percent(min(accuracies))} to {percent(max(accuracies))} %, which one seed '
        'each cannot tell apart.',
        '**Open.** Whether scores that differ more (a learned temperature of the write, slots of a larger norm) make '
        'it one.',
    )


def draw_bottlenecks(results: Results, fixed: Dict[str, Dict[str, float]], file: Path) -> None:
    figure, axes = subplots(2)
    shares = [_share(text) for text in BOTTLENECKS]
    measured = [results.run(_ait('cifar10', bottleneck=share)) for share in shares]
    for axis, key in zip(axes, ('coverage', 'overlap')):
        axis.plot(shares, [over_layers(m, key) for m in measured], 'o-', label='trained with it')
        axis.plot(shares, [fixed[text][key] for text in BOTTLENECKS], 's--', label='trained with 1/64')
        axis.set(xscale='log', xlabel='bottleneck, share of the tokens', title=key)
        axis.set_xticks(shares, BOTTLENECKS, fontsize=7)
        axis.minorticks_off()
    axes[1].plot(shares, [over_layers(m, 'chance_overlap') for m in measured], ':', color='grey', label='by chance')
    axes[1].set(yscale='log')
    axes[1].legend()
    save_figure(figure, file)


def sizes_section(results: Results) -> str:
    tables, answers = [], []
    for data, title in TITLES.items():
        rows, accuracies = [], []
        for slots in SLOTS:
            row: List[Any] = [slots]
            for text in GRID_BOTTLENECKS:
                measured = results.run(_ait(data, num_slots=slots, bottleneck=_share(text)))
                accuracies.append(measured['accuracy'])
                row += [percent(measured['accuracy']), percent(over_layers(measured, 'coverage'), 0)]
            rows.append(row)
        seeds = [measured['accuracy'] for measured in results.seeds(_ait(data))]
        header = ['slots', *(f'{name} at {text}' for text in GRID_BOTTLENECKS for name in ('accuracy', 'coverage'))]
        tables += [f'{title}:', table(header, rows)]
        answers.append(
            f'from {percent(min(accuracies))} to {percent(max(accuracies))} % on {title}, where {len(seeds)} seeds of '
            f'one setting go from {percent(min(seeds))} to {percent(max(seeds))} %')
    count = len(results.data['flowers12']['validation'].labels)
    return section(
        'Which numbers of slots and which bottleneck suit which data?',
        'Slots of width 32, one seed each.',
        *tables,
        f'**Answer.** None stands out at this budget. Accuracy goes {"; ".join(answers)} (one image of {count} is '
        f'{100 / count:.1f} points). What the sizes decide is how many tokens are seen at all: coverage.',
        '**Open.** Runs long enough for the memory to matter, with three seeds each.',
    )


def balance_section(results: Results) -> str:
    rows, ranks, coverage = [], {}, {}
    for data, title in TITLES.items():
        for rule in ('orthogonal', 'normalize'):
            for slots in (SLOTS if rule == 'normalize' else (32,)):
                for weight in (BALANCE if slots == 32 else BALANCE[:2]):
                    measured = results.run(_ait(data, num_slots=slots, memory_update=rule, balance_weight=weight))
                    key = (data, rule, slots, weight)
                    ranks[key] = over_layers(measured, 'effective_rank', min)
                    coverage[key] = over_layers(measured, 'coverage')
                    rows.append([
                        f'{title}, {rule}, {slots} slots, {weight:g}',
                        f'{ranks[key]:.1f} of {min(slots, 32)}',
                        f'{over_layers(measured, "mean_cosine", max):.2f}',
                        percent(coverage[key]),
                        percent(over_layers(measured, 'overlap')),
                        percent(measured['accuracy']),
                    ])
    collapsed = [rank for (_, rule, _, _), rank in ranks.items() if rule == 'normalize']
    rises = [
        coverage[data, 'normalize', slots, BALANCE[1]] > coverage[data, 'normalize', slots, BALANCE[0]]
        for data in INPUTS for slots in SLOTS]
    spread = ', from '.join(
        f'{" to ".join(percent(coverage[data, "orthogonal", 32, weight]) for weight in BALANCE)} % on {title}'
        for data, title in TITLES.items())
    return section(
        'How does the balance loss change the diversity of the priors?',
        "Its weight (none, the paper's 0.01, and 0.1) under the rule that keeps slots orthonormal and under the "
        'published one, over data and numbers of slots, one seed each: lowest effective rank and highest mean cosine '
        'of the slots of any layer, mean coverage and overlap.',
        table(['data, rule, slots, weight', 'rank', 'cosine', 'coverage', 'overlap', 'accuracy'], rows),
        '![Rank over training](figures/analysis_rank.svg)',
        '**Answer.** It spreads what slots select and does not keep the slots apart, on both data sets and at all '
        f'three sizes. Under the published rule they collapse with it as without, to a rank of {min(collapsed):.1f} to '
        f"{max(collapsed):.1f} in the worst layer, within {STEPS} steps; the paper's weight raises the coverage in "
        f'{sum(rises)} of {len(rises)} cases. Under the orthogonal rule the rank is full by construction, and the '
        f'coverage goes with the weight from {spread}.',
        '**Open.** Longer training, and a loss whose gradient reaches tokens that were not selected.',
    )


def draw_ranks(results: Results, file: Path) -> None:
    figure, axes = subplots(1)
    labels = {
        'orthogonal': _ait('cifar10'),
        'published layer': _ait('cifar10', published=True),
        **{f'normalize, balance {weight:g}': _ait('cifar10', memory_update='normalize', balance_weight=weight)
           for weight in BALANCE},
    }
    for label, run in labels.items():
        curve = results.run(run)['curve']
        ranks = [min(memory['effective_rank'] for memory in point['memory'].values()) for point in curve]
        axes[0].plot([point['step'] for point in curve], ranks, label=label)
    axes[0].set(xlabel='step', ylabel='effective rank of the lowest layer', ylim=(0, 34))
    axes[0].legend()
    save_figure(figure, file)


def memories_section(results: Results) -> str:
    rows, means = [], {}
    for label, run in MEMORIES.items():
        seeds = results.seeds(run)
        means[label] = statistics.fmean(measured['accuracy'] for measured in seeds)
        with_memory = [measured for measured in seeds if 'layers' in measured]
        ranks = [over_layers(measured, 'effective_rank', min) for measured in with_memory]
        rows.append([
            label,
            len(seeds),
            plus_minus([100. * measured['accuracy'] for measured in seeds]),
            f'{statistics.fmean(ranks):.1f}' if ranks else '',
            *(percent(statistics.fmean(values)) if values and values[0] == values[0] else ''
              for values in ([over_layers(m, key) for m in with_memory] for key in ('coverage', 'overlap'))),
        ])
    worst, best = min(means, key=means.get), max(means, key=means.get)
    return section(
        'How does this memory compare with others?',
        'CIFAR-10. Coordination has 8 slots of width 80 for each image, in place of self-attention, so that its rank '
        'is one of 8 and its coverage one of the tokens of an image.',
        table(['memory', 'seeds', 'accuracy', 'lowest rank', 'coverage', 'overlap'], rows),
        f'**Answer.** Accuracy does not tell: from {percent(means[worst])} % for "{worst}" to {percent(means[best])} % '
        f'for "{best}". The memories themselves differ: the published one has collapsed to a rank of '
        f'{rows[1][3]} and sees {rows[1][4]} % of the tokens, the orthogonal one has a rank of {rows[0][3]} and sees '
        f'{rows[0][4]} %.',
        f'**Open.** All that needs a trained network: after {STEPS} steps these are far from their final accuracy. '
        '[RESULTS.md](RESULTS.md) has longer runs.',
    )


def attractors_section(results: Results, figures: Path) -> str:
    rows, stored, least = [], {}, set()
    for name, measured in results.shipped.items():
        for layer, of_layer in measured['layers'].items():
            back = measured['basins'][layer]
            stored.setdefault(name, []).append(back['1'][0])
            beta = next((beta for beta in back if back[beta][0] > 0.999), f'more than {max(BETAS):g}')
            least.add(beta)
            rows.append([
                f'{name}, {short(layer)}',
                f'{of_layer["attractor_effective_rank"]:.1f}',
                f'{of_layer["attractor_mean_cosine"]:.2f}',
                percent(back['1'][0], 0),
                percent(back['1'][NOISES.index(1.)], 0),
                beta,
                *(f'{of_layer[key]:.1f}' if key in of_layer else '' for key in ('num_fixed_points', 'steps')),
                percent(of_layer['distance'], 0) if 'distance' in of_layer else '',
            ])
    draw_basins(results, figures / 'analysis_basins.svg')
    rises = [
        of_layer['energy_rises'] for measured in [*results.shipped.values(), *results.runs.values()]
        for of_layer in measured.get('layers', {}).values() if 'energy_rises' in of_layer]
    shares = '; '.join(
        f'{name} {" to ".join(dict.fromkeys(percent(choose(values), 0) for choose in (min, max)))} %'
        for name, values in stored.items())
    header = [
        'checkpoint, layer', 'rank', 'cosine', 'attractors', 'back after noise', 'least β for all', 'fixed points',
        'steps', 'distance']
    return section(
        'Are the priors attractors with basins?',
        'Slots of the shipped checkpoints, lifted to token width: their effective rank and mean cosine; the share of '
        'them that are attractors at the β of training, 1 (retrieval that starts there and is repeated ends within a '
        'quarter of the distance to the nearest other prior); the share that come back when moved by their own norm, '
        'in random directions within the span of the differences of priors; and the least β tried '
        f'({", ".join(f"{beta:g}" for beta in BETAS)}) at which all are attractors. Then tokens of images, where there '
        'are: in how many fixed points those of a batch end, after how many steps, and how far away, in percent of '
        'their norm.',
        table(header, rows),
        '![Share of priors that return](figures/analysis_basins.svg)',
        '**Answer.** There is a threshold in β. Below it, repeated retrieval takes priors and tokens to one fixed '
        'point near the mean of all; above, every prior is an attractor with a basin about as wide as its norm. The '
        f'β = 1 of training lies below the threshold or about it. Attractors at β = 1, by layer: {shares}. A retrieval '
        f'step raises the energy of {percent(max(rises))} % of the tokens, as theory has it.',
        '**Open.** Training with a larger β or with several retrieval steps, where basins could matter to the output: '
        'with the one step of the paper, no token is ever at a fixed point when it is read.',
    )


def short(layer: str) -> str:
    return layer.removesuffix('.mlp.workspace').replace('blocks.', 'block ')


def draw_basins(results: Results, file: Path) -> None:
    figure, axes = subplots(len(results.shipped), sharey=True)
    for axis, (name, measured) in zip(axes, results.shipped.items()):
        layers = list(measured['basins'].values())
        for beta in layers[0]:
            axis.plot(
                NOISES, [statistics.fmean(layer[beta][i] for layer in layers) for i in range(len(NOISES))], 'o-',
                label=f'β = {beta}')
        axis.set(title=name.replace('.', '\n', 1), xlabel='noise, relative to the prior', ylim=(-0.03, 1.03))
    axes[0].set(ylabel='share of priors that return')
    axes[-1].legend()
    save_figure(figure, file)


def read_section(results: Results, figures: Path) -> str:
    measured = {
        **{name: [m] for name, m in results.shipped.items() if 'contribution' in m},
        **{f'short run, {label}': results.seeds(MEMORIES[label])
           for label in ('orthogonal (default)', 'published layer', 'learned, never written')},
        'short run, orthogonal, flowers': results.seeds(_ait('flowers12')),
    }
    rows, removed, constant = [], [], []
    for label, seeds in measured.items():
        mean = {key: statistics.fmean(m['contribution'][key] for m in seeds) for key in seeds[0]['contribution']}
        for losses, how in ((removed, 'removed'), (constant, 'constant')):
            losses.append(100. * (mean['unchanged'] - mean[how]))
        rows.append([
            label,
            seeds[0]['num_images'],
            *(percent(mean[key]) for key in ('unchanged', *analysis.REPLACEMENTS)),
            percent(statistics.fmean(over_layers(m, 'residual_share') for m in seeds), 2),
            percent(statistics.fmean(over_layers(m, 'constant_share') for m in seeds), 0),
        ])
    draw_contributions(measured, figures / 'analysis_contribution.svg')
    without, with_ = (
        plus_minus([100. * m['accuracy'] for m in results.seeds(run)])
        for run in (MEMORIES['written, never read'], _ait('cifar10')))
    header = ['model', 'images', 'unchanged', *analysis.REPLACEMENTS, 'read / residual', 'the same for all']
    return section(
        'What does the Hopfield read add by itself?',
        'Accuracy of trained models whose reading is removed, or replaced by its mean over all tokens of the batch '
        '(constant), or done from other slots: with the features of all slots shuffled, or random ones, orthonormal as '
        "the memory's rule has it. Then the norm of the reading in percent of that of the residual stream behind the "
        'block, and the share of the energy of the readings that is the same for all tokens, means over layers.',
        table(header, rows),
        '![Accuracy without the memory](figures/analysis_contribution.svg)',
        f'**Answer.** Little that accuracy would show. The reading as a whole is worth {min(removed):+.1f} to '
        f'{max(removed):+.1f} points, but what depends on the token in it, which is retrieval proper, only '
        f'{min(constant):+.1f} to {max(constant):+.1f}. Short runs on CIFAR-10 reach {without} % without reading and '
        f'{with_} % with it.',
        '**Open.** Models in which reading is the only way from token to token (`attention=False`), after more steps.',
    )


def draw_contributions(measured: Dict[str, List[Dict[str, Any]]], file: Path) -> None:
    figure, axes = subplots(1, width=9.)
    keys = ('unchanged', *analysis.REPLACEMENTS)
    for i, key in enumerate(keys):
        axes[0].bar(
            [j + (i - 2) * 0.16 for j in range(len(measured))],
            [100 * statistics.fmean(m['contribution'][key] for m in seeds) for seeds in measured.values()], 0.15,
            label=key)
    axes[0].set_xticks(
        range(len(measured)), [label.replace(', ', '\n').rpartition('.')[2] for label in measured], fontsize=8)
    axes[0].set(ylabel='top-1 accuracy, %')
    axes[0].legend(ncol=len(keys), loc='lower center', bbox_to_anchor=(0.5, 1.))
    save_figure(figure, file)


def sparsity_section(results: Results, figures: Path) -> str:
    models = {
        'AiT': _ait('cifar10'), 'published AiT': MEMORIES['published layer'], 'ViT': MEMORIES['none (ViT)']}
    compared = {label: results.run(run) for label, run in models.items()}
    shipped = {name: measured for name, measured in results.shipped.items() if measured.get('interactions')}
    rows = []
    for label, measured in {**compared, **shipped}.items():
        blocks = list(measured['interactions'].values())
        of_tokens = TOKENS if label in compared else num_tokens(label)
        first, middle, last = (
            f'{min(counts):.1f} to {max(counts):.1f}' for counts in (blocks[0], blocks[len(blocks) // 2], blocks[-1]))
        rows.append([label, of_tokens, first, middle if len(blocks) > 2 else '', last])
    draw_interactions(compared, figures / 'analysis_interactions.svg')
    means = ', '.join(
        f'{label} ' + plus_minus([
            statistics.fmean(sum(measured['interactions'].values(), [])) for measured in results.seeds(run)])
        for label, run in models.items())
    return section(
        'Is self-attention sparser with a workspace?',
        "How many keys carry 90 % of a query's attention, mean over queries, from the least to the most of the heads "
        "of a block: the measure of the paper's figure 5. Short runs of seed 0, and the shipped checkpoints.",
        table(['model', 'tokens', 'first block', 'middle', 'last'], rows),
        '![Interactions by head](figures/analysis_interactions.svg)',
        f'**Answer.** Not by more than seeds differ. Mean over all heads of the short runs: {means} of {TOKENS}.',
        '**Open.** Longer training, in which heads become sparser.',
    )


def num_tokens(name: str) -> int:
    model = timm.create_model(name, pretrained=False)
    return model.patch_embed.num_patches + model.num_prefix_tokens


def draw_interactions(compared: Dict[str, Dict[str, Any]], file: Path) -> None:
    figure, axes = subplots(3, sharey=True)
    for i, axis in enumerate(axes):
        for label, measured in compared.items():
            counts = list(measured['interactions'].values())[i]
            axis.plot(range(1, len(counts) + 1), sorted(counts), 'o-', label=label)
        axis.set(title=f'block {i}', xlabel='heads, sorted')
        axis.set_xticks(range(1, len(counts) + 1))
    axes[0].set(ylabel='keys with 90 % of the attention', ylim=(0, TOKENS))
    axes[-1].legend()
    save_figure(figure, file)


def specialisation_section(results: Results) -> str:
    measured = {
        **{name: m for name, m in results.shipped.items() if 'purity' in m},
        'short run, CIFAR-10': results.run(_ait('cifar10')),
        'short run, published layer': results.run(_ait('cifar10', published=True)),
        'short run, flowers': results.run(_ait('flowers12')),
    }
    keys = ('class', 'class_by_chance', 'cluster', 'cluster_by_chance')
    rows = []
    for label, m in measured.items():
        purity = _mean(list(m['purity'].values()))
        rows.append([label, *(percent(purity[key]) for key in keys)])
    agreement = measure_agreement(
        [default_free(_ait('cifar10', seed)) for seed in range(3)], results.data, results.folder)
    seed_rows = [
        [f'{"trained" if row["trained"] else "untrained"}, {short(row["layer"])}',
         *(f'{row[key]:.2f}' for key in ('written', 'written_by_chance', 'read', 'read_by_chance'))]
        for row in agreement]
    means = {
        (kind, trained): statistics.fmean(row[kind] for row in agreement if row['trained'] == trained)
        for kind in ('written', 'read') for trained in (False, True)}
    return section(
        'Do slots specialise, and do seeds agree?',
        "Share of a slot's write weight on its favourite kind of token, mean over slots and layers. Kinds are the "
        f"class of the token's image, or {NUM_CLUSTERS} k-means clusters of the layer's tokens; chance is the same "
        'with kinds shuffled.',
        table(['model', 'class', 'by chance', 'cluster', 'by chance'], rows),
        'Three seeds of the default on the same CIFAR-10 images: correlation over tokens of what slots would write '
        '(the weights of a tenth of the tokens) and of how much tokens read them, between slots matched by assignment, '
        'mean over pairs of seeds. Untrained models are those before their first step; chance is the same with tokens '
        'shuffled.',
        table(['model', 'written', 'by chance', 'read', 'by chance'], seed_rows),
        '**Answer.** A little: slots prefer kinds of token by a few points more than chance, clusters more than '
        f'classes. And seeds agree, matched slots correlate at {means["written", True]:.2f} in what they would write '
        f'and at {means["read", True]:.2f} in who reads them; of which most, {means["written", False]:.2f} and '
        f'{means["read", False]:.2f}, is there before the first step of training.',
        '**Open.** Whether slots mean something to people: `python -m timm_ait explain` draws them on pictures of '
        'your own.',
    )


def speed_section(speed: Dict[str, Any]) -> str:
    return section(
        'How long does an analysis take?',
        f'`timm_ait.analysis.analyse` of {SPEED_MODEL} (12 blocks, images of 196 px) over photographs of pets in '
        f'batches of {BATCH_SIZE}: from the start of the process, with loading the model and reading the files, on '
        f'{speed["threads"]} CPU cores.',
        table(['images', 'seconds', 'peak memory, GB'], [
            [f'{int(number):,}', f'{measured["seconds"]:.1f}', f'{measured["peak"]:.2f}']
            for number, measured in speed['numbers'].items()]),
    )


def subplots(number: int, width: float = 0., **kwargs) -> Tuple[Any, List[Any]]:
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams.update({
        'svg.hashsalt': 'timm_ait', 'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
        'legend.frameon': False, 'legend.fontsize': 8})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, number, figsize=(width or max(5., 3.2 * number), 3.2), squeeze=False, **kwargs)
    return figure, list(axes[0])


def save_figure(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    file.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, metadata={'Date': None})  # the same figure is the same file
    pyplot.close(figure)


def write_page(results: Results, page: Path) -> None:
    figures = page.parent / 'figures'
    draw_ranks(results, figures / 'analysis_rank.svg')
    seconds = sum(measured['seconds'] for measured in results.runs.values())
    sections = [
        '# What the memory holds\n\n'
        'Written by `python -m benchmarks.analysis --data-dir CIFAR10 --second-data-dir FLOWERS12 --pets-dir PETS`, '
        'every number in it. The measures are functions of [`timm_ait.analysis`](../timm_ait/analysis.py).\n\n'
        f'Looked at are the shipped checkpoints and {len(results.runs)} short runs: three blocks of width '
        f'{BODY["embed_dim"]}, {TOKENS} tokens an image (CIFAR-10 at 32 px in patches of 8, 12 kinds of flower at 64 '
        f'px in patches of 16), {STEPS} steps of {BATCH_SIZE}, a bottleneck of 1/64 and 32 slots of width 32 unless '
        f'said otherwise. So short a run (all took {seconds / 60:.0f} minutes of a shared core) shows how a mechanism '
        'behaves, not what it is worth in the end, and a difference in accuracy of two or three points between single '
        'seeds says nothing. Accuracies and shares are in percent.\n',
        competition_section(results, figures),
        sizes_section(results),
        balance_section(results),
        memories_section(results),
        attractors_section(results, figures),
        read_section(results, figures),
        sparsity_section(results, figures),
        specialisation_section(results),
        *([speed_section(results.speed)] if results.speed else []),
    ]
    temporary = page.with_suffix('.tmp')
    temporary.write_text('\n'.join(sections))
    os.replace(temporary, page)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, metavar='CIFAR10', help='ImageFolder of CIFAR-10')
    parser.add_argument('--second-data-dir', type=Path, required=True, metavar='FLOWERS12',
                        help='ImageFolder of photographs')
    parser.add_argument('--pets-dir', type=Path, metavar='PETS',
                        help='ImageFolder of Oxford-IIIT Pet, for the checkpoint trained on it')
    parser.add_argument('--output', type=Path, default=Path('output/analysis'), metavar='FOLDER',
                        help='folder for the trained runs and what was measured (default: %(default)s)')
    parser.add_argument('--page', type=Path, default=Path(__file__).parent / 'ANALYSIS.md', metavar='FILE',
                        help='page to write, with its figures in figures/ beside it (default: %(default)s)')
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    folders = {'cifar10': args.data_dir, 'flowers12': args.second_data_dir, 'pets': args.pets_dir}
    data = {
        name: {split: load_split(folders[name], split, size) for split in ('train', 'validation')}
        for name, (size, _) in INPUTS.items()
    }
    for run in tqdm(runs(), unit='run trained'):
        train(run, data[run.data], args.output)
    write_page(Results(data, folders, args.output), args.page)


if __name__ == '__main__':
    main()
