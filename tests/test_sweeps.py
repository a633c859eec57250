"Sweeps: all is checked before the first run, what is done is skipped, what fails does not stop the rest. And the table of published FIDs."
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest

from t2ianalysis import jobs, sweeps
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


@pytest.mark.parametrize('text, words', [
    ('grid: {lr: [1e-3', 'cannot be read as YAML'), ('', 'is empty'), ('- lr: 1', 'holds no named parts'), ('fixed: {preset: smoke}', 'grid of sweep file'), ('grid: 5', 'holds no parameters'),
    ('grid: {lr: []}', 'lr=[] has no value'), ('grids: {lr: 1}', "Did you mean 'grid'?"), ('lr: [1e-3]', "'lr' at its top"), ('fixed: 3\ngrid: {lr: 1}', 'fixed of sweep file'), ('grid: {1: 2}', 'for a name'),
    ('grid: {lr: {from: 1, to: 2}}', 'of type dict'), ('grid: {data: 2024-01-01}', 'of type date'), ('fixed: {lr: 1}\ngrid: {lr: [1, 2]}', 'both in fixed and in grid'),
    ('grid: {stepz: [3, 4]}', "Did you mean 'steps'?"), ('grid: {steps: [3, many]}', "steps='many' is of type str"), ('grid: {preset: [smoke, labtop]}', "Did you mean 'laptop'?"),
    ('grid: {lr: [1e-3, -1e-3]}', 'lr=-0.001 must be above zero'), (f'grid: {{lr: {[1e-3] * 100}, seed: {list(range(1000))}}}', '100,000 settings, more than 1,000; add --yes'),
    (f'grid: {{lr: {[1e-3] * 1000}, seed: {list(range(1000))}, batch: [4, 8]}}', '2,000,000 settings, more than the 1,000,000'), (None, 'is not there'),
])
def test_a_wrong_sweep_is_one_sentence_and_status_2(ran, text, words, tmp_path, t2i, capsys):
    file = tmp_path/'sweep.yaml'
    if text is not None: file.write_text(text)
    assert t2i('sweep', 'train', str(file)) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('t2i: ') and err.count('\n') == 1 and not work_path('runs').exists()


@pytest.mark.parametrize('arguments, words', [
    (['loss_breakdown'], "parameter lr=... is unknown"), (['los_breakdown'], "Did you mean 'loss_breakdown'?"), (['train', '-j', '0'], '-j 0 must be 1 or more'), (['train', '--cancel'], 'give --slurm'),
    (['train', '-s', 'time=3'], 'give --slurm'), (['train', '--slurm', '-s', 'time'], "-s 'time' is not of the form"), (['train', '--slurm'], 'there is no sbatch'),
])
def test_a_wrong_option_is_one_sentence_and_status_2(ran, arguments, words, tmp_path, t2i, monkeypatch, capsys):
    (tmp_path/'sweep.yaml').write_text('fixed: {preset: smoke}\ngrid: {lr: [1e-3, 2e-3]}' if arguments[0] == 'train' else 'grid: {seedz: [1, 2]}')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert t2i('sweep', arguments[0], str(tmp_path/'sweep.yaml'), *arguments[1:]) == 2
    err = capsys.readouterr().err
    assert words.replace('lr=...', 'seedz=[1, 2]') in err and err.count('\n') == 1


def test_many_settings_are_counted_and_asked_for(monkeypatch):
    monkeypatch.setattr(jobs, 'expand', None)                                   # not made to be counted
    assert jobs.count_settings([dict(lr=[1e-3] * 100, seed=list(range(1000))), dict(lr=1)]) == 100_001
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    for answer, refused in (('y', False), ('', True)):
        monkeypatch.setattr('builtins.input', lambda question, answer=answer: answer)
        if refused:
            with pytest.raises(BadInput, match='nothing was started'): jobs._ask(100_000, False)
        else: jobs._ask(100_000, False)
    jobs._ask(100_000, True)


