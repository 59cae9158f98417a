#!/usr/bin/env python3
""" What the workspace costs: time and memory of the ops, the layer and whole models.

    python benchmarks/workspace.py                                  # everything, at the paper's sizes
    python benchmarks/workspace.py --part layer --published PATH    # and the published implementation, a checkout of
                                                                    # github.com/yuweisunn/associative-transformer
    python benchmarks/workspace.py --device cuda
    python benchmarks/workspace.py --quick                          # small sizes, to see that it works

Contenders run in one process, in turns: each round runs every contender once, every other round in reverse order, so
that what else the machine does falls on all of them alike. A step of less than a second runs once more just before it
is timed, so that it finds caches and allocator as a loop over it would. Times are medians over the rounds; a ratio is
the median of the rounds' own ratios, which drifts less than a ratio of medians.

Peak extra memory is the most that a step held at once beyond what was there before it: activations, what is saved for
backward, temporaries, outputs and gradients. On CUDA the caching allocator counts it. On the CPU it is the highest
running sum of the allocations and releases that PyTorch's allocator reports to its profiler, in a run of its own; that
includes temporaries inside of operators, which a count of live Python tensors misses, and unlike the process's resident
size it can fall, so that one process can measure many contenders.

Prints Markdown tables; writes workspace.json and workspace.png to --out.
"""
import argparse
import ast
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import timm_ait
from timm_ait.layers import GlobalWorkspace
from timm_ait.ops import bottleneck, hopfield, naive
from timm_ait.ops.memory import update_memory

PARTS = ('ops', 'layer', 'models', 'latency', 'scaling', 'profile')
OURS, NAIVE, PUBLISHED = 'timm_ait', 'naive', 'published'
TOKENS_PER_IMAGE = 64
LATENCY_MODELS = ('ait_small', 'ait_vit_small_patch16_224', 'ait_vit_tiny_patch16_224')
MIB = 2 ** 20


