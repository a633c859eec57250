"The website: made once, its links, pictures and API pages looked at as files, and then read in a browser."
import functools
import importlib
import json
import re
import shutil
import threading
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer

import pytest
import yaml
from fastcore.docments import docments

import t2ianalysis.site as module
from t2ianalysis import _modidx
from t2ianalysis.data import BadInput, home, load_captions

pytest.importorskip('smalldocs', reason="the site needs the extra: pip install -e '.[docs]'")


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site, in a folder named as the path that it is hosted under"
    return module.build_site(tmp_path_factory.mktemp('host')/'t2ianalysis', progress=False)


@pytest.fixture(scope='session')
def pages(site): return {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in sorted(site.rglob('*.html'))}


class Pictures(HTMLParser):
    "The pictures of a page"
    def __init__(self, text): super().__init__(); self.found = []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.found += [dict(attrs)] if tag == 'img' else []


def test_every_link_holds(site):
    assert module.check_links(site) == []


def test_broken_links_are_found(site, tmp_path):
    shutil.copytree(site, tmp_path/'site')
    (tmp_path/'site'/'data.html').unlink()
    index = tmp_path/'site'/'index.html'
    index.write_text(index.read_text(encoding='utf-8').replace('</main>', '<a href="plan.html#nowhere">x</a><script src="https://cdn.example.org/x.js"></script></main>'), encoding='utf-8')
    found = module.check_links(tmp_path/'site')
    assert 'index.html: plan.html#nowhere (no such anchor)' in found and 'index.html: https://cdn.example.org/x.js (another host)' in found
    assert any(line.startswith('findings/loss_breakdown.html: ../data.html') for line in found)


def test_every_notebook_has_its_place_in_the_sidebar():
    listed = re.findall(r'[\w/]+\.(?:ipynb|qmd)', json.dumps(yaml.safe_load((home()/'nbs'/'_quarto.yml').read_text())['website']['sidebar']))
    there = [p.relative_to(home()/'nbs').as_posix() for p in (home()/'nbs').rglob('*') if p.suffix in ('.ipynb', '.qmd') and '.ipynb_checkpoints' not in p.parts]
    assert sorted(listed) == sorted(there)


def test_pictures_are_told_in_words_and_come_with_the_page(pages):
    pictures = [(name, p) for name, text in pages.items() for p in Pictures(text).found]
    assert len(pictures) > 50
    assert [(name, p['src'][:80]) for name, p in pictures if not (p.get('alt') or '').strip()] == []
    assert [(name, p['src'][:80]) for name, p in pictures if re.match('https?:|//', p['src'])] == []


