"What masking costs and wins against references that score one token at a time; laws of compute on planted ones."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis import scaling
from t2ianalysis.analysis import interval
from t2ianalysis.data import BadInput
from t2ianalysis.masking import Masked, Masking, draw_spans, mask, rng_of
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.pages import Hypertext
from t2ianalysis.scaling import (
    Law,
    digest,
    draw_infills,
    fit_law,
    fit_laws,
    fit_seeds,
    floor_range,
    frontier,
    infill_losses,
    infill_of,
    last_model,
    noise_of_mean,
    over_seeds,
    plain_losses,
    plain_of,
    planted_law,
    points_of,
    predict_last,
    rates,
    squares_left,
    with_compute,
)
from t2ianalysis.sequences import Kind, Vocab
from t2ianalysis.training import load_run, make_config, prepare, train

V = Vocab(text=30, codes=8, masks=16)
X = np.geomspace(1e12, 1e15, 4)


class Docs(list):
    def documents(self, numbers): return [self[i] for i in numbers]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V.size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, initializer_range=.6)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope='module')
def docs():
    "Pages of many lengths, one of a single token, with images and without."
    rng, rows = rng_of('pages of a test'), []
    for n in (1, 2, 3, 7, 20, 20, 33):
        text = rng.integers(0, 30, n - 1)
        image = V.image + rng.integers(0, 8, 4) if n > 3 else []
        rows.append(np.array([V.special('<doc>'), *text[:n // 2], *image, *text[n // 2:]], np.int64))
    return Docs(rows)


def one_by_one(model, ids):
    "For each token but the first: its loss, and that without mask and end tokens, from its prefix alone, in double precision."
    out = []
    for t in range(1, len(ids)):
        with torch.no_grad(): p = model(torch.from_numpy(ids[:t])[None]).logits[0, -1].double().softmax(-1)
        out.append((-p[ids[t]].log().item(), -(p[ids[t]] / p[:V.mask].sum()).log().item()))
    return np.array(out).reshape(-1, 2)


# Losses

@pytest.mark.parametrize('batch', [1, 3, 100])
def test_plain_losses_are_those_of_one_token_at_a_time(model, docs, batch):
    table = plain_losses(model, V, docs, batch=batch).set_index(['document', 'kind'])
    assert 0 not in table.index.get_level_values(0)                             # a single token is predicted by nothing
    for i, ids in enumerate(docs):
        slow, kind = one_by_one(model, ids), V.kinds(torch.from_numpy(ids)).numpy()[1:]
        for k in np.unique(kind):
            got, want = table.loc[i, Kind(k).name.lower()], slow[kind == k]
            np.testing.assert_allclose([got.tokens, got.loss, got.loss - got.ready], [len(want), *want.sum(0)], rtol=1e-4)


def test_a_vocabulary_without_masks_keeps_nothing_ready(docs):
    torch.manual_seed(1)
    plain = Vocab(30, 8)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=plain.size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
    assert (plain_losses(model, plain, docs).ready == 0).all()


@pytest.mark.parametrize('masking', [Masking(), Masking(ends='span')])
def test_a_gap_is_scored_where_it_was_moved_and_where_it_stood(model, docs, masking):
    spans = {1: (1, 2), 3: (1, 11), 4: (5, 6), 6: (20, 37)}                     # of one token, up to the end, of text, images and both
    table = infill_losses(model, V, docs, spans, masking, batch=3).set_index(['document', 'kind'])
    assert set(table.index.get_level_values(0)) == set(spans)
    for i, (start, stop) in spans.items():
        moved = mask(V, docs[i], [(start, stop)], masking)
        at = np.flatnonzero(moved == V.mask)[1] + 1                             # behind the second `<mask:0>`
        assert moved[at:at + stop - start].tolist() == docs[i][start:stop].tolist()
        kind = V.kinds(torch.from_numpy(docs[i])).numpy()[start:stop]
        both, left = one_by_one(model, moved)[at - 1:at - 1 + stop - start], one_by_one(model, docs[i])[start - 1:stop - 1]
        for k in np.unique(kind):
            got = table.loc[i, Kind(k).name.lower()]
            want = [*both[kind == k].sum(0), *left[kind == k].sum(0)]
            np.testing.assert_allclose([got.infilled, got.infilled - got.infilled_ready, got.plain, got.plain - got.plain_ready], want, rtol=1e-4)
            assert (got.tokens, got.length) == ((kind == k).sum(), stop - start)


def test_gaps_are_those_of_training_and_the_same_for_all(docs):
    many = Docs(list(docs) * 60)
    spans = draw_infills(V, many, seed=3)
    assert spans == draw_infills(V, many, seed=3) != draw_infills(V, many, seed=4)
    assert draw_infills(V, Docs(many[:7]), seed=3) == {i: s for i, s in spans.items() if i < 7}  # a document's gap does not hang on the others
    for i, ids in enumerate(many):
        (start, stop), = draw_spans(rng_of('infill', 3, i), V.kinds(torch.from_numpy(ids)).numpy(), 1, Masking())
        assert spans.get(i) == ((max(1, start), stop) if stop > max(1, start) else None)
    assert 0 not in spans and all(1 <= a < b <= len(many[i]) for i, (a, b) in spans.items())


def test_rates_weigh_tokens_not_documents(model, docs):
    table = plain_losses(model, V, docs)
    got = rates(table, []).set_index('kind')
    assert got.loc['total', 'tokens'] == sum(len(d) - 1 for d in docs) == table.tokens.sum()
    np.testing.assert_allclose(got.loc['text', 'loss'], table[table.kind == 'text'].loss.sum() / table[table.kind == 'text'].tokens.sum())
    np.testing.assert_allclose(got.loc['total', 'loss'], np.concatenate([one_by_one(model, d)[:, 0] for d in docs]).mean(), rtol=1e-4)


# Runs

@pytest.fixture
def small(tmp_path):
    "A tiny language model with the bundled text tokenizer, on the shipped pages."
    tokenizer = load_text_tokenizer('bundled')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path/'lm')
    tokenizer.save_pretrained(tmp_path/'lm')
    return lambda layout: make_config('cm3-smoke', lm=str(tmp_path/'lm'), layout=layout, steps=2, eval_every=2, keep=1)


def test_a_left_to_right_run_scores_what_its_record_says_and_a_masked_one_fills_the_same_documents(small, monkeypatch):
    plain, masked = (train(small(layout)) for layout in ('document', 'causally-masked'))
    rows, others = prepare(small('document')).valid, prepare(small('causally-masked')).valid
    assert isinstance(rows, Hypertext) and isinstance(others, Masked) and digest(rows) == digest(others.rows)
    record = load_run(plain).query('split == "validation" and step == 2').set_index('kind').loss
    got = rates(plain_of(plain.name, rows), []).set_index('kind')
    np.testing.assert_allclose(got.loss, record[got.index], atol=1e-4)
    assert last_model(plain.name, rows.vocab)[1].masks == 0 and last_model(masked.name, rows.vocab)[1].masks == 16
    assert (got.ready == 0).all() and (rates(plain_of(masked.name, rows), []).ready > 0).all()
    filled = infill_of(masked.name, rows)
    monkeypatch.setattr(scaling, 'load_lm', None)                               # what is known is not computed again
    again = infill_of(masked.name, rows)
    assert again.equals(filled) and set(filled.kind) >= {'text', 'image'} and plain_of(plain.name, rows).equals(plain_of(plain.name, rows))
    with pytest.raises(TypeError): infill_of(masked.name, rows, seed=1)         # other gaps are another question
    monkeypatch.undo()


def test_a_run_without_masks_fills_no_gap(small):
    run, rows = train(small('document')).name, prepare(small('document')).valid
    with pytest.raises(BadInput, match='no mask tokens'): infill_of(run, rows)
    with pytest.raises(BadInput, match='documents=-1'): plain_of(run, rows, -1)


# The law

@settings(max_examples=60, deadline=None)
@given(at_first=st.floats(.5, 8), b=st.floats(.01, 1), c=st.floats(0, 5), decades=st.floats(1, 6), m=st.integers(3, 12))
def test_an_exact_law_is_found(at_first, b, c, decades, m):
    x = 1e9 * np.geomspace(1, 10 ** decades, m)
    law = Law(at_first * 1e9 ** b, b, c)
    found = fit_law(x, law(x))
    np.testing.assert_allclose(found(x), law(x), atol=2e-4)
    if at_first * (1 - 10 ** (-b * decades)) > .3 and b > .05: np.testing.assert_allclose([found.b, found.c], [b, c], atol=.05)


@settings(max_examples=40, deadline=None)
@given(noise=arrays(float, 5, elements=st.floats(-1, 1)), floor=st.booleans())
def test_no_other_law_fits_better(noise, floor):
    x, y = np.geomspace(1e10, 1e14, 5), np.array([6., 5, 4.4, 4, 3.8]) + noise
    *_, squares = fit_laws(x, y, floor)[0]
    u = x / 1e12
    starts = [(a, b, c) for a in (1, 4) for b in (.02, .2, 1) for c in (0, 2)]
    bounds = ([0, 0, 0], [np.inf, scaling.STEEPEST, np.inf if floor else 1e-12])
    other = min(2 * optimize.least_squares(lambda t: t[0] * u ** -t[1] + t[2] - y, [s[0], s[1], s[2] if floor else 0], bounds=bounds).cost for s in starts)
    assert squares <= other + 1e-5
    law = fit_law(x, y, floor)
    assert min(law) >= 0 and np.square(y - law(x)).sum() == pytest.approx(squares, abs=1e-9) and (floor or law.c == 0)


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.tuples(st.integers(2, 4), st.just(1)), elements=st.floats(-5, 5)))
def test_the_interval_of_a_mean_is_students(losses):
    np.testing.assert_allclose(over_seeds(losses, lambda y: y[:, 0]), interval(losses[:, 0]), atol=1e-9)


@pytest.mark.parametrize('floor', [False, True])
@pytest.mark.parametrize('n, common', [(2, 0.), (3, .02)])
def test_the_interval_covers_the_exponent_and_a_true_law_is_kept(n, common, floor):
    truth = Law(60., .1, 1. if floor else 0.)
    fits = [fit_seeds(X, planted_law(truth, X, n, common=common, draw=i), floor) for i in range(100)]
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], 100, .95)
    for hits in (sum(f.b.low <= .1 <= f.b.high for f in fits), sum(f.holds for f in fits)): assert low <= hits <= max(high, 100)
    if floor: assert sum(f.c.low <= 1 <= f.c.high for f in fits) >= low
    assert stats.kstest([f.p for f in fits], 'uniform').pvalue > 1e-3


