""" timm's own training tasks, with the gradient of criterion + balance loss. """
import pytest
import torch
import torch.nn as nn

import timm
from timm.layers import set_reentrant_ckpt
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from timm.utils import freeze

import tests.models
from timm_ait import balance_loss
from timm_ait.training import install_balance_loss


def make_model(**kwargs):
    return tests.models.make_model('test_ait', **kwargs).train()


def make_task(model, task_cls=ClassificationTask):
    return task_cls(model, nn.CrossEntropyLoss(), verbose=False)


def make_batch():
    return tests.models.images(), torch.tensor([1, 0, 9, 3])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def explicit_step(autocast_dtype=None, num_steps=1, **kwargs):
    """Gradients of criterion + balance loss, written out."""
    model = make_model(**kwargs)
    for _ in range(num_steps):
        x, y = make_batch()
        with torch.autocast('cpu', autocast_dtype, enabled=autocast_dtype is not None):
            loss = nn.functional.cross_entropy(model(x), y) + balance_loss(model)
        (loss / num_steps).backward()
    return gradients(model)


@pytest.mark.parametrize('autocast_dtype', [None, torch.bfloat16, torch.float16])
def test_task_adds_the_balance_loss(autocast_dtype):
    model = make_model()
    with torch.autocast('cpu', autocast_dtype, enabled=autocast_dtype is not None):
        loss = make_task(model)(*make_batch())['loss']
    loss.backward()
    torch.testing.assert_close(gradients(model), explicit_step(autocast_dtype))


def test_under_the_gradient_scaler():
    model = make_model()
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.)
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10)
    with torch.autocast('cpu', torch.float16):
        loss = make_task(model)(*make_batch())['loss']
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = explicit_step(torch.float16)
    for name, grad in gradients(model).items():
        # scaling moves float16 gradients out of the subnormal range, so the two round differently
        difference = (grad - expected[name]).norm() / (expected[name].norm() + 1e-8)
        assert difference < 2e-2, f'{name}: {difference}'


@pytest.mark.parametrize('checkpointing, num_steps', [(False, 3), (True, 1)], ids=['accumulation', 'checkpointing'])
def test_under_gradient_accumulation_or_checkpointing(checkpointing, num_steps):
    model = make_model()
    model.set_grad_checkpointing(checkpointing)
    task = make_task(model)
    for _ in range(num_steps):
        loss = task(*make_batch())['loss']
        loss /= num_steps  # in place, as train.py does
        loss.backward()
    torch.testing.assert_close(gradients(model), explicit_step(num_steps=num_steps))


def test_reentrant_checkpointing_which_would_lose_the_gradient_raises():
    model = make_model()
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match='re-entrant'):
            make_task(model)(*make_batch())['loss'].backward()
    finally:
        set_reentrant_ckpt(False)


def test_compiled_task():
    torch._dynamo.reset()
    model = make_model(depth=1)
    task = make_task(model)
    task.compile(backend='aot_eager')
    task(*make_batch())['loss'].backward()
    torch.testing.assert_close(gradients(model), explicit_step(depth=1))


def test_distillation_task_adds_the_balance_loss_of_the_student_alone():
    student, teacher = make_model(), timm.create_model('test_ait')
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)
    torch.testing.assert_close(task(*make_batch())['balance_loss'], balance_loss(student))
    assert balance_loss(teacher) == 0.


def test_other_models_are_left_alone():
    model = timm.create_model('test_vit', num_classes=10, img_size=32)
    x, y = make_batch()
    result = make_task(model)(x, y)
    assert 'balance_loss' not in result
    torch.testing.assert_close(result['loss'], nn.functional.cross_entropy(result['output'], y))


class TaskThatAddsItself(ClassificationTask):

    def forward(self, input, target):
        result = super().forward(input, target)
        return {**result, 'loss': result['loss'] + balance_loss(self.trainable_module)}


class TaskThatOnlyLooks(ClassificationTask):

    def forward(self, input, target):
        result = super().forward(input, target)
        return {**result, 'watched': balance_loss(self.trainable_module).item()}


@pytest.mark.parametrize('task_cls', [TaskThatAddsItself, TaskThatOnlyLooks])
def test_a_task_that_asks_for_the_balance_loss_has_it_counted_once(task_cls):
    model = make_model()
    make_task(model, task_cls)(*make_batch())['loss'].backward()
    torch.testing.assert_close(gradients(model), explicit_step())


def test_a_task_that_was_there_before_the_import_adds_it_too_and_once(monkeypatch):
    model = make_model()
    task, (x, y) = make_task(model), make_batch()
    monkeypatch.setattr(TrainingTask, '__call__', TrainingTask.__call__)  # to be restored
    del TrainingTask.__call__
    assert 'balance_loss' not in task(x, y)
    for _ in range(2):
        install_balance_loss()
        result = task(x, y)
        expected = nn.functional.cross_entropy(result['output'], y) + balance_loss(model)
        torch.testing.assert_close(result['loss'], expected)


def test_a_frozen_model_has_no_balance_loss():
    model = make_model()
    freeze(model)
    model.head.requires_grad_(True)
    assert make_task(model)(*make_batch())['balance_loss'] == 0.


def test_the_log_says_what_part_of_the_loss_is_balance(caplog):
    with caplog.at_level('INFO'):
        result = ClassificationTask(make_model(), nn.CrossEntropyLoss())(*make_batch())
    assert f'{float(result["balance_loss"]):#.4g} is the balance loss' in caplog.text
