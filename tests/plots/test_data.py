"""What each figure draws, by value, of the trace made by hand."""

import numpy as np
import pytest

from flashmoe_lab import plots
from flashmoe_lab.plots.cache import stack_distances
from flashmoe_lab.plots.style import conditions
from flashmoe_lab.trace import Recorder
from tests.trace.made import MS, made_trace, read_ahead


@pytest.fixture(scope="module")
def trace():
    return made_trace()


def test_expert_histogram(trace):
    data = plots.expert_histogram(trace, ordered=False).data
    assert data["count"].tolist() == [4, 2, 1, 1, 1, 2, 3, 2] and set(data.uniform) == {2.0}
    assert data.layer.tolist() == [0] * 4 + [1] * 4 and data.expert.tolist() == [0, 1, 2, 3] * 2
    assert plots.expert_histogram(trace).data["count"].tolist() == [4, 3, 2, 2, 2, 1, 1, 1]
    one = plots.expert_histogram(trace, layer=1).data
    assert one["count"].tolist() == [3, 2, 2, 1] and one.expert.tolist() == [2, 1, 3, 0]


def test_expert_histogram_refuses_a_layer_that_is_not_there(trace):
    with pytest.raises(ValueError, match="layer is 2; layers are 0 to 1"):
        plots.expert_histogram(trace, layer=2)


def test_expert_heatmap(trace):
    plot = plots.expert_heatmap(trace)
    assert plot.data.share.tolist() == [1, 0.5, 0.25, 0.25, 0.25, 0.5, 0.75, 0.5]
    drawn = plot.figure.axes[0].images[0].get_array()
    assert np.asarray(drawn).tolist() == [[100, 50, 25, 25], [25, 50, 75, 50]]
    ordered = plots.expert_heatmap(trace, ordered=True).figure.axes[0].images[0].get_array()
    assert np.asarray(ordered).tolist() == [[100, 50, 25, 25], [75, 50, 50, 25]]


def test_token_overlap(trace):
    data = plots.token_overlap(trace).data
    # Layer 0: {0,1} {0,2} {0,1} {3,0} share one each; layer 1: {2,3} {2,1} {2,3} {0,1}: 1, 1, 0.
    assert data["mean"].tolist() == pytest.approx([0.5, 1 / 3]) and data.pairs.tolist() == [3, 3]


def test_working_set(trace):
    data = plots.working_set(trace).data
    assert data.tokens.tolist() == [1, 2, 3, 4] and data.blocks.tolist() == [4, 6, 6, 8]
    assert data.even.tolist() == [4, 6, 7, 7.5]  # of 8, half is missed by each token


def test_router_weights(trace):
    data = plots.router_weights(trace).data
    weights = data[data["of"] == "weight"]
    assert weights["mean"].tolist() == pytest.approx([2 / 3, 1 / 3])
    margins = data[data["of"] == "margin"]
    assert margins["mean"].tolist() == pytest.approx([0.1, 0.2])
    assert margins.p10.tolist() == pytest.approx([0.1, 0.2])


def test_router_entropy(trace):
    data = plots.router_entropy(trace).data
    assert data[data["of"] == "entropy"]["mean"].tolist() == pytest.approx([1.2, 1.2])
    assert data[data["of"] == "coverage"]["mean"].tolist() == pytest.approx([0.75, 0.75])


def test_io_timeline_shows_the_pass_that_read_most(trace):
    plot = plots.io_timeline(trace)
    assert plot.title == r'Reads while token 3 "\n" went through the model'
    reads = plot.data[plot.data.kind == "read"]
    assert reads[["row", "label", "layer", "expert", "start_ms", "end_ms"]].values.tolist() == [
        [1, "ssd", 0, 3, 1, 5],
        [0, "ssd", 1, 0, 11, 15],
    ]
    spans = plot.data[plot.data.kind == "span"]
    assert spans.start_ms.tolist() == [0, 1, 5, 11, 15, 30] and set(spans.row) == {-1}


def test_io_timeline_tells_what_was_read_ahead(trace):
    plot = plots.io_timeline(read_ahead(trace))
    reads = plot.data[plot.data.kind == "read"]
    assert reads[["expert", "how"]].values.tolist() == [
        [3, ""],
        [0, "read ahead of the router"],
        [2, "ahead, for nothing"],
    ]
    assert set(plot.data[plot.data.kind == "span"].how) == {""}
    axes = plot.figure.axes[0]
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert [patch.get_alpha() for patch in hatched] == [0.4, None]
    assert [patch.get_extents().y1 > hatched[0].get_extents().y1 for patch in hatched] == [
        False,
        True,
    ]
    names = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert names[-2:] == ["read ahead of the router", "ahead, for nothing"]
    assert "prefetch 2, pread" in conditions(read_ahead(trace))


def test_io_timeline_of_a_layer_and_of_a_chunk(trace):
    data = plots.io_timeline(trace, token=0, layer=1).data
    assert data[data.kind == "read"].expert.tolist() == [1, 2, 3]
    assert data[data.kind == "span"].end_ms.tolist() == [16]
    with pytest.raises(ValueError, match="token is 4; positions with a pass are 0 to 3"):
        plots.io_timeline(trace, token=4)