def test_a_finding_shows_what_was_committed(pages):
    cells = json.loads((home()/'nbs'/'findings'/'loss_breakdown.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [o['data'] for c in cells for o in c.get('outputs', []) if 'data' in o]
    figures = [''.join(o['image/png']).strip() for o in outputs if 'image/png' in o]
    assert len(figures) == 4 and all(figure in pages['findings/loss_breakdown.html'] for figure in figures)
    assert 'does not hold' in pages['findings/loss_breakdown.html'] and 'Claim' in pages['findings/loss_breakdown.html']


def test_api_page_has_the_docments(pages):
    rows = re.findall(r'<tr>\s*<td><code>(\w+)</code></td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>', pages['data.html'].partition('id="load_captions"')[2].partition('Source: ')[0], re.S)
    shown = {row[0]: [re.sub('<.*?>', '', part).strip() for part in row[1:]] for row in rows}
    assert shown['px'] == ['int', '64', 'side of an image, pixels; a multiple of 8'] and shown['limit'][:2] == ['int | None', 'None']
    assert set(docments(load_captions)) - {'return'} <= set(shown)
    lines = re.findall(r'blob/main/t2ianalysis/data.py#L(\d+)', pages['data.html'])
    source = (home()/'t2ianalysis'/'data.py').read_text(encoding='utf-8').splitlines()
    assert any(source[int(line) - 1].startswith('def load_captions(') for line in lines) and 'Source: ' in pages['data.html']


def test_every_public_name_has_an_anchor(pages):
    wanted = {page for syms in _modidx.d['syms'].values() for name, (page, _) in syms.items() if name.count('.') == 2 and not name.rpartition('.')[2].startswith('_')}
    assert len(wanted) > 200
    assert [page for page in sorted(wanted) if f'id="{page.partition("#")[2]}"' not in pages[page.partition('#')[0]]] == []


def test_ids_are_unique(pages):
    ids = {name: re.findall(r'\sid="([^"]+)"', text) for name, text in pages.items()}
    assert {name: sorted({i for i in found if found.count(i) > 1}) for name, found in ids.items() if len(set(found)) < len(found)} == {}


def test_formulas_are_mathml(pages):
    assert pages['plan.html'].count('<math ') > 20 and 'katex' not in pages['plan.html'].lower() and '\\underbrace' not in re.sub('<annotation.*?</annotation>', '', pages['plan.html'])


def test_a_page_that_fails_is_named_and_the_earlier_site_stays(site, tmp_path, monkeypatch):
    clone, out = tmp_path/'clone', tmp_path/'out'
    (clone/'nbs').mkdir(parents=True)
    for name in ('settings.ini', 'nbs/_quarto.yml', 'nbs/index.ipynb'): shutil.copy(home()/name, clone/name)
    (out/'site_libs').mkdir(parents=True)
    (out/'index.html').write_text('earlier')
    monkeypatch.setenv('T2I_HOME', str(clone))
    (clone/'nbs'/'broken.ipynb').write_text('{"cells": [')
    with pytest.raises(BadInput, match='broken.ipynb cannot be made a page'): module.build_site(out, progress=False)
    cell = dict(cell_type='markdown', id='a', metadata={}, source=['# Broken\n', '\n', r'$\left($'])
    (clone/'nbs'/'broken.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    with pytest.raises(BadInput, match=r'broken.ipynb cannot be made a page: .*formula \\left\('): module.build_site(out, progress=False)
    assert (out/'index.html').read_text() == 'earlier' and {p.name for p in tmp_path.iterdir()} == {'clone', 'out'}


def test_mistakes_are_one_sentence(tmp_path, t2i, monkeypatch, capsys):
    (tmp_path/'letter.txt').write_text('mine')
    server = module.open_server(tmp_path, 0)
    for arguments, words in ((['--out', str(tmp_path/'letter.txt')], 'is a file'), (['--out', str(tmp_path)], 'is not empty and no site'),
                             (['--serve', '--port', str(server.server_port)], f'port={server.server_port} is in use; give another')):
        assert t2i('docs', *arguments) == 2
        assert words in (said := capsys.readouterr().err) and len(said.strip().splitlines()) == 1
    server.server_close()
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    assert t2i('docs') == 2 and "pip install -e '.[docs]'" in capsys.readouterr().err
    monkeypatch.setattr(module, 'find_spec', importlib.util.find_spec)
    monkeypatch.setenv('T2I_HOME', str(tmp_path))
    assert t2i('docs') == 2 and 'has no nbs/_quarto.yml' in capsys.readouterr().err


# ---- in a browser, from a server under /t2ianalysis/ as it is hosted
@pytest.fixture(scope='module')
def address(site):
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(module._Quiet, directory=str(site.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/t2ianalysis/'
    server.shutdown()


@pytest.fixture
def tab(browser):
    "A function that opens a tab of a width and colour scheme; what goes wrong in it fails the test"
    opened, wrong = [], []
    def new(width=1280, scheme='light'):
        context = browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        page.on('console', lambda m: wrong.append(f'{page.url}: {m.text}') if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
        page.on('requestfailed', lambda r: wrong.append(f'{page.url}: {r.url} {r.failure}') if r.failure != 'net::ERR_ABORTED' else None)  # by the next page
        page.on('response', lambda r: wrong.append(f'{page.url}: {r.url} {r.status}') if r.status >= 400 else None)
        return page
    yield new
    for context in opened: context.close()
    assert wrong == []


WIDE = '''[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre, .sd-table, .cell-output-display, details, math, .table-responsive'))
          .slice(0, 3).map(e => e.outerHTML.slice(0, 80))'''


def test_every_page_renders_on_a_phone(tab, address, pages):
    page = tab(390)
    for name in pages:
        page.goto(address + name)
        assert page.locator('main h1').count() == 1, name
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, (name, page.evaluate(WIDE))


def test_search_finds_a_function_and_opens_it(tab, address):
    page = tab()
    page.goto(address + 'findings/loss_breakdown.html')
    page.fill('#quarto-search input', 'load_captions')
    first = page.locator('.search-result').first
    first.wait_for()
    assert 'load_captions' in first.inner_text()
    first.click()
    page.wait_for_url('**/data.html#load_captions')
    assert page.locator('#load_captions').first.is_visible()


def test_search_works_in_a_folder_without_a_server(tab, site):
    page = tab()
    page.goto((site/'index.html').as_uri())
    page.fill('#quarto-search input', 'breakdown_figure')
    page.locator('.search-result').first.click()
    page.wait_for_url('**/plots.html#breakdown_figure')


def test_figures_are_seen(tab, address):
    page = tab()
    page.goto(address + 'findings/loss_breakdown.html')
    widths = page.locator('main img').evaluate_all('all => all.map(e => [e.naturalWidth, e.getBoundingClientRect().width])')
    assert len(widths) == 4 and min(min(pair) for pair in widths) > 200


def test_dark_and_light(tab, address):
    background = 'getComputedStyle(document.body).backgroundColor'
    page, night = tab(), tab(scheme='dark')
    page.goto(address)
    night.goto(address)
    light, dark = page.evaluate(background), night.evaluate(background)
    assert light == 'rgb(255, 255, 255)' and max(map(int, re.findall(r'\d+', dark))) < 60                     # it follows the system,
    page.click('.quarto-color-scheme-toggle')
    page.wait_for_function(f'{background} === "{dark}"')                                                      # the toggle changes it,
    page.goto(address + 'findings/loss_breakdown.html')
    assert page.evaluate(background) == dark                                                                  # and the next page has it too
    assert page.locator('main img').first.evaluate('e => getComputedStyle(e).backgroundColor') == light       # figures keep white paper
    words = [int(n) for n in re.findall(r'\d+', page.locator('main p').first.evaluate('e => getComputedStyle(e).color'))][:3]
    assert min(words) > 180


def test_the_sidebar_opens_on_a_phone(tab, address):
    page = tab(390)
    page.goto(address)
    link = page.locator('#quarto-sidebar a', has_text='Benchmarks')
    assert link.bounding_box()['x'] < 0
    page.click('.quarto-btn-toggle')
    page.wait_for_timeout(400)
    assert link.bounding_box()['x'] >= 0
    link.click()
    page.wait_for_url('**/benchmarks.html')
