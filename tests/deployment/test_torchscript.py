""" TorchScript, scripted and traced. """
import pytest
import torch

from tests.deployment import TOLERANCE, images, make_ait, make_vit, memories, other_memory, run_without_timm_ait, train

pytestmark = pytest.mark.filterwarnings('ignore')


def compile(model, how):
    return torch.jit.script(model) if how == 'script' else torch.jit.trace(model, images(2))


@pytest.mark.parametrize('how', ['script', 'trace'])
class TestTorchScript:

    @pytest.mark.parametrize('make', [make_ait, make_vit])
    def test_computes_the_same_for_any_batch(self, make, how):
        model = make()
        compiled = compile(model, how)
        for batch_size in (1, 3):
            torch.testing.assert_close(compiled(images(batch_size)), model(images(batch_size)))

    @pytest.mark.parametrize('kwargs', [
        dict(gated=True), dict(retrieval=False), dict(write=False), dict(attention=False),
        dict(beta=2., retrieval_steps=2)], ids=lambda kwargs: '-'.join(kwargs))
    def test_other_workspaces(self, kwargs, how):
        model = make_ait(**kwargs)
        torch.testing.assert_close(compile(model, how)(images()), model(images()))

    def test_holds_the_memory_of_its_time(self, how):
        model = make_ait()
        other_memory(model)
        torch.testing.assert_close(compile(model, how)(images()), model(images()))

    def test_a_loaded_file_runs_without_this_package(self, tmp_path, how):
        model = make_ait()
        compile(model, how).save(tmp_path / 'model.pt')
        torch.save((images(3), model(images(3)).detach()), tmp_path / 'example.pt')
        run_without_timm_ait(
            'import torch\n'
            'x, expected = torch.load("example.pt")\n'
            f'torch.testing.assert_close(torch.jit.load("model.pt")(x), expected, **{TOLERANCE})\n',
            tmp_path,
        )

    def test_freezing_and_optimising_for_inference_keep_the_logits(self, how):
        model = make_ait()
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(compile(model, how)))
        with torch.no_grad():
            torch.testing.assert_close(frozen(images()), model(images()), **TOLERANCE)

    def test_leaves_the_model_able_to_train(self, how):
        model = make_ait()
        compile(model, how)
        before = memories(model)
        train(model, 1)
        assert not any(torch.equal(old, new) for old, new in zip(before, memories(model)))
