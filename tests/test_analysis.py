"Intervals, verdicts and figures, on runs with planted effects."
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from t2ianalysis import analysis as an
from t2ianalysis import plots
from t2ianalysis.data import BadInput

finite = st.floats(-100, 100, allow_nan=False)
words = lambda **design: [v.verdict for v in an.loss_breakdown_verdicts(an.planted_runs(**design))]


@pytest.fixture(scope='module')
def runs(): return an.planted_runs()


# The verdicts find what was planted

def test_runs_that_agree_with_the_paper_hold(): assert words() == [an.HOLDS] * 7


def test_runs_that_disagree_do_not_hold():
    assert words(text=(1., 2.), image=(.3, .3)) == [an.FAILS] * 5 + [an.HOLDS] * 2


def test_a_text_gap_that_stays_is_neither_smaller_nor_gone():
    verdict = dict(zip(['total', 'start', 'shrinks', 'gone', 'image', 'far', 'far'], words(text=(-2., -2.2)), strict=False))
    assert (verdict['start'], verdict['shrinks'], verdict['gone'], verdict['image']) == (an.HOLDS, an.FAILS, an.FAILS, an.HOLDS)


def test_noise_and_single_seeds_are_too_little_data():
    noisy = words(n_seeds=3, noise=.15)
    assert [noisy[i] for i in (0, 3, 4)] == [an.UNSURE] * 3
    assert set(words(n_seeds=1)) == {an.UNSURE}


def test_text_above_image_is_called_so(runs):
    swapped = runs.assign(kind=runs.kind.replace({'text': 'image', 'image': 'text'}))
    assert [v.verdict for v in an.loss_breakdown_verdicts(swapped)[-2:]] == [an.FAILS] * 2


def test_pairing_finds_what_unpaired_arms_would_hide(runs):
    gap = an.interval(an.paired(runs, 'text', 'first'))
    sides = [runs.query("init == @arm & kind == 'image' & split == 'validation' & step == step.max()").loss.to_numpy() for arm in an.ARMS]
    unpaired = stats.ttest_ind(*sides).confidence_interval()
    paired = an.interval(an.paired(runs, 'image'))
    assert gap.high < 0 and paired.high - paired.low < (unpaired.high - unpaired.low) / 2


def test_swapped_arms_flip_the_sign(runs):
    forth, back = an.advantage(runs, 'text'), an.advantage(runs, 'text', 'random', 'pretrained')
    np.testing.assert_allclose(forth[['effect', 'low', 'high']], -back[['effect', 'high', 'low']])
    flipped = runs.assign(init=runs.init.map({'pretrained': 'random', 'random': 'pretrained'}))
    assert (an.paired(flipped, 'text', 'first') == -an.paired(runs, 'text', 'first')).all()
    assert an.loss_breakdown_verdicts(flipped)[1].verdict == an.FAILS


def test_the_order_of_rows_does_not_matter(runs):
    shuffled = runs.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(an.verdict_table(an.loss_breakdown_verdicts(shuffled)), an.verdict_table(an.loss_breakdown_verdicts(runs)))
    pd.testing.assert_frame_equal(an.smooth(shuffled).sort_index(), an.smooth(runs).sort_index())
    pd.testing.assert_frame_equal(an.curves(shuffled, 'train', ['text'], .9), an.curves(runs, 'train', ['text'], .9))


# Statistics agree with a computation by hand

@pytest.mark.parametrize('beta', [0., .5, .95])
def test_ema_is_the_weighted_mean_of_the_past(beta):
    x = np.random.default_rng(1).normal(size=50)
    brute = [np.average(x[:t + 1], weights=[beta ** (t - i) for i in range(t + 1)]) for t in range(len(x))]
    np.testing.assert_allclose(an.ema(x, beta), brute)


