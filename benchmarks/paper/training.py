""" Training as the published code trains, without waiting for the device between two evaluations. """
import contextlib
import dataclasses
import statistics
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.scheduler import CosineLRScheduler

from timm_ait.layers import GlobalWorkspace, balance_loss, memory_statistics
from timm_ait.layers.published import PublishedWorkspace

from .bodies import create_model
from .data import Split

__all__ = ['Recipe', 'Trainer', 'evaluate', 'evaluate_writing', 'learning_rates']

# steps that run as they are before one is captured in a CUDA graph
_STEPS_BEFORE_CAPTURE = 3
_STEPS_OF_WARM_UP = 10
_EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What runs have in common. The defaults are the published ones."""
    dataset: str = 'cifar10'
    dim: int = 768
    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 512
    lr: float = 1e-4
    weight_decay: float = 0.01


def learning_rates(recipe: Recipe) -> List[float]:
    """The rate of each epoch. The warm-up delays the cosine, which thus does not reach its end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs,
        lr_min=1e-6,
        warmup_t=recipe.warmup_epochs,
        warmup_lr_init=1e-5,
        warmup_prefix=True,
    )
    rates = []
    for epoch in range(recipe.epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def _autocast(device: torch.device) -> torch.autocast:
    # a graph must hold the casts of its weights, which a cache would have made before it
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> float:
    """Accuracy in percent on all items, with the memory as it is stored."""
    model.eval()
    correct = 0
    for items in torch.arange(len(split), device=split.targets.device).split(_EVALUATION_BATCH):
        inputs, targets = split.batch(split.plain_views(items))
        with _autocast(targets.device):
            correct += (model(*inputs).argmax(-1) == targets).sum()
    return 100 * float(correct) / len(split)


def evaluate_writing(model: nn.Module, split: Split, batch_size: int) -> float:
    """Accuracy in percent as the published code measures it: each batch is written before it is read.

    The items come in one random order, the same in every call, and an incomplete last batch is left out. The memory is
    put back at the end, where the published code trains on with it.
    """
    memories = {module: module.memory.clone() for module in model.modules() if isinstance(module, PublishedWorkspace)}
    model.train()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).to(split.targets.device)
    batches = [items for items in order.split(batch_size) if len(items) == batch_size]
    correct = 0
    for items in batches:
        inputs, targets = split.batch(split.plain_views(items))
        with _autocast(targets.device):  # with a graph, as in training: what is written without one may leave no trace
            correct += (model(*inputs).argmax(-1) == targets).sum()
    with torch.no_grad():
        for module, memory in memories.items():
            module.memory.copy_(memory)
    return 100 * float(correct) / (len(batches) * batch_size)


