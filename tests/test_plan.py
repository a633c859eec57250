"The plan of a run: counted by hand, by PyTorch's own counter, and against memory that was really taken."
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BloomConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, MistralConfig, PhiConfig, StableLmConfig

from t2ianalysis import compute
from t2ianalysis.compute import CHUNK, Scored
from t2ianalysis.data import BadInput
from t2ianalysis.models import RULES
from t2ianalysis.plan import (
    DEVICES,
    PUBLISHED,
    Live,
    Planned,
    architecture,
    captions_at_hand,
    check_memory,
    codes_of,
    data_plan,
    disk,
    flops_per_token,
    memory_lines,
    no_content,
    parameters_by_part,
    plan,
    plan_text,
    sequence_widths,
    share_out,
    skeleton,
    trace,
)
from t2ianalysis.scale import store_bytes
from t2ianalysis.training import make_config

TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    "A Llama of two layers, config only: no weights anywhere"
    folder = tmp_path_factory.mktemp('lm')/'tiny'
    LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


def test_the_papers_model_is_counted_without_weights():
    model, vocab = skeleton('models/open_lm-1b', 16_384)
    sizes = parameters_by_part(model)
    assert {p.device.type for p in model.parameters()} == {'meta'} and vocab.size == 50_432 + 7 + 16_384
    assert sizes == dict(embedding=vocab.size * 2048, output=vocab.size * 2048, attention=24 * 4 * 2048**2, ffn=24 * 3 * 2048 * 5632, norm=49 * 2 * 2048, position=0, other=0)
    assert sum(sizes.values()) - 2 * 2048 * (16_384 + 7) == 1_439_895_552
    assert 8.8e9 < flops_per_token(model, 1152)['total'] < 9.0e9
    assert codes_of('models/movqgan-270m', 256)[:2] == (16_384, 1_024)


def test_a_model_that_is_here_is_not_taken_from_the_published_one(tmp_path):
    folder = tmp_path/'open_lm-1b'
    LlamaConfig(**{**PUBLISHED['smollm2-135m'], 'num_hidden_layers': 3}).save_pretrained(folder)
    config, source = architecture(str(folder))
    assert config.num_hidden_layers == 3 and source == 'from its config'


@pytest.mark.parametrize('rule', list(RULES))
def test_flops_are_those_of_pytorchs_counter(lm, rule):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from t2ianalysis.models import freeze
    with FakeTensorMode():
        model, vocab = skeleton(lm, 64, 'cpu')
        freeze(model, rule, vocab)
        scored = Planned(model, 32)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): scored(*no_content(2, 32))[0].backward()
    assert flops_per_token(skeleton(lm, 64)[0], 32, rule)['total'] == pytest.approx(counter.get_total_flops() / 64, rel=0.03)


def test_bytes_of_a_step_add_up(lm, monkeypatch):
    n, rows = sum(p.numel() for p in skeleton(lm, 64)[0].parameters()), 1024 + 7 + 64
    monkeypatch.setattr(compute, 'LEAST', 1); monkeypatch.setitem(CHUNK, 'cpu', 40 * rows)                                            # logits of 40 tokens at a time
    config = make_config('smoke', lm=lm)
    whole, double, light = trace(config, 64, 41, ((4, False), (8, False), (4, True)))
    for t in (whole, double, light): assert (t['weights'], t['gradients'], t['optimizer']) == pytest.approx((4 * n, 4 * n, 8 * n), rel=1e-3)
    assert whole['more'] == pytest.approx(16 * n + whole['activations'] + whole['loss'], rel=1e-3) and whole['first'] <= whole['more']
    chunk, head, hidden = 4 * 40 * rows, 4 * 128 * rows, 4 * 4 * 40 * 128                   # a chunk in fp32; the gradients of output layer and hidden states
    assert 2 * chunk + head + hidden <= whole['loss'] <= 3 * chunk + 2 * head + 2 * hidden
    assert double['activations'] == pytest.approx(2 * whole['activations'], rel=0.01) and double['loss'] - whole['loss'] <= 2 * hidden and light['activations'] < whole['activations'] / 2
    frozen, = trace(make_config('smoke', lm=lm, trainable='norms'), 64, 41, ((4, False),))
    norms = sum(p.numel() for name, p in skeleton(lm, 64)[0].named_parameters() if 'norm' in name or 'embed' in name or 'lm_head' in name)
    assert frozen['gradients'] == 4 * norms and frozen['activations'] < whole['activations']


def test_memory_bends_where_a_chunk_is_full(lm, monkeypatch):
    monkeypatch.setattr(compute, 'LEAST', 1); monkeypatch.setitem(CHUNK, 'cpu', 8 * 41 * (1024 + 7 + 64))
    config = make_config('smoke', lm=lm)
    line, found = memory_lines(config, 64, 41), {n: trace(config, 64, 41, ((n, False),))[0] for n in (1, 3, 8, 20, 100)}
    for n, t in found.items(): assert line('as it trains', n)['more'] == pytest.approx(t['more'], rel=0.03)