@pytest.mark.parametrize('shift', [0., .02, -.04, .2])
def test_tost_by_hand(shift):
    d, m = np.random.default_rng(2).normal(shift, .03, 6), .05
    error = d.std(ddof=1) / math.sqrt(6)
    by_hand = max(stats.t.sf((d.mean() + m) / error, 5), stats.t.cdf((d.mean() - m) / error, 5))
    assert an.equivalence(d, m).p == pytest.approx(by_hand)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(finite, min_size=2, max_size=8), st.floats(.01, 50), st.sampled_from([.01, .05, .2]))
def test_equivalence_says_what_its_intervals_say(d, margin, alpha):
    verdict, (_, low, high, _) = an.equivalence(d, margin, alpha).verdict, an.interval(d, 1 - alpha)
    narrow = an.interval(d, 1 - 2 * alpha)
    if verdict == an.HOLDS: assert narrow.low >= -margin - 1e-6 and narrow.high <= margin + 1e-6
    if verdict == an.FAILS: assert low >= margin or high <= -margin
    if verdict == an.UNSURE: assert narrow.low <= -margin + 1e-6 or narrow.high >= margin - 1e-6
    assert an.equivalence(np.negative(d), margin, alpha).verdict == verdict


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(finite, min_size=2, max_size=8))
def test_lower_is_the_mirror_of_higher(d):
    mirror = {an.HOLDS: an.FAILS, an.FAILS: an.HOLDS, an.UNSURE: an.UNSURE}
    if len(set(d)) > 1: assert an.lower('', '', np.negative(d)).verdict == mirror[an.lower('', '', d).verdict]


def test_equal_arms_hold_and_nothing_shrinks():
    assert an.no_difference('', '', [0., 0., 0.], .05).verdict == an.HOLDS
    v = an.shrinks('', '', [0., 0.], [0., 0.])
    assert v.verdict == an.FAILS and 'no gap at first' in v.ours


def test_shrinking_tells_the_share_that_remains():
    assert an.shrinks('', '', [-2., -2.2, -1.8], [-.5, .5, -.5]).ours.startswith('25% of the first gap remains')


def test_training_rows_pair_from_step_one(runs): assert an.advantage(runs, 'text', split='train').step.iloc[0] == 1


# Tables that must not be believed

@pytest.mark.parametrize('spoil, says', [
    (lambda r: r[r.run_id != 'random-3'], r"\('random', 3\)"),
    (lambda r: r.assign(preset=r.seed.map(str)), "'preset'"),
    (lambda r: r.assign(lm=r.init), "'lm'"),
    (lambda r: r.assign(lr=r.seed / 100), "'lr'"),
    (lambda r: r[(r.run_id != 'random-3') | (r.step < 150)], 'ends at step 149'),
    (lambda r: pd.concat([r, r[r.seed == 0].assign(run_id='other')]), 'several runs'),
    (lambda r: r.assign(loss=r.loss.where(r.step != 40)), 'loss of nan at step 40'),
    (lambda r: r.assign(loss=r.loss.where(r.step != 40, np.inf)), 'loss of inf'),
    (lambda r: r[:0], 'empty'),
    (lambda r: pd.DataFrame(), 'empty'),
    (lambda r: r.drop(columns='count'), "'count'"),
    (lambda r: r[r.init == 'random'], 'lacks'),
    (lambda r: r[r.kind != 'text'], "'text'"),
    (lambda r: r[r.split == 'train'], 'no validation rows'),
    (lambda r: r[(r.run_id != 'random-3') | (r.step != 0)], 'step 0'),
])
def test_bad_tables_are_refused(runs, spoil, says):
    with pytest.raises(BadInput, match=says): an.loss_breakdown_verdicts(spoil(runs))


def test_runs_shorter_than_planned_are_refused(runs):
    with pytest.raises(BadInput, match='ends at step 200, not 400'): an.check_complete(runs, steps=400)


@pytest.mark.parametrize('call', [
    lambda: an.interval([]), lambda: an.interval([1., np.nan]), lambda: an.ema([]), lambda: an.ema([1., np.inf]), lambda: an.ema([1.], -1),
    lambda: an.equivalence([1., 2.], -1), lambda: an.shrinks('', '', [1., 2.], [1.]), lambda: an.Verdict('', '', '', 0, 0, 0, 1, 0, 'maybe')])
