import timm
import torch

from benchmarks.analysis import coordination_writes


def test_writes_of_coordination_are_one_per_image():
    model = timm.create_model('test_coordination').eval()
    writes = coordination_writes(model, torch.randn(2, 3, 32, 32))
    assert list(writes) == ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn']
    for attention, memory in writes.values():
        assert attention.shape == (2, 2, 4, 64) and memory.shape == (2, 4, 32)
        assert ((attention > 0).sum(dim=-1) == 3).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