class _Step:
    """One step of training, on the views in `views`; adds its loss to `loss_sum`."""

    def __init__(
            self,
            model: nn.Module,
            forward: Callable[..., torch.Tensor],
            optimizer: torch.optim.Optimizer,
            train: Split,
            batch_size: int,
    ) -> None:
        device = train.targets.device
        self.model = model
        self.forward = forward
        self.optimizer = optimizer
        self.train = train
        self.has_balance_loss = any(isinstance(module, GlobalWorkspace) for module in model.modules())
        self.views = torch.zeros(4, batch_size, dtype=torch.long, device=device)
        self.loss_sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        inputs, targets = self.train.batch(self.views)
        with _autocast(targets.device):
            logits = self.forward(*inputs)
        loss = F.cross_entropy(logits.float(), targets)
        if self.has_balance_loss:
            loss = loss + balance_loss(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum.add_(loss.detach())


class Trainer:
    """Trains a body and an MLP with one seed after another, compiled once."""

    def __init__(
            self,
            recipe: Recipe,
            body: str,
            mlp: str,
            train: Split,
            validation: Split,
            compiled: bool = False,
            graph: bool = False,
    ) -> None:
        """
        Args:
            recipe: What runs have in common.
            body: One of `BODIES`.
            mlp: One of `MLPS`.
            train: What to train on.
            validation: What to evaluate on.
            compiled: Compile the model's training.
            graph: Capture the steps in a CUDA graph.
        """
        self.recipe, self.body, self.mlp = recipe, body, mlp
        self.train, self.validation = train, validation
        self.graph = graph
        self.device = train.targets.device
        self.num_steps = len(train) // recipe.batch_size  # of an epoch: an incomplete last batch is left out
        self.model = self._create_model()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.stream = torch.cuda.Stream() if self.device.type == 'cuda' else None

    def _create_model(self) -> nn.Module:
        model = create_model(self.body, self.mlp, self.recipe.dim, **self.train.dataset.model_kwargs)
        return model.to(self.device)

    @contextlib.contextmanager
    def _on_stream(self):
        """A stream other than the default one, which cannot be captured."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _start(self, seed: int) -> Tuple[_Step, torch.Tensor]:
        """A step of a model that is new again, and the learning rate that it takes."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self._create_model().state_dict())
        on_cuda = self.device.type == 'cuda'
        lr = torch.zeros((), device=self.device)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, weight_decay=self.recipe.weight_decay, fused=True, capturable=on_cuda)
        return _Step(self.model, self.forward, optimizer, self.train, self.recipe.batch_size), lr

    def _run_steps(self, step: _Step, run: Optional[Callable[[], None]], views: torch.Tensor) -> Callable[[], None]:
        """Run a step for each batch of views (4, items); gives what runs further ones."""
        run = run or step
        for i, batch in enumerate(views.split(self.recipe.batch_size, dim=1)):
            if self.graph and run is step and i == _STEPS_BEFORE_CAPTURE:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    step()
                run = graph.replay
            step.views.copy_(batch)
            run()
        return run

    def _evaluate(self) -> Dict[str, float]:
        accuracy = {'frozen': evaluate(self.model, self.validation)}
        if any(isinstance(module, PublishedWorkspace) for module in self.model.modules()):
            accuracy['writing'] = evaluate_writing(self.model, self.validation, self.recipe.batch_size)
        self.model.train()
        return accuracy

    def warm_up(self) -> float:
        """Compile and load all that training and evaluation need, with a few steps that count for nothing.

        Returns:
            Training images per second, of a few steps.
        """
        num_items = min(_STEPS_OF_WARM_UP, self.num_steps) * self.recipe.batch_size
        with self._on_stream():
            step, _ = self._start(seed=0)
            self.model.train()
            generator = torch.Generator(self.device).manual_seed(0)
            run = self._run_steps(step, None, self.train.random_views(num_items, generator))
            views = self.train.random_views(num_items, generator)
            float(step.loss_sum)  # waits for the device
            start = time.perf_counter()
            self._run_steps(step, run, views)
            float(step.loss_sum)
            rate = num_items / (time.perf_counter() - start)
            self._evaluate()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()  # other processes wait for the same device
        return rate

    def run(self, seed: int, eval_every: int) -> Dict[str, Any]:
        """Train with a seed, evaluating every so many epochs and after the last.

        Returns:
            'accuracy' in percent after the last epoch, by how it was measured, 'log', 'parameters',
            'images_per_second' of training (median), and 'memory', the statistics of each workspace.
        """
        with self._on_stream():
            step, lr = self._start(seed)
            self.model.train()
            generator = torch.Generator(self.device).manual_seed(seed)
            run, log, rates = None, [], []
            evaluated, start = 0, time.perf_counter()
            for epoch, rate in enumerate(learning_rates(self.recipe), start=1):
                lr.fill_(rate)
                views = self.train.random_views(self.num_steps * self.recipe.batch_size, generator)
                run = self._run_steps(step, run, views)
                if epoch % eval_every and epoch < self.recipe.epochs:
                    continue
                steps = (epoch - evaluated) * self.num_steps
                loss = float(step.loss_sum) / steps  # waits for the device
                rates.append(steps * self.recipe.batch_size / (time.perf_counter() - start))
                accuracy = self._evaluate()
                log.append(dict(epoch=epoch, lr=rate, loss=loss, accuracy=accuracy))
                print(f'{self.body} {self.mlp} seed {seed}: epoch {epoch}/{self.recipe.epochs}, loss {loss:.4f},',
                      ', '.join(f'{name} {value:.2f}' for name, value in accuracy.items()),
                      f'{rates[-1]:.0f} images/s', flush=True)
                step.loss_sum.zero_()
                evaluated, start = epoch, time.perf_counter()
        return dict(
            accuracy=accuracy,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            images_per_second=statistics.median(rates),
            memory=memory_statistics(self.model),
            log=log,
        )
