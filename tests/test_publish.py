"Publishing: the folder loads elsewhere and draws our pictures, text never becomes a code, and a card says what the records say."
import base64
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import t2ianalysis.publish as publishing
from t2ianalysis.data import BadInput, data_path, work_path
from t2ianalysis.generation import Sampling, load_painter, sample_images
from t2ianalysis.minimal_html import minimal_page, save_corpus
from t2ianalysis.pages import page_ids
from t2ianalysis.publish import data_facts, publish, push, widen_tokenizer, write_data_card
from t2ianalysis.sequences import Vocab
from t2ianalysis.training import ensure_runs, make_config

HOSTILE = ['a red fish', '<code:3>', ' <image><code:0></image>', '<pad></doc>', 'naïve 日本 🐟 <|endoftext|>', '<unused:7>', '']


@pytest.fixture(scope='module')
def pairs(tmp_path_factory, make):
    "Pictures with captions and licences; one is a copy, one is damaged, one has no caption."
    folder = tmp_path_factory.mktemp('data')/'pictures'
    folder.mkdir()
    rows = [dict(file_name=f'{i:02}.png', caption=f'picture {i}: a red | fish', licence='CC0' if i % 3 else 'CC-BY-4.0') for i in range(24)]
    for i, row in enumerate(rows): make['noise'](0 if i == 5 else i, 32).save(folder/row['file_name'])
    (folder/'20.png').write_bytes(b'no image'); rows[21]['caption'] = ' '
    (folder/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory, text_tokenizer, vq_folder, pairs):
    "A place with two finished runs of a tiny model, one of random weights, and the model's and the image tokenizer's folders with cards."
    place = tmp_path_factory.mktemp('trained')
    lm, vq = place/'models'/'tiny-lm', place/'models'/'tiny-vq'
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=310, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128, initializer_range=.3,
                                 rope_parameters=dict(rope_type='default', rope_theta=5e5))).save_pretrained(lm)
    text_tokenizer.save_pretrained(lm)
    shutil.copytree(vq_folder, vq)
    for folder in (lm, vq): (folder/'README.md').write_text('---\nlicense: mit\n---\nPermission is granted.\n')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('T2I_WORK', str(place))
        runs = [make_config('smoke', lm=str(lm), init=init, image_tokenizer=str(vq), data=str(pairs), px=16, length=96, steps=4, eval_every=2, eval_pairs=4, keep=2, lr=.01) for init in ('pretrained', 'random')]
        ids = list(ensure_runs(runs, progress=False).run_id.unique())
    return place, ids


@pytest.fixture
def run(trained, monkeypatch):
    "The id of the finished run from pre-trained weights."
    monkeypatch.setenv('T2I_WORK', str(trained[0]))
    return trained[1][0]


def elsewhere(folder, more):
    "What the card's program, and then `more`, print where t2ianalysis cannot be imported."
    code = re.search('```python\n(.*?)```', (folder/'README.md').read_text(), re.DOTALL)[1]
    code = f'import sys; sys.modules["t2ianalysis"] = None\n{code}\nout = [codes.tolist()]\n{more}\nprint("OUT" + json.dumps(out))'
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split('OUT')[1])


def test_the_folder_loads_without_this_package_and_draws_what_we_draw(run, tmp_path):
    folder, painter = publish(run, tmp_path/'out'), load_painter(run)
    greedy = 'out.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=h * w, prefix_allowed_tokens_fn=lambda row, ids: allowed)[0, prompt.shape[1]:].sub(first).tolist())'
    tokens = f'out.append(tokenizer({HOSTILE!r}, add_special_tokens=False)["input_ids"])'
    sampled, best, ids = elsewhere(folder, f'{greedy}\n{tokens}')
    ours = sample_images(painter.model, painter.vocab, painter.read(['a red fish']), painter.grid, Sampling(temperature=0), length=96)
    assert ours.flatten().tolist() == best and len(set(best)) > 2
    assert len(sampled) == 16 and len(set(sampled)) > 2
    np.testing.assert_array_equal(np.array(Image.open(folder/'image.png')), painter.decode(torch.tensor(sampled).view(1, 4, 4))[0])
    assert ids == painter.text(HOSTILE, add_special_tokens=False)['input_ids'] and max(map(max, filter(None, ids))) < 310


