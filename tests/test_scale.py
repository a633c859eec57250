"Tokenising on Ray: the same store to the byte, for any number of workers, any order, and after any kill."
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from t2ianalysis import scale
from t2ianalysis.cli import app
from t2ianalysis.data import BadInput, load_captions
from t2ianalysis.scale import store_bytes, tokenize_on_ray, work_units
from t2ianalysis.sequences import caption_ids
from t2ianalysis.tokenizers import TokenStore, load_image_tokenizer, tokenize_captions, usage

FILES = ('codes.bin', 'captions.jsonl', 'meta.json')
def contents(folder): return {name: (folder/name).read_bytes() for name in FILES}
def one_process(captions, tokenizer, folder): return contents(tokenize_captions(captions, tokenizer, folder, batch=4, progress=False).folder)


def write_tar(file, entries):
    "A WebDataset shard of (key, png bytes, caption)"
    with tarfile.open(file, 'w') as out:
        for key, png, caption in entries:
            for suffix, content in (('png', png), ('txt', caption.encode())):
                entry = tarfile.TarInfo(f'{key}.{suffix}')
                entry.size = len(content)
                out.addfile(entry, io.BytesIO(content))
    return file


@pytest.fixture
def tars(make, tmp_path):
    "Seven, one, none usable, nine and four pairs, among them what cannot be used"
    def png(seed):
        file = io.BytesIO()
        make['noise'](seed).save(file, 'PNG')
        return file.getvalue()
    (tmp_path/'tars').mkdir()
    for k, (n, bad) in enumerate(((7, {2}), (1, set()), (2, {0, 1}), (9, {8}), (4, {0}))):
        entries = [(f'{k}{i:03}', b'broken' if i in bad and i % 2 == 0 else png(10 * k + i), '' if i in bad and i % 2 else f'naïve 日本 {k} {i}') for i in range(n)]
        write_tar(tmp_path/'tars'/f'{k:05}.tar', entries)
    return lambda **options: load_captions(tmp_path/'tars', **dict(split='all', px=16) | options)


@pytest.fixture
def here(monkeypatch):
    "Ray's part played by this process: units and their rows come in a shuffled order; the units that were encoded are kept"
    def play(seed=0):
        encoded = []
        @contextmanager
        def workers(n, gpus): yield n or 1
        def results(captions, tokenizer, units, todo, size, workers, gpus):
            encoder, rows = scale._Encoder(tokenizer, captions.px, size, 'cpu'), []
            for unit in todo:
                encoded.append(unit.number)
                for table in scale._decode(pa.table({'unit': [unit.number]}), captions, units, size):
                    rows += [row for out in encoder(table) for row in out.to_pylist()]
            random.Random(seed).shuffle(rows)
            yield from rows
        monkeypatch.setattr(scale, 'ray_workers', workers)
        monkeypatch.setattr(scale, '_results', results)
        return encoded
    return play


# Units, parts and the store, without Ray

@pytest.mark.parametrize('options', [{}, {'streaming': False}, {'split': 'train', 'validation_fraction': .4}, {'split': 'validation', 'validation_fraction': .4}], ids=str)
def test_units_are_the_source_cut_in_order(tars, vq, options):
    captions = tars(**options)
    units = work_units(captions, vq, 4)
    pairs = [(pair['caption'], pair['image'].tobytes()) for unit in units for pair in scale.unit_captions(captions, unit).pairs()]
    assert pairs == [(pair['caption'], pair['image'].tobytes()) for pair in captions.pairs()] and len(units) == (6 if options.get('streaming') is False else 5)
    assert len({unit.key for unit in units}) == len(units) and units == work_units(tars(**options), vq, 4)


