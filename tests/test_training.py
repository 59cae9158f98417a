""" timm's own training tasks, with the gradient of criterion + balance loss. """
import pytest
import torch
import torch.nn as nn

import timm
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask

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


def explicit_step(autocast_dtype=None, scale=1., num_batches=1, **kwargs):
    """Gradients of criterion + balance loss, written out."""
    model = make_model(**kwargs)
    for _ in range(num_batches):
        x, y = make_batch()
        with torch.autocast('cpu', autocast_dtype, enabled=autocast_dtype is not None):
            loss = nn.functional.cross_entropy(model(x), y) + balance_loss(model)
        (loss * scale / num_batches).backward()
    return gradients(model)


@pytest.mark.parametrize('autocast_dtype, scale, num_batches, checkpointing', [
    (None, 1., 1, False), (torch.bfloat16, 1., 1, False), (torch.float16, 2. ** 10, 1, False), (None, 1., 3, False),
    (None, 1., 1, True),
], ids=['float32', 'bfloat16', 'float16 and gradient scaler', 'accumulation', 'checkpointing'])
def test_task_adds_the_balance_loss(autocast_dtype, scale, num_batches, checkpointing):
    model = make_model()
    model.set_grad_checkpointing(checkpointing)
    task, scaler = make_task(model), torch.amp.GradScaler('cpu', init_scale=scale)
    for _ in range(num_batches):
        with torch.autocast('cpu', autocast_dtype, enabled=autocast_dtype is not None):
            loss = task(*make_batch())['loss']
        loss /= num_batches  # in place, as train.py does
        scaler.scale(loss).backward()
    torch.testing.assert_close(gradients(model), explicit_step(autocast_dtype, scale, num_batches))


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
    result = task(*make_batch())
    torch.testing.assert_close(result['balance_loss'], balance_loss(student))
    torch.testing.assert_close(result['loss'], result['task_loss'] + result['kd_loss'] + result['balance_loss'])


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


def test_the_log_says_at_times_what_part_of_the_loss_is_balance(caplog, monkeypatch):
    monkeypatch.setattr('timm_ait.training._LOG_INTERVAL', 2)
    task = ClassificationTask(make_model(), nn.CrossEntropyLoss())
    with caplog.at_level('INFO'):
        results = [task(*make_batch()) for _ in range(3)]
        make_task(make_model())(*make_batch())  # is not verbose
    assert caplog.messages == [
        f'Of the training loss {result["loss"].item():#.4g}, {float(result["balance_loss"]):#.4g} is the balance loss.'
        for result in results[::2]]
