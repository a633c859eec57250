"The notebook that builds the larger set: its own functions, on a handful of files."
import io
import json
from pathlib import Path

import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2ianalysis.data import in_validation, load_captions

notebook = Path(__file__).parent.parent/'nbs'/'build'/'drawings_and_photos.ipynb'
emoji = [dict(label='flag: Trinidad & Tobago', hexcode='1F1F9-1F1F9'), dict(label='keycap: 1', hexcode='31-FE0F-20E3'),
         dict(label='waving hand', hexcode='1F44B', tags=['bye', 'greetings', 'hand', 'hello', 'wave'], skins=[dict(label='waving hand: dark skin tone', hexcode='1F44B-1F3FF')])]


@pytest.fixture(scope='module')
def nb():
    "The names that the notebook's cells of functions define"
    names = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if 'functions' in cell.metadata.get('tags', []): exec(compile(cell.source, cell.id, 'exec'), names)
    return type('Notebook', (), {name: staticmethod(value) if callable(value) else value for name, value in names.items() if name[0] != '_'})


@pytest.fixture(scope='module')
def words(nb, tmp_path_factory):
    "A WordNet of twenty words"
    folder = tmp_path_factory.mktemp('wordnet')
    for kind in ('noun', 'verb', 'adj', 'adv'):
        (folder/f'index.{kind}').write_text('  1 licence\n' + ''.join(f'{word} n 1 @\n' for word in 'ticket ball virtual_connection greetings hello zoo wind index red'.split()))
        (folder/f'{kind}.exc').write_text('mice mouse\n')
    return nb.word_list(folder)


def pixels(webp): return np.asarray(Image.open(io.BytesIO(webp)).convert('RGB'))


def row(nb, i, **kept):
    "One row of the set with a picture of its own"
    image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype='uint8')).resize((32, 32), 0)
    return dict(webp=nb.encoded(image), caption=f'picture {i}', source=f'@iconify-json/x 1.0 icon-{i}', licence='MIT', author='Ann', style='icon') | kept


def test_every_hand_of_an_emoji_has_one_caption(nb, words):
    captions = nb.emoji_captions(emoji, words)
    of = lambda name, prefix, codes={}: nb.emoji_caption(name, prefix, codes, captions, words)
    same = [of('hand-wave', 'noto', {'hand-wave': '1f44b-1f3ff'}), of('waving-hand-dark-skin-tone', 'noto-v1'), of('waving-hand-dark', 'fluent-emoji')]
    assert set(same) == {'waving hand, dark skin tone'}
    assert of('waving-hand-2', 'streamline-emojis') == of('wavinghand', 'fxemoji') == 'waving hand: greetings, hello'
    assert of('flag-for-trinidad-and-tobago', 'emojione') == nb.flag_caption('tt', 'cif', captions) == 'flag of Trinidad and Tobago'
    assert of('keycap-1', 'twemoji') == 'keycap 1' and of('letter-z', 'noto') == 'letter Z'
    assert of('1f468-200d', 'openmoji') == of('gezellig', 'openmoji') == of('whitedownpointing', 'fxemoji') == of('flag-for-atlantis', 'emojione') == ''


@pytest.mark.parametrize('name, prefix, caption', [
    ('ticket-one', 'icon-park', 'ticket icon'), ('ball-1-flat', 'streamline-color', 'ball icon'), ('ball-24', 'fluent-color', 'ball icon'), ('vpn-connection', 'marketeq', 'VPN connection icon'),
    ('wind-index-6-fill', 'meteocons', 'wind index 6 icon'), ('red-balls', 'marketeq', 'red balls icon'), ('mice', 'marketeq', 'mice icon'), ('youtube', 'marketeq', ''), ('feiyu', 'icon-park', ''),
    ('ticket-1F468', 'marketeq', ''), ('x', 'marketeq', '')])
def test_an_icons_name_becomes_words(nb, words, name, prefix, caption): assert nb.icon_caption(name, prefix, words) == caption


@pytest.mark.parametrize('text, caption', [
    ('A frog.\nde.utf8=Ein Frosch.', 'a frog'), ('Tom &amp; a “big” dog.', 'Tom & a "big" dog'), ('Cent sign. 100 cents make 1 dollar.', 'Cent sign'),
    ('A view of Mt. Fuji.', 'a view of Mt. Fuji'), ('Eat your bread!', ''), ('', ''), ('\n\n', '')])
