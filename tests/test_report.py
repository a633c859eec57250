"The report: every verdict, every link, nothing from outside, nothing from another preset."
import dataclasses
import json
import shutil

import numpy as np
import pytest
from bs4 import BeautifulSoup

from t2ianalysis.analysis import advantage, gone, lower, no_difference, planted_runs, verdict_table
from t2ianalysis.data import BadInput, work_path
from t2ianalysis.plots import gap_figure, save_figure, verdict_figure
from t2ianalysis.report import load_findings, record, verdicts_of_all, write_report
from t2ianalysis.training import PRESETS

HOSTILE = '</figcaption><script src="http://evil.example/x.js"></script><img src=x onerror=alert(1)> & "quoted"'


def write_run(name, preset='smoke', **changes):
    "A finished run's record, without weights."
    folder = work_path('runs', name)
    folder.mkdir(parents=True)
    (folder/'config.json').write_text(json.dumps(dict(config=dataclasses.asdict(dataclasses.replace(PRESETS[preset], **changes)))))
    (folder/'metrics.jsonl').write_text(json.dumps(dict(step=6, split='validation', tokens=99, total=3.125, n_total=9)) + '\n')
    (folder/'environment.json').write_text(json.dumps(dict(t2ianalysis='0.1.0', commit='abcdef0')))
    (folder/'done.json').write_text(json.dumps(dict(tokens=99)))


@pytest.fixture(scope='module')
def verdicts():
    "Three claims; one has no end to its region, one has a single seed and so no interval."
    return [lower('A < B', '"lower"', [-.3, -.2, -.25]), no_difference('C = D & <b>E</b>', '12.21 against 12.27', [.01], .05), gone('F goes', '"soon disappears"', [-2., -2.1], [.9, 1.], .05)]


@pytest.fixture(scope='module')
def drawn(verdicts, tmp_path_factory):
    "Two saved figures."
    runs, folder = planted_runs(), tmp_path_factory.mktemp('figures')
    save_figure(gap_figure(runs, kinds=('text',)), advantage(runs, 'text'), 'smoke', 'other_gap', folder)
    save_figure(verdict_figure(verdicts), verdict_table(verdicts), 'smoke', 'loss_breakdown_verdict', folder)
    return folder


@pytest.fixture
def recorded(verdicts, drawn):
    "Two findings at preset smoke, recorded in the wrong order, from three runs of which one is not there."
    shutil.copytree(drawn, work_path('figures'))
    write_run('planted-0', init='random', lr=5e-4); write_run('planted-1')
    record('other', 'smoke', 'Another finding', {'other_gap': HOSTILE}, verdicts[:1], ['planted-1', 'planted-9'])
    return record('loss_breakdown', 'smoke', 'The first <finding>', {'loss_breakdown_verdict': 'Claims with their intervals.'}, verdicts, np.array(['planted-0', 'planted-1', 'planted-0']))


@pytest.fixture
def page(recorded): return BeautifulSoup(write_report('smoke').read_text(encoding='utf-8'), 'html.parser')


def test_a_record_gives_back_what_went_in(recorded, verdicts):
    first, second = load_findings('smoke')
    assert (first.finding, second.finding) == ('loss_breakdown', 'other')  # the paper's order, not the alphabet's or the clock's
    for a, b in zip(first.verdicts, verdicts, strict=True): np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))
    assert first.verdicts[0].region == (-np.inf, 0.) and np.isnan(first.verdicts[1].low)
    assert first.runs == ['planted-0', 'planted-1'] and 'NaN' not in recorded.read_text() and 'Infinity' not in recorded.read_text()
    assert verdicts_of_all('smoke').shape == (4, 6) and list(verdicts_of_all('smoke').runs.iloc[3]) == ['planted-1', 'planted-9']


def test_drawing_again_changes_no_byte_and_a_new_result_does(recorded, verdicts):
    args = ('loss_breakdown', 'smoke', 'The first <finding>', {'loss_breakdown_verdict': 'Claims with their intervals.'})
    marked = json.loads(recorded.read_text()) | dict(date='2001-01-01')
    recorded.write_text(json.dumps(marked))
    record(*args, verdicts, ['planted-0', 'planted-1'])
    assert json.loads(recorded.read_text()) == marked
    record(*args, verdicts[::-1], ['planted-0', 'planted-1'])
    assert json.loads(recorded.read_text())['date'] > '2020'


