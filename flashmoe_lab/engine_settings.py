"""How an engine is opened."""

from dataclasses import dataclass

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.storage.bank import default_capacity_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a model is opened.

    Attributes:
        num_experts_per_tok: K of runs that name none; None is the model's own.
        bank_gb: memory for experts, in 10**9 bytes; 0 keeps none (the operating system's page cache
            is the only cache); None takes a quarter of the free memory, at most what all experts
            need.
        resident: read every expert into the bank when opening; needs room for all.
        reader: "pread" (through the page cache), "direct" (past it) or "mmap" (to compare).
        threads, split: reading threads, and pieces that a block is read in. Where none of the three
            is named, what was tuned, or a rule (see reading.py).
        prefetch: experts of the next layer, at the most, that are read before its router has
            spoken, because it is likely to name them. It still decides alone: no number changes.
            Of single tokens, where our own kernels run.
        policy: which expert the bank gives up: "lru".
        dtype: of activations; None is float32 on a CPU and bfloat16 on a GPU.
        verify: check each block's checksum the first time that it is read.
        checks: stop at the first stage that gives NaN or infinity; slows a run.
    """

    num_experts_per_tok: int | None = None
    bank_gb: float | None = None
    resident: bool = False
    reader: str | None = None
    threads: int | None = None
    split: int | None = None
    prefetch: int = 0
    policy: str = "lru"
    dtype: str | None = None
    verify: bool = False
    checks: bool = False

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise ValueError(f"prefetch is {self.prefetch} experts; it must be 0 or more")

    def bank_nbytes(self, checkpoint: PackedCheckpoint) -> int | None:
        """Memory for experts; None means room for all.

        Raises:
            ValueError: the settings contradict each other, or one is out of range.
        """
        if self.resident:
            if self.bank_gb is not None:
                raise ValueError("resident=True holds every expert; leave bank_gb out")
            return None
        if self.bank_gb is not None:
            if not 0 <= self.bank_gb < 1e9:
                raise ValueError(f"bank_gb is {self.bank_gb}; it must be 0 or more")
            return round(self.bank_gb * 1e9)
        return default_capacity_nbytes(checkpoint.expert_nbytes)
