"Documents: nothing of an image is lost, nothing of a caption is lost silently, and every position is called what it is."
import hashlib
import json
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from t2ianalysis import sequences
from t2ianalysis.data import BadInput, load_captions
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.sequences import (
    LAYOUTS,
    SPECIALS,
    Batch,
    Kind,
    Prose,
    Sequences,
    Vocab,
    by_length,
    caption_ids,
    collate,
    document,
    documents,
    order,
    read_document,
    text_fingerprint,
)
from t2ianalysis.tokenizers import ShardedCodes, tokenize_captions

vocab = Vocab(text=300, codes=64)
codes = st.lists(st.integers(0, 63), min_size=1, max_size=20)
captions = st.lists(st.integers(0, 299), max_size=30)
rows = st.lists(st.tuples(captions, codes, st.integers(0, 40), st.sampled_from(LAYOUTS)), min_size=1, max_size=5)
AROUND = {'text-image': 6, 'image': 4}  # special tokens of a document


def ids_of(tokenizer, text): return tokenizer(text, add_special_tokens=False)['input_ids']


# One document

@settings(max_examples=200, deadline=None)
@given(text=st.text(), codes=codes, room=st.integers(0, 60), layout=st.sampled_from(LAYOUTS))
@example(text='', codes=[0], room=0, layout='text-image')
@example(text='', codes=[63], room=60, layout='image')
@example(text='naïve 日本 🐟\x00\r\n', codes=[5, 5], room=3, layout='text-image')
def test_a_document_gives_back_what_went_in(text_tokenizer, text, codes, room, layout):
    assume('<|endoftext|>' not in text)
    caption, length = ids_of(text_tokenizer, text), len(codes) + AROUND[layout] + room
    ids, cut = document(vocab, caption, codes, length, layout)
    back, image = read_document(vocab, torch.tensor(ids))
    assert image == codes and len(ids) <= length
    if layout == 'image': assert back == [] and cut == 0
    else:
        assert caption == back + caption[len(caption) - cut:] and len(back) == min(len(caption), room)
        if cut: assert len(ids) == length
        else: assert text_tokenizer.decode(back, clean_up_tokenization_spaces=False) == text


@settings(max_examples=50, deadline=None)
@given(caption=captions, codes=codes, layout=st.sampled_from(LAYOUTS))
def test_the_order_of_a_document(caption, codes, layout):
    ids, _ = document(vocab, caption, codes, 99, layout)
    words = [SPECIALS[i - 300] if 300 <= i < 307 else i if i < 300 else f'code {i - 307}' for i in ids]
    text = ['<text>', *caption, '</text>'] if layout == 'text-image' else []
    assert words == ['<doc>', *text, '<image>', *(f'code {c}' for c in codes), '</image>', '</doc>']


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_length_that_does_not_hold_the_image(layout):
    need = 20 + AROUND[layout]
    assert document(vocab, [1, 2, 3], range(20), need, layout)[1] == (3 if layout == 'text-image' else 0)
    with pytest.raises(BadInput, match=f'length={need - 1} is too short for an image of 20 codes; give at least {need}'): document(vocab, [1], range(20), need - 1, layout)


def test_an_unknown_layout():
    with pytest.raises(BadInput, match="layout='image-txt' is unknown; give one of text-image, image"): document(vocab, [], [1], 99, 'image-txt')


def test_a_caption_of_ten_thousand_characters(text_tokenizer):
    text = 'a red fish, naïve 🐟 ' * 500
    caption, image = ids_of(text_tokenizer, text), list(range(64))
    assert len(text) == 10_000 and len(caption) > 2_000
    ids, cut = document(vocab, caption, image, 160)
    assert read_document(vocab, torch.tensor(ids)) == (caption[:90], image) and cut == len(caption) - 90
    ids, cut = document(vocab, caption, image, 10**6)
    assert cut == 0 and text_tokenizer.decode(read_document(vocab, torch.tensor(ids))[0]) == text


# Kinds

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 100))
def test_every_id_has_one_kind(text, codes):
    v = Vocab(text, codes)
    kind = v.kinds(torch.arange(v.size))
    assert kind.tolist() == [Kind.TEXT] * text + [Kind.SPECIAL] * 6 + [Kind.PAD] + [Kind.IMAGE] * codes
    assert kind.dtype == torch.int8 and v.size == text + 7 + codes and v.image == text + 7
    assert [v.special(s) for s in SPECIALS] == list(range(text, text + 7)) and v.kinds(torch.arange(v.size).view(1, -1, 1)).shape == (1, v.size, 1)


