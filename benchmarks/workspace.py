#!/usr/bin/env python3
""" What the workspace costs: time and memory of the layer and of whole models.

    python benchmarks/workspace.py                                  # everything, at the paper's sizes
    python benchmarks/workspace.py --part layer --published CHECKOUT --hopfield CHECKOUT
    python benchmarks/workspace.py --part models --device cuda --dtype float32 bfloat16 --batch-sizes 128 512 --compile
    python benchmarks/workspace.py --quick                          # small sizes, to see that it works

The checkouts are of github.com/yuweisunn/associative-transformer and of github.com/ml-jku/hopfield-layers.

All contenders run in one process and take turns, every other round in reverse order, so that whatever else the machine
does affects them alike. A round times as many steps as fill --round-seconds. Times are medians over the rounds. A ratio
is the median of the ratios within a round; it is to the first contender of the same kind (eager or compiled).

A training step is forward, balance loss, and backward of it and of a fixed gradient of the output. In bfloat16 the
parameters are float32 and autocast is on, as with timm's `train.py --amp`, and the layer gets bfloat16 tokens, as from
an MLP. The published layer, which fails under autocast on CUDA, has its parameters in bfloat16 instead, and it is not
compiled.

Peak extra memory is the most that a step held beyond what was held before it. On CUDA the caching allocator counts it.
On the CPU it is the highest running sum of the allocations and releases that PyTorch's profiler records.

On CUDA the last column says whether a step waits for the GPU (`torch.cuda.set_sync_debug_mode`).

Prints Markdown tables.
"""
import argparse
import ast
import contextlib
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import timm
from timm.layers import use_fused_attn

import timm_ait
from timm_ait.layers import GlobalWorkspace
from timm_ait.ops import naive
from timm_ait.ops.memory import update_memory

PARTS = ('layer', 'models', 'latency', 'scaling', 'optimizer')
CASES = ('training step', 'evaluation')
OURS, NAIVE, PUBLISHED, MLP = 'timm_ait', 'naive', 'published', 'mlp'
COMPILED = ', compiled'
TOKENS_PER_IMAGE = 64
MIB = 2 ** 20

# name of a size: (its argument, values of a sweep)
SWEEPS = {
    'T': ('tokens', [4096, 8192, 16384, 32768, 65536, 131072]),
    'k': ('bottleneck', [64, 128, 256, 512, 1024, 2048]),
    'M': ('slots', [8, 16, 32, 64, 128]),
    'A': ('heads', [1, 2, 4, 8, 16]),
}
QUICK_SWEEPS = {'T': [512, 1024, 2048], 'k': [32, 64, 128], 'M': [8, 16, 32], 'A': [2, 4, 8]}

Step = Callable[[], object]


def parse_args(args: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    parser.add_argument('--case', nargs='+', choices=CASES, default=list(CASES), help='what the contenders do')
    parser.add_argument('--contenders', nargs='+', choices=(OURS, NAIVE, PUBLISHED, MLP),
                        help='layers to measure, by default all, the published one where --published is given')
    parser.add_argument('--published', type=Path, metavar='CHECKOUT', help='of the published implementation')
    parser.add_argument('--hopfield', type=Path, metavar='CHECKOUT',
                        help='of the Hopfield layers that the published implementation needs, if not installed')
    parser.add_argument('--models', nargs='+', default=['ait_small'], help='models of the part models')
    parser.add_argument('--latency-models', nargs='+', default=['ait_small', 'ait_vit_tiny_patch16_224'],
                        help='models that get one image in the part latency')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    parser.add_argument('--compile', action='store_true', help='also measure contenders under torch.compile')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--round-seconds', type=float, default=0.1, help='least time of the slowest in a round')
    parser.add_argument('--warmup', type=int, default=2, help='steps ahead of the rounds')
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[128], help='images of the part models')
    parser.add_argument('--tokens', nargs='+', type=int, default=[8192],
                        help=f'tokens T, multiples of {TOKENS_PER_IMAGE}; scaling takes the first')
    parser.add_argument('--dim', type=int, default=768, help='token width E')
    parser.add_argument('--slots', type=int, default=32, help='slots M')
    parser.add_argument('--slot-dim', type=int, default=32, help='slot width D')
    parser.add_argument('--heads', type=int, default=8, help='write heads A')
    parser.add_argument('--bottleneck', type=int, default=512, help='tokens k that a slot and head keep')
    parser.add_argument('--sweep', nargs='+', choices=SWEEPS, default=list(SWEEPS), help='sizes that scaling varies')
    parser.add_argument('--quick', action='store_true', help='small sizes and 2 rounds, whatever else is given')
    args = parser.parse_args(args)
    if args.quick:
        args.rounds, args.round_seconds, args.batch_sizes = 2, 0., [4]
        args.tokens, args.dim, args.bottleneck = [1024], 192, 128
        args.models = args.latency_models = ['ait_vit_tiny_patch16_224']
    if any(tokens % TOKENS_PER_IMAGE for tokens in args.tokens):
        parser.error(f'--tokens must be multiples of {TOKENS_PER_IMAGE}, got {args.tokens}')
    if args.contenders is None:
        args.contenders = [OURS, NAIVE, *([PUBLISHED] if args.published else []), MLP]
    elif PUBLISHED in args.contenders and args.published is None:
        parser.error('--contenders published needs --published CHECKOUT')
    return args


