import contextlib

import pytest

from tests.devices import unfused


@pytest.fixture(params=['fused', 'unfused'])
def on_every_device(request):
    """The test as the CPU computes, and as other devices do."""
    with unfused() if request.param == 'unfused' else contextlib.nullcontext():
        yield
