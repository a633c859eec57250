"Statistics of tokens: closed forms, planted laws and structure, intervals over images."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from t2ianalysis import statistics as st
from t2ianalysis.analysis import FAILS, HOLDS, UNSURE
from t2ianalysis.data import BadInput

METHODS = ('plug-in', 'miller-madow', 'chao-shen')
flat = lambda K: np.full(K, 1 / K)
planted = lambda *args, K, **more: st.counts_by_image(st.planted_documents(*args, **more), K)


def truth(p): return np.log(len(p)) + (p * np.log(p)).sum()


def tokens_apart(per_image):
    "The same tokens, as if each were an image of its own"
    K = per_image.shape[1]
    return st.sparse.csr_array(np.eye(K)[np.repeat(np.arange(K), per_image.sum(0).astype(int))])


# Closed forms

@pytest.mark.parametrize('K', [2, 16, 1024])
def test_equal_counts_are_uniform(K):
    counts = np.full(K, 1000)
    assert st.entropy(counts) == pytest.approx(np.log(K))
    for f in (st.kl_from_uniform, st.w_squared, st.gini, st.zipf_exponent, st.kl_from_zipf): assert f(counts) == pytest.approx(0, abs=1e-9)
    assert st.used(counts) == 1


@pytest.mark.parametrize('K', [2, 16, 1024])
def test_one_code_takes_all(K):
    counts = np.eye(K, dtype=int)[K // 2] * 50
    for method in METHODS: assert st.entropy(counts, method) == pytest.approx(0, abs=1e-12)
    assert (st.kl_from_uniform(counts), st.used(counts), st.gini(counts), st.w_squared(counts)) == pytest.approx((np.log(K), 1 / K, 1 - 1 / K, K - 1))


def test_two_codes_by_hand():
    assert st.entropy([3, 1]) == pytest.approx(-.75 * np.log(.75) - .25 * np.log(.25))
    assert st.entropy([3, 1], 'miller-madow') == pytest.approx(st.entropy([3, 1]) + 1 / 8)
    c = 1 - 1 / 4                                                              # Chao and Shen, 2003: one of four tokens was seen once
    by_hand = -sum(c * p * np.log(c * p) / (1 - (1 - c * p) ** 4) for p in (.75, .25))
    assert st.entropy([3, 1], 'chao-shen') == pytest.approx(by_hand)
    assert st.gini([3, 1]) == pytest.approx(.25) and st.w_squared([3, 1]) == pytest.approx(.25)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(some.lists(some.integers(0, 50), min_size=2, max_size=12).filter(any))
def test_measures_keep_their_bounds_and_ignore_the_names_of_codes(counts):
    K, turned = len(counts), counts[::-1]
    for f, high in ((st.entropy, np.log(K)), (st.kl_from_uniform, np.log(K)), (st.gini, 1 - 1 / K), (st.w_squared, K - 1), (st.used, 1)):
        assert -1e-9 <= f(counts) <= high + 1e-9 and f(counts) == pytest.approx(f(turned), abs=1e-9)
    assert -1e-9 <= st.kl_from_zipf(counts) <= st.kl_from_uniform(counts) + 1e-3   # uniform is Zipf's law with exponent 0
    np.testing.assert_allclose(st.entropy([counts, turned]), st.entropy(counts))


@pytest.mark.parametrize('p', [flat(1000), st.zipf(1000, 1.)], ids=['uniform', 'zipf'])
def test_corrected_entropies_are_nearer_to_the_truth(p):
    counts = np.random.default_rng(0).multinomial(1000, p, 50)
    plain, miller, chao = (abs(st.entropy(counts, m).mean() - (np.log(1000) - truth(p))) for m in METHODS)
    assert chao < miller < plain and chao < .15


# Intervals over images

@pytest.mark.parametrize('p', [flat(64), st.zipf(64, .5)], ids=['uniform', 'zipf'])
def test_the_interval_over_images_covers_the_truth_and_the_one_over_tokens_does_not(p):
    alike = [planted(200, 16, p, own=2, seed=s, K=64) for s in range(40)]
    over_images = [st.bootstrap(c, st.kl_from_uniform, 200, seed=s) for s, c in enumerate(alike)]
    over_tokens = [st.bootstrap(tokens_apart(c), st.kl_from_uniform, 100, seed=s) for s, c in enumerate(alike[:10])]
    covers = lambda found: np.mean([i.low <= truth(p) <= i.high for i in found])
    assert covers(over_images) >= .85 and covers(over_tokens) <= .3
    assert np.mean([i.mean for i in over_images]) == pytest.approx(truth(p), abs=.02)


def test_the_chi_square_test_over_images_keeps_its_level_and_its_power():
    alike = [st.chi_square(planted(200, 16, flat(64), own=2, seed=s, K=64)) for s in range(60)]
    assert np.mean([t.p < .05 for t in alike]) > .9 and np.mean([t.p_images < .05 for t in alike]) < .2
    assert np.mean([t.design for t in alike]) == pytest.approx(1 + 15 / 2, rel=.1)   # two codes an image: tokens agree half the time
    tilted = np.linspace(.5, 1.5, 64) / 64
    found = st.chi_square(planted(2000, 16, tilted, own=2, K=64))
    assert found.p_images < .001 and found.w == pytest.approx(np.sqrt(64 * np.square(tilted).sum() - 1), rel=.15) and found.v == pytest.approx(found.w / np.sqrt(63))


def test_chi_square_is_scipys():
    c = planted(50, 16, flat(8), K=8)
    assert (st.chi_square(c).chi2, st.chi_square(c).p) == pytest.approx(tuple(st.stats.chisquare(c.sum(0))))


def test_the_same_seed_draws_the_same_images():
    c = planted(50, 16, flat(8), K=8)
    assert st.bootstrap(c, st.gini, 100) == st.bootstrap(c, st.gini, 100) != st.bootstrap(c, st.gini, 100, seed=1)
    one, two = (st.replicates(x, lambda s: s.sum(-1), 100)[1] for x in (c, c * 2))
    np.testing.assert_allclose(two, 2 * one)


# Verdicts say yes and no

@pytest.mark.parametrize('own', [0, 4])
def test_uniform_holds_where_it_is_true_and_not_where_it_is_not(own):
    words = [st.law_verdict('', '', planted(1000, 16, p, own=own, K=64), bootstraps=200).verdict for p in (flat(64), st.zipf(64, .6), np.linspace(.1, 1.9, 64) / 64)]
    assert words == [HOLDS, FAILS, FAILS]


def test_a_slight_tilt_within_the_margin_is_uniform_in_practice_though_chi_square_sees_it():
    c = planted(3000, 64, np.linspace(.8, 1.2, 64) / 64, K=64)
    assert st.law_verdict('', '', c, bootstraps=200).verdict == HOLDS and st.chi_square(c).p_images < .001


@pytest.mark.parametrize('law, p', [('uniform', flat(4096)), ('zipf', st.zipf(4096, 1.))])
def test_a_small_sample_of_a_true_law_is_not_refuted(law, p):
    assert [st.law_verdict('', '', planted(60, 8, p, seed=s, K=4096), law, bootstraps=100).verdict for s in range(4)].count(FAILS) == 0
    assert st.law_verdict('', '', planted(200, 16, flat(4096), K=4096), bootstraps=100).verdict == UNSURE


def test_zipf_holds_for_zipf_and_not_for_another_law():
    uneven = np.r_[np.full(50, .9 / 50), np.full(450, .1 / 450)]
    assert [st.law_verdict('', '', planted(2000, 16, p, K=500), 'zipf', bootstraps=200).verdict for p in (st.zipf(500, 1.), uneven)] == [HOLDS, FAILS]


# Zipf's law

@pytest.mark.parametrize('s', [.5, 1., 1.5])
def test_a_planted_exponent_is_recovered(s):
    c = [planted(400, 32, st.zipf(500, s), seed=seed, K=500) for seed in range(8)]
    found = [st.bootstrap(x, st.zipf_exponent, 200) for x in c]
    assert sum(i.low <= s <= i.high for i in found) >= 6 and all(i.high - i.low < .06 for i in found)
    fits = [st.fit_zipf(x.sum(0), 60) for x in c]
    assert np.mean([f.exponent - f.bias for f in fits]) == pytest.approx(s, abs=.01) and sum(f.p > .05 for f in fits) >= 6


@pytest.mark.parametrize('p', [np.linspace(1.8, .2, 500) / 500, np.exp(-np.arange(500) / 60) / np.exp(-np.arange(500) / 60).sum()], ids=['straight', 'exponential'])
def test_another_law_is_rejected(p): assert st.fit_zipf(np.random.default_rng(0).multinomial(20_000, p), 60).p < .02


def test_the_exponent_is_of_largest_likelihood():
    counts = -np.sort(-np.random.default_rng(3).multinomial(5000, st.zipf(200, .8)))
    grid = np.linspace(.5, 1.2, 701)
    best = grid[np.argmax([(counts * np.log(st.zipf(200, s))).sum() for s in grid])]
    assert st.zipf_exponent(counts) == pytest.approx(best, abs=2e-3)


# Neighbours

def test_left_and_up_are_not_swapped():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 8, (600, 6, 1)) + np.zeros((1, 1, 5), int), rng.integers(0, 8, (600, 1, 5)) + np.zeros((1, 6, 1), int)
    for g, copied, free in ((rows, 'left', 'up'), (columns, 'up', 'left')):
        saved = {side: st.saved(st.neighbour(g.reshape(600, -1), (6, 5), 8, side)).saved.mean() for side in ('left', 'up')}
        assert saved[copied] == pytest.approx(np.log(8), abs=.02) and abs(saved[free]) < .01


