""" TorchScript, scripted and traced. """
import pytest
import torch

from tests.deployment import images, make_ait, other_memory

pytestmark = pytest.mark.filterwarnings('ignore')


COMPILE = {'script': torch.jit.script, 'trace': lambda model: torch.jit.trace(model, images(2))}
HOW = pytest.mark.parametrize('how', COMPILE)


@HOW
@pytest.mark.parametrize('kwargs', [
    dict(), dict(gated=True, beta=2., retrieval_steps=2), dict(retrieval=False), dict(write=False),
    dict(attention=False)], ids=lambda kwargs: '-'.join(kwargs))
def test_computes_the_same_for_any_batch(kwargs, how):
    model = make_ait(**kwargs)
    other_memory(model)
    compiled = COMPILE[how](model)
    for batch_size in (1, 3):
        torch.testing.assert_close(compiled(images(batch_size)), model(images(batch_size)))


@pytest.mark.parametrize('scripted_in_training', [False, True])
def test_a_scripted_model_does_not_train(scripted_in_training):
    scripted = torch.jit.script(make_ait().train(scripted_in_training)).train()
    with pytest.raises(torch.jit.Error, match=r'call model\.eval\(\), or drop --torchscript'):
        scripted(images())


def test_what_does_not_write_is_scripted_in_training_mode():
    model = make_ait(write=False).train()
    torch.testing.assert_close(torch.jit.script(model)(images()), model(images()))
