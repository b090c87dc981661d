"""What tests of recorded runs share."""

import pytest

from flashmoe_lab import kernels


@pytest.fixture(params=["native", "mlx"])
def kernel_set(request):
    """Both sets: stages that compute at once, and stages that build a graph."""
    before = kernels.used()
    try:
        kernels.use(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    kernels.use(before)
