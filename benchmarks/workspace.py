""" What the workspace costs: time and memory of the layer and of whole models, as Markdown tables.

    python benchmarks/workspace.py                                  # everything, at the paper's sizes
    PYTHONPATH=HOPFIELD python benchmarks/workspace.py --part layer --published CHECKOUT
    python benchmarks/workspace.py --part models --device cuda --dtype float32 bfloat16 --batch-sizes 128 512 --compile
    python benchmarks/workspace.py --quick                          # small sizes, to see that it works

HOPFIELD and CHECKOUT are of github.com/ml-jku/hopfield-layers and of github.com/yuweisunn/associative-transformer.

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
"""
import argparse
import ast
import contextlib
import importlib
import itertools
import math
import os
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import timer

import timm
from timm.layers import use_fused_attn
from timm.utils import ParseKwargs

import timm_ait
from timm_ait.layers import GlobalWorkspace
from timm_ait.ops import naive
from timm_ait.ops.memory import update_memory

PARTS = ('layer', 'models', 'optimizer')
CASES = ('training step', 'evaluation')
OURS, NAIVE, PUBLISHED, MLP = 'timm_ait', 'naive', 'published', 'mlp'
COMPILED = ', compiled'
TOKENS_PER_IMAGE = 64
MIB = 2 ** 20

# of the layer, as in the paper
LAYER = dict(dim=768, num_slots=32, slot_dim=32, workspace_heads=8, bottleneck=512)

Step = Callable[[], object]


def parse_args(args: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    parser.add_argument('--case', nargs='+', choices=CASES, default=list(CASES), help='what the contenders do')
    parser.add_argument('--published', type=Path, metavar='CHECKOUT',
                        help='of the published implementation, to measure it too')
    parser.add_argument('--models', nargs='+', default=['ait_small'], help='of the part models')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    parser.add_argument('--compile', action='store_true', help='also measure contenders under torch.compile')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--round-seconds', type=float, default=0.1, help='least time of the slowest in a round')
    parser.add_argument('--warmup', type=int, default=2, help='rounds ahead of those that count')
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[128], help='images of the part models')
    parser.add_argument('--tokens', nargs='+', type=int, default=[8192],
                        help=f'tokens T of the part layer, multiples of {TOKENS_PER_IMAGE}')
    parser.add_argument('--layer-kwargs', nargs='+', action=ParseKwargs, default={}, metavar='NAME=VALUE',
                        help=f'other arguments of the layer than {LAYER}')
    parser.add_argument('--quick', action='store_true', help='small sizes and 2 rounds, whatever else is given')
    args = parser.parse_args(args)
    args.layer_kwargs = {**LAYER, **args.layer_kwargs}
    if args.quick:
        args.rounds, args.round_seconds, args.batch_sizes = 2, 0., [4]
        args.tokens, args.models = [1024], ['ait_vit_tiny_patch16_224']
        args.layer_kwargs.update(dim=192, bottleneck=128)
    if any(tokens % TOKENS_PER_IMAGE for tokens in args.tokens):
        parser.error(f'--tokens must be multiples of {TOKENS_PER_IMAGE}, got {args.tokens}')
    args.contenders = [OURS, NAIVE, *([PUBLISHED] if args.published else []), MLP]
    return args


# Measuring

def take_turns(steps: Dict[str, Step], num_rounds: int, count: int = 1) -> Dict[str, List[float]]:
    """Seconds of each step in each round: the mean of `count` in a row, after one that leaves caches as they do."""
    seconds = {name: [] for name in steps}
    for i in range(num_rounds):
        for name in list(steps)[::-1 if i % 2 else 1]:
            steps[name]()
            start = timer()
            for _ in range(count):
                steps[name]()
            seconds[name].append((timer() - start) / count)
    return seconds


