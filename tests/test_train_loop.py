""" timm's training loop without its script: the pieces of train.py, in its order. """
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from timm import create_model
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, NativeScaler, accuracy, dispatch_clip_grad, random_seed

from tests.layers import written_by
from timm_ait import balance_loss
from timm_ait.layers import GlobalWorkspace
from timm_ait.ops.memory import project_memory

NUM_CLASSES, NUM_EPOCHS = 2, 2


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """An image folder for training in three batches of four; timm's loader drops what is left."""
    folder = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split, num_images in (('train', 7), ('validation', 2)):
        for label in range(NUM_CLASSES):
            of_label = folder / split / str(label)
            of_label.mkdir(parents=True)
            for i in range(num_images):
                pixels = rng.integers(80 * label, 170 + 80 * label, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(of_label / f'{i}.png')
    return folder


class Run:
    """A run of the script with some arguments, up to where its epochs begin.

    Args:
        data_dir: Image folder.
        output: Folder for checkpoints.
        resume: Checkpoint to go on from.
        autocast_dtype: That of AMP; float16 with the scaler of losses, which the script has on GPUs.
        accum_steps: Batches per optimizer step.
        clip_grad: Largest norm of the gradients.
        checkpointing: Checkpoint gradients.
        **model_kwargs: Of the model.
    """

    def __init__(
            self, data_dir, output, resume=None, autocast_dtype=None, accum_steps=1, clip_grad=None,
            checkpointing=False, **model_kwargs):
        random_seed(42)
        model = create_model('test_ait', num_classes=NUM_CLASSES, drop_path_rate=0.1, **model_kwargs)
        model.set_grad_checkpointing(checkpointing)
        self.autocast = partial(torch.autocast, 'cpu', autocast_dtype, enabled=autocast_dtype is not None)
        self.scaler = NativeScaler('cpu') if autocast_dtype == torch.float16 else None
        self.accum_steps, self.clip_grad = accum_steps, clip_grad

        config = resolve_model_data_config(model)
        loader = partial(
            create_loader, batch_size=4, input_size=config['input_size'], mean=config['mean'], std=config['std'],
            interpolation=config['interpolation'], num_workers=0, device=torch.device('cpu'))
        datasets = {
            split: create_dataset('', root=data_dir, split=split, is_training=split == 'train')
            for split in ('train', 'validation')}
        self.loader_train = loader(
            datasets['train'], is_training=True, auto_augment='rand-m9-mstd0.5-inc1', color_jitter=0.4, re_prob=0.25,
            collate_fn=FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1., label_smoothing=0.1, num_classes=NUM_CLASSES))
        self.loader_eval = loader(datasets['validation'], is_training=False, crop_pct=config['crop_pct'])

        self.task = ClassificationTask(model, SoftTargetCrossEntropy(), verbose=False)
        self.model = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(self.model, opt='adamw', lr=1e-2, weight_decay=0.05)
        start_epoch = 0
        if resume is not None:
            start_epoch = resume_task_checkpoint(self.task, resume, self.optimizer, self.scaler)
        self.task.setup_ema(decay=0.9, use_warmup=True)
        if resume is not None:
            load_task_ema_checkpoint(self.task, resume)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, amp_scaler=self.scaler, checkpoint_dir=output, task=self.task)

        self.num_updates = -(-len(self.loader_train) // accum_steps)  # of an epoch
        self.scheduler, num_epochs = create_scheduler_v2(
            self.optimizer, num_epochs=NUM_EPOCHS, warmup_epochs=1, warmup_lr=1e-3, step_on_epochs=False,
            updates_per_epoch=self.num_updates)
        if start_epoch:
            self.scheduler.step_update(start_epoch * self.num_updates)
        self.epochs = range(start_epoch, num_epochs)

    def train(self, num_epochs=NUM_EPOCHS, after_batch=lambda batch_idx: None):
        """The epochs, or the first of them, each with random numbers of its own, which the script does not resume."""
        for epoch in self.epochs[:num_epochs]:
            random_seed(epoch)
            self.train_one_epoch(epoch, after_batch)
            metrics = [self.validate(self.task.get_eval_model(ema=ema)) for ema in (False, True)]
            self.saver.save_checkpoint(epoch, metric=metrics[-1])
            self.scheduler.step(epoch + 1, metrics[-1])
        return self

    def train_one_epoch(self, epoch, after_batch):
        self.model.train()
        self.optimizer.zero_grad()
        num_updates, accum_steps = epoch * self.num_updates, self.accum_steps
        num_whole = len(self.loader_train) // accum_steps * accum_steps
        for batch_idx, (x, y) in enumerate(self.loader_train):
            if batch_idx >= num_whole:
                accum_steps = len(self.loader_train) - num_whole
            with self.autocast():
                loss = self.task(x, y)['loss']
            if accum_steps > 1:
                loss /= accum_steps
            need_update = (batch_idx + 1) % self.accum_steps == 0 or batch_idx + 1 == len(self.loader_train)
            if self.scaler is not None:
                self.scaler(
                    loss, self.optimizer, clip_grad=self.clip_grad, parameters=self.task.get_clip_parameters(),
                    need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    if self.clip_grad is not None:
                        dispatch_clip_grad(self.task.get_clip_parameters(), self.clip_grad)
                    self.optimizer.step()
            after_batch(batch_idx)
            if need_update:
                num_updates += 1
                self.optimizer.zero_grad()
                self.task.update_ema(step=num_updates)
                self.scheduler.step_update(num_updates=num_updates)

    def validate(self, model):
        model.eval()
        top1 = AverageMeter()
        with torch.inference_mode():
            for x, y in self.loader_eval:
                with self.autocast():
                    logits = model(x)
                top1.update(accuracy(logits, y)[0].item(), len(y))
        return top1.avg

    def memories(self):
        return [module.memory.clone() for module in self.model.modules() if isinstance(module, GlobalWorkspace)]

    def written(self):
        """What the memories become in this step."""
        return [
            project_memory(written_by(module))
            for module in self.model.modules() if isinstance(module, GlobalWorkspace)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


VARIANTS = pytest.mark.parametrize('kwargs', [
    dict(clip_grad=1.),
    dict(autocast_dtype=torch.bfloat16, accum_steps=2, checkpointing=True),
    dict(autocast_dtype=torch.float16, clip_grad=1., gated=True),
], ids=['float32', 'bfloat16-accumulation-checkpointing', 'float16-scaler'])


@VARIANTS
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(data_dir, tmp_path, kwargs):
    whole = Run(data_dir, tmp_path, **kwargs).train()
    interrupted = Run(data_dir, tmp_path, **kwargs).train(num_epochs=1)
    resumed = Run(data_dir, tmp_path, resume=tmp_path / 'last.pth.tar', **kwargs)
    assert same(resumed.memories(), interrupted.memories())
    resumed.train()
    assert not same(resumed.memories(), interrupted.memories())
    for ema in (False, True):
        expected = whole.task.get_checkpoint_state(ema=ema)
        (actual,), (expected,) = resumed.task.get_checkpoint_state(ema=ema).values(), expected.values()
        assert actual.keys() == expected.keys()
        assert [key for key, value in actual.items() if not torch.equal(value, expected[key])] == []
    actual, expected = (run.optimizer.state_dict() for run in (resumed, whole))
    torch.testing.assert_close(actual['state'], expected['state'], rtol=0., atol=0.)
    assert [group['lr'] for group in actual['param_groups']] == [group['lr'] for group in expected['param_groups']]


@VARIANTS
def test_the_memory_moves_with_each_step_of_the_optimizer_to_the_mean_of_what_was_written(data_dir, tmp_path, kwargs):
    run = Run(data_dir, tmp_path, **kwargs)
    steps, written, last = [], [], run.memories()
    run.optimizer.register_step_pre_hook(lambda *args: written.append(run.written()))

    def after_batch(batch_idx):
        nonlocal last
        memories = run.memories()
        if written:
            steps.append(batch_idx)
            assert same(memories, written.pop()) and not any(torch.equal(a, b) for a, b in zip(memories, last))
        else:
            assert same(memories, last)
        last = memories

    run.train(after_batch=after_batch)
    expected = NUM_EPOCHS * ([1, 2] if 'accum_steps' in kwargs else [0, 1, 2])
    # of those that the scaler does not skip
    assert steps == expected if run.scaler is None else 0 < len(steps) <= len(expected)
    assert same(run.memories(), last)  # evaluation and saving have left them


def test_the_gradient_has_that_of_the_balance_loss(data_dir, tmp_path):
    gradients = []
    for balance_weight in (0.1, 0.):
        run = Run(data_dir, tmp_path, balance_weight=balance_weight)
        of_steps = []
        run.optimizer.register_step_pre_hook(
            lambda *args: of_steps.append([p.grad.clone() for p in run.model.parameters()]))
        run.train(num_epochs=1)
        gradients.append(of_steps[0])

    run = Run(data_dir, tmp_path, balance_weight=0.1)
    random_seed(0)  # of the first epoch
    x, _ = next(iter(run.loader_train))
    run.model.train()(x)
    balance_loss(run.model).backward()
    for parameter, with_, without in zip(run.model.parameters(), *gradients):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(with_ - without, expected, atol=1e-6, rtol=1e-4)
    assert run.model.patch_embed.proj.weight.grad.abs().max() > 1e-5
