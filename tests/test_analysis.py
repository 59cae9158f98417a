import itertools

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_ait
from timm_ait import analysis
from timm_ait.layers import GlobalWorkspace
from timm_ait.ops import naive

FIRST = 'blocks.0.mlp.workspace'


def one_hot_attention(*selected, num_tokens=4):
    """One head whose slots give all their weight to one token each, (1, M, T)."""
    return F.one_hot(torch.tensor([selected]), num_tokens).float()


@pytest.fixture
def model():
    return timm.create_model('test_ait', num_classes=3).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def trained(model, images):
    """A model whose memory has moved and whose gates are open."""
    for block in model.blocks:
        if block.mlp.workspace.gate is not None:
            torch.nn.init.ones_(block.mlp.workspace.gate)
    model.train()(images)
    timm_ait.advance_memory(model)
    return model.eval()


class TestTokens:

    def test_are_the_normed_inputs_of_the_workspaces(self, model, images):
        tokens = analysis.collect_tokens(model, images)
        assert list(tokens) == [f'blocks.{i}.mlp.workspace' for i in range(3)]
        block = model.blocks[0]
        with torch.no_grad():
            x = model.patch_embed(images) + model.pos_embed
            x = x + block.attn(block.norm1(x))
            mlp = block.mlp
            expected = mlp.workspace.norm(mlp.fc2(mlp.act(mlp.fc1(block.norm2(x)))))
        torch.testing.assert_close(tokens[FIRST], expected)

    def test_of_stages_with_grids(self):
        swin = timm.create_model('test_swin', num_classes=0) if timm.is_model('test_swin') else timm.create_model(
            'swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=24, num_heads=(2, 2), img_size=56, num_classes=0)
        timm_ait.add_workspace(swin, num_slots=4, slot_dim=8, workspace_heads=2)
        tokens = analysis.collect_tokens(swin, torch.randn(2, 3, 56, 56))
        assert [x.shape[:2] for x in tokens.values()] == [(2, 14 * 14), (2, 7 * 7)]

    def test_leave_the_model_as_it_was(self, model, images):
        model.train()
        model.blocks[1].eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        analysis.analyse(model, [images])
        assert [module.training for module in model.modules()] == modes
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_need_workspaces(self, images):
        with pytest.raises(ValueError, match='^model: VisionTransformer has no workspaces'):
            analysis.collect_tokens(timm.create_model('test_vit'), torch.randn(1, 3, 160, 160))

    def test_need_the_question_of_question_models(self, images):
        model = timm.create_model('test_ait', question_dim=3)
        with pytest.raises(TypeError, match='question'):
            analysis.analyse(model, [images])
        assert analysis.collect_tokens(model, images, question=torch.randn(4, 3))[FIRST].shape == (4, 65, 64)


class TestWriteAttention:

    def test_is_that_of_the_write(self, model, images):
        tokens = analysis.collect_tokens(model, images)[FIRST]
        workspace = model.blocks[0].mlp.workspace
        attention = analysis.write_attention(workspace, tokens)
        assert attention.shape == (4, 8, 4 * 64)
        model.train()(images)
        # what training measures in the same forward
        assert analysis.competition(attention)['coverage'] == pytest.approx(float(workspace.coverage))
        balance = sum(
            naive.balance_loss(analysis.write_attention(model.get_submodule(name), x))
            for name, x in analysis.collect_tokens(model.eval(), images).items())
        assert balance > 0

    @pytest.mark.parametrize('bottleneck, kept', [(3, 3), (0.25, 16), (1000, 64), (1e-6, 1), (None, 16)])
    def test_keeps_the_bottleneck(self, model, images, bottleneck, kept):
        tokens = analysis.collect_tokens(model, images[:1])[FIRST]
        attention = analysis.write_attention(model.blocks[0].mlp.workspace, tokens, bottleneck)
        assert ((attention > 0).sum(dim=-1) == kept).all()
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(4, 8))

    @pytest.mark.parametrize('bottleneck', [0, -1, 1.5])
    def test_refuses_other_bottlenecks(self, model, bottleneck):
        with pytest.raises(ValueError, match='^bottleneck'):
            analysis.write_attention(model.blocks[0].mlp.workspace, torch.randn(5, 64), bottleneck)

    def test_needs_a_layer_that_writes(self):
        with pytest.raises(ValueError, match='^workspace'):
            analysis.write_attention(GlobalWorkspace(8, write=False), torch.randn(5, 8))

    def test_is_the_softmax_of_the_largest_scores(self, model, images):
        tokens = analysis.collect_tokens(model, images)[FIRST]
        workspace = model.blocks[0].mlp.workspace
        scores = analysis.write_scores(workspace, tokens)
        query = (workspace.q.weight @ workspace.stored_memory()[5])[16:32]
        keys = tokens.flatten(0, 1) @ workspace.k.weight[16:32].T
        torch.testing.assert_close(scores[1, 5], keys @ query / 4.)
        attention = analysis.write_attention(workspace, tokens, 3)
        best = scores.topk(3).indices
        torch.testing.assert_close(attention.gather(-1, best), scores.gather(-1, best).softmax(dim=-1))


