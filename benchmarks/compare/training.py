""" Training and evaluating one run, by steps, with timm's optimizers, scheduler and checkpoints. """
import argparse
import copy
import functools
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

import timm
from timm.layers import HybridEmbed
from timm.models import resume_checkpoint
from timm.models.vision_transformer_hybrid import ConvStem
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver

import timm_ait
from benchmarks import bodies  # noqa: F401, registers published_body
from timm_ait.data.sort_of_clevr import QUESTION_DIM
from timm_ait.layers import GlobalWorkspace
from timm_ait.layers.published import PublishedWorkspace

from ..results import write_text
from .data import Split
from .recipe import Recipe, run_settings


def create_run_model(recipe: Recipe, run: Dict[str, Any], num_classes: int) -> torch.nn.Module:
    """The model of a run, made for the recipe's input unless that is its own."""
    kwargs = {**recipe['model_kwargs'], **run}
    for key in ('seeds', 'blocks', 'workspace_kwargs', 'gate_lr'):
        kwargs.pop(key, None)
    if recipe['conv_stem']:
        channels = recipe['conv_stem']
        stem = ConvStem(
            recipe['in_chans'], len(channels), channels, stride=(2,) * len(channels), act_layer=torch.nn.ReLU)
        embed_layer = functools.partial(HybridEmbed, backbone=stem, proj=False)
        kwargs = {'embed_layer': embed_layer, 'patch_size': 1, 'embed_dim': channels[-1], **kwargs}
    name = kwargs.pop('model')
    size = recipe['image_size']
    # a model that was designed for this input keeps its front end
    if timm.get_pretrained_cfg_value(name, 'input_size')[-1] != size:
        kwargs = {'img_size': size, **kwargs}
    if recipe['in_chans'] != 3:
        kwargs = {'in_chans': recipe['in_chans'], **kwargs}
    if recipe['dataset'] == 'sort_of_clevr':
        kwargs = {'question_dim': QUESTION_DIM, **kwargs}
    model = timm.create_model(name, num_classes=num_classes, **kwargs)  # timm leaves out what is None
    if 'blocks' in run:
        timm_ait.add_workspace(model, run['blocks'], **run.get('workspace_kwargs', {}))
    elif 'workspace_kwargs' in run:
        raise ValueError('workspace_kwargs are those of workspaces that are added to blocks, which are missing')
    if recipe['all_patches_from'] is not None and not getattr(getattr(model, 'patch_drop', None), 'prob', 0.):
        raise ValueError(f"all_patches_from={recipe['all_patches_from']}: the model has no patch_drop_rate")
    if 'gate_lr' in run and not _gates(model):
        raise ValueError(f"gate_lr={run['gate_lr']}: the model has no gates")
    return model


