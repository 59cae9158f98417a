""" Accuracy and speed of a pretrained model in int8 on the CPU, beside float32.

    python -m benchmarks.int8 --data-dir CIFAR10/validation                         # ait_small
    python -m benchmarks.int8 --data-dir CIFAR10/validation --num-images 1000

Dynamic: PyTorch's dynamic quantisation of the linear layers, int8 weights and activations. Weight-only: torchao's int8
weights, activations in float32. Both leave norms, memories and the products of queries, keys and values in float32.
Images are spread evenly over the sorted folder; rounds of the contenders take turns, so that what else the machine does
falls on all alike.
"""
import argparse
import copy
import io
import statistics
from functools import partial
from typing import List, Optional

import torch
import torch.nn as nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import timm

import timm_ait  # noqa: F401, registers the models
from timm_ait.cli import integer

from .compare.data import load_images
from .results import table
from .workspace import take_turns


def megabytes(model: nn.Module) -> float:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1e6


@torch.inference_mode()
def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.int8', description=__doc__.split('\n\n')[0])
    parser.add_argument('model', nargs='?', default='ait_small', help='name of a model, or local-dir:FOLDER')
    parser.add_argument('--data-dir', required=True, help='folder of validation images, a folder for each class')
    parser.add_argument('--num-images', type=integer(1), metavar='N', help='(default: all)')
    parser.add_argument('--batch-size', type=integer(1), default=64, metavar='N', help='(default: %(default)s)')
    parser.add_argument('--rounds', type=integer(1), default=10, metavar='N', help='of timing (default: %(default)s)')
    args = parser.parse_args(argv)

    model = timm.create_model(args.model, pretrained=True).eval()
    try:
        images, labels = load_images(args.data_dir, model, args.num_images)
    except (RuntimeError, ValueError) as e:
        parser.error(f'--data-dir: {e}')
    weight_only = copy.deepcopy(model)
    quantize_(weight_only, Int8WeightOnlyConfig())
    models = {
        'float32': model,
        'dynamic int8': torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        'weight-only int8': weight_only,
    }
    classes = {
        name: torch.cat([m(batch).argmax(dim=1) for batch in images.split(args.batch_size)])
        for name, m in models.items()}
    batch = images[:args.batch_size]
    one = take_turns({name: partial(m, images[:1]) for name, m in models.items()}, 5 * args.rounds)
    many = take_turns({name: partial(m, batch) for name, m in models.items()}, args.rounds)

    print(f'{args.model}, {len(images)} images, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n')
    header = ['', 'top-1 %', 'same class as float32 %', 'MB', 'one image, ms', f'images/s at {len(batch)}']
    print(table(header, [[
        name,
        f'{100 * (classes[name] == labels).double().mean():.2f}',
        f"{100 * (classes[name] == classes['float32']).double().mean():.2f}",
        f'{megabytes(m):.1f}',
        f'{1e3 * statistics.median(one[name]):.2f}',
        f'{len(batch) / statistics.median(many[name]):.0f}',
    ] for name, m in models.items()]))


if __name__ == '__main__':
    main()