def test_writes_of_coordination_are_one_per_image():
    model = timm.create_model('test_coordination').train()
    writes = analysis.coordination_writes(model, torch.randn(2, 3, 32, 32))
    assert list(writes) == ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn']
    for attention, memory in writes.values():
        assert attention.shape == (2, 2, 4, 64) and memory.shape == (2, 4, 32)
        assert ((attention > 0).sum(dim=-1) == 3).all()
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_a_coordination_has_its_writes():
    with pytest.raises(ValueError, match='^model: VisionTransformer'):
        analysis.coordination_writes(timm.create_model('test_vit'), torch.randn(2, 3, 160, 160))


class TestCompetition:

    def test_slots_that_select_the_same_token(self):
        figures = analysis.competition(one_hot_attention(2, 2, 2))
        assert figures['coverage'] == 0.25
        assert figures['overlap'] == 1.
        assert figures['effective_tokens'] == pytest.approx(1.)
        assert figures['largest_weight'] == 1.

    def test_slots_that_select_different_tokens(self):
        figures = analysis.competition(one_hot_attention(0, 1, 2, 3))
        assert figures['coverage'] == 1.
        assert figures['overlap'] == 0.

    def test_even_weights(self):
        figures = analysis.competition(torch.full((2, 3, 4), 0.25))
        assert figures['effective_tokens'] == pytest.approx(4.)
        assert figures['chance_overlap'] == figures['overlap'] == 1.

    def test_overlap_of_random_selections_is_at_chance(self):
        attention = torch.zeros(8, 32, 400).scatter(-1, torch.rand(8, 32, 400).topk(40).indices, 1 / 40)
        figures = analysis.competition(attention)
        assert figures['overlap'] == pytest.approx(figures['chance_overlap'], rel=0.02)

    def test_images_with_memories_of_their_own_do_not_overlap(self):
        attention = torch.stack([one_hot_attention(0, 1), one_hot_attention(0, 0)])
        figures = analysis.competition(attention)
        assert figures['coverage'] == pytest.approx((0.5 + 0.25) / 2)
        assert figures['overlap'] == 0.5


class TestInteractions:

    def test_counts_the_largest_weights(self):
        attention = torch.tensor([[0.5, 0.4, 0.06, 0.04], [0.04, 0.5, 0.3, 0.16], [0.25, 0.25, 0.25, 0.25]])
        assert analysis.interactions(attention).tolist() == [2, 3, 4]
        assert analysis.interactions(torch.eye(4)).tolist() == [1] * 4

    def test_of_heads_with_even_and_with_one_hot_attention(self):
        model = timm.create_model('test_ait').eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight[:128] = 0.
                block.attn.qkv.bias[:128] = 0.
        counts = analysis.self_attention_interactions(model, torch.randn(2, 3, 32, 32))
        assert list(counts) == ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn']
        for count in counts.values():
            assert count.tolist() == [58., 58.]  # 90 % of 64

    def test_are_those_of_plain_vits_too_and_attention_stays_fused(self):
        model = timm.create_model('test_vit').eval()
        fused = [block.attn.fused_attn for block in model.blocks]
        counts = analysis.self_attention_interactions(model, torch.randn(1, 3, 160, 160))
        assert len(counts) == len(model.blocks)
        assert [block.attn.fused_attn for block in model.blocks] == fused

    def test_of_models_without_self_attention(self):
        model = timm.create_model('test_ait', attention=False).eval()
        assert analysis.self_attention_interactions(model, torch.randn(1, 3, 32, 32)) == {}