@settings(max_examples=100, deadline=None)
@given(rows)
def test_labels_and_kinds_of_a_batch(rows):
    docs = [document(vocab, caption, image, len(image) + 6 + room, layout)[0] for caption, image, room, layout in rows]
    batch = collate(vocab, docs)
    assert batch.ids.shape == (len(rows), max(map(len, docs))) and batch.ids.dtype == torch.long  # trimmed to the longest
    for row, kind, doc in zip(batch.ids.tolist(), batch.kind.tolist(), docs):
        assert row == doc + [vocab.special('<pad>')] * (len(row) - len(doc))           # padding on the right only
        assert kind == [vocab.kinds(torch.tensor([i])).item() for i in row]
    labels, kinds, pad = batch.labels, batch.label_kind, batch.label_kind == Kind.PAD
    assert labels.shape == kinds.shape == batch.inputs.shape == (len(rows), batch.ids.shape[1] - 1)
    assert torch.equal(labels == -100, pad) and torch.equal(vocab.kinds(labels[~pad]), kinds[~pad])
    assert torch.equal(batch.inputs[:, 1:][~pad[:, :-1]], labels[:, :-1][~pad[:, :-1]])    # labels are the inputs, one ahead
    assert batch.tokens == sum(len(d) - 1 for d in docs) == (labels != -100).sum()
    assert (kinds == Kind.IMAGE).sum() == sum(len(image) for _, image, _, _ in rows)       # every code counts in the loss
    assert torch.equal(batch.ids, collate(vocab, docs).ids)                           # looking at labels changes nothing


def test_a_batch_moves_and_shows():
    batch = collate(vocab, [document(vocab, [1, 2], [3], 99)[0], document(vocab, [], [3], 99)[0]])
    moved = batch.to('cpu')
    assert isinstance(moved, Batch) and torch.equal(moved.ids, batch.ids) and torch.equal(moved.kind, batch.kind)
    html = batch._repr_html_()
    width = lambda colour: sum(int(n) for n in re.findall(rf'width:(\d+)px;background:{colour}', html)) // 7
    assert width('#e69f00') == 2 + 1 and width('#56b4e9') == 2 + 1 and width('#eeeeee') == 2 + 1  # and one each in the key


# Many documents at once

shapes = st.integers(1, 20).flatmap(lambda n: st.lists(st.tuples(st.lists(st.integers(0, 299), max_size=30), st.lists(st.integers(0, 63), min_size=n, max_size=n)), min_size=1, max_size=6))


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(0, 40), st.sampled_from(LAYOUTS))
def test_many_documents_are_the_single_ones(pairs, room, layout):
    length, image = len(pairs[0][1]) + AROUND[layout] + room, np.array([c for _, c in pairs], np.uint16)
    many = documents(vocab, [np.array(c, np.int32) for c, _ in pairs], image, length, layout)
    assert [d.tolist() for d in many] == [document(vocab, c, i, length, layout)[0] for c, i in pairs] and all(d.dtype == np.int64 for d in many)
    with pytest.raises(BadInput, match='is too short'): documents(vocab, [np.array([1])] * len(pairs), image, length - room - 1, layout)


class Words:
    "A text tokenizer that reads numbers"
    def get_vocab(self): return {'a': 0}
    def __call__(self, texts, **_): return dict(input_ids=[[int(word) for word in text.split()] for text in texts])


