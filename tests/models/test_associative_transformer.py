import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3

from timm_ait import AssociativeTransformer
from timm_ait.layers import WorkspaceMlp


def make_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_ait', **kwargs)


def images(batch_size=4, size=32, in_chans=3):
    return torch.randn(batch_size, in_chans, size, size)


class TestRegistry:

    @pytest.mark.parametrize('name', [
        'ait_small', 'ait_medium', 'ait_base',
        'ait_small_patch16_224', 'ait_medium_patch16_224', 'ait_base_patch16_224', 'test_ait',
    ])
    def test_registered(self, name):
        assert name in timm.list_models('*ait*')

    def test_pretrained_is_listed(self):
        assert 'ait_small.cifar10' in timm.list_pretrained('ait*')

    @pytest.mark.parametrize('name, paper', [('ait_small', 15.8), ('ait_medium', 45.9), ('ait_base', 91.0)])
    def test_parameters_are_within_five_percent_of_the_paper(self, name, paper):
        model = timm.create_model(name, num_classes=0, device='meta')
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(paper, rel=0.05)

    @pytest.mark.parametrize('name, size', [('ait_small', 32), ('ait_small_patch16_224', 224)])
    def test_input_size(self, name, size):
        model = timm.create_model(name, device='meta')
        data_config = timm.data.resolve_model_data_config(model)
        assert data_config['input_size'] == (3, size, size)
        assert model.patch_embed.num_patches == {32: 64, 224: 196}[size]

    @pytest.mark.parametrize('kwargs, patches', [({}, 4), ({'patch_size': 16}, 16), ({'img_size': 96}, 9)])
    def test_the_weights_of_triangle_have_their_own_input(self, kwargs, patches):
        model = timm.create_model('ait_small.triangle', device='meta', **kwargs)
        assert model.patch_embed.num_patches == patches
        assert model.num_classes == 2

    def test_an_architecture_without_weights_says_so(self):
        with pytest.raises(RuntimeError, match='No pretrained weights exist for ait_medium'):
            timm.create_model('ait_medium', pretrained=True)

    def test_a_wrong_tag_is_named(self):
        with pytest.raises(RuntimeError, match='Invalid pretrained tag .*imagenet'):
            timm.create_model('ait_small.imagenet', pretrained=True)


