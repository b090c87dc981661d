"""Setting: how one run is to be made, as the controls of a widget or a call's arguments say it."""

from dataclasses import dataclass

from flashmoe_lab.storage.policy import POLICIES

AS_IT_IS, COLD, WARM = "as it is", "cold", "warm"
PAGE_CACHE = {
    AS_IT_IS: "bank and page cache as the last run left them",
    COLD: "bank empty, the experts' files out of the page cache",
    WARM: "bank empty, the experts' files in the page cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What may differ between two runs of one model; None is what the engine has.

    Attributes:
        bits: label of a packed form (see `forms_of`).
        bank_gb: memory for experts, in 10**9 bytes.
        policy: which expert the bank gives up.
        num_experts_per_tok: K.
        temperature: 0 takes the most probable token.
        max_tokens: tokens at the most.
        seed: of the draw; None draws a fresh one.
        chat: put the prompt into the model's chat format, if it has one.
        page_cache: state at the start: "as it is", "cold" or "warm".
    """

    bits: str | None = None
    bank_gb: float | None = None
    policy: str | None = None
    num_experts_per_tok: int | None = None
    temperature: float = 0.0
    max_tokens: int = 128
    seed: int | None = None
    chat: bool = True
    page_cache: str = AS_IT_IS

    def __post_init__(self) -> None:
        if self.page_cache not in PAGE_CACHE:
            known = ", ".join(map(repr, PAGE_CACHE))
            raise ValueError(f"page_cache is {self.page_cache!r}; it must be one of {known}")
        if self.policy is not None and self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; known are {', '.join(POLICIES)}")