def store_of(folder, pairs, shards=False):
    "What `Sequences` needs of a token store; the codes in two files if `shards`"
    image = np.array([c for _, c in pairs], np.uint16)
    if shards:
        parts = image[:len(image) // 2], image[len(image) // 2:]
        files = [Path(folder, f'codes-{k}') for k in range(2) if len(parts[k])]
        for file, part in zip(files, [p for p in parts if len(p)]): file.write_bytes(part.tobytes())
        image = ShardedCodes(files, [len(p) for p in parts if len(p)], image.shape[1])
    class Store:
        captions, codes, vocab_size, fingerprint = [' '.join(map(str, c)) for c, _ in pairs], image, 64, 'f' * 64
        def __len__(self): return len(pairs)
    store = Store()
    store.folder = Path(folder)
    return store


@settings(max_examples=60, deadline=None)
@given(pairs=shapes, room=st.integers(0, 40), layout=st.sampled_from(LAYOUTS), shards=st.booleans(), data=st.data())
def test_a_batch_of_a_store_is_its_documents(pairs, room, layout, shards, data):
    numbers = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=8))
    shown = data.draw(st.none() | st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    with tempfile.TemporaryDirectory() as folder:
        rows = Sequences(store_of(folder, pairs, shards), Words(), 300, len(pairs[0][1]) + AROUND[layout] + room, layout)
        wanted = [rows[n] if s else document(rows.vocab, [], rows.store.codes[n], rows.length, layout)[0] for n, s in zip(numbers, shown or [True] * len(numbers))]
        captioned = shown and np.array(shown)
        batch, reference = rows.batch(np.array(numbers), captioned), collate(rows.vocab, wanted)
        assert torch.equal(batch.ids, reference.ids) and torch.equal(batch.kind, reference.kind)
        assert rows.lengths(numbers, captioned).tolist() == [len(d) for d in wanted]
        assert [d.tolist() for d in rows.documents(numbers, captioned)] == wanted
        assert rows.shortened == (sum(len(c) > room for c, _ in pairs) if layout == 'text-image' else 0)
        for wrong in (len(pairs), -1 - len(pairs)):
            with pytest.raises(IndexError): rows.batch([wrong])


def test_plain_text_is_its_tokens_between_end_tokens(text_tokenizer):
    texts = ['A paragraph of plain text.', '', 'Another, which is longer than the first one and is cut.'] * 2
    prose, end = Prose(texts, text_tokenizer, 12), text_tokenizer.eos_token_id
    wanted = [([end] + ids_of(text_tokenizer, t))[:11] + [end] for t in texts]
    assert [prose[i] for i in range(6)] == wanted == list(prose) and prose.lengths([2, 0]).tolist() == [12, len(wanted[0])]
    assert [d.tolist() for d in prose.documents(np.array([5, 1]))] == [wanted[5], wanted[1]]
    assert prose.fingerprint == hashlib.sha256(repr(wanted).encode()).hexdigest()  # names runs: must never change
    assert prose.ids.flat.dtype == np.int32 and len(Prose([], text_tokenizer, 12)) == 0


# Parts

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 12))
def test_parts_of_similar_lengths(lengths, parts):
    groups = by_length(lengths, parts)
    flat = [i for group in groups for i in group]
    assert flat == sorted(range(len(lengths)), key=lengths.__getitem__) and len(groups) == min(parts, len(lengths)) and all(groups)
    tokens = [sum(lengths[i] for i in group) for group in groups]
    if max(lengths) <= sum(lengths) / parts: assert all(abs(t - sum(lengths) / parts) <= max(lengths) for t in tokens)
    assert by_length([], 3) == []


