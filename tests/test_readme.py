""" Every command and Python block of README, docs, model cards and recipes' headers, run from the text itself.

The commands of a document run in its order, in a folder of their own that shows the files of the checkout, since later
ones use what earlier ones wrote. What the texts take for granted is made small: `RULES` say for every program how it is
run and shortened, `NAMES` and `BLOCKS` what Python blocks are given. A command that no rule covers fails.
"""
import argparse
import csv
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file

import timm
from timm.utils import ParseKwargs

import timm_ait  # noqa: F401, registers the models
from timm_ait.data.sort_of_clevr import write_sort_of_clevr

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / 'examples' / 'on_device'))

import cifar_resnet  # noqa: E402, F401, registers the model

SCRIPTS = os.environ.get('TIMM_SCRIPTS')


class Rule(NamedTuple):
    """How commands of a program are run."""
    run: bool = True  # else its options are looked up in its --help
    shorten: str = ''  # appended
    skip: str = ''  # reason not to run it here
    slow: bool = False
    scripts: bool = False  # one of timm's scripts


# the first that is found at the beginning of a command
RULES = {
    r'python -m venv|\. \.venv/bin/activate|pip |python -m pip |ruff ': Rule(skip='what .ci/run does, with a network'),
    r'git clone |cd |cp ': Rule(skip='prepares a machine'),
    r'hf |python benchmarks/|python -m benchmarks\.(?!compare|validate)': Rule(run=False),  # an account, or minutes
    r'python ait\.py': Rule(skip='is in the published code'),
    r'python examples/space/app\.py': Rule(skip='serves until it is stopped; tests/examples/test_space.py starts it'),
    r'python -m tests\.test_weights': Rule(skip='writes into the checkout'),
    r'python -m timm_ait data ': Rule(shorten='--train 520 --validation 20'),
    r'python -m timm_ait run validate.py ': Rule(shorten='--workers 0 --batch-size 8', scripts=True),
    r'python -m timm_ait run bulk_runner.py ': Rule(run=False, scripts=True),  # tests/cli/test_run.py runs it
    r'python -m timm_ait run ': Rule(scripts=True),
    r'python -m timm_ait (predict|explain|export) ': Rule(),
    r'python -m benchmarks\.compare .*--device cuda': Rule(run=False),
    # bfloat16 products, Muon's above all, take minutes on some processors
    r'python -m benchmarks\.compare ': Rule(
        shorten='--steps 1 --seeds 0 --batch-size 8 --opt adamw --opt-kwargs {} --amp-dtype float32'),
    r'python -m benchmarks\.validate': Rule(),
    r'python examples/linear_probe\.py ': Rule(shorten='--img-size 64'),
    r'python examples/on_device/train_on_device\.py ': Rule(
        shorten='--device cpu --no-compile --epochs 0.01 --batch-size 8 --evals 1 --opt adamw --opt-kwargs '
                '--amp-dtype float32',
        slow=True),
    r'python avg_checkpoints\.py ': Rule(run=False, scripts=True),
    r'python -m pytest': Rule(skip='is how this runs'),
    r'(python|torchrun( -\S+)*) train.py ': Rule(
        shorten='--epochs 1 --batch-size 8 --validation-batch-size 8 --workers 0', slow=True, scripts=True),
    r'torchrun ': Rule(run=False),
}
# in prose, where only the options are looked up
INLINE = re.compile(r'(?<!`)`((?:python3?|hf|torchrun|pip|\w+\.py) [^`]+)`(?!`)')
# commands that are Python modules
MODULES = {'torchrun': 'torch.distributed.run', 'hf': 'huggingface_hub.cli.hf'}
PLACEHOLDERS = {'N': '12', 'USER/NAME': 'somebody/something', 'CHECKOUT': str(ROOT)}

# what Python blocks may use without having made it
NAMES = {
    'timm': timm,
    'timm_ait': timm_ait,
    'torch': torch,
    'images': torch.zeros(2, 3, 32, 32),
    'labels': torch.zeros(2, dtype=torch.long),
    'criterion': torch.nn.CrossEntropyLoss(),
    'optimizer': torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
    'loader': [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))] * 4,
}
# what is replaced in Python blocks
BLOCKS = {
    r"'sort_of_clevr'": '{sort_of_clevr!r}',
    r"'hf-hub:USER/NAME(@\w+)?'": repr(f"local-dir:{ROOT / 'weights' / 'ait_tiny_hybrid_75.sort_of_clevr'}"),
}