def create_run_optimizer(recipe: Recipe, run: Dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = create_optimizer_v2(
        model,
        opt=recipe['opt'],
        lr=recipe['lr'],
        weight_decay=recipe['weight_decay'],
        layer_decay=recipe['layer_decay'],
        **recipe['opt_kwargs'],
    )
    if 'gate_lr' in run:
        gates = _gates(model)
        for group in optimizer.param_groups:
            group['params'] = [p for p in group['params'] if not any(p is gate for gate in gates)]
        optimizer.add_param_group(dict(params=gates, lr_scale=run['gate_lr'] / recipe['lr'], weight_decay=0.))
    return optimizer


def _gates(model: torch.nn.Module) -> List[torch.nn.Parameter]:
    workspaces = [module for module in model.modules() if isinstance(module, GlobalWorkspace)]
    return [workspace.gate for workspace in workspaces if workspace.gate is not None]


def _embed_patches_in_float32(model: torch.nn.Module) -> None:
    """In bfloat16, oneDNN's gradient of a convolution with large strides takes many times as long."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == module.stride:
            module.forward = torch.autocast('cpu', enabled=False)(module.forward)


@torch.inference_mode()
def evaluate(model: torch.nn.Module, split: Split, batch_size: int = 250) -> Tuple[Dict[str, float], float]:
    """Evaluate a model on a split on the same device.

    Returns:
        Accuracy in percent, in all and by group, and images per second (median over batches).
    """
    model.eval()
    correct, rates = [], []
    for items in torch.arange(len(split)).split(batch_size):
        images, targets, kwargs = split.batch(items)
        start = timer()
        logits = model(images, **kwargs)
        rates.append(len(items) / (timer() - start))
        correct.append(logits.argmax(-1) == targets)
    correct = torch.cat(correct).float() * 100
    accuracy = {'all': correct.mean().item()}
    if split.groups is not None:
        for i in split.groups.unique().tolist():
            accuracy[split.group_names[i]] = correct[split.groups == i].mean().item()
    return accuracy, statistics.median(rates)


def evaluate_writing(model: torch.nn.Module, split: Split, batch_size: int) -> float:
    """Accuracy in percent as the published code measures it: each batch is written before it is read.

    The items come in one random order, the same in every call, and an incomplete last batch is left out, unless it is
    the only one. The memory is put back at the end, where the published code trains on with it.
    """
    memories = {module: module.memory.clone() for module in model.modules() if isinstance(module, PublishedWorkspace)}
    model.train()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    batch_size = min(batch_size, len(split))
    num_items = len(split) // batch_size * batch_size
    correct = 0
    for items in order[:num_items].split(batch_size):
        images, targets, kwargs = split.batch(items)
        logits = model(images, **kwargs).detach()  # with a graph: a forward without one is not written
        correct += (logits.argmax(-1) == targets).sum().item()
    with torch.no_grad():
        for module, memory in memories.items():
            module.memory.copy_(memory)
    return 100 * correct / num_items


def _evaluate_run(model: torch.nn.Module, test: Split, batch_size: int) -> Tuple[Dict[str, float], float]:
    accuracy, rate = evaluate(model, test)
    if any(isinstance(module, PublishedWorkspace) for module in model.modules()):
        accuracy['writing'] = evaluate_writing(model, test, batch_size)
    return accuracy, rate


def _multiply_adds(model: torch.nn.Module, split: Split) -> int:
    """Multiply-adds of one item."""
    images, _, kwargs = split.batch(torch.arange(1))
    # the counter's hooks stumble over parameters with gradients, and it counts nothing inside of a fused attention
    model = copy.deepcopy(model).requires_grad_(False).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(images, **kwargs)
    return counter.get_total_flops() // 2


@functools.lru_cache(maxsize=1)
def _order(num_items: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))


def _items(step: int, num_items: int, batch_size: int, seed: int) -> torch.Tensor:
    """The items of a step. Every epoch has an order of its own, and leaves out an incomplete last batch."""
    epoch, position = divmod(step, num_items // batch_size)
    return _order(num_items, 1_000_003 * seed + epoch)[position * batch_size:(position + 1) * batch_size]


def train_run(
        recipe: Recipe,
        run: Dict[str, Any],
        seed: int,
        folder: Path,
        train: Split,
        test: Split,
        compiled: bool,
) -> None:
    """Train one model with one seed, or go on with it; leaves `result.json` in the folder once it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / 'settings.json', json.dumps(run_settings(recipe, run)))
    device = train.targets.device
    torch.manual_seed(seed)
    model = create_run_model(recipe, run, len(train.class_names)).to(device)
    if device.type == 'cpu':
        _embed_patches_in_float32(model)
    optimizer = create_run_optimizer(recipe, run, model)
    steps, batch_size = recipe['steps'], recipe['batch_size']
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=steps, t_in_epochs=False,
        warmup_t=recipe['warmup_steps'], warmup_lr_init=recipe['lr'] / 100, warmup_prefix=False,
    )
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(model=run['model']), checkpoint_dir=str(folder), max_history=1)
    first_step, log = 0, []
    if (folder / 'last.pth.tar').is_file():
        first_step = resume_checkpoint(model, str(folder / 'last.pth.tar'), optimizer, log_info=False)
        log = [entry for entry in json.loads((folder / 'log.json').read_text()) if entry['step'] <= first_step]

    amp_dtype = getattr(torch, recipe['amp_dtype'])
    forward = torch.compile(model) if compiled else model
    rates: List[float] = []
    rated_step, start = first_step, timer()
    for step in range(first_step, steps):
        items = _items(step, len(train), batch_size, seed)
        images, targets, kwargs = train.batch(items, recipe, torch.Generator().manual_seed(1_000_003 * seed + step))
        torch.manual_seed(1_000_003 * seed + step)  # of dropout
        scheduler.step_update(step)
        if recipe['all_patches_from'] is not None and step >= recipe['all_patches_from']:
            model.patch_drop.prob = 0.
        model.train()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            logits = forward(images, **kwargs)
            loss = F.cross_entropy(logits, targets) + timm_ait.balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        if recipe['clip_grad']:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe['clip_grad'])
        optimizer.step()
        done = step + 1
        if step == first_step and done % recipe['eval_every'] and done < steps:
            rated_step, start = done, timer()  # the first step compiles
        if done % recipe['eval_every'] == 0 or done == steps:
            rates.append((done - rated_step) * batch_size / (timer() - start))
            accuracy, inference_rate = _evaluate_run(model, test, batch_size)
            ranks = {name: layer['effective_rank'] for name, layer in timm_ait.memory_statistics(model).items()}
            log.append(dict(step=done, loss=loss.item(), accuracy=accuracy, effective_rank=ranks))
            write_text(folder / 'log.json', json.dumps(log))
            saver.save_checkpoint(step, accuracy['all'])
            print(f'{folder}: step {done}/{steps}', ', '.join(f'{k} {v:.2f}' for k, v in accuracy.items()),
                  f'{statistics.median(rates):.0f} images/s', flush=True)
            rated_step, start = done, timer()
    if first_step == steps:  # it was interrupted after its last step
        accuracy, inference_rate = _evaluate_run(model, test, batch_size)
    ranks = log[-1]['effective_rank'].values()
    write_text(folder / 'result.json', json.dumps(dict(
        accuracy=accuracy,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=_multiply_adds(model, test),
        training_rate=statistics.median(rates) if rates else None,
        inference_rate=inference_rate,
        device=(torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type) + ', compiled' * compiled,
        lowest_rank=min(ranks) if ranks else None,
        gates=[gate.square().mean().sqrt().item() for gate in _gates(model)],
        log=log,
    ), indent=2))