def test_bad_values_are_refused(call):
    with pytest.raises(BadInput): call()


# Figures

FIGURES = {
    'perplexity': lambda r: plots.perplexity_figure(r), 'breakdown': lambda r: plots.breakdown_figure(r), 'gap': lambda r: plots.gap_figure(r),
    'verdicts': lambda r: plots.verdict_figure(an.loss_breakdown_verdicts(r))}


def test_a_figure_redrawn_has_the_same_bytes(runs, tmp_path):
    saved = [{k: p.read_bytes() for k, p in plots.save_figure(plots.gap_figure(runs), an.advantage(runs, 'text'), 'smoke', 'gap', tmp_path / str(i)).items()}
             for i in range(2)]
    assert saved[0] == saved[1] and b'<dc:date>' not in saved[0]['svg']


@pytest.mark.parametrize('name', ['perplexity', 'breakdown', 'verdicts'])
def test_svg_bytes_are_equal(name, runs): assert plots._bytes(FIGURES[name](runs), 'svg') == plots._bytes(FIGURES[name](runs), 'svg')


def test_a_style_named_once_is_the_style_of_each_element():
    style, rare = 'fill: #fff; stroke-width: 0.8', 'fill:none'
    svg = plots._tight_svg('<svg><defs><style type="text/css">*{stroke-linecap: butt}</style></defs>' + f'<path style="{style}" d="M 0 0"/>' * 3 + f'<path style="{rare}"/></svg>')
    assert svg.count('class="s0"') == 3 and '.s0{fill:#fff;stroke-width:0.8}</style>' in svg and f'style="{rare}"' in svg and svg.count('fill:#fff') == 1
    assert plots._tight_svg(svg) == svg


def test_labels_of_an_svg_keep_their_digits():
    figure, ax = plt.subplots()
    ax.plot([0, 0.123456], [0, 1])
    ax.text(0, 0.5, '+0.624 [−0.0021, +1.250]')
    svg = plots._bytes(figure, 'svg').decode()
    plt.close(figure)
    assert '>+0.624 [−0.0021, +1.250]<' in svg and not re.search(r'\d\.\d{3}', re.sub('>[^<]*<', '><', svg)) and '<!--' not in svg and len(svg) < 12_000


@pytest.mark.parametrize('name', FIGURES)
@pytest.mark.parametrize('design', [{'n_seeds': 1}, {'n_seeds': 2, 'noise': .3}], ids=['one seed', 'noise'])
def test_no_label_is_cut_or_overlaps_another(name, design):
    fig = FIGURES[name](an.planted_runs(**design))
    fig.draw_without_rendering()
    texts = [t for ax in fig.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_yticklabels()] if t.get_text() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    for text, box in boxes: assert fig.bbox.x0 - 1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1, text
    labels = [(t.get_text(), t.get_window_extent()) for ax in fig.axes for t in [*ax.texts, ax.title] if t.get_text()]
    for i, (one, box) in enumerate(labels):
        for other, second in labels[i + 1:]: assert not box.padded(-1.5).overlaps(second.padded(-1.5)), (one, other)


def test_drawing_leaves_no_figure_open_and_no_setting_changed(runs):
    import matplotlib as mpl
    before = dict(mpl.rcParams)
    for draw in FIGURES.values(): draw(runs)
    assert not mpl.pyplot.get_fignums() and dict(mpl.rcParams) == before


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_spread_keeps_order_and_distance(places):
    out = plots.spread(places, .1)
    assert (np.diff(np.sort(out)) >= .1 - 1e-9).all() and (np.argsort(out, kind='stable') == np.argsort(places, kind='stable')).all()


@pytest.mark.parametrize('preset, name', [('smoke', '../x'), ('a/b', 'x'), ('', 'x'), ('smoke', '')])
def test_names_that_leave_the_folder_are_refused(preset, name, runs, tmp_path):
    with pytest.raises(BadInput): plots.save_figure(plots.gap_figure(runs), an.advantage(runs, 'text'), preset, name, tmp_path)
