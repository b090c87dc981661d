"""Records one run and draws every figure of it: docs/gallery.md and docs/images/gallery.

    python docs/draw_gallery.py              the bundled model
    python docs/draw_gallery.py packed/      another one

The run is timed stage by stage, from a cold page cache, with a bank too small for all experts, so
that every figure has something to show. Pictures are 800 pixels wide.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import flashmoe_lab as fl
from flashmoe_lab.plots.gallery import FIGURES
from flashmoe_lab.storage.page_cache import evict

PROMPT = "Once upon a time"
RECORD = [  # no more than the figures draw: it all takes time
    "layers.*.mixer.decay",
    "layers.*.mixer.write_strength",
    "layers.0.mixer.state_norm",
    "layers.3.mixer.attention",
]
HERE = Path(__file__).parent

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "What the router chose": {
        "expert_histogram": (
            "expert_histogram(trace)",
            "Every (layer, expert), most chosen first.",
        ),
        "expert_histogram_layer": ("expert_histogram(trace, layer=0)", "The experts of one layer."),
        "expert_heatmap": ("expert_heatmap(trace)", "Which experts a text lives on, by layer."),
        "token_overlap": ("token_overlap(trace)", "What the last token's experts are worth."),
        "working_set": ("working_set(trace)", "How fast a text comes to need the whole model."),
        "router_weights": (
            "router_weights(trace)",
            "How much each rank counts, and how close it was.",
        ),
        "router_entropy": (
            "router_entropy(trace)",
            "How sure the router is, and what K leaves out.",
        ),
    },
    "What was asked for again": {
        "reuse_distance": ("reuse_distance(trace)", "What a bank of any size would hit."),
        "hit_rate": ("hit_rate(trace)", "What this bank did hit."),
        "bytes_per_token": ("bytes_per_token(trace)", "What was left to be read, and from where."),
    },
    "Reads": {
        "io_timeline": ("io_timeline(trace)", "One pass: every read, over what the run was at."),
        "io_rate": ("io_rate(trace)", "Queue depth and bandwidth."),
        "read_latency": ("read_latency(trace)", "How long reads take, by source."),
    },
    "Time": {
        "layer_latency": (
            "layer_latency(trace)",
            "A decode step, layer by layer and stage by stage.",
        ),
        "token_waterfall": ("token_waterfall(trace)", "One token's way through the model."),
        "time_shares": (
            "time_shares(trace)",
            "Where the run's time went, and what is unexplained.",
        ),
        "token_strip_latency": ('token_strip(trace, by="latency")', "Which tokens were slow."),
        "token_strip_entropy": ('token_strip(trace, by="entropy")', "Which were hard to foresee."),
        "token_strip_bytes": ('token_strip(trace, by="bytes")', "Which had to read."),
    },
    "Several runs": {
        "compare_runs": (
            'compare_runs({"one": trace, "other": trace_b})',
            "What a setting changed: here the size of the bank.",
        ),
    },
    "Memory and state": {
        "memory_budget": ("memory_budget(trace)", "What the run holds."),
        "context_memory": ("context_memory(trace)", "What a longer context would take."),
        "state_norm": ("state_norm(trace, layer=0)", "How full DeltaNet's matrices are."),
        "delta_gates": ("delta_gates(trace)", "What each head keeps, and how hard it writes."),
        "memory_length": ("memory_length(trace)", "How far back each head reaches."),
        "attention_map": ("attention_map(trace, layer=3)", "What attention looks back at."),
    },
}


def main() -> None:
    """Record, draw, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--bank-gb", type=float, default=0.008)
    options = parser.parse_args()
    trace = _record(options.model, options.max_tokens, options.bank_gb, "stages", RECORD)
    banks = {f"bank of {gb * 1e3:g} MB": gb for gb in (options.bank_gb / 4, options.bank_gb, 4.0)}
    banks = dict(zip([*list(banks)[:2], "all in the bank"], banks.values(), strict=True))
    several = {n: _record(options.model, options.max_tokens, gb, "flow") for n, gb in banks.items()}
    images = HERE / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(trace) for name, draw in FIGURES.items()}
    for name, plot in (drawn | {"compare_runs": fl.plots.compare_runs(several)}).items():
        file = plot.save(images / f"{name}.png", dpi=100)
        with Image.open(file) as image:  # 128 colours are enough, and a third of the bytes
            image.convert("RGB").quantize(128).save(file, optimize=True)
    (HERE / "gallery.md").write_text(_page(trace))
    print(trace.summary())


def _record(
    model: str, max_tokens: int, bank_gb: float, mode: str, record: Sequence[str] = ()
) -> fl.Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = fl.load(model, bank_gb=bank_gb)
    with engine:
        engine.generate(PROMPT, 4)  # what is made at the first token is no part of a text's time
        engine.bank.forget(engine.bank.contents())
        for layer in engine.checkpoint.layers:
            evict(layer.path)
        trace = engine.stream_generate(PROMPT, max_tokens, trace=mode, record=record).wait().trace
    assert trace is not None
    return trace


def _page(trace: fl.Trace) -> str:
    facts = trace.facts
    lines = [
        "# Gallery",
        "",
        "Every figure, drawn from one recorded run by `python docs/draw_gallery.py`. Each is a",
        'function of `flashmoe_lab.plots` that takes a trace and returns a Plot: `.save("a.svg")`,',
        "`.data` (the DataFrame drawn), and in a notebook it shows itself. `flashmoe-lab plot DIR`",
        "draws all of them for a trace on disk.",
        "",
        f"The run: {facts['num_hidden_layers']} layers, experts {facts['experts']}, "
        f"K={facts['num_experts_per_tok']} of {facts['num_experts']}, a bank of "
        f"{facts['bank_slots']} slots,",
        f"{facts['reader']} from a cold page cache, {len(trace.tokens)} tokens, mode "
        f"`{trace.mode}`; {facts['machine']}, {facts['cpus']} processors,",
        f"flashmoe_lab {facts['flashmoe_lab']}, mlx {facts['mlx']}, {str(facts['started'])[:10]}. "
        "It shows what figures look like, not how fast a machine is.",
        "",
    ]
    missing = {*FIGURES, "compare_runs"} - {
        name for figures in SECTIONS.values() for name in figures
    }
    assert not missing, missing
    for title, figures in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name, (call, words) in figures.items():
            lines += [f"`{call}` {words}", "", f"![{words}](images/gallery/{name}.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
