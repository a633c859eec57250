"The data module: what a pair is, what is refused, and what a bad image costs."
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from t2ianalysis import data
from t2ianalysis.data import (
    BadInput,
    contact_sheet,
    decode_image,
    in_validation,
    load_captions,
    nearest,
    square,
    write_atomic,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    "Keep copies that `datasets` makes out of the user's cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def encoded(image, kind='PNG', **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(seed, size=(40, 30)):
    "A picture that differs for every seed and compresses badly"
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype='uint8')
    return Image.fromarray(values)


def png_header(width, height):
    "A valid PNG header of any size, and hardly any pixels"
    def chunk(name, body): return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0' * 100)) + chunk(b'IEND', b'')


# Five sources that hold the same pairs
CAPTIONS = [f'a drawing of number {i}' for i in range(12)]
IMAGES = [encoded(noise(i)) for i in range(12)]


def as_parquet(folder):
    table = datasets.Dataset.from_dict({'image': [{'bytes': b, 'path': None} for b in IMAGES], 'caption': CAPTIONS})
    table.cast_column('image', datasets.Image(decode=False)).to_parquet(folder/'pairs.parquet')
    return folder/'pairs.parquet'


def as_saved(folder):
    table = datasets.Dataset.from_dict({'image': [{'bytes': b, 'path': None} for b in IMAGES], 'caption': CAPTIONS})
    table.cast_column('image', datasets.Image()).save_to_disk(folder/'saved')
    return folder/'saved'