# Measuring

def synchronize(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def measure_time(step: Step, count: int, device: str) -> float:
    """Seconds of a step, the mean of `count` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count


def measure_memory(step: Step, device: str) -> int:
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


def waits(step: Step) -> str:
    """'yes' if a step waits for the GPU, else 'no'."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    except RuntimeError as error:
        if 'synchronizing' not in str(error):
            raise
        return 'yes'
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return 'no'


def measure(args: argparse.Namespace, labels: Sequence[str], steps: Dict[str, Step]) -> None:
    """Measure steps in turns, and print a row for each.

    Args:
        args: The command's.
        labels: First cells of the rows.
        steps: A step for each contender; the first, eager or compiled, is what the ratios are to.
    """
    names, device = list(steps), args.device
    for _ in range(max(args.warmup, 1)):  # the first allocates, compiles and chooses algorithms
        for step in steps.values():
            step()
    slowest = max(measure_time(step, 1, device) for step in steps.values())
    count = max(1, math.ceil(args.round_seconds / slowest))
    memory = {name: measure_memory(step, device) for name, step in steps.items()}
    seconds = {name: [] for name in names}
    for i in range(args.rounds):
        for name in names if i % 2 == 0 else reversed(names):
            if slowest < 1.:  # caches and allocator as in a loop over the step; a long one makes its own
                steps[name]()
            seconds[name].append(measure_time(steps[name], count, device))
    for name in names:
        reference = next(other for other in names if other.endswith(COMPILED) == name.endswith(COMPILED))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[reference]))
        print_row(
            *labels,
            name,
            f'{1e3 * statistics.median(seconds[name]):.2f}',
            f'{ratio:.3f}',
            f'{memory[name] / MIB:.1f}',
            f'{memory[name] / max(memory[reference], 1):.2f}',
            waits(steps[name]) if device.startswith('cuda') else '',
        )


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_setting(args: argparse.Namespace) -> None:
    processor = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), processor)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else processor
    print(
        f'# Workspace on {device}\n\n'
        f'{torch.get_num_threads()} threads on {os.cpu_count()} cores ({processor}), Python '
        f'{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, timm_ait '
        f'{timm_ait.__version__}, float32 products at {torch.get_float32_matmul_precision()} precision, fused '
        f"attention {'on' if use_fused_attn() else 'off'}. Layer: tokens of width {args.dim}, {args.heads} heads, "
        f'{args.slots} slots of width {args.slot_dim}, k {args.bottleneck}. Medians of {args.rounds} interleaved '
        'rounds. Ratios are to the first contender, of those that are compiled to the first that is.')


# Contenders. Each trains with the loss that it has in `own_loss`, or with `timm_ait.balance_loss`.

