""" Training steps of each of several ranks, whose workspaces compete among themselves only. """
from functools import partial
from typing import Dict, List

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import timm
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3

import timm_ait
from tests.layers import written_by
from timm_ait.layers import GlobalWorkspace


def make_model(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_ait', img_size=16, num_classes=5, **{'depth': 2, **kwargs})


def images(rank: int, step: int = 0):
    """Those of one rank."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.randint(5, (3,), generator=generator)


def workspaces(model: nn.Module) -> List[GlobalWorkspace]:
    return [module for module in model.modules() if isinstance(module, GlobalWorkspace)]


def memory(model: nn.Module) -> torch.Tensor:
    """(L, M, D) of L layers."""
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


def backward(net: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    x, y = images(rank, step)
    loss = F.cross_entropy(net(x), y) + timm_ait.balance_loss(net)
    loss.backward()
    return loss.detach()


def train(
        rank: int,
        num_ranks: int,
        wrapper: str = 'ddp',
        optimizer: str = 'sgd',
        broadcast_buffers: bool = True,
        depth: int = 2,
) -> Dict[str, torch.Tensor]:
    """Three steps.

    Returns:
        'loss' of each; 'written' and 'memory', what is pending before and stored after each; 'ema', an averaged copy's
        state (flat); 'logits' of the same images on all ranks in the end.
    """
    model = make_model(depth=depth)
    ema = ModelEmaV3(model, decay=0.5)
    net = model
    if wrapper == 'ddp':
        net = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    elif wrapper == 'task':
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        task.prepare_distributed(broadcast_buffers=broadcast_buffers)
    elif wrapper == 'fsdp':
        net = shard(model)
    if optimizer == 'sgd':
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    else:
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
    results = {'loss': [], 'written': [], 'memory': []}
    for step in range(3):
        if wrapper == 'task':
            loss = task(*images(rank, step))['loss']
            loss.backward()
        else:
            loss = backward(net, rank, step)
        results['loss'].append(loss.detach())
        results['written'].append(written(model))
        optimizer.step()
        optimizer.zero_grad()
        results['memory'].append(memory(model))
        if wrapper != 'fsdp':  # an average of sharded parameters is of shards
            ema.update(model)
    results = {name: torch.stack(values) for name, values in results.items()}
    with torch.no_grad():
        results['logits'] = net.eval()(images(rank=0)[0])
    return {**results, 'ema': torch.cat([value.flatten() for value in ema.module.state_dict().values()])}


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


def train_unrelated(rank: int, num_ranks: int, **kwargs) -> Dict[str, torch.Tensor]:
    """As many steps as its rank plus one, of each rank by itself."""
    model = make_model(**kwargs)
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
    model = make_model(process_group=dist.group.WORLD, **kwargs)
    before = memory(model)
    x, _ = images(rank)
    model(x if ranks == 'last' and rank < num_ranks - 1 else x * float('nan'))
    results = {'before': before, 'written': written(model)}
    if by_optimizer:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        timm_ait.advance_memory(model)
    return {**results, 'memory': memory(model)}


def skip_step(rank: int, num_ranks: int, **kwargs) -> Dict[str, torch.Tensor]:
    """A step that the gradient scaler skips, since the last rank's loss is beyond float32, and one that it does not."""
    model = make_model()
    net = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **kwargs)
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10)
    results = {'before': memory(model), 'weight': model.head.weight.detach().clone()}
    for name, factor in (('skipped', 3e38 if rank == num_ranks - 1 else 1.), ('stepped', 1.)):
        x, y = images(rank)
        scaler.scale(factor * F.cross_entropy(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        results[name], results[f'{name} weight'] = memory(model), model.head.weight.detach().clone()
    return results


SCENARIOS = {
    'ddp': train,
    'ddp without buffers': partial(train, broadcast_buffers=False),
    'task': partial(train, wrapper='task'),
    'fsdp': partial(train, wrapper='fsdp'),
    'zero': partial(train, optimizer='zero', depth=3),
    'accumulation by one': partial(accumulate, as_ranks=False),
    'accumulation by ranks': partial(accumulate, as_ranks=True),
    'unrelated': train_unrelated,
    'no images': train_without_images,
    'last not finite': partial(write_not_finite, ranks='last', by_optimizer=True),
    'last not finite, advance_memory': partial(write_not_finite, ranks='last', by_optimizer=False),
    'all not finite': partial(write_not_finite, ranks='all', by_optimizer=True),
    'last not finite, global batch': partial(write_not_finite, ranks='last', by_optimizer=True, global_batch=True),
    'skipped': skip_step,
    'skipped, fused': partial(skip_step, fused=True),
}