def as_imagefolder(folder, rows=None):
    for i, content in enumerate(IMAGES): (folder/f'train-{i:02}.png').write_bytes(content)
    (folder/'test-00.png').write_bytes(b'in no metadata')
    rows = [{'file_name': f'train-{i:02}.png', 'text': caption} for i, caption in enumerate(CAPTIONS)]
    (folder/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def as_texts(folder):
    for i, (content, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
        (folder/f'{i:02}.png').write_bytes(content)
        (folder/f'{i:02}.txt').write_text(caption + '\n')
    return folder


def tar(path, members):
    with tarfile.open(path, 'w') as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def as_tar(folder):
    return tar(folder/'pairs.tar', [m for i in range(12) for m in ((f'{i:02}.png', IMAGES[i]), (f'{i:02}.txt', CAPTIONS[i].encode()))])


def as_json_tars(folder):
    for shard in range(3):
        rows = range(4*shard, 4*shard + 4)
        tar(folder/f'shard-{shard:02}.tar', [m for i in rows for m in ((f'{i:02}.png', IMAGES[i]), (f'{i:02}.json', json.dumps({'caption': CAPTIONS[i], 'n': i}).encode()))])
    return folder/'shard-{00..02}.tar'


SOURCES = [as_parquet, as_saved, as_imagefolder, as_texts, as_tar, as_json_tars]


def plain(pairs): return [(p['row'], p['caption'], p['image'].tobytes()) for p in pairs]


@pytest.fixture(scope='module')
def expected():
    return [(i, caption, square(Image.open(io.BytesIO(image)), 16).tobytes()) for i, (caption, image) in enumerate(zip(CAPTIONS, IMAGES, strict=True))]


@pytest.mark.parametrize('make', SOURCES, ids=lambda f: f.__name__)
def test_every_form_gives_the_same_pairs(make, tmp_path, expected):
    folder = tmp_path/'a [b] test'  # characters that mean something in a pattern, a name that means a split
    folder.mkdir()
    source = make(folder)
    for streaming in (None, True, False):
        pairs = load_captions(source, split='all', px=16, streaming=streaming)
        assert plain(pairs) == expected
        assert list(pairs.captions()) == CAPTIONS
        assert pairs.report == {'kept': 12}
    assert list(load_captions(source, split='all', px=16, limit=3).captions()) == CAPTIONS[:3]


@pytest.mark.parametrize('make', SOURCES, ids=lambda f: f.__name__)
def test_a_resumed_pass_equals_a_whole_one(make, tmp_path):
    source = make(tmp_path)
    for split, limit in (('all', None), ('all', 7), ('train', None), ('train', 5), ('validation', None)):
        def load(split=split, limit=limit): return load_captions(source, split=split, px=16, limit=limit, validation_fraction=0.4)
        whole = load()
        pairs = plain(whole)
        assert len(pairs) == (limit or len(pairs)) and pairs
        for stop in {0, 1, len(pairs) // 2, len(pairs)}:
            first, rest = load(), load()
            head = [pair for _, pair in zip(range(stop), first, strict=False)]
            start = head[-1]['row'] + 1 if head else 0
            assert plain(head) + plain(rest.pairs(start=start, kept=stop)) == pairs
            assert first.report + rest.report == whole.report
            if start:  # a report that was kept is added to; a pass from row 0 counts afresh
                rest.report.clear()
                rest.report['kept'] = stop
                list(rest.pairs(start=start, kept=stop))
                assert rest.report['kept'] == len(pairs)
        assert plain(whole) == pairs and whole.report['kept'] == len(pairs)
    assert not list(load_captions(source, split='all', px=16).pairs(start=12)) and not list(load_captions(source, split='all', px=16).pairs(start=99))


def test_row_numbers_are_rows_of_the_source():
    pairs = load_captions(split='validation', px=16, limit=5)
    captions = list(load_captions(split='all', px=16).captions())
    assert all(captions[pair['row']] == pair['caption'] for pair in pairs)
    assert pairs.total == 3840 == len(captions)


# The split
@settings(max_examples=150, deadline=None)
@given(st.text(), st.lists(st.sampled_from([' ', '\n', '\t', '  ', '\u00a0']), min_size=1), st.floats(0, 1))
def test_case_and_white_space_do_not_change_the_side(caption, spaces, fraction):
    caption = caption.encode('utf-8', 'ignore').decode()
    assume(caption.upper().casefold() == caption.casefold())
    variant = spaces[0] + spaces[-1].join(caption.upper().split()) + spaces[0]
    assert in_validation(caption, fraction) == in_validation(variant, fraction)


def test_the_side_is_the_documented_hash():
    digest = hashlib.sha256(b'a red fish').hexdigest()
    share = int(digest[:8], 16) / 16**8
    assert not in_validation('A  Red\nfish', share) and in_validation('A  Red\nfish', share + 1e-9)
    assert not in_validation('x', 0.0) and in_validation('x', 1.0)


@settings(max_examples=25, deadline=None)
@given(captions=st.lists(st.sampled_from(['a red fish', 'A RED FISH', ' a  red\tfish', 'two owls', 'Two Owls', 'sun', '', 'ein Fuß', 'EIN FUSS']), min_size=1, max_size=12), fraction=st.floats(0, 0.9))
def test_no_caption_is_on_both_sides(captions, fraction):
    rows = datasets.Dataset.from_dict({'image': [IMAGES[0]] * len(captions), 'caption': captions})
    sides = {}
    for split in ('train', 'validation', 'all'):
        spec = {'caption_column': 'caption', 'image_column': 'image', 'limit': None, 'validation_fraction': fraction}
        pairs = data.Captions('here', split, 8, spec, rows, None)
        sides[split] = [pair['caption'].casefold() for pair in pairs]
        assert sum(pairs.report.values()) == len(captions)
    assert not set(sides['train']) & set(sides['validation'])
    assert all(in_validation(caption, fraction) for caption in sides['validation'])
    assert sorted(sides['train'] + sides['validation']) == sorted(sides['all'])


# Images
def test_every_kind_of_bad_image_is_counted_and_the_good_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'MAX_BYTES', 200_000)
    good = noise(1)
    files = {
        'good.png': encoded(good), 'good.jpg': encoded(good, 'JPEG'), 'good.webp': encoded(good, 'WEBP'),
        'grey.png': encoded(good.convert('L')), 'grey16.png': encoded(Image.fromarray(np.full((9, 9), 40_000, 'uint16'))), 'bits.png': encoded(good.convert('1')),
        'palette.gif': encoded(good.convert('P'), 'GIF'), 'cmyk.jpg': encoded(good.convert('CMYK'), 'JPEG'), 'alpha.png': encoded(good.convert('RGBA')),
        'wide.jpg': encoded(Image.new('RGB', (20_000, 100), 'red'), 'JPEG'), 'one.png': encoded(Image.new('RGB', (1, 1), 'red')),
        'text.png': b'not an image at all', 'empty.png': b'', 'page.jpg': b'<html></html>', 'half.jpg': encoded(good, 'JPEG')[:700], 'half.png': encoded(good)[:1000],
        'half.webp': encoded(good, 'WEBP')[:300], 'nothing.png': png_header(0, 10), 'bomb.png': png_header(60_000, 60_000), 'large.png': png_header(8_001, 8_000),
        'heavy.bmp': encoded(noise(2, (300, 300)), 'BMP'),
        'script.jpg': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n',
    }
    rows = [{'file_name': name, 'caption': f'picture {i}'} for i, name in enumerate(files)] + [{'file_name': 'gone.png', 'caption': 'missing'}]
    rows += [{'file_name': 'good.png', 'caption': ''}, {'file_name': 'good.png', 'caption': ' \u0000\n'}, {'file_name': 'good.png', 'caption': None}]
    for name, content in files.items(): (tmp_path/name).write_bytes(content)
    (tmp_path/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    pairs = load_captions(tmp_path, split='all', px=16)
    kept = list(pairs)
    assert [pair['row'] for pair in kept] == list(range(11))
    assert all(pair['image'].size == (16, 16) and pair['image'].mode == 'RGB' for pair in kept)
    assert dict(pairs.report) == {
        'kept': 11, 'empty caption': 3, 'undecodable: not an image': 5, 'undecodable: truncated or damaged': 3, 'undecodable: over 64,000,000 pixels': 2,
        'undecodable: file over 0 MB': 1, 'undecodable: file cannot be read': 1}
    assert pairs.summary() == '11 pairs kept; 12 undecodable images, 3 empty captions'
    assert '| empty caption | 3 |' in pairs._repr_markdown_()


def colour(image): return decode_image(image, 8).getpixel((4, 4))


def test_colours_are_as_meant():
    red = Image.new('RGB', (20, 20), (200, 10, 30))
    assert colour(encoded(red)) == (200, 10, 30)
    assert colour(encoded(Image.new('L', (20, 20), 77))) == (77, 77, 77)
    assert colour(encoded(Image.new('1', (20, 20), 1))) == (255, 255, 255)
    assert colour(encoded(Image.fromarray(np.full((20, 20), 0x9c40, 'uint16')))) == (0x9c,) * 3
    assert colour(encoded(Image.fromarray(np.full((20, 20), 0x9c40, '>u2')), 'TIFF')) == (0x9c,) * 3
    assert colour(encoded(Image.new('LA', (20, 20), (100, 0)))) == (255, 255, 255)
    assert colour(encoded(Image.new('RGBA', (20, 20), (255, 0, 0, 51)))) == (255, 204, 204)
    assert colour(encoded(Image.new('CMYK', (20, 20), (0, 255, 255, 0)), 'JPEG', quality=100)) == pytest.approx((255, 0, 0), abs=3)
    assert colour(encoded(Image.new('CMYK', (20, 20), (255, 0, 0, 0)), 'TIFF')) == (0, 255, 255)
    palette = red.convert('P', palette=Image.Palette.ADAPTIVE)
    assert colour(encoded(palette)) == (200, 10, 30)
    assert colour(encoded(palette, transparency=palette.getpixel((0, 0)))) == (255, 255, 255)
    assert colour(Image.new('F', (20, 20), 90.0)) == (90, 90, 90)


def test_exif_orientation_and_centre_crop():
    image = Image.new('RGB', (90, 30), 'blue')
    image.paste('red', (30, 0, 60, 15))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    upright, upside_down = decode_image(encoded(image), 16), decode_image(encoded(image, exif=turned), 16)
    assert upright.getpixel((8, 2)) == (255, 0, 0) and upright.getpixel((8, 13)) == (0, 0, 255)
    assert upside_down.getpixel((8, 2)) == (0, 0, 255) and upside_down.getpixel((8, 13)) == (255, 0, 0)
    assert square(noise(4), 16).tobytes() == noise(4).crop((5, 0, 35, 30)).resize((16, 16), Image.Resampling.BICUBIC).tobytes()
    assert square(image, 30).tobytes() == image.crop((30, 0, 60, 30)).tobytes()


def test_a_wide_image_is_fine_and_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    wide = Image.new('RGB', (20_000, 100), 'blue')
    wide.paste('red', (9_950, 0, 10_050, 100))
    assert set(decode_image(encoded(wide), 8).get_flattened_data()) == {(255, 0, 0)}
    loaded = []
    monkeypatch.setattr(Image.Image, 'load', lambda self: loaded.append(self.size))
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda self: loaded.append(self.size))
    for size in ((8_001, 8_000), (20_000, 20_000), (60_000, 60_000)):
        with pytest.raises(ValueError, match='over 64,000,000 pixels'): decode_image(png_header(*size), 8)
    assert not loaded


@pytest.mark.parametrize('raw, reason', [
    (None, 'no image'), (7, 'no image'), (b'', 'not an image'), ('no/such/file.png', 'file cannot be read'), ('nul\0byte', 'file cannot be read'),
    (Image.new('RGB', (0, 4)), '0 pixels')])
def test_reasons(raw, reason):
    with pytest.raises(ValueError, match=reason): decode_image(raw, 8)


@pytest.mark.filterwarnings('ignore::UserWarning')  # PIL on broken tags
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from(['PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'PPM']))
def test_damage_is_a_value_error_or_an_image(junk, where, kind):
    content = encoded(noise(3, (12, 12)), kind)
    damaged = content[:where] + junk + content[where + len(junk):]
    try: assert decode_image(damaged, 8).size == (8, 8)
    except ValueError as error: assert str(error) in ('not an image', 'truncated or damaged', '0 pixels', 'over 64,000,000 pixels')


# Captions
def test_long_odd_and_several_captions(tmp_path):
    long = 'word ' * 2000
    captions = [[long, 'second'], ['  tab\tand\nline\x00nul\x1b '], [], [None], ['日本語 \ud83d\ude00'.encode('utf-16', 'surrogatepass').decode('utf-16')]]
    rows = {'picture': [IMAGES[0]] * 5, 'sentences': captions, 'license': ['CC0'] * 5}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path/'x.parquet')
    with pytest.raises(BadInput, match="image_column cannot be guessed: name one; the source has 'picture', 'sentences', 'license'"): load_captions(tmp_path/'x.parquet')
    pairs = load_captions(tmp_path/'x.parquet', split='all', px=8, image_column='picture')
    kept = list(pairs)
    assert [pair['caption'] for pair in kept] == [long.strip(), 'tab and line nul', '日本語 😀']
    assert len(kept[0]['caption']) == 9_999 and pairs.report['empty caption'] == 2
    assert {(pair['source'], pair['licence']) for pair in kept} == {('x.parquet', 'CC0')}


# What is refused
def test_messages(tmp_path):
    def refused(match, *args, **kwargs):
        with pytest.raises(BadInput, match=match): load_captions(*args, **kwargs)
    refused(r"source 'openclipar' is unknown: give 'openclipart', .*Did you mean 'openclipart'\?", 'openclipar')
    refused("source '/no/such/place' is unknown", '/no/such/place')
    refused("source 'x/missing.parquet' is unknown", 'x/missing.parquet')
    refused('matches no file', str(tmp_path/'*.tar'))
    refused(r'is not a source', '')
    refused(r'is not a source', None)
    refused(r"image_column 'imgae' does not exist: the source has .*Did you mean 'image'\?", image_column='imgae')
    refused(r"caption_column 'captions' does not exist: .*'caption'.*Did you mean 'caption'\?", caption_column='captions')
    refused(r"split 'valid' is unknown: give 'train', 'validation' or 'all'.* Did you mean 'validation'\?", split='valid')
    for px in (0, -8, 63, 64.0, '64', None, True): refused(f'px {px!r} is not a positive multiple of 8', px=px)
    for limit in (0, -1, 1.5, '9', True): refused(f'limit {limit!r} is not a number of pairs', limit=limit)
    for share in (1, 1.5, -0.1, 'x', True): refused(f'validation_fraction {share!r} is not a share', validation_fraction=share)
    (tmp_path/'notes.csv').write_text('a,b')
    refused('not a kind of file that can be read', tmp_path/'notes.csv')
    refused(r'is a folder without captions \(0 images\)', tmp_path)
    (tmp_path/'a.png').write_bytes(IMAGES[0])
    refused(r'is a folder without captions \(1 images\): put metadata.jsonl', tmp_path)
    (tmp_path/'broken.parquet').write_bytes(b'PAR1 nothing')
    refused(r"source '.*broken.parquet' cannot be loaded", tmp_path/'broken.parquet')
    assert issubclass(BadInput, ValueError) and nearest('ab', []) == ''


def test_empty_data_is_refused(tmp_path):
    datasets.Dataset.from_dict({'image': [], 'caption': []}).to_parquet(tmp_path/'none.parquet')
    with pytest.raises(BadInput, match='none.parquet'): load_captions(tmp_path/'none.parquet')
    tar(tmp_path/'none.tar', [])
    with pytest.raises(BadInput, match='none.tar'): load_captions(tmp_path/'none.tar')


def test_a_missing_shard_and_a_broken_one_are_named(tmp_path):
    pattern = as_json_tars(tmp_path)
    cut = (tmp_path/'shard-02.tar').read_bytes()
    (tmp_path/'shard-02.tar').write_bytes(cut[:7_000])
    with pytest.raises(BadInput, match='cannot be read beyond row'): list(load_captions(pattern, split='all', px=16))
    (tmp_path/'shard-01.tar').unlink()
    with pytest.raises(BadInput, match=r'shard-01.tar.* matches no file'): load_captions(pattern)
    assert [p['row'] for p in load_captions([tmp_path/'shard-00.tar'], split='all', px=16)] == [0, 1, 2, 3]
    assert load_captions(str(tmp_path/'shard-0?.tar'), split='all', px=16).spec['kind'] == 'webdataset'


def test_a_hub_name_without_network_ends_soon():
    code = "from t2ianalysis.data import load_captions, BadInput\nimport time\nstart = time.time()\ntry: load_captions('no-such-owner/no-such-name')\n" \
           "except BadInput as error: print(error, time.time() - start < 20)"
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT)}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert "source 'no-such-owner/no-such-name' cannot be loaded" in out.stdout and "'openclipart'" in out.stdout and out.stdout.strip().endswith('True')


def test_a_hub_data_set_goes_by_its_revision(monkeypatch):
    rows = datasets.Dataset.from_dict({'image': IMAGES, 'caption': CAPTIONS})

    class Builder:
        hash = 'revision-1'
        def as_streaming_dataset(self): return {'validation': None, 'train': rows.to_iterable_dataset()}
    opened = []
    monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', lambda self, name, **options: opened.append(name))
    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *args, **options: opened.append((args, options)) or Builder())
    pairs = load_captions('hub:owner/name:config', split='all', px=16)
    assert opened == ['owner/name', (('owner/name', 'config'), {})]  # in particular, no trust in code from the hub
    assert len(list(pairs)) == 12 and pairs.spec['source_split'] == 'train' and pairs.total is None
    before, Builder.hash = pairs.fingerprint, 'revision-2'
    assert load_captions('owner/name:config', split='all', px=16).fingerprint != before