class NaiveWorkspace(nn.Module):
    """The layer as the equations of naive.py."""

    def __init__(self, dim: int, **kwargs) -> None:
        super().__init__()
        self.workspace = GlobalWorkspace(dim, **kwargs)
        self.own_loss = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Write (in training) and read, (B, N, E) to (B, N, E)."""
        layer = self.workspace
        memory = layer.memory.clone()
        tokens = layer.norm(x).reshape(-1, layer.dim)
        if self.training:
            weights = naive.WriteWeights(
                layer.q.weight, layer.k.weight, layer.v.weight, layer.proj.weight, layer.slot_norm.weight,
                layer.slot_norm.bias)
            candidate, balance, _ = naive.write(tokens, memory, weights, layer.workspace_heads, layer.bottleneck)
            # naive.polar has no finite gradient where singular values are equal
            memory = update_memory(memory, candidate, layer.memory_momentum, layer.memory_update)
            self.own_loss = layer.balance_weight * balance
        return naive.read(tokens, layer.attractors(memory), layer.beta).view(x.shape)


class PublishedWorkspace(nn.Module):
    """The layer of the published implementation, without the MLP ahead of it. It writes in evaluation too.

    Its file ait.py is a script that downloads data and trains. Only its classes are defined here, with the settings
    that they take from the script's globals.
    """

    def __init__(self, path: Path, **settings) -> None:
        """
        Args:
            path: Checkout, the directory of ait.py.
            **settings: Globals of the script.
        """
        super().__init__()
        from hflayers import Hopfield
        script = ast.parse((path / 'ait.py').read_text())
        script.body = [node for node in script.body if isinstance(node, ast.ClassDef)]
        with mock.patch.object(sys, 'path', [str(path), *sys.path]):
            attention = importlib.import_module('MHA').MultiHeadAttention
        names = dict(torch=torch, nn=nn, F=F, Hopfield=Hopfield, MultiHeadAttention=attention, **settings)
        exec(compile(script, str(path / 'ait.py'), 'exec'), names)
        self.layer = names['ModularNN'](1., 0)
        self.layer.fc1, self.layer.gelu, self.layer.fc2 = nn.Identity(), nn.Identity(), nn.Identity()
        self.own_loss = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # it sends a constant to the GPU, whatever device it is on
        stays = contextlib.nullcontext() if x.is_cuda else mock.patch.object(torch.Tensor, 'cuda', lambda self: self)
        with torch.autocast(x.device.type, enabled=False), stays:
            output, self.own_loss = self.layer(x)
        return output


def create_layers(args: argparse.Namespace, tokens: int, dtype: str) -> Dict[str, nn.Module]:
    """Contenders for `tokens` tokens."""
    torch.manual_seed(0)
    dim, bottleneck = args.dim, min(args.bottleneck, tokens)
    kwargs = dict(num_slots=args.slots, slot_dim=args.slot_dim, workspace_heads=args.heads, bottleneck=bottleneck)
    published = dict(
        hidden_dim=dim, mlp_dim=4 * dim, dim=TOKENS_PER_IMAGE, pattern_size=args.slots, memory_dim=args.slot_dim,
        memory_head=args.heads, bottleneck=bottleneck, HN=True, static=True)
    create: Dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: GlobalWorkspace(dim, **kwargs),
        NAIVE: lambda: NaiveWorkspace(dim, **kwargs),
        PUBLISHED: lambda: PublishedWorkspace(args.published, **published).to(getattr(torch, dtype)),
        MLP: lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
    }
    return {name: create[name]().to(args.device) for name in args.contenders}


def with_compiled(args: argparse.Namespace, modules: Dict[str, nn.Module]) -> Dict[str, nn.Module]:
    """Modules and, where asked for, the same compiled."""
    if not args.compile:
        return modules
    torch.compiler.reset()  # what was compiled for other sizes would make these dynamic
    compiled = {
        name + COMPILED: torch.compile(module, dynamic=False) for name, module in modules.items() if name != PUBLISHED}
    return {**modules, **compiled}


# Steps. Each leaves nothing behind, so that the next one's memory starts where its own did.

def autocast(args: argparse.Namespace, dtype: str) -> torch.autocast:
    return torch.autocast(args.device.split(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16')


def evaluate(args: argparse.Namespace, dtype: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), autocast(args, dtype):
        return module(x)


def train(args: argparse.Namespace, dtype: str, module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> None:
    with autocast(args, dtype):
        output = module(x)
    loss = module.own_loss if hasattr(module, 'own_loss') else timm_ait.balance_loss(module)
    losses = (loss,) if loss.requires_grad else ()
    torch.autograd.backward(
        (output, *losses), (cotangent.to(output.dtype), *[torch.ones_like(loss) for loss in losses]))
    if hasattr(module, 'own_loss'):
        module.own_loss = None
    for tensor in (x, *module.parameters()):
        tensor.grad = None


# Parts

def measure_cases(
        args: argparse.Namespace,
        cases: Sequence[str],
        size: str,
        dtype: str,
        modules: Dict[str, nn.Module],
        x: torch.Tensor,
) -> None:
    modules = with_compiled(args, modules)
    for case in cases:
        for module in modules.values():
            module.train(case == 'training step')
        step = partial(evaluate, args, dtype)
        if case == 'training step':
            shape = evaluate(args, dtype, next(iter(modules.values())), x).shape
            step = partial(train, args, dtype, cotangent=torch.randn(shape, device=x.device) / shape.numel())
        measure(args, [case, size, dtype], {name: partial(step, module, x) for name, module in modules.items()})


def measure_layers(args: argparse.Namespace, tokens: int, size: str) -> None:
    shape = (tokens // TOKENS_PER_IMAGE, TOKENS_PER_IMAGE, args.dim)
    for dtype in args.dtype:
        layers = create_layers(args, tokens, dtype)
        x = torch.randn(shape, device=args.device, dtype=getattr(torch, dtype)).requires_grad_()
        measure_cases(args, args.case, size, dtype, layers, x)


def measure_models(args: argparse.Namespace, name: str, batch_size: int, cases: Sequence[str]) -> None:
    """A model beside the same model with plain MLPs."""
    for dtype in args.dtype:
        torch.manual_seed(0)
        models = {
            f'{name}{suffix}': timm.create_model(name, num_classes=10, workspace=workspace).to(args.device)
            for suffix, workspace in ((', workspace=False', False), ('', True))
        }
        input_size = next(iter(models.values())).pretrained_cfg['input_size']
        images = torch.randn(batch_size, *input_size, device=args.device)
        measure_cases(args, cases, f'batch {batch_size:,}', dtype, models, images)


def measure_scaling(args: argparse.Namespace) -> None:
    for size in args.sweep:
        argument, values = SWEEPS[size]
        for value in QUICK_SWEEPS[size] if args.quick else values:
            sized = argparse.Namespace(**{**vars(args), argument: value})
            sized.contenders = [name for name in args.contenders if name != MLP]
            measure_layers(sized, value if size == 'T' else args.tokens[0], f'{size} {value:,}')


def measure_optimizer(num_steps: int = 300) -> None:
    """What looking for workspaces costs an optimizer's step, and moving their memories."""
    def step_time(*optimizers: torch.optim.Optimizer) -> float:
        times = []
        for _ in range(num_steps):
            start = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.SGD(parameters, lr=0.)

    tiny = sgd(list(nn.Linear(2, 2).parameters()))
    print_row('optimizer, microseconds a step', 'alone', 'beside four models')
    print_row('---', '--:', '--:')
    alone = step_time(tiny)
    models = [timm.create_model('test_ait') for _ in range(4)]
    print_row('of a linear layer', f'{alone:.0f}', f'{step_time(tiny):.0f}')
    parameters = list(models[0].parameters())
    print_row('of test_ait', '', f'{step_time(sgd(parameters)):.0f}')
    optimizers = [sgd([parameter]) for parameter in parameters]
    print_row(f'one for each of its {len(parameters)} parameters', '', f'{step_time(*optimizers):.0f}')


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler announces every start and stop
    if args.hopfield:
        sys.path.insert(0, str(args.hopfield))
    if args.published and importlib.util.find_spec('hflayers') is None:
        raise SystemExit('--published needs the package hflayers: add --hopfield CHECKOUT')
    print_setting(args)
    for part in args.part:
        print(f'\n## {part}\n')
        if part == 'optimizer':
            measure_optimizer()
            continue
        print_row('case', 'size', 'dtype', 'contender', 'ms', 'ratio', 'peak MiB', 'ratio', 'waits')
        print_row(*['---'] * 4, *['--:'] * 4, '---')
        if part == 'layer':
            for tokens in args.tokens:
                measure_layers(args, tokens, f'T {tokens:,}')
        elif part == 'models':
            for name in args.models:
                for batch_size in args.batch_sizes:
                    measure_models(args, name, batch_size, args.case)
        elif part == 'latency':
            for name in args.latency_models:
                measure_models(args, name, 1, ['evaluation'])
        else:
            measure_scaling(args)


if __name__ == '__main__':
    main()