class Snippet(NamedTuple):
    document: str
    kind: str  # 'sh', 'python' or 'inline'
    text: str


def snippets_of_markdown(document: str, text: str) -> List[Snippet]:
    """Blocks of shell (a snippet per command) and Python, and commands in prose, in their order."""
    snippets = []
    text = re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.DOTALL)  # a card's metadata
    for i, part in enumerate(re.split(r'^```', text, flags=re.MULTILINE)):
        language, _, body = part.partition('\n')
        if i % 2 == 0:
            snippets += [Snippet(document, 'inline', command) for command in INLINE.findall(part)]
            indented = ''.join(line[4:] for line in part.splitlines(keepends=True) if line.startswith('    '))
            snippets += [Snippet(document, 'sh', command) for command in commands_of(indented)]
        elif language in ('sh', 'bash', 'shell', 'console'):
            snippets += [Snippet(document, 'sh', command) for command in commands_of(body)]
        elif language == 'python':
            snippets.append(Snippet(document, 'python', body))
    return snippets


def snippets_of_recipe(document: str, text: str) -> List[Snippet]:
    """Indented commands of the comment that a recipe begins with."""
    header = re.match(r'(#.*\n)*', text)[0]
    body = ''.join(line[4:] for line in header.splitlines(keepends=True) if line.startswith('#   '))
    return [Snippet(document, 'sh', command) for command in commands_of(body)]


def commands_of(text: str) -> List[str]:
    lines = re.sub(r'\s*\\\n\s*', ' ', text).splitlines()
    return [command.strip() for line in lines for command in line.split(' && ')
            if command.strip() and not line.strip().startswith('#')]


def markdown_files() -> List[Path]:
    cards = sorted((ROOT / 'weights').glob('*/README.md'))
    pages = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'examples' / 'space' / 'README.md']
    return [*cards, *pages, *sorted((ROOT / 'docs').glob('*.md')), *sorted((ROOT / 'benchmarks').glob('*.md'))]


def recipes() -> List[Path]:
    return sorted([*(ROOT / 'examples').rglob('*.yaml'), *(ROOT / 'weights').glob('*/train.yaml')])


def all_snippets() -> List[Snippet]:
    snippets = []
    for file in recipes():
        snippets += snippets_of_recipe(file.relative_to(ROOT).as_posix(), file.read_text(encoding='utf-8'))
    for file in markdown_files():
        snippets += snippets_of_markdown(file.relative_to(ROOT).as_posix(), file.read_text(encoding='utf-8'))
    return snippets


def arguments_of(command: str) -> List[str]:
    """Arguments of a command, without variables before it, python in whatever environment being `python`."""
    arguments = shlex.split(command, comments=True)
    while re.match(r'\w+=', arguments[0]):
        arguments = arguments[1:]
    program = arguments[0].split('/')[-1]
    arguments[0] = 'python' if program == 'python3' else program
    if arguments[0].endswith('.py'):
        arguments = ['python', *arguments]
    return [PLACEHOLDERS.get(argument, argument) for argument in arguments]


def rule_of(command: str) -> Optional[Rule]:
    line = ' '.join(arguments_of(command)) + ' '
    return next((rule for pattern, rule in RULES.items() if re.match(pattern, line)), None)


def marks_of(snippet: Snippet) -> List[pytest.MarkDecorator]:
    if snippet.kind == 'python':
        return []
    rule = rule_of(snippet.text) or Rule()
    marks = [pytest.mark.slow] if rule.slow and snippet.kind == 'sh' else []
    if rule.scripts and SCRIPTS is None:
        marks.append(pytest.mark.skip(reason="set TIMM_SCRIPTS to the folder with timm's train.py and validate.py"))
    if rule.skip:
        marks.append(pytest.mark.skip(reason=rule.skip))
    return marks