def test_settings_of_one_run_are_one_setting_and_what_is_there_is_known(ran, tmp_path, t2i, capsys):
    write_record(*configs_of(dict(preset='smoke', lr=2e-3)))
    (tmp_path/'s.yaml').write_text('fixed: {preset: smoke}\ngrid: [{lr: [1e-3, 2e-3]}, {lr: 2e-3, init: pretrained}]')
    assert t2i('sweep', 'train', str(tmp_path/'s.yaml'), '--dry-run') == 0
    assert capsys.readouterr().out.splitlines() == ['1/2 lr=0.001: to run', '2/2 lr=0.002: there', '2 settings: 1 there, 1 waiting']
    assert t2i('sweep', 'train', str(tmp_path/'s.yaml'), '--dry-run', '--json') == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer['counts'] == dict(there=1, waiting=1) and [s['parameters']['lr'] for s in answer['settings']] == [1e-3, 2e-3] and ran == []


def test_a_finding_is_there_when_its_notebook_was_executed(tmp_path):
    cells = [nbformat.v4.new_code_cell('n = 1', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('n + 1')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'plus.ipynb')
    first, = jobs.plan_sweep(str(tmp_path/'plus.ipynb'), [dict(n=[2])])
    first.out.parent.mkdir(parents=True); first.out.write_text('{}')
    assert [s.state for s in jobs.plan_sweep(str(tmp_path/'plus.ipynb'), [dict(n=[2, 3])])] == ['there', 'waiting']
    with pytest.raises(BadInput, match="n='two' is of type str; give a value of type int"): jobs.plan_sweep(str(tmp_path/'plus.ipynb'), [dict(n='two')])
    cells[1].source, later = 'n + 2', time.time() + 9
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'plus.ipynb'); os.utime(tmp_path/'plus.ipynb', (later, later))
    assert [s.state for s in jobs.plan_sweep(str(tmp_path/'plus.ipynb'), [dict(n=[2])])] == ['waiting']


def test_progress_is_read_from_the_records(ran):
    s, = jobs.plan_sweep('train', [dict(preset='smoke', init='random', seed=0)], dict(steps=10))
    folder, = s.folders
    assert jobs.progress_of(s) == dict(step=0, steps=10)
    folder.mkdir(parents=True)
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(step=i, split='train', total=9. - i)) + '\n' for i in (1, 2, 3)) + '{"step": 4, "spl')
    (folder/'timing.jsonl').write_text(''.join(json.dumps(dict(step=i, seconds=x)) + '\n' for i, x in ((1, 50.), (2, 2.), (3, 2.))))
    assert jobs.progress_of(s) == dict(step=3, steps=10, loss=6., left=14)


@contextlib.contextmanager
def at(work):
    "Results go to `work`; what is printed is caught."
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        m.setenv('T2I_WORK', str(work))
        yield out, err


@pytest.fixture(scope='module')
def divided(tmp_path_factory):
    "A small notebook on two workers; one of three settings fails."
    work = tmp_path_factory.mktemp('divided')
    cells = [nbformat.v4.new_code_cell('n = 1', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('print("sixth <b>", 6 / (n - 1))')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), work/'divide.ipynb')
    (work/'s.yaml').write_text('grid: {n: [1, 2]}')
    with at(work) as (out, err): status = jobs.sweep_command(str(work/'divide.ipynb'), str(work/'s.yaml'), 2, False, {}, False, False, False, True)
    return SimpleNamespace(work=work, folder=work/'runs'/'laptop'/'sweeps'/'divide-s', status=status, answer=json.loads(out.getvalue()), said=err.getvalue())


def test_a_failure_is_kept_and_does_not_stop_the_others(divided):
    assert divided.status == 1 and divided.answer['counts'] == dict(done=1, failed=1), divided.said
    assert '1/2 n=1: failed' in divided.said and 'ZeroDivisionError' in divided.said and '2/2 n=2: done' in divided.said
    csv, parquet = pd.read_csv(divided.folder/'summary.csv'), pd.read_parquet(divided.folder/'summary.parquet')
    assert list(csv.columns) == list(parquet.columns) and list(csv.state) == list(parquet.state) == ['failed', 'done'] and list(csv.n) == [1, 2]
    assert csv.error[0] == 'ZeroDivisionError: division by zero' and csv.notebook[0].endswith('.failed.ipynb') and 'ZeroDivisionError' in (divided.folder.parent/csv.notebook[0]).read_text()


