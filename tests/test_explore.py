"What the widgets show is what a plain computation gives; a run is followed while it writes; and one click in a real JupyterLab."
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis.analysis import interval, paired
from t2ianalysis.data import BadInput
from t2ianalysis.explore import (
    Patches,
    Reader,
    Tail,
    Watch,
    code_rows,
    compare,
    compare_figure,
    compare_widget,
    live_figure,
    live_widget,
    patch_at,
    patch_figure,
    patch_widget,
    read_sequence,
    run_folder,
    sequence_figure,
    sequence_widget,
    siblings,
    small,
)
from t2ianalysis.minimal_html import minimal_page, save_corpus
from t2ianalysis.models import load_lm, load_text_tokenizer
from t2ianalysis.tokenizers import load_image_tokenizer
from t2ianalysis.training import ensure_runs, kept, load_run, make_config, train

has_widgets = pytest.mark.skipif(find_spec('anywidget') is None, reason='the widgets need anywidget')


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('explore')


@pytest.fixture(autouse=True)
def place(work, monkeypatch): monkeypatch.setenv('T2I_WORK', str(work))


@pytest.fixture(scope='module')
def tiny(work, vq_folder):
    "Fields of a config that trains in a second: 150,000 parameters, images of 4 x 4 codes."
    text = load_text_tokenizer('bundled')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(text), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(work/'lm')
    text.save_pretrained(work/'lm')
    return dict(preset='smoke', lm=str(work/'lm'), image_tokenizer=str(vq_folder), px=16, pairs=24, length=64, steps=4, eval_every=2)


@pytest.fixture(scope='module')
def runs(work, tiny):
    "Run ids by (arm, seed): two arms, two seeds; and their table."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('T2I_WORK', str(work))
        frame = ensure_runs([make_config(**tiny, init=init, seed=seed) for init in ('pretrained', 'random') for seed in (0, 1)], progress=False)
    return {key: part.run_id.iloc[0] for key, part in frame.groupby(['init', 'seed'])} | {'frame': frame}


@pytest.fixture
def both(runs): return [runs['pretrained', 0], runs['random', 0]]


def test_neighbours_and_uses_are_those_of_brute_force(store, vq):
    patches, book = Patches(store, vq), vq.model.quantize.embedding.weight.numpy().astype(float)
    for image, place in ((0, (0, 0)), (4, (3, 1)), (9, (2, 3))):
        x, code = patch_at(patches, image, place, neighbours=5, uses=99), int(store.codes[image, place[0] * 4 + place[1]])
        far = np.linalg.norm(book - book[code], axis=1)
        near = [c for c in np.argsort(far, kind='stable') if c != code][:5]
        assert x.code == code and list(x.neighbours.code) == near and np.allclose(x.neighbours.distance, far[near], atol=1e-5)
        held = (np.asarray(store.codes) == code)
        assert (x.times, x.images) == (held.sum(), held.any(1).sum()) and list(x.neighbours.times) == [(np.asarray(store.codes) == c).sum() for c in near]
        assert set(x.uses.image) == set(np.flatnonzero(held.any(1))) - {image}
        assert all(store.codes[u.image, u.row * 4 + u.column] == code and store.captions[u.image] == u.caption for u in x.uses.itertuples())