def test_the_key_of_a_tar_is_its_content_and_what_is_made_of_it(tars, vq, make, tmp_path):
    before = work_units(tars(), vq)
    (tmp_path/'tars/00001.tar').unlink()
    write_tar(tmp_path/'tars/00003.tar', [('x', b'', 'x')])
    after = work_units(tars(), vq)
    assert [unit.key for unit in after] == [before[0].key, before[2].key, after[2].key, before[4].key] and after[2].key != before[3].key
    content = bytearray((tmp_path/'tars/00000.tar').read_bytes())
    content[520] ^= 1  # as many bytes as before
    (tmp_path/'tars/00000.tar').write_bytes(content)
    assert [a.key == b.key for a, b in zip(after, work_units(tars(), vq))] == [False, True, True, True]
    after = work_units(tars(), vq)
    other = load_image_tokenizer(str(make['vq'](tmp_path/'other', seed=1)))
    for changed in (work_units(tars(px=32), vq), work_units(tars(split='train'), vq), work_units(tars(limit=3), vq), work_units(tars(), other)):
        assert changed[0].key != after[0].key


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('limit', [None, 1, 6, 7, 15, 16, 18, 99])
@pytest.mark.parametrize('options', [{}, {'streaming': False}, {'split': 'train', 'validation_fraction': .4}], ids=str)
def test_any_order_any_limit_gives_the_store_of_one_process(tars, vq, here, tmp_path, options, limit, seed):
    whole = one_process(tars(limit=limit, **options), vq, tmp_path/'one')
    here(seed)
    captions = tars(limit=limit, **options)
    store = tokenize_on_ray(captions, vq, tmp_path/'many', workers=1 + seed, batch=4, rows=3 + seed, progress=False)
    assert contents(store.folder) == whole
    assert not (tmp_path/'parts').exists() and sorted(p.name for p in store.folder.iterdir()) == sorted((*FILES, 'lock'))
    again = tars(limit=limit, **options)
    list(again.pairs())
    assert captions.report == again.report and captions.failures == again.failures


def test_several_captions_an_image(tars, vq, here, tmp_path):
    here()
    whole = one_process(tars(captions='each'), vq, tmp_path/'one')
    assert contents(tokenize_on_ray(tars(captions='each'), vq, tmp_path/'many', batch=4, progress=False).folder) == whole


def test_a_limit_does_not_read_the_whole_source(tars, vq, here, tmp_path):
    encoded = here()
    tokenize_on_ray(tars(limit=5), vq, tmp_path/'many', workers=1, batch=4, progress=False)
    assert encoded == [0]


@pytest.mark.parametrize('size', [1, 4, 17, 18])
def test_a_store_in_shards_reads_like_one_file(tars, vq, here, text_tokenizer, tmp_path, size):
    here()
    one = tokenize_captions(tars(), vq, tmp_path/'one', batch=4, progress=False)
    store = tokenize_on_ray(tars(), vq, tmp_path/'shards', batch=4, shard_pairs=size, progress=False)
    if size == 18: assert contents(store.folder) == contents(one.folder); return
    assert [shard['pairs'] for shard in store.meta['shards']] == [size] * (18 // size) + [18 % size] * bool(18 % size)
    assert (store.fingerprint, len(store), store.meta['report']) == (one.fingerprint, 18, one.meta['report']) and usage(store) == usage(one)
    picks = np.random.default_rng(0).integers(-18, 18, 50)
    for rows in (0, 17, -1, slice(3, 12, 2), slice(None), picks, picks[:0].tolist(), np.arange(18) % 3 == 0): assert np.array_equal(store.codes[rows], one.codes[rows])
    assert np.array_equal(store.codes, one.codes) and ((store.codes + 1) == (one.codes + 1)).all() and store.codes.shape == one.codes.shape
    assert list(store.captions) == one.captions == store.captions[:] and [store.captions[i] for i in picks] == [one.captions[i] for i in picks]
    for sequence in (store.codes, store.captions):
        for i in (18, -19):
            with pytest.raises(IndexError): sequence[i]
    assert all(map(np.array_equal, caption_ids(store, text_tokenizer), caption_ids(one, text_tokenizer)))


@pytest.mark.parametrize('name', ['codes-00001.bin', 'captions-00002.jsonl'])
@pytest.mark.parametrize('spoil', [lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-2] + b'x\n')],
                         ids=['cut', 'gone', 'changed'])
