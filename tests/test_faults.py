"""Every fault really happens here, most of them to a process of its own; afterwards the record is that of a run that nothing happened to.

`fault(what, then)` marks a test, here and elsewhere; nbs/guides/faults.ipynb makes its table of these marks."""
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tqdm
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from t2ianalysis import training
from t2ianalysis.compute import slow_mkl
from t2ianalysis.data import BadInput
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.training import ensure_runs, is_done, make_config, prepare, run_id, train

fault = pytest.mark.fault
root = Path(__file__).parent.parent


# What happens to a process

def wait(condition, seconds=120):
    "Until something is so; the limit is for a test that would hang."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never came'
        time.sleep(0.005)


def hold(config, work, step):
    "Stop before the update of a step, and say so with the process's number, until the test says go."
    real, rank = training.lr_at, os.environ.get('RANK', '0')
    def lr_at(c, s):
        if s == step:
            (work/f'at-{rank}.new').write_text(str(os.getpid())); os.replace(work/f'at-{rank}.new', work/f'at-{rank}')
            wait((work/'go').exists)
        return real(c, s)
    training.lr_at = lr_at


def tell(config, work):
    "Say that SIGTERM has come; and, on leaving, what checkpoints there are."
    real, rank = training._terminated, os.environ.get('RANK', '0')
    @contextlib.contextmanager
    def terminated():
        with real() as event:
            told = event.set
            event.set = lambda: (told(), (work/f'told-{rank}').touch())
            try: yield event
            finally: (work/f'left-{rank}').write_text(' '.join(p.name for p in sorted((work/'runs').glob('*/checkpoints/*'))))
    training._terminated = terminated


def killed_at_write(config, work, number):
    "kill -9 at the n-th write to the record: of the file that is being made, only the first half is there."
    count = itertools.count(1)
    def halve(path):
        for f in path.iterdir() if path.is_dir() else [path]: os.truncate(f, f.stat().st_size // 2)
    def mortal(real, *a, **kw):
        paths = [Path(x) for x in a if isinstance(x, str | Path) and work/'runs' in Path(x).parents]
        if not paths or real.__name__ == 'rmtree' and not paths[0].exists() or next(count) < number: return real(*a, **kw)
        if real.__name__ in ('save', 'copy', 'save_pretrained'): real(*a, **kw); halve(paths[-1]/paths[0].name if real.__name__ == 'copy' else paths[-1])
        os.kill(os.getpid(), signal.SIGKILL)
    for module, name in ((os, 'replace'), (os, 'mkdir'), (shutil, 'copy'), (shutil, 'rmtree'), (torch, 'save'), (PreTrainedModel, 'save_pretrained')):
        real = getattr(module, name)
        setattr(module, name, lambda *a, real=real, **kw: mortal(real, *a, **kw))


def half_a_line(config, work, step):
    "kill -9 in the midst of a line of metrics.jsonl."
    real = training.Log.write
    def write(self, **line):
        if line['step'] == step and line.get('split') == 'train':
            self.file.write(json.dumps(line)[:40]); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)
        real(self, **line)
    training.Log.write = write


def never_trains(config, work): training._train = None