def test_what_is_no_power_law_is_refused():
    shapes = [lambda c: 3 - .1 * np.maximum(0, np.log10(c) - 13) ** 2, lambda c: Law(60., .1, 0.)(c) + .2 * (c > 5e13) * (c < 5e14), lambda c: 3. + 0 * c + .1 * (c > 5e14)]
    for shape in shapes: assert np.mean([fit_seeds(X, planted_law(shape, X, draw=i), floor=False).holds for i in range(60)]) < .05
    assert not fit_seeds(X, np.array([[3., 3.1, 3.2, 3.3]]), floor=False).holds  # a loss that rises with compute
    one = fit_seeds(X, planted_law(Law(60., .1, 0.), X, 1))
    assert np.isnan(one.p) and np.isnan([one.b.low, one.b.high]).all()          # one seed says nothing of noise


def test_noise_is_that_of_a_mean_whatever_the_seeds_share():
    got = np.mean([noise_of_mean(planted_law(lambda c: 0 * c, X, 4, noise=.1, common=5., draw=i))[0] for i in range(400)])
    assert got == pytest.approx(.1 ** 2 / 4, rel=.1)


@pytest.mark.parametrize('c, common, least, most', [(0., 0, 0, .1), (0., .02, 0, .1), (1., 0., .95, 1.), (1., .005, .95, 1.)])
def test_a_floor_is_told_where_it_is_and_seldom_where_it_is_not(c, common, least, most):
    found = [floor_range(X, planted_law(Law(60., .1, c), X, draw=i, noise=.004, common=common)) for i in range(40)]
    assert least <= np.mean([f.told for f in found]) <= most
    assert np.mean([f.low <= c <= f.high and f.b_low <= .1 <= f.b_high for f in found]) > .86


