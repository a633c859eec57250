"Pages as tokens and as documents of a run: nothing lost, no image cut, arms that see the same windows, and one sentence for what does not fit."
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from t2ianalysis import pages
from t2ianalysis.data import BadInput, data_path
from t2ianalysis.masking import MASKINGS, Masked, unmask
from t2ianalysis.models import CM3_SIZES, cm3_config, load_lm, load_text_tokenizer
from t2ianalysis.pages import Hypertext, is_corpus, page_html, page_ids, window_cuts
from t2ianalysis.sequences import Kind, Vocab
from t2ianalysis.training import PRESETS, batches_at, check_config, lr_at, make_config, prepare, run_id

SAMPLE = data_path('gimp_help_sample')
V = Vocab(300, 64, masks=16)


@pytest.fixture
def corpus(tmp_path):
    "A copy of the shipped sample"
    return shutil.copytree(SAMPLE, tmp_path/'corpus')


def rewrite(folder, **changes): (folder/'corpus.json').write_text(json.dumps(json.loads((folder/'corpus.json').read_text()) | changes))


# There and back

words = st.text(st.characters(codec='utf-8', exclude_characters='<>&\r'), max_size=12)
images = st.builds(lambda alt, codes: f'<img alt="{alt}" src="{" ".join(map(str, codes))}">', words.map(lambda w: w.replace('"', '')), st.lists(st.integers(0, 63), min_size=1, max_size=9))
sentinels = st.one_of(st.integers(0, 15).map('<mask:{}>'.format), st.sampled_from(['<end>', '<doc>', '</doc>']))
html = st.lists(st.one_of(words, images, sentinels, st.sampled_from(['<p>', '</p>', '<a href="x" title="src=">', 'src="1 2"', '&lt;mask:0&gt;', '<img src="a.png">'])), max_size=12).map(''.join)


@settings(max_examples=300, deadline=None)
@given(html=html)
def test_any_html_comes_back_and_codes_are_those_in_a_src(html, text_tokenizer):
    ids = page_ids(V, text_tokenizer, html)
    assert page_html(V, text_tokenizer, ids) == html
    kind = V.kinds(torch.from_numpy(ids))
    inside = [n for src in pages._SRC.findall(html) for n in src.split()]
    assert (ids[kind.numpy() == Kind.IMAGE] - V.image).tolist() == [*map(int, inside)]


def test_every_page_of_the_sample_comes_back():
    tokenizer, rows = load_text_tokenizer('bundled'), [json.loads(line) for side in ('train', 'test') for line in (SAMPLE/f'{side}.jsonl').open()]
    vocab = Vocab(len(tokenizer), 1024)
    assert len(rows) > 50
    for row in rows:
        ids = page_ids(vocab, tokenizer, row['html'])
        assert page_html(vocab, tokenizer, ids) == row['html']
        assert (ids >= vocab.image).sum() == 64 * row['html'].count('<img')


def test_prompts_hold_masks_between_codes_and_may_end_inside_a_src(text_tokenizer):
    kinds = lambda html: [Kind(k).name for k in V.kinds(torch.from_numpy(page_ids(V, text_tokenizer, html))).tolist() if k != Kind.TEXT]
    assert kinds('<img alt="a<mask:0>" src="1 2 <mask:1> 3"><mask:0>') == ['MASK', 'IMAGE', 'IMAGE', 'MASK', 'IMAGE', 'MASK']
    assert kinds('<img src="1 2') == ['IMAGE', 'IMAGE'] and kinds('<img src="') == [] == kinds('<p>src="1 2"</p>') == kinds('<img src="1.png">')
    begin = page_ids(V, text_tokenizer, '<img').tolist()
    whole = page_ids(V, text_tokenizer, '<p>A fish.</p><img src="1">').tolist()
    assert any(whole[i:i + len(begin)] == begin for i in range(len(whole)))      # `<img` is the same tokens in a prompt and in a page


@pytest.mark.parametrize('html, said', [('<img src="64">', 'the code 64'), ('<mask:16>', 'from 0 to 15')])
def test_what_the_vocabulary_lacks_is_refused(html, said, text_tokenizer):
    with pytest.raises(BadInput, match=said): page_ids(V, text_tokenizer, html)
    with pytest.raises(BadInput, match='no mask tokens'): page_ids(dataclasses.replace(V, masks=0), text_tokenizer, '<p><mask:0></p>')
    with pytest.raises(BadInput, match='gives token'): page_ids(Vocab(50, 64), text_tokenizer, 'a red fish')