def test_a_code_looks_like_the_mean_of_its_patches(store, vq):
    patches, p = Patches(store, vq, decoded=10), vq.downsample
    pictures = vq.decode(torch.from_numpy(np.asarray(store.codes, np.int64)).view(-1, 4, 4)).numpy()
    for code in np.unique(store.codes):
        found = [pictures[i, r // 4 * p:(r // 4 + 1) * p, r % 4 * p:(r % 4 + 1) * p] for i, r in np.argwhere(np.asarray(store.codes) == code)]
        assert np.allclose(patches.looks[code], np.mean(found, axis=0), atol=2)   # a byte of rounding: pictures are decoded in other batches
    assert np.isnan(patches.looks[sorted(set(range(16)) - set(np.unique(store.codes)))]).all()


def test_text_tokens_are_those_of_the_largest_cosine(runs, work, store, vq):
    run = runs['pretrained', 1]
    rows, text, tokenizer = code_rows(run, 16)
    table = load_lm(str(kept(work/'runs'/run)[4])).get_input_embeddings().weight.detach()
    assert torch.equal(torch.cat([text, rows]), torch.cat([table[:len(text)], table[-16:]]))
    folder = work/'model'                                                          # the same weights as a folder that another program made
    shutil.copytree(kept(work/'runs'/run)[4], folder)
    tokenizer.save_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip((rows, text), code_rows(folder, 16)[:2], strict=True))
    x = patch_at(Patches(store, vq, run), 2, (1, 1), tokens=6)
    unit = lambda a: a / a.norm(dim=1, keepdim=True)
    best = (unit(text) @ unit(rows)[x.code]).topk(6).indices.tolist()
    assert x.tokens == [tokenizer.decode([i]).strip() or repr(tokenizer.convert_ids_to_tokens(i)) for i in best]


def test_losses_are_what_evaluation_says_and_lie_where_their_token_lies(runs, both):
    reader = Reader(both)
    assert reader.names == ['pre-trained', 'random']
    readings = [read_sequence(reader, i) for i in range(len(reader.data))]
    for name, own in zip(reader.names, both, strict=True):
        losses = np.concatenate([r.table[name] for r in readings])
        kinds = np.concatenate([r.table.label_kind for r in readings])
        record = runs['frame'][runs['frame'].run_id == own].query('split == "validation" and step == 4').set_index('kind').loss
        for kind in ('text', 'image', 'special'): assert losses[kinds == kind].mean() == pytest.approx(record[kind], abs=2e-5)
        assert losses.mean() == pytest.approx(record['total'], abs=2e-5)
    r = readings[3]
    assert list(r.table.label)[:-1] == list(r.table.token)[1:] and list(r.table.token)[:2] == ['<doc>', '<text>'] and r.table.label.iloc[-1] == '</doc>'
    codes = r.table[r.table.label_kind == 'image']
    assert [int(x) for x in codes.label] == reader.data.store.codes[3].tolist() and r.maps()[1][2, 1] == codes.random.iloc[9]
    assert r.caption.startswith(''.join(r.table[r.table.label_kind == 'text'].label).strip()[:8])


@pytest.fixture(scope='module')
def paged(work, tiny, vq):
    "Folder of pages with none, one and two images of codes that rise, and runs on them: left to right, and masked."
    src = lambda k: ' '.join(map(str, range(k, k + 16))) if not k else ' '.join(map(str, [*range(k, 16), *range(k)]))
    texts = [f'<p>page {i} ' + ' '.join(f'<img alt="image {k}" src="{src(i + k)}">' for k in range(i % 3)) + ' end of page' for i in range(9)]
    pages = [minimal_page(text, f'{i}.html') for i, text in enumerate(texts)]
    save_corpus(work/'pages', pages[:6], pages[6:], vq, 16, 0)
    config = dict(data=str(work/'pages'), length=200, seed=0)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('T2I_WORK', str(work))
        return {layout: ensure_runs([make_config(**tiny | config | dict(layout=layout))], progress=False).run_id.iloc[0] for layout in ('document', 'causally-masked')} | dict(pages=pages)


def test_pages_and_masked_rows_are_read_too(paged, runs, work):
    for layout in ('document', 'causally-masked'):
        reader, said = Reader(paged[layout]), set()
        arm, = reader.names
        record = runs_of(work, paged[layout])
        readings = [read_sequence(reader, i) for i in range(len(reader.data))]
        assert [r.caption for r in readings] == [f'{i}.html' for i in range(6, 9)] and [len(r.pictures) for r in readings] == [0, 1, 2]
        for i, r in enumerate(readings, 6):
            for k, (place, loss) in enumerate(zip(r.places, [r.maps(k)[0] for k in range(i % 3)])):   # every code where it lies in the image, wherever its token has moved
                assert [int(x) for x in r.table.label[place.ravel()]] == [(i + k + n) % 16 for n in range(16)]
                assert np.array_equal(loss, r.table[arm].to_numpy()[place]) and not np.isnan(loss).any()
            assert (np.isnan(r.table[arm]) == (r.table.label_kind == 'mask')).all()
            said |= set(r.table.label[r.table.label_kind.isin(('mask', 'end'))])
            sequence_figure(reader, i - 6)
        assert said == set() if layout == 'document' else {'<mask:0>', '<end>'} <= said
        losses, kinds = (np.concatenate([r.table[c] for r in readings]) for c in (arm, 'label_kind'))
        for kind in {*kinds} - {'mask'}: assert losses[kinds == kind].mean() == pytest.approx(record[kind], abs=2e-5)
    with pytest.raises(BadInput, match='picture=2'): sequence_figure(reader, 2, 2)
    rows, text, _ = code_rows(paged['causally-masked'], 16)
    assert torch.equal(rows, load_lm(str(kept(work/'runs'/paged['causally-masked'])[4])).get_input_embeddings().weight.detach()[len(text) + 7:-17])


def runs_of(work, run): return load_run(work/'runs'/run).query('split == "validation" and step == 4').set_index('kind').loss


@has_widgets
def test_the_widget_shows_masks_and_pages(paged):
    widget = sequence_widget(Reader(paged['causally-masked']), 2)
    for number, pictures in ((2, 2), (0, 0)):
        widget.ask = dict(number=number)
        d = widget.data
        assert len(d['srcs']) == len(d['places']) == pictures and all(len(p) == 16 for p in d['places']) and not d['error']
        assert {'mask', 'end'} <= set(d['kinds']) and all((loss is None) == (kind == 'mask') for loss, kind in zip(d['losses'][0], d['kinds'])) and json.dumps(d, allow_nan=False)
        assert not set(d['bars']) & {t for t, kind in enumerate(d['kinds']) if kind in ('image', 'mask')}


def test_half_lines_wait_and_a_file_that_was_cut_is_read_anew(tmp_path):
    log = tmp_path/'metrics.jsonl'
    tail = Tail(log)
    assert tail.read() == []
    whole = json.dumps(dict(step=1, said='naïve 日本'), ensure_ascii=False).encode() + b'\n'
    for i in range(len(whole)):                                                   # byte by byte, in the midst of characters too
        log.open('ab').write(whole[i:i + 1])
        assert len(tail.read()) == (i == len(whole) - 1)
    log.open('ab').write(b'no json\n[1]\n' + b'{"step": 2}\n{"ste')
    assert [x['step'] for x in tail.read()] == [1, 2]
    before = tail.at
    log.open('ab').write(b'p": 3}\n')
    assert [x['step'] for x in tail.read()] == [1, 2, 3] and tail.at == log.stat().st_size > before
    log.write_bytes(whole)                                                        # shorter, the same file
    assert [x['step'] for x in tail.read()] == [1]
    beside = tmp_path/'beside'
    beside.write_bytes(b''.join(b'{"step": %d}\n' % i for i in range(50)))       # longer, another file, as a run does that goes on from a checkpoint
    os.replace(beside, log)
    assert [x['step'] for x in tail.read()] == list(range(50))
    log.write_bytes(b'{"step":   7}\n' * 99)                                      # longer, the same file
    assert [x['step'] for x in tail.read()] == [7] * 99


def test_only_new_bytes_are_read(tmp_path, monkeypatch):
    log, read = tmp_path/'log', []
    log.write_bytes(b'{"step": 1}\n' * 1000)
    tail = Tail(log)
    tail.read()
    log.open('ab').write(b'{"step": 2}\n{"st')

    class Counted:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)
        def read(self, *n): read.append(len(part := self.file.read(*n))); return part
    monkeypatch.setattr(Path, 'open', lambda self, *mode: Counted(open(self, *mode)))
    assert len(tail.read()) == 1001 and sum(read) == len(b'{"step": 2}\n{"st') + 1  # and the byte before
    with open(log, 'ab') as f: f.write(b'ep": 3}\n')
    assert len(tail.read()) == 1002 and sum(read) < 40


