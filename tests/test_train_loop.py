""" timm's training task, saver and resuming, in the order of train.py: a resumed run ends as an uninterrupted one. """
from functools import partial

import pytest
import torch

from timm import create_model
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler

import timm_ait  # noqa: F401, registers the models

NUM_EPOCHS, NUM_BATCHES = 2, 4


class Run:
    """A run of the script, up to where its epochs begin; in float16 with the scaler of losses that it has on GPUs."""

    def __init__(
            self, output, resume=None, autocast_dtype=None, accum_steps=1, checkpointing=False, opt='adamw',
            **model_kwargs):
        torch.manual_seed(42)
        model = create_model('test_ait', num_classes=2, drop_path_rate=0.1, **model_kwargs)
        model.set_grad_checkpointing(checkpointing)
        self.autocast = partial(torch.autocast, 'cpu', autocast_dtype, enabled=autocast_dtype is not None)
        self.scaler = NativeScaler('cpu') if autocast_dtype == torch.float16 else None
        self.accum_steps, self.first_epoch = accum_steps, 0
        self.task = ClassificationTask(model, SoftTargetCrossEntropy(), verbose=False)
        self.model = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(self.model, opt=opt, lr=1e-2, weight_decay=0.05)
        if resume is not None:
            self.first_epoch = resume_task_checkpoint(self.task, resume, self.optimizer, self.scaler)
        self.task.setup_ema(decay=0.9, use_warmup=True)
        if resume is not None:
            load_task_ema_checkpoint(self.task, resume)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, amp_scaler=self.scaler, checkpoint_dir=output, task=self.task)

    def train(self, num_epochs=NUM_EPOCHS):
        """The epochs up to a number of them, each with random numbers of its own, which the script does not resume."""
        for epoch in range(self.first_epoch, num_epochs):
            torch.manual_seed(epoch)
            self.model.train()
            for batch in range(NUM_BATCHES):
                x, y = torch.randn(4, 3, 32, 32), torch.rand(4, 2).softmax(-1)
                with self.autocast():
                    loss = self.task(x, y)['loss'] / self.accum_steps
                need_update = (batch + 1) % self.accum_steps == 0
                if self.scaler is not None:
                    self.scaler(loss, self.optimizer, parameters=self.model.parameters(), need_update=need_update)
                else:
                    loss.backward()
                    if need_update:
                        self.optimizer.step()
                if need_update:
                    self.optimizer.zero_grad()
                    self.task.update_ema(step=epoch * NUM_BATCHES + batch + 1)
            for ema in (False, True):  # validation amid the training
                self.task.get_eval_model(ema=ema).eval()(torch.randn(2, 3, 32, 32))
            self.saver.save_checkpoint(epoch, metric=float(epoch))
        return self

    def states(self):
        """State dicts of the model and of its average."""
        return [state for ema in (False, True) for state in self.task.get_checkpoint_state(ema=ema).values()]


@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(autocast_dtype=torch.bfloat16, accum_steps=2, checkpointing=True),
    dict(autocast_dtype=torch.float16, gated=True), dict(opt='muon'),
], ids=['float32', 'bfloat16-accumulation-checkpointing', 'float16-scaler', 'muon'])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, kwargs):
    whole = Run(tmp_path, **kwargs).train()
    Run(tmp_path, **kwargs).train(num_epochs=1)
    resumed = Run(tmp_path, resume=tmp_path / 'last.pth.tar', **kwargs).train()
    for actual, expected in zip(resumed.states(), whole.states(), strict=True):
        assert actual.keys() == expected.keys()
        assert [key for key, value in actual.items() if not torch.equal(value, expected[key])] == []
    actual, expected = (run.optimizer.state_dict()['state'] for run in (resumed, whole))
    torch.testing.assert_close(actual, expected, rtol=0., atol=0.)
    assert not torch.equal(*(run.model.blocks[0].mlp.workspace.memory for run in (resumed, Run(tmp_path, **kwargs))))