@pytest.mark.parametrize('config, lean, unpadded', [
    (LlamaConfig(**TINY), True, True), (StableLmConfig(**TINY, partial_rotary_factor=0.0), True, True), (GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128), True, True),
    (MistralConfig(**TINY, sliding_window=8), True, False), (MistralConfig(**TINY, sliding_window=64), True, True), (Gemma2Config(**TINY, head_dim=16), False, False), (GraniteConfig(**TINY, logits_scaling=2.0), False, True),
    (PhiConfig(**TINY), False, True), (BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2), True, False)], ids=lambda c: getattr(c, 'model_type', None))
def test_what_is_planned_is_what_is_trained(config, lean, unpadded, tmp_path):
    "As told from the code, as measured on a real model."
    config.save_pretrained(tmp_path)
    with FakeTensorMode(): planned = Planned(skeleton(str(tmp_path), 16, 'cpu')[0], 20)
    scored = Scored(skeleton(str(tmp_path), 16, 'cpu')[0], 20)
    assert (planned.lean, planned.unpadded) == (scored.lean, scored.unpadded) == (lean, unpadded)


def test_another_family_is_planned_too(tmp_path):
    GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128).save_pretrained(tmp_path/'gpt2')
    model, _ = skeleton(str(tmp_path/'gpt2'), 16)
    assert parameters_by_part(model)['position'] == 128 * 32 and parameters_by_part(model)['output'] == 0
    assert trace(make_config('smoke', lm=str(tmp_path/'gpt2'), precision='bf16'), 16, 20, ((2, False),))[0]['more'] > 0


def test_memory_is_what_a_real_run_takes(lm):
    "Two steps of two parts through Accelerate, in a process of its own."
    got = check_memory(dict(preset='smoke', lm=lm), codes=2048, width=160, sequences=16, parts=2)
    assert 0.85 < got['ratio'] < 1.15 and 0.85 < got['resident_ratio'] < 1.15


def test_padding_is_measured_where_the_captions_are(pairs_folder):
    config = make_config('smoke', data=str(pairs_folder), px=64, pairs=0)
    d = data_plan(config, 64, 1)
    assert 'measured on' in d['source'] and 1 <= d['pairs'] <= 10 and d['real'] <= d['padded'] <= d['widest'] and d['real'] == pytest.approx(64 + 6 + d['caption'])
    assert d['sequences'] == 24 and d['tokens'] == pytest.approx(24 * d['real']) and d['padded_tokens'] == pytest.approx(24 * d['padded'])
    assert sequence_widths(make_config('paper'), 1024, None)['padded'] == 1152
    with pytest.raises(BadInput, match='length=20 is too short'): sequence_widths(make_config('smoke', length=20), 64, None)


def test_the_store_of_a_plan_is_as_large_as_the_one_that_is_written(store, pairs_folder):
    _, size, pairs, _ = captions_at_hand(make_config('smoke', data=str(pairs_folder), px=16, pairs=0))
    k, files = disk(make_config('smoke'), 16, 10, 8, size, 0, 0), {f.name: f.stat().st_size for f in store.folder.iterdir()}
    assert pairs <= 10 and k['codes'] == files['codes.bin'] and k['captions'] == pytest.approx(files['captions.jsonl'], rel=0.03) and k['caption_ids'] == 10 * 9 * 4
    d = data_plan(make_config('paper'), 1024, 1)
    assert disk(make_config('paper'), 1024, d['pairs'], d['caption'], d['caption_bytes'], 0, 0)['store'] == sum(store_bytes(134_000_000).values())


def test_parts_divide_the_batch():
    assert share_out(make_config('paper'), 64, 8) == (2, 7) and share_out(make_config('paper'), 1, 32) == (28, 31) and share_out(make_config('paper'), 1, 1) == (868, 1)


def test_hours_follow_devices_and_mfu(lm):
    config = make_config('paper', lm=lm, image_tokenizer='bundled', px=64, length=80)
    one, many = plan(config, 1, 'h200'), plan(config, 4, 'a100', 0.25)
    a, b = one['places'][0], many['places'][0]
    assert a['hours'] == pytest.approx(one['total_flops'] / (0.5 * 989e12) / 3600) and a['days'] == pytest.approx(a['hours'] / 24)
    assert b['hours'] / a['hours'] == pytest.approx(2 * 989 / 312) and b['days'] == pytest.approx(b['hours'] / 4 / 24)
    assert json.loads(json.dumps(one))['parameters']['total'] == sum(one['parameters'][k] for k in one['parameters'] if k != 'total')
    assert one['disk']['total'] == one['disk']['store'] + 3 * one['disk']['checkpoint'] + one['disk']['weights']
    for v in b['variants'].values(): assert v['part'] <= max(v['micro_batch'], 1) and v['peak'] <= 0.9 * DEVICES['a100']['memory']
    text = plan_text(many).splitlines()
    assert max(map(len, text[3:])) <= 100 and any(line.startswith('4 x A100 80 GB') for line in text) and 'assumed: data/pairs is not here' in '\n'.join(text)


