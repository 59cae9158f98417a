""" Accuracy and speed of a pretrained model in int8 on the CPU, beside float32.

    python -m benchmarks.int8 --data-dir CIFAR10/validation                         # ait_small
    python -m benchmarks.int8 --data-dir CIFAR10/validation --num-images 1000

Dynamic: PyTorch's dynamic quantisation of the linear layers, int8 weights and activations. Weight-only: torchao's int8
weights, activations in float32. Both leave attention, norms and memories in float32. Images are spread evenly over the
sorted folder; rounds of the contenders take turns, so that what else the machine does falls on all alike.
"""
import argparse
import copy
import io
import os
import statistics
import time
from typing import Dict, List, Optional

import torch
import torch.nn as nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import timm

import timm_ait  # noqa: F401, registers the models

from .compare.data import load_images


def quantized_models(model: nn.Module) -> Dict[str, nn.Module]:
    """The model in float32 and in int8, by name."""
    weight_only = copy.deepcopy(model)
    quantize_(weight_only, Int8WeightOnlyConfig())
    return {
        'float32': model,
        'dynamic int8': torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        'weight-only int8': weight_only,
    }


def megabytes(model: nn.Module) -> float:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1e6


def median_seconds(models: Dict[str, nn.Module], images: torch.Tensor, num_rounds: int) -> Dict[str, float]:
    """Seconds per call, the first round left out."""
    seconds: Dict[str, List[float]] = {name: [] for name in models}
    for _ in range(num_rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@torch.inference_mode()
def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.int8', description=__doc__.split('\n\n')[0])
    parser.add_argument('model', nargs='?', default='ait_small', help='name of a model, or local-dir:FOLDER')
    parser.add_argument('--data-dir', required=True, help='folder of validation images, a folder for each class')
    parser.add_argument('--num-images', type=int, metavar='N', help='(default: all)')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='(default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=10, metavar='N', help='of timing (default: %(default)s)')
    args = parser.parse_args(argv)
    for name in ('num_images', 'batch_size', 'rounds'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')

    if not os.path.isdir(args.data_dir):
        parser.error(f'--data-dir must be a folder, got {args.data_dir}')

    model = timm.create_model(args.model, pretrained=True).eval()
    images, labels = load_images(args.data_dir, model, args.num_images)
    models = quantized_models(model)
    logits = {
        name: torch.cat([m(batch) for batch in images.split(args.batch_size)]) for name, m in models.items()}
    one = median_seconds(models, images[:1], 5 * args.rounds)
    many = median_seconds(models, images[:args.batch_size], args.rounds)

    print(f'{args.model}, {len(images)} images, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n')
    print(f'| | top-1 % | same class as float32 % | MB | one image, ms | images/s at {len(images[:args.batch_size])} |')
    print('| --- | --: | --: | --: | --: | --: |')
    for name, m in models.items():
        predicted = logits[name].argmax(dim=1)
        accuracy = 100 * (predicted == labels).double().mean()
        agreement = 100 * (predicted == logits['float32'].argmax(dim=1)).double().mean()
        print(
            f'| {name} | {accuracy:.2f} | {agreement:.2f} | {megabytes(m):.1f} | {1e3 * one[name]:.2f} '
            f'| {len(images[:args.batch_size]) / many[name]:.0f} |')


if __name__ == '__main__':
    main()
