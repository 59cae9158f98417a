""" The weights that come with the package. """
from pathlib import Path
from typing import Dict

__all__ = ['shipped_weights', 'weights_dir']

_HUB_USER = 'timm-ait'


def weights_dir() -> Path:
    """Folder of the shipped checkpoints: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / 'checkpoints'
    return installed if installed.is_dir() else package.parent / 'weights'


def shipped_weights(name: str) -> Dict[str, str]:
    """Pretrained cfg entries of a checkpoint `<arch>.<tag>`: the shipped file where there is one, else the Hub."""
    file = weights_dir() / name / 'model.safetensors'
    source = {'hf_hub_id': f'{_HUB_USER}/{name}'}
    if file.is_file():
        source['file'] = str(file)
    return source
