""" Ranks that compete among themselves hold one memory, whatever wraps the model; with a global batch, R ranks on B / R
images compute what one process computes on B.
"""
import pytest
import torch

from timm_ait.ops.memory import project_memory

from .global_batch import SMALL, TRAININGS, train

A, M, D = (SMALL[name] for name in ('workspace_heads', 'num_slots', 'slot_dim'))


def assert_same(tensors):
    first, *others = tensors
    assert all(torch.equal(first, other) for other in others)


def projected_mean(written):
    """Of written memories (R, ..., M, D) of R ranks."""
    mean = torch.stack(written).mean(dim=0)
    return torch.stack([project_memory(memory) for memory in mean.flatten(0, -3)]).view_as(mean)


def relative_error(x, expected):
    return float((x - expected).norm() / expected.norm())


class TestOneMemory:

    topic = 'one_memory'

    @pytest.mark.parametrize('name', ['ddp', 'ddp without buffers', 'copy of ddp', 'task', 'fsdp'])
    def test_each_step_moves_the_memory_of_all_ranks_to_the_projected_mean_of_what_they_wrote(self, results, name):
        written = [result['written'] for result in results(name)]
        assert (written[0] - written[1]).abs().max() > 0.01
        memory = results(name)[0]['memory']
        torch.testing.assert_close(memory, projected_mean(written), rtol=0., atol=1e-5)
        assert (memory[1:] - memory[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
        for value in ('memory', 'logits'):
            assert_same([result[value] for result in results(name)])

    @pytest.mark.parametrize('name', ['task', 'fsdp'])
    def test_trains_as_under_ddp(self, results, name):
        for result, expected in zip(results(name), results('ddp')):
            torch.testing.assert_close(result['loss'], expected['loss'], rtol=1e-5, atol=0.)
            torch.testing.assert_close(result['memory'], expected['memory'], rtol=0., atol=1e-5)

    @pytest.mark.parametrize('name', ['zero', 'hybrid fsdp', 'other order'])
    def test_whatever_the_optimizer_holds_in_what_order_each_layer_is_averaged_with_itself(self, results, name):
        expected = projected_mean([result['written'] for result in results(name)])
        for result in results(name):
            torch.testing.assert_close(result['memory'], expected, rtol=0., atol=1e-5)

    def test_ranks_move_the_memory_as_one_process_that_accumulates_their_batches(self, results):
        for by_ranks, by_one in zip(results('accumulation by ranks'), results('accumulation by one')):
            torch.testing.assert_close(by_ranks, by_one, rtol=0., atol=1e-9)

    @pytest.mark.parametrize('name', ['unrelated', 'ddp alone', 'fsdp alone', 'named alone'])
    def test_models_of_other_groups_stay_apart(self, results, name):
        for result in results(name):
            torch.testing.assert_close(result['memory'], result['written'], rtol=0., atol=1e-5)

    @pytest.mark.parametrize('name', ['no images', 'last not finite', 'last not finite, advance_memory'])
    def test_a_rank_without_images_or_that_is_not_finite_does_not_count(self, results, name):
        *others, last = results(name)
        assert not last['written'].isfinite().any()
        assert_same([result['memory'] for result in results(name)])
        expected = projected_mean([result['written'] for result in others])
        torch.testing.assert_close(last['memory'], expected, rtol=0., atol=1e-5)

    def test_a_rank_without_images_trains(self, results):
        assert_same([result['weight'] for result in results('no images')])

    @pytest.mark.parametrize('name', ['all not finite', 'last not finite, global batch'])
    def test_nothing_moves_where_nothing_finite_was_written(self, results, name):
        for result in results(name):
            assert torch.equal(result['memory'], result['before'])


class TestGlobalBatch:

    topic = 'global_batch'

    @pytest.mark.parametrize('name', [name for name in TRAININGS if name != 'without'])
    def test_each_rank_has_the_gradients_and_memories_of_one_process_and_its_loss_in_the_mean(self, results, name):
        expected = train(**TRAININGS[name])
        loss = torch.stack([result['loss'] for result in results(name)]).mean(dim=0)
        assert relative_error(loss, expected['loss']) < 1e-10
        for result in results(name):
            for value in ('gradient', 'memory', 'coverage'):
                assert relative_error(result[value], expected[value]) < 1e-10, value

    def test_without_a_global_batch_values_are_others(self, results):
        expected = train(**TRAININGS['without'])
        for result in results('without'):
            assert all(relative_error(result[value], expected[value]) > 1e-3 for value in ('gradient', 'memory'))

    def test_one_process_without_a_group_needs_no_global_batch(self):
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
    def test_each_rank_sends_as_many_bytes_as_write_and_advance_say(self, results, kind, traffic):
        assert all(result[kind] == traffic for result in results('traffic'))
