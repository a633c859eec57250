"Causal masking: nothing is lost, nothing is cut, the draws are the formula's, and the loop scores what it should."
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis import masking, training
from t2ianalysis.compute import Scored
from t2ianalysis.data import BadInput
from t2ianalysis.masking import (
    CHOICES,
    MASKINGS,
    MASKS,
    Masked,
    Masking,
    draw_n,
    draw_spans,
    images_of,
    mask,
    places,
    rng_of,
    unmask,
)
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.sequences import Kind, Sequences, Vocab, collate
from t2ianalysis.training import batches_at, evaluate, fresh_accelerator, load_run, make_config, placed, prepare, run_id, token_losses, train

V = Vocab(text=30, codes=8, masks=MASKS)
maskings = st.builds(Masking, *map(st.sampled_from, CHOICES.values()))
documents = st.lists(st.one_of(st.integers(0, 37).map(lambda i: [i]), st.lists(st.integers(37, 44), min_size=1, max_size=9)), min_size=1, max_size=20).map(lambda parts: sum(parts, []))
spans_of = lambda draw, size: np.sort(draw(st.lists(st.integers(0, size), max_size=2 * MASKS).filter(lambda x: len(x) % 2 == 0))).reshape(-1, 2)
kinds_of = lambda ids: V.kinds(torch.as_tensor(np.asarray(ids), dtype=torch.int64)).numpy()


# There and back

@settings(max_examples=400, deadline=None)
@given(ids=documents, data=st.data(), masking=maskings)
def test_unmasking_gives_back_any_document_under_any_spans(ids, data, masking):
    spans = spans_of(data.draw, len(ids))
    masked = mask(V, ids, spans, masking)
    assert unmask(V, masked).tolist() == ids and len(masked) == len(ids) + masking.room(len(spans))
    words = masked.tolist()
    assert [w for w in words if V.mask <= w < V.end] == [*range(V.mask, V.mask + len(spans))] * 2
    assert words.count(V.end) == (0 if not len(spans) else len(spans) if masking.ends == 'span' else 1) and (not len(spans) or words[-1] == V.end)
    assert sorted(w for w in words if w < V.mask) == sorted(ids)


@settings(max_examples=400, deadline=None)
@given(ids=documents, n=st.integers(1, MASKS), seed=st.integers(0, 10**9), masking=maskings)
@example(ids=[1], n=MASKS, seed=0, masking=Masking())
def test_any_draw_is_in_order_apart_and_comes_back(ids, n, seed, masking):
    kind = kinds_of(ids)
    spans = draw_spans(rng_of('test', seed), kind, n, masking)
    flat, images = spans.ravel(), images_of(kind).tolist()
    assert (np.diff([0, *flat, len(ids)]) >= 0).all() and len(spans) <= n
    if masking.images == 'whole': assert len(spans) == min(n, len(images)) and all(s in images for s in spans.tolist())
    elif masking.overlap == 'redrawn': assert len(spans) == n
    else: assert len(spans) >= 1
    if masking.images != 'any': assert not any(a < x < b for x in flat for a, b in images)
    assert unmask(V, mask(V, ids, spans, masking)).tolist() == ids


def test_the_form_of_the_paper_and_of_the_public_code():
    ids, spans, m = [1, 2, 3, 4, 5], [[0, 1], [3, 5]], V.mask
    assert mask(V, ids, spans).tolist() == [m, 2, 3, m + 1, m, 1, m + 1, 4, 5, V.end]
    assert mask(V, ids, spans, MASKINGS['causally-masked-public']).tolist() == [m, 2, 3, m + 1, m, 1, V.end, m + 1, 4, 5, V.end]
    assert mask(V, ids, [[2, 2], [2, 2]]).tolist() == [1, 2, m, m + 1, 3, 4, 5, m, m + 1, V.end]  # gaps with nothing in them: no token is lost
    assert mask(V, ids, []).tolist() == ids == unmask(V, ids).tolist()


# The draws

CELLS = [1, 2, 3, 4]  # n; the last cell is 4 and more
expected = lambda rate: np.diff([0, *(stats.poisson.cdf(k, rate) for k in CELLS[:3]), 1])  # n = 1 takes 0 and 1