class TestLikeAnyTimmViT:

    def test_keys_of_a_plain_vit_match_one_to_one(self):
        kwargs = dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, mlp_ratio=4)
        vit = timm.create_model('test_vit', class_token=False, global_pool='avg', num_classes=10, **kwargs)
        model = make_model()
        result = model.load_state_dict(vit.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('.workspace.' in key for key in result.missing_keys)

    @pytest.mark.parametrize('kwargs', [
        dict(class_token=True, global_pool='token'),
        dict(reg_tokens=2),
        dict(class_token=True, reg_tokens=2),
        dict(patch_drop_rate=0.5),
        dict(drop_path_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1),
        dict(in_chans=1),
        dict(img_size=48, patch_size=8),
        dict(init_values=1e-4),
        dict(num_classes=0),
        dict(gated=True),
        dict(weight_init='jax'),
    ])
    def test_options_of_the_vit(self, kwargs):
        model = make_model(**kwargs).train()
        x = images(size=kwargs.get('img_size', 32), in_chans=kwargs.get('in_chans', 3))
        output = model(x)
        assert output.shape == (4, model.num_classes or model.num_features)
        (output.square().sum() + model.balance_loss()).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_dynamic_image_size(self):
        model = make_model(dynamic_img_size=True).eval()
        assert model(images(size=48)).shape == (4, 10)

    def test_two_block_model_returns_both_intermediates(self):
        # timm's own test of intermediates asks for three levels
        model = make_model(depth=2).eval()
        x = images()
        blocks = []
        hooks = [block.register_forward_hook(lambda m, i, output: blocks.append(output)) for block in model.blocks]
        features = model.forward_features(x)
        for hook in hooks:
            hook.remove()
        final, intermediates = model.forward_intermediates(x, output_fmt='NLC')
        assert torch.equal(final, features)
        assert len(intermediates) == 2
        assert all(torch.equal(actual, expected) for actual, expected in zip(intermediates, blocks))

    def test_features_only_of_a_two_block_model(self):
        model = make_model(depth=2, features_only=True).eval()
        assert [tuple(f.shape) for f in model(images())] == [(4, 64, 8, 8)] * 2

    def test_set_input_size(self):
        model = make_model()
        model.set_input_size(img_size=(48, 48), patch_size=(8, 8))
        assert model(images(size=48)).shape == (4, 10)

    def test_reset_classifier(self):
        model = make_model()
        model.reset_classifier(3)
        assert model(images()).shape == (4, 3)

    def test_pruning_keeps_the_balance_loss_of_what_is_left(self):
        model = make_model()
        model.prune_intermediate_layers([0])
        model.train()(images())
        assert len(model.memory_statistics()) == 1
        assert model.balance_loss() > 0

    def test_layer_decay_orders_the_workspace_with_its_block(self):
        model = make_model()
        groups = param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.1)
        scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
        for i in range(3):
            block = model.blocks[i]
            assert scale[id(block.mlp.workspace.k.weight)] == scale[id(block.mlp.fc1.weight)]

    def test_norms_and_biases_of_the_workspace_do_not_decay(self):
        model = make_model(gated=True)
        optimizer = create_optimizer_v2(model, 'adamw', lr=0.1, weight_decay=0.1)
        undecayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] == 0 for p in group['params']}
        workspace = model.blocks[0].mlp.workspace
        for parameter in (workspace.norm.weight, workspace.slot_norm.bias, workspace.attractors.bias, workspace.gate):
            assert id(parameter) in undecayed

    def test_a_checkpoint_is_resampled_to_another_size(self, tmp_path):
        source = make_model().eval()
        save_file(source.state_dict(), tmp_path / 'source.safetensors')
        overlay = dict(file=str(tmp_path / 'source.safetensors'))
        model = make_model(
            pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, patch_size=8, in_chans=1, num_classes=5)
        assert model.eval()(images(size=48, in_chans=1)).shape == (4, 5)
        torch.testing.assert_close(model.blocks[1].mlp.workspace.memory, source.blocks[1].mlp.workspace.memory)

    def test_unknown_arguments_raise(self):
        with pytest.raises(TypeError, match='not_an_argument'):
            make_model(not_an_argument=1)

    def test_a_bad_workspace_argument_is_named(self):
        with pytest.raises(ValueError, match='num_slots'):
            make_model(num_slots=0)

    def test_workspace_arguments_arrive(self):
        kwargs = dict(
            num_slots=4, slot_dim=8, bottleneck=0.5, beta=2., retrieval_steps=2, memory_init='identity',
            memory_update='normalize', balance_weight=0.1)
        workspace = make_model(workspace_heads=2, memory_momentum=0.5, **kwargs).blocks[0].mlp.workspace
        for name, value in dict(kwargs, num_heads=2, momentum=0.5).items():
            assert getattr(workspace, name) == value, name

    def test_initialisation_does_not_depend_on_the_vit_weight_init(self):
        # timm's ViT initialisation visits every linear layer; the workspace keeps its own
        workspace = make_model().blocks[0].mlp.workspace
        assert workspace.k.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


