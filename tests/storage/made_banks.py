"""Banks for tests: layers without a file, and a policy that gives up what was asked for last."""

from pathlib import Path

from flashmoe_lab.checkpoint.layer_file import BlockLayout, LayerFile
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.policy import LRU

E = 8


def layer_file(config, layer, quantization=None, dtype="F32"):
    layout = BlockLayout.of(config, quantization, dtype)
    return LayerFile(layer=layer, path=Path("nowhere"), layout=layout, num_experts=E)


def bank_of_two(config, slots, **settings):
    """A bank for two layers of one layout."""
    layers = [layer_file(config, layer) for layer in range(2)]
    return ExpertBank(layers, slots * layers[0].layout.block_nbytes, **settings)


class MRU(LRU):
    """Would give up what was just asked for, if it were not pinned."""

    name = "mru"

    def victim(self, pinned):
        key = next(key for key in reversed(list(self)) if key not in pinned)
        self.discard(key)
        return key