# The order of the data

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 40), batch=st.integers(1, 50))
def test_every_epoch_is_a_permutation(seed, n, batch):
    steps = -(-3 * n // batch)
    numbers = [i for step in range(steps) for i in order(seed, step, n, batch)]
    assert len(numbers) == steps * batch
    for epoch in range(3): assert sorted(numbers[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_order_has_no_state():
    wanted = [(7, step, 50, 8) for step in (3, 0, 40, 3, 12)]
    first = [order(*w).tolist() for w in wanted]
    torch.manual_seed(1)
    sequences._permutation.cache_clear()
    state = torch.get_rng_state()
    assert [order(*w).tolist() for w in reversed(wanted)] == first[::-1] and torch.equal(torch.get_rng_state(), state)


def test_order_differs_by_seed_and_epoch():
    epochs = [tuple(order(seed, step, 50, 50)) for seed in range(4) for step in range(4)]
    assert len(set(epochs)) == 16 and tuple(range(50)) not in epochs


def test_order_is_the_same_on_every_machine():
    named = torch.Generator().manual_seed(43605010263239082)  # the first 7 bytes of the SHA-256 of "order 0 0"
    assert order(0, 0, 6, 6).tolist() == torch.randperm(6, generator=named).tolist()


@pytest.mark.parametrize('seed, n, batch, digest', [
    (0, 1, 3, '81c611f35bff'), (0, 10, 4, '2ba441d187b6'), (0, 997, 16, '34936e7fc06d'), (0, 3420, 32, 'f0a51456cff6'), (0, 5, 17, '3ebb017ef0a3'),
    (7, 997, 16, '597719e3c145'), (7, 5, 17, '240afc547518'), ('prose 1', 10, 4, 'a6d127f5514e'), ('prose 1', 3420, 32, '4e6b19c8c9ca')])
def test_the_order_of_every_record_so_far(seed, n, batch, digest):
    numbers = np.concatenate([order(seed, step, n, batch) for step in (0, 1, 2, 50, 213, 100_000)])
    assert numbers.dtype == np.int64 and hashlib.sha256(numbers.astype('<i8').tobytes()).hexdigest()[:12] == digest


def test_two_epochs_are_kept_at_most():
    for step in range(6): order(3, step, 8, 8)
    assert sequences._permutation.cache_info().currsize == 2


# Captions of a store

def test_caption_ids_are_the_tokenizer_s(store, text_tokenizer):
    ids = caption_ids(store, text_tokenizer)
    assert [i.tolist() for i in ids] == [ids_of(text_tokenizer, c) for c in store.captions] and len(ids) == 10 and ids[0].dtype == np.int32


def counting(tokenizer):
    "The tokenizer, and a list of its calls"
    calls = []
    class Counting:
        backend_tokenizer = tokenizer.backend_tokenizer
        def __call__(self, texts, **kwargs): calls.append(len(texts)); return tokenizer(texts, **kwargs)
    return Counting(), calls


def cache_of(store): return next(store.folder.glob('captions-*.bin'))


def test_the_second_call_reads_the_cache(store, text_tokenizer):
    tokenizer, calls = counting(text_tokenizer)
    first, second = caption_ids(store, tokenizer), caption_ids(store, tokenizer)
    assert calls == [10] and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def cut(content): return content[:-1]
def cut_in_the_lengths(content): return content[:16]
def emptied(content): return b''
def longer(content): return content + bytes(4)
def other_length(content): return bytes([content[0] ^ 1]) + content[1:]
def other_token(content): return content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
def moved_border(content): return content[:32] + bytes([content[32] + 1]) + content[33:36] + bytes([content[36] - 1]) + content[37:]  # lengths of the first two captions


@pytest.mark.parametrize('damage', [cut, cut_in_the_lengths, emptied, longer, other_length, other_token, moved_border], ids=lambda f: f.__name__)
@pytest.mark.fault('the file of tokenised captions is cut or changed', 'it is made again')
def test_a_damaged_cache_is_made_again(store, text_tokenizer, damage):
    tokenizer, calls = counting(text_tokenizer)
    whole = [ids.copy() for ids in caption_ids(store, tokenizer)]  # the file itself is about to be damaged
    content = cache_of(store).read_bytes()
    cache_of(store).write_bytes(damage(content))
    again = caption_ids(store, tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True)) and calls == [10, 10] and cache_of(store).read_bytes() == content


def test_caption_ids_stay_in_their_file(store, text_tokenizer):
    ids, file = caption_ids(store, text_tokenizer), cache_of(store)
    assert not ids.flat.flags.owndata and not ids.flat.flags.writeable and len(ids.flat) == sum(map(len, ids))
    content = file.read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest() and np.frombuffer(content[32:], np.int32)[:10].tolist() == [len(i) for i in ids]


def test_captions_in_blocks_give_the_same_file(store, text_tokenizer, monkeypatch):
    caption_ids(store, text_tokenizer)
    content = cache_of(store).read_bytes()
    monkeypatch.setattr(sequences, '_in_blocks', partial(sequences._in_blocks, size=3))
    cache_of(store).rename(beside := store.folder/f'.{cache_of(store).name}.partial')      # as a killed process leaves it: not taken for whole
    beside.write_bytes(content + b'more')
    tokenizer, calls = counting(text_tokenizer)
    caption_ids(store, tokenizer)
    assert calls == [3, 3, 3, 1] and cache_of(store).read_bytes() == content and not beside.exists()


def test_an_interrupted_pass_over_captions_leaves_nothing(store, text_tokenizer, monkeypatch):
    monkeypatch.setattr(sequences, '_in_blocks', partial(sequences._in_blocks, size=3))
    class Stops:
        backend_tokenizer, calls = text_tokenizer.backend_tokenizer, 0
        def __call__(self, texts, **kwargs):
            self.calls += 1
            if self.calls == 3: raise KeyboardInterrupt
            return text_tokenizer(texts, **kwargs)
    with pytest.raises(KeyboardInterrupt): caption_ids(store, Stops())
    assert not [f for f in store.folder.iterdir() if 'captions-' in f.name and f.suffix != '.lock']
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patched:
        patched.setattr(sequences.os, 'fsync', full)
        with pytest.raises(BadInput, match='captions of .* cannot be kept there .*No space left on device'): caption_ids(store, text_tokenizer)
    assert len(caption_ids(store, text_tokenizer)) == 10


@pytest.mark.parametrize('number', [9, 11])
def test_captions_that_are_not_one_for_each_image(store, text_tokenizer, number):
    store.captions = ['a'] * number
    with pytest.raises(BadInput, match=f'holds {number} captions for 10 images'): caption_ids(store, text_tokenizer)


def test_two_at_once_make_one_file(store, text_tokenizer):
    tokenizer, calls = counting(text_tokenizer)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: caption_ids(store, tokenizer), range(4)))
    assert calls == [10] and all(np.array_equal(found[0].flat, f.flat) for f in found)


