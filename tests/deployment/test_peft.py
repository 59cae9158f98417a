""" LoRA through peft, on a frozen base. """
import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import timm

from tests.deployment import images, make_ait, memories, train
from timm_ait import balance_loss

CONFIGS = {
    'qkv': dict(target_modules=['qkv']),
    'all-linear': dict(target_modules='all-linear'),
    'head': dict(target_modules=['qkv'], modules_to_save=['head']),
    'workspace': dict(target_modules=['qkv'], modules_to_save=['workspace']),
}
ALL = pytest.mark.parametrize('config', CONFIGS)


def adapted(config):
    model = get_peft_model(make_ait(), LoraConfig(r=2, **CONFIGS[config]))
    train(model, 3, lr=0.2)
    return model.eval()


@ALL
def test_training_an_adapter_leaves_the_base_bitwise_and_the_memory_unless_the_workspace_is_saved_with_it(config):
    before, model = make_ait(), adapted(config)
    assert not torch.allclose(model(images()), before(images()), atol=1e-4)
    written = [memory for memory in memories(model) if not any(torch.equal(memory, old) for old in memories(before))]
    assert len(written) == (2 if config == 'workspace' else 0)
    base, before = model.unload().state_dict(), before.state_dict()
    assert all(torch.equal(base[name], before[name]) for name in before if config not in name.split('.'))


def test_a_workspace_that_is_saved_with_the_adapter_is_counted_once():
    model, base = get_peft_model(make_ait(), LoraConfig(r=2, **CONFIGS['workspace'])).train(), make_ait().train()
    model(images()), base(images())
    torch.testing.assert_close(balance_loss(model), balance_loss(base))


def test_an_adapter_of_the_centroids_attention_is_trained_and_merged():
    model = timm.create_model('test_centroid_transformer', img_size=16)
    model, x = get_peft_model(model, LoraConfig(r=2, target_modules=['qkv'], init_lora_weights=False)).eval(), images()
    logits = model(x)
    logits.sum().backward()
    assert all(parameter.grad.count_nonzero() for name, parameter in model.named_parameters() if 'lora' in name)
    torch.testing.assert_close(model.merge_and_unload()(x), logits, atol=1e-5, rtol=1e-5)


@ALL
def test_an_adapter_loaded_onto_its_base_gives_the_same_logits(tmp_path, config):
    model = adapted(config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_ait(), tmp_path).eval()
    assert torch.equal(loaded(images()), model(images()))


@ALL
def test_a_merged_model_gives_the_same_logits_and_has_the_keys_of_its_base(config):
    model = adapted(config)
    merged, plain = copy.deepcopy(model).merge_and_unload().eval(), make_ait()
    torch.testing.assert_close(merged(images()), model(images()), atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(images()), merged(images()))
