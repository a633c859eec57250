"Every finding at preset smoke, as a user runs them one after the other, and the page that puts them together."
import json
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from t2ianalysis.data import BadInput
from t2ianalysis.notebooks import find_notebook, notebooks, parameters_of, run_notebook
from t2ianalysis.report import verdicts_of_all, write_report

findings, cm3 = list(notebooks('findings')), list(notebooks('cm3'))
QUICK = dict(objective=dict(documents=8), prompting=dict(images=2, scored=4, draws=4, top=2), entities=dict(generated=1))

def smoke(name):
    "A notebook's parameters for a trial of seconds"
    known = parameters_of(find_notebook(name))
    return dict(preset='smoke' if known['preset'] == 'laptop' else 'cm3-smoke') | (dict(seeds=2) if 'seeds' in known else {}) | QUICK.get(name, {})

text = lambda path: '\n'.join(o.get('text', '') for c in nbformat.read(path, as_version=4).cells for o in c.get('outputs', []) if o.output_type == 'stream')


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('findings')


@pytest.fixture(autouse=True)
def place(work, monkeypatch): monkeypatch.setenv('T2I_WORK', str(work))


@pytest.mark.parametrize('name', findings + cm3)
def test_a_finding_draws_and_judges(name, work):
    out = run_notebook(name, smoke(name), progress=False)
    assert not [o for c in nbformat.read(out, as_version=4).cells for o in c.get('outputs', []) if o.output_type == 'error']
    drawn = work/'figures'/smoke(name)['preset']
    record = json.loads((drawn/f'{name}.json').read_text())
    assert record['figures'] and all((drawn/f'{figure}.{kind}').stat().st_size > 100 for figure in record['figures'] for kind in ('svg', 'png', 'csv'))
    assert all(v['verdict'] in ('holds', 'does not hold', 'too little data') for v in record['verdicts'])


def test_a_second_call_trains_nothing(work):
    "What is trained or sampled is there: the same records, without a run."
    before = {p: p.read_bytes() for p in (work/'figures'/'smoke').glob('*.json')}
    out = run_notebook('frozen_components', smoke('frozen_components'), progress=False)
    assert 'to train' not in text(out) and {p: p.read_bytes() for p in before} == before


def test_the_report_has_every_verdict(work):
    table = verdicts_of_all('smoke')
    assert set(table.finding) >= {'loss_breakdown', 'frozen_components', 'token_alignment', 'forgetting', 'token_histogram'}
    page = Path(write_report('smoke')).read_text()
    assert page.count('data:image/') >= len(findings) and 'src="http' not in page


def test_a_trained_run_draws_from_the_command_line(work, t2i, capsys):
    run = next(p.parent.name for p in sorted((work/'runs').glob('bundled-*/weights')))
    for out, status in (('fish.png', 0), ('nowhere/fish.png', 2)):
        assert t2i('generate', run, 'a red fish', 'a star', '-n', '3', '--top-k', '50', '--px', '32', '--out', work/out) == status
    assert Image.open(work/'fish.png').width > 3 * 32 and 'in a folder that is not there' in capsys.readouterr().err


@pytest.mark.parametrize('name, changes, words', [
    ('frozen_components', dict(seeds=0), 'seeds=0'), ('frozen_components', dict(lm='./nowhere'), "lm='./nowhere' is no folder"),
    ('forgetting', dict(margin=-1), 'margin=-1'), ('generation', dict(top_k=0), 'top_k=0'), ('token_alignment', dict(alignment_batch=10**6), 'larger than'),
])
def test_a_mistake_is_one_sentence(name, changes, words):
    with pytest.raises(BadInput, match=words): run_notebook(name, dict(preset='smoke') | changes, progress=False)