@pytest.mark.fault('a shard of a large token store is cut or changed', 'the store is refused; the shard is named')
def test_a_damaged_shard_is_named(tars, vq, here, tmp_path, name, spoil):
    here()
    store = tokenize_on_ray(tars(), vq, tmp_path/'shards', batch=4, shard_pairs=5, progress=False)
    spoil(store.folder/name)
    with pytest.raises(BadInput, match=f'{name} does not match its checksum'): TokenStore(store.folder)


def test_codes_do_not_depend_on_the_batch(make, vq):
    from t2ianalysis.tokenizers import encode_images
    images = [make['noise'](i) for i in range(12)]
    whole = encode_images(vq, images, 12)
    assert all(np.array_equal(encode_images(vq, images[i:i + n], 12), whole[i:i + n]) for i in range(0, 12, 4) for n in (1, 3, 4))


# What goes wrong

def cut(tar, member):
    "Truncate a tar in the midst of a member; returns what it was"
    content = tar.read_bytes()
    with tarfile.open(tar) as entries: tar.write_bytes(content[:entries.getmembers()[member].offset_data + 20])
    return content


def stopped(captions, tokenizer, folder, monkeypatch, after):
    "A job that dies when `after` parts are written"
    real, left = scale._write_part, [after]
    def write(*args):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(scale, '_write_part', write)
        with pytest.raises(KeyboardInterrupt): tokenize_on_ray(captions, tokenizer, folder, batch=4, progress=False)


@pytest.mark.parametrize('after', range(5))
def test_a_stopped_job_does_only_what_is_missing(tars, vq, here, tmp_path, monkeypatch, after):
    whole, encoded = one_process(tars(), vq, tmp_path/'one'), here(3)
    stopped(tars(), vq, tmp_path/'many', monkeypatch, after)
    encoded.clear()
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).folder) == whole and len(encoded) == 5 - after


def test_a_job_stopped_while_the_parts_are_put_together(tars, vq, here, tmp_path, monkeypatch):
    whole, encoded = one_process(tars(), vq, tmp_path/'one'), here()
    def dies(*args): raise KeyboardInterrupt
    for step in ('finish_store', '_write_store'):
        with monkeypatch.context() as m:
            m.setattr(scale, step, dies)
            with pytest.raises(KeyboardInterrupt): tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, shard_pairs=4, progress=False)
    encoded.clear()
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).folder) == whole and encoded == []
    assert sorted(p.name for p in (tmp_path/'many').iterdir()) == sorted((*FILES, 'lock'))


def test_a_pass_of_one_process_and_a_ray_job_may_take_turns(tars, vq, here, tmp_path):
    class Stopped(type(vq)):
        def encode(self, x): raise KeyboardInterrupt
    whole = one_process(tars(), vq, tmp_path/'one')
    with pytest.raises(KeyboardInterrupt): tokenize_captions(tars(), Stopped(vq.model, vq.name, vq.fingerprint), tmp_path/'many', batch=4, progress=False)
    here()
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).folder) == whole


@pytest.mark.fault('a tar of the source is cut short', 'it is named; with the whole tar only its part is done again')
def test_a_truncated_tar_is_named_and_only_it_is_done_again(tars, vq, here, tmp_path):
    whole, encoded, tar = one_process(tars(), vq, tmp_path/'one'), here(), tmp_path/'tars/00003.tar'
    content = cut(tar, 8)
    with pytest.raises(BadInput, match='00003.tar.*cannot be read.*finished parts are kept') as e: tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False)
    assert '\n' not in str(e.value) and encoded == [0, 1, 2, 3, 4]
    tar.write_bytes(content)
    encoded.clear()
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).folder) == whole and encoded == [3]


def test_a_limit_before_the_truncated_tar(tars, vq, here, tmp_path):
    tar = tmp_path/'tars/00003.tar'
    cut(tar, 4)
    here()
    whole = one_process(tars(limit=7), vq, tmp_path/'one')
    assert contents(tokenize_on_ray(tars(limit=7), vq, tmp_path/'many', workers=4, batch=4, progress=False).folder) == whole


