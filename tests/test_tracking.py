"Trackers are told what metrics.jsonl and timing.jsonl say, each step once, and can do a run no harm."
import json
import sqlite3
from dataclasses import replace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis import training
from t2ianalysis.data import BadInput
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.training import ensure_runs, make_config, train


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp('tiny'), load_text_tokenizer('bundled')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).save_pretrained(folder/'lm')
    tokenizer.save_pretrained(folder/'lm')
    return folder


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    (tiny/'stores').mkdir(exist_ok=True)
    (tmp_path/'stores').symlink_to(tiny/'stores')
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    return make_config('smoke', lm=str(tiny/'lm'), pairs=48, steps=6, batch=4, eval_every=3, eval_pairs=8, checkpoint_every=2, keep=0)


def lines(folder):
    "What the record says: {name: [(step, value)]}."
    out = {}
    for line in (json.loads(x) for log in training.LOGS for x in (folder/log).read_text().splitlines()):
        for name, value in line.items():
            if name not in ('step', 'split') and not name.startswith('n_'): out.setdefault(f'{line.get("split", "timing")}/{name}', []).append((line['step'], pytest.approx(value, rel=1e-6)))
    return out


def interrupted(config, stopped_at):
    "A run that died after step 5, of which the checkpoint has 4; then to its end, with the same numbers."
    stopped_at(5, config)
    return train(config)


def metrics(found): return {name: values for name, values in found.items() if not name.startswith('timing')}


def test_tensorboard_has_what_the_record_has_each_step_once(config, stopped_at):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    def scalars(folder):
        events = EventAccumulator(str(folder/'tracking'/'tensorboard'), size_guidance={'scalars': 0}).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()['scalars']}
    folder = interrupted(replace(config, tracker='tensorboard'), stopped_at)
    assert len(list((folder/'tracking'/'tensorboard').glob('events*'))) == 2     # both processes wrote
    assert metrics(scalars(folder)) == metrics(lines(folder)) and set(scalars(folder)) == set(lines(folder)) >= {'train/text', 'validation/image', 'train/lr', 'timing/tokens_per_second'}
    hparams, = (folder/'tracking'/'tensorboard').glob('*/hparams.yml')
    assert 'steps: 6' in hparams.read_text() and 'tracker: tensorboard' in hparams.read_text()
    plain = folder.rename(folder.with_name('tracked'))
    assert (train(config)/'metrics.jsonl').read_text() == (plain/'metrics.jsonl').read_text() and train(config) == folder    # the same run, by name and numbers
    stopped_at(5, replace(config, seed=1))                            # a tracker that comes later is told what was before
    folder = train(replace(config, seed=1, tracker='tensorboard'))
    assert metrics(scalars(folder)) == metrics(lines(folder)) and len(scalars(folder)['train/total']) == 6


def wandb_records(raw):
    "The records of a .wandb file: after 7 bytes, blocks of 32 kB with pieces of checksum (4 bytes), length (2), kind (1: whole, 2: begin, 3: middle, 4: end) and content."
    place, record = 7, b''
    while place + 7 <= len(raw):
        if -place % 2**15 < 7: place += -place % 2**15                             # no room for a piece at the end of a block
        size, kind = int.from_bytes(raw[place + 4:place + 6], 'little'), raw[place + 6]
        record, place = record + raw[place + 7:place + 7 + size], place + 7 + size
        if kind in (1, 4): yield record; record = b''


def test_wandb_offline_needs_no_network(config, stopped_at, monkeypatch):
    pytest.importorskip('wandb')
    from wandb.proto.wandb_internal_pb2 import Record
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    folder, found = interrupted(replace(config, tracker='wandb'), stopped_at), {}
    for file in sorted((folder/'tracking'/'wandb').glob('wandb/offline-run-*/*.wandb')):
        for record in map(Record.FromString, wandb_records(file.read_bytes())):
            if record.HasField('run'): assert record.run.run_id == folder.name[-10:] and record.run.display_name == folder.name
            for item in record.history.item:
                name = item.key or '/'.join(item.nested_key)
                if '/' in name: found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    assert metrics(found) == metrics(lines(folder)) and set(found) == set(lines(folder))