def test_a_stamps_text_becomes_a_caption(nb, text, caption): assert nb.stamp_caption('food/x.png', text) == caption


def test_a_photograph_has_the_licence_of_the_last_pattern_that_fits(nb):
    text = 'Files: *\nCopyright: Ann\nLicense: GPL-3+\n\nFiles: images/land/*\nCopyright: Various\nLicense: public-domain\n Given away.\n\nFiles:\n images/sea/*\n images/land/*-bob*\n' \
           'Copyright: Bob (bob.example)\nLicense: CC-BY-SA-4.0\n\nLicense: GPL-3+\n Words.'
    assert nb.copyright_of('images/land/sea0.jpg', text) == ('public domain', 'Various')
    assert nb.copyright_of('images/land/sea1-bob.jpg', text) == ('CC-BY-SA-4.0', 'Bob')
    assert nb.landscape_caption('sea1-bob.jpg') == 'a photograph of the sea' and nb.landscape_caption('bwerner0.jpg') == ''


def test_an_icon_set_gives_what_is_worth_rendering(nb):
    data = dict(prefix='fluent-color', icons={'a-16': {}, 'a-48': {}, 'b-20': {}, 'c-20': dict(hidden=True)})
    assert nb.chosen(data, 'icon') == ['a-48', 'b-20']
    assert nb.chosen(dict(prefix='flag', icons={'de-4x3': {}, 'de-1x1': {}, 'es-ct-4x3': {}}), 'flag') == ['de-4x3']


def test_drawings_keep_their_pixels(nb, tmp_path):
    Image.new('RGBA', (30, 10), (200, 0, 0, 255)).save(tmp_path/'a.png'); (tmp_path/'b.png').write_bytes(b'no image')
    Image.new('RGBA', (30, 30), (0, 0, 0, 0)).save(tmp_path/'c.png'); Image.new('RGB', (60, 40), (0, 90, 0)).save(tmp_path/'d.jpg')
    shown = pixels(nb.picture(tmp_path/'a.png', 64)[0])
    assert shown.shape == (64, 64, 3) and (shown[32, 2:62] == (200, 0, 0)).all() and (shown[:20] == 255).all() and (shown[:, :2] == 255).all()
    assert [nb.picture(tmp_path/name, 64) for name in ('b.png', 'c.png')] == [(b'', 'cannot be rendered'), (b'', 'blank')]
    assert pixels(nb.picture(tmp_path/'d.jpg', 64)[0]).max(-1).max() < 120


def test_an_svg_is_rendered_with_its_margin(nb):
    pytest.importorskip('resvg_py')
    data = dict(prefix='x', width=10, height=20, icons=dict(bar=dict(body='<rect x="2" width="6" height="20" fill="#00f"/>'), bad=dict(body='<rect')))
    shown = pixels(nb.picture(nb.svg_of(data, 'bar'), 256)[0])
    blue = (shown == (0, 0, 255)).all(-1)
    assert blue.any(0).sum() == 72 and blue.any(1).sum() == 240 and blue[8:248, 128].all()
    assert nb.picture(nb.svg_of(data, 'bad'), 256) == (b'', 'cannot be rendered')


def test_a_killed_rendering_goes_on(nb, tmp_path):
    files = {}
    for i in range(5): files[f'{i}'] = tmp_path/f'{i}.png'; Image.new('RGB', (8, 8), (50*i, 0, 0)).save(files[f'{i}'])
    asked = []
    def payload(name):
        asked.append(name)
        if name == '4' and len(asked) == 5: raise KeyboardInterrupt
        return files[name]
    (tmp_path/'out').mkdir()
    with pytest.raises(KeyboardInterrupt): nb.render_all('s', list(files), payload, tmp_path/'out', 16, size=2)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['s-000.parquet', 's-001.parquet']
    first = (tmp_path/'out'/'s-000.parquet').stat().st_mtime_ns
    done = nb.render_all('s', list(files), payload, tmp_path/'out', 16, size=2)
    assert list(done) == list(files) and (tmp_path/'out'/'s-000.parquet').stat().st_mtime_ns == first
    assert list(nb.render_all('s', ['3', '1'], payload, tmp_path/'out', 16, size=2)) == ['3', '1']    # other names than the part holds: made again


