""" benchmarks/workspace.py at small sizes, on the CPU. """
import json

import pytest
import torch

from benchmarks.workspace import NaiveWorkspace, main, parse_args
from timm_ait import balance_loss
from timm_ait.layers import GlobalWorkspace


def rows_of(tmp_path, *arguments):
    main(['--quick', '--out', str(tmp_path), *arguments])
    return json.loads((tmp_path / 'workspace.json').read_text())['results']


def test_layers_are_timed_beside_each_other(tmp_path, capsys):
    rows = rows_of(tmp_path, '--part', 'layer', '--case', 'training step', 'evaluation')
    assert [(row['case'], row['contender']) for row in rows] == [
        (case, name) for case in ('training step', 'evaluation') for name in ('timm_ait', 'naive', 'mlp')]
    assert all(row['milliseconds'] > 0 and row['peak_mib'] > 0 for row in rows)
    assert [row['time_ratio'] for row in rows if row['contender'] == 'timm_ait'] == [1., 1.]
    assert capsys.readouterr().out.count('\n| training step | T 1,024 | float32 |') == 3


def test_models_are_timed_beside_those_without_workspaces(tmp_path):
    rows = rows_of(tmp_path, '--part', 'latency', '--dtype', 'bfloat16')
    name = 'ait_vit_tiny_patch16_224'
    assert [row['contender'] for row in rows] == [f'{name}, workspace=False', name]


def test_scaling_varies_one_size(tmp_path):
    rows = rows_of(
        tmp_path, '--part', 'scaling', '--sweep', 'k', '--case', 'training forward', '--contenders', 'timm_ait')
    assert [(row['size'], row['value']) for row in rows] == [('k', 32), ('k', 64), ('k', 128)]


def test_naive_layer_computes_what_ours_does():
    kwargs = dict(num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=16)
    ours, naive = GlobalWorkspace(24, **kwargs), NaiveWorkspace(24, **kwargs)
    naive.workspace.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 24)
    torch.testing.assert_close(naive.train()(x), ours.train()(x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(naive.own_loss, balance_loss(ours), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(naive.eval()(x), ours.eval()(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('arguments, name', [
    (['--tokens', '100'], '--tokens'),
    (['--contenders', 'published'], '--published'),
    (['--dtype', 'int8'], '--dtype'),
])
def test_bad_arguments_are_named(arguments, name, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert name in capsys.readouterr().err