def test_what_is_held_is_held():
    y = planted_law(Law(60., .1, 1.), X, noise=.02).mean(0)
    def best(b, c): e = (X / 1e13) ** -b; return np.square(y - c - max(0, (e @ (y - c)) / (e @ e)) * e).sum()
    grid = np.linspace(0, y.max(), 3001)
    for b, got in zip((.02, .1, .4), squares_left(X, y, b=np.array([.02, .1, .4]))): assert got == pytest.approx(min(best(b, c) for c in grid), abs=1e-5)
    for c, got in zip((0., 1., 1.5), squares_left(X, y, c=np.array([0., 1., 1.5]))):
        assert got == pytest.approx(optimize.minimize_scalar(best, bounds=(1e-4, 3), args=(c,), method='bounded', options=dict(xatol=1e-10)).fun, abs=1e-6)
    assert not floor_range(X, y[None]).told                                     # one seed rules nothing out


# Sizes

def test_a_prediction_does_not_see_what_it_predicts_and_its_miss_is_covered():
    truth, losses = Law(60., .1, 0.), planted_law(Law(60., .1, 0.), X)
    other = losses + np.array([0, 0, 0, 1.])
    for floor in (False, True):
        a, b = predict_last(X, losses, floor), predict_last(X, other, floor)
        assert a.predicted == b.predicted and b.miss.mean - a.miss.mean == pytest.approx(1) and a.measured.mean == pytest.approx(losses[:, -1].mean())
    hits = [predict_last(X, planted_law(truth, X, common=.03, draw=i)).miss for i in range(150)]
    assert stats.binom.ppf(1e-4, 150, .95) <= sum(i.low <= 0 <= i.high for i in hits)
    with pytest.raises(BadInput, match='not sorted'): predict_last(X[::-1], losses)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_nothing_undercuts_the_frontier(pairs):
    table = pd.DataFrame(pairs, columns=['compute', 'loss']).astype(float)
    got = set(map(tuple, frontier(table)[['compute', 'loss']].to_numpy()))
    beaten = lambda p, q: q[0] <= p[0] and q[1] <= p[1] and q != p
    assert got == {p for p in set(pairs) if not any(beaten(p, q) for q in pairs)}


def test_compute_is_the_seeds_mean_and_a_missing_run_is_said():
    rows = [dict(run_id=f'{lm}{seed}', lm=lm, seed=seed, split='validation', kind='text', step=step, tokens=step * 10 + seed * 2, loss=5. - step + (lm == 'a')) for lm in 'ab' for seed in (0, 1) for step in (0, 1, 2)]
    frame = with_compute(pd.DataFrame(rows), dict(a=1., b=100.))
    assert points_of(frame, 'text').compute.tolist() == [21, 2100] and points_of(frame, 'text').losses.tolist() == [[4, 3]] * 2
    with pytest.raises(BadInput, match='train what is missing'): points_of(frame[frame.run_id != 'b1'], 'text')
    with pytest.raises(BadInput, match="lm='b'"): with_compute(frame, dict(a=1.))


@pytest.mark.parametrize('x, y, words', [(X[:2], [3., 2.], '2 different amounts'), ([1., 1., 1.], [3., 2., 1.], '1 different'), (X, [3., 2., 1., np.inf], 'finite'), (X - 2e12, [4., 3., 2., 1.], 'above zero')])
def test_points_that_carry_no_law_are_refused(x, y, words):
    with pytest.raises(BadInput, match=words): fit_law(x, y)
