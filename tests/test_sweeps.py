"Sweeps: all is checked before the first run, what is done is skipped, what fails does not stop the rest. And the table of published FIDs."
import hashlib
import json
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from t2ianalysis import sweeps
from t2ianalysis.data import BadInput, data_path, work_path
from t2ianalysis.sweeps import configs_of, expand, sweep
from t2ianalysis.training import run_id


@pytest.fixture
def ran(monkeypatch):
    "The settings that were run; nothing is executed, and a learning rate of 13 fails."
    seen = []
    def run_notebook(name, parameters, out, progress):
        seen.append(parameters)
        if parameters.get('lr') == 13: raise BadInput('the loss is not a number')
        for c in configs_of(parameters): write_record(c)
    monkeypatch.setattr(sweeps, 'run_notebook', run_notebook)
    monkeypatch.setattr(sweeps, 'prepare', lambda config, progress: SimpleNamespace(fingerprint={'train': 'planted'}))
    return seen


def write_record(config):
    "A finished record whose loss is its learning rate."
    folder = work_path('runs', run_id(config, {'train': 'planted'}))
    folder.mkdir(parents=True, exist_ok=True)
    metrics = ''.join(json.dumps(dict(step=s, split='validation', tokens=s, total=loss, n_total=1)) + '\n' for s, loss in ((0, 99.), (6, config.lr)))
    (folder/'metrics.jsonl').write_text(metrics)
    (folder/'config.json').write_text(json.dumps(dict(config=dict(preset=config.preset, init=config.init, seed=config.seed))))
    (folder/'done.json').write_text(json.dumps(dict(metrics_sha256=hashlib.sha256(metrics.encode()).hexdigest())))
    return folder


def test_every_combination_once():
    assert expand([dict(lr=[1, 2], batch=4), dict(lr=2, batch=[4, 8])]) == [dict(lr=1, batch=4), dict(lr=2, batch=4), dict(lr=2, batch=8)]
    for wrong in ({'lr': []}, []):
        with pytest.raises(BadInput, match='lr'): expand(wrong)


@pytest.mark.parametrize('grid, words', [(dict(lr=[1e-3, 0.]), 'lr=0.0 must be above zero'), (dict(lr=[1e-3], stepz=[3]), "Did you mean 'steps'"), (dict(batch=[4, 'x']), "batch='x' is of type str"),
                                         (dict(init=['pretrained', 'randon']), "init='randon' is unknown")])
def test_a_wrong_setting_stops_the_sweep_before_the_first_run(ran, grid, words):
    with pytest.raises(BadInput, match=words): sweep('train', grid, dict(preset='smoke'), progress=False)
    assert ran == []


def test_what_has_a_record_is_not_run_and_both_arms_share_one_notebook(ran):
    fixed = dict(preset='smoke', init=['pretrained', 'random'], seed=[0, 1])
    for c in configs_of(fixed | dict(lr=5e-4)): write_record(c)
    table = sweep('train', dict(lr=[5e-4, 1e-3]), fixed, progress=False)
    assert [p['lr'] for p in ran] == [1e-3] and ran[0]['seed'] == [0, 1]
    assert list(table.state) == ['there'] * 4 + ['done'] * 4 and list(table.total) == list(table.lr)  # the last loss, not the first
    assert list(table.init[:4]) == ['pretrained', 'pretrained', 'random', 'random'] and list(table.seed[:4]) == [0, 1, 0, 1]
    assert all(r.run_id.startswith(f'bundled-{r.init}-s{r.seed}-') for r in table.itertuples()) and table.run_id.is_unique
    assert set(sweep('train', dict(lr=[5e-4, 1e-3]), fixed, progress=False).state) == {'there'} and len(ran) == 1


def test_an_unfinished_record_is_run_again(ran):
    config, = configs_of(dict(preset='smoke'))
    (write_record(config)/'done.json').unlink()
    assert list(sweep('train', dict(preset='smoke'), progress=False).state) == ['done'] and len(ran) == 1


def test_a_failure_does_not_stop_the_others(ran, capsys):
    table = sweep('train', dict(lr=[13, 1e-3]), dict(preset='smoke'), progress=False)
    assert table.state[0] == 'failed: the loss is not a number' and pd.isna(table.total[0]) and table.state[1] == 'done'
    assert len(ran) == 2 and 'the loss is not a number' in capsys.readouterr().out


def test_a_notebook_that_fails_is_kept(tmp_path):
    cells = [nbformat.v4.new_code_cell('n = 1', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('6 / (n - 1)')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'divide.ipynb')
    table = sweep(str(tmp_path/'divide.ipynb'), dict(n=1), progress=False)
    kept, = work_path('runs', 'laptop', 'sweeps').glob('divide-*.failed.ipynb')
    assert 'ZeroDivisionError' in table.state[0] and 'ZeroDivisionError' in kept.read_text()


def test_every_published_fid_has_a_source():
    table = pd.read_csv(data_path('context_fid.csv'), dtype=str, keep_default_na=False)
    for column in ('system', 'paper', 'fid_read_in', 'encoder_read_in', 'text_encoder'): assert table[column].str.strip().ne('').all(), column
    assert table.system.is_unique and table.url.str.match(r'https://arxiv\.org/abs/\d{4}\.\d{5}$').all() and table.arxiv.str.match(r'\d{4}\.\d{5}$').all()
    assert table.date.str.match(r'20\d\d-(0[1-9]|1[0-2])$').all() and table.fid.astype(float).between(1, 100).all()
    assert set(table.kind) == {'autoregressive', 'diffusion', 'masked'} and set(table.pretrained_text_encoder) == set(table.retrieval) == {'yes', 'no'}
    arms = table[table.system.str.startswith('this paper')].set_index('pretrained_text_encoder').fid
    assert (arms['yes'], arms['no']) == ('12.21', '12.27')
    left = pd.read_csv(data_path('context_left_out.csv'))
    assert not set(left.system) & set(table.system) and left.why.str.len().gt(10).all()
