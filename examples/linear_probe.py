r""" A classifier on the frozen features of a pretrained timm model, in minutes on a CPU: a teacher for distillation.

    python examples/linear_probe.py --model tf_efficientnet_lite2 --data-dir PETS --out output/pets_teacher

The data set is an ImageFolder: train/<class>/*. timm's train.py takes the result as
`--kd-model-name local-dir:output/pets_teacher`, validate.py as `--model local-dir:output/pets_teacher --pretrained`.
"""
import argparse
from pathlib import Path
from typing import List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

import timm
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import resolve_model_input_args
from timm.utils import random_seed

from timm_ait.cli import integer, output_folder
from timm_ait.cli.export import export

BATCH_SIZE = 32


@torch.no_grad()
def extract_features(
        model: nn.Module,
        data_dir: str,
        size: int,
        crops: int,
) -> Tuple[torch.Tensor, torch.Tensor, List[str]]:
    """Features of the middle squares of the training images and of random crops of each.

    Returns:
        Features (N * (1 + crops), E), labels (N * (1 + crops),) and names of the classes.
    """
    config = dict(resolve_data_config({}, model=model), input_size=(3, size, size), crop_pct=1.0)
    if not Path(data_dir, 'train').is_dir():
        raise ValueError(f'--data-dir {data_dir} has no folder train.')
    dataset = create_dataset('', root=data_dir, split='train')
    features, labels = [], []
    for crop in range(1 + crops):
        dataset.transform = create_transform(**config, is_training=crop > 0, scale=(0.35, 1.0), color_jitter=0.)
        for images, targets in DataLoader(dataset, BATCH_SIZE, num_workers=1):
            features.append(model.forward_head(model.forward_features(images), pre_logits=True))
            labels.append(targets)
    return torch.cat(features), torch.cat(labels), list(dataset.reader.class_to_idx)


def fit_classifier(classifier: nn.Linear, features: torch.Tensor, labels: torch.Tensor, decay: float) -> None:
    """Logistic regression on standardised features, whose weights are then made those for the features as they are."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / std
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(inputs), labels) + decay * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    with torch.no_grad():
        classifier.weight /= std
        classifier.bias -= classifier.weight @ mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', required=True, metavar='NAME')
    parser.add_argument('--pretrained-path', metavar='FILE', help="weights to take in place of the Hub's")
    parser.add_argument('--data-dir', required=True, metavar='DIR')
    parser.add_argument('--img-size', type=integer(1), default=196, metavar='PIXELS')
    parser.add_argument('--crops', type=integer(0), default=1, metavar='N', help='random crops of each image')
    parser.add_argument('--weight-decay', type=float, default=3e-3)
    parser.add_argument('--out', required=True, type=output_folder, metavar='DIR')
    args = parser.parse_args()
    random_seed(0)
    overlay = dict(file=args.pretrained_path) if args.pretrained_path else None
    arguments = resolve_model_input_args(args.model, {'img_size': args.img_size}, pretrained_cfg_overlay=overlay)
    model = timm.create_model(**arguments, pretrained=True).eval()
    features, labels, names = extract_features(model, args.data_dir, args.img_size, args.crops)
    model.reset_classifier(len(names))
    fit_classifier(model.get_classifier(), features, labels, args.weight_decay)
    data_config = dict(input_size=(3, args.img_size, args.img_size), crop_pct=1.0)
    export(model, args.out, label_names=names, data_config=data_config)


if __name__ == '__main__':
    main()
