"""Fixtures of the tests of readers."""

import pytest

from tests.storage.made_blocks import CREWS, DATA, LAYERS, skip_if_refused


@pytest.fixture
def paths(tmp_path):
    paths = {layer: tmp_path / f"layer_{layer:02}.safetensors" for layer in LAYERS}
    for layer, path in paths.items():
        path.write_bytes(DATA[layer])
    return paths


@pytest.fixture(params=CREWS)
def name(request, paths):
    skip_if_refused(request.param, paths[0])
    return request.param