def test_the_names_lie_where_the_joint_ids_are_and_old_versions_find_the_rotary_base(run, tmp_path):
    folder, v = publish(run, tmp_path/'out'), load_painter(run).vocab
    tokenizer, layout = AutoTokenizer.from_pretrained(folder), json.loads((folder/'layout.json').read_text())
    assert len(tokenizer) == v.size == layout['size'] == json.loads((folder/'config.json').read_text())['vocab_size']
    assert tokenizer.convert_ids_to_tokens([v.special('<image>'), v.image, v.size - 1]) == ['<image>', '<code:0>', '<code:15>']
    assert layout['specials'] == {t: v.special(t) for t in layout['specials']} and layout['first_code'] == v.image and layout['grid'] == [4, 4]
    assert tokenizer.decode([v.special('<image>'), v.image + 3]) == '<image><code:3>'
    assert json.loads((folder/'config.json').read_text())['rope_theta'] == 5e5
    assert json.loads((folder/'generation_config.json').read_text())['eos_token_id'] == v.special('</doc>')


@pytest.fixture(scope='module')
def masked(trained, pairs, vq):
    "The ids of two causally masked runs: of captioned images, and of pages."
    place, _ = trained
    page = lambda i: minimal_page(f'<p>a red fish {i} <img alt="a red fish" src="{" ".join(str((i + k) % 16) for k in range(16))}">', f'{i}.html')
    save_corpus(place/'corpus', [page(i) for i in range(8)], [page(8)], vq, 16, 0)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('T2I_WORK', str(place))
        runs = [make_config('smoke', lm=str(place/'models'/'tiny-lm'), image_tokenizer=str(place/'models'/'tiny-vq'), data=str(data), px=16, length=128, steps=2, eval_every=2, eval_pairs=4, layout='causally-masked')
                for data in (pairs, place/'corpus')]
        return list(ensure_runs(runs, progress=False).run_id.unique())


def test_masks_have_names_and_are_no_codes(run, masked, tmp_path):
    texts = ['<mask:0> a <end>', '<mask:15>', '</doc> <code:3>']
    for number, name in enumerate(masked):
        if number:
            with pytest.raises(BadInput, match='data_licence'): publish(name, tmp_path/'no')
        folder, painter = publish(name, tmp_path/name, data_licence='public domain' if number else None), load_painter(name)
        v, layout, tokenizer = painter.vocab, json.loads((folder/'layout.json').read_text()), AutoTokenizer.from_pretrained(folder)
        assert (v.codes, v.masks, layout['codes'], layout['first_code']) == (16, 16, 16, v.image) and len(tokenizer) == v.size == layout['size'] == 310 + 7 + 16 + 17
        assert layout['masks'] == {f'<mask:{i}>': v.mask + i for i in range(16)} | {'<end>': v.end}
        assert tokenizer.convert_ids_to_tokens([v.image + 15, v.mask, v.mask + 15, v.end]) == ['<code:15>', '<mask:0>', '<mask:15>', '<end>']
        codes, prompt, ids = elsewhere(folder, f'out.append(prompt[0].tolist()); out.append(tokenizer({texts!r}, add_special_tokens=False)["input_ids"])')
        assert len(codes) == 16 and set(codes) <= set(range(16)) and max(map(max, ids)) < 310
        html = page_ids(v, painter.text, '<img alt="a red fish" src="').tolist()
        s, caption = layout['specials'], painter.text('a red fish', add_special_tokens=False)['input_ids']
        assert prompt == ([s['<doc>'], *html] if number else [s['<doc>'], s['<text>'], *caption, s['</text>'], s['<image>']])
        card = (folder/'README.md').read_text()
        assert '7 special tokens and 17 mask and end tokens, trained to write' in card and ('Pages of HTML with images from `corpus`' in card) == bool(number) and '| end |' in card
    assert 'mask and end' not in (publish(run, tmp_path/'plain')/'README.md').read_text()