def test_mlflow_goes_on_in_the_same_run(config, stopped_at, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    folder = interrupted(replace(config, tracker='mlflow'), stopped_at)
    assert (folder.parent/'tracking'/'mlflow'/'mlflow.db').is_file()
    run, = mlflow.search_runs(search_all_experiments=True, output_format='list')
    assert run.info.run_name == folder.name and run.info.status == 'FINISHED' and run.data.params['steps'] == '6'
    found = {name: [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    assert metrics(found) == metrics(lines(folder)) and set(found) == set(lines(folder))


def test_trackio_goes_on_in_the_same_run(config, stopped_at, monkeypatch, tmp_path):
    place = tmp_path/'trackio'
    monkeypatch.setenv('TRACKIO_DIR', str(place))                                  # read when it is imported
    pytest.importorskip('trackio')
    folder, found = interrupted(replace(config, tracker='trackio'), stopped_at), {}
    with sqlite3.connect(place/'t2ianalysis.db') as db: rows = db.execute('select run_name, step, metrics from metrics order by step').fetchall()
    assert {name for name, _, _ in rows} == {folder.name}
    for _, step, values in rows:
        for name, value in json.loads(values).items(): found.setdefault(name, []).append((step, value))
    assert metrics(found) == metrics(lines(folder)) and set(found) == set(lines(folder))


class Breaks(LOGGER_TYPE_TO_CLASS['tensorboard']):
    "As a tracker whose network goes down at step 3."
    def start(self): self.told = []
    @property
    def tracker(self): return self
    def store_init_configuration(self, values): pass
    def log(self, values, step=None, **kw):
        if step == 3: raise ConnectionError('the network is down')
        self.told.append(step); (training.work_path('told')).write_text(str(self.told))
    def finish(self): raise AssertionError('it is gone')


@pytest.mark.fault('a tracker fails on the way, or cannot begin', 'on the way it is said once and the run goes on without it; at the beginning it is refused before a step')
def test_a_tracker_that_fails_is_said_once_and_left_out(config, stopped_at, monkeypatch, capsys):
    monkeypatch.setattr(training, 'get_available_trackers', lambda: ['tensorboard'])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, 'tensorboard', Breaks)
    folder = train(replace(config, tracker='tensorboard'))
    out = ''.join(capsys.readouterr())
    assert out.count('tracker tensorboard failed (the network is down); the run goes on') == 1 and training.is_done(folder)
    assert training.work_path('told').read_text() == '[0, 1, 1, 2, 2]'
    def refused(self): raise RuntimeError('no key\nand more')
    monkeypatch.setattr(Breaks, 'start', refused)
    with pytest.raises(BadInput, match="tracker='tensorboard' cannot begin: no key; mend"): train(replace(config, seed=1, tracker='tensorboard'))
    stopped_at(5, replace(config, seed=2))
    assert training.is_done(train(replace(config, seed=2, tracker='tensorboard'))) and 'failed (no key)' in ''.join(capsys.readouterr())


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_done(config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'get_available_trackers', lambda: ['tensorboard'])
    for tracker, words in (('wandb, tensorboard', 'pip install wandb$'), ('wandb,mlflow', 'pip install wandb mlflow$')):
        with pytest.raises(BadInput, match=words): ensure_runs([replace(config, tracker=tracker)], progress=False)
        with pytest.raises(BadInput, match=words): train(replace(config, tracker=tracker))
    with pytest.raises(BadInput, match="'wandbb' is unknown; give one of .*Did you mean 'wandb'"): make_config('smoke', tracker='tensorboard,wandbb')
    assert not (tmp_path/'runs').exists()