def measure_memory(step: Step, device: str) -> int:
    """Peak extra bytes of one step."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
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


def print_rows(args: argparse.Namespace, labels: Sequence[str], steps: Dict[str, Step]) -> None:
    """Measure the contenders' steps in turns, and print a row for each, which begins with the labels."""
    # the first allocates, compiles and chooses algorithms
    slowest = max(seconds[-1] for seconds in take_turns(steps, max(args.warmup, 1)).values())
    memory = {name: measure_memory(step, args.device) for name, step in steps.items()}
    seconds = take_turns(steps, args.rounds, max(1, math.ceil(args.round_seconds / slowest)))
    for name, step in steps.items():
        reference = next(other for other in steps if other.endswith(COMPILED) == name.endswith(COMPILED))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[reference]))
        print_row(
            *labels,
            name,
            f'{1e3 * statistics.median(seconds[name]):.2f}',
            f'{ratio:.3f}',
            f'{memory[name] / MIB:.1f}',
            f'{memory[name] / max(memory[reference], 1):.2f}',
            waits(step) if args.device == 'cuda' else '',
        )


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_setting(args: argparse.Namespace) -> None:
    processor = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), processor)
    device = torch.cuda.get_device_name() if args.device == 'cuda' else processor
    print(
        f'# Workspace on {device}\n\n'
        f'{torch.get_num_threads()} threads on {os.cpu_count()} cores ({processor}), Python '
        f'{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, timm_ait '
        f'{timm_ait.__version__}, float32 products at {torch.get_float32_matmul_precision()} precision, fused '
        f"attention {'on' if use_fused_attn() else 'off'}. Layer: "
        f"{', '.join(f'{name} {value}' for name, value in args.layer_kwargs.items())}. Medians of {args.rounds} "
        'interleaved rounds. Ratios are to the first contender, of those that are compiled to the first that is.')


# Contenders. Each trains with the loss that it has in `own_loss`, or with `timm_ait.balance_loss`.

