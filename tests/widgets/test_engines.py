"""Which engine a setting gets, and that others do not pile up."""

import threading

import pytest

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled
from flashmoe_lab.demo import open_checkpoint
from flashmoe_lab.storage import page_cache
from flashmoe_lab.widgets.engines import engine_for, prepare
from flashmoe_lab.widgets.forms import form_of, forms_of
from flashmoe_lab.widgets.setting import Setting


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "flashmoe-engine"]


def test_forms_are_the_same_model_at_other_bits(forms, engine):
    found = forms_of(engine.checkpoint)
    assert [form.path for form in found] == [forms / "golden-4", forms / "golden-8"]
    assert [form.label.split()[0] for form in found] == ["4", "8"]
    assert form_of(engine.checkpoint) == found[0]
    assert found[1].open().label == found[1].label


def test_a_setting_without_wishes_gets_the_engine_that_was_given(engine):
    same = Setting(bits=form_of(engine.checkpoint).label, policy="lru", num_experts_per_tok=2)
    for setting in (Setting(), same):
        with engine_for(engine, setting) as opened:
            assert opened is engine


def test_another_setting_gets_another_engine_and_keeps_it(forms, engine):
    eight = Setting(bits=forms_of(engine.checkpoint)[1].label)
    with engine_for(engine, eight) as first:
        assert first.checkpoint.path == forms / "golden-8"
        assert first.settings == engine.settings
    with engine_for(engine, eight) as again:
        assert again is first
    with engine_for(engine, Setting(bank_gb=0.0)) as other:
        assert other.checkpoint.path == engine.checkpoint.path and not other.bank.keeps
        with pytest.raises(RuntimeError, match="closed"):
            first.logits([1])
    assert engine.logits([1]).shape[0] == 1


def test_changing_again_and_again_leaves_one_more_engine_at_most(engine):
    before = len(engine_threads())
    labels = [form.label for form in forms_of(engine.checkpoint)]
    for turn in range(10):
        setting = Setting(bits=labels[turn % 2], bank_gb=[0.0, 0.0002][turn % 3 > 0])
        with engine_for(engine, setting) as opened:
            opened.logits([1])
        assert len(engine_threads()) == before + 1
    with engine_for(engine, Setting()):
        assert len(engine_threads()) == before


def test_a_form_that_is_not_there_is_refused(engine):
    with pytest.raises(ValueError, match="bits is '3 bits'; there are '4 bits"):
        with engine_for(engine, Setting(bits="3 bits")):
            pass
    with engine_for(engine, Setting()) as opened:  # nobody holds the lock
        assert opened is engine


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_bank_and_page_cache_at_the_start(engine, state):
    engine.logits([1, 2, 3])
    prepare(engine, Setting())
    assert engine.bank.contents()
    prepare(engine, Setting(page_cache=state))
    assert not engine.bank.contents()
    files = [layer.path for layer in engine.checkpoint.layers]
    held = sum(page_cache.resident_bytes(file) for file in files)
    assert held == (0 if state == "cold" else sum(file.stat().st_size for file in files))


@pytest.mark.parametrize(
    "wrong, words", [({"page_cache": "icy"}, "'cold', 'warm'"), ({"policy": "x"}, "known are lru")]
)
def test_a_setting_that_cannot_be(wrong, words):
    with pytest.raises(ValueError, match=words):
        Setting(**wrong)


def test_an_engine_that_nobody_holds_is_not_held_here(forms):
    import gc
    import weakref

    engine = fl.load(forms / "golden-4")
    with engine_for(engine, Setting(bank_gb=0.0)):
        pass
    other = [thread for thread in engine_threads()]
    gone = weakref.ref(engine)
    engine.close()
    del engine
    gc.collect()
    assert gone() is None
    for thread in other:  # the other engine went with it
        thread.join(10)


def test_a_form_of_the_bundled_model_is_called_the_same_before_and_after_it_is_packed(
    tmp_path, monkeypatch
):
    if not (bundled("demo_model") / "model.safetensors.index.json").exists():
        pytest.skip("the weights are not here")
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("demo", quiet=True)
    before = forms_of(checkpoint)
    assert before[0].path is None and before[0].open().label == before[0].label
    after = forms_of(checkpoint)
    assert after[0].path and [form.label for form in after] == [form.label for form in before]