def test_a_run_is_followed_while_it_trains_in_a_thread(tiny):
    config = make_config(**tiny | dict(steps=24, seed=7))
    watch, seen = Watch(config), []
    assert (p := watch.read()).state == 'waiting' and p.steps == 24 and not len(p.losses)
    thread = threading.Thread(target=train, args=(config,))
    thread.start()
    while thread.is_alive():
        seen.append(watch.read()); time.sleep(.02)
    seen.append(last := watch.read())
    steps = [p.step for p in seen]
    assert steps == sorted(steps) and len(set(steps)) > 3 and (last.state, last.step) == ('done', 24)
    assert {p.state for p in seen} == {'waiting', 'training', 'done'} and last.speed > 0 and last.left == 0
    assert set(last.losses[last.losses.split == 'train'].step) == set(range(1, 25))
    assert Watch().folder == watch.folder                                         # the one that wrote last


def test_a_silent_run_counts_as_stopped_until_it_writes(runs, work, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(work/'runs'/runs['random', 0], folder)
    (folder/'done.json').unlink()
    watch = Watch(folder, patience=30)
    (folder/'metrics.jsonl').write_text(''.join((work/'runs'/runs['random', 0]/'metrics.jsonl').read_text().splitlines(True)[:3]))
    p = watch.read()
    assert p.state == 'training' and (p.step, p.steps) == (2, 4) and p.left == pytest.approx(2 * np.median([json.loads(x)['seconds'] for x in (folder/'timing.jsonl').read_text().splitlines()]))
    for name in ('metrics.jsonl', 'timing.jsonl'): os.utime(folder/name, (time.time() - 100,) * 2)
    assert (p := watch.read()).state == 'stopped' and 'left' not in str(p)
    (folder/'metrics.jsonl').touch()
    assert watch.read().state == 'training'


def test_two_sides_are_compared_seed_by_seed(runs):
    frame, c = runs['frame'], compare(runs['pretrained', 0], runs['random', 1])   # the siblings come by themselves
    assert [f.name for f in c.runs[0]] == [runs['pretrained', 0], runs['pretrained', 1]] == [f.name for f in siblings(runs['pretrained', 1])]
    assert c.names == ('pre-trained', 'random') and c.settings.to_dict('index') == {'init': {'a': 'pretrained', 'b': 'random'}}
    for kind in ('total', 'text', 'image', 'special'):
        i = interval(paired(frame, kind))
        assert list(c.final.loc[kind, ['difference', 'low', 'high', 'seeds']]) == pytest.approx([*i])
        assert list(c.gaps[kind].step) == [0, 2, 4] and c.gaps[kind].effect.iloc[-1] == pytest.approx(i.mean)
        assert c.final.loc[kind, 'a'] - c.final.loc[kind, 'b'] == pytest.approx(i.mean)


def test_seeds_that_do_not_pair_have_no_interval(runs):
    c = compare(runs['pretrained', 0], runs['random', 1], seeds=False)
    ends = runs['frame'].query('split == "validation" and step == 4 and kind == "image"').set_index(['init', 'seed']).loss
    assert c.final.loc['image', 'difference'] == pytest.approx(ends['pretrained', 0] - ends['random', 1])
    assert math.isnan(c.final.loc['image', 'low']) and c.final.loc['image', 'seeds'] == 0 and set(c.settings.index) == {'init', 'seed'}
    one = compare(runs['pretrained', 0], runs['pretrained', 1], seeds=False)
    assert list(one.settings.index) == ['seed'] and one.names == ('seed 0', 'seed 1')


def test_pictures_of_all_four(runs, both, store, vq):
    for figure in (patch_figure(Patches(store, vq), 2, (1, 3)), sequence_figure(Reader(both), 1), sequence_figure(Reader(both[0]), 1), live_figure(both[0]), compare_figure(compare(*both))):
        png = small(figure).data
        assert png[:4] == b'\x89PNG' and png[25] == 3 and len(png) < 60_000        # colour type 3: a palette


@pytest.mark.parametrize('wrong, words', [
    (lambda r, s, v: run_folder('bundled-pretraind'), 'is not there'), (lambda r, s, v: run_folder(r['random', 1][:-2]), 'Did you mean'),
    (lambda r, s, v: Patches(s, load_image_tokenizer()), 'other weights'), (lambda r, s, v: code_rows(r['random', 0], 99), 'rows for 16 codes'),
    (lambda r, s, v: patch_at(Patches(s, v), 10, (0, 0)), 'image from 0 to 9'), (lambda r, s, v: patch_at(Patches(s, v), 0, (0, 4)), 'place in 4 x 4'),
    (lambda r, s, v: Reader([r['random', 0]] * 3), 'one or two'), (lambda r, s, v: Reader(r['random', 0], 'test'), "split='test'"),
    (lambda r, s, v: read_sequence(Reader(r['random', 0]), 8), 'from 0 to 7'), (lambda r, s, v: compare(r['random', 0], r['random', 1]), 'on both sides'),
    (lambda r, s, v: Watch('nowhere'), 'is not there'),
])
def test_a_mistake_is_one_sentence(wrong, words, runs, store, vq):
    with pytest.raises(BadInput, match=words) as e: wrong(runs, store, vq)
    assert '\n' not in str(e.value)


def test_runs_that_cannot_be_compared_or_read_are_refused(runs, tiny):
    frame = ensure_runs([make_config(**tiny | change) for change in (dict(keep=0, seed=3), dict(eval_pairs=6), dict(layout='image', seed=4))], progress=False)
    bare, other, image = frame.run_id.unique()
    with pytest.raises(BadInput, match='has kept no weights'): Reader([bare, runs['pretrained', 0]])
    with pytest.raises(BadInput, match='different data'): compare(runs['pretrained', 0], other)
    with pytest.raises(BadInput, match='do not read the same'): Reader([runs['pretrained', 0], other])
    with pytest.raises(BadInput, match='do not read the same'): Reader([runs['pretrained', 0], image])
    assert list(compare(runs['pretrained', 0], image).final.index) == ['image']    # all that both predict
    with pytest.raises(BadInput, match='no loss yet'): live_figure(Watch(make_config(**tiny | dict(seed=99))))


@has_widgets
def test_widgets_answer_and_say_what_is_wrong(runs, store, vq):
    patch = patch_widget(Patches(store, vq), 1, (2, 2))
    assert f'>{store.codes[1, 10]}</b>' in patch.data['html']
    patch.ask = patch.ask | dict(row=3, column=0)
    assert f'>{store.codes[1, 12]}</b>' in patch.data['html'] and not patch.data['error']
    patch.ask = patch.ask | dict(image=77)
    assert 'image=77' in patch.data['error'] and patch.data['html']
    sequence = sequence_widget(Reader(runs['pretrained', 0]), 2)
    assert {sequence.data['kinds'][t] for t in sequence.data['places'][0]} == {'image'} and len(sequence.data['places'][0]) == 16 and len(sequence.data['losses'][0]) == len(sequence.data['labels'])
    pair = compare_widget(runs['pretrained', 0], runs['random', 1])
    assert [p['kind'] for p in pair.data['panels']] == ['total', 'text', 'image', 'special'] and runs['random', 0] in pair.data['options']


@has_widgets
def test_watching_ends_when_it_is_told_to(tiny, work):
    config = make_config(**tiny | dict(seed=11))
    widget, before = live_widget(config, every=.02), threading.active_count()
    assert widget.data['state'] == 'waiting' and widget.data['on']
    widget.stop()
    assert not widget.data['on']
    train(config)
    assert widget.data['state'] == 'waiting'                                      # nobody looks
    widget.ask = dict(on=True)
    assert widget.data['state'] == 'done' and widget.data['step'] == 4
    end = time.time() + 10
    while threading.active_count() >= before and time.time() < end: time.sleep(.01)
    assert threading.active_count() < before                                      # a finished run needs no thread


def test_without_anywidget_the_command_that_mends_it_is_said(store, vq, monkeypatch):
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    with pytest.raises(BadInput, match='pip install anywidget'): patch_widget(Patches(store, vq))


# ---- one click in a real JupyterLab

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture
def lab(store, vq_folder, tmp_path):
    "A JupyterLab of its own on a folder with one notebook, whose only cell shows the widget."
    cell = f'''from t2ianalysis.explore import Patches, patch_widget
from t2ianalysis.tokenizers import TokenStore, load_image_tokenizer
patch_widget(Patches(TokenStore({str(store.folder)!r}), load_image_tokenizer({str(vq_folder)!r})), 0, (0, 0))'''
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=kernel), tmp_path/'x.ipynb')
    settings = tmp_path/'settings'/'@jupyterlab'/'apputils-extension'
    settings.mkdir(parents=True)
    (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    env = dict(os.environ, JUPYTERLAB_SETTINGS_DIR=str(tmp_path/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(tmp_path/'workspaces'), JUPYTER_RUNTIME_DIR=str(tmp_path/'runtime'))
    address, log = f'http://127.0.0.1:{free_port()}', (tmp_path/'log').open('w')
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={address.rsplit(":", 1)[1]}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=click', f'--ServerApp.root_dir={tmp_path}']
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.time() + 150
        while True:
            try: urllib.request.urlopen(f'{address}/api?token=click', timeout=5).close(); break
            except OSError:
                assert server.poll() is None and time.time() < end, (tmp_path/'log').read_text()[-2000:]
                time.sleep(.1)
        yield f'{address}/doc/tree/x.ipynb?token=click'
    finally:
        server.terminate(); server.wait(20); log.close()


@has_widgets
@pytest.mark.skipif(not find_spec('jupyterlab'), reason='the click needs jupyterlab')
def test_a_click_in_jupyterlab_shows_the_code_that_was_clicked(browser, lab, store):
    row, column = next((int(i) // 4, int(i) % 4) for i in np.flatnonzero(np.asarray(store.codes[0]) != store.codes[0, 0]))
    page, wrong = browser.new_page(), []
    page.set_default_timeout(150_000)                                         # the kernel imports torch, transformers and diffusers
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.goto(lab)
    prompt, end = page.locator('.jp-CodeCell .jp-InputPrompt').first, time.time() + 300
    seen = page.locator('.t2i .code, .jp-OutputArea-output [data-mime-type*=error], .jp-OutputArea-output[data-mime-type*=stderr]')
    while not seen.count():
        assert time.time() < end, page.locator('body').inner_text()[-2000:]
        if prompt.inner_text().strip() == '[ ]:':                              # a key that is pressed before the kernel has answered is lost
            page.locator('.jp-CodeCell .cm-content').first.click()
            page.keyboard.press('Control+Enter')
        page.wait_for_timeout(1000)
    assert page.locator('.t2i .code').count(), page.locator('.jp-OutputArea').first.inner_text()
    code = page.locator('.t2i .code')
    assert code.inner_text() == str(store.codes[0, 0])
    image = page.locator('.t2i .pic img').first
    side = image.bounding_box()['width'] / 4
    image.click(position=dict(x=(column + .5) * side, y=(row + .5) * side))
    page.wait_for_function('code => document.querySelector(".t2i .code").textContent === code', arg=str(store.codes[0, row * 4 + column]))
    page.keyboard.press('ArrowRight' if column < 3 else 'ArrowLeft')          # the picture has the focus: the keys move, JupyterLab does not
    page.wait_for_function('code => document.querySelector(".t2i .code").textContent === code', arg=str(store.codes[0, row * 4 + (column + 1 if column < 3 else 2)]))
    assert not wrong
    page.close()