def test_the_page_has_every_verdict_and_number(page, verdicts):
    rows = page.find(id='verdicts').tbody.find_all('tr')
    cells = [[c.get_text(' ', strip=True) for c in row.find_all('td')] for row in rows]
    assert [c[0] for c in cells] == [v.claim for v in (*verdicts, verdicts[0])]
    for c, v in zip(cells, (*verdicts, verdicts[0]), strict=True): assert c[1] == v.paper and c[2].startswith(v.ours) and c[3][2:] == v.verdict
    assert [c[4] for c in cells] == ['loss_breakdown'] * 3 + ['other']
    assert {c[3][0] for c in cells} == {'✓', '✗', '?'}  # not colour alone
    assert 'Of 4 claims 2 hold, 1 do not hold, 1 have too little data' in ' '.join(page.header.get_text().split())


def test_every_link_leads_somewhere_and_every_verdict_to_its_runs(page):
    ids = [tag['id'] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert [a['href'] for a in page.find_all('a') if a['href'][1:] not in ids] == []
    for row in page.find(id='verdicts').tbody.find_all('tr'):
        named = page.find(id=row.find('a', class_='runs')['href'][1:])
        assert all(page.find(id=a['href'][1:]).name == 'tr' for a in named.find_all('a'))
    text = {row['id']: row.get_text(' ', strip=True) for row in page.find(id='runs').find_all('tr', id=True)}
    assert list(text) == ['run-planted-0', 'run-planted-1', 'run-planted-9']
    assert 'init=random, lr=0.0005' in text['run-planted-0'] and 'total 3.125' in text['run-planted-0'] and ' 99 ' in text['run-planted-0']
    assert 'nothing' in text['run-planted-1'] and 'not on this machine' in text['run-planted-9']


def test_the_page_fetches_nothing_and_escapes_what_it_shows(page):
    assert page.find_all(['script', 'link', 'iframe', 'object', 'b']) == []
    assert all(tag['src'].startswith('data:image/') for tag in page.find_all(src=True)) and 'url(' not in page.style.text and '@import' not in page.style.text
    assert all(href.startswith('#') for href in (a['href'] for a in page.find_all(href=True)))
    assert page.find('meta', {'http-equiv': 'Content-Security-Policy'})['content'].startswith("default-src 'none'")
    assert [image['alt'] for image in page.find_all('img')][1] == HOSTILE and not page.find(onerror=True)


def test_the_same_records_give_the_same_bytes(recorded):
    once = write_report('smoke').read_bytes()
    assert write_report('smoke').read_bytes() == once and len(once) < 300_000


def test_presets_do_not_mix(recorded, verdicts):
    write_run('planted-laptop', 'laptop')
    with pytest.raises(BadInput, match="'planted-laptop' is of preset 'laptop'"): record('mixed', 'smoke', 'x', {}, verdicts, ['planted-0', 'planted-laptop'])
    assert not recorded.with_name('mixed.json').exists()
    moved = work_path('figures', 'laptop', 'loss_breakdown.json')
    moved.parent.mkdir(parents=True)
    moved.write_bytes(recorded.read_bytes())
    for call in (load_findings, verdicts_of_all, write_report):
        with pytest.raises(BadInput, match="loss_breakdown.json is of preset 'smoke'"): call('laptop')


def test_what_is_missing_is_named(recorded, verdicts):
    for args, words in ((('x', 'smok', 't', {}), "Did you mean 'smoke'"), (('../x', 'smoke', 't', {}), 'no plain name'), (('x', 'smoke', 't', {'never_drawn': 'A figure.'}), 'never_drawn.svg is missing'),
                        (('x', 'smoke', 't', {'other_gap': ''}), 'no caption')):
        with pytest.raises(BadInput, match=words): record(*args, verdicts, [])
    with pytest.raises(BadInput, match='t2i finding context --preset smoke'): load_findings('smoke', ['context'])
    with pytest.raises(BadInput, match='no finding has a record at preset gpu'): write_report('gpu')
    work_path('figures', 'smoke', 'other_gap.png').unlink()
    with pytest.raises(BadInput, match='other_gap.png is missing'): write_report('smoke')
    recorded.write_text('{"finding": "loss_breakdown"')
    with pytest.raises(BadInput, match='loss_breakdown.json of smoke cannot be read'): load_findings('smoke')
