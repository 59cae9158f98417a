import pytest
import torch

from timm_ait.ops import matmul
from timm_ait.ops.matmul import mm

SHAPES = [(32, 768, 5), (1, 7, 3), (3, 1, 1), (64, 33, 17)]
LAYOUTS = {
    'contiguous': lambda x: x,
    'transposed': lambda x: x.T.contiguous().T,
    'strided': lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    'columns of a wider matrix': lambda x: torch.cat([x, x], dim=1)[:, :x.shape[1]],
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_is_the_matrix_product(layout, shape, dtype):
    m, k, n = shape
    a, b = LAYOUTS[layout](torch.randn(m, k, dtype=dtype)), LAYOUTS[layout](torch.randn(k, n, dtype=dtype))
    product = mm(a, b)
    assert product.dtype == dtype and product.is_contiguous()
    tolerance = dict(rtol=1e-2, atol=5e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), **tolerance)


@pytest.mark.parametrize('enabled', [True, False])
def test_onednn_can_be_turned_off(enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(matmul, '_ONEDNN_LINEAR', lambda a, b, *_: calls.append(True) or torch.mm(a, b.T))
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    with torch.backends.mkldnn.flags(enabled=enabled):
        torch.testing.assert_close(mm(a, b), a @ b)
    assert bool(calls) == enabled