def test_own_splits_of_a_source_are_not_mixed(tmp_path):
    for split in ('train', 'test'):
        rows = {'image': [IMAGES[0]] * 2, 'caption': [f'{split} {i}' for i in range(2)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path/f'{split}-00000-of-00001.parquet')
    assert list(load_captions(tmp_path, split='all').captions()) == ['train 0', 'train 1']
    datasets.DatasetDict({name: datasets.Dataset.from_dict({'image': IMAGES[:1], 'caption': [name]}) for name in ('test', 'train')}).save_to_disk(tmp_path/'dict')
    assert list(load_captions(tmp_path/'dict', split='all').captions()) == ['train']


# Fingerprint
@pytest.mark.parametrize('make', [as_parquet, as_texts, as_json_tars, as_imagefolder], ids=lambda f: f.__name__)
def test_the_fingerprint_follows_content_and_choices_not_place(make, tmp_path):
    here, there = tmp_path/'here', tmp_path/'far'/'there'
    here.mkdir(), there.mkdir(parents=True)
    one, two = make(here), make(there)
    for path in there.iterdir(): os.utime(path, (1, 1))
    first = load_captions(one, px=16).fingerprint
    assert load_captions(two, px=16).fingerprint == first and len(first) == 64
    assert str(tmp_path) not in json.dumps(load_captions(one, px=16).spec)
    others = [load_captions(one, **({'px': 16} | choice)).fingerprint for choice in ({'px': 24}, {'limit': 3}, {'split': 'all'}, {'validation_fraction': 0.2})]
    assert len({first, *others}) == 5
    changed = sorted(path for path in there.iterdir() if path.suffix in ('.png', '.parquet', '.tar') and path.name != 'test-00.png')[0]
    content = bytearray(changed.read_bytes())
    content[600] ^= 1
    changed.write_bytes(content)
    assert load_captions(two, px=16).fingerprint != first


def test_a_file_may_be_renamed_but_pairs_may_not(tmp_path):
    as_parquet(tmp_path).rename(tmp_path/'b.parquet')
    (tmp_path/'x').mkdir()
    assert load_captions(tmp_path/'b.parquet').fingerprint == load_captions(as_parquet(tmp_path/'x')).fingerprint
    (tmp_path/'t').mkdir()
    texts = as_texts(tmp_path/'t')
    before = load_captions(texts).fingerprint
    (texts/'11.txt').rename(texts/'12.txt')
    assert load_captions(texts).fingerprint != before


# Places and files
def test_places(tmp_path, monkeypatch):
    for name in ('T2I_HOME', 'T2I_WORK', 'T2I_CACHE'): monkeypatch.delenv(name, raising=False)
    assert data.home() == ROOT and data.data_path('openclipart_256.parquet').is_file() and data.work_path('runs', 'x') == ROOT/'runs'/'x'
    monkeypatch.setenv('T2I_HOME', str(tmp_path))
    monkeypatch.setenv('T2I_WORK', str(tmp_path/'work'))
    monkeypatch.setenv('T2I_CACHE', str(tmp_path/'cache'))
    assert data.home() == tmp_path and data.work_path('runs') == tmp_path/'work'/'runs' and not (tmp_path/'work').exists()
    assert data.cache_path('a', 'b.bin') == tmp_path/'cache'/'a'/'b.bin' and (tmp_path/'cache'/'a').is_dir()
    with pytest.raises(BadInput, match='openclipart_256.parquet is missing .*T2I_HOME'): load_captions()
    for name in ('T2I_HOME', 'T2I_WORK', 'T2I_CACHE'): monkeypatch.delenv(name)
    monkeypatch.setattr(data, '_repository', lambda: None)  # installed from a wheel
    monkeypatch.chdir(tmp_path)
    assert data.home() == Path(sys.prefix)/'share'/'t2ianalysis' and data.work_path('runs') == tmp_path/'runs'


@pytest.mark.fault('a write of any small file fails', 'the old file stays, and nothing else')
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = write_atomic(tmp_path/'deep'/'x.txt', 'old')
    assert target.read_text() == 'old' and write_atomic(target, b'new').read_bytes() == b'new'
    def full(*args): raise OSError(28, 'No space left on device')
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match='No space'): write_atomic(target, 'half')
        assert [path.name for path in target.parent.iterdir()] == ['x.txt'] and target.read_bytes() == b'new'


def test_a_contact_sheet_shows_every_pair():
    sheet = contact_sheet(load_captions(limit=5), columns=3, px=32)
    assert sheet.size == (3 * 40, 2 * 60) and len(set(sheet.get_flattened_data())) > 50
    with pytest.raises(BadInput, match='pairs is empty'): contact_sheet([])
