"""Records one run and draws every figure of it: docs/gallery.md and docs/images/gallery.

    python docs/draw_gallery.py              the bundled model
    python docs/draw_gallery.py packed/      another one

The run is timed stage by stage, from a cold page cache, with a bank too small for all experts, so
that every figure has something to show. Figures of several runs add runs of the same text with
other banks and other K; those of weights take the bundled model's. Pictures are 800 pixels wide.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import flashmoe_lab as fl
from flashmoe_lab.checkpoint.quantize import (
    dequantize_reference,
    pack_codes_reference,
    quantize_reference,
)
from flashmoe_lab.plots.gallery import FIGURES
from flashmoe_lab.plots.style import conditions
from flashmoe_lab.storage.page_cache import evict
from flashmoe_lab.study.bank_simulation import simulate
from flashmoe_lab.study.budget import Budget
from flashmoe_lab.study.router_guess import router_guesses

PROMPT = "Once upon a time"
RECORD = [  # no more than the figures draw: it all takes time
    "layers.*.mixer.decay",
    "layers.*.mixer.write_strength",
    "layers.0.mixer.state_norm",
    "layers.3.mixer.attention",
    "layers.*.router.logits",
]
LOGITS = ["lm_head.logits"]
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
        "mass_by_k": ("mass_by_k(trace)", "How much of the probability each K would keep."),
    },
    "What was asked for again": {
        "reuse_distance": ("reuse_distance(trace)", "What a bank of any size would hit."),
        "hit_rate": ("hit_rate(trace)", "What this bank did hit."),
        "hit_rate_by_size": (
            "hit_rate_by_size(simulate(trace, slots), [trace_b, trace_c])",
            "What other banks would hit, and what real ones did.",
        ),
        "router_guesses": (
            "router_guesses(study.router_guess.router_guesses(engine, text))",
            "What could be asked for before the router has run.",
        ),
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
        "budgets": (
            'budgets({"measured": budget.ms, "K=4": guess.ms}, trace)',
            "What a token's time is spent on, and what would change it.",
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
        "sweep": (
            'sweep({"K=1": fl.compare(run, run_b)}, trace)',
            "What a setting costs in quality, and what it saves: here K.",
        ),
    },
    "Quantisation": {
        "quantized_group": (
            "quantized_group(weights, {2: stored})",
            "One group of weights, and what its codes stand for.",
        ),
        "quantization_errors": (
            "quantization_errors({2: errors}, weights)",
            "What each number of bits does to weights.",
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
    with _opened(options.model, options.bank_gb) as engine:
        trace = _record(engine, options.max_tokens, "stages", RECORD)
        sweep = _sweep(engine, options.max_tokens)
        guesses = _guesses(engine, trace)
    sizes = {f"bank of {gb * 1e3:g} MB": gb for gb in (options.bank_gb / 4, options.bank_gb)}
    several: dict[str, fl.Trace] = {}
    for name, gb in {**sizes, "all in the bank": 4.0}.items():
        with _opened(options.model, gb) as engine:
            several[name] = _record(engine, options.max_tokens, "flow")
    drawn = {name: draw(trace) for name, draw in FIGURES.items()}
    drawn |= {"compare_runs": fl.plots.compare_runs(several), "sweep": sweep}
    drawn |= {"router_guesses": guesses}
    drawn |= {"hit_rate_by_size": _sizes(trace, several), "budgets": _budgets(trace), **_weights()}
    images = HERE / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)
    for name, plot in drawn.items():
        file = plot.save(images / f"{name}.png", dpi=100)
        with Image.open(file) as image:  # 128 colours are enough, and a third of the bytes
            image.convert("RGB").quantize(128).save(file, optimize=True)
    (HERE / "gallery.md").write_text(_page(trace, set(drawn)))
    print(trace.summary())


@contextmanager
def _opened(model: str, bank_gb: float) -> Iterator[fl.Engine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = fl.load(model, bank_gb=bank_gb)
    with engine:
        engine.generate(PROMPT, 4)  # what is made at the first token is no part of a text's time
        yield engine


def _record(
    engine: fl.Engine, max_tokens: int, mode: str, record: Sequence[str] = (), **options: Any
) -> fl.Trace:
    engine.bank.forget(engine.bank.contents())
    for layer in engine.checkpoint.layers:
        evict(layer.path)
    run = engine.stream_generate(PROMPT, max_tokens, trace=mode, record=record, **options).wait()
    assert run.trace is not None
    return run.trace


def _sweep(engine: fl.Engine, max_tokens: int) -> fl.plots.Plot:
    own = engine.num_experts_per_tok
    base = _record(engine, max_tokens, "flow", LOGITS)
    text = base.tokens.id[base.tokens.phase == "decode"].tolist()
    costs = {
        f"K={k}": fl.compare(
            base,
            _record(engine, max_tokens, "flow", LOGITS, num_experts_per_tok=k, follow=text),
        )
        for k in (own // 8, own // 4, own // 2, 2 * own)
    }
    return fl.plots.sweep(costs, base)


def _guesses(engine: fl.Engine, trace: fl.Trace) -> fl.plots.Plot:
    guesses = router_guesses(engine, trace.tokens.id.tolist())
    return fl.plots.router_guesses(guesses, conditions(trace))


def _sizes(trace: fl.Trace, several: Mapping[str, fl.Trace]) -> fl.plots.Plot:
    blocks = trace.facts["num_hidden_layers"] * trace.facts["num_experts"]
    sizes = {n * blocks // 16 for n in range(1, 17)}
    sizes |= {other.facts["bank_slots"] for other in several.values()}
    simulated = simulate(trace, sorted(sizes))
    return fl.plots.hit_rate_by_size(simulated, list(several.values()))


def _budgets(trace: fl.Trace) -> fl.plots.Plot:
    measured = Budget.of(trace)
    k = measured.num_experts_per_tok // 2
    guesses = {
        "a disk 4 times as fast": measured.what_if(bandwidth_gbps=4 * measured.bandwidth_gbps),
        "all experts in memory": measured.what_if(hit_rate=1),
        f"K={k}": measured.what_if(num_experts_per_tok=k),
    }
    parts = {"measured": measured.ms} | {name: guess.ms for name, guess in guesses.items()}
    return fl.plots.budgets(parts, trace)


def _weights() -> dict[str, fl.plots.Plot]:
    with fl.load("demo", bits="none") as published:
        weights = published.layers[2].fetch.reference(5)["down_proj"]
    stored = {bits: _stored(weights, bits) for bits in (2, 3, 4, 8)}
    group = {bits: stored[bits][0, :64] for bits in (2, 4)}
    errors = {bits: values - weights for bits, values in stored.items()}
    return {
        "quantized_group": fl.plots.quantized_group(weights[0, :64], group),
        "quantization_errors": fl.plots.quantization_errors(errors, weights),
    }


def _stored(weights: np.ndarray, bits: int) -> np.ndarray:
    form = fl.Quantization(bits=bits, group_size=64)
    codes, scales, biases = quantize_reference(weights, form)
    return dequantize_reference(pack_codes_reference(codes, bits), scales, biases, form)


def _page(trace: fl.Trace, drawn: set[str]) -> str:
    facts = trace.facts
    lines = [
        "# Gallery",
        "",
        "Every figure, drawn from one recorded run by `python docs/draw_gallery.py`, with further",
        "runs of its text where several are compared, and weights of the bundled model where it is",
        "weights. Each is a function of `flashmoe_lab.plots` that takes a trace, or what a study",
        'made of it, and returns a Plot: `.save("a.svg")`, `.data` (the DataFrame drawn), and in a',
        "notebook it shows itself. `flashmoe-lab plot DIR` draws all that need one trace alone.",
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
    shown = {name for figures in SECTIONS.values() for name in figures}
    assert shown == drawn, shown ^ drawn
    for title, figures in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name, (call, words) in figures.items():
            lines += [f"`{call}` {words}", "", f"![{words}](images/gallery/{name}.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