def test_views_and_what_is_gone_do_not_count():
    with FakeTensorMode(), Live() as live:
        x = torch.zeros(100, 100)
        y = (x + 1).t()
        assert live.now == 80_000
        del y
    assert (live.now, live.most) == (40_000, 80_000)


@pytest.mark.parametrize('arguments, words', [
    (['labtop'], "Did you mean 'laptop'?"), (['smoke', '-p', 'stepz=3'], "Did you mean 'steps'?"), (['smoke', '--devices', '0'], 'devices=0 must be at least 1'),
    (['smoke', '--device', 'h300'], "Did you mean 'h200'?"), (['smoke', '--mfu', '0'], 'mfu=0.0 is no share'), (['smoke', '--devices', '64'], 'devices=64 is more than the batch of 4'),
    (['smoke', '-p', 'lm=nowhere'], "lm='nowhere' is no folder"), (['smoke', '-p', 'px=60'], 'px=60'), (['smoke', '-p', 'length=20'], 'length=20 is too short'),
])
def test_a_mistake_is_one_sentence_and_status_2(arguments, words, t2i, capsys):
    assert t2i('plan', *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('t2i: ') and err.count('\n') == 1


def test_the_sizes_of_cm3_are_planned_without_files(monkeypatch, tmp_path):
    monkeypatch.setenv('T2I_CACHE', str(tmp_path)); monkeypatch.setenv('T2I_WORK', str(tmp_path))
    model, vocab = skeleton('cm3-125m', 1024, masks=16)
    assert parameters_by_part(model) == dict(embedding=vocab.size * 768, output=0, attention=12 * (4 * 768**2 + 4 * 768), ffn=12 * (8 * 768**2 + 5 * 768), norm=(24 + 1) * 2 * 768, position=0, other=0)
    assert vocab.size == 50_257 + 7 + 1024 + 17
    for preset, billions in (('cm3-125m', 0.125), ('cm3-800m', 0.8), ('cm3-2.7b', 2.7), ('cm3-13b', 13)):
        config = make_config(preset)
        assert architecture(config.lm)[1] == 'from the published config' and codes_of(config.image_tokenizer, config.px)[:2] == (1024, 256)
        assert sum(p.numel() for p in skeleton(config.lm, 1024)[0].parameters()) / 1e9 == pytest.approx(billions, rel=.1)
    made = plan(make_config('cm3-2.7b'))
    assert (made['data']['pages'], made['data']['real'], made['data']['padded'], made['data']['widest']) == (True, 2048, 2048, 2048) and 200e9 < made['data']['tokens'] < 230e9
    assert made['disk']['codes'] == 0 and [p['devices'] for p in made['places']] == [240, 8] and 'documents of pages' in plan_text(made) and 'captions' not in plan_text(made)
    assert not list(tmp_path.rglob('*.safetensors'))
    assert plan(make_config('cm3-laptop'))['data']['source'] == 'assumed: gimp-help is not here'


def test_pages_and_masks_are_as_long_as_in_training(tmp_path, vq_folder, vq):
    "What the plan says of a run's sequences is what its batches hold."
    from t2ianalysis.minimal_html import minimal_page, save_corpus
    from t2ianalysis.training import batches_at, prepare
    page = lambda i: minimal_page(f'<p>{"a red fish and a house " * (i % 7)} page {i} <img src="{" ".join(map(str, range(16)))}">', f'{i}.html')
    save_corpus(tmp_path/'pages', [page(i) for i in range(30)], [page(30)], vq, 16, 0)
    for data, layout in ((tmp_path/'pages', 'document'), (tmp_path/'pages', 'causally-masked'), (tmp_path/'pages', 'causally-masked-public'), ('openclipart', 'causally-masked'), ('openclipart', 'text-image')):
        config = make_config('smoke', data=str(data), image_tokenizer=str(vq_folder), px=16, pairs=60, layout=layout, length=140, batch=8, steps=40)
        about, material = data_plan(config, 16, 1), prepare(config, progress=False)
        parts = [part for step in range(config.steps) for part in batches_at(config, material, step)[1]]
        width = lambda part: (part.kind != 0).sum(1)
        assert about['pairs'] == len(material.train) and about['source'].startswith('measured on')
        assert sum(width(part).sum().item() for part in parts) / (config.steps * config.batch) == pytest.approx(about['real'], rel=.02)
        assert sum(part.ids.numel() for part in parts) / (config.steps * config.batch) == pytest.approx(about['padded'], rel=.06)
        assert max(width(part).max().item() for part in parts) <= about['widest'] <= 140
    with pytest.raises(BadInput, match='length=48 leaves no room'): data_plan(make_config('cm3-smoke', length=48), 64, 1)