def test_the_index_leads_to_every_notebook_and_needs_nothing_from_elsewhere(divided):
    page = (divided.folder/'index.html').read_text()
    links = set(re.findall(r'href="([^"]+)"', page))
    assert len(links) == 6 and all((divided.folder/link).is_file() for link in links)
    pages = [page, *((divided.folder/link).read_text() for link in links if link.endswith('.html'))]
    assert sum('sixth &lt;b&gt; 6.0' in p for p in pages) == 1 and sum('ZeroDivisionError' in p for p in pages) == 2
    for p in pages: assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', p) and '@import' not in p


def test_what_failed_is_run_again_and_what_is_done_is_not(divided):
    done = divided.folder.parent/divided.answer['summary'][1]['notebook']
    before = done.stat().st_mtime_ns
    with at(divided.work) as (out, err): status = jobs.sweep_command(str(divided.work/'divide.ipynb'), str(divided.work/'s.yaml'), 1, False, {}, False, False, False, True)
    answer = json.loads(out.getvalue())
    assert status == 1 and answer['counts'] == dict(there=1, failed=1) and done.stat().st_mtime_ns == before
    assert answer['summary'][1]['notebook_seconds'] == divided.answer['summary'][1]['notebook_seconds'] and 'n=2' not in err.getvalue()


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "A real run, stopped by Ctrl-C at the terminal when it has trained three steps, then started again."
    work = tmp_path_factory.mktemp('stopped')
    (work/'s.yaml').write_text('fixed: {preset: smoke, keep: 0, steps: 60, batch: 1, eval_every: 1000, checkpoint_every: 1000}\ngrid: {lr: 5e-4}')
    with open(work/'said.txt', 'w') as out:
        first = subprocess.Popen([str(Path(sys.executable).parent/'t2i'), 'sweep', 'train', str(work/'s.yaml')], env=dict(os.environ, T2I_WORK=str(work)), stdout=out, stderr=out, start_new_session=True)
    while first.poll() is None and not any(f.read_text().count('"train"') >= 3 for f in work.glob('runs/*/metrics.jsonl')): time.sleep(.05)
    family = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, signal.SIGINT)
    got = SimpleNamespace(work=work, status=first.wait(timeout=300), family=family, left=[p for p in family if p.is_running() and p.status() != 'zombie'], said=(work/'said.txt').read_text())
    got.checkpoints = [int(p.name) for p in work.glob('runs/*/checkpoints/*')]
    with at(work) as (out, err): got.second = jobs.sweep_command('train', str(work/'s.yaml'), None, False, {}, False, False, False, True)
    got.answer = json.loads(out.getvalue())
    return got


def test_ctrl_c_leaves_a_checkpoint_and_no_process(stopped):
    assert stopped.status == 130 and stopped.left == [] and len(stopped.family) >= 2, stopped.said
    assert '1/1 the only setting: training' in stopped.said and '1/1 the only setting: stopped, step' in stopped.said and 'the same command goes on' in stopped.said
    assert len(stopped.checkpoints) == 1 and 3 <= stopped.checkpoints[0] < 60   # checkpoint_every is beyond the end: the stop wrote it


def test_the_same_command_goes_on(stopped):
    row, = stopped.answer['summary']
    run = stopped.work/'runs'/row['run_id']
    lines = pd.read_json(run/'metrics.jsonl', lines=True)
    assert stopped.second == 0 and stopped.answer['counts'] == dict(done=1) and not (run/'checkpoints').exists()
    assert list(lines[lines.split == 'train'].step) == list(range(1, 61)) and row['total'] == lines[lines.split == 'validation'].total.iloc[-1] and row['seconds'] > 0


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
