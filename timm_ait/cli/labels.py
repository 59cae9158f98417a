""" Names of classes, and the true classes of images. """
import csv
from collections import Counter
from pathlib import Path
from typing import Dict, List, Tuple

import torch.nn as nn

from timm.data import ImageNetInfo, infer_imagenet_subset


def read_labels(file: Path) -> Dict[Path, str]:
    """Labels by resolved path, from a CSV file with the columns `file`, relative to its own folder, and `label`.

    Raises:
        ValueError: The file cannot be read, a column is missing, a label has no file, or an image has two labels.
    """
    labels = {}
    try:
        with open(file, newline='', encoding='utf-8-sig') as stream:
            reader = csv.DictReader(stream)
            if not {'file', 'label'} <= set(reader.fieldnames or ()):
                raise ValueError(f'the columns file and label are needed, found {reader.fieldnames or "none"}')
            for row in reader:
                if not row['label']:
                    continue
                if not row['file']:
                    raise ValueError(f'line {reader.line_num} has a label but no file')
                path = (file.parent / row['file']).resolve()
                if labels.setdefault(path, row['label']) != row['label']:
                    raise ValueError(f'line {reader.line_num} gives {row["file"]} a second label, {row["label"]!r}')
    except (OSError, ValueError, csv.Error) as e:
        raise ValueError(f'--labels {file}: {e}') from e
    return labels


def class_names(model: nn.Module) -> Tuple[List[str], List[str]]:
    """Names and descriptions of a classifier's classes, each of length num_classes.

    As in timm's inference.py they come from the model's config, else from the ImageNet subset with that many classes. A
    list of names of another length is ignored. A class without a name is named by its index, and one without a
    description is described by its name.
    """
    names = model.pretrained_cfg.get('label_names') or ()
    descriptions = model.pretrained_cfg.get('label_descriptions') or {}
    subset = infer_imagenet_subset(model)
    if not names and subset:
        info = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    if not isinstance(names, dict):
        names = dict(enumerate(names)) if len(names) == model.num_classes else {}
    by_index = {int(index): name for index, name in names.items()}  # JSON has strings for keys
    names = [by_index.get(index, str(index)) for index in range(model.num_classes)]
    return names, [descriptions.get(name, name) for name in names]


def match_labels(labels: Dict[Path, str], names: List[str], descriptions: List[str]) -> Dict[Path, int]:
    """Class indices of labels; a label is the name of a class, or a description that no other class has.

    Raises:
        ValueError: There is no such class.
    """
    counts = Counter(descriptions)
    indices = {text: i for i, text in enumerate(descriptions) if counts[text] == 1}
    indices.update({name: i for i, name in enumerate(names)})
    unknown = sorted(set(labels.values()) - indices.keys())
    if unknown:
        raise ValueError(
            f'--labels: the model has no class {", ".join(map(repr, unknown[:5]))}; its {len(names)} classes are '
            f'{", ".join(names[:20])}{", …" if len(names) > 20 else ""}')
    return {path: indices[label] for path, label in labels.items()}