class TestState:

    def test_logits_of_an_image_depend_on_it_alone(self):
        model = make_model().eval()
        x = images(6)
        together = model(x)
        # bit for bit the same only if the kernels see the same shapes: images change places and neighbours
        model(images(6))
        swapped = model(torch.cat([images(3), x[3:]]))
        assert torch.equal(swapped[3:], together[3:])
        torch.testing.assert_close(model(x[3:4]), together[3:4], atol=1e-5, rtol=1e-5)

    def test_evaluation_changes_no_bit(self):
        model = make_model().eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(images())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_gradient_checkpointing(self):
        plain, checkpointed = make_model(), make_model()
        checkpointed.set_grad_checkpointing()
        x = images()
        for model in (plain, checkpointed):
            (model.train()(x).square().sum() + model.balance_loss()).backward()
        for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f'{name}: {m}')
        for (name, p), q in zip(plain.named_buffers(), checkpointed.buffers()):
            assert torch.equal(p, q), name

    def test_gradient_checkpointing_of_a_compiled_model(self):
        torch._dynamo.reset()
        eager, compiled = make_model().double().train(), make_model().double().train()
        compiled.set_grad_checkpointing()
        x = images().double()
        (eager(x).square().sum() + eager.balance_loss()).backward()
        output = torch.compile(compiled, backend='aot_eager')(x)
        (output.square().sum() + compiled.balance_loss()).backward()
        for (name, p), q in zip(eager.named_parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f'{name}: {m}')
        for (name, p), q in zip(eager.named_buffers(), compiled.buffers()):
            torch.testing.assert_close(p, q, msg=lambda m: f'{name}: {m}')

    def test_ema_follows_and_evaluates(self):
        model = make_model().train()
        ema = ModelEmaV3(model, decay=0.9)
        for _ in range(3):
            model(images()).sum().backward()
            ema.update(model)
        assert ema.module.eval()(images()).isfinite().all()

    def test_memory_statistics_by_block(self):
        model = make_model().train()
        model(images())
        statistics = model.memory_statistics()
        assert list(statistics) == [f'blocks.{i}.mlp.workspace' for i in range(3)]
        for layer in statistics.values():
            assert layer['effective_rank'] == pytest.approx(8., rel=1e-3)
            assert 0 < layer['coverage'] <= 1

    @pytest.mark.parametrize('training', [True, False])
    def test_compiled_without_graph_breaks(self, training):
        torch._dynamo.reset()
        model = make_model().train(training)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        twin = make_model().train(training)
        x = images()
        torch.testing.assert_close(compiled(x), twin(x), atol=1e-4, rtol=1e-4)


class TestQuestions:

    def make(self, **kwargs):
        return make_model(question_dim=5, **kwargs).eval()

    @pytest.mark.parametrize('global_pool', ['avg', 'token'])
    def test_the_answer_depends_on_the_question(self, global_pool):
        model, x = self.make(global_pool=global_pool), images()
        first, second = torch.eye(5)[[0, 1]].unsqueeze(1).expand(-1, 4, -1)
        assert (model(x, question=first) - model(x, question=second)).abs().amax(1).min() > 1e-4

    def test_the_question_is_added_to_the_class_token(self):
        model, x = self.make(), images()
        question = torch.eye(5)[[2]].expand(4, -1)
        answer = model(x, question=question)
        with torch.no_grad():
            model.cls_token += model.question_embed.proj(question[:1])
            model.question_embed.proj.bias.zero_()
        torch.testing.assert_close(model(x, question=torch.zeros(4, 5)), answer)

    @pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.float64])
    def test_questions_of_any_dtype(self, dtype):
        model, x, question = self.make(), images(), torch.eye(5)[:4]
        assert torch.equal(model(x, question=question.to(dtype)), model(x, question=question))

    def test_the_gradient_reaches_the_embedding(self):
        model = self.make().train()
        model(images(), question=torch.ones(4, 5)).sum().backward()
        assert model.question_embed.proj.weight.grad.abs().min() > 0

    def test_a_missing_question_raises(self):
        with pytest.raises(ValueError, match=r'question=….*\(4, 5\)'):
            self.make()(images())

    @pytest.mark.parametrize('shape', [(5,), (4, 4), (3, 5), (4, 1, 5)])
    def test_a_misshapen_question_raises(self, shape):
        with pytest.raises(ValueError, match=r'shape \(4, 5\).*got'):
            self.make()(images(), question=torch.zeros(shape))

    def test_a_question_to_a_model_without_raises(self):
        with pytest.raises(ValueError, match='takes no question.*question_dim'):
            make_model()(images(), question=torch.zeros(4, 5))

    @pytest.mark.parametrize('question_dim', [-1, 2.5, True])
    def test_a_bad_width_is_named(self, question_dim):
        with pytest.raises(ValueError, match='question_dim'):
            make_model(question_dim=question_dim)

    def test_intermediates_take_the_question_and_are_grids_of_patches(self):
        model, x, question = self.make(), images(), torch.eye(5)[:4]
        final, intermediates = model.forward_intermediates(x, question=question)
        assert [tuple(y.shape) for y in intermediates] == [(4, 64, 8, 8)] * 3
        assert torch.equal(model.forward_head(final), model(x, question=question))
        with pytest.raises(ValueError, match='question'):
            model.forward_intermediates(x)

    def test_another_image_size(self):
        model = self.make(img_size=48, dynamic_img_size=True)
        assert model(images(size=32), question=torch.zeros(4, 5)).shape == (4, 10)

    def test_compiled_without_graph_breaks(self):
        torch._dynamo.reset()
        model, x, question = self.make(), images(), torch.eye(5)[:4]
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x, question=question), model(x, question=question))

    def test_scripted(self):
        model, x, question = self.make(), images(), torch.eye(5)[:4]
        torch.testing.assert_close(torch.jit.script(model)(x, question=question), model(x, question=question))

    @pytest.mark.parametrize('name, num_tokens', [('ait_small_patch15_75', 25), ('ait_tiny_hybrid_75', 25)])
    def test_models_for_sort_of_clevr(self, name, num_tokens):
        model = timm.create_model(name).eval()
        assert model.patch_embed.num_patches == num_tokens
        assert model(images(2, 75), question=torch.zeros(2, 18)).shape == (2, 10)


