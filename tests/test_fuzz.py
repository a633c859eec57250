"""Hostile input: some thousands of damaged files, odd values and bombs. Each is read to something sensible or refused in one sentence; none runs code,
writes outside its place, leaves half a file or takes more memory than is stated. T2I_FUZZ=10 tries ten times as many; T2I_FUZZ_COUNTS=FILE writes the counts."""
import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import logging
import operator
import os
import pickle
import resource
import shutil
import string
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
import zlib
from collections import Counter
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import VQModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save as safetensors

from t2ianalysis import data, evaluation, generation, models, open_lm, report, scale, tokenizers, training, vqgan
from t2ianalysis.alignment import Aligned
from t2ianalysis.data import BadInput, memory
from t2ianalysis.sequences import Vocab
from t2ianalysis.sweeps import parse_parameters

pytestmark = pytest.mark.filterwarnings('ignore')
TIMES, COUNTS = int(os.environ.get('T2I_FUZZ', 1)), {}


# What is written into the files

class Payload:
    "What a pickle, or YAML, would do if it were believed: make a file"
    def __reduce__(self): return exec, ("open('canary', 'w').close()",)


def packed(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


JUNK = [b'', b'\0' * 600, b'null', b'true', b'7', b'"word"', b'[]', b'{}', b'[[]]', b'[{}]', b'NaN', b'-Infinity', b'[1e999]', b'9' * 5000, b'"\\ud800"', b'"\\u0000"', b'\xff\xfe{\0}\0', b'\xef\xbb\xbf{}',
        b'[' * 100_000, b'{"a":' * 50_000, b'[' * 50_000 + b']' * 50_000, b'a: *a', b'&a {b: *a}', b'!!python/object/apply:os.mknod [canary]', b'2020-99-99', b'!!int "-"', b'? [a]', b'\x80\x04.', b'PK\5\6' + b'\0' * 18,
        pickle.dumps(Payload()), packed(Payload()), packed({'state_dict': Payload()}), b'import os; os.mknod("canary")']

ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, -2**70, 10**400, 0.5, -0.0, 1e308, float('nan'), float('inf'), '', ' ', 'a', '0', 'nan', '\0', 'a\0b', '\ud800', 'a\nb', '🐟', '../../canary', '/dev/zero', '/dev/null', '~nobody/x',
       '{0..99999999999}', '[', '*', 'hf://x/y', 'http://127.0.0.1:9/x', '²', 'x' * 300, 'a/b', '{{7*7}}', '__class__', [], {}, [[]], [None], {'': None}, {'a': [1]}]
LEAVES = some.sampled_from(ODD) | some.integers() | some.floats() | some.text(max_size=8)
VALUES = LEAVES | some.recursive(LEAVES, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=4), inner, max_size=3), max_leaves=6)


@some.composite
def mutations(draw, valid):
    "A valid file with some bytes flipped, put in, taken out, cut off or copied elsewhere"
    content = bytearray(valid)
    for _ in range(draw(some.integers(1, 5))):
        at, n = draw(some.integers(0, len(content))), draw(some.integers(0, 24))
        match draw(some.sampled_from(('flip', 'set', 'cut', 'insert', 'remove', 'copy'))):
            case 'flip' if at < len(content): content[at] ^= 1 << n % 8
            case 'set': content[at:at + n] = draw(some.sampled_from((b'\0', b'\xff', b'\x7f', b'9'))) * len(content[at:at + n])
            case 'cut': del content[at:]
            case 'insert': content[at:at] = draw(some.binary(max_size=24))
            case 'remove': del content[at:at + n]
            case 'copy': content[n:n] = content[at:at + 4 * n]
    return bytes(content)


def places(tree, at=()):
    "Every place in a tree of JSON"
    yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else (): yield from places(value, (*at, key))


@some.composite
def damaged(draw, tree):
    "A tree of JSON in which a value or two are others, gone, or too many"
    tree, value = copy.deepcopy(tree), lambda: copy.deepcopy(draw(VALUES))      # what is put in may be changed in the next round
    for _ in range(draw(some.integers(1, 2))):
        *head, last = draw(some.sampled_from(list(places(tree))[1:] or [()])) or (None,)
        if last is None: return value()
        parent = functools.reduce(operator.getitem, head, tree)
        match draw(some.sampled_from(('replace', 'replace', 'remove', 'add'))):
            case 'replace': parent[last] = value()
            case 'remove': del parent[last]
            case 'add': parent.update({draw(some.text(max_size=4)): value()}) if isinstance(parent, dict) else parent.append(value())
    return tree


def lines(trees): return b''.join(json.dumps(tree).encode() + b'\n' for tree in trees)


def contents(name, valid):
    "What a file may hold instead of what it should: a file of JSON is damaged as bytes and as values"
    odd = mutations(valid) | some.sampled_from(JUNK)
    if name.endswith('.json'): return odd | damaged(json.loads(valid)).map(lambda tree: json.dumps(tree).encode())
    if name.endswith('.jsonl'): return odd | damaged([json.loads(line) for line in valid.splitlines()]).map(lambda tree: lines(tree) if isinstance(tree, list) else json.dumps(tree).encode())
    return odd