def parameters(kinds):
    snippets = [snippet for snippet in all_snippets() if snippet.kind in kinds]
    return [
        pytest.param(snippet, marks=marks_of(snippet), id=f'{snippet.document}-{" ".join(snippet.text.split())[:60]}')
        for snippet in snippets]


def options(arguments: List[str]) -> argparse.Namespace:
    """Those that say what a command reads and writes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ('config', 'model', 'data-dir', 'experiment', 'output', 'out'):
        parser.add_argument(f'--{name}')
    for name in ('num-classes', 'img-size'):
        parser.add_argument(f'--{name}', type=int)
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    return parser.parse_known_args(arguments)[0]


def write_image_folder(folder: Path, num_classes: int) -> None:
    """The CIFAR-10 pictures of the examples, as many for training as fill a batch of 8, and one a class for validation.
    """
    images = ROOT / 'examples' / 'images' / 'cifar10'
    with open(images / 'labels.csv') as file:
        rows = sorted((row['label'], images / row['file']) for row in csv.DictReader(file))
    for split, count in (('train', math.ceil(8 / num_classes)), ('validation', 1)):
        for i in range(num_classes):
            (folder / split / f'class{i:03}').mkdir(parents=True)
            for j in range(count):
                (folder / split / f'class{i:03}' / f'{j}.jpg').symlink_to(rows[(i * 4 + j) % len(rows)][1])


def write_weights(path: Path, model: str, kwargs: Dict, **others) -> None:
    """Weights of a model as it is initialised, in the place of those that a text has trained, beside others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state_dict = timm.create_model(model, **kwargs).state_dict()
    if path.suffix == '.safetensors':
        save_file(state_dict, path)
    else:
        torch.save({'state_dict': state_dict, **others}, path)


def comes_with_a_file(model: str, kwargs: Dict) -> bool:
    """Whether pretrained weights of a model are on this machine."""
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    return model.startswith('local-dir:') or 'file' in overlay or bool(timm.get_pretrained_cfg_value(model, 'file'))


class Model(NamedTuple):
    name: str
    kwargs: Dict[str, Any]
    overlay: Dict[str, Any]  # entries of the pretrained config