class TestAblations:
    tiny = dict(embed_dim=48, depth=2, num_heads=2, num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=8)

    def make(self, name):
        torch.manual_seed(0)
        return timm.create_model(name, **self.tiny)

    def test_no_workspace_is_the_vit_of_the_same_size(self):
        model = self.make('ait_small_no_workspace').eval()
        vit = timm.create_model(
            'vit_base_patch16_224', img_size=32, patch_size=4, class_token=False, global_pool='avg', num_classes=10,
            embed_dim=48, depth=2, num_heads=2).eval()
        vit.load_state_dict(model.state_dict(), strict=True)
        x = images()
        assert torch.equal(vit(x), model(x))
        assert model.balance_loss() == 0

    def test_no_write_leaves_the_memory(self):
        model = self.make('ait_small_no_write').train()
        before = model.blocks[0].mlp.workspace.memory.clone()
        model(images())
        assert torch.equal(model.blocks[0].mlp.workspace.memory, before)

    def test_no_retrieval_has_no_attractors(self):
        assert not [name for name, _ in self.make('ait_small_no_retrieval').named_parameters() if 'attractors' in name]

    def test_no_attention_leaves_tokens_to_meet_in_the_workspace_alone(self):
        model = self.make('ait_small_no_attention')
        assert not [name for name, _ in model.named_parameters() if 'attn' in name or 'norm1' in name]
        # without self-attention, and the memory frozen, a token's features depend on its own patch
        x = images(1)
        changed = x.clone()
        changed[:, :, -4:, -4:] += 1.
        difference = (model.eval().forward_features(x) - model.forward_features(changed)).abs().amax(-1)
        assert (difference > 0).nonzero()[:, 1].tolist() == [63]
        # in training, what it wrote reaches the others
        difference = (model.train().forward_features(x) - model.forward_features(changed)).abs().amax(-1)
        assert (difference > 0).all()

    def test_reset_memory_writes_for_one_step_only(self):
        model = self.make('ait_small_reset_memory').train()
        workspace = model.blocks[0].mlp.workspace
        before, x = workspace.memory.clone(), images()
        first = model(x)
        assert torch.equal(workspace.memory, before)
        assert torch.equal(model(x), first)
        first.sum().backward()
        assert workspace.v.weight.grad.abs().max() > 0


def test_the_class_takes_what_a_vit_takes():
    model = AssociativeTransformer(32, 8, 3, 5, 'avg', embed_dim=32, depth=1, num_heads=2, class_token=False)
    assert isinstance(model.blocks[0].mlp, WorkspaceMlp)
    assert model(images()).shape == (4, 5)
