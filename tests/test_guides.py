"The pages that explain: each says what it is, its figures can be heard, its links lead somewhere, and what it lists is all there is."
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

import t2ianalysis

nbs = Path(t2ianalysis.__file__).parent.parent/'nbs'
pages = sorted([nbs/'tutorial.ipynb', *(nbs/'guides').glob('*.ipynb')])
page = pytest.mark.parametrize('path', pages, ids=[p.stem for p in pages])
cells = lambda path, kind: [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]
pictures = lambda cell: [o for o in cell.outputs if any(kind.startswith('image/') for kind in o.get('data', {}))]


@page
def test_it_begins_with_a_title_and_one_line(path):
    lines = [line for line in cells(path, 'markdown')[0].source.splitlines() if line]
    assert re.fullmatch(r'# \S.*', lines[0]) and re.fullmatch(r'> \S.*\.', lines[1])


@page
def test_it_was_executed(path):
    assert [c.source[:60] for c in cells(path, 'code') if re.search(r'^(display|print|Markdown|SVG|show)\(', c.source, re.M) and not c.outputs] == []


@page
def test_a_picture_has_words(path):
    for cell in cells(path, 'code'):
        if pictures(cell): assert len(re.findall(r'^#\| fig-alt: \S.{30,}', cell.source, re.M)) == 1, cell.source[:80]


@page
def test_its_links_lead_to_files_and_headings(path):
    for text, mark in re.findall(r'\]\(([^)\s#]*)(#[^)\s]*)?\)', '\n'.join(c.source for c in cells(path, 'markdown'))):
        if re.match('https?:', text): continue
        target = path.parent/unquote(text) if text else path
        assert target.exists(), f'{path.stem}: {text}'
        if mark:
            heads = re.findall(r'^#+ (.*)', '\n'.join(c.source for c in cells(target, 'markdown')), re.M)
            assert mark[1:] in {re.sub(r'[^\w-]', '', h.lower().replace(' ', '-')).lstrip('0123456789-') for h in heads}, f'{path.stem}: {text}{mark}'


@page
def test_a_batch_script_begins_as_sbatch_asks(path):
    "A conversion to a script and back takes the # away."
    for block in re.findall(r'```sh\n(.*?)```', '\n'.join(c.source for c in cells(path, 'markdown')), re.S):
        assert '#SBATCH' not in block or block.startswith('#!/bin/bash\n')


def test_the_design_page_lists_every_module():
    said = '\n'.join(o.data['text/markdown'] for c in cells(nbs/'guides'/'design.ipynb', 'code') for o in c.outputs if 'text/markdown' in o.get('data', {}))
    modules = {p.stem for p in Path(t2ianalysis.__file__).parent.glob('*.py') if p.stem[0] != '_'}
    assert set(re.findall(r'^\| \[(\w+)\]\(\.\./\w+\.ipynb\) \| [^|]+ \| \d+ \|', said, re.M)) == modules, 'execute nbs/guides/design.ipynb again'
