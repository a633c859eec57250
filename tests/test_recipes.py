"Recipes, several captions, near-duplicates, and what a hostile or broken source may do: nothing."
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from t2ianalysis import data, recipes
from t2ianalysis.cli import app
from t2ianalysis.data import BadInput, in_validation, load_captions
from t2ianalysis.recipes import RECIPES, Near, image_hash, resolve
from t2ianalysis.tokenizers import tokenize_captions


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory):
    "A folder for data sets, caches and relative paths of a test's own"
    place = tmp_path_factory.mktemp('place')
    monkeypatch.setenv('T2I_DATA', str(place/'sets'))
    monkeypatch.setenv('T2I_CACHE', str(place/'cache'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', place/'hf')
    monkeypatch.chdir(place)
    return place


def sketch(seed, shift=0):
    "A few coloured shapes; another seed gives another picture, a shift nearly the same"
    rng = np.random.default_rng(seed)
    image = Image.new('RGB', (64, 64), 'white')
    for _ in range(4):
        x, y, w, h = rng.integers(0, 40, 4) + (0, 0, 12, 12)
        ImageDraw.Draw(image).ellipse((x + shift, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


def encoded(image, kind='PNG', **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str): member.type, member.linkname = tarfile.SYMTYPE, content
            else: member.size = len(content)
            file.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def shard(path, rows, extra=None):
    "One tar as img2dataset writes it: .jpg, .txt, .json"
    return tar(path, [m for i in rows for m in ((f'{i:09}.jpg', encoded(sketch(i), 'JPEG')), (f'{i:09}.txt', f'sketch {i}'.encode()),
                                               (f'{i:09}.json', json.dumps({'caption': f'sketch {i}', 'url': f'u{i}'} | (extra or {})).encode()))])


def coco(folder, split='val2014', n=8, **changes):
    "COCO's layout; ids are neither dense nor in order"
    (folder/'annotations').mkdir(parents=True, exist_ok=True), (folder/split).mkdir()
    images = [{'id': 7 * i + 3, 'file_name': f'COCO_{split}_{7 * i + 3:012}.jpg', 'license': i % 2, 'height': 64, 'width': 64} for i in range(n)]
    for i, image in enumerate(images): sketch(i).save(folder/split/image['file_name'])
    captions = [{'id': 100 * (5 - k) + n - i, 'image_id': images[i]['id'], 'caption': f'picture {i} in words {k}'} for k in range(5) for i in range(n)]
    content = {'info': {}, 'licenses': [{'id': 0, 'name': 'CC BY'}, {'id': 1, 'name': 'CC BY-SA'}], 'images': images[::-1], 'annotations': captions} | changes
    path = folder/'annotations'/f'captions_{split}.json'
    path.write_text(json.dumps(content))
    return path


def with_captions(path, captions, images=None):
    "A Parquet file with a list of captions an image"
    images = images or [encoded(sketch(i)) for i in range(len(captions))]
    datasets.Dataset.from_dict({'image': images, 'caption': captions}).to_parquet(path)
    return path


def plain(pairs): return [(p['row'], p['caption'], p['image'].tobytes()) for p in pairs]


# Recipes
def test_every_recipe_says_what_it_must():
    for name, recipe in RECIPES.items():
        assert re.fullmatch(r'[\w-]+', name) and name in recipes.list_recipes()
        assert all(getattr(recipe, field) for field in ('what', 'rows', 'size', 'licence', 'citation', 'get', 'sources', 'folder'))
        assert recipe.hub or 'data/' + recipe.folder in recipe.get
    out = CliRunner().invoke(app, ['data', '--list'])
    assert out.exit_code == 0 and all(name in out.output for name in RECIPES)


def test_tars_of_a_recipe_in_either_layout(own_places):
    "As the hub has them, validation left out; as img2dataset writes them, with the metadata in Parquet files of the same name"
    sets = own_places/'sets'
    shard(sets/'cc3m'/'cc3m-train-0000.tar', range(6)), shard(sets/'cc3m'/'cc3m-validation-0000.tar', range(6, 12))
    pairs = load_captions('cc3m', 'all', 16)
    assert [p['caption'] for p in pairs] == [f'sketch {i}' for i in range(6)] and pairs.spec['kind'] == 'webdataset'
    for part in range(2):
        shard(sets/'cc12m'/f'{part:05}.tar', range(5 * part, 5 * part + 5))
        datasets.Dataset.from_dict({'key': ['a'], 'caption': ['b'], 'url': ['c']}).to_parquet(sets/'cc12m'/f'{part:05}.parquet')
        (sets/'cc12m'/f'{part:05}_stats.json').write_text('{}')
    by_name, by_path = load_captions('cc12m', 'all', 16), load_captions(sets/'cc12m', 'all', 16)
    assert plain(by_name) == plain(by_path) and by_name.report == {'kept': 10} and by_name.fingerprint == by_path.fingerprint
    shard(sets/'datacomp-small'/'shards'/'00000000.tar', range(5), {'all_captions': ['seen', 'read']})
    (sets/'datacomp-small'/'metadata').mkdir()
    datasets.Dataset.from_dict({'uid': ['a'], 'text': ['b']}).to_parquet(sets/'datacomp-small'/'metadata'/'x.parquet')
    assert len(list(load_captions('datacomp-small', 'all', 16))) == 5
    assert set(load_captions('datacomp-small', 'all', 16, caption_column='json.all_captions', captions='each').captions()) == {'seen', 'read'}


def test_the_places_in_their_order(own_places, monkeypatch):
    monkeypatch.setenv('T2I_WORK', str(own_places/'work'))
    for k, place in enumerate(('cc12m', 'work/data/cc12m', 'data/cc12m', 'sets/cc12m')):
        shard(own_places/place/'0.tar', range(100 * k, 100 * k + 5))
        assert next(load_captions('cc12m', 'all', 16).captions()) == f'sketch {100 * k}'


def test_a_folder_of_ones_own_by_name(own_places, make):
    (own_places/'sets').mkdir()
    make['pairs'](own_places/'sets'/'fish', 4)
    assert load_captions('fish', 'all', 16).fingerprint == load_captions(own_places/'sets'/'fish', 'all', 16).fingerprint
    with pytest.raises(BadInput, match=r"source 'fisch' is unknown: give .*t2i data --list"): load_captions('fisch')
    with pytest.raises(BadInput, match=r"'cc12' is unknown.* Did you mean 'cc12m'\?"): load_captions('cc12')


def test_without_folder_and_hub_one_sentence_says_how(monkeypatch):
    code = "from t2ianalysis.data import load_captions, BadInput\nfor name in ('cc12m', 'flickr8k', 'coco-2014'):\n    try: load_captions(name)\n    except BadInput as error: print(error)"
    out = subprocess.run([sys.executable, '-c', code], env=os.environ | {'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(Path(data.__file__).parent.parent)}, capture_output=True, text=True, timeout=120)
    cc, flickr, mscoco = out.stdout.splitlines()
    assert "'hub:pixparse/cc12m-wds' cannot be loaded" in cc and '`hf download pixparse/cc12m-wds --repo-type dataset --local-dir data/cc12m' in cc and "brings 'cc12m'" in cc
    assert 'hf download jxie/flickr8k' in flickr and "'coco-2014' is not on this machine: `(mkdir -p data/coco-2014" in mscoco and 'train2014.zip' in mscoco
    out = CliRunner().invoke(app, ['data', 'coco-30k'])
    assert isinstance(out.exception, BadInput) and 'val2014.zip' in str(out.exception)


def test_the_hub_serves_a_recipe_with_its_columns(monkeypatch):
    rows = datasets.Dataset.from_dict({'image': [encoded(sketch(i)) for i in range(3)]} | {f'caption_{k}': [f'{i} in words {k}' for i in range(3)] for k in range(5)})

    class Builder:
        hash = 'revision'
        def as_streaming_dataset(self): return {'train': rows.to_iterable_dataset()}
    opened = []
    monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', lambda self, name, **options: opened.append(name))
    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *args, **options: Builder())
    pairs = load_captions('flickr8k', 'all', 16, captions='each')
    assert [p['caption'] for p in pairs] == [f'{i} in words {k}' for i in range(3) for k in range(5)]
    assert opened == ['jxie/flickr8k'] and pairs.spec['name'] == 'jxie/flickr8k' and pairs.source == 'flickr8k'
    assert list(load_captions('flickr8k', 'all', 16).captions()) == [f'{i} in words 0' for i in range(3)]
    with pytest.raises(BadInput, match=r"caption_column 'caption_5' does not exist: the source has 'image', 'caption_0'"): load_captions('flickr8k', caption_column='caption_{4..5}')


# COCO
def test_coco_by_name_by_file_and_as_a_sample(own_places, monkeypatch):
    folder = own_places/'sets'/'coco-2014'
    file = coco(folder)
    pairs = load_captions('coco-2014-val', 'all', 16, captions='each')
    assert [p['caption'] for p in pairs] == [f'picture {i} in words {k}' for i in range(8) for k in (4, 3, 2, 1, 0)]  # images by id, captions by id
    assert {p['licence'] for p in pairs} == {'CC BY', 'CC BY-SA'} and pairs.report == {'kept': 40}
    first = load_captions(file, 'all', 16)
    assert list(first.captions()) == [f'picture {i} in words 4' for i in range(8)] and first.fingerprint == load_captions('coco-2014-val', 'all', 16).fingerprint
    assert load_captions(folder, 'all', 16).fingerprint == first.fingerprint  # the folder itself
    with pytest.raises(BadInput, match='has 8 images with captions, not the 30,000 of the sample'): load_captions('coco-30k', 'all')
    monkeypatch.setitem(RECIPES, 'coco-30k', replace(RECIPES['coco-30k'], sample=5))
    drawn = load_captions('coco-30k', 'all', 16)
    shown = list(drawn)
    assert len({p['image'].tobytes() for p in shown}) == len(shown) == 5 and plain(shown) == plain(load_captions('coco-30k', 'all', 16))
    whole = {(p['caption'], p['image'].tobytes()) for p in pairs}
    assert {(p['caption'], p['image'].tobytes()) for p in shown} < whole  # still its own caption
    assert drawn.spec['sample'] == 5 and drawn.fingerprint != first.fingerprint
    image = next((folder/'val2014').iterdir())
    image.write_bytes(encoded(sketch(99)))
    assert load_captions(file, 'all', 16).fingerprint != first.fingerprint


def test_the_sample_takes_any_caption_of_any_image():
    rows = [(i, [f'{i}-{k}' for k in range(5)]) for i in range(200)]
    drawn = recipes._drawn(rows, 100)
    assert len(dict(drawn)) == 100 and all(caption.startswith(f'{i}-') for i, caption in drawn)
    assert sorted(count > 8 for count in Counter(caption[-1] for _, caption in drawn).values()) == [True] * 5 and recipes._drawn(rows, 10) == drawn[:10]


@pytest.mark.parametrize('changes, match', [
    ({'images': []}, "has no 'images'"), ({'annotations': None}, "has no 'annotations'"), ({'images': [{'id': 1}]}, "lacks the field 'file_name'"),
    ({'annotations': [{'id': 1, 'image_id': 3, 'category_id': 1}]}, "lacks the field 'caption'"), ({'annotations': [{'id': 1, 'image_id': 4, 'caption': 'x'}]}, 'caption of image 4, which is not among'),
    ({'images': [{'id': 3, 'file_name': '../../secret.png'}]}, "'../../secret.png', which is no plain file name"), ({'images': [{'id': 3, 'file_name': '/etc/x.png'}]}, 'no plain file name'),
    ({'images': [{'id': 7 * i + 3, 'file_name': f'COCO_train2014_{i}.jpg'} for i in range(8)]}, 'COCO_train2014_0.jpg, of which none is in .*annotations of another split'),
    ({'images': 7}, 'lacks the field')])
def test_a_wrong_annotation_file_is_named(tmp_path, changes, match):
    with pytest.raises(BadInput, match=match): load_captions(coco(tmp_path, **changes))


def test_coco_with_parts_missing(tmp_path, own_places):
    file = coco(tmp_path)
    gone = sorted((tmp_path/'val2014').iterdir())[2]
    gone.unlink()
    pairs = load_captions(file, 'all', 16)
    assert len(list(pairs)) == 7 and pairs.failures == [{'row': 2, 'reason': 'undecodable: file cannot be read'}]
    (tmp_path/'val2014').rename(tmp_path/'elsewhere')
    with pytest.raises(BadInput, match="the folder 'val2014' with its images is not in"): load_captions(file)
    file.write_text('{"images": [')
    with pytest.raises(BadInput, match='is not a JSON file'): load_captions(file)
    (own_places/'sets'/'coco-2014').mkdir(parents=True)
    with pytest.raises(BadInput, match=r'has no annotations/captions_train2014.json: `.*wget'): load_captions('coco-2014')


# Several captions
MANY = [['a cat', 'a small cat', 'a cat'], ['a dog'], [], ['', ' '], ['', 'two birds'], ['a cat', 'one more'], ['a fish', 'a dog', None, 'big\nfish']]


def test_first_and_each(tmp_path):
    path = with_captions(tmp_path/'many.parquet', MANY)
    first, each = load_captions(path, 'all', 16), load_captions(path, 'all', 16, captions='each')
    assert [p['caption'] for p in first] == ['a cat', 'a dog', 'a cat', 'a fish'] and first.report == {'kept': 4, 'empty caption': 3}
    shown = list(each)
    assert [p['caption'] for p in shown] == ['a cat', 'a small cat', 'a dog', 'two birds', 'a cat', 'one more', 'a fish', 'a dog', 'big fish']
    assert shown[0]['image'].tobytes() == shown[1]['image'].tobytes() != shown[2]['image'].tobytes()
    assert [p['row'] for p in shown] == [0, 1, 2, 5, 6, 7, 8, 9, 10] and each.report == {'kept': 9, 'empty caption': 2} and each.total is None
    assert list(each.captions()) == [p['caption'] for p in shown] and first.fingerprint != each.fingerprint
    with pytest.raises(BadInput, match="captions 'all' is unknown: give 'first'"): load_captions(path, captions='all')


@settings(max_examples=40, deadline=None)
@given(captions=st.lists(st.lists(st.sampled_from([f'words {i}' for i in range(9)]), max_size=4), min_size=1, max_size=9), fraction=st.sampled_from([0.0, 0.3, 0.5, 0.8]))
def test_neither_an_image_nor_a_caption_is_on_both_sides(captions, fraction):
    rows, sides = datasets.Dataset.from_dict({'image': [encoded(sketch(i)) for i in range(len(captions))], 'caption': captions}), {}
    for split in ('train', 'validation', 'all'):
        spec = {'caption_column': 'caption', 'image_column': 'image', 'limit': None, 'validation_fraction': fraction, 'captions': 'each'}
        pairs = data.Captions('here', split, 8, spec, rows, None)
        sides[split] = list(pairs)
        assert sum(pairs.report.values()) == sum(len(set(c)) or 1 for c in captions)
    for what in (lambda p: p['image'].tobytes(), lambda p: p['caption']):
        assert not {what(p) for p in sides['train']} & {what(p) for p in sides['validation']}
    assert all(in_validation(p['caption'], fraction) for p in sides['validation'])
    kept = {p['row'] for p in sides['train'] + sides['validation']}
    assert kept <= {p['row'] for p in sides['all']}
    leads, row = set(), 0
    for several in captions: leads, row = leads | ({row} if several else set()), row + (len(set(several)) or 1)
    assert leads <= kept  # the first caption is always used


@pytest.mark.parametrize('options', [{'captions': 'each'}, {'dedup': 2}, {'captions': 'each', 'dedup': 2}, {'captions': 'each', 'dedup': 2, 'limit': 7}, {'dedup': 0, 'limit': 4}])
def test_a_resumed_pass_equals_a_whole_one(tmp_path, options):
    images = [encoded(sketch(i % 6)) for i in range(14)] + [b'no image']
    path = with_captions(tmp_path/'x.parquet', [[f'{i} in words {k}' for k in range(1 + i % 3)] for i in range(15)], images)
    for split in ('all', 'train'):
        def load(split=split): return load_captions(path, split, 16, validation_fraction=0.4, **options)
        whole = load()
        pairs = plain(whole)
        for stop in range(1, len(pairs) + 1):
            first, rest = load(), load()
            head = [pair for _, pair in zip(range(stop), first, strict=False)]
            assert plain(head) + plain(rest.pairs(start=head[-1]['row'] + 1, kept=stop)) == pairs
            assert first.report + rest.report == whole.report and first.failures + rest.failures == whole.failures


# Near-duplicates
def brute(values, distance):
    "The same decisions, each against all that were kept"
    kept, twins = [], {}
    for i, value in enumerate(values):
        twins[i] = next((j for j in kept if (values[j] ^ value).bit_count() <= distance), None)
        if twins[i] is None: kept.append(i)
    return twins


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), distance=st.integers(0, 8))
def test_the_index_finds_what_a_comparison_with_all_finds(seed, distance):
    rng = np.random.default_rng(seed)
    roots = [int.from_bytes(rng.bytes(16), 'big') for _ in range(3)]
    values = [roots[rng.integers(3)] ^ sum(1 << int(b) for b in rng.permutation(128)[:rng.integers(0, 7)]) for _ in range(40)]
    index, twins = Near(distance), {}
    for i, value in enumerate(values):
        twins[i] = index.find(value)
        if twins[i] is None: index.add(value, i)
    assert twins == brute(values, distance)


def test_the_index_compares_few():
    rng, index = np.random.default_rng(0), Near(4)
    for i in range(3_000):
        value = int.from_bytes(rng.bytes(16), 'big')
        assert index.find(value) is None
        index.add(value, i)
    assert index.compared < 3_000  # of 4.5 million pairs


def test_the_hash_knows_copies_and_colours():
    for seed in range(20):
        image = sketch(seed)
        copy = Image.open(io.BytesIO(encoded(image.resize((120, 120), Image.Resampling.BICUBIC), 'JPEG', quality=85))).convert('RGB').resize((64, 64), Image.Resampling.BICUBIC)
        assert (image_hash(image) ^ image_hash(copy)).bit_count() <= 8
        assert (image_hash(image) ^ image_hash(sketch(seed + 100))).bit_count() > 8
    flags = [Image.new('RGB', (63, 63), 'white') for _ in range(2)]
    for flag, left, right in zip(flags, ((0, 85, 164), (0, 146, 70)), ((239, 65, 53), (206, 43, 55)), strict=True):  # France, Italy
        flag.paste(left, (0, 0, 21, 63)), flag.paste(right, (42, 0, 63, 63))
    assert (image_hash(flags[0]) ^ image_hash(flags[1])).bit_count() > 8
    assert image_hash(Image.new('RGB', (64, 64), 'white')) == image_hash(Image.new('RGB', (32, 32), 'white')) < 1 << 128


def test_near_duplicates_are_dropped_over_both_sides(tmp_path):
    seeds = [0, 1, 0, 2, 1, 3, 0, 4, 5, 5, 2, 6]
    path = with_captions(tmp_path/'x.parquet', [[f'{i} of {s}'] for i, s in enumerate(seeds)], [encoded(sketch(s, shift=0)) for s in seeds[:-1]] + [b'broken'])
    sides = {}
    for split in ('all', 'train', 'validation'):
        pairs = load_captions(path, split, 16, dedup=0, validation_fraction=0.5)
        sides[split] = list(pairs)
        assert sum(pairs.report.values()) == 12
        if split == 'all': whole = pairs
    assert [p['row'] for p in sides['all']] == [0, 1, 3, 5, 7, 8] and whole.report == {'kept': 6, 'duplicate': 5, 'undecodable: not an image': 1}
    assert sorted(p['row'] for p in sides['train'] + sides['validation']) == [0, 1, 3, 5, 7, 8] and len(sides['train']) not in (0, 6)
    assert [f for f in whole.failures if f['reason'] == 'duplicate'][0] == {'row': 2, 'reason': 'duplicate', 'image': 2, 'of': 0}
    assert '5 near-duplicates' in whole.summary() and load_captions(path, 'all', 16).spec.keys() == whole.spec.keys() - {'dedup'}
    for bad in (-1, 9, 1.0, True, '2'):
        with pytest.raises(BadInput, match=f'dedup {bad!r} is not a distance: give None, or a whole number of bits from 0 to 8'): load_captions(path, dedup=bad)


def test_the_first_of_an_image_without_caption_does_not_count(tmp_path):
    "What gives no pair must not drop one that does"
    path = with_captions(tmp_path/'x.parquet', [[''], ['a'], ['b']], [encoded(sketch(s)) for s in (0, 0, 0)])
    assert [p['row'] for p in load_captions(path, 'all', 16, dedup=0)] == [1]


def test_only_what_was_kept_drops_what_comes_later(tmp_path, monkeypatch):
    "The third is near the second, which was dropped, and not near the first"
    values = iter([0b000, 0b001, 0b011, 0b111, 0b000])
    monkeypatch.setattr(recipes, 'image_hash', lambda image: next(values))
    pairs = load_captions(with_captions(tmp_path/'x.parquet', [[f'{i}'] for i in range(5)]), 'all', 16, dedup=1)
    assert [p['row'] for p in pairs] == [0, 2] and [f['of'] for f in pairs.failures] == [0, 2, 0]


def test_hashes_are_made_once_and_a_damaged_file_of_them_is_mended(tmp_path, own_places, monkeypatch):
    path, counted = with_captions(tmp_path/'x.parquet', [[f'{i}'] for i in range(12)], [encoded(sketch(i % 8)) for i in range(12)]), []
    monkeypatch.setattr(recipes, 'image_hash', lambda image: counted.append(1) or image_hash(image))
    def run(**options): return plain(load_captions(path, **({'split': 'all', 'px': 16, 'dedup': 2} | options)))
    expected = run()
    assert len(counted) == 12 and run() == expected and run(split='train') is not None and run(dedup=4, limit=3) == expected[:3] and len(counted) == 12
    assert run(px=24) and len(counted) == 24  # an image at another size has another hash
    for file in (own_places/'cache'/'hashes').iterdir(): file.write_bytes(file.read_bytes()[:17 * 5 + 3])
    assert run() == expected and len(counted) == 31
    for file in (own_places/'cache'/'hashes').iterdir(): file.unlink()
    assert run() == expected


def test_a_killed_tokenising_pass_ends_in_the_same_bytes(tmp_path, vq):
    "With 'each', a kill falls between the captions of one image; with dedup, what was kept before decides"
    path = with_captions(tmp_path/'x.parquet', [[f'{i} in words {k}' for k in range(3)] for i in range(10)], [encoded(sketch(i % 7)) for i in range(10)])
    def load(): return load_captions(path, 'all', 16, captions='each', dedup=2)
    whole = tokenize_captions(load(), vq, tmp_path/'whole', batch=4, progress=False)

    class Killed:
        def __init__(self, after): self.left = after
        def __getattr__(self, name): return getattr(vq, name)
        def encode(self, pixels):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return vq.encode(pixels)
    for after in range(6):
        out = tmp_path/f'killed-{after}'
        if after < 5:
            with pytest.raises(KeyboardInterrupt): tokenize_captions(load(), Killed(after), out, batch=4, progress=False)
        again = tokenize_captions(load(), vq, out, batch=4, progress=False)
        assert again.fingerprint == whole.fingerprint and again.meta['report'] == whole.meta['report'] == {'kept': 21, 'duplicate': 9}
    assert [tuple(row) for row in whole.codes[:3]] == [tuple(whole.codes[0])] * 3


# What a source may not do
def test_a_tar_writes_nothing_outside_and_links_are_not_followed(tmp_path):
    secret = tmp_path/'secret.png'
    sketch(50).save(secret)
    inside = tmp_path/'deep'/'er'
    names = ['../../up', '/absolute', str(tmp_path/'there'), 'a/../../b', 'plain']
    good = [m for i, name in enumerate(names) for m in ((f'{name}.png', encoded(sketch(i))), (f'{name}.txt', f'number {i}'.encode()))]
    path = tar(inside/'x.tar', good + [('link.png', str(secret)), ('link.txt', b'linked'), ('y.txt', b'no image')])
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*'))
    for streaming in (True, False):
        pairs = load_captions(path, 'all', 16, streaming=streaming)
        shown = list(pairs)
        assert [p['caption'] for p in shown] == [f'number {i}' for i in range(5)] and pairs.report['undecodable: no image'] == 2
        assert data.decode_image(encoded(sketch(50)), 16).tobytes() not in {p['image'].tobytes() for p in shown}
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*')) == before and not Path('/absolute.png').exists()


def test_tars_are_read_in_passing(tmp_path):
    "The first pair needs the first rows of the first tar, and memory does not grow with the number of rows"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype='uint8')
    for part in range(4):
        tar(tmp_path/f'{part:05}.tar', [m for i in range(500) for m in ((f'{part}{i:04}.png', encoded(Image.fromarray(np.roll(noise, i, 0)), compress_level=0)), (f'{part}{i:04}.txt', b'noise'))])
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    (tmp_path/'00003.tar').write_bytes(b'broken')
    pairs = iter(load_captions(tmp_path, 'all', 16))
    tracemalloc.start()
    next(pairs)
    try:
        with pytest.raises(BadInput, match='cannot be read beyond row 1500'): print(sum(1 for _ in pairs))
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 2**21 < whole / 10


def test_metadata_whose_types_change_late(tmp_path):
    "img2dataset writes null for an error until the first error"
    path = tar(tmp_path/'0.tar', [m for i in range(12) for m in ((f'{i}.jpg', encoded(sketch(i), 'JPEG')), (f'{i}.txt', f'c {i}'.encode()),
                                                                   (f'{i}.json', json.dumps({'error': None if i < 8 else 'late', 'width': i if i < 9 else 1.5}).encode()))])
    assert len(list(load_captions(path, 'all', 16))) == 12


# The report
def test_failures_are_listed_up_to_a_bound(tmp_path, monkeypatch):
    path = with_captions(tmp_path/'x.parquet', [['a'], [''], ['b'], ['c'], ['d']], [encoded(sketch(0)), encoded(sketch(1)), b'no', encoded(sketch(0)), encoded(sketch(2))[:80]])
    out = CliRunner().invoke(app, ['data', str(path), '--split', 'all', '--px', '16', '--dedup', '0', '--failures', str(tmp_path/'f.jsonl')])
    assert out.exit_code == 0 and '1 pairs kept; 2 undecodable images, 1 empty captions, 1 near-duplicates' in out.output and '4 of 4 rows that gave no pair' in out.output
    assert [json.loads(line) for line in (tmp_path/'f.jsonl').read_text().splitlines()] == [
        {'row': 1, 'reason': 'empty caption'}, {'row': 2, 'reason': 'undecodable: not an image'}, {'row': 3, 'reason': 'duplicate', 'image': 3, 'of': 0},
        {'row': 4, 'reason': 'undecodable: truncated or damaged'}]
    pairs = load_captions(path, 'all', 16, dedup=0)
    list(pairs), list(pairs)
    assert len(pairs.failures) == 4  # a pass from row 0 counts afresh
    monkeypatch.setattr(data, 'MAX_FAILURES', 2)
    list(pairs)
    assert len(pairs.failures) == 2 and sum(pairs.report.values()) == 5
    assert recipes.write_failures(pairs, tmp_path/'g.jsonl').startswith('2 of 4 rows')
    train, validation = (load_captions(path, split, 16) for split in ('train', 'validation'))
    assert 'other split' not in {f['reason'] for pairs in (train, validation) if list(pairs) or True for f in pairs.failures}


def test_the_commands_take_the_options(own_places, vq_folder):
    coco(own_places/'sets'/'coco-2014', 'train2014'), coco(own_places/'sets'/'coco-2014', 'val2014')
    assert load_captions(own_places/'sets'/'coco-2014').fingerprint == load_captions('coco-2014').fingerprint  # train first
    out = CliRunner().invoke(app, ['data', 'coco-2014', '--split', 'all', '--px', '16', '--captions', 'each'])
    assert out.exit_code == 0 and '40 pairs kept' in out.output
    out = CliRunner().invoke(app, ['tokenize', 'coco-2014', '--image-tokenizer', str(vq_folder), '--split', 'all', '--px', '16', '--captions', 'each', '--dedup', '2'])
    assert out.exit_code == 0 and 'TokenStore(40 pairs' in out.output


# What was committed stays valid
def test_fingerprints_of_plain_sources_are_as_before():
    assert load_captions().fingerprint == '5775b4393b1f3ee8adf608f78ad5abc12db34d7b2f351592f30b1fa6b2ca4a94'
    assert set(load_captions(limit=3).spec) == {'kind', 'image_column', 'caption_column', 'split', 'validation_fraction', 'px', 'limit', 'preprocessing'}


def test_a_name_that_is_no_recipe_is_left_alone():
    assert resolve('no-such-thing') == {}
