""" R ranks on B / R images compute with a global batch what one process computes on B. """
import pytest
import torch

from .global_batch import SMALL, TRAININGS, train

EXACT = [name for name in TRAININGS if name != 'without']


@pytest.fixture
def results(ranks):
    """Those of a scenario, a list by rank."""
    return lambda name: [result['global_batch', name] for result in ranks]


@pytest.fixture(scope='module')
def one_process():
    """Results of each training by this process."""
    return {name: train(**kwargs) for name, kwargs in TRAININGS.items()}


def relative_error(x, expected):
    return float((x - expected).norm() / expected.norm())


class TestTraining:

    @pytest.mark.parametrize('name', EXACT)
    def test_mean_of_the_losses_is_the_loss_of_one_process(self, results, one_process, name):
        loss = torch.stack([result['loss'] for result in results(name)]).mean(dim=0)
        assert relative_error(loss, one_process[name]['loss']) < 1e-10

    @pytest.mark.parametrize('name', EXACT)
    @pytest.mark.parametrize('value', ['gradient', 'memory', 'coverage'])
    def test_each_rank_has_the_values_of_one_process(self, results, one_process, name, value):
        for result in results(name):
            assert relative_error(result[value], one_process[name][value]) < 1e-10

    @pytest.mark.parametrize('value', ['gradient', 'memory'])
    def test_without_a_global_batch_values_are_others(self, results, one_process, value):
        for result in results('without'):
            assert relative_error(result[value], one_process['without'][value]) > 1e-3


def test_one_process_without_a_group_needs_no_global_batch():
    for with_, without in zip(train().values(), train(global_batch=False).values()):
        assert torch.equal(with_, without)


class TestTraffic:
    """Bytes per workspace and step that each rank sends, as `write_normed` and `advance` say; float32."""
    A, M, D = (SMALL[name] for name in ('workspace_heads', 'num_slots', 'slot_dim'))

    def test_forward(self, results):
        A, M, D = self.A, self.M, self.D
        for result in results('traffic'):
            assert result['count']['forward'] == 4 * (A * M * 20 + A * M + A + 2 + M * D + 2 * A)

    def test_forward_with_a_fraction_counts_the_tokens(self, results):
        A, M, D = self.A, self.M, self.D
        for result in results('traffic'):
            assert result['fraction']['forward'] == 8 + 4 * (A * M * 10 + A * M + A + 2 + M * D + 2 * A)

    @pytest.mark.parametrize('kind', ['count', 'fraction'])
    def test_backward(self, results, kind):
        for result in results('traffic'):
            assert result[kind]['backward'] == 4 * (self.A * self.M + self.M * self.D + 2 * self.A)

    @pytest.mark.parametrize('kind', ['count', 'fraction', 'without'])
    def test_step(self, results, kind):
        for result in results('traffic'):
            assert result[kind]['step'] == 4 * (self.M * self.D + 1)

    def test_competition_of_the_rank_alone_sends_nothing(self, results):
        for result in results('traffic'):
            assert result['without']['forward'] == result['without']['backward'] == 0