def job(config, work, environment, out, faults):
    "Train one run in a process of its own."
    os.environ |= {'T2I_WORK': str(work)} | environment
    for number in (1, 2): os.dup2(os.open(work/out, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    for how, *arguments in faults: how(config, work, *arguments)
    train(config)


servers = multiprocessing.get_context('forkserver')                               # imports once, then forks: a process costs no second import
servers.set_forkserver_preload(['t2ianalysis.training'])


@pytest.fixture
def go():
    "Start jobs; what is still there at the end of a test is killed."
    begun = []
    def start(config, work, *faults, processes=1, out='out'):
        with socket.socket() as s: s.bind(('localhost', 0)); port = s.getsockname()[1]
        common = dict(WORLD_SIZE=str(processes), MASTER_ADDR='localhost', MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(processes), ACCELERATE_USE_CPU='true') if processes > 1 else {}
        jobs = [servers.Process(target=job, args=(config, work, common | (dict(RANK=str(r), LOCAL_RANK=str(r)) if common else {}), f'{out}-{r}', faults)) for r in range(processes)]
        for j in jobs: j.start()
        begun.extend(jobs)
        return jobs if processes > 1 else jobs[0]
    yield start
    for j in begun: j.kill(); j.join()


def ended(*jobs):
    "Their exit statuses, when all have ended by themselves."
    for j in jobs: j.join(120)
    return [j.exitcode for j in jobs]


# What there is

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A model of 150,000 parameters, and the stores."
    folder, tokenizer = tmp_path_factory.mktemp('base'), load_text_tokenizer('bundled')
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder/'lm')
    tokenizer.save_pretrained(folder/'lm')
    (folder/'stores').mkdir()
    return folder


@pytest.fixture(scope='module')
def config(base): return make_config('smoke', lm=str(base/'lm'), pairs=48, steps=8, batch=4, eval_every=4, eval_pairs=8, checkpoint_every=2, keep=2)


@pytest.fixture(autouse=True)
def work(base, tmp_path, monkeypatch):
    "An empty place for runs, on one thread."
    (tmp_path/'stores').symlink_to(base/'stores')
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def whole(base, config):
    "The folder of the same run, to which nothing happens."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m: m.setenv('T2I_WORK', str(base)); folder = train(config)
    torch.set_num_threads(threads)
    return folder


def only(work): return next((work/'runs').glob('*-s0-*'))
def metrics(folder): return (folder/'metrics.jsonl').read_text()
def weights(folder): return {f: load_file(folder/'weights'/f'{f:08d}'/'model.safetensors') for f in (2, 8)}
def checkpoints(work): return sorted(p.name for p in only(work).glob('checkpoints/*'))


def same(folder, whole):
    "The same record, the same weights, and nothing half-made beside them."
    assert is_done(folder) and metrics(folder) == metrics(whole)
    assert [json.loads(line)['step'] for line in (folder/'timing.jsonl').open()] == list(range(1, 9))
    for step, tensors in weights(whole).items():
        for name, x in weights(folder)[step].items(): assert torch.equal(x, tensors[name]), (step, name)
    assert {p.name for p in folder.iterdir()} - {'lock'} == {'config.json', 'environment.json', 'metrics.jsonl', 'timing.jsonl', 'weights', 'done.json'}
    assert sorted(p.name for p in (folder/'weights').iterdir()) == ['00000002', '00000008']


def close(folder, whole):
    "The same record but for the rounding of two processes, which add in another order."
    one, two = ([json.loads(line) for line in metrics(f).splitlines()] for f in (whole, folder))
    assert is_done(folder) and [(x['step'], x['split'], x['tokens']) for x in one] == [(x['step'], x['split'], x['tokens']) for x in two]
    for kind in ('total', 'text', 'image', 'special'): assert max(abs(a[kind] - b[kind]) for a, b in zip(one, two, strict=True)) < 2e-6, kind


# Killed

@fault('kill -9 at any write: of a log, of a checkpoint, of the kept weights, of `done.json`; the file is half there', 'no half file is taken for whole; the run goes on from the last whole checkpoint to the same numbers and weights')
def test_killed_at_the_first_second_third_write_until_it_ends(go, config, base, tmp_path, whole):
    "In two places at a time: a process dies at its first (second) write, the next, which goes on with what is left, at its third (fourth), and so on."
    places, statuses = [tmp_path/'odd', tmp_path/'even'], []
    for place in places: place.mkdir(); (place/'stores').symlink_to(base/'stores')
    while not statuses or any(statuses[-1]): statuses.append(ended(*(go(config, place, (killed_at_write, 1 + 2 * len(statuses) + i)) for i, place in enumerate(places))))
    assert {s for two in statuses for s in two} == {-signal.SIGKILL, 0} and statuses[10] == [-signal.SIGKILL] * 2
    for place in places: same(only(place), whole)


@fault('kill -9 in the midst of a line of `metrics.jsonl`', 'the half line is dropped, the step done again')
def test_killed_in_the_midst_of_a_line(go, config, work, whole):
    assert ended(go(config, work, (half_a_line, 6))) == [-signal.SIGKILL]
    assert not metrics(only(work)).endswith('\n') and checkpoints(work) == ['00000002', '00000004']
    with pytest.raises(BadInput, match='no finished run'): training.load_run(only(work))
    same(train(config), whole)


@fault('kill -9 of all processes of a job', 'the run goes on from its last checkpoint, with any number of processes')
def test_killed_all_then_one_goes_on(go, config, work, whole):
    jobs = go(config, work, (hold, 5), processes=2)
    wait(lambda: all((work/f'at-{r}').exists() for r in (0, 1)))
    for j in jobs: j.kill()
    assert ended(*jobs) == [-signal.SIGKILL] * 2 and checkpoints(work) == ['00000002', '00000004']
    close(train(config), whole)


TORCHRUN = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '0', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0']
CODE = """
import json, sys
from pathlib import Path
from t2ianalysis.training import Config
import test_faults as t
config, work = json.loads(sys.argv[1]), Path(sys.argv[2])
t.job(Config(**config), work, {}, 'out-' + t.os.environ['RANK'], [(t.hold, int(sys.argv[3])), (t.tell,)])
"""


def torchrun(config, work, step):
    "The job under torchrun, when both processes have come to a step."
    for path in [*work.glob('at-*'), *work.glob('go')]: path.unlink()
    (work/'job.py').write_text(CODE)
    agent = subprocess.Popen([*TORCHRUN, str(work/'job.py'), json.dumps(config.__dict__), str(work), str(step)], stdout=subprocess.DEVNULL, stderr=(work/'agent').open('w'),
                             env=dict(os.environ, PYTHONPATH=str(Path(__file__).parent), ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'))
    def there():
        assert agent.poll() is None, (work/'agent').read_text()[-3000:] + (work/'out-0').read_text()[-3000:]
        return all((work/f'at-{r}').exists() for r in (0, 1))
    try: wait(there, 300)
    except BaseException: agent.kill(); raise
    return agent


@fault('kill -9 of one of several processes', 'the others end with an error, torchrun too; the run goes on from its last checkpoint')
@fault('SIGTERM to torchrun', 'all processes stop after the same step, with a checkpoint of it')
def test_torchrun_one_killed_then_told_to_stop(config, work, whole):
    agent = torchrun(config, work, 3)
    os.kill(int((work/'at-1').read_text()), signal.SIGKILL); (work/'go').touch()
    assert agent.wait(120) == 1 and checkpoints(work) == ['00000002'] and (work/'left-0').exists()
    agent = torchrun(config, work, 4)
    agent.send_signal(signal.SIGTERM); wait(lambda: all((work/f'told-{r}').exists() for r in (0, 1))); (work/'go').touch()
    assert agent.wait(120) != 0 and checkpoints(work) == ['00000004', '00000005']
    for r in (0, 1): assert 'stopped at step 5' in (work/f'out-{r}').read_text()
    close(train(config), whole)


@fault('SIGTERM of one of several processes', 'all stop after the same step, with a checkpoint of it; none leaves before it is written')
def test_one_told_to_stop_stops_all(go, config, work, whole):
    jobs = go(config, work, (hold, 4), (tell,), (slow_disk,), processes=2)
    wait(lambda: all((work/f'at-{r}').exists() for r in (0, 1)))
    os.kill(jobs[1].pid, signal.SIGTERM); wait((work/'told-1').exists); (work/'go').touch()
    assert ended(*jobs) == [1, 1] and not (work/'told-0').exists()
    for r in (0, 1): assert 'stopped at step 5' in (work/f'out-{r}').read_text() and (work/f'left-{r}').read_text() == '00000004 00000005'
    close(train(config), whole)


def slow_disk(config, work):
    "The file of a checkpoint takes half a second."
    real = torch.save
    torch.save = lambda *a: (time.sleep(0.5), real(*a))


@fault('kill -9 of `t2i finding` during its runs', 'runs that are finished stay as they are; the one that was being trained goes on from its last checkpoint')
def test_a_killed_finding(base, config, work):
    configs = [make_config('smoke', lm=config.lm, pairs=48, steps=30, batch=4, init=init) for init in ('pretrained', 'random')]
    folders = [work/'runs'/run_id(c, prepare(c, progress=False).fingerprint) for c in configs]
    values = [f'{k}={v}' for k, v in dict(lm=config.lm, pairs=48, steps=30, batch=4, seeds=1).items()]
    t2i = subprocess.Popen([str(Path(sys.executable).parent/'t2i'), 'finding', 'loss_breakdown', '--preset', 'smoke', *(x for v in values for x in ('-p', v))],
                           stdout=(work/'out').open('w'), stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS='1'))
    def there():
        assert t2i.poll() is None, (work/'out').read_text()[-3000:]
        return folders[1].exists()
    wait(there, 300)
    t2i.kill(); t2i.wait()
    first = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folders[0].glob('*.json*')}
    frame = ensure_runs(configs, progress=False)                                  # the notebook's own process ends with the command, or is waited for
    assert list(frame.run_id.unique()) == [f.name for f in folders] and {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first} == first
    left = metrics(folders[1])
    shutil.rmtree(folders[1])
    assert metrics(train(configs[1])) == left


# Damaged

def flipped(raw): return raw[:200] + bytes([raw[200] ^ 1]) + raw[201:]
def cut(raw): return raw[:len(raw) // 2]
def gone(raw): return b''


@fault('a bit of `metrics.jsonl` flips, lines of it are lost, or the file is', 'the log is taken from the checkpoint, which holds a copy')
@pytest.mark.parametrize('damage', [flipped, cut, gone])
def test_a_damaged_log_is_that_of_the_checkpoint(config, work, whole, stopped_at, damage):
    stopped_at(5, config)
    for name in training.LOGS: (only(work)/name).write_bytes(damage((only(work)/name).read_bytes()))
    same(train(config), whole)


@fault('every checkpoint is damaged', 'each is set aside and named; the run begins again')
def test_all_checkpoints_damaged(config, work, whole, stopped_at, capsys):
    stopped_at(5, config)
    for path, name in zip(sorted(only(work).glob('checkpoints/*')), ('optimizer.pt', 'metrics.jsonl'), strict=True): (path/name).write_bytes(cut((path/name).read_bytes()))
    same(train(config), whole)
    assert [f'checkpoint {step:08d} of' in out for out in [capsys.readouterr().out] for step in (2, 4)] == [True, True]


# The machine

@fault('the clock jumps a day ahead, then two days back', 'no number changes, no duration is negative; the newest checkpoint is the one of the highest step')
def test_a_clock_that_jumps(config, work, whole, stopped_at, monkeypatch):
    ticks, real = itertools.count(), time.time
    jumping = lambda: real() + 86_400 * (0, 1, -1, -1)[next(ticks) % 4]
    for module in (time, tqdm.std): monkeypatch.setattr(module, 'time', jumping)
    stopped_at(5, config)
    for path in only(work).rglob('*'):
        if '00000004' in path.parts: os.utime(path, (0, 0))
    ensure_runs([config])                                                         # its bar asks the clock, the loop does not
    assert next(ticks) > 10
    same(only(work), whole)
    assert all(json.loads(line)['seconds'] >= 0 and json.loads(line)['tokens_per_second'] > 0 for line in (only(work)/'timing.jsonl').open())


DISK = """
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from t2ianalysis import cli, training
work, arguments, config, said = Path(os.environ['T2I_WORK']), json.loads(sys.argv[1]), training.Config(**json.loads(sys.argv[2])), {}
mount = lambda *options: subprocess.run(['mount', *options, str(work)], check=True)
mount('-t', 'tmpfs', '-o', 'size=24m', 'tmpfs')
(work/'runs').mkdir()
def fill(*_):
    with contextlib.suppress(OSError), open(work/'filler', 'wb', buffering=0) as f:
        while f.write(bytes(4096)): pass
def t2i(what, *more, command=('train', *arguments)):
    sys.argv, err = ['t2i', *command, *more], io.StringIO()
    code = None
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try: cli.main()
        except SystemExit as e: code = e.code
    with contextlib.suppress(OSError): (work/'filler').unlink()
    lines = [line for line in err.getvalue().splitlines() if line.startswith(('t2i:', 'Traceback'))]
    said[what] = dict(code=code, lines=lines, there=sorted(str(p.relative_to(work)).split('/', 2)[-1] for p in work.glob('runs/*/*/*')))
def before(what, module, name, when=lambda *a, **kw: True):
    real = getattr(module, name)
    def full(*a, **kw):
        if when(*a, **kw): fill()
        return real(*a, **kw)
    setattr(module, name, full)
    t2i(what)
    setattr(module, name, real)
fill(); t2i('store')
fill(); t2i('tokenise', command=('tokenize', '--limit', '8'))
fill(); t2i('data', command=('data', '--limit', '8'))
training.prepare(config, progress=False)
fill(); t2i('record')
before('line', training.Log, 'write', lambda self, **line: line['step'] == 0)
before('checkpoint', training, 'save_checkpoint', lambda folder, step, *a: step == 4)
before('weights', training, 'save_weights', lambda folder, step, *a: step == 8)
before('done', training, 'write_atomic', lambda path, content: path.name == 'done.json')
t2i('whole')
folder, = (work/'runs').glob('*-s0-*')
said['metrics'] = (folder/'metrics.jsonl').read_text()
mount('-o', 'remount,ro')
t2i('again')
t2i('other', '-p', 'seed=1')
t2i('other data', '-p', 'pairs=40')
print('said: ' + json.dumps(said))
"""


@fault('the disk is full: at the token store, the record, a line of a log, a checkpoint, the kept weights', 'one sentence that says what had no room; nothing half-made stays; with room again, the same command goes on')
@fault('the folder of results is read-only', 'what is finished is used; what would have to be written is one sentence with the remedy')
def test_a_full_disk_and_a_read_only_one(config, tmp_path_factory, whole):
    "On a real file system of 24 MB, mounted where only this process and its children see it."
    mounts = ['unshare', '--map-root-user', '--mount']
    place = tmp_path_factory.mktemp('disk')
    if subprocess.run([*mounts, 'mount', '-t', 'tmpfs', 'tmpfs', str(place)], capture_output=True).returncode: pytest.skip('no mount in a namespace of its own here')
    arguments = ['--preset', 'smoke', *(x for k, v in config.__dict__.items() if v != getattr(training.PRESETS['smoke'], k) for x in ('-p', f'{k}={v}'))]
    done = subprocess.run([*mounts, sys.executable, '-W', 'ignore', '-c', DISK, json.dumps(arguments), json.dumps(config.__dict__)], capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, T2I_WORK=str(place), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.rpartition('said: ')[2])
    for what, words in {'store': 'no space left for the token store', 'tokenise': 'no space left for the token store', 'record': 'no space left for the record', 'line': 'no space left for the record',
                        'checkpoint': 'no space left for the checkpoint of step 4 in', 'weights': 'no space left for the weights of step 8 in', 'done': 'no space left for the record',
                        'other': f'the record {place}/runs/lm-pretrained-s1-', 'other data': f'the token store {place}/stores/'}.items():
        line, = said[what]['lines']                                              # no traceback, and nothing else
        assert said[what]['code'] == 2 and line.startswith(f't2i: {words}') and line.endswith(('goes on from what is whole.', 'give another folder of results by T2I_WORK, or the right to write there.')), what
    assert [said[what]['there'] for what in ('record', 'line')] == [[], []]
    assert said['checkpoint']['there'] == ['checkpoints/00000002', 'weights/00000002'] and said['weights']['there'] == ['checkpoints/00000004', 'checkpoints/00000006', 'weights/00000002']
    assert [said[what]['code'] for what in ('data', 'whole', 'again')] == [0, 0, 0] and said['metrics'] == metrics(whole)


# The same again

FRESH = """
import json, sys
from t2ianalysis import training
config, last = training.make_config('smoke', **json.loads(sys.argv[1])), int(sys.argv[2])
real = training.lr_at
def lr_at(c, s):
    if s == last: raise SystemExit(3)
    return real(c, s)
training.lr_at = lr_at
training.train(config)
"""


@fault('none: the same config, trained twice in fresh processes, once with a stop between', 'metrics and weights are equal to the bit')
def test_the_same_config_gives_the_same_bits(config, base, work):
    "In parts and with dropped captions, on two threads; the output layer is large enough for the faster matrix products; every process hashes strings in another order."
    changes = dict(lm=config.lm, pairs=48, eval_pairs=8, accumulation=2, caption_dropout=0.25, steps=5)
    def fresh(place, last, seed):
        if not (work/place).exists(): (work/place).mkdir(); (work/place/'stores').symlink_to(base/'stores')
        return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', FRESH, json.dumps(changes), str(last)], stdout=subprocess.DEVNULL, stderr=(work/f'{place}.err').open('w'),
                                env=dict(os.environ, T2I_WORK=str(work/place), PYTHONHASHSEED=str(seed), OMP_NUM_THREADS='2', OMP_WAIT_POLICY='passive'))
    once, begun = fresh('once', -1, 1), fresh('twice', 3, 2)
    assert [once.wait(300), begun.wait(300)] == [0, 3] and checkpoints(work/'twice') == ['00000002']
    assert fresh('twice', -1, 3).wait(300) == 0
    a, b = (only(work/place) for place in ('once', 'twice'))
    assert metrics(a) == metrics(b) and len(metrics(a).splitlines()) == 5 + 3
    assert (a/'weights'/'00000005'/'model.safetensors').read_bytes() == (b/'weights'/'00000005'/'model.safetensors').read_bytes()
    assert json.loads((a/'environment.json').read_text())['products'] == ('oneDNN' if slow_mkl() else 'default')


# Two at once

@fault('two jobs are asked for the same run at once', 'one trains it, the other says that it waits, then uses the record')
@fault('a job of several processes is asked for a run that another trains', 'it says so and ends')
def test_one_trains_and_the_others_say_so(go, config, work, whole):
    first = go(config, work, (hold, 3), out='first')
    wait((work/'at-0').exists)
    second, several = go(config, work, (never_trains,), out='second'), go(config, work, processes=2, out='several')
    wait(lambda: 'is being trained by another process; waiting for it' in (work/'second-0').read_text() if (work/'second-0').exists() else False)
    assert ended(*several) == [1, 1]
    for r in (0, 1): assert 'BadInput: run ' in (text := (work/f'several-{r}').read_text()) and 'is being trained by another job; wait for it and start again' in text
    (work/'go').touch()
    assert ended(first, second) == [0, 0]
    same(only(work), whole)