class Workplace:
    """A document's folder and namespace."""

    def __init__(self, folder: Path, document: str, sort_of_clevr: Path) -> None:
        texts = [s.text for s in all_snippets() if s.document == document and s.kind == 'sh']
        self.folder, self.document, self.sort_of_clevr = folder, document, sort_of_clevr
        self.names = dict(NAMES)
        # arguments by the name of the experiment
        trainings = [arguments for arguments in map(arguments_of, texts) if 'train.py' in arguments]
        self.trainings = {options(arguments).experiment: arguments for arguments in trainings}
        self.written = set()  # folders and experiments that commands have written
        left_out = shutil.ignore_patterns('.*', '__pycache__', 'output', 'build', 'dist', '*.egg-info')
        shutil.copytree(ROOT, folder, copy_function=os.symlink, ignore=left_out)

    def exists(self, path: str) -> bool:
        return (self.folder / path).exists()

    def prepare(self, arguments: List[str]) -> List[str]:
        """Make what a command reads and no command before it has written."""
        given, config, model = options(arguments), self.config_of(arguments), self.model_of(arguments)
        for i, argument in enumerate(arguments):
            if argument.endswith('/validation') and not self.exists(argument):
                write_image_folder((self.folder / argument).parent, int(PLACEHOLDERS['N']))
            elif argument == given.data_dir and not self.exists(argument):
                if config.get('dataset') == 'sort_of_clevr' or 'benchmarks.validate_sort_of_clevr' in arguments:
                    arguments = [*arguments[:i], str(self.sort_of_clevr), *arguments[i + 1:]]
                else:
                    of_tag = timm.get_pretrained_cfg_value(model.name, 'num_classes') if '.' in model.name else None
                    num_classes = given.num_classes or config.get('num_classes') or of_tag or 10
                    write_image_folder(self.folder / argument, num_classes)
            elif argument.endswith(('.pth.tar', '.safetensors', '.th')) and '=' not in argument:
                self.prepare_weights(argument, model)
        if 'file' in model.overlay:
            self.prepare_weights(model.overlay['file'], model)
        self.written |= {name for name in (given.experiment, given.output, given.out) if name}
        return arguments

    def config_of(self, arguments: List[str]) -> Dict:
        """The recipe that a command names."""
        config = options(arguments).config or next((a for a in arguments if a.endswith('.yaml')), None)
        return yaml.safe_load((self.folder / config).read_text()) if config and self.exists(config) else {}

    def prepare_weights(self, path: str, model: Model) -> None:
        """Write the weights that a command reads, unless they are there."""
        # where a command of this document has written, paths have to be right
        if self.exists(path) or any(name in path.split('/') or path.startswith(f'{name}/') for name in self.written):
            return
        training = next((a for name, a in self.trainings.items() if name in path.split('/')), None)
        if training is None:
            write_weights(self.folder / path, model.name, model.kwargs)
            return
        given, trained = options(training), self.model_of(training)
        model_kwargs = {name: value for name, value in trained.kwargs.items() if name != 'num_classes'}
        write_weights(self.folder / path, trained.name, trained.kwargs, args=argparse.Namespace(
            model=trained.name, num_classes=trained.kwargs['num_classes'], model_kwargs=model_kwargs,
            img_size=given.img_size, data_dir=given.data_dir))

    def model_of(self, arguments: List[str]) -> Model:
        given, config = options(arguments), self.config_of(arguments)
        name, kwargs = given.model or config.get('model') or '', dict(config.get('model_kwargs') or {})
        if 'runs' in config:
            name, kwargs['img_size'] = next(iter(config['runs'].values()))['model'], config['image_size']
        kwargs = dict(given.model_kwargs or kwargs)
        overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
        kwargs.pop('pretrained', None)
        num_classes = overlay.get('num_classes') or given.num_classes
        if num_classes:
            kwargs['num_classes'] = num_classes
        return Model(name, kwargs, overlay)

    def shorten(self, arguments: List[str], rule: Rule) -> List[str]:
        arguments = [*arguments, *rule.shorten.split()]
        if 'benchmarks.compare' in arguments and '--runs' not in arguments:
            recipe = yaml.safe_load((self.folder / arguments[3]).read_text())
            arguments += ['--runs', next(iter(recipe['runs']))]
        if '--pretrained' in arguments:
            model = self.model_of(arguments)
            if 'file' not in model.overlay and not comes_with_a_file(model.name, {}):
                arguments.remove('--pretrained')  # there is no network
        return arguments


def run(arguments: List[str], folder: Path, monkeypatch, capfd) -> str:
    """Run a command, in this process for the sake of time, but for timm's training script.

    Returns:
        What it printed.
    """
    command = ['-m', MODULES[arguments[0]], *arguments[1:]] if arguments[0] in MODULES else arguments[1:]
    if any(argument.endswith('train.py') for argument in command):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
        command = [sys.executable, *command]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
        code, printed = result.returncode, result.stdout + result.stderr
    else:
        run_program, beside_script = runpy.run_path, [str(Path(folder, command[0]).resolve().parent)]
        if command[0] == '-m':
            run_program, command, beside_script = partial(runpy.run_module, alter_sys=True), command[1:], []
        monkeypatch.chdir(folder)
        monkeypatch.setenv('COLUMNS', '200')
        monkeypatch.setattr(sys, 'argv', command)
        monkeypatch.setattr(sys, 'path', [*beside_script, *sys.path])
        # a script's own would outlive what they write to
        monkeypatch.setattr(logging.root, 'handlers', logging.root.handlers[:])
        level = logging.root.level
        try:
            run_program(command[0], run_name='__main__')
            code = 0
        except SystemExit as e:
            code = e.code or 0
        finally:
            logging.root.setLevel(level)
        printed = ''.join(capfd.readouterr())
    assert code == 0, f'{shlex.join(arguments)} ended with {code}:\n{printed[-3000:]}'
    return printed


def with_scripts(arguments: List[str]) -> List[str]:
    return [str(Path(SCRIPTS).resolve() / argument) if SCRIPTS and re.fullmatch(r'\w+\.py', argument) else argument
            for argument in arguments]