class TestFixedPoints:

    def test_a_state_near_a_pattern_goes_there_at_high_beta(self):
        patterns = torch.eye(4, 8)
        state = 0.9 * patterns[2:3] + 0.1 * patterns[:1]
        end, steps = analysis.fixed_points(state, patterns, beta=50.)
        torch.testing.assert_close(end, patterns[2:3], atol=1e-4, rtol=0.)
        assert steps.tolist() == [1.]

    def test_all_states_go_to_the_mean_at_low_beta(self):
        patterns = torch.eye(4, 8)
        end, _ = analysis.fixed_points(torch.randn(10, 8), patterns, beta=0.1)
        torch.testing.assert_close(end, patterns.mean(dim=0).expand(10, 8), atol=1e-3, rtol=0.)

    def test_a_fixed_point_takes_no_step(self):
        end, steps = analysis.fixed_points(torch.eye(4, 8), torch.eye(4, 8), beta=100.)
        assert steps.tolist() == [0.] * 4
        torch.testing.assert_close(end, torch.eye(4, 8), atol=1e-5, rtol=0.)

    def test_agrees_with_repeated_retrieval(self):
        state, patterns = torch.randn(20, 16).double(), torch.randn(6, 16).double()
        end, _ = analysis.fixed_points(state, patterns, 0.3, max_steps=4, tolerance=0.)
        for _ in range(4):
            state = naive.retrieve(state, patterns, 0.3)
        torch.testing.assert_close(end, state)

    def test_no_steps_where_it_does_not_get_there(self):
        _, steps = analysis.fixed_points(torch.randn(3, 8), torch.eye(4, 8), beta=1., max_steps=1)
        assert steps.isnan().all()


class TestRetrieval:

    def test_weights_reproduce_what_the_layer_adds(self, model, images):
        workspace = model.blocks[0].mlp.workspace
        x = torch.randn(2, 5, 64)
        tokens = workspace.norm(x)
        read = analysis.read_weights(workspace, tokens) @ analysis.attractors(workspace)
        torch.testing.assert_close(workspace(x), tokens + read)

    def test_energy_never_rises(self, model, images):
        for name, tokens in analysis.collect_tokens(trained(model, images), images).items():
            figures = analysis.retrieval(model.get_submodule(name), tokens)
            assert figures['energy_after'] < figures['energy_before']
            assert figures['energy_rises'] == 0.

    def test_of_sharp_attractors(self):
        workspace = GlobalWorkspace(8, num_slots=4, slot_dim=4, beta=200., memory_init='identity')
        torch.nn.init.eye_(workspace.attractors.weight)
        torch.nn.init.zeros_(workspace.attractors.bias)
        figures = analysis.retrieval(workspace, torch.eye(4, 8))
        assert figures['effective_slots'] == pytest.approx(1.)
        assert figures['largest_read_weight'] == pytest.approx(1.)
        assert figures['num_fixed_points'] == 4
        assert figures['converged'] == 1.
        assert figures['distance'] == pytest.approx(0., abs=1e-5)

    def test_needs_a_layer_that_reads(self):
        with pytest.raises(ValueError, match='^workspace'):
            analysis.retrieval(GlobalWorkspace(8, retrieval=False), torch.randn(5, 8))


