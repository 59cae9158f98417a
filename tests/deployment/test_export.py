""" `torch.export` and what is made of it. """
import pytest
import torch
from torch.export import Dim

from tests.deployment import TOLERANCE, images, make_ait, make_vit, other_memory, run_without_timm_ait

MODELS = [make_ait, make_vit]


def export(model, dynamic_batch=True):
    dynamic_shapes = ({0: Dim('batch')},) if dynamic_batch else None
    return torch.export.export(model, (images(2),), dynamic_shapes=dynamic_shapes)


class TestExport:

    @pytest.mark.parametrize('strict', [True, False])
    @pytest.mark.parametrize('make', MODELS)
    def test_fixed_size(self, make, strict):
        model = make()
        program = torch.export.export(model, (images(),), strict=strict)
        torch.testing.assert_close(program.module()(images(seed=2)), model(images(seed=2)))

    @pytest.mark.parametrize('make', MODELS)
    def test_dynamic_batch(self, make):
        model = make()
        module = export(model).module()
        for batch_size in (1, 5):
            torch.testing.assert_close(module(images(batch_size)), model(images(batch_size)))

    @pytest.mark.parametrize('make', MODELS)
    def test_dynamic_image_size(self, make):
        model = make(dynamic_img_size=True, pos_embed='none')
        side = Dim('side', min=2, max=64)
        program = torch.export.export(model, (images(),), dynamic_shapes=({2: 4 * side, 3: 4 * side},))
        torch.testing.assert_close(program.module()(images(2, 24)), model(images(2, 24)))

    def test_has_operators_of_pytorch_alone(self):
        targets = {str(node.target) for node in export(make_ait()).graph.nodes if node.op == 'call_function'}
        assert targets and not any('timm_ait' in target for target in targets)

    def test_holds_the_memory_of_its_time(self):
        model = make_ait()
        other_memory(model)
        torch.testing.assert_close(export(model).module()(images()), model(images()))

    def test_does_not_project_the_memory_in_the_graph(self):
        def num_products(make):
            products = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.addmm.default)
            return sum(node.target in products for node in export(make()).graph.nodes)
        # attractors, scores and their mean, in two blocks
        assert num_products(make_ait) == num_products(make_vit) + 2 * 3

    def test_a_loaded_file_runs_without_this_package(self, tmp_path):
        model = make_ait()
        torch.export.save(export(model), tmp_path / 'model.pt2')
        torch.save((images(3), model(images(3)).detach()), tmp_path / 'example.pt')
        run_without_timm_ait(
            'import torch\n'
            'x, expected = torch.load("example.pt")\n'
            'module = torch.export.load("model.pt2").module()\n'
            f'torch.testing.assert_close(module(x), expected, **{TOLERANCE})\n',
            tmp_path,
        )

    def test_leaves_the_model_as_it_was(self):
        model = make_ait()
        expected = model(images())
        export(model)
        assert not model.training and torch.equal(model(images()), expected)

    @pytest.mark.slow
    def test_an_aotinductor_package_runs_without_this_package(self, tmp_path):
        model = make_ait()
        torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / 'model.pt2'))
        torch.save((images(3), model(images(3)).detach()), tmp_path / 'example.pt')
        run_without_timm_ait(
            'import torch\n'
            'x, expected = torch.load("example.pt")\n'
            'module = torch._inductor.aoti_load_package("model.pt2")\n'
            f'torch.testing.assert_close(module(x), expected, **{TOLERANCE})\n',
            tmp_path,
        )