def parse_args(args: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    parser.add_argument('--published', type=Path, metavar='PATH', help='checkout of the published implementation')
    parser.add_argument('--models', nargs='+', default=['ait_small', 'ait_base'], help='models to measure')
    parser.add_argument('--sweep', nargs='+', choices=SWEEPS, default=list(SWEEPS), help='sizes that scaling varies')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--threads', type=int, help='CPU threads; PyTorch decides if not given')
    parser.add_argument('--repeats', type=int, default=9, help='rounds')
    parser.add_argument('--batch-size', type=int, default=128, help='images a batch of the models')
    parser.add_argument('--latency-steps', type=int, default=20, help='single images per round of latency')
    parser.add_argument('--optimizer', action='store_true', help='let the training step include AdamW')
    parser.add_argument('--tokens', type=int, default=8192, help=f'tokens T, a multiple of {TOKENS_PER_IMAGE}')
    parser.add_argument('--dim', type=int, default=768, help='token width E')
    parser.add_argument('--slots', type=int, default=32, help='slots M')
    parser.add_argument('--slot-dim', type=int, default=32, help='slot width D')
    parser.add_argument('--heads', type=int, default=8, help='write heads A')
    parser.add_argument('--bottleneck', type=int, default=512, help='tokens k that a slot and head keep')
    parser.add_argument('--quick', action='store_true', help='small sizes and 3 rounds, whatever else is given')
    parser.add_argument('--out', type=Path, default=Path('output/benchmarks'), help='directory of the results')
    args = parser.parse_args(args)
    if args.quick:
        args.repeats, args.batch_size, args.models = 3, 8, ['ait_small']
        args.tokens, args.dim, args.bottleneck = 1024, 192, 128
    if args.tokens % TOKENS_PER_IMAGE:
        parser.error(f'--tokens must be a multiple of {TOKENS_PER_IMAGE}, got {args.tokens}')
    return args


# size: (name of the argument, values)
SWEEPS = {
    'T': ('tokens', [4096, 8192, 16384, 32768, 65536, 131072]),
    'k': ('bottleneck', [64, 128, 256, 512, 1024, 2048]),
    'M': ('slots', [8, 16, 32, 64, 128]),
    'A': ('heads', [1, 2, 4, 8, 16]),
}
QUICK_SWEEPS = {'T': [512, 1024, 2048], 'k': [32, 64, 128], 'M': [8, 16, 32], 'A': [2, 4, 8]}


# Measuring

def synchronize(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def measure_time(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def measure_memory(step: Callable[[], Any], device: str) -> int:
    """Peak extra bytes of one step."""
    if device.startswith('cuda'):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Results:
    """Measurements, as they are printed and stored."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.machine = describe_machine(args)
        self.rows: List[Dict[str, Any]] = []

    def measure(self, part: str, case: str, steps: Dict[str, Callable[[], Any]], reference: str, **size: int) -> None:
        """Measure steps in turns.

        Args:
            part: Part of the benchmark.
            case: What the steps do.
            steps: A step for each contender.
            reference: Contender that ratios are to.
            **size: The size that a sweep varies.
        """
        names, device = list(steps), self.args.device
        seconds = {name: [] for name in names}
        label = ' '.join([part, case, *(f'{key}={value}' for key, value in size.items())])
        with tqdm(total=len(names) * (self.args.repeats + 2), desc=label, leave=False) as progress:
            memory = {}
            for name in names:
                steps[name]()  # first runs allocate, compile and choose algorithms
                progress.update()
                memory[name] = measure_memory(steps[name], device)
                progress.update()
            for i in range(self.args.repeats):
                for name in names if i % 2 == 0 else reversed(names):
                    # caches and allocator as in a loop over the step; a long one makes its own
                    if not seconds[name] or seconds[name][-1] < 1.:
                        steps[name]()
                    seconds[name].append(measure_time(steps[name], device))
                    progress.update()
        for name in names:
            self.rows.append({
                'part': part,
                'case': case,
                **size,
                'contender': name,
                'milliseconds': 1e3 * statistics.median(seconds[name]),
                'time_ratio': statistics.median(a / b for a, b in zip(seconds[name], seconds[reference])),
                'peak_mib': memory[name] / MIB,
                'memory_ratio': memory[name] / max(memory[reference], 1),
                'reference': reference,
                'all_milliseconds': [1e3 * x for x in seconds[name]],
            })
        self.store()

    def store(self) -> None:
        """Write what there is so far."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        record = {**self.machine, 'arguments': arguments, 'results': self.rows, 'exponents': self.exponents()}
        (self.args.out / 'workspace.json').write_text(json.dumps(record, indent=2) + '\n')

    def table(self, part: str) -> str:
        """Markdown table of a part."""
        rows = [row for row in self.rows if row['part'] == part]
        sizes = [size for size in SWEEPS if any(size in row for row in rows)]
        lines = [
            ['case', *sizes, 'contender', 'ms', 'ratio', 'peak MiB', 'ratio'],
            ['---', *('--:' for _ in sizes), '---', '--:', '--:', '--:', '--:'],
        ]
        for row in rows:
            lines.append([
                row['case'],
                *(f'{row[size]:,}' if size in row else '' for size in sizes),
                row['contender'],
                f"{row['milliseconds']:.1f}",
                f"{row['time_ratio']:.3g}" if row['time_ratio'] >= 10 else f"{row['time_ratio']:.2f}",
                f"{row['peak_mib']:.1f}",
                f"{row['memory_ratio']:.2f}",
            ])
        ratios = f"Ratios are to {rows[0]['reference']}." if len({row['reference'] for row in rows}) == 1 \
            else 'Ratios are to the plain ViT.'
        return '\n'.join([f'## {part}', '', ratios, '', *(f"| {' | '.join(line)} |" for line in lines)])

    def exponents(self) -> Dict[str, Dict[str, float]]:
        """Slopes of log time and log memory over log size, by case and contender."""
        slopes = {}
        for size in SWEEPS:
            for name in dict.fromkeys(row['contender'] for row in self.rows):
                for case in dict.fromkeys(row['case'] for row in self.rows):
                    rows = [
                        row for row in self.rows if size in row and row['contender'] == name and row['case'] == case]
                    if len(rows) > 1:
                        logs = [math.log(row[size]) for row in rows]
                        slopes[f'{case}, {name}, {size}'] = {
                            key: statistics.linear_regression(logs, [math.log(row[key]) for row in rows]).slope
                            for key in ('milliseconds', 'peak_mib')
                        }
        return slopes


# Contenders

def write_weights(layer: GlobalWorkspace) -> naive.WriteWeights:
    return naive.WriteWeights(
        layer.q.weight, layer.k.weight, layer.v.weight, layer.proj.weight, layer.slot_norm.weight, layer.slot_norm.bias)


class NaiveWorkspace(GlobalWorkspace):
    """The layer out of the equations of naive.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            tokens = self.norm(x).reshape(-1, self.dim)
            return naive.read(tokens, self.attractors(self.memory), self.beta).view(x.shape)
        # naive.polar has no finite gradient where singular values are equal
        with mock.patch.object(naive, 'update_memory', update_memory):
            output, written, _, balance, _ = naive.write_and_read(
                x.reshape(-1, self.dim),
                naive.TokenNorm(self.norm.weight, self.norm.bias, self.norm.eps),
                self.memory.clone(),
                write_weights(self),
                self.workspace_heads,
                self.bottleneck,
                self.attractors,
            )
        self.pending.copy_(written.detach())
        self.loss = self.balance_weight * balance
        return output.view(x.shape)


class PublishedWorkspace(nn.Module):
    """Layer of the published implementation, without the MLP ahead of it.

    Its file ait.py is a script that downloads data and trains. Only its classes are defined here, with the settings
    that they take from the script's globals.
    """

    def __init__(
            self,
            path: Path,
            dim: int,
            num_slots: int,
            slot_dim: int,
            workspace_heads: int,
            bottleneck: int,
            tokens_per_image: int = TOKENS_PER_IMAGE,
    ) -> None:
        """
        Args:
            path: Checkout, the directory of ait.py.
            dim: Token width E.
            num_slots: Slots M.
            slot_dim: Slot width D.
            workspace_heads: Write heads A.
            bottleneck: Tokens k.
            tokens_per_image: Tokens N.

        Raises:
            FileNotFoundError: There is no ait.py.
            ImportError: The package of its Hopfield layers is not installed.
        """
        super().__init__()
        try:
            from hflayers import Hopfield
        except ImportError as error:
            raise ImportError(
                'The published implementation needs hflayers: '
                'pip install git+https://github.com/ml-jku/hopfield-layers') from error
        script = ast.parse((path / 'ait.py').read_text())
        script.body = [node for node in script.body if isinstance(node, ast.ClassDef)]
        with mock.patch.object(sys, 'path', [str(path), *sys.path]):
            attention = importlib.import_module('MHA')
        names = dict(
            torch=torch,
            nn=nn,
            F=F,
            Hopfield=Hopfield,
            MultiHeadAttention=attention.MultiHeadAttention,
            hidden_dim=dim,
            mlp_dim=4 * dim,
            dim=tokens_per_image,
            pattern_size=num_slots,
            memory_dim=slot_dim,
            memory_head=workspace_heads,
            bottleneck=bottleneck,
            HN=True,
            static=True,
        )
        exec(compile(script, str(path / 'ait.py'), 'exec'), names)
        self.layer = names['ModularNN'](1., 0)
        self.layer.fc1, self.layer.gelu, self.layer.fc2 = nn.Identity(), nn.Identity(), nn.Identity()
        self.loss = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Write and read, (B, N, E) to (B, N, E); it writes in evaluation too."""
        if x.is_cuda:
            output, self.loss = self.layer(x)
        else:
            # it sends a constant to the GPU, whatever device it is on
            with mock.patch.object(torch.Tensor, 'cuda', lambda self: self):
                output, self.loss = self.layer(x)
        return output


def create_layers(args: argparse.Namespace) -> Dict[str, nn.Module]:
    torch.manual_seed(0)
    kwargs = dict(
        dim=args.dim,
        num_slots=args.slots,
        slot_dim=args.slot_dim,
        workspace_heads=args.heads,
        bottleneck=args.bottleneck,
    )
    layers = {OURS: GlobalWorkspace(**kwargs), NAIVE: NaiveWorkspace(**kwargs)}
    if args.published:
        layers[PUBLISHED] = PublishedWorkspace(args.published, **kwargs)
    return {name: layer.to(args.device) for name, layer in layers.items()}


def autocast(args: argparse.Namespace) -> torch.autocast:
    device_type = args.device.split(':')[0]
    return torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != 'float32')


# Steps. Each leaves nothing behind, so that the next one's memory starts where its own did.

def clear_grads(*tensors: torch.Tensor) -> None:
    for x in tensors:
        x.grad = None


def evaluate(args: argparse.Namespace, module: nn.Module, x: torch.Tensor) -> None:
    if module.training:
        module.eval()
    with torch.inference_mode(), autocast(args):
        module(x)


def train_layer(
        args: argparse.Namespace,
        layer: nn.Module,
        x: torch.Tensor,
        cotangent: torch.Tensor,
        backward: bool,
) -> None:
    layer.train()
    with autocast(args):
        output = layer(x)
    if backward:
        balance = timm_ait.balance_loss(layer) if type(layer) is GlobalWorkspace else layer.loss
        torch.autograd.backward((output, balance), (cotangent, None))
    if type(layer) is not GlobalWorkspace:
        layer.loss = None
    clear_grads(x, *layer.parameters())


def layer_steps(args: argparse.Namespace, layers: Dict[str, nn.Module]) -> Dict[str, Dict[str, Callable[[], None]]]:
    """Steps by case and contender."""
    shape = (args.tokens // TOKENS_PER_IMAGE, TOKENS_PER_IMAGE, args.dim)
    x = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype)).requires_grad_()
    cotangent = torch.randn_like(x) / x.numel()
    return {
        'training forward': {
            name: partial(train_layer, args, layer, x, cotangent, False) for name, layer in layers.items()},
        'training forward + backward': {
            name: partial(train_layer, args, layer, x, cotangent, True) for name, layer in layers.items()},
        'evaluation': {name: partial(evaluate, args, layer, x.detach()) for name, layer in layers.items()},
    }


def run_op(op: Callable[..., Any], inputs: Dict[str, torch.Tensor], backward: bool) -> None:
    """An op, and the backward of the sum of its differentiable outputs."""
    outputs = op(**inputs)
    if backward:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [x for x in outputs if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    clear_grads(*inputs.values())


def benchmark_ops(args: argparse.Namespace, results: Results) -> None:
    layer = create_layers(args)[OURS]
    dtype = getattr(torch, args.dtype)
    tokens = torch.randn(args.tokens, args.dim, device=args.device).to(dtype)
    parameters = dict(memory=layer.memory, **write_weights(layer)._asdict())
    attractors = dict(attractors=layer.attractors(layer.memory))

    def leaves(inputs: Dict[str, torch.Tensor], dtype: torch.dtype) -> Dict[str, torch.Tensor]:
        return {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}

    sizes = dict(num_heads=args.heads, bottleneck=args.bottleneck)
    norm = naive.TokenNorm(layer.norm.weight.detach(), layer.norm.bias.detach(), layer.norm.eps)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    def write(tokens: torch.Tensor, memory: torch.Tensor, **weights: torch.Tensor) -> Any:
        return bottleneck.write(tokens, norm, memory, naive.WriteWeights(**weights), **sizes)

    def naive_write(tokens: torch.Tensor, memory: torch.Tensor, **weights: torch.Tensor) -> Any:
        return naive.write(normed(tokens), memory, naive.WriteWeights(**weights), **sizes)

    # the fused ops take weights in float32 whatever the tokens are in, naive.py computes in one dtype
    cases = {
        'write': {
            OURS: (write, {**leaves({'tokens': tokens}, dtype), **leaves(parameters, torch.float32)}),
            NAIVE: (naive_write, leaves({'tokens': tokens, **parameters}, dtype)),
        },
        'read': {
            OURS: (
                partial(hopfield.read, norm=norm),
                {**leaves({'x': tokens}, dtype), **leaves(attractors, torch.float32)},
            ),
            NAIVE: (
                lambda x, attractors: naive.read(normed(x), attractors),
                leaves({'x': tokens, **attractors}, dtype),
            ),
        },
    }
    for name, contenders in cases.items():
        for case, backward in ((f'{name} forward', False), (f'{name} forward + backward', True)):
            steps = {key: partial(run_op, op, inputs, backward) for key, (op, inputs) in contenders.items()}
            results.measure('ops', case, steps, OURS)


def benchmark_layer(args: argparse.Namespace, results: Results) -> None:
    for case, steps in layer_steps(args, create_layers(args)).items():
        results.measure('layer', case, steps, OURS)


def train_model(
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: Optional[torch.optim.Optimizer],
        images: torch.Tensor,
        labels: torch.Tensor,
) -> None:
    model.train()
    with autocast(args):
        loss = F.cross_entropy(model(images), labels)
    loss = loss + timm_ait.balance_loss(model)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    clear_grads(*model.parameters())


def benchmark_models(args: argparse.Namespace, results: Results) -> None:
    images = torch.randn(args.batch_size, 3, 32, 32, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)
    for name in args.models:
        ait = timm.create_model(name, num_classes=10)
        vit = timm.create_model(
            'vit_base_patch16_224',
            img_size=32,
            patch_size=4,
            depth=len(ait.blocks),
            class_token=False,
            global_pool='avg',
            num_classes=10,
        )
        models = {f'ViT, {len(ait.blocks)} blocks': vit.to(args.device), name: ait.to(args.device)}
        optimizers = {
            key: torch.optim.AdamW(model.parameters(), lr=1e-4) if args.optimizer else None
            for key, model in models.items()
        }
        reference = next(iter(models))
        training = {
            key: partial(train_model, args, model, optimizers[key], images, labels) for key, model in models.items()}
        results.measure('models', f'{name} training step', training, reference)
        inference = {key: partial(evaluate, args, model, images) for key, model in models.items()}
        results.measure('models', f'{name} inference', inference, reference)


def benchmark_latency(args: argparse.Namespace, results: Results) -> None:
    """One image through whole models, against the same model with plain MLPs."""
    for name in LATENCY_MODELS:
        torch.manual_seed(0)
        models = {
            f'{name}, workspace={workspace}': timm.create_model(name, num_classes=10, workspace=workspace)
            for workspace in (False, True)}
        x = torch.randn(1, *next(iter(models.values())).pretrained_cfg['input_size'], device=args.device)
        steps = {key: partial(evaluate, args, model.to(args.device), x) for key, model in models.items()}
        # short steps: many of them are one round
        steps = {key: partial(repeat, step, args.latency_steps) for key, step in steps.items()}
        results.measure('latency', f'{name}, {args.latency_steps} single images', steps, next(iter(steps)))


def repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def benchmark_scaling(args: argparse.Namespace, results: Results) -> None:
    for size in args.sweep:
        name, values = SWEEPS[size]
        for value in QUICK_SWEEPS[size] if args.quick else values:
            sized = argparse.Namespace(**{**vars(args), name: value})
            steps = layer_steps(sized, create_layers(sized))
            for case in ('training forward + backward', 'evaluation'):
                results.measure('scaling', case, steps[case], OURS, **{size: value})


def profile(args: argparse.Namespace, repeats: int = 5, num_operators: int = 10) -> str:
    """Markdown table of the operators in which the layer spends its time."""
    layer = create_layers(args)[OURS]
    on_cuda = args.device.startswith('cuda')
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_cuda
    lines = [['case', 'operator', 'calls', 'ms', '%'], ['---', '---', '--:', '--:', '--:']]
    for case, steps in layer_steps(args, {OURS: layer}).items():
        for _ in range(2):
            steps[OURS]()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(repeats):
                steps[OURS]()
        operators = {
            event.key: (event.count, event.self_device_time_total if on_cuda else event.self_cpu_time_total)
            for event in profiler.key_averages()}
        total = sum(time for _, time in operators.values())
        for name, (count, time) in sorted(operators.items(), key=lambda item: -item[1][1])[:num_operators]:
            lines.append([
                case, name, f'{count / repeats:.0f}', f'{time / repeats / 1e3:.1f}', f'{100 * time / total:.0f}'])
    return '\n'.join(['## profile', '', *(f"| {' | '.join(line)} |" for line in lines)])


# Reporting

def describe_machine(args: argparse.Namespace) -> Dict[str, Any]:
    processor = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), processor)
    return {
        'machine': platform.node(),
        'cpu': processor,
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'gpu': torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else None,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_ait': timm_ait.__version__,
    }


