""" Symbolic tracing and the feature extractors that are made of it. """
import copy

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

import timm
from timm.models._features_fx import create_feature_extractor as timm_feature_extractor

from tests.deployment import images, make_ait, memories, other_memory, train

pytestmark = pytest.mark.filterwarnings('ignore')


def features(model):
    """Output of the last block."""
    return model.forward_intermediates(images(), output_fmt='NLC', intermediates_only=True)[-1]


def last_block(extractor, model):
    return extractor(model, {'blocks.1.add_1': 'last'})


class TestSymbolicTrace:

    def test_of_evaluation_computes_the_same_and_sees_the_memory_change(self):
        model = make_ait()
        graph = torch.fx.symbolic_trace(model)
        before = graph(images())
        torch.testing.assert_close(before, model(images()))
        other_memory(model)
        torch.testing.assert_close(graph(images()), model(images()))
        assert not torch.allclose(graph(images()), before)

    def test_of_training_writes(self):
        model = make_ait().train()
        alone = copy.deepcopy(model)
        graph = torch.fx.symbolic_trace(model)
        train(graph, 1)
        train(alone, 1)
        assert all(torch.equal(a, b) for a, b in zip(memories(graph), memories(alone)))
        assert all(torch.equal(a, b) for a, b in zip(graph.parameters(), alone.parameters()))


@pytest.mark.parametrize(
    'extractor', [timm_feature_extractor, torchvision_feature_extractor], ids=['timm', 'torchvision'])
def test_feature_extractors_give_the_features_of_the_model_in_either_mode(extractor):
    model = make_ait()
    extracted = last_block(extractor, model)
    for training in (False, True, False):
        model.train(training), extracted.train(training)
        torch.testing.assert_close(extracted(images())['last'], features(model))


def test_features_only_of_the_graph_are_those_of_the_hooks():
    models = []
    for feature_cls in ('fx', 'getter'):
        torch.manual_seed(0)
        models.append(timm.create_model(
            'test_ait', img_size=16, features_only=True, feature_cls=feature_cls, out_indices=(0, 2)).eval())
    for tokens, grid in zip(*(model(images()) for model in models)):
        torch.testing.assert_close(tokens, grid.flatten(2).transpose(1, 2))