def program_of(arguments: List[str]) -> List[str]:
    """The arguments that name the program and its command."""
    count = 1 if arguments[0] != 'python' else 2 if arguments[1] != '-m' else 3
    if arguments[0] == 'hf' or 'timm_ait' in arguments[:count]:
        count += 1
    return arguments[:count]


_helps: Dict[str, str] = {}


def check_options(arguments: List[str], folder: Path, monkeypatch, capfd) -> None:
    """Look up the options of a command, or of a synopsis with […], in the program's help."""
    program = program_of(arguments)
    key = ' '.join(program)
    if key not in _helps:
        _helps[key] = run(with_scripts([*program, '--help']), folder, monkeypatch, capfd)
    if 'run' in program:  # the rest is the script's
        return
    for name in re.findall(r'(?:^|[\s\[])(-{1,2}[a-zA-Z][\w-]*)', ' '.join(arguments[len(program):])):
        assert re.search(rf'(?<![\w-]){name}(?![\w-])', _helps[key]), f'{key} has no option {name}'


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    sort_of_clevr = tmp_path_factory.mktemp('data') / 'sort_of_clevr'
    sort_of_clevr.mkdir()
    write_sort_of_clevr(sort_of_clevr, seed=0, num_train=20, num_validation=4)

    @cache
    def of(document: str) -> Workplace:
        return Workplace(tmp_path_factory.mktemp('document') / 'checkout', document, sort_of_clevr)

    return of


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_UPDATE_CHECK', True, raising=False)


@pytest.mark.parametrize('snippet', parameters(('sh', 'python')))
def test_text(snippet, workplace, monkeypatch, capfd):
    place = workplace(snippet.document)
    if snippet.kind == 'python':
        run_block(snippet.text, place, monkeypatch)
        return
    rule = rule_of(snippet.text)
    assert rule is not None, f'{snippet.document}: no rule covers: {snippet.text}'
    arguments = arguments_of(snippet.text)
    if rule.run:
        arguments = place.shorten(place.prepare(arguments), rule)
        run(with_scripts(arguments), place.folder, monkeypatch, capfd)
    else:
        check_options(arguments, place.folder, monkeypatch, capfd)


def run_block(text: str, place: Workplace, monkeypatch) -> None:
    create_model = timm.create_model

    def create_model_offline(model_name, pretrained=False, **kwargs):
        return create_model(model_name, pretrained=pretrained and comes_with_a_file(model_name, kwargs), **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_model_offline)
    monkeypatch.chdir(place.folder)
    for pattern, replacement in BLOCKS.items():
        replacement = replacement.format(sort_of_clevr=str(place.sort_of_clevr))
        text = re.sub(pattern, lambda match: replacement, text)
    exec(compile(text, place.document, 'exec'), place.names)


@pytest.mark.parametrize('snippet', parameters(('inline',)))
def test_options_in_prose(snippet, workplace, monkeypatch, capfd):
    assert rule_of(snippet.text) is not None, f'{snippet.document}: no rule covers: {snippet.text}'
    check_options(arguments_of(snippet.text), workplace(snippet.document).folder, monkeypatch, capfd)


def test_every_document_has_something_to_run():
    documents = {snippet.document for snippet in all_snippets()}
    assert documents == {file.relative_to(ROOT).as_posix() for file in [*recipes(), *markdown_files()]}


@pytest.mark.parametrize('file', [*markdown_files(), ROOT / 'CHANGELOG.md'], ids=lambda file: file.parent.name)
def test_links_lead_somewhere(file):
    text = file.read_text(encoding='utf-8')
    links = [*re.findall(r'\]\(([^)\s]+)\)', text), *re.findall(r' src="([^"]+)"', text)]
    for link in links:
        path, _, anchor = link.partition('#')
        if '://' in link:
            continue
        target = file.parent / path if path else file
        assert target.exists(), f'{file.name}: {link}'
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding='utf-8')), f'{file.name}: {link}'


def anchors_of(text: str) -> List[str]:
    """Names that GitHub gives to headings."""
    headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


def test_the_readme_is_short():
    assert (ROOT / 'README.md').stat().st_size <= 9 * 1024