class TestBasins:

    def test_stored_patterns_return_at_high_beta(self):
        shares = analysis.basins(torch.eye(4, 8), beta=50., noise=0.5)
        assert shares.tolist() == [1.] * 4

    def test_no_pattern_returns_at_low_beta(self):
        assert analysis.basins(torch.eye(4, 8), beta=0.1).tolist() == [0.] * 4

    def test_patterns_close_together_share_an_attractor(self):
        patterns = torch.eye(4, 8)
        patterns[1] = F.normalize(patterns[0] + 0.05 * patterns[1], dim=0)
        shares = analysis.basins(patterns, beta=20.)
        assert shares.tolist() == [0., 0., 1., 1.]

    def test_more_noise_brings_fewer_back(self):
        shares = [float(analysis.basins(torch.eye(8), 20., noise).mean()) for noise in (0., 1., 3.)]
        assert shares[0] == 1. and shares[0] > shares[1] > shares[2]

    def test_the_generator_decides(self):
        shares = [
            analysis.basins(torch.eye(8), 20., 1., generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(shares[0], shares[1]) and not torch.equal(shares[0], shares[2])


class TestMatching:

    def test_permuted_slots_are_found(self):
        slots, order = torch.randn(16, 40), torch.randperm(16)
        mean, chance, columns = analysis.agreement(slots[order], slots)
        assert torch.equal(columns, order)
        assert mean == pytest.approx(1.)
        assert chance < 0.6

    @pytest.mark.parametrize('columns', [5, 6])
    def test_no_assignment_is_better(self, columns):
        similarity = torch.randn(5, columns)
        found = similarity[torch.arange(5), analysis.match_slots(similarity)].sum()
        best = max(
            sum(similarity[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(columns), 5))
        torch.testing.assert_close(found, best)

    def test_each_slot_is_matched_once(self):
        assert analysis.match_slots(torch.ones(6, 6)).sort().values.tolist() == list(range(6))

    @pytest.mark.parametrize('similarity', [torch.ones(3, 2), torch.full((2, 2), float('nan'))])
    def test_refuses_what_cannot_be_matched(self, similarity):
        with pytest.raises(ValueError, match='^similarity'):
            analysis.match_slots(similarity)

    def test_slots_that_have_nothing_in_common_are_at_chance(self):
        mean, chance, _ = analysis.agreement(torch.randn(16, 1000), torch.randn(16, 1000))
        assert mean == pytest.approx(chance, abs=0.02)


class TestDiversity:

    def test_orthonormal_memory_has_full_rank(self, model):
        figures = analysis.analyse(model, [torch.randn(2, 3, 32, 32)])[FIRST]
        assert figures['effective_rank'] == pytest.approx(8., abs=1e-3)
        assert figures['mean_cosine'] == pytest.approx(0., abs=1e-4)

    def test_identical_slots_have_cosine_one(self):
        model = timm.create_model('test_ait', memory_update='normalize').eval()
        workspace = model.blocks[0].mlp.workspace
        workspace.memory.copy_(torch.randn(1, 16).expand(8, 16))
        figures = analysis.analyse(model, [torch.randn(2, 3, 32, 32)])[FIRST]
        assert figures['mean_cosine'] == pytest.approx(1., abs=1e-4)
        assert figures['attractor_mean_cosine'] == pytest.approx(1., abs=1e-4)
        assert figures['effective_rank'] == pytest.approx(1., abs=1e-2)

    def test_slot_purity(self):
        weights = torch.tensor([[0.5, 0.5, 0., 0.], [0.25, 0.25, 0.25, 0.25], [0., 0., 0.2, 0.6]])
        assert analysis.slot_purity(weights, torch.tensor([0, 0, 1, 2])).tolist() == pytest.approx([1., 0.5, 0.75])

    def test_kmeans_finds_clusters_far_apart(self):
        labels = torch.arange(5).repeat(20)
        points = 10. * torch.eye(5)[labels] + 0.1 * torch.randn(100, 5)
        clusters = analysis.kmeans(points, 5)
        for a, b in ((labels, clusters), (clusters, labels)):
            assert analysis.slot_purity(F.one_hot(a).T.float(), b).tolist() == [1.] * 5

    @pytest.mark.parametrize('num_clusters', [0, 4])
    def test_kmeans_needs_points(self, num_clusters):
        with pytest.raises(ValueError, match='^num_clusters'):
            analysis.kmeans(torch.randn(3, 2), num_clusters)


class TestReadShares:

    def test_of_closed_gates_are_zero(self):
        model = timm.create_model('test_ait_vit').eval()
        for figures in analysis.read_shares(model, torch.randn(1, 3, 64, 64)).values():
            assert figures['branch_share'] == figures['residual_share'] == 0.

    def test_follow_layer_scale(self):
        shares = []
        for init_values in (1e-3, 2e-3):
            torch.manual_seed(0)
            model = timm.create_model('test_ait', init_values=init_values).eval()
            torch.manual_seed(1)
            shares.append(analysis.read_shares(model, torch.randn(1, 3, 32, 32))[FIRST])
        assert shares[1]['residual_share'] == pytest.approx(2 * shares[0]['residual_share'], rel=0.05)
        assert shares[1]['branch_share'] == pytest.approx(shares[0]['branch_share'], rel=0.05)

    def test_tokens_that_read_the_same(self, model, images):
        for block in model.blocks:
            torch.nn.init.zeros_(block.mlp.workspace.attractors.weight)
            torch.nn.init.ones_(block.mlp.workspace.attractors.bias)
        for figures in analysis.read_shares(model, images).values():
            assert figures['constant_share'] == pytest.approx(1., abs=1e-5)


class TestContribution:

    @pytest.mark.parametrize('how', analysis.REPLACEMENTS)
    def test_replacing_changes_the_logits_and_nothing_for_long(self, model, images, how):
        with torch.no_grad():
            before = trained(model, images)(images)
            with analysis.replaced_memory(model, how):
                assert not torch.allclose(model(images), before)
            assert torch.equal(model(images), before)

    def test_removed_is_a_layer_without_retrieval(self, model, images):
        without = timm.create_model('test_ait', num_classes=3, retrieval=False).eval()
        without.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad(), analysis.replaced_memory(model, 'removed'):
            torch.testing.assert_close(model(images), without(images))

    def test_constant_keeps_the_mean(self, model):
        workspace, x = model.blocks[0].mlp.workspace, torch.randn(2, 5, 64)
        with torch.no_grad():
            mean = (workspace(x) - workspace.norm(x)).mean(dim=(0, 1))
            with analysis.replaced_memory(model, 'constant'):
                torch.testing.assert_close(workspace(x) - workspace.norm(x), mean.expand(2, 5, 64), atol=1e-5, rtol=0.)

    @pytest.mark.parametrize('how', ['shuffled', 'random'])
    def test_replaced_slots_stay_orthonormal(self, model, how):
        workspace = model.blocks[0].mlp.workspace
        before = workspace.stored_memory()
        with analysis.replaced_memory(model, how):
            after = workspace.stored_memory()
        torch.testing.assert_close(after @ after.T, torch.eye(8), atol=1e-5, rtol=0.)
        assert not torch.allclose(after, before)

    def test_the_order_of_slots_does_not_matter(self, model, images):
        with torch.no_grad():
            before = model(images)
            memory = model.blocks[0].mlp.workspace.memory
            memory.copy_(memory.flip(0))
            torch.testing.assert_close(model(images), before)

    def test_in_one_layer_alone(self, model, images):
        tokens = analysis.collect_tokens(model, images)
        with analysis.replaced_memory(model, 'removed', ['blocks.1.mlp.workspace']):
            other = analysis.collect_tokens(model, images)
        same = [torch.allclose(a, b) for a, b in zip(tokens.values(), other.values())]
        assert same == [True, True, False]

    @pytest.mark.parametrize('argument, kwargs', [
        ('how', dict(how='burnt')),
        ('layers', dict(how='removed', layers=['blocks.7.mlp.workspace'])),
    ])
    def test_refuses(self, model, argument, kwargs):
        with pytest.raises(ValueError, match=f'^{argument}'):
            with analysis.replaced_memory(model, **kwargs):
                pass

    def test_accuracy(self, model, images):
        predicted = model(images).argmax(dim=-1)
        wrong = (predicted + torch.tensor([0, 0, 0, 1])) % 3
        assert analysis.accuracy(model, [(images[:2], wrong[:2]), (images[2:], wrong[2:])]) == 0.75

    def test_names_each_replacement_and_layer(self, model, images):
        result = analysis.contribution(model, [(images, model(images).argmax(dim=-1))], each_layer=True)
        assert list(result) == [
            'unchanged', *analysis.REPLACEMENTS, *(f'removed in blocks.{i}.mlp.workspace' for i in range(3))]
        assert result['unchanged'] == 1.


class TestAnalyse:

    def test_batches_are_averaged(self, model, images):
        parts = [analysis.analyse(model, [batch])[FIRST] for batch in (images[:2], images[2:])]
        both = analysis.analyse(model, [images[:2], images[2:]])[FIRST]
        for key, value in both.items():
            assert value == pytest.approx((parts[0][key] + parts[1][key]) / 2)

    def test_layers_that_only_read_or_only_write(self, images):
        only_read = analysis.analyse(timm.create_model('test_ait', write=False), [images])[FIRST]
        only_write = analysis.analyse(timm.create_model('test_ait', retrieval=False), [images])[FIRST]
        assert 'coverage' not in only_read and 'steps' in only_read
        assert 'coverage' in only_write and 'steps' not in only_write

    def test_models_with_added_workspaces(self):
        model = timm_ait.add_workspace(timm.create_model('test_vit'), blocks=[-1])
        assert list(analysis.analyse(model, [torch.randn(1, 3, 160, 160)])) == ['blocks.5.mlp.workspace']

    def test_half_precision(self, images):
        figures = analysis.analyse(timm.create_model('test_ait').bfloat16(), [images.bfloat16()])[FIRST]
        assert figures['energy_rises'] == 0.

    def test_needs_a_batch(self, model):
        with pytest.raises(ValueError, match='^batches'):
            analysis.analyse(model, [])