def test_another_text_tokenizer_has_a_cache_of_its_own(store, text_tokenizer):
    other = type(text_tokenizer)(tokenizer_object=type(text_tokenizer.backend_tokenizer).from_str(text_tokenizer.backend_tokenizer.to_str()))
    assert text_fingerprint(other) == text_fingerprint(text_tokenizer)
    other.add_tokens(['a red fish'])
    assert text_fingerprint(other) != text_fingerprint(text_tokenizer)
    first, second = caption_ids(store, text_tokenizer), caption_ids(store, other)
    assert len(list(store.folder.glob('captions-*.bin'))) == 2 and len(second[0]) < len(first[0])
    slow = SimpleNamespace(get_vocab=lambda: {'a': 0})
    assert text_fingerprint(slow) != text_fingerprint(SimpleNamespace(get_vocab=lambda: {'a': 1}))


# A store as sequences

@pytest.mark.parametrize('layout', LAYOUTS)
def test_sequences_are_the_documents_of_the_store(store, text_tokenizer, layout):
    data = Sequences(store, text_tokenizer, 300, 99, layout)
    assert len(data) == 10 and data.vocab == Vocab(300, 16) and data.shortened == 0
    for i in (9, 0, 4):
        caption, image = read_document(data.vocab, torch.tensor(data[i]))
        assert image == store.codes[i].tolist()
        assert text_tokenizer.decode(caption) == (store.captions[i] if layout == 'text-image' else '')
    assert torch.equal(data.batch([4, 0]).ids, collate(data.vocab, [data[4], data[0]]).ids)


def test_shortened_captions_are_counted(store, text_tokenizer):
    lengths = sorted(len(ids_of(text_tokenizer, c)) for c in store.captions)
    for room in (0, lengths[0] - 1, lengths[0], lengths[-1] - 1, lengths[-1]):
        data = Sequences(store, text_tokenizer, 300, room + 16 + 6)
        assert data.shortened == sum(n > room for n in lengths)
        assert all(len(d) <= data.length and read_document(data.vocab, torch.tensor(d))[1] == c.tolist() for d, c in zip(map(data.__getitem__, range(10)), store.codes))
    assert Sequences(store, text_tokenizer, 300, 16 + 4, 'image').shortened == 0


def test_sequences_refuse_a_length_that_is_too_short(store, text_tokenizer):
    for layout, need in (('text-image', 22), ('image', 20)):
        with pytest.raises(BadInput, match=f'length={need - 1} is too short .* give at least {need}'): Sequences(store, text_tokenizer, 300, need - 1, layout)


def test_a_text_tokenizer_with_more_tokens_than_rows(store, text_tokenizer):
    high = max(max(ids_of(text_tokenizer, c)) for c in store.captions)
    assert len(Sequences(store, text_tokenizer, high + 1, 99)) == 10
    with pytest.raises(BadInput, match=f'gives token {high} but the language model has {high} rows'): Sequences(store, text_tokenizer, high, 99)


def test_long_and_empty_captions_of_a_store(vq, make, text_tokenizer, tmp_path):
    store = tokenize_captions(load_captions(make['pairs'](tmp_path/'pairs', 3), 'all', 16), vq, tmp_path/'store', progress=False)
    store.captions = ['word ' * 2_000, '', 'a red fish']
    data = Sequences(store, text_tokenizer, 300, 60)
    assert [len(c) for c in data.captions] == [len(ids_of(text_tokenizer, c)) for c in store.captions] and len(data.captions[1]) == 0
    assert data.shortened == 1 and len(data[0]) == 60 and len(data[1]) == 22 and len(data.batch([1, 2]).ids[0]) == len(data[2])
    store.captions = ['', '', '']
    cache_of(store).unlink()
    assert [len(Sequences(store, text_tokenizer, 300, 60)[i]) for i in range(3)] == [22] * 3


def test_the_bundled_text_tokenizer_loses_nothing():
    tokenizer = load_text_tokenizer('bundled')
    for text in ('a picture of a red fish', ' two  spaces ', 'naïve 日本 🐟', json.dumps({'a': [1, 2]})):
        assert tokenizer.decode(ids_of(tokenizer, text), clean_up_tokenization_spaces=False) == text