# Valid folders: name of a file to its content

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype='uint8'))


def picture(kind='PNG', mode='RGB', **options):
    out = io.BytesIO()
    (PICTURE.convert(mode) if mode in ('RGB', 'L', 'P', 'RGBA', '1') else Image.fromarray(np.arange(120, dtype='uint16').reshape(12, 10) * 500)).save(out, kind, **options)
    return out.getvalue()


def tar(*members):
    "A tar of (name, content), or of (TarInfo, content)"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is not name: info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def table(columns):
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out)
    return out.getvalue()


def sha(content): return hashlib.sha256(content).hexdigest()


def saved_pairs():
    "A folder of `save_to_disk`, as it came out"
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_dict({'image': [{'bytes': picture(), 'path': None}] * 3, 'caption': ['a fish', 'b', 'c']}).save_to_disk(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def token_store(*shards):
    "Four codes of 16 an image; `shards`: pairs in each"
    codes, captions = np.arange(sum(shards) * 4, dtype=np.uint16) % 16, [{'row': i, 'caption': f'fish {i}'} for i in range(sum(shards))]
    cuts = np.cumsum([0, *shards])
    one = lambda k: (f'-{k:05}' if shards[1:] else '')
    files = {f'codes{one(k)}.bin': codes[4 * a:4 * b].tobytes() for k, (a, b) in enumerate(zip(cuts, cuts[1:]))}
    files |= {f'captions{one(k)}.jsonl': lines(captions[a:b]) for k, (a, b) in enumerate(zip(cuts, cuts[1:]))}
    meta = dict(source='s', split='all', px=16, grid=[2, 2], vocab_size=16, tokenizer='t', tokenizer_fingerprint='a', data_fingerprint='b', report={'kept': 3}, sha256={'codes.bin': '', 'captions.jsonl': ''}, fingerprint='')
    if shards[1:]: meta['shards'] = [{'pairs': n, 'sha256': dict(meta['sha256'])} for n in shards]
    return files | {'meta.json': json.dumps(meta).encode()}


def seal_store(folder):
    "Make the checksums right, so that what is wrong is seen only by who looks at the content"
    meta = json.loads((folder/'meta.json').read_text())
    for name in meta['sha256']:
        parts = [f.read_bytes() for f in tokenizers.store_files(folder, name, len(meta.get('shards', ())))]
        meta['sha256'][name] = sha(b''.join(parts))
        for shard, part in zip(meta.get('shards', ()), parts): shard['sha256'][name] = sha(part)
    meta['fingerprint'] = tokenizers.store_fingerprint(meta)
    (folder/'meta.json').write_text(json.dumps(meta))


RUN = {'config.json': json.dumps(dict(config=dataclasses.asdict(training.PRESETS['smoke']), fingerprint={})).encode(), 'environment.json': b'{"torch": "2"}',
       'metrics.jsonl': lines([dict(step=k, split=split, tokens=9 * k, total=3., n_total=9, text=2., n_text=4) for k in (0, 6) for split in ('train', 'validation')]), 'done.json': b'{"tokens": 9, "metrics_sha256": ""}'}


def seal_run(folder):
    done = json.loads((folder/'done.json').read_text())
    (folder/'done.json').write_text(json.dumps(done | dict(metrics_sha256=sha((folder/'metrics.jsonl').read_bytes()))))


def alignment():
    files = {'config.json': b'{"settings": {"lm": "bundled", "batch": 4}}', 'environment.json': b'{}', 'metrics.jsonl': lines([dict(step=0, loss=1.)]), 'rows.safetensors': safetensors({'rows': torch.ones(4, 8)})}
    return {'whole.json': json.dumps({'sha256': {name: sha(content) for name, content in files.items()}}).encode()} | files


def seal_alignment(folder): (folder/'whole.json').write_text(json.dumps({'sha256': {path.name: sha(path.read_bytes()) for path in folder.iterdir() if path.name != 'whole.json'}}))


def checkpoint():
    files = {'model.safetensors': b'weights', 'optimizer.pt': b'moments'}
    return {f'checkpoints/00000002/{name}': content for name, content in files.items()} | {
        'checkpoints/00000002/state.json': json.dumps(dict(step=2, tokens=9, sha256={name: sha(content) for name, content in files.items()})).encode()}


def finding():
    "A recorded finding with its figure and its run, below the place for results"
    verdict = dict(claim='A < B', paper='lower', ours='-0.2', effect=-.2, low='nan', high='nan', n=1, margin=0., verdict='holds', unit='nats', region=['-inf', 0.])
    verdict['verdict'] = report.HOLDS
    record = dict(finding='other', preset='smoke', title='A finding', figures={'gap': 'What it shows.'}, verdicts=[verdict], runs=['r1'], date='2026-01-01', environment={'torch': '2'})
    figures = {'gap.svg': b'<svg width="90pt" height="60pt"></svg>', 'gap.csv': b'a\n1\n', 'other.json': json.dumps(record).encode()}
    return {f'figures/smoke/{name}': content for name, content in figures.items()} | {f'runs/r1/{name}': content for name, content in RUN.items()}


EVALUATION = dict(subject='r', protocol=dict(kind='text', limit=None), results=[dict(step=0, task='facts', rows='text', data='d', weights='w', values={'acc': [.5, None]}, n=4, version=1, shots=0)])
COCO = {'annotations/captions_val.json': json.dumps(dict(images=[dict(id=i, file_name=f'{i}.png', license=1) for i in (1, 2)], licenses=[dict(id=1, name='CC')],
                                                         annotations=[dict(id=9 - i, image_id=i % 2 + 1, caption=f'fish {i}') for i in range(4)])).encode(), 'val/1.png': picture(), 'val/2.png': picture('GIF')}
OPEN_LM = dict(hidden_dim=8, n_layers=1, n_heads=2, seq_len=16, vocab_size=10, norm_eps=1e-5, weight_tying=False, post_embed_norm=False, qk_norm=False, model_norm='default_layer_norm', positional_embedding_type='rotary')
VQGAN = {'encoder.conv_in.weight': torch.zeros(32, 3, 3, 3), 'encoder.down.0.block.0.conv1.weight': torch.zeros(32, 32, 3, 3), 'decoder.conv_out.weight': torch.zeros(3, 32, 3, 3),
         'post_quant_conv.weight': torch.zeros(4, 4, 1, 1), 'quantize.embedding.weight': torch.zeros(16, 4)}
CONFIG_OF_VQGAN = b'model:\n  params:\n    n_embed: 16\n    embed_dim: 4\n    ddconfig:\n      ch: 32\n      ch_mult: [1]\n      attn_resolutions: [16]\n'
TASK = b'task: mine\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\nmetric_list:\n- metric: acc\n  higher_is_better: true\nmetadata:\n  version: 1.0\n'


def image_tokenizer():
    "A VQModel of 16 codes, as `save_pretrained` writes it"
    with tempfile.TemporaryDirectory() as folder:
        VQModel(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, layers_per_block=1, latent_channels=4, vq_embed_dim=4,
                num_vq_embeddings=16, norm_num_groups=8, norm_type='group', mid_block_add_attention=False).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# How each is read, and what must be true of what comes out

def read_captions(source, **options):
    "All pairs of a source"
    pairs = data.load_captions(source, 'all', 16, **options)
    rows = list(pairs)
    for row in rows:
        assert (row['image'].mode, row['image'].size) == ('RGB', (16, 16))
        assert row['caption'].strip() and not data._CONTROL.search(row['caption']) and isinstance(row['source'], str) and isinstance(row['licence'], str)
    assert pairs.report['kept'] == len(rows) and pairs.summary() and len(pairs.fingerprint) == 64
    assert len(list(pairs.captions())) >= len(rows)


def read_store(folder, verify=True):
    "All codes and captions of a store"
    store = tokenizers.TokenStore(folder, verify)
    codes, captions = np.asarray(store.codes[:]), list(store.captions)
    assert codes.dtype == np.uint16 and codes.shape == (len(store), store.grid[0] * store.grid[1]) and len(captions) == len(store) and all(isinstance(c, str) for c in captions)
    assert repr(store) and (not len(store) or tokenizers.usage(store)['used'] <= store.vocab_size)


def read_progress(folder):
    state = tokenizers._take_up(folder, ['a', 'b'])
    assert all(type(state[name]) is int and state[name] >= 0 for name in ('row', 'kept', 'code_bytes', 'caption_bytes'))
    assert (folder/'codes.bin').stat().st_size == state['code_bytes'] and sum(Counter(state['report']).values()) >= 0


def read_run(folder):
    frame = training.load_runs([folder])
    assert set(frame.kind) <= set(training.KINDS) and frame.loss.dtype == float and len(frame.run_id.unique()) == 1


def read_rows(folder):
    "Rows of four codes for a model of ten tokens and eight dimensions"
    model = types.SimpleNamespace(get_input_embeddings=lambda: types.SimpleNamespace(weight=torch.zeros(21, 8)))
    training.place_rows(model, Vocab(10, 4), dataclasses.replace(training.PRESETS['smoke'], rows=str(folder/'rows.safetensors')))


def read_report(folder):
    assert len(report.verdicts_of_all('smoke')) >= 0
    page = report.write_report('smoke').read_text(encoding='utf-8')
    assert page.endswith('</html>\n') and '<script' not in page


def read_image(content):
    "`decode_image` gives reasons as plain `ValueError`: a row is left out, the rest goes on"
    try: image = data.decode_image(content, 16)
    except ValueError as error: raise BadInput(str(error)) from error
    assert (image.mode, image.size) == ('RGB', (16, 16))


def read_parts(folder):
    part = scale._part(folder)
    if part is not None: scale._read_part(scale.Unit(0, 'unit', 'key', None), folder, part)


def read_weights(names):
    fill(Path('case'), {f'{folder}/{name}/{file}': b'' for folder in ('weights', 'checkpoints') for name in names for file in ('a', 'b')})
    assert training.find_checkpoint(Path('case')) == (None, 0, 0)
    assert all(path.is_dir() and path.name.isascii() for path in training.kept('case').values())


def refused(read, value):
    "True if a reader refuses a value in one line"
    try: read(value)
    except BadInput as error: return '\n' not in str(error)
    return False


@dataclasses.dataclass
class Reader:
    "Something that reads files"
    cases: int              # damaged folders that are tried
    valid: object           # () -> a valid folder: name to content
    read: object            # called with the folder
    seal: object = None     # makes the checksums of a damaged folder right again, in half of the cases
    odd: dict = dataclasses.field(default_factory=dict)  # name of a file to other contents to try


COLUMN = some.sampled_from(('image', 'caption', 'source', 'licence', 'json', 'txt', 'image.path', '', '\0'))
CELLS = some.sampled_from((None, True, 1, 2.5, float('nan'), '', 'a fish', '\0', '/dev/zero', 'hf://x/y', '../canary', b'', b'\xff', picture(), {'bytes': None, 'path': 5}, {'bytes': 7, 'path': None}, {'bytes': None, 'path': '/dev/zero'},
                           {'bytes': None, 'path': 'hf://a/b'}, {'bytes': None, 'path': 'http://127.0.0.1:9/x'}, {'bytes': picture(), 'path': None}, {'raw': 'a'}, {'caption': [1]}, ['a', 'b'], [], [['a']], [[[None]]], [picture()]))
FEATURES = some.sampled_from(({'_type': 'Image'}, {'_type': 'Audio'}, {'_type': 'Value', 'dtype': 'int8'}, {'_type': 'ClassLabel', 'names': ['a']}, {'_type': 'Nonsense'}, {'_type': 'Array2D', 'shape': [9**9, 9**9], 'dtype': 'int8'}, [], 7, None))


@some.composite
def tables(draw):
    "A Parquet file with columns of the wrong names and types, and with wrong words about them"
    columns = draw(some.dictionaries(COLUMN, CELLS, min_size=1, max_size=4))
    if draw(some.booleans()): columns |= {'image': picture(), 'caption': draw(CELLS)}
    made = pa.table({name: pa.array([cell] * 2) for name, cell in columns.items()})
    if draw(some.booleans()): made = made.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': {name: draw(FEATURES) for name in columns}}})})
    out = io.BytesIO()
    parquet.write_table(made, out)
    return out.getvalue()


@some.composite
def tars(draw):
    "A tar of odd members: links, devices, names that lead away, sizes that lie, headers without end"
    out = []
    for _ in range(draw(some.integers(1, 6))):
        name = draw(some.sampled_from(('0.png', '0.txt', '0.json', '1.png', '1.json', '0.png.gz', '../canary', '/canary', '0.cls', '0.npy', '0.npz', '0.pth', '0.pyd', '0.pickle', '0.mp', '.txt', 'a', '\0', '0.' + 'x' * 300)))
        info, content = tarfile.TarInfo(name), draw(some.sampled_from((picture(), b'a fish', b'{"caption": "a"}', b'[1]', *JUNK)) | some.binary(max_size=20))
        info.size, info.type = len(content), draw(some.sampled_from((tarfile.REGTYPE,) * 4 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, b'Z')))
        info.linkname = draw(some.sampled_from(('', '../canary', '/dev/zero', name)))
        info.pax_headers = draw(some.sampled_from(({}, {'size': '9' * 30}, {'path': '../canary'}, {'GNU.sparse.map': '0,1', 'GNU.sparse.size': '9999'}, {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': '-5'})))
        out.append((info, content))
    return tar(*out)


TENSORS = some.sampled_from((torch.zeros(()), torch.zeros(0), torch.zeros(2, 3), torch.zeros(4, 8, dtype=torch.int8), torch.full((4, 8), float('nan')), torch.zeros(1).expand(2**20, 2**20), torch.zeros(2, 2).to_sparse()))
STATES = some.dictionaries(some.sampled_from((*VQGAN, 'module.tok_embeddings.weight', 'norm.weight', 'rows', 'state_dict', 'loss.x', 'ema_encoder.x', '')), TENSORS | LEAVES, max_size=5)
ROWS = some.dictionaries(some.sampled_from(('rows', 'x')), TENSORS.filter(lambda t: not t.is_sparse and t.numel() < 99) | some.just(torch.zeros(4, 8, dtype=torch.bfloat16)), max_size=2).map(lambda tensors: safetensors({name: t.clone() for name, t in tensors.items()}))

READERS = {
    'folder with metadata.jsonl': Reader(60, lambda: {'0.png': picture(), '1.jpg': picture('JPEG'), 'metadata.jsonl': lines([{'file_name': '0.png', 'caption': 'a'}, {'file_name': '1.jpg', 'caption': 'b'}])}, read_captions,
                                         odd={'metadata.jsonl': some.sampled_from(('../canary', '/etc/passwd', 'http://127.0.0.1:9/x', 'zip://a::b', '/dev/zero', '', '.', '\0')).map(lambda name: lines([{'file_name': name, 'caption': 'a'}]))}),
    'folder with texts': Reader(150, lambda: {'0.png': picture(), '0.txt': b'a fish', '1.webp': picture('WEBP'), '1.txt': 'naïve 日本'.encode()}, read_captions),
    'folder of COCO': Reader(250, lambda: COCO, read_captions),
    'saved data set': Reader(120, saved_pairs, read_captions),
    'Parquet': Reader(100, lambda: {'a.parquet': table({'image': [picture()] * 3, 'caption': ['a fish', 'b', 'c']})}, lambda folder: read_captions(folder/'a.parquet'), odd={'a.parquet': tables()}),
    'tar': Reader(120, lambda: {'a.tar': tar(*((f'{i}.{kind}', content) for i in range(3) for kind, content in (('png', picture()), ('txt', b'a fish'), ('json', b'{"caption": "a", "n": 1}'))))},
                  lambda folder: read_captions(folder/'a.tar'), odd={'a.tar': tars()}),
    'images': Reader(500, lambda: {f'{kind}{mode}': picture(kind, mode) for kind, mode in (('PNG', 'RGB'), ('PNG', 'P'), ('PNG', 'I;16'), ('PNG', 'RGBA'), ('JPEG', 'RGB'), ('WEBP', 'RGB'), ('GIF', 'P'), ('BMP', 'RGB'), ('TIFF', 'RGB'),
                                    ('PPM', 'RGB'), ('JPEG2000', 'RGB'), ('AVIF', 'RGB'))}, lambda folder: [read_image(file.read_bytes()) for file in sorted(folder.iterdir())]),
    'prose': Reader(60, lambda: {'a.txt': b'\n\n'.join(b'paragraph %d' % i for i in range(40))}, lambda folder: data.load_prose(str(folder/'a.txt'))),
    'token store': Reader(400, lambda: token_store(3), read_store, seal_store),
    'token store in shards': Reader(300, lambda: token_store(2, 1), read_store, seal_store),
    'token store, not verified': Reader(200, lambda: token_store(2, 1), lambda folder: read_store(folder, False), seal_store),
    'progress of a store': Reader(200, lambda: token_store(3) | {'progress.json': json.dumps(dict(of=['a', 'b'], row=4, kept=3, code_bytes=16, caption_bytes=20, report={'kept': 3})).encode()}, read_progress),
    'image tokenizer': Reader(60, image_tokenizer, lambda folder: tokenizers.load_image_tokenizer(str(folder)).grid(16)),
    'run': Reader(400, lambda: RUN, read_run, seal_run),
    'checkpoint of a run': Reader(150, checkpoint, training.find_checkpoint),
    'config of a run': Reader(150, lambda: RUN, lambda folder: training.run_config(folder)),
    'config of a run that paints': Reader(100, lambda: RUN, generation._record),
    'rows': Reader(150, lambda: {'rows.safetensors': safetensors({'rows': torch.ones(4, 8)})}, read_rows, odd={'rows.safetensors': ROWS}),
    'alignment': Reader(150, alignment, Aligned, seal_alignment),
    'evaluation': Reader(300, lambda: {'evaluations/text.json': json.dumps(EVALUATION).encode()}, lambda folder: evaluation.one_protocol(evaluation.load_evaluations([folder]))),
    'evaluation that goes on': Reader(150, lambda: {'evaluations/text.json': json.dumps(EVALUATION).encode()},
                                      lambda folder: evaluation._record(types.SimpleNamespace(folder=folder, name='r'), 'text', EVALUATION['protocol'])),
    'tally': Reader(60, lambda: {'t.safetensors': safetensors(dict(sum=torch.zeros(2).double(), cov=torch.zeros(2, 2).double(), n=torch.tensor(0), next=torch.tensor(0), done=torch.tensor(False)))},
                    lambda folder: evaluation.Tally(types.SimpleNamespace(num_features=2), folder/'t.safetensors').n),
    'task': Reader(300, lambda: {'a.yaml': TASK}, lambda folder: [evaluation._data(config) for config in evaluation.find_tasks(str(folder/'a.yaml'), None).values()]),
    'findings': Reader(100, finding, read_report),
    'config of open_lm': Reader(300, lambda: {'a.json': json.dumps(OPEN_LM).encode()}, lambda folder: open_lm.stablelm_config(open_lm.read_config(folder/'a.pt'))),
    'checkpoint of open_lm': Reader(200, lambda: {'a.pt': packed({'state_dict': {'module.tok_embeddings.weight': torch.zeros(3, 2)}})}, lambda folder: open_lm.open_checkpoint(folder/'a.pt'), odd={'a.pt': STATES.map(packed)}),
    'checkpoint of a VQGAN': Reader(200, lambda: {'a.ckpt': packed(VQGAN)}, lambda folder: vqgan.vqgan_sizes(vqgan.read_vqgan(folder/'a.ckpt')[0]), odd={'a.ckpt': STATES.map(packed)}),
    'config of a VQGAN': Reader(300, lambda: {'a.yaml': CONFIG_OF_VQGAN}, lambda folder: vqgan.check_vqgan_config(folder/'a.yaml', vqgan.vqgan_sizes(VQGAN))),
    'part of a store': Reader(100, lambda: {'codes.bin': b'ab', 'captions.jsonl': b'{}\n', 'part.json': json.dumps(dict(kept=1, report={'kept': 1}, failures=[{'row': 1}], sha256={'codes.bin': sha(b'ab'), 'captions.jsonl': sha(b'{}\n')})).encode()}, read_parts),
}


# Odd values

NAMES = some.sampled_from([f.name for f in dataclasses.fields(training.Config)])
NEAR = some.builds(lambda name, at, letter: name[:at] + letter + name[at + 1:], NAMES, some.integers(0, 8), some.sampled_from(string.ascii_lowercase + '_ 0'))
CHANGES = some.dictionaries(some.one_of(NAMES, NAMES, NAMES, NEAR, some.text(max_size=5)), VALUES, max_size=3)
SOURCES = some.one_of(VALUES, some.sampled_from(('/dev/zero', '/dev/stdin', 'a{0..99999999999}.tar', '{a,b' * 300 + '}' * 300, 'a/' * 5000, '~root/x', 'hub:', 'hub:x/y', 'x/y:z', 'a\0.parquet', '[a-', 'cc3m', 'flickr8k')),
                      some.text(alphabet='a/.*?[]{},~\0:-0', max_size=12).filter(lambda name: name[:1] not in ('/', '~') and '..' not in name))  # the root and the home are long to read through
WORDS = some.sampled_from(('image', 'caption', 'caption.x', 'caption_{0..99999999999}', '{image,caption}', '{{}}', 'caption.', '.', '', None)) | VALUES


def typed(changes):
    "What a run would be asked for: every field is of its type and can be printed, named and recorded"
    config = training.make_config(**{'preset': 'smoke'} | changes)
    assert all(type(getattr(config, f.name)) is f.type for f in dataclasses.fields(config))
    assert len(training.run_id(config, {}).encode()) < 256 and 0 <= training.lr_at(config, 0) < float('inf')


VALUE_READERS = {  # name: (cases, what is drawn, what is called with it)
    'fields of a config': (1200, CHANGES, typed),
    'preset': (100, VALUES, lambda value: training.make_config(value)),
    'parameters on the command line': (500, some.lists(some.text(max_size=6) | some.builds('{}={}'.format, NAMES, some.text(alphabet='019.e-+[](){}"\'\\,:_xjTrueN', max_size=12) | VALUES.map(str)) | some.sampled_from(
        ('steps=' + '(' * 5000, 'steps=' + '-' * 100_000 + '1', 'lr=' + '9' * 5000, 'lm={[]: 1}', 'lm={{}}', 'a=\0', 'a=__import__("os").mknod("canary")')), max_size=2), lambda pairs: typed(parse_parameters(pairs))),
    'name of a source': (300, SOURCES, data.load_captions),
    'sources in a list': (60, some.lists(SOURCES, max_size=3), data.load_captions),
    'columns and sizes': (200, some.fixed_dictionaries({}, optional=dict(split=VALUES, px=VALUES, limit=VALUES, image_column=WORDS, caption_column=WORDS, validation_fraction=VALUES, captions=VALUES, dedup=VALUES)),
                          lambda options: [row for row in data.load_captions('valid', **options)]),
    'image in memory': (300, VALUES | some.binary(max_size=40), read_image),
    'name of a prose file': (150, VALUES, data.load_prose),
    'name of an image tokenizer': (150, VALUES.map(str), tokenizers.load_image_tokenizer),
    'name of a preset with findings': (100, VALUES, report.load_findings),
    'name of an open_lm config': (150, VALUES.map(str), lambda name: open_lm.stablelm_config(open_lm.read_config('a.pt', name))),
    'name of an open_lm checkpoint': (100, VALUES.map(str), open_lm.open_checkpoint),
    'name of a VQGAN': (100, VALUES.map(str), vqgan.read_vqgan),
    'names of tasks': (150, some.lists(VALUES.map(str), max_size=2), lambda names: evaluation.find_tasks(names, None)),
    'name of a run': (150, VALUES.map(str), lambda name: [read(name) for read in (training.kept, generation._record, training.load_run, evaluation.subject) if not refused(read, name)]),
    'name of a language model': (100, VALUES.map(str), models.fingerprint_lm),
    'folders of weights': (100, some.lists(some.text(alphabet='0127²٣x-', min_size=1, max_size=3), max_size=4), read_weights),
    'names of runs': (100, some.lists(VALUES.map(str), max_size=2), evaluation.load_evaluations),
}


# Bombs: small files that stand for gigabytes, and files without end

def png(width, height, depth=1, kind=0, rows=None):
    "A whole PNG of equal pixels, whatever its size"
    def chunk(name, content): return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    pack, row = zlib.compressobj(9), bytes(1 + -(-width * depth * {0: 1, 6: 4}[kind] // 8))
    body = b''.join(pack.compress(row) for _ in range(height if rows is None else rows)) + pack.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def sparse(path, size):
    with open(path, 'wb') as file: file.truncate(size)


def member(name, content=b'', **fields):
    info = tarfile.TarInfo(name)
    for field, value in (dict(size=len(content)) | fields).items(): setattr(info, field, value)
    return info, content


def zipped(path):
    "A torch file whose pickle is packed"
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name in ('data.pkl', 'version'): file.writestr(f'archive/{name}', bytes(100 * 2**20 if name == 'data.pkl' else 1))


def rows(path, **columns): parquet.write_table(pa.table(columns), path)


def repeated(value, n): return pa.DictionaryArray.from_arrays(np.zeros(n, 'int32'), [value])


LAUGHS = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(f'{b}: &{b} [{", ".join([f"*{a}"] * 9)}]\n' for a, b in zip('abcdefghij', 'bcdefghijk')) + 'task: t\nddconfig: *k\n'
MB = 2**20
BOMBS = {  # name: (file, what makes it, what reads it, MB that it may take)
    'image: PNG of 60,000 x 60,000': ('a.png', lambda path: path.write_bytes(png(60_000, 60_000, rows=9)), read_image, 50),
    'image: PNG of 3,999 x 3,999, alpha': ('a.png', lambda path: path.write_bytes(png(3999, 3999, 8, 6)), read_image, 350),
    'image: a device without end': ('a', lambda path: None, lambda path: read_image('/dev/zero'), 150),
    'image: a file of 20 GB': ('a.png', lambda path: sparse(path, 20_000 * MB), read_image, 150),
    'caption: a text of 20 GB': ('0.txt', lambda path: (sparse(path, 20_000 * MB), path.with_name('0.png').write_bytes(picture())), lambda path: data.load_captions(path.parent, 'all', 16).captions(), 50),
    'metadata.jsonl: a line of 20 MB': ('metadata.jsonl', lambda path: (path.write_bytes(lines([{'file_name': '0.png', 'caption': 'x' * 20 * MB}])), path.with_name('0.png').write_bytes(picture())), lambda path: read_captions(path.parent), 400),
    'tar: compressed': ('a.tar', lambda path: path.write_bytes(gzip.compress(tar(member('0.png', bytes(100 * MB)), member('0.txt', b'a')))), read_captions, 50),
    'tar: a sparse member of 8 GB': ('a.tar', lambda path: path.write_bytes(tar(member('0.png', b'x', pax_headers={'GNU.sparse.map': '0,1', 'GNU.sparse.size': str(8000 * MB)}), member('0.txt', b'a'))), read_captions, 400),
    'tar: many sparse members of one sample': ('a.tar', lambda path: path.write_bytes(tar(*(member(f'0.png{i}', b'x', pax_headers={'GNU.sparse.map': '0,1', 'GNU.sparse.size': str(60 * MB)}) for i in range(50)))), read_captions, 600),
    'tar: a packed member': ('a.tar', lambda path: path.write_bytes(tar(member('0.png.gz', gzip.compress(bytes(100 * MB))), member('0.txt', b'a'))), read_captions, 50),
    'tar: an array of 10^10 numbers': ('a.tar', lambda path: path.write_bytes(tar(member('0.png', picture()), member('0.txt', b'a'), member('0.npy', b"\x93NUMPY\x01\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000,)}".ljust(127) + b'\n'))), read_captions, 50),
    'Parquet: a caption of 4 MB, 50 times': ('a.parquet', lambda path: rows(path, image=repeated(picture(), 50), caption=repeated('x' * 4 * MB, 50)), read_captions, 900),
    'Parquet: 10^7 empty rows': ('a.parquet', lambda path: rows(path, image=pa.nulls(10**7), caption=pa.nulls(10**7)), lambda path: data.load_captions(path, 'all', 16), 200),
    'JSON: a file of 20 GB': ('captions_a.json', lambda path: sparse(path, 20_000 * MB), data.load_captions, 50),
    'YAML: aliases of aliases': ('a.yaml', lambda path: path.write_text(LAUGHS), lambda path: [evaluation._data(task) for task in evaluation.find_tasks(str(path), None).values()], 50),
    'YAML: aliases in the config of a VQGAN': ('a.yaml', lambda path: path.write_text(LAUGHS), lambda path: vqgan.check_vqgan_config(path, {'ch': 1}), 50),
    'checkpoint: a packed pickle (open_lm)': ('a.pt', zipped, open_lm.open_checkpoint, 50),
    'checkpoint: a packed pickle (VQGAN)': ('a.ckpt', zipped, vqgan.read_vqgan, 50),
    'image tokenizer: a config of 10^10 codes': ('config.json', lambda path: [(path.parent/name).write_bytes(content.replace(b'"num_vq_embeddings": 16', b'"num_vq_embeddings": 10000000000')) for name, content in image_tokenizer().items()],
                                                 lambda path: tokenizers.load_image_tokenizer(str(path.parent)), 50),
    'name: {0..99999999999}': ('a', lambda path: None, lambda path: data.load_captions('{0..999999999}.tar'), 50),
}


def drop_bombs(place):
    "In a process of its own: the MB that each bomb takes, and what became of it"
    out = {}
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)                   # a reader that believes a bomb fails, the machine does not
    for name, (file, make, read, _) in BOMBS.items():
        fill(place/'case', {})
        make(place/'case'/file)
        Path('/proc/self/clear_refs').write_text('5')                            # the peak begins anew
        before, start = memory('VmRSS'), time.perf_counter()
        try: read(place/'case'/file); said = 'read'
        except BadInput as error: said = f'refused: {error}'
        except BaseException as error: said = f'{type(error).__name__}: {error}'
        out[name] = dict(mb=round(memory('VmHWM') - before, 1), seconds=round(time.perf_counter() - start, 2), said=said[:300])
    return out




def fill(folder, files):
    "Make a folder anew"
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir(parents=True)
    for name, content in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True); (folder/name).write_bytes(content)


# The contract

@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path, own_place):
    "A folder that holds `case`, what is read, and nothing else that a reader may touch but caches"
    for name, folder in (('WORK', 'case'), ('CACHE', 'cache'), ('DATA', 'sets')): monkeypatch.setenv(f'T2I_{name}', str(tmp_path/folder))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'hf')
    monkeypatch.chdir(tmp_path)
    fill(tmp_path/'valid', {'0.png': picture(), '0.txt': b'a fish'})
    logging.disable(logging.CRITICAL)
    yield tmp_path
    logging.disable(logging.NOTSET)


@pytest.fixture(scope='module', autouse=True)
def counts():
    "What was tried, as a table in JSON"
    yield
    if os.environ.get('T2I_FUZZ_COUNTS'): Path(os.environ['T2I_FUZZ_COUNTS']).write_text(json.dumps(COUNTS, indent=1) + '\n')


def keeps_the_contract(name, cases, strategy, read):
    "Read what is drawn; only a `BadInput` of one line may come out of it, and nothing may be left behind"
    seen, start = Counter(), time.perf_counter()
    Path('/proc/self/clear_refs').write_text('5')
    before = memory('VmRSS')

    @settings(max_examples=round(cases * TIMES), derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(drawn):
        seen['cases'] += 1
        try: read(drawn)
        except BadInput as error:
            seen['refused'] += 1
            assert str(error) and '\n' not in str(error)
        assert {path.name for path in Path().iterdir()} <= {'case', 'cache', 'hf', 'valid'} and not Path('../canary').exists() and not Path('/canary').exists()
        assert not list(Path('case').rglob('.*.tmp'))

    check()
    COUNTS[name] = dict(seen, seconds=round(time.perf_counter() - start, 1), peak_mb=round(memory('VmHWM') - before, 1))
    assert COUNTS[name]['peak_mb'] < 600


@pytest.mark.parametrize('name', READERS)
def test_a_damaged_file(name, place):
    "Every valid folder is read; with one file of it damaged it is read or refused"
    reader, valid = READERS[name], READERS[name].valid()

    def read(drawn):
        file, content, sealed = drawn
        fill(place/'case', valid | {file: content})
        if sealed and reader.seal:
            with contextlib.suppress(Exception): reader.seal(place/'case')
        reader.read(place/'case')

    read((next(iter(valid)), next(iter(valid.values())), True))
    one = lambda file: some.tuples(some.just(file), contents(file, valid[file]) | reader.odd.get(file, some.nothing()), some.booleans())
    keeps_the_contract(name, reader.cases, some.one_of([one(file) for file in valid]), read)


@pytest.mark.parametrize('name', VALUE_READERS)
def test_an_odd_value(name):
    cases, strategy, read = VALUE_READERS[name]
    keeps_the_contract(name, cases, strategy, read)


def test_bombs(place):
    "Each is read or refused within the memory that is stated beside it"
    out = subprocess.run([sys.executable, __file__], cwd=place, capture_output=True, text=True, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'}).stdout
    COUNTS['bombs'] = found = json.loads(out.splitlines()[-1])
    assert [(name, one) for name, one in found.items() if one['mb'] > BOMBS[name][3] or not one['said'].startswith(('read', 'refused: '))] == []
    assert list(found) == list(BOMBS) and not (place/'canary').exists()


if __name__ == '__main__':
    datasets.config.HF_DATASETS_CACHE = Path('hf').absolute()
    datasets.disable_progress_bars(); logging.disable(logging.CRITICAL)
    print(json.dumps(drop_bombs(Path.cwd())))
