import re

import pytest
import torch

import timm

from benchmarks.validate_sort_of_clevr import main
from timm_ait.data import SortOfClevr


def test_accuracy_is_that_of_each_kind(sort_of_clevr, capsys):
    main(['ait_tiny_hybrid_75', '--data-dir', str(sort_of_clevr)])
    printed = capsys.readouterr().out
    model = timm.create_model('ait_tiny_hybrid_75', pretrained=True).eval()
    for kind in ('non_relational', 'relational'):
        images, questions, answers = zip(*SortOfClevr(str(sort_of_clevr), 'validation', [kind]))
        images = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            logits = model(images, question=torch.stack([torch.from_numpy(question) for question in questions]))
        expected = (logits.argmax(-1) == torch.tensor(answers)).float().mean().item() * 100
        measured = float(re.search(rf'^{kind} (\S+)', printed, re.MULTILINE)[1])
        assert measured == pytest.approx(expected, abs=0.01) and measured > 80


@pytest.mark.parametrize('arguments, name', [
    (['ait_tiny_hybrid_75', '--data-dir', 'nowhere'], 'nowhere'),
    (['ait_tiny_hybrid_75', '--batch-size', '0'], 'batch-size'), (['ait_tiny_hybrid_75', '--device', 'gpu'], 'gpu'),
    (['ait_small'], 'ait_small'), (['no_such_model'], 'no_such_model'),
])
def test_bad_input(sort_of_clevr, capsys, arguments, name):
    with pytest.raises(SystemExit, match='2'):
        main([arguments[0], '--data-dir', str(sort_of_clevr), *arguments[1:]])
    message = capsys.readouterr().err.split('error: ')[-1]
    assert name in message and message.count('\n') == 1