def p_of_n(draw, times=40_000, rate=1.0):
    found = np.bincount(np.minimum([draw(i) for i in range(times)], 4), minlength=5)[1:]
    return stats.chisquare(found, expected(rate) * times).pvalue


def test_n_is_the_formula_s():
    drawn = lambda i: draw_n(rng_of('train', 3, i // 200, i % 200))
    assert p_of_n(drawn) > 1e-3
    assert p_of_n(drawn, rate=1.2) < 1e-12 and p_of_n(drawn, rate=.9) < 1e-12      # what the test would see of another rate
    assert p_of_n(lambda i: 1 + rng_of('train', i).poisson(1)) < 1e-12             # or of 1 + Poisson(1)


def test_n_has_a_floor_and_a_ceiling():
    class Rng:
        def __init__(self, k): self.poisson = lambda rate: k
    assert [draw_n(Rng(k)) for k in (0, 1, 2, 16, 17, 900)] == [1, 1, 2, 16, 16, 16]


def test_the_ends_of_one_span_are_uniform():
    "The lower and the upper of two uniforms over the s + 1 places, for both ways to treat spans that meet."
    s, times = 11, 30_000
    low = np.array([2 * (s - k) + 1 for k in range(s + 1)]) / (s + 1)**2            # P(min = k)
    for overlap in CHOICES['overlap']:
        drawn = np.concatenate([draw_spans(rng_of(overlap, i), np.full(s, Kind.TEXT), 1, Masking(overlap=overlap)) for i in range(times)])
        for found, p in ((drawn[:, 0], low), (s - drawn[:, 1], low)):
            assert stats.chisquare(np.bincount(found, minlength=s + 1), p * times).pvalue > 1e-3
        assert stats.chisquare(np.bincount(drawn[:, 0], minlength=s + 1), np.full(s + 1, times / (s + 1))).pvalue < 1e-12
        pairs = np.bincount(drawn @ [s + 1, 1], minlength=(s + 1)**2).reshape(s + 1, s + 1)
        wanted = np.triu(np.full((s + 1, s + 1), 2.), 1) + np.eye(s + 1)            # an empty span is half as likely as another
        assert stats.chisquare(pairs[wanted > 0], wanted[wanted > 0] / (s + 1)**2 * times).pvalue > 1e-3


@pytest.mark.parametrize('n', [2, 3])
def test_several_spans_are_those_of_drawing_until_none_meets_another(n):
    "Against the slow way, in a document so long that no two ends are equal."
    s, times = 100_000, 6_000
    slow, rng = [], np.random.default_rng(5)
    while len(slow) < times:
        tries = np.sort(rng.random((20_000, n, 2)), 2)
        tries = np.take_along_axis(tries, tries[:, :, :1].argsort(1), 1)            # in order of their first end
        slow += [t.ravel() for t in tries[(tries[:, 1:, 0] >= tries[:, :-1, 1]).all(1)]]
    fast = np.array([draw_spans(rng_of('fast', n, i), np.zeros(s, np.int8), n).ravel() / s for i in range(times)])
    for a, b in zip(fast.T, np.array(slow[:times]).T): assert stats.ks_2samp(a, b).pvalue > 1e-3
    longest = lambda x: (x[:, 1::2] - x[:, ::2]).max(1)                             # what the ends do together
    assert stats.ks_2samp(longest(fast), longest(np.array(slow[:times]))).pvalue > 1e-3
    dropped = [s for i in range(times) if len(s := draw_spans(rng_of('dropped', i), np.zeros(1000, np.int8), n, Masking(overlap='dropped'))) == n]
    assert stats.ks_2samp(longest(np.array(dropped).reshape(-1, 2 * n) / 1000), longest(fast), method='asymp').pvalue > 1e-3  # all n kept: none meets
    assert stats.binomtest(len(dropped), times, 1 / math.prod(range(1, 2 * n, 2))).pvalue > 1e-4


def test_a_candidate_is_dropped_where_it_meets_one_before_it():
    assert masking._kept([(2, 4), (0, 2), (3, 5), (3, 3), (2, 2), (0, 9), (4, 4)]) == [(0, 2), (2, 2), (2, 4), (4, 4)]  # touching is not meeting


@settings(max_examples=100, deadline=None)
@given(ids=documents)
def test_every_place_but_those_between_two_codes_of_an_image(ids):
    kind = kinds_of(ids)
    inside = {k for a, b in images_of(kind) for k in range(a + 1, b)}
    assert places(kind).tolist() == [k for k in range(len(ids) + 1) if k not in inside] and len(places(kind, 'any')) == len(ids) + 1
    assert sum(b - a for a, b in images_of(kind)) == (kind == Kind.IMAGE).sum()


def test_whole_images_are_chosen_evenly():
    kind = kinds_of([1, 37, 38, 2, 39, 3, 40, 41, 42, 4])
    for n in (1, 2):
        chosen = np.concatenate([draw_spans(rng_of('whole', i), kind, n, Masking(images='whole')) for i in range(3_000)])
        assert stats.chisquare(np.unique(chosen[:, 0], return_counts=True)[1], [n * 1_000] * 3).pvalue > 1e-3


def test_a_draw_is_a_function_of_its_seeds_and_of_each_of_them():
    one = lambda *seeds: rng_of(*seeds).random(4).tolist()
    seeds = [('train', 0, 0, 0), ('valid', 0, 0, 0), ('train', 1, 0, 0), ('train', 0, 1, 0), ('train', 0, 0, 1), ('train', 2**53, 10**6, 10**9)]
    assert [one(*s) for s in seeds] == [one(*s) for s in seeds] and len({tuple(one(*s)) for s in seeds}) == len(seeds)
    assert rng_of('train', 0, 0, 0).random() == 0.22732953946786005


# Bad input

@pytest.mark.parametrize('call, words', [
    (lambda: mask(Vocab(30, 8, 2), [1, 2, 3], [[0, 1]] * 1 + [[1, 2], [2, 3]]), '3 spans need 3 mask tokens but the vocabulary has 2'),
    (lambda: mask(Vocab(30, 8), [1, 2, 3], [[0, 1]]), '1 spans need 1 mask tokens but the vocabulary has 0'),
    (lambda: mask(V, [1] * 20, [[0, 5]], length=22), 'the document needs 23 tokens with its 1 masks but length=22; shorten it to 19'),
    (lambda: mask(V, [1] * 20, [[0, 5], [6, 7]], Masking('span'), length=25), 'needs 26 tokens .* shorten it to 19'),
    (lambda: mask(V, [], [[0, 0]]), 'the document has no tokens'),
    (lambda: mask(V, [1, 2, 3], [[0, 2], [1, 3]]), 'spans=.* meet or leave the document of 3 tokens; give them in order, with ends from 0 to 3'),
    (lambda: mask(V, [1, 2, 3], [[1, 4]]), 'meet or leave'),
    (lambda: mask(V, [1, V.mask, 3], [[1, 2]]), f'holds token {V.mask}, a mask or end token; mask a document only once'),
    (lambda: unmask(V, [1, V.mask, 2, V.end]), r'the masks \[0\] are not balanced'),
    (lambda: unmask(V, [V.mask + 1, V.mask + 1, 2, V.end]), r'the masks \[1, 1\] are not balanced'),
    (lambda: unmask(V, [V.mask, V.mask + 1, V.mask + 1, V.mask, V.end]), 'not balanced'),
    (lambda: unmask(V, [1, V.mask, V.mask, 2]), r'the end tokens at \[\] do not close the 1 moved spans'),
    (lambda: unmask(V, [1, V.mask, V.mask, 2, V.end, 3]), r'the end tokens at \[4\] do not close'),
    (lambda: unmask(V, [1, 2, V.end]), 'do not close the 0 moved spans'),
    (lambda: Masking(images='hole'), "images='hole' is unknown; give one of any, apart, whole. Did you mean 'whole'"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(BadInput, match=words) as e: call()
    assert '\n' not in str(e.value)


# Data

@pytest.mark.parametrize('layout', MASKINGS)
def test_nothing_is_cut_and_every_document_comes_back(store, text_tokenizer, layout):
    "Captions of 60 to 70 tokens in a length that holds 20 of them: shortened first, then masked."
    m, length = MASKINGS[layout], 22 + 20 + MASKINGS[layout].room()
    rows = Sequences(store, text_tokenizer, 300, length - m.room())
    data = Masked(rows, dataclasses.replace(rows.vocab, masks=MASKS), m)
    assert rows.shortened == data.shortened == 10 == len(data)
    for epoch in range(40):
        for i, ids in enumerate(data.documents(range(10), epochs=epoch)):
            assert unmask(data.vocab, ids).tolist() == rows[i] and len(ids) <= length
            if m.images != 'any': assert len(images_of(data.vocab.kinds(torch.from_numpy(ids)))) == 1
    ids = [data.documents([3], seed=s, epochs=e)[0].tolist() for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert ids[0] == ids[3] == data[3] and data.lengths([3]) == [len(data[3])]
    if m.images != 'whole': assert ids[0] != ids[1] != ids[2] != ids[0]
    assert data.documents([5, 3], np.array([False, True]), epochs=[1, 0])[1].tolist() == ids[0]
    batch = data.batch(range(10))
    n_masks = sum(int(V_ids.count(i)) for V_ids in batch.ids[:, 1:].tolist() for i in range(data.vocab.mask, data.vocab.end))
    assert batch.tokens == sum(map(len, data.documents(range(10)))) - 10 - n_masks == (batch.labels >= 0).sum()
    assert not np.isin(batch.labels, range(data.vocab.mask, data.vocab.end)).any() and (batch.labels == data.vocab.end).sum() >= 10


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A language model of random weights with the bundled text tokenizer, and a place for stores that the module shares."
    folder = tmp_path_factory.mktemp('tiny')
    tokenizer = load_text_tokenizer('bundled')
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder/'lm')
    tokenizer.save_pretrained(folder/'lm')
    return folder


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    (tiny/'stores').mkdir(exist_ok=True)
    (tmp_path/'stores').symlink_to(tiny/'stores')
    monkeypatch.setenv('T2I_WORK', str(tmp_path))


@pytest.fixture
def config(tiny): return make_config('smoke', lm=str(tiny/'lm'), layout='causally-masked', pairs=12, steps=7, batch=4, eval_every=7, eval_pairs=8, checkpoint_every=3)


@pytest.fixture
def model(work, config):
    vocab = prepare(config, progress=False).train.vocab
    return training.widen(training.load_lm(config.lm), vocab).eval()


def test_packed_documents_have_the_losses_of_single_ones(work, config, model):
    data = prepare(config, progress=False).train
    documents = data.documents(range(5))
    with torch.no_grad():
        alone = [token_losses(model, collate(data.vocab, [d]))[0] for d in documents]
        ids, positions = torch.from_numpy(np.concatenate(documents))[None], torch.cat([torch.arange(len(d)) for d in documents])[None]
        logp = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    start = 0
    for d, losses in zip(documents, alone):
        packed = -logp[start:start + len(d) - 1].gather(1, ids[0, start + 1:start + len(d), None])[:, 0]
        scored = data.vocab.kinds(ids[0, start + 1:start + len(d)]) != Kind.MASK
        assert torch.allclose(packed[scored], losses[scored], atol=1e-5) and (losses[~scored] == 0).all()
        start += len(d)


def test_the_loop_s_losses_are_the_plain_ones(work, config, model):
    "Mask tokens are seen and not predicted, in the loop's way without padding as in the plain one."
    batch = prepare(config, progress=False).train.batch(range(6))
    with torch.no_grad():
        plain = token_losses(model, batch)
        scored = Scored(model, config.length)
        total, losses = scored(*placed(batch, config.length))
        short = scored(batch.inputs, batch.labels)[1]                                   # read off the labels, mask tokens would not be seen
    assert scored.unpadded and total == pytest.approx(float(plain.sum()), rel=1e-5)
    assert torch.allclose(losses[:, :plain.shape[1]], plain, atol=1e-5) and not torch.allclose(short, plain, atol=1e-3)


def test_a_run_is_trained_and_goes_on_where_it_was(work, config, monkeypatch):
    material = prepare(config, progress=False)
    whole = train(config, material)
    lines = (whole/'metrics.jsonl').read_text()
    frame = load_run(whole)
    assert set(frame.kind) == {'total', 'text', 'image', 'special', 'end'} and frame.loss.notna().all()
    trained = frame[frame.split == 'train'].pivot(index='step', columns='kind', values='count')
    assert (trained.total == trained.drop(columns='total').sum(axis=1)).all() and (trained.end == config.batch).all()
    assert trained.total.cumsum().tolist() == frame[(frame.split == 'train') & (frame.kind == 'total')].tokens.tolist()
    accelerator, model = fresh_accelerator(config), Scored(training.load_lm(str(training.kept(whole)[7])), config.length)
    valid = evaluate(accelerator, model, material.valid, 4)
    with torch.no_grad(): plain = token_losses(training.load_lm(str(training.kept(whole)[7])).eval(), material.valid.batch(range(8)))
    assert valid['total'] == pytest.approx(float(plain.sum()) / material.valid.batch(range(8)).tokens, abs=1e-4)
    real = training.lr_at
    def stop(config, step):
        if step == 5: raise KeyboardInterrupt
        return real(config, step)
    (whole/'done.json').unlink()
    monkeypatch.setattr(training, 'lr_at', stop)
    with pytest.raises(KeyboardInterrupt): train(config, material)
    monkeypatch.setattr(training, 'lr_at', real)
    assert (train(config, material)/'metrics.jsonl').read_text() == lines


def test_a_step_is_the_same_however_it_is_shared(work, config):
    config = dataclasses.replace(config, prose_share=.4, batch=8)
    material = prepare(config, progress=False)
    rows = lambda parts: sorted(tuple(i for i, k in zip(ids, kind) if k != Kind.PAD) + tuple(k for k in kind if k != Kind.PAD) for b in parts for ids, kind in zip(b.ids.tolist(), b.kind.tolist()))
    for step in range(3):
        count, one = batches_at(config, material, step)
        shared = [batches_at(dataclasses.replace(config, accumulation=2), material, step, process, 2) for process in (0, 1)]
        assert {c for c, _ in shared} == {count} and count == sum(b.tokens for b in one) == sum(b.tokens for _, parts in shared for b in parts)
        assert rows(one) == rows([b for _, parts in shared for b in parts])
    prose = {int(k) for b in one for k in b.kind.unique()}
    assert {Kind.MASK, Kind.END, Kind.TEXT, Kind.IMAGE, Kind.PROSE} <= prose


def test_every_epoch_and_every_seed_has_draws_of_its_own_and_evaluations_have_not(work, config):
    material = prepare(config, progress=False)
    plain = [tuple(material.train.rows[i]) for i in range(12)]
    def seen(config):
        "Document number to its masked forms, one an epoch: three steps of four make an epoch of twelve."
        out = {}
        for step in range(9):
            for b in batches_at(config, material, step)[1]:
                for ids, kind in zip(b.ids, b.kind):
                    ids = ids[kind != Kind.PAD]
                    out.setdefault(plain.index(tuple(unmask(material.train.vocab, ids).tolist())), []).append(tuple(ids.tolist()))
        return out
    one, two = seen(config), seen(dataclasses.replace(config, seed=1))
    assert all(form == tuple(material.train.documents([i], seed=1, epochs=e)[0]) for i, forms in two.items() for e, form in enumerate(forms))
    assert set(one) == set(range(12)) and all(len(forms) == 3 for forms in one.values()) and seen(config) == one
    assert sum(len(set(forms)) for forms in one.values()) >= 34 and sum(len({*one[i], *two[i]}) for i in one) >= 68  # of 36 and 72: two draws are seldom the same
    other = prepare(dataclasses.replace(config, seed=1), progress=False)
    assert torch.equal(material.valid.batch(range(8)).ids, other.valid.batch(range(8)).ids)


# What was there before

def test_other_runs_keep_their_names_and_rows():
    facts = dict(train='a', validation='b', lm='c')
    assert [run_id(make_config(p), facts)[-10:] for p in ('smoke', 'laptop', 'paper')] == ['841621b0be', '6bf184159d', '97b4d20292']
    assert Vocab(4096, 1024).size == 4096 + 7 + 1024 and Vocab(4096, 1024, MASKS).size == Vocab(4096, 1024).size + 17
    assert list(Kind)[:5] == [Kind.PAD, Kind.SPECIAL, Kind.TEXT, Kind.IMAGE, Kind.PROSE] == [0, 1, 2, 3, 4]


def test_a_length_without_room_for_masks(work, config):
    with pytest.raises(BadInput, match="layout='causally-masked' keeps 33 of length=102 for masks: length=69 is too short for an image of 64 codes; give at least 70"):
        prepare(dataclasses.replace(config, length=102), progress=False)