def test_what_is_left_out(nb):
    seen = set()
    assert nb.fate(row(nb, 1), seen) == 'kept' and nb.fate(row(nb, 1, caption='another'), seen) == 'same pixels as an earlier image'
    assert nb.fate(row(nb, 2, webp=b''), seen) == 'no image' and nb.fate(row(nb, 2, caption=''), seen) == 'no English caption'
    assert nb.fate(row(nb, 2, caption='a bong'), seen) == 'blocklist' and nb.fate(row(nb, 2), seen) == 'kept'
    grey = nb.encoded(Image.new('RGB', (32, 32), (90, 92, 90)))
    assert nb.fate(row(nb, 3, webp=grey), seen) == 'no colour' and nb.fate(row(nb, 3, webp=grey, style='emoji'), seen) == 'kept'


def test_the_set_loads_and_no_caption_is_on_both_sides(nb, tmp_path):
    rows = [row(nb, i, caption=f'{"Thing" if i % 2 else "thing"} {i//4}', licence='CC-BY-4.0' if i % 3 else 'MIT') for i in range(120)]
    folder = nb.write_set(rows, tmp_path/'set', 'set', 32)
    assert nb.checksums(sorted(folder.glob('*.parquet')) + [folder/'README.md']) == (folder/'SHA256SUMS').read_text()
    sides = {side: list(load_captions(folder, side, px=16).pairs()) for side in ('train', 'validation')}
    lower = {side: {pair['caption'].casefold() for pair in pairs} for side, pairs in sides.items()}
    assert not lower['train'] & lower['validation'] and len(lower['train']) + len(lower['validation']) == 30 and lower['validation']
    assert all(in_validation(caption) for caption in lower['validation'])
    assert {p['source']: p['licence'] for side in sides.values() for p in side} == {r['source']: r['licence'] for r in rows}
    assert '| icon | @iconify-json/x 1.0 | MIT | Ann | 40 |' in (folder/'README.md').read_text()


def test_the_same_rows_give_the_same_files_in_shards(nb, tmp_path):
    rows = [row(nb, i) for i in range(10)]
    for name in ('a', 'b'): (tmp_path/name).mkdir(); nb.write_shards(rows, tmp_path/name, 'set', size=4)
    files = sorted(p.name for p in (tmp_path/'a').iterdir())
    assert files == [f'set-00{i}-of-003.parquet' for i in range(3)] and all((tmp_path/'a'/n).read_bytes() == (tmp_path/'b'/n).read_bytes() for n in files)
    read = [r for n in files for r in pq.read_table(tmp_path/'a'/n).to_pylist()]
    assert sorted(r['source'] for r in read) == sorted(r['source'] for r in rows) and [r['source'] for r in read] != [r['source'] for r in rows]
    assert {r['source']: r['image']['bytes'] for r in read} == {r['source']: r['webp'] for r in rows}


def test_a_failed_build_leaves_the_set_that_was_there(nb, tmp_path):
    folder = nb.write_set([row(nb, 1)], tmp_path/'set', 'set', 32)
    before = (folder/'SHA256SUMS').read_bytes()
    with pytest.raises(KeyError): nb.write_set([row(nb, 1), {'webp': b'', 'caption': 'no licence'}], folder, 'set', 32)
    assert (folder/'SHA256SUMS').read_bytes() == before
    again = nb.write_set([row(nb, i) for i in range(3)], folder, 'set', 32)
    assert again == folder and len(list(load_captions(folder, 'all', px=16).pairs())) == 3 and [p.name for p in tmp_path.iterdir()] == ['set']


def test_every_package_is_pinned(nb):
    cells = {c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == 'code'}
    assert all(version[0].isdigit() for version, _ in nb.iconify.values()) and all('=' in name for name in nb.debian.values()) and len(nb.iconify) > 25
    assert json.dumps(sorted(nb.iconify)) and not any('http' in source.replace('http://www.w3.org', '') for source in cells)
