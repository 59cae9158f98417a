""" benchmarks/workspace.py at small sizes, on the CPU. """
import pytest
import torch

from benchmarks.workspace import NaiveWorkspace, main, parse_args
from timm_ait import balance_loss
from timm_ait.layers import GlobalWorkspace


@pytest.fixture
def rows(capsys):
    """Rows that the command prints, without heading, as lists of cells."""
    def run(*arguments):
        main(['--quick', *arguments])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
        return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines][2:]
    return run


def test_layers_are_timed_beside_each_other(rows):
    found = rows('--part', 'layer', '--case', 'training step', 'evaluation')
    assert [row[:4] for row in found] == [
        [case, 'T 1,024', 'float32', name]
        for case in ('training step', 'evaluation') for name in ('timm_ait', 'naive', 'mlp')]
    assert all(float(milliseconds) > 0 and float(mib) > 0 for _, _, _, _, milliseconds, _, mib, *_ in found)
    assert [row[5] for row in found if row[3] == 'timm_ait'] == ['1.000', '1.000']


def test_naive_layer_computes_what_ours_does():
    kwargs = dict(num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=16)
    ours, naive = GlobalWorkspace(24, **kwargs), NaiveWorkspace(24, **kwargs)
    naive.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 24)
    torch.testing.assert_close(naive.train()(x), ours.train()(x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(naive.own_loss, balance_loss(ours), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(naive.eval()(x), ours.eval()(x), atol=1e-4, rtol=1e-3)


def test_tokens_that_no_images_have_are_named(capsys):
    with pytest.raises(SystemExit):
        parse_args(['--tokens', '100'])
    assert '--tokens must be multiples' in capsys.readouterr().err