def test_neighbours_by_hand():
    g = np.arange(24).reshape(2, 12)
    for side, step, first in (('left', 1, lambda place: place % 4), ('up', 4, lambda place: place // 4)):
        p = st.neighbour(g, (3, 4), 24, side)
        assert (p.here - p.there == step).all() and (first(p.place) > 0).all() and (g[p.image, p.place] == p.here).all() and len(p.here) == {'left': 18, 'up': 16}[side]
    p = st.previous([[5, 6, 7], [], [8], [1, 2]], 9)
    assert list(zip(p.there, p.here, p.image, p.place, strict=True)) == [(5, 6, 0, 1), (6, 7, 0, 2), (1, 2, 3, 1)] and p.images == 4


def test_independent_codes_tell_nothing():
    free = [st.previous(st.planted_documents(200, 16, flat(100), seed=s), 100) for s in range(12)]
    found = [st.mutual_information(p, 40) for p in free]
    assert min(m.plug_in for m in found) > .5                                  # what a naive estimate would call structure
    assert sum(m.low <= 0 <= m.high for m in found) >= 10 and abs(np.mean([m.excess for m in found])) < .01
    gains = [st.bootstrap(st.per_image(st.saved(p)), st.share_saved, 100) for p in free]
    assert max(i.mean for i in gains) < .005 and sum(i.low <= 0 for i in gains) >= 10


def test_a_copied_neighbour_tells_all():
    copies = st.previous(np.repeat(st.planted_documents(3000, 1, st.zipf(16, 1.)), 12, 1), 16)
    h = st.entropy(np.bincount(copies.here))
    m = st.mutual_information(copies, 20)
    assert m.plug_in == pytest.approx(h) and m.excess == pytest.approx(h, abs=.03) and m.p < .05
    assert st.saved(copies).saved.mean() == pytest.approx(h, abs=.01)


def test_what_is_saved_lies_between_nothing_and_the_truth():
    rng, K = np.random.default_rng(0), 8
    codes = rng.integers(0, K, (3000, 16))
    for t in range(1, 16): codes[:, t] = np.where(rng.random(3000) < .6, codes[:, t - 1], codes[:, t])   # a chain that stays with probability .6 + .4 / 8
    stay = .6 + .4 / K
    true = np.log(K) + stay * np.log(stay) + (1 - stay) * np.log(.4 / K)
    assert st.saved(st.previous(codes, K)).saved.mean() == pytest.approx(true, abs=.02)
    assert st.mutual_information(st.previous(codes, K), 10).excess == pytest.approx(true, abs=.02)
    assert 0 < st.saved(st.previous(codes[:10], K)).saved.mean() < true


def test_what_the_place_alone_tells_is_no_structure_beyond_chance():
    codes = np.where(np.arange(16) < 8, 0, 4) + np.random.default_rng(0).integers(0, 4, (300, 16))      # the left half has other codes than the right one
    m = st.mutual_information(st.previous(codes, 8), 40)
    assert m.plug_in > .4 and abs(m.excess) < .01


def test_twins_in_two_folds_are_known_by_heart_unless_they_stay_together():
    twice = st.previous(np.repeat(st.planted_documents(100, 16, flat(100)), 2, 0), 100)
    assert st.saved(twice).saved.mean() > .3 > .02 > st.saved(twice, np.repeat(np.arange(100), 2)).saved.mean()


def test_maps_show_the_place():
    codes = st.planted_documents(2000, 12, flat(8)).reshape(-1, 3, 4)
    codes[:, 1, 2], codes[:, 2, 3] = 5, codes[:, 2, 2]
    codes = codes.reshape(-1, 12)
    h = st.entropy_map(codes, (3, 4), 8)
    assert h.shape == (3, 4) and h[1, 2] == pytest.approx(0) and np.delete(h, 6) == pytest.approx(np.log(8), abs=.01) and h.max() <= np.log(8)
    left, up = (st.saved_map(st.saved(st.neighbour(codes, (3, 4), 8, side)), (3, 4)) for side in ('left', 'up'))
    assert np.isnan(left[:, 0]).all() and np.isnan(up[0]).all() and np.isfinite(left[:, 1:]).all() and np.isfinite(up[1:]).all()
    assert np.unravel_index(np.nanargmax(left), left.shape) == (2, 3) and left[2, 3] > .4


# What cannot be counted

GRID = np.zeros((4, 6), int)

@pytest.mark.parametrize('call, says', [
    (lambda: st.histogram([], 5), 'no token'), (lambda: st.histogram([[], []], 5), 'no token'), (lambda: st.histogram([[.5]], 5), 'float64'),
    (lambda: st.histogram([[5]], 5), 'token 5'), (lambda: st.histogram([[-1]], 5), 'token -1'), (lambda: st.histogram([[0]], 1), 'vocab_size=1'),
    (lambda: st.entropy([0, 0]), 'empty'), (lambda: st.entropy([]), 'empty'), (lambda: st.gini([1, -1]), 'negative'), (lambda: st.entropy([1, 2], 'nsb'), "'nsb'"),
    (lambda: st.as_grids(np.zeros((3, 7), int), (2, 4)), '2 x 4'), (lambda: st.as_grids(np.zeros(8, int), (2, 4)), '2 x 4'), (lambda: st.as_grids(np.zeros((0, 8), int), (2, 4)), '2 x 4'),
    (lambda: st.neighbour(GRID, (2, 4), 5, 'up'), '2 x 4'), (lambda: st.neighbour(GRID, (2, 3), 5, 'right'), "'right'"), (lambda: st.neighbour(GRID, (1, 6), 5, 'up'), 'no neighbour'),
    (lambda: st.entropy_map(GRID, (6, 6), 5), '6 x 6'), (lambda: st.previous([[1], [2]], 5), 'two tokens'), (lambda: st.saved(st.previous(GRID[:3], 5)), '5 folds'),
    (lambda: st.saved(st.previous(GRID, 5), [1, 2]), 'groups'), (lambda: st.saved_map(st.saved(st.previous(np.zeros((9, 6), int), 5)), (1, 3)), '1 x 3'),
    (lambda: st.bootstrap(st.counts_by_image([[1, 2]], 5), st.entropy), 'at least 2'), (lambda: st.chi_square(st.counts_by_image([[1, 2]], 5)), 'at least 2 images'),
    (lambda: st.bootstrap(st.counts_by_image(GRID, 5), st.entropy, 10), 'bootstraps=10'), (lambda: st.law_verdict('', '', st.counts_by_image(GRID, 5), 'normal'), "'normal'")])
def test_bad_input_is_refused_in_a_sentence(call, says):
    with pytest.raises(BadInput, match=says): call()
