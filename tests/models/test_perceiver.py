import math
from functools import partial

import pytest
import torch

from tests.models import images, make_model
from tests.models.equations import Equations, assert_same, randomize

make_model = partial(make_model, 'test_perceiver')


class PerceiverEquations(Equations):
    """Appendix C of the paper, transcribed over the parameters of a model, one head at a time."""

    @staticmethod
    def attention(q, k, v, num_heads):
        heads = []
        for q_j, k_j, v_j in zip(*(t.chunk(num_heads, -1) for t in (q, k, v))):
            scores = torch.exp(torch.einsum('bme,bne->bmn', q_j, k_j) / q_j.shape[-1] ** 0.5)
            heads.append(torch.einsum('bmn,bne->bme', scores / scores.sum(-1, keepdim=True), v_j))
        return torch.cat(heads, -1)

    def dense(self, name, x):
        h = self.linear(f'{name}.mlp.fc1', self.layer_norm(f'{name}.norm2', x))
        return x + self.linear(f'{name}.mlp.fc2', h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))

    def cross_attend(self, name, latents, tokens):
        q = self.linear(f'{name}.attn.q', self.layer_norm(f'{name}.norm1', latents))
        k, v = self.linear(f'{name}.attn.kv', self.layer_norm(f'{name}.norm_tokens', tokens)).chunk(2, -1)
        return self.dense(name, latents + self.linear(f'{name}.attn.proj', self.attention(q, k, v, num_heads=1)))

    def self_attend(self, name, x):
        q, k, v = self.linear(f'{name}.attn.qkv', self.layer_norm(f'{name}.norm1', x)).chunk(3, -1)
        return self.dense(name, x + self.linear(f'{name}.attn.proj', self.attention(q, k, v, self.num_heads)))

    def classify(self, x, depth, num_iterations, question=None):
        """The first cross-attention has weights of its own, the others share theirs; so do all latent transformers."""
        tokens = self.tokens(x, question)
        x = self.p['blocks.0.latents'].repeat(len(tokens), 1, 1)
        for iteration in range(num_iterations):
            x = self.cross_attend(f'blocks.0.cross_attns.{min(iteration, 1)}', x, tokens)
            for i in range(depth):
                x = self.self_attend(f'blocks.0.latent_transformers.0.{i}', x)
        return self.linear('head', x.mean(1, keepdim=True))[:, 0]


class TestEquations:

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('question_dim', [0, 5])
    @pytest.mark.parametrize('num_iterations', [1, 3])
    def test_outputs_and_gradients_are_those_of_the_paper(self, fused, question_dim, num_iterations):
        model = make_model(num_heads=4, question_dim=question_dim, num_iterations=num_iterations)
        model = randomize(model, fused=fused)
        x = images(2, dtype=torch.float64).requires_grad_()
        question = torch.randn(2, question_dim, dtype=torch.float64) if question_dim else None
        asked = {'question': question} if question_dim else {}

        actual = model(x, **asked)
        expected = PerceiverEquations(model, num_heads=4).classify(x, 2, num_iterations, question)
        assert_same(actual, expected, [x, *model.parameters()])


class TestIntermediates:

    def test_features_only_raises(self):
        with pytest.raises(RuntimeError, match='features_only is not implemented for Perceiver'):
            make_model(features_only=True)

    def test_intermediates_are_those_of_models_with_fewer_iterations(self):
        model, x = make_model().eval(), images(2)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        for i, latents in enumerate(intermediates):
            fewer = make_model(num_iterations=i + 1).eval()
            state = model.state_dict()
            fewer.load_state_dict({name: state[name] for name in fewer.state_dict()})
            torch.testing.assert_close(latents, fewer.forward_features(x))
        only, = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(only, intermediates[1])

    def test_there_are_no_grids(self):
        with pytest.raises(AssertionError, match='latents are not on a grid'):
            make_model().forward_intermediates(images(2), output_fmt='NCHW')


class TestModel:

    @pytest.mark.parametrize('kwargs, message', [
        (dict(depth=0), 'depth must be an integer of at least 1, got 0'),
        (dict(num_latents=0), 'num_latents must be an integer of at least 1, got 0'),
        (dict(num_iterations=0), 'num_iterations must be an integer of at least 1, got 0'),
        (dict(global_pool='token'), "global_pool must be one of .* got 'token'"),
    ])
    def test_a_bad_argument_is_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_model(**kwargs)