def test_io_rate_keeps_every_byte_and_every_moment(trace):
    data = plots.io_rate(trace).data
    width_s = (data.ms[1] - data.ms[0]) / 1e3
    assert (data.mb_per_s * width_s).sum() == pytest.approx(9000 / 1e6)
    assert data.most_reads.max() == 3
    waited = sum([2, 2, 4, 1, 2, 3, 2, 4, 5])  # ms from submission to end
    assert (data.mean_reads * width_s * 1e3).sum() == pytest.approx(waited)
    assert data.ms.iloc[-1] + data.ms[1] == pytest.approx(100)  # the run's end, not the last read's
    one = plots.io_rate(trace, token=2).data
    assert one.ms.iloc[0] == 0 and one.most_reads.max() == 1
    assert (one.mb_per_s * (one.ms[1] - one.ms[0]) / 1e3).sum() == pytest.approx(1000 / 1e6)


def test_read_latency(trace):
    data = plots.read_latency(trace).data
    ssd = data[(data.source == "ssd") & (data.time == "read")]
    assert ssd.us.tolist() == [1e3, 1e3, 2e3, 2e3, 2e3, 2e3, 4e3, 4e3]
    assert ssd.share.tolist() == [n / 8 for n in range(1, 9)]
    cached = data[data.source == "page_cache"]
    assert cached.us.tolist() == [1e3, 2e3]  # in the thread, and with the queue


def test_figures_of_reads_say_that_there_were_none():
    trace = made_trace()
    trace.reads["nbytes"] = 0
    for draw in (plots.read_latency, plots.io_rate):
        with pytest.raises(ValueError, match="no reads: the bank held every expert"):
            draw(trace)


def test_layer_latency_is_the_mean_of_decode_steps(trace):
    data = plots.layer_latency(trace).data.set_index(["layer", "stage"]).mean_ms
    assert data.to_dict() == {
        (0, "mixer"): 1.0, (0, "fetch"): 3.0, (1, "mixer"): 5.0, (1, "fetch"): 3.0,
    }  # fmt: skip


def test_token_waterfall(trace):
    data = plots.token_waterfall(trace, token=3).data
    assert data.stage.tolist() == ["mixer", "fetch", "mixer", "fetch", "lm_head"]
    assert data.start_ms.tolist() == [0, 1, 5, 11, 15] and data.dur_ms.sum() == 30
    assert plots.token_waterfall(trace).title.startswith("Token 3 ")  # the upper of two


def test_time_shares_name_what_is_unexplained(trace):
    data = plots.time_shares(trace).data.set_index("stage")
    assert data.ns["unexplained"] == 5 * MS and data.share.sum() == pytest.approx(1)
    assert data.share["lm_head"] == pytest.approx(0.30) and data.share["record"] == 0.05


@pytest.mark.parametrize(
    "by, values",
    [("latency", [20, 30]), ("entropy", [1, 2, 0.5]), ("bytes", [0.001, 0.002])],
)
def test_token_strip(trace, by, values):
    data = plots.token_strip(trace, by=by).data
    assert data.value.tolist() == pytest.approx(values)
    assert data.token.tolist() == [2, 3, 4][: len(values)]


def test_token_strip_refuses_other_values(trace):
    with pytest.raises(ValueError, match="by is 'joy'; it must be one of 'latency'"):
        plots.token_strip(trace, by="joy")


def test_stack_distances_count_different_keys_between():
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 64, 301):
        keys = rng.integers(0, 12, size)
        for place, found in enumerate(stack_distances(keys)):
            before = np.flatnonzero(keys[:place] == keys[place])
            between = set(keys[before[-1] + 1 : place]) if len(before) else None
            assert found == (-1 if between is None else len(between))


def test_reuse_distance(trace):
    data = plots.reuse_distance(trace).data
    # Requests 0 1 2 5 6 7 | 0 1 6 7 | 0 3 4 5: again after 5 5 3 3, 3 and 6 others (5 comes last).
    assert data.requests.sum() == 6 and data["from"].iloc[0] == 4
    rates = (14 * data.lru_hit_rate).tolist()
    hits = dict(zip(data.below.tolist(), rates, strict=True))  # of a bank of so many slots
    assert hits[5] == pytest.approx(3) and hits[6] == pytest.approx(5)
    assert hits[7] == pytest.approx(6)
    assert hits[max(hits)] == pytest.approx(6)


def test_hit_rate(trace):
    data = plots.hit_rate(trace).data
    time, layers = data[data["of"] == "token"], data[data["of"] == "layer"]
    assert time.hit.tolist() == [0, 0.75, 0.5] and time.token.tolist() == [0, 2, 3]
    assert time.smoothed.tolist() == pytest.approx([0, 0.375, 1.25 / 3])
    assert layers.hit.tolist() == pytest.approx([3 / 7, 2 / 7])


