from functools import partial

import pytest
import torch

from tests.models import images, make_model
from tests.models.equations import Equations, assert_same, randomize

make_model = partial(make_model, 'test_set_transformer')


class SetTransformerEquations(Equations):
    """Section 3 of the paper, transcribed over the parameters of a model, one head at a time."""

    def rff(self, name, x):
        linear = self.linear(f'{name}.0', x)
        return torch.where(linear > 0, linear, 0.)

    def multihead(self, name, q, k, v):
        d = q.shape[-1]
        w_q = self.p[f'{name}.q.weight'].chunk(self.num_heads)
        w_k, w_v = (w.chunk(self.num_heads) for w in self.p[f'{name}.kv.weight'].chunk(2))
        heads = []
        for j in range(self.num_heads):
            q_j = torch.einsum('bnd,ed->bne', q, w_q[j])
            k_j = torch.einsum('bnd,ed->bne', k, w_k[j])
            v_j = torch.einsum('bnd,ed->bne', v, w_v[j])
            scores = torch.exp(torch.einsum('bme,bne->bmn', q_j, k_j) / d ** 0.5)
            heads.append(torch.einsum('bmn,bne->bme', scores / scores.sum(-1, keepdim=True), v_j))
        return torch.einsum('bnd,ed->bne', torch.cat(heads, -1), self.p[f'{name}.proj.weight'])

    def mab(self, name, x, y):
        h = self.layer_norm(f'{name}.norm1', x + self.multihead(f'{name}.attn', x, y, y))
        return self.layer_norm(f'{name}.norm2', h + self.rff(f'{name}.rff', h))

    def isab(self, name, x):
        h = self.mab(f'{name}.induce', self.p[f'{name}.inducing_points'].repeat(len(x), 1, 1), x)
        return self.mab(f'{name}.attend', x, h)

    def pma(self, name, z):
        return self.mab(f'{name}.mab', self.p[f'{name}.seeds'].repeat(len(z), 1, 1), self.rff(f'{name}.rff', z))

    def classify(self, x, depth, question=None):
        x = self.tokens(x, question)
        for i in range(depth):
            x = self.isab(f'blocks.{i}', x)
        x = self.pma('attn_pool', x)
        return self.linear('head', x)[:, 0]


class TestEquations:

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('question_dim', [0, 5])
    def test_outputs_and_gradients_are_those_of_the_paper(self, fused, question_dim):
        model = make_model(depth=2, num_heads=4, question_dim=question_dim)
        model = randomize(model, scale=0.3, fused=fused)
        x = images(2, dtype=torch.float64).requires_grad_()
        question = torch.randn(2, question_dim, dtype=torch.float64) if question_dim else None
        asked = {'question': question} if question_dim else {}

        actual = model(x, **asked)
        expected = SetTransformerEquations(model, num_heads=4).classify(x, 2, question)
        assert_same(actual, expected, [x, *model.parameters()])


class TestQuestions:

    def test_average_pooling_takes_the_patches_and_token_pooling_the_question(self):
        x, question = images(2), torch.randn(2, 5)
        for pool, expected in (('avg', lambda f: f[:, 1:].mean(1)), ('token', lambda f: f[:, 0])):
            model = make_model(question_dim=5, global_pool=pool, num_classes=0).eval()
            features = model.forward_features(x, question=question)
            torch.testing.assert_close(model(x, question=question), expected(features))


class TestModel:

    @pytest.mark.parametrize('kwargs, message', [
        (dict(num_heads=3), 'must be a multiple of num_heads, got num_heads=3'),
        (dict(depth=0), 'depth must be an integer of at least 1, got 0'),
        (dict(num_inducing=0), 'num_inducing must be an integer of at least 1, got 0'),
    ])
    def test_a_bad_argument_is_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_model(**kwargs)
