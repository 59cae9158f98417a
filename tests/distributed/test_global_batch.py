""" R ranks on B / R images compute with a global batch what one process computes on B. """
import pytest
import torch

from .global_batch import SMALL, TRAININGS, train

A, M, D = (SMALL[name] for name in ('workspace_heads', 'num_slots', 'slot_dim'))


def relative_error(x, expected):
    return float((x - expected).norm() / expected.norm())


@pytest.mark.parametrize('name', [name for name in TRAININGS if name != 'without'])
def test_each_rank_has_the_gradients_and_memories_of_one_process_and_its_loss_in_the_mean(results, name):
    expected = train(**TRAININGS[name])
    loss = torch.stack([result['loss'] for result in results(name)]).mean(dim=0)
    assert relative_error(loss, expected['loss']) < 1e-10
    for result in results(name):
        for value in ('gradient', 'memory', 'coverage'):
            assert relative_error(result[value], expected[value]) < 1e-10, value


def test_without_a_global_batch_values_are_others(results):
    expected = train(**TRAININGS['without'])
    for result in results('without'):
        assert all(relative_error(result[value], expected[value]) > 1e-3 for value in ('gradient', 'memory'))


def test_one_process_without_a_group_needs_no_global_batch():
    for with_, without in zip(train().values(), train(global_batch=False).values()):
        assert torch.equal(with_, without)


@pytest.mark.parametrize('kind, traffic', [
    ('count', dict(
        forward=4 * (A * M * 20 + A * M + A + 2 + M * D + 2 * A),
        backward=4 * (A * M + M * D + 2 * A),
        step=4 * (M * D + 1))),
    ('fraction', dict(
        forward=8 + 4 * (A * M * 10 + A * M + A + 2 + M * D + 2 * A),  # with the number of tokens
        backward=4 * (A * M + M * D + 2 * A),
        step=4 * (M * D + 1))),
    ('without', dict(forward=0, backward=0, step=4 * (M * D + 1))),
])
def test_each_rank_sends_as_many_bytes_as_write_and_advance_say(results, kind, traffic):
    assert all(result[kind] == traffic for result in results('traffic'))
