"""What tests of recorded runs share."""

import pytest


@pytest.fixture(params=["native", "mlx"])
def kernel_set(request, use_kernels):
    """Both sets: stages that compute at once, and stages that build a graph."""
    try:
        use_kernels(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param