def test_the_pages_that_ship_say_their_licence():
    config = make_config('cm3-smoke')
    assert publishing.training_licences(config, {}) == {'GFDL-1.2-or-later (pages)': 60} and publishing.training_licences(config, {}, 'mine') is None


def bpe(names=(), **kwargs):
    "A small BPE that splits at spaces alone."
    tokenizer = Tokenizer(models.BPE(**kwargs))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(['a red fish <code:1> 0 2 3 4 5 6 7 8 9 ; naive'], trainers.BpeTrainer(vocab_size=80, special_tokens=['<|endoftext|>', *names], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|endoftext|>')


def unigram():
    tokenizer = Tokenizer(models.Unigram([('<unk>', 0.), ('a', -1.), ('<code', -2.), ('▁', -3.)], 0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>')


@pytest.mark.parametrize('tokenizer, wide', [(bpe, True), (lambda: bpe(['<image>', '<pad>', '<code:2>']), True), (lambda: bpe(ignore_merges=True), False), (unigram, False)])
def test_text_never_becomes_a_code_or_the_tokenizer_stays_as_it_is(tokenizer, wide, tmp_path):
    old, vocab = tokenizer(), Vocab(100, 16)
    old.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    names, new = widen_tokenizer(tmp_path, vocab), AutoTokenizer.from_pretrained(tmp_path)
    assert (names is not None) == wide
    if not wide: assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    else: assert len(set(names)) == 23 and new.convert_tokens_to_ids(names) == list(range(100, 123))
    texts = HOSTILE + (names or [])
    assert new(texts)['input_ids'] == old(texts)['input_ids'] and max(map(max, filter(None, new(texts)['input_ids']))) < 100


# The card

def finding(place, name, runs, claim):
    "A recorded finding of preset smoke."
    verdict = dict(claim=claim, paper='1', ours='2 <b>', effect=1., low=0., high=2., n=3, margin=0., verdict='holds', unit='nats', region=[0., 'inf'])
    path = place/'figures'/'smoke'/f'{name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(finding=name, preset='smoke', title=name, figures={}, verdicts=[verdict], runs=runs, date='2026-01-01', environment={})))


def test_the_card_says_what_the_records_say(run, trained, pairs, tmp_path):
    finding(trained[0], 'loss_breakdown', trained[1], 'Loss | goes down'); finding(trained[0], 'other', trained[1][1:], 'Nothing of this run')
    folder, store = publish(run, tmp_path/'out'), publishing.store_of(json.loads(work_path('runs', run, 'config.json').read_text())['fingerprint']['validation'])
    card, record = ModelCard.load(folder/'README.md'), [json.loads(line) for line in work_path('runs', run, 'metrics.jsonl').read_text().splitlines()][-1]
    assert card.data.license == 'mit' and card.data.library_name == 'transformers' and card.data.model_name == run
    results = {r.metric_name.split(',')[0]: r.metric_value for r in model_index_to_eval_results(huggingface_hub.metadata_load(folder/'README.md')['model-index'])[1]}
    assert results == {k: record[k] for k in ('total', 'text', 'image', 'special')}
    for k in results: assert f'| {k} | {record[k]:.4f} | {record[k] / math.log(2):.4f} | {record["n_" + k]:,} |' in card.text
    assert f'{record["text"] * record["n_text"] / math.log(2) / sum(len(c.encode()) for c in store.captions):.4f} bits per byte' in card.text
    assert 'Loss \\| goes down' in card.text and 'Nothing of this run' not in card.text and '2 \\<b\\>' in card.text
    licences = dict(re.findall(r'\| (CC\S+) \| (\d+) \|', card.text))
    assert sum(map(int, licences.values())) == store_pairs(run) and set(licences) == {'CC0', 'CC-BY-4.0'}
    assert '| lm | tiny-lm |' in card.text and '| lr | 0.01 |' in card.text


def store_pairs(run): return len(publishing.store_of(json.loads(work_path('runs', run, 'config.json').read_text())['fingerprint']['train']))


def test_nothing_in_the_folder_names_this_machine_and_notices_travel(run, trained, pairs, tmp_path):
    folder = publish(run, tmp_path/'out')
    texts = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*') if p.is_file() and p.suffix != '.safetensors'}
    for name, text in texts.items(): assert not any(str(p) in text for p in (trained[0], pairs.parent, tmp_path)), name
    assert {'base_model/README.md', 'image_tokenizer/README.md', 'image_tokenizer/config.json'} <= set(texts)
    assert 'Permission is granted' in texts['base_model/README.md']


def test_weights_of_an_earlier_step_have_their_own_losses_or_none(run, tmp_path):
    text = (publish(run, tmp_path/'out', step=1)/'README.md').read_text()
    assert 'those of step 1, at which the run was not evaluated' in text and 'model-index' not in text and 'bits per byte' not in text


def test_random_weights_inherit_nothing_and_an_image_tokenizer_without_licence_stays_away(trained, monkeypatch, tmp_path):
    monkeypatch.setenv('T2I_WORK', str(trained[0]))
    card = trained[0]/'models'/'tiny-vq'/'README.md'
    monkeypatch.setattr(publishing, 'licence_of', lambda name, kind='language_model': None if kind == 'image_tokenizer' else 'gpl-3.0')
    with pytest.raises(BadInput, match='inherit no licence; give licence'): publish(trained[1][1], tmp_path/'out')
    folder = publish(trained[1][1], tmp_path/'out', licence='cc-by-4.0')
    assert not (folder/'image_tokenizer').exists() and '`tiny-vq` (VQModel), which is not in this folder' in (folder/'README.md').read_text() and card.exists()
    assert publish(trained[1][1], tmp_path/'with', licence='cc-by-4.0', image_licence='mit').joinpath('image_tokenizer', 'config.json').is_file()


# What cannot be published

@pytest.mark.parametrize('changes, base, words', [
    (dict(licence='gpl-2.0'), 'gpl-3.0', "licensed under 'gpl-3.0', which a derived model inherits"), (dict(), None, 'is not known (no README.md that names it)'), (dict(licence='apache2'), 'mit', "Did you mean 'apache-2.0'"),
    (dict(step=3), 'mit', 'has kept no weights of step 3; it has 1, 4'), (dict(image_licence='free'), 'mit', "image_licence='free' is not known"),
])
def test_what_cannot_be_published_is_said_in_a_sentence(run, changes, base, words, monkeypatch, tmp_path):
    real = publishing.licence_of
    monkeypatch.setattr(publishing, 'licence_of', lambda name, kind='language_model': base if kind == 'language_model' else real(name, kind))
    with pytest.raises(BadInput, match=re.escape(words)): publish(run, tmp_path/'out', **changes)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_licence_and_changed_data_ask_for_one(run, trained, pairs, monkeypatch, tmp_path):
    rows = (pairs/'metadata.jsonl').read_text()
    try:
        (pairs/'metadata.jsonl').write_text(rows.replace('"CC0"', 'null'))
        with pytest.raises(BadInput, match='is not what the run was trained on'): publish(run, tmp_path/'out')
        monkeypatch.setattr(publishing, 'store_of', lambda fingerprint: None)     # without a store to compare with
        with pytest.raises(BadInput, match=r"pairs of 'pictures'|rows of 'pictures' \(and plain text\) name no licence"): publish(run, tmp_path/'out')
        (pairs/'metadata.jsonl').unlink()
        with pytest.raises(BadInput, match="data 'pictures' of the run cannot be read here"): publish(run, tmp_path/'out')
        text = (publish(run, tmp_path/'out', data_licence='public domain, by the museum')/'README.md').read_text()
        assert 'as the publisher of this model says: public domain, by the museum' in text and 'bits per byte' not in text
    finally: (pairs/'metadata.jsonl').write_text(rows)


def test_a_folder_that_is_not_ours_and_an_unfinished_run_are_left_alone(run, trained, tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'README.md').write_text('mine')
    with pytest.raises(BadInput, match='is not an empty folder'): publish(run, tmp_path/'mine')
    assert (tmp_path/'mine'/'README.md').read_text() == 'mine'
    with pytest.raises(BadInput, match='neither a folder nor a run id'): publish('no-such-run', tmp_path/'out')
    shutil.copytree(work_path('runs', run), tmp_path/'half'); (tmp_path/'half'/'environment.json').write_text('[')
    with pytest.raises(BadInput, match="environment.json of run 'half' cannot be read"): publish(tmp_path/'half', tmp_path/'out')
    (tmp_path/'half'/'done.json').unlink()
    with pytest.raises(BadInput, match='no finished run'): publish(tmp_path/'half', tmp_path/'out')
    shutil.rmtree(tmp_path/'half'/'weights')
    with pytest.raises(BadInput, match='has kept no weights'): publish(tmp_path/'half', tmp_path/'out')


@pytest.mark.parametrize('error, words', [(OSError(errno.ENOSPC, 'No space left on device'), 'No space left'), (OSError(errno.EROFS, 'Read-only file system'), 'Read-only file system'),
                                          (RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'), 'no space left for the folder')])
def test_a_full_or_read_only_disk_leaves_nothing(run, error, words, monkeypatch, tmp_path):
    def broken(*args, **kwargs): raise error
    monkeypatch.setattr('t2ianalysis.publish.ModelCard.save', broken)
    with pytest.raises(BadInput, match=words): publish(run, tmp_path/'out')
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_with_status_2_and_publishes(run, t2i, capsys, tmp_path):
    for arguments, words in ((['no-such-run', 'x'], 'no-such-run'), ([run, str(tmp_path/'x'), '--public'], 'give push'), ([run, str(tmp_path/'x'), '--push', 'me/model'], 'HF_HUB_OFFLINE is set')):
        assert t2i('publish', *arguments) == 2
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1 and not (tmp_path/'x').exists()
    assert t2i('publish', run, tmp_path/'x') == 0
    assert (tmp_path/'x'/'layout.json').is_file() and 'layout.json' in capsys.readouterr().out


# To the hub

class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face hub as an upload asks for."
    made, files = [], {}
    def log_message(self, *args): pass
    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status); self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        if self.path == '/api/whoami-v2': self.answer(dict(name='me', type='user') if self.headers['Authorization'] == 'Bearer hf_right' else dict(error='no'), 200 if self.headers['Authorization'] == 'Bearer hf_right' else 401)
        else: self.answer(dict(id='me/model', sha='0' * 40, siblings=[]))
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path == '/api/repos/create': self.made.append(json.loads(body)); self.answer(dict(url=f'{self.server.address}/me/model'))
        elif self.path == '/api/validate-yaml': self.answer(dict(errors=[], warnings=[]))
        elif '/preupload/' in self.path: self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        elif '/commit/' in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.files.update({x['value']['path']: base64.b64decode(x['value']['content']) for x in lines if x['key'] == 'file'})
            self.answer(dict(success=True, commitOid='0' * 40, commitUrl=f'{self.server.address}/me/model/commit/0'))


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.address = f'http://127.0.0.1:{server.server_port}'
    Hub.made.clear(); Hub.files.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def test_a_folder_is_pushed_whole_to_a_private_repository(run, hub, monkeypatch, tmp_path):
    folder = publish(run, tmp_path/'out')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(publishing, 'HfApi', lambda: huggingface_hub.HfApi(endpoint=hub.address))
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    assert push(folder, 'me/model') == f'{hub.address}/me/model'
    assert [(made['name'], made['visibility']) for made in Hub.made] == [('model', 'private')]
    assert Hub.files == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    with pytest.raises(BadInput, match='was not made by publish'): push(tmp_path, 'me/model')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(BadInput, match='does not answer or does not take the token'): push(folder, 'me/model')
    assert len(Hub.made) == 1


def test_push_needs_a_name_the_network_and_a_token(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match='give owner/name'): push(tmp_path, 'model')
    with pytest.raises(BadInput, match='HF_HUB_OFFLINE is set'): push(tmp_path, 'me/model')
    monkeypatch.setattr(publishing.huggingface_hub.constants, 'is_offline_mode', lambda: False)
    monkeypatch.setattr(publishing.huggingface_hub, 'get_token', lambda: None)
    with pytest.raises(BadInput, match='hf auth login'): push(tmp_path, 'me/model')


# The data card

def test_the_data_card_counts(pairs, tmp_path):
    facts = data_facts(str(pairs), 16)
    assert facts['report'] == {'kept': 22, 'undecodable: not an image': 1, 'empty caption': 1} and facts['pairs'].total() == 22
    assert facts['licences'] == {'CC0': 15, 'CC-BY-4.0': 7} and facts['twins'].total() == 1 and facts['sizes'] == {'32 x 32': 23, 'header not readable': 1}
    write_data_card(str(pairs), tmp_path/'DATA.md', px=16)
    card = DatasetCard.load(tmp_path/'DATA.md')
    assert card.data.license == 'other' and card.data.size_categories == 'n<1K' and card.data.language is None and card.data.pretty_name == 'pictures'
    for row in ('| CC0 | 15 |', '| CC-BY-4.0 | 7 |', '| 32 x 32 | 23 |', '| undecodable: not an image | 1 |', '| header not readable | 1 |', '| empty caption | 1 |', 'Their language was not determined'): assert row in card.text
    assert str(pairs.parent) not in str(card) and Image.open(tmp_path/'DATA.jpg').width > 100
    code = re.search('```python\n(.*?)```', card.text, re.DOTALL)[1]
    compile(code, 'card', 'exec')


def test_several_captions_of_an_image_make_no_near_duplicate(make, tmp_path):
    rows = []
    for i in range(4):
        picture = io.BytesIO(); make['noise'](i, 32).save(picture, format='PNG')
        rows.append(dict(image=dict(bytes=picture.getvalue(), path=None), caption=[f'picture {i} {word}' for word in ('one', 'two', 'three')]))
    datasets.Dataset.from_list(rows).cast_column('image', datasets.Image()).to_parquet(tmp_path/'each.parquet')
    facts = data_facts(str(tmp_path/'each.parquet'), 16, captions='each')
    assert facts['pairs'].total() > 4 and facts['twins'].total() == 0 and facts['sizes'] == {'32 x 32': 4}


def test_the_data_card_leaves_files_alone_and_names_what_is_wrong(pairs, tmp_path):
    (tmp_path/'DATA.md').write_text('mine')
    for args, words in (((pairs, tmp_path/'DATA.md'), 'DATA.md exists'), ((pairs, tmp_path/'x.jpg'), 'no name for Markdown'), ((tmp_path/'nowhere', tmp_path/'x.md'), 'nowhere')):
        with pytest.raises(BadInput, match=words): write_data_card(*map(str, args))
    with pytest.raises(BadInput, match='dedup=9 is not a distance'): write_data_card(str(pairs), tmp_path/'x.md', distance=9)
    assert (tmp_path/'DATA.md').read_text() == 'mine' and sorted(p.name for p in tmp_path.iterdir()) == ['DATA.md']


def test_the_shipped_models_say_their_licences():
    assert huggingface_hub.metadata_load(data_path('image_tokenizer', 'README.md'))['license'] == publishing.licence_of('bundled', 'image_tokenizer') == 'apache-2.0'