def test_a_damaged_part_is_made_afresh(tars, vq, here, tmp_path, monkeypatch):
    whole, encoded = one_process(tars(), vq, tmp_path/'one'), here()
    stopped(tars(), vq, tmp_path/'many', monkeypatch, 4)
    key = next(unit.key for unit in work_units(tars(), vq) if (tmp_path/'parts'/unit.key/'codes.bin').exists() and (tmp_path/'parts'/unit.key/'codes.bin').stat().st_size)
    (tmp_path/'parts'/key/'codes.bin').write_bytes(b'spoilt')
    with pytest.raises(BadInput, match='made afresh'): tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False)
    encoded.clear()
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).folder) == whole and len(encoded) == 1


def test_two_jobs_make_one_store(tars, vq, here, tmp_path):
    encoded, stores = here(), []
    threads = [threading.Thread(target=lambda: stores.append(tokenize_on_ray(tars(), vq, tmp_path/'many', batch=4, progress=False).fingerprint)) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(stores) == 2 and len(set(stores)) == 1 and sorted(encoded) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('options, says', [
    (dict(workers=0), 'workers=0'), (dict(workers=2, gpus=3), 'workers=2.*one for each GPU'), (dict(batch=0), 'batch=0'), (dict(rows=-1), 'rows=-1'), (dict(shard_pairs=-5), 'shard_pairs=-5')])
def test_what_cannot_be_asked(tars, vq, tmp_path, options, says):
    with pytest.raises(BadInput, match=says): tokenize_on_ray(tars(), vq, tmp_path/'many', progress=False, **options)


def test_dedup_and_empty_sources_and_a_missing_ray(tars, vq, here, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'ray', None)
        m.setitem(sys.modules, 'ray.data', None)
        with pytest.raises(BadInput, match=r'pip install "ray\[data\]"'): tokenize_on_ray(tars(), vq, tmp_path/'many', progress=False)
    with pytest.raises(BadInput, match='dedup'): tokenize_on_ray(tars(dedup=2), vq, tmp_path/'many', progress=False)
    write_tar(tmp_path/'bad.tar', [('0', b'broken', 'a'), ('1', b'broken', 'b')])
    here()
    with pytest.raises(BadInput, match='no usable pair'): tokenize_on_ray(load_captions(tmp_path/'bad.tar', 'all', 16), vq, tmp_path/'bad', progress=False)


def test_a_code_outside_the_codebook_stops_the_job(tars, vq_folder, here, tmp_path):
    here()
    tokenizer = load_image_tokenizer(str(vq_folder))
    tokenizer.vocab_size = 2
    with pytest.raises(BadInput, match='declares 2 codes'): tokenize_on_ray(tars(), tokenizer, tmp_path/'many', progress=False)


def test_sizes():
    sizes = store_bytes(134_000_000, 1024, 30)
    assert sizes['codes'] == 134_000_000 * 2048 and sizes['caption_ids'] == 134_000_000 * 31 * 4


def test_the_command(tars, vq_folder, here, tmp_path):
    here()
    ask = ['tokenize', str(tmp_path/'tars'), '--image-tokenizer', str(vq_folder), '--split', 'all', '--px', '16']
    result = CliRunner().invoke(app, [*ask, '--ray', '--workers', '2', '--shard-pairs', '5'])
    assert result.exit_code == 0 and '18 pairs' in result.output, result.output
    result = CliRunner().invoke(app, [*ask, '--workers', '2'])
    assert isinstance(result.exception, BadInput) and '--ray' in str(result.exception)


# Ray itself

@pytest.fixture(scope='module')
def cluster():
    "Ray for all tests of this file"
    ray = pytest.importorskip('ray')
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    try: scale._start(3, num_gpus=1)  # a GPU in name
    except BadInput as error: pytest.skip(f'the machine is too busy for Ray, which gives its agent 15 seconds: {error}')
    yield ray
    ray.shutdown()


def test_two_workers_give_the_store_of_one_process(tars, vq, cluster, tmp_path):
    whole = one_process(tars(), vq, tmp_path/'one')
    assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', workers=2, batch=4, progress=False).folder) == whole
    with pytest.raises(BadInput, match='GPUs: 2 workers on 2 GPUs need 2, Ray has 1'): tokenize_on_ray(tars(), vq, tmp_path/'gpu', gpus=2, progress=False)
    with pytest.raises(BadInput, match='CPUs: 99 workers'): tokenize_on_ray(tars(), vq, tmp_path/'cpu', workers=99, progress=False)


def test_workers_that_share_a_gpu(tars, vq_folder, cluster, tmp_path):
    "Scheduled as on GPUs: decoding apart, the tokenizer moved to 'cuda', which here only notes it"
    tokenizer = load_image_tokenizer(str(vq_folder))
    whole = one_process(tars(), tokenizer, tmp_path/'one')
    class Moved(type(tokenizer.model)):
        def to(self, device): self.where = device; return self
    class OnGPU(type(tokenizer)):
        def encode(self, x): assert self.model.where == 'cuda' and cluster.get_gpu_ids(); return super().encode(x)
    tokenizer.model.__class__ = Moved
    store = tokenize_on_ray(tars(), OnGPU(tokenizer.model, tokenizer.name, tokenizer.fingerprint), tmp_path/'many', workers=2, gpus=1, batch=4, progress=False)
    assert contents(store.folder) == whole


@pytest.mark.fault('kill -9 of a Ray worker', 'another takes its work; the store is the same to the byte')
def test_a_worker_that_dies_is_replaced(tars, vq, cluster, tmp_path):
    class Mortal(type(vq)):
        "Its process is killed at the second batch, once."
        def encode(self, x):
            self.calls = getattr(self, 'calls', 0) + 1
            if self.calls == 2 and not os.path.exists(self.killed):
                open(self.killed, 'w').close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(x)
    Mortal.killed = str(tmp_path/'killed')
    whole = one_process(tars(), vq, tmp_path/'one')
    store = tokenize_on_ray(tars(), Mortal(vq.model, vq.name, vq.fingerprint), tmp_path/'many', workers=1, batch=4, progress=False)
    assert (tmp_path/'killed').exists() and contents(store.folder) == whole


JOB = """
import sys, time
from t2ianalysis.data import load_captions
from t2ianalysis.scale import tokenize_on_ray
from t2ianalysis.tokenizers import VQTokenizer, load_image_tokenizer
class Slow(VQTokenizer):
    def encode(self, x): time.sleep(1); return super().encode(x)
t = load_image_tokenizer(sys.argv[2])
tokenize_on_ray(load_captions(sys.argv[1], 'all', 16), Slow(t.model, t.name, t.fingerprint), sys.argv[3], workers=1, batch=4, progress=False)
"""


@pytest.mark.fault('kill -9 of a tokenising job on Ray', 'the parts that are whole stay; the rest is made')
def test_a_killed_job_goes_on(tars, vq, vq_folder, cluster, tmp_path):
    whole = one_process(tars(), vq, tmp_path/'one')
    job = subprocess.Popen([sys.executable, '-c', JOB, str(tmp_path/'tars'), str(vq_folder), str(tmp_path/'many')],
                           env=os.environ | {'RAY_ADDRESS': cluster.get_runtime_context().gcs_address})
    parts = lambda: {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path/'parts').glob('*/part.json')}
    end = time.time() + 120
    while len(parts()) < 2 and time.time() < end and job.poll() is None: time.sleep(.05)
    job.kill()
    job.wait()
    before, done = parts(), []
    assert 2 <= len(before) < 5 and not (tmp_path/'many/meta.json').exists()
    real = scale._write_part
    with pytest.MonkeyPatch.context() as m:
        m.setattr(scale, '_write_part', lambda folder, *rest: (done.append(folder.name), real(folder, *rest)))
        assert contents(tokenize_on_ray(tars(), vq, tmp_path/'many', workers=2, batch=4, progress=False).folder) == whole
    assert len(done) == 5 - len(before) and not before.keys() & set(done)
