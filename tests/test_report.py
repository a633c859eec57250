"The report: every verdict, every link, nothing from outside, nothing from another preset."
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from bs4 import BeautifulSoup

from t2ianalysis.analysis import advantage, gone, lower, no_difference, planted_runs, verdict_table
from t2ianalysis.data import BadInput, work_path
from t2ianalysis.plots import gap_figure, save_figure, verdict_figure
from t2ianalysis.report import latex_cell, latex_table, load_findings, record, verdicts_of_all, write_latex, write_report
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
    write_run('planted-0', init='random', lr=5e-4, data='x' * 90); write_run('planted-1')
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
    assert 'init=random' in text['run-planted-0'] and 'lr=0.0005' in text['run-planted-0'] and 'total 3.125' in text['run-planted-0'] and ' 99 ' in text['run-planted-0']
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
    work_path('figures', 'smoke', 'other_gap.svg').unlink()
    with pytest.raises(BadInput, match='other_gap.svg is missing'): write_report('smoke')
    recorded.write_text('{"finding": "loss_breakdown"')
    with pytest.raises(BadInput, match='loss_breakdown.json of smoke cannot be read'): load_findings('smoke')


# In a browser

@pytest.mark.parametrize('look', [dict(), dict(color_scheme='dark'), dict(viewport=dict(width=390, height=844), is_mobile=True)], ids=['light', 'dark', 'phone'])
def test_the_page_is_whole_in_a_browser(look, recorded, browser):
    path, context = write_report('smoke'), browser.new_context(**look)
    page, said, asked = context.new_page(), [], []
    page.on('console', lambda message: said.append(message.text)); page.on('pageerror', lambda error: said.append(str(error)))
    page.on('request', lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert said == [] and [url for url in asked if not url.startswith('data:')] == [path.as_uri()]
    assert page.evaluate('[...document.images].filter(i => !i.naturalWidth || !i.alt).length') == 0
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth') and page.evaluate('innerWidth') == look.get('viewport', dict(width=1280))['width']
    assert page.evaluate("[...document.querySelectorAll('td, li, p')].filter(e => e.scrollWidth > e.clientWidth + 1).length") == 0  # no word leaves its cell
    light = sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3])) / 3
    assert light < 60 if 'color_scheme' in look else light > 200
    page.emulate_media(media='print', color_scheme='dark')
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == 'rgb(255, 255, 255)' and not page.locator('nav').is_visible()
    context.close()


# LaTeX

@pytest.mark.parametrize('text, latex', [
    ('50% & more_or less', r'50\% \& more\_\allowbreak{}or less'), ('"a" and "b"', "``a'' and ``b''"), ('from -0.5 to +1, 3-4, x-1', 'from $-$0.5 to +1, 3-4, x-1'), ('a < b > c ± 1', r'a $<$ b $>$ c $\pm$ 1'),
    (r'\input{/etc/passwd} $x^2$ ~#', r'\textbackslash{}input\{/etc/passwd\} \$x\textasciicircum{}2\$ \textasciitilde{}\#'), ('[0.1] x', '{}[0.1] x'), ('日本 é\n\n\x00', '?? é ?')])
def test_what_latex_would_read_as_a_command_is_escaped(text, latex): assert latex_cell(text) == latex


def test_the_latex_table_has_every_verdict_and_compiles(recorded, verdicts, tmp_path):
    record('other', 'smoke', 'Hostile', {}, [dataclasses.replace(verdicts[0], claim=r'100% \end{longtable} & #1 $ ~ ^ _ { } < "', paper='[x] ± 1 ≤ 2 → ∞')], [])
    table = write_latex('smoke').read_text(encoding='utf-8')
    body = table.split(r'\endlastfoot')[1].split(r'\bottomrule')[0].split(r'\end{longtable}')[0]
    rows = [re.split(r'(?<!\\) & ', line) for line in body.strip().splitlines()]
    assert [len(row) for row in rows] == [5] * 4 and [row[0] for row in rows] == [r'loss\_\allowbreak{}breakdown', '', '', 'other']
    assert [row[4].removesuffix(r' \\') for row in rows] == [v.verdict for v in (*verdicts, verdicts[0])]
    for rule in (r'\toprule', r'\midrule', r'\bottomrule', r'\label{tab:verdicts-smoke}'): assert rule in table
    if not shutil.which('pdflatex') or subprocess.run(['kpsewhich', 'booktabs.sty'], capture_output=True).returncode: return
    (tmp_path/'t.tex').write_text(rf'\documentclass{{article}}\usepackage{{array,booktabs,longtable}}\begin{{document}}\input{{{work_path("figures", "smoke", "verdicts.tex")}}}\end{{document}}')
    done = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', '-no-shell-escape', 't.tex'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path/'t.pdf').stat().st_size > 5000, done.stdout[-2000:]


@pytest.mark.parametrize('preset', ['laptop', 'cm3-laptop'])
def test_the_committed_table_is_that_of_the_committed_records(preset, monkeypatch):
    monkeypatch.delenv('T2I_WORK')
    assert work_path('figures', preset, 'verdicts.tex').read_text(encoding='utf-8') == latex_table(preset)
