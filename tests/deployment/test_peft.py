""" LoRA through peft, on a frozen base. """
import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.deployment import images, make_ait, make_vit, memories, train, workspaces

CONFIGS = {
    'qkv': dict(target_modules=['qkv']),
    'all-linear': dict(target_modules='all-linear'),
    'head': dict(target_modules=['qkv'], modules_to_save=['head']),
    'workspace': dict(target_modules=['qkv'], modules_to_save=['workspace']),
}
# those that leave the workspace's parameters frozen
FROZEN = pytest.mark.parametrize('config', ['qkv', 'all-linear', 'head'])
ALL = pytest.mark.parametrize('config', CONFIGS)


def adapted(config, make=make_ait, num_steps=3):
    model = get_peft_model(make(), LoraConfig(r=2, **CONFIGS[config]))
    train(model, num_steps, lr=0.2)
    return model.eval()


@pytest.mark.parametrize('make', [make_ait, make_vit])
@pytest.mark.parametrize('config', ['qkv', 'all-linear', 'head'])
def test_training_an_adapter_changes_the_logits(config, make):
    assert not torch.allclose(adapted(config, make)(images()), make()(images()), atol=1e-4)


@FROZEN
def test_training_an_adapter_leaves_the_memory_bitwise(config):
    before = memories(make_ait())
    assert all(torch.equal(a, b) for a, b in zip(memories(adapted(config)), before))


@FROZEN
def test_training_an_adapter_leaves_the_base_bitwise(config):
    before = make_ait().state_dict()
    base = adapted(config).unload().state_dict()
    assert all(torch.equal(base[name], before[name]) for name in before if 'head' not in name)


def test_a_workspace_among_modules_to_save_is_trained_and_written():
    model = adapted('workspace')
    trained = [module for module in workspaces(model) if any(p.requires_grad for p in module.parameters())]
    assert len(trained) == 2
    for workspace, before in zip(trained, memories(make_ait())):
        assert not torch.equal(workspace.memory, before)


@ALL
def test_an_adapter_loaded_onto_its_base_gives_the_same_logits(tmp_path, config):
    model = adapted(config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_ait(), tmp_path).eval()
    assert torch.equal(loaded(images()), model(images()))


@ALL
def test_a_merged_model_gives_the_same_logits(config):
    model = adapted(config)
    expected = model(images())
    merged = copy.deepcopy(model).merge_and_unload().eval()
    torch.testing.assert_close(merged(images()), expected, atol=1e-5, rtol=1e-5)


@ALL
def test_a_merged_model_is_a_model_of_the_same_keys(config):
    merged = adapted(config).merge_and_unload()
    plain = make_ait()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(images()), merged.eval()(images()))


def test_all_linear_adapts_the_attractors_and_not_the_projections_of_the_write():
    adapted_layers = {name.rsplit('.lora_A')[0].rsplit('.')[-1] for name, _ in adapted('all-linear').named_parameters()
                      if '.lora_A.' in name and '.workspace.' in name}
    assert adapted_layers == {'attractors'}


def test_an_adapter_of_the_attractors_is_read():
    model = adapted('all-linear')
    with torch.no_grad():
        before = model(images())
        for name, parameter in model.named_parameters():
            if 'attractors.lora_' in name:
                parameter.zero_()
        assert not torch.allclose(model(images()), before, atol=1e-5)