# Windows

@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 8)), max_size=8), tail=st.integers(0, 9), length=st.integers(8, 20))
def test_no_window_cuts_codes_and_none_is_longer_or_empty(parts, tail, length):
    at, spans = 0, []
    for text, head, codes in parts:
        spans.append((at + text, at + text + head, at + text + head + codes)); at = spans[-1][2]
    cuts = window_cuts(np.array(spans).reshape(-1, 3), at + tail, length)
    assert cuts[0] == 0 and cuts[-1] == at + tail and all(0 < b - a <= length for a, b in zip(cuts, cuts[1:]) if at + tail)
    for begin, first, last in spans:
        inside = [c for c in cuts if begin < c < last]
        assert not any(first < c for c in inside)                                # codes are whole
        assert not inside or last - begin > length or any(a in cuts for a in range(begin + 1)) # and their <img with them, where it fits
    for a, b in zip(cuts, cuts[1:-1]): assert b - a == length or any(b in (begin, first) for begin, first, _ in spans)  # a window is full unless an image did not fit


def test_windows_put_together_are_the_pages(text_tokenizer, tmp_path):
    tokenizer = load_text_tokenizer('bundled')
    rows = Hypertext(SAMPLE/'train.jsonl', tokenizer, len(tokenizer), 1024, 150)
    lines = [json.loads(line) for line in (SAMPLE/'train.jsonl').open()]
    for n, line in enumerate(lines):
        mine = np.flatnonzero(rows.windows[:, 0] == n)
        assert page_html(rows.vocab, tokenizer, np.concatenate(rows.documents(mine))) == f'<doc>{line["html"]}</doc>' and rows.names[rows.windows[mine[0]][0]] == line['name']
    assert rows.lengths(range(len(rows))).tolist() == [len(d) for d in rows.documents(range(len(rows)))] and rows.lengths(range(len(rows))).max() <= 150
    with pytest.raises(BadInput, match='too short for an image of 64'): Hypertext(SAMPLE/'train.jsonl', tokenizer, len(tokenizer), 1024, 60)