class NaiveWorkspace(GlobalWorkspace):
    """The layer as the equations of naive.py."""
    own_loss = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Write (in training) and read, (B, N, E) to (B, N, E)."""
        memory = self.memory.clone()
        tokens = self.norm(x).reshape(-1, self.dim)
        if self.training:
            weights = naive.WriteWeights(
                self.q.weight, self.k.weight, self.v.weight, self.proj.weight, self.slot_norm.weight,
                self.slot_norm.bias)
            candidate, balance, _ = naive.write(tokens, memory, weights, self.workspace_heads, self.bottleneck)
            # naive.polar has no finite gradient where singular values are equal
            memory = update_memory(memory, candidate, self.memory_momentum, self.memory_update)
            self.own_loss = self.balance_weight * balance
        return naive.read(tokens, self.attractors(memory), self.beta).view(x.shape)


class PublishedWorkspace(nn.Module):
    """The layer of the published implementation, without the MLP ahead of it. It writes in evaluation too.

    The file ait.py of its checkout is a script that downloads data and trains. Only its classes are defined here, with
    the settings that they take from the script's globals.
    """
    own_loss = None

    def __init__(self, path: Path, **settings) -> None:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # it sends a constant to the GPU, whatever device it is on
        stays = contextlib.nullcontext() if x.is_cuda else mock.patch.object(torch.Tensor, 'cuda', lambda self: self)
        with torch.autocast(x.device.type, enabled=False), stays:
            output, self.own_loss = self.layer(x)
        return output


def create_layers(args: argparse.Namespace, dtype: str, dim: int, **kwargs) -> Dict[str, nn.Module]:
    """Contenders for tokens of width `dim`, with arguments of `GlobalWorkspace`."""
    torch.manual_seed(0)
    published = dict(
        hidden_dim=dim, mlp_dim=4 * dim, dim=TOKENS_PER_IMAGE, pattern_size=kwargs['num_slots'],
        memory_dim=kwargs['slot_dim'], memory_head=kwargs['workspace_heads'], bottleneck=kwargs['bottleneck'], HN=True,
        static=True)
    create: Dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: GlobalWorkspace(dim, **kwargs),
        NAIVE: lambda: NaiveWorkspace(dim, **kwargs),
        PUBLISHED: lambda: PublishedWorkspace(args.published, **published).to(getattr(torch, dtype)),
        MLP: lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
    }
    return {name: create[name]().to(args.device) for name in args.contenders}


# Steps. Each leaves nothing behind, so that the next one's memory starts where its own did.

def evaluate(autocast: torch.autocast, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), autocast:
        return module(x)


def train(autocast: torch.autocast, module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> None:
    with autocast:
        output = module(x)
    loss = module.own_loss if hasattr(module, 'own_loss') else timm_ait.balance_loss(module)
    losses = [loss] if loss.requires_grad else []
    torch.autograd.backward([output, *losses], [cotangent.to(output.dtype), *[None] * len(losses)])
    if hasattr(module, 'own_loss'):
        module.own_loss = None
    for tensor in (x, *module.parameters()):
        tensor.grad = None


# Parts

def measure(args: argparse.Namespace, size: str, dtype: str, modules: Dict[str, nn.Module], x: torch.Tensor) -> None:
    if args.compile:
        torch.compiler.reset()  # what was compiled for other sizes would make these dynamic
        modules = {**modules, **{
            name + COMPILED: torch.compile(module, dynamic=False)
            for name, module in modules.items() if name != PUBLISHED}}
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == 'bfloat16')
    for case in args.case:
        for module in modules.values():
            module.train(case == 'training step')
        step = partial(evaluate, autocast)
        if case == 'training step':
            shape = evaluate(autocast, next(iter(modules.values())), x).shape
            step = partial(train, autocast, cotangent=torch.randn(shape, device=x.device) / shape.numel())
        print_rows(args, [case, size, dtype], {name: partial(step, module, x) for name, module in modules.items()})


def measure_layers(args: argparse.Namespace, tokens: int) -> None:
    kwargs = {**args.layer_kwargs, 'bottleneck': min(args.layer_kwargs['bottleneck'], tokens)}
    shape = (tokens // TOKENS_PER_IMAGE, TOKENS_PER_IMAGE, kwargs['dim'])
    for dtype in args.dtype:
        layers = create_layers(args, dtype, **kwargs)
        x = torch.randn(shape, device=args.device, dtype=getattr(torch, dtype)).requires_grad_()
        measure(args, f'T {tokens:,}', dtype, layers, x)


def measure_models(args: argparse.Namespace) -> None:
    """Models, each beside the same model with plain MLPs."""
    for name, batch_size, dtype in itertools.product(args.models, args.batch_sizes, args.dtype):
        torch.manual_seed(0)
        models = {
            f'{name}, workspace=False': timm.create_model(name, num_classes=10, workspace=False).to(args.device),
            name: timm.create_model(name, num_classes=10).to(args.device),
        }
        images = torch.randn(batch_size, *models[name].pretrained_cfg['input_size'], device=args.device)
        measure(args, f'batch {batch_size:,}', dtype, models, images)


def measure_optimizer() -> None:
    """What looking for workspaces costs an optimizer's step, and moving their memories."""
    def microseconds(*optimizers: torch.optim.Optimizer) -> str:
        seconds = take_turns({'': lambda: [optimizer.step() for optimizer in optimizers]}, 30, count=10)['']
        return f'{1e6 * statistics.median(seconds):.0f}'

    def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.SGD(parameters, lr=0.)

    tiny = sgd(list(nn.Linear(2, 2).parameters()))
    print_row('optimizer, microseconds a step', 'alone', 'beside four models')
    print_row('---', '--:', '--:')
    alone = microseconds(tiny)
    models = [timm.create_model('test_ait') for _ in range(4)]
    print_row('of a linear layer', alone, microseconds(tiny))
    parameters = list(models[0].parameters())
    print_row('of test_ait', '', microseconds(sgd(parameters)))
    each = microseconds(*[sgd([parameter]) for parameter in parameters])
    print_row(f'one for each of its {len(parameters)} parameters', '', each)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler announces every start and stop
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
                measure_layers(args, tokens)
        else:
            measure_models(args)


if __name__ == '__main__':
    main()