def test_bytes_per_token(trace):
    data = plots.bytes_per_token(trace).data
    assert data.token.tolist() == [2, 3]
    assert data.page_cache.tolist() == [1000, 0] and data.ssd.tolist() == [0, 2000]


def test_memory_budget(trace):
    data = plots.memory_budget(trace).data.set_index("what").nbytes
    assert data.to_dict() == {
        "resident weights": 5000, "KV cache, 4 tokens": 25_600, "recurrent state": 640,
        "bank, 6 slots": 6000, "page cache at the start": 3000, "all experts": 8000,
    }  # fmt: skip
    unknown = plots.memory_budget(made_trace(page_cache_nbytes=None)).data
    assert "page cache at the start" not in set(unknown.what)


def test_context_memory(trace):
    data = plots.context_memory(trace).data.set_index("context_tokens")
    assert data.kv_nbytes[1024] == 102_400 and set(data.recurrent_nbytes) == {640}
    assert data.all_attention_nbytes[1024] == 204_800  # both layers, not one


def test_state_norm(trace):
    data = plots.state_norm(trace).data
    assert data[data["head"] == 1]["norm"].tolist() == [2, 4, 6, 8] and set(data.layer) == {0}
    with pytest.raises(ValueError, match=r"layer 1 has no state_norm; kept are layers \[0\]"):
        plots.state_norm(trace, layer=1)


def test_delta_gates(trace):
    data = plots.delta_gates(trace).data.set_index(["gate", "head"])["mean"]
    assert data["decay"].tolist() == [1, 0.5] and data["write_strength"].tolist() == [0.5, 0.25]


def test_memory_length_is_a_half_life(trace):
    data = plots.memory_length(trace).data.half_life_tokens
    assert data[1] == pytest.approx(1) and data[0] > 1e6


def test_attention_map(trace):
    data = plots.attention_map(trace, head=1).data
    assert len(data) == 10 and set(data.weight) == {0.25}  # only what a token can see
    mean = plots.attention_map(trace).data
    assert set(mean.weight) == {0.375}
    with pytest.raises(ValueError, match="head is 2; heads are 0 to 1"):
        plots.attention_map(trace, head=2)


def test_attention_map_has_a_row_a_token_that_was_kept():
    """Of a chunk only the last token: positions have gaps."""
    trace = made_trace()
    weights = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    trace.arrays = {"layers.1.mixer.attention": (np.array([1, 2, 3]), weights)}
    trace.arrays["layers.1.mixer.attention"][0][0] = 0
    ax = plots.attention_map(trace).figure.axes[0]
    rows = np.asarray(ax.images[0].get_array())
    assert len(rows) == 3 and rows[1].tolist()[:3] == [4, 5, 6]
    low, high = sorted(ax.images[0].get_extent()[2:])
    ticks = dict(zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()], strict=True))
    assert (low, high) == (-0.5, 2.5)
    assert ticks == {0: '"a"', 1: '" c"', 2: r'"\n"'}


@pytest.mark.parametrize("draw", [plots.io_timeline, plots.io_rate, plots.token_waterfall])
def test_any_position_of_a_chunk_shows_its_pass(trace, draw):
    first, second = draw(trace, token=0).data, draw(trace, token=1).data
    assert len(first) and second.equals(first)


def test_even_lines_follow_each_layers_own_k():
    """A layer where an intervention left one expert."""
    trace = made_trace()
    trace._tables["routing"] = trace.routing.query("layer == 0 or rank == 0").reset_index(drop=True)
    del trace.routing
    assert plots.token_overlap(trace).data.chance.tolist() == [0.5, 0.25]
    assert plots.working_set(trace).data.even.tolist()[:2] == [2 + 1, 3 + 1.75]
    line = plots.expert_histogram(trace).figure.axes[0].lines[0]
    assert np.asarray(line.get_ydata())[0] == pytest.approx((4 * 2 + 4 * 1) / 8)


def test_layers_of_another_block_size_count_as_such():
    trace = made_trace(layer_block_nbytes="1000,500")
    line = plots.bytes_per_token(trace).figure.axes[0].lines[0]
    assert np.asarray(line.get_ydata())[0] == pytest.approx((2 * 1000 + 2 * 500) / 1e6)


def test_the_caption_says_what_was_not_the_models_own():
    facts = {"lossy": "K=2 of the model's 3", "intercepted": "layers.0.*", "finish_reason": "error"}
    words = conditions(made_trace(**facts))
    assert words.endswith(
        "\nlossy: K=2 of the model's 3; intercepted layers.0.*; ended by an error"
    )
    assert "\n" not in conditions(made_trace())
    assert conditions(made_trace(finish_reason="cancelled")).endswith("stopped before its end")


def test_figures_of_an_empty_trace_say_so():
    recorder = Recorder()
    recorder.begin(num_hidden_layers=2, num_experts=4, bank_keeps=False)
    with pytest.raises(ValueError, match="no routing: no pass went through the model"):
        plots.working_set(recorder.finish())
