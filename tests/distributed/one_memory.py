""" Training steps of each of several ranks, whose workspaces compete among themselves only. """
import copy
from functools import partial
from typing import Callable, Dict, Iterator, List

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import timm
from timm.task import ClassificationTask

import timm_ait
from tests.layers import written_by
from timm_ait.layers import GlobalWorkspace


def make_model(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_ait', img_size=16, num_classes=5, **{'depth': 2, **kwargs})


def images(rank: int, step: int = 0):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.randint(5, (3,), generator=generator)


def workspaces(model: nn.Module) -> List[GlobalWorkspace]:
    return [module for module in model.modules() if isinstance(module, GlobalWorkspace)]


def memory(model: nn.Module) -> torch.Tensor:
    return torch.stack([workspace.memory for workspace in workspaces(model)])


def written(model: nn.Module) -> torch.Tensor:
    """Mean of what was written since the last step, (L, M, D); nan where nothing was."""
    return torch.stack([written_by(workspace) for workspace in workspaces(model)])


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 of a ViT's blocks and the rest."""
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicate(model: nn.Module) -> nn.Module:
    """Hybrid FSDP1 with a replica on each rank, between which it averages no gradients then."""
    mesh = init_device_mesh('cpu', (dist.get_world_size(), 1))
    return FullyShardedDataParallel(
        model, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD, use_orig_params=True,
        device_id=torch.device('cpu'))


def alone(model: nn.Module, how: str) -> nn.Module:
    """Rank by itself, as DDP, FSDP2 or the user says."""
    mesh = init_device_mesh('cpu', (dist.get_world_size(), 1), mesh_dim_names=('apart', 'together'))['together']
    if how == 'fsdp':
        return fully_shard(model, mesh=mesh)
    if how == 'ddp':
        return DistributedDataParallel(model, process_group=mesh.get_group())
    for workspace in workspaces(model):
        workspace.process_group = mesh.get_group()
    return DistributedDataParallel(model, broadcast_buffers=False)


def task(model: nn.Module) -> nn.Module:
    """timm's task, which wraps the model itself."""
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False).prepare_distributed()


def backward(net: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    x, y = images(rank, step)
    if isinstance(net, ClassificationTask):
        loss = net(x, y)['loss']
    else:
        loss = F.cross_entropy(net(x), y) + timm_ait.balance_loss(net)
    loss.backward()
    return loss.detach()


def train(
        rank: int,
        num_ranks: int,
        wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
        make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        depth: int = 2,
) -> Dict[str, torch.Tensor]:
    """Three steps.

    Returns:
        'loss' of each; 'written' and 'memory', what is pending before and stored after each; 'logits' of the same
        images on all ranks in the end.
    """
    model = make_model(depth=depth)
    net = wrap(model)
    model = net.module if isinstance(net, DistributedDataParallel) else model
    optimizer = make_optimizer(net.parameters(), lr=0.1)
    results = {'loss': [], 'written': [], 'memory': []}
    for step in range(3):
        results['loss'].append(backward(net, rank, step))
        results['written'].append(written(model))
        optimizer.step()
        optimizer.zero_grad()
        results['memory'].append(memory(model))
    results = {name: torch.stack(values) for name, values in results.items()}
    with torch.no_grad():
        return {**results, 'logits': model.eval()(images(rank=0)[0])}


def sgd_in_an_order_of_the_rank(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters)[::-1 if dist.get_rank() else 1], lr=lr)


def accumulate(rank: int, num_ranks: int, as_ranks: bool) -> Dict[str, torch.Tensor]:
    """Two steps of four batches, all on each rank by itself, or a part of them on each of the ranks together."""
    model = make_model().double()
    net = DistributedDataParallel(model) if as_ranks else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    num_batches = 4 * num_ranks
    results = {'memory': [], 'weight': []}
    for step in range(2):
        for i in range(num_batches):
            if not as_ranks or i % num_ranks == rank:
                x, y = images(i, step)
                loss = F.cross_entropy(net(x.double()), y) + timm_ait.balance_loss(net)
                (loss / (4 if as_ranks else num_batches)).backward()  # no no_sync(): buffers are broadcast each time
        optimizer.step()
        optimizer.zero_grad()
        results['memory'].append(memory(model))
        results['weight'].append(model.head.weight.detach().clone())
    return {name: torch.stack(values) for name, values in results.items()}


def train_unrelated(rank: int, num_ranks: int) -> Dict[str, torch.Tensor]:
    """As many steps as its rank plus one, of each rank by itself."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(rank + 1):
        backward(model, rank, step)
        before = written(model)
        optimizer.step()
    return {'written': before, 'memory': memory(model)}


def train_without_images(rank: int, num_ranks: int) -> Dict[str, torch.Tensor]:
    """A step in which the last rank has no images."""
    model = make_model()
    net = DistributedDataParallel(model)
    x, y = images(rank)
    num_images = 0 if rank == num_ranks - 1 else len(x)
    loss = F.cross_entropy(net(x[:num_images]), y[:num_images], reduction='sum') + timm_ait.balance_loss(net)
    loss.backward()
    results = {'written': written(model)}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {**results, 'memory': memory(model), 'weight': model.blocks[0].mlp.workspace.q.weight.detach()}


def write_not_finite(rank: int, num_ranks: int, ranks: str, by_optimizer: bool, **kwargs) -> Dict[str, torch.Tensor]:
    """A step in which one rank's ('last'), or all ranks' images are not finite."""
    model = make_model(**kwargs)
    for workspace in workspaces(model):
        workspace.process_group = dist.group.WORLD
    before = memory(model)
    x, _ = images(rank)
    model(x if ranks == 'last' and rank < num_ranks - 1 else x * float('nan'))
    results = {'before': before, 'written': written(model)}
    if by_optimizer:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        timm_ait.advance_memory(model)
    return {**results, 'memory': memory(model)}


SCENARIOS = {
    'ddp': train,
    'ddp without buffers': partial(train, wrap=partial(DistributedDataParallel, broadcast_buffers=False)),
    'copy of ddp': partial(train, wrap=lambda model: copy.deepcopy(DistributedDataParallel(model))),
    'task': partial(train, wrap=task),
    'fsdp': partial(train, wrap=shard),
    'hybrid fsdp': partial(train, wrap=replicate),
    'other order': partial(train, make_optimizer=sgd_in_an_order_of_the_rank),
    'zero': partial(train, make_optimizer=partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD), depth=3),
    **{f'{how} alone': partial(train, wrap=partial(alone, how=how)) for how in ('ddp', 'fsdp', 'named')},
    'accumulation by one': partial(accumulate, as_ranks=False),
    'accumulation by ranks': partial(accumulate, as_ranks=True),
    'unrelated': train_unrelated,
    'no images': train_without_images,
    'last not finite': partial(write_not_finite, ranks='last', by_optimizer=True),
    'last not finite, advance_memory': partial(write_not_finite, ranks='last', by_optimizer=False),
    'all not finite': partial(write_not_finite, ranks='all', by_optimizer=True),
    'last not finite, global batch': partial(write_not_finite, ranks='last', by_optimizer=True, global_batch=True),
}