def plot(rows: List[Dict[str, Any]], path: Path) -> None:
    """Time and memory over the sizes of the sweeps, on logarithmic axes."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    sizes = [size for size in SWEEPS if any(size in row for row in rows)]
    quantities = {'milliseconds': 'time (ms)', 'peak_mib': 'peak extra memory (MiB)'}
    figure, axes = plt.subplots(2, len(sizes), figsize=(3.6 * len(sizes), 6.4), squeeze=False, layout='constrained')
    for column, size in enumerate(sizes):
        for axis, (quantity, label) in zip(axes[:, column], quantities.items()):
            for i, name in enumerate((OURS, NAIVE, PUBLISHED)):
                for case, style in (('training forward + backward', '-'), ('evaluation', '--')):
                    points = [
                        (row[size], row[quantity]) for row in rows
                        if size in row and row['contender'] == name and row['case'] == case]
                    if points:
                        axis.loglog(*zip(*points), f'o{style}', color=f'C{i}', markersize=3, label=f'{name}, {case}')
            axis.set_xlabel(f'{size} ({SWEEPS[size][0]})')
            axis.set_ylabel(label)
            axis.grid(True, which='major', alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(sizes), 3), fontsize='small')
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler announces every start and stop
    if args.threads:
        torch.set_num_threads(args.threads)
    results = Results(args)
    machine = results.machine
    print(f"# Workspace on {machine['gpu'] or machine['cpu']}\n")
    print(f"{machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, {args.dtype}, "
          f'Layer: T {args.tokens:,}, E {args.dim}, {args.heads} heads, '
          f'{args.slots} x {args.slot_dim} slots, k {args.bottleneck}. Models: batch {args.batch_size}. '
          f'Medians of {args.repeats} interleaved runs.\n')
    benchmarks = dict(
        ops=benchmark_ops, layer=benchmark_layer, models=benchmark_models, latency=benchmark_latency,
        scaling=benchmark_scaling)
    for part, benchmark in benchmarks.items():
        if part in args.part:
            benchmark(args, results)
            print(results.table(part) + '\n', flush=True)
    if 'profile' in args.part:
        print(profile(args) + '\n')
    if 'scaling' in args.part:
        print('| exponent of | time | peak memory |\n| --- | --: | --: |')
        for label, slope in results.exponents().items():
            print(f"| {label} | {slope['milliseconds']:.2f} | {slope['peak_mib']:.2f} |")
        plot(results.rows, args.out / 'workspace.png')


if __name__ == '__main__':
    main()