def test_pages_are_tokenised_once_and_again_when_they_change(corpus, text_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv('T2I_CACHE', str(tmp_path/'cache'))
    made, real = [], pages.page_ids
    monkeypatch.setattr(pages, 'page_ids', lambda *a: made.append(1) or real(*a))
    open_ = lambda: Hypertext(corpus/'test.jsonl', text_tokenizer, 300, 1024, 400)
    first = open_(); n = len(made)
    assert n == len(first.names) > 0 and open_().documents([0])[0].tolist() == first[0] and len(made) == n
    (corpus/'test.jsonl').write_text((corpus/'test.jsonl').read_text().replace('GIMP', 'gimp', 1))
    assert open_().fingerprint != first.fingerprint and len(made) > n
    lines = (corpus/'test.jsonl').read_text().splitlines()
    (corpus/'test.jsonl').write_text('\n'.join(json.dumps(json.loads(line) | dict(counts={})) for line in lines))
    before = open_().fingerprint
    assert before == Hypertext(corpus/'test.jsonl', text_tokenizer, 300, 1024, 200).fingerprint  # what was counted on the way is no part of it


# In a run

def test_arms_of_any_layout_see_the_same_windows_in_the_same_order():
    plain, *masked = (make_config('cm3-smoke', layout=layout) for layout in ('document', *MASKINGS))
    a = prepare(plain, progress=False)
    _, (batch,) = batches_at(plain, a, 3)
    strip = lambda batch: [row[kind != Kind.PAD].numpy() for row, kind in zip(batch.ids, batch.kind)]
    for config in masked:
        b = prepare(config, progress=False)
        count, (other,) = batches_at(config, b, 3)
        assert isinstance(b.train, Masked) and [unmask(b.train.vocab, row).tolist() for row in strip(other)] == [row.tolist() for row in strip(batch)]
        assert other.ids.shape[1] <= config.length and count == other.tokens and ((other.kind == Kind.MASK).any() or MASKINGS[config.layout].images == 'whole')
        assert run_id(config, b.fingerprint) != run_id(plain, a.fingerprint)


def test_a_run_on_pages_is_prepared_from_what_its_fields_say(corpus):
    m = prepare(make_config('cm3-smoke', data=str(corpus), pairs=5, eval_pairs=3), progress=False)
    assert (len(m.train), len(m.valid)) == (5, 3) and m.train.length == 192 - 48 and m.fingerprint['train'] != m.fingerprint['validation']
    assert prepare(make_config('cm3-smoke', pairs=5, eval_pairs=3), progress=False).fingerprint == m.fingerprint  # the same pages elsewhere


@pytest.mark.parametrize('changes, said', [(dict(layout='text-image'), "set layout='document'"), (dict(px=128), 'set px=64'), (dict(length=48), 'give more than 48'), (dict(length=100), 'too short for an image'),
                                           (dict(data='gimp-help'), 'jupyter execute nbs/build/gimp_help'), (dict(data='openclipart', layout='document'), "set layout='text-image'"),
                                           (dict(lm='cm3-0.1m'), "set init='random'"), (dict(schedule='linear'), 'schedule='), (dict(data='/none'), 'unknown|not there|exist')])
def test_fields_that_do_not_go_together_are_refused(changes, said):
    with pytest.raises(BadInput, match=said):
        config = make_config('cm3-smoke', **changes)
        prepare(config, progress=False)
        load_lm(config.lm, config.init)


@pytest.mark.parametrize('spoil, said', [(lambda f: rewrite(f, image_tokenizer='0' * 64), 'another image tokenizer'), (lambda f: rewrite(f, grid=[8]), 'no folder of pages'), (lambda f: rewrite(f, codes='x'), 'no folder of pages'),
                                         (lambda f: (f/'test.jsonl').unlink(), 'no folder of pages'), (lambda f: (f/'train.jsonl').write_text('{"name": 1}\n'), 'line 1'),
                                         (lambda f: (f/'train.jsonl').write_text('{"name": "a", "html": "<img src=\\"5000\\">"}\n'), 'the code 5000'), (lambda f: (f/'train.jsonl').write_text(''), 'holds no page')])
def test_a_spoilt_corpus_is_one_sentence(spoil, said, corpus):
    assert is_corpus(str(corpus))
    spoil(corpus)
    with pytest.raises(BadInput, match=said) as e: prepare(make_config('cm3-smoke', data=str(corpus)), progress=False)
    assert '\n' not in str(e.value)


# The paper's sizes and schedule

def test_the_architectures_are_those_of_table_10():
    with torch.device('meta'): models = {name: AutoModelForCausalLM.from_config(cm3_config(name, 50_257)) for name in CM3_SIZES}
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    for name, billion in (('cm3-125m', 0.125), ('cm3-800m', 0.8), ('cm3-2.7b', 2.7), ('cm3-13b', 13)): assert size[name]/1e9 == pytest.approx(billion, rel=0.06)
    layer = lambda m: m.model.layers[0]
    for name in CM3_SIZES:
        layers, width, heads = CM3_SIZES[name]
        m = models[name]
        assert len(m.model.layers) == layers and layer(m).fc1.weight.shape == (4 * width, width) and layer(m).self_attn.num_heads == heads
        assert m.config.tie_word_embeddings and not any('embed_positions' in n for n, _ in m.named_parameters())


def test_the_presets_are_those_of_section_3_3():
    for name in ('cm3-125m', 'cm3-800m', 'cm3-2.7b', 'cm3-13b'):
        c = check_config(PRESETS[name])
        assert (c.length, c.warmup, c.beta1, c.beta2, c.clip, c.schedule, c.px, c.layout) == (2048, 1500, 0.9, 0.98, 1.0, 'polynomial', 256, 'causally-masked')
    c = PRESETS['cm3-13b']
    rates = [lr_at(c, s) for s in (0, 1499, 1500, (c.steps + 1500) // 2, c.steps - 1)]
    assert rates[1:3] == pytest.approx([c.lr] * 2) and rates[3] == pytest.approx(c.lr / 2) and 0 < rates[4] < c.lr / 10_000 and math.isclose(rates[0], c.lr / 1500)


def test_small_sizes_are_causal_and_begin_at_random(tmp_path, monkeypatch):
    monkeypatch.setenv('T2I_CACHE', str(tmp_path/'cache'))
    a, b, c = (load_lm('cm3-0.1m', 'random', seed) for seed in (0, 0, 1))
    same = lambda x, y: torch.equal(x.model.layers[0].fc1.weight, y.model.layers[0].fc1.weight)
    assert same(a, b) and not same(a, c) and a.get_input_embeddings().weight.shape == (4096, 64) and len(load_text_tokenizer('cm3-0.1m')) == 4096
