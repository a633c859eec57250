"The image tokenizer contract and the token store: codes are right, whole, and written once."
import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from t2ianalysis.data import BadInput, load_captions, work_path
from t2ianalysis.tokenizers import (
    TokenStore,
    VQTokenizer,
    check_codes,
    check_tokenizer,
    fingerprint_weights,
    load_image_tokenizer,
    nearest_codes,
    psnr,
    store_folder,
    tokenize_captions,
    usage,
)

WEIGHTS = 'diffusion_pytorch_model.safetensors'
FILES = ('codes.bin', 'captions.jsonl', 'meta.json')


def tokenise(folder, tokenizer, out, **options): return tokenize_captions(load_captions(folder, 'all', 16, **options), tokenizer, out, batch=4, progress=False)
def contents(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'lock'}


@pytest.fixture
def fresh(vq_folder): return load_image_tokenizer(str(vq_folder))  # one that a test may break


# The contract

@pytest.mark.parametrize('norm, downsample', [('group', 4), ('spatial', 2)])
def test_contract_of_both_norms(make, tmp_path, norm, downsample):
    tokenizer = load_image_tokenizer(str(make['vq'](tmp_path/norm, norm)))
    images = [make['noise'](i) for i in range(6)]
    codes = check_tokenizer(tokenizer, images)
    assert tokenizer.downsample == downsample and tokenizer.grid(16) == codes.shape[1:] == (16 // downsample,) * 2
    assert len(codes.unique()) > 8 and tokenizer.vocab_size == 16  # a constant would keep much of the contract
    assert not any(p.requires_grad for p in tokenizer.model.parameters()) and not tokenizer.model.training


@pytest.mark.parametrize('norm', ['group', 'spatial'])
def test_codes_are_the_nearest_and_decode_takes_their_vectors(make, tmp_path, norm):
    tokenizer = load_image_tokenizer(str(make['vq'](tmp_path/norm, norm)))
    x = torch.stack([tokenizer.preprocess(make['noise'](i)) for i in range(6)])
    codes, book = tokenizer.encode(x), tokenizer.model.quantize.embedding.weight
    h = tokenizer.model.encode(x).latents                                              # (B, D, h, w)
    for b, i, j in np.ndindex(*codes.shape):
        distances = [(h[b, :, i, j] - vector).square().sum().item() for vector in book]
        assert distances[codes[b, i, j]] <= min(distances) + 1e-5
    pixels = tokenizer.model.decode(book[codes].permute(0, 3, 1, 2), force_not_quantize=True).sample
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert (tokenizer.decode(codes).float() - expected).abs().max() < 0.51             # rounded to whole values
    other = tokenizer.decode(codes.flip(2))
    assert (other != tokenizer.decode(codes)).any()                                    # where a code lies matters


def test_preprocess_is_the_documented_range(vq, make):
    image = make['noise'](3)
    pixels = np.asarray(image)
    x = vq.preprocess(image)
    assert torch.allclose(x, torch.tensor(pixels / 127.5 - 1).permute(2, 0, 1).float()) and x.min() >= -1 and x.max() <= 1


def test_check_tokenizer_refuses_what_breaks_the_contract(vq_folder, make):
    images = [make['noise'](i) for i in range(4)]
    def broken(**methods):
        tokenizer = load_image_tokenizer(str(vq_folder))
        for name, method in methods.items(): setattr(tokenizer, name, method)
        return tokenizer
    real = load_image_tokenizer(str(vq_folder))
    for methods in ({'encode': lambda x: real.encode(x).int()}, {'encode': lambda x: real.encode(x).flatten(1)}, {'encode': lambda x: torch.randint(16, (len(x), 4, 4))},
                    {'encode': lambda x: (real.encode(x) + len(x)) % 16}, {'decode': lambda c: real.decode(c).float()}, {'preprocess': lambda i: real.preprocess(i).double()}):
        with pytest.raises(AssertionError): check_tokenizer(broken(**methods), images)
    with pytest.raises(BadInput): check_tokenizer(broken(vocab_size=2), images)


@pytest.mark.parametrize('codes, says', [([[0, 16]], 'gives code 16'), ([[-1, 3]], 'gives code -1')])
def test_codes_outside_the_codebook_are_named(vq, codes, says):
    with pytest.raises(BadInput, match=says): check_codes(np.array(codes), vq)
    with pytest.raises(BadInput, match=says): vq.decode(torch.tensor([codes]))
    check_codes(torch.tensor([0, 15]), vq)


@pytest.mark.parametrize('px', [0, -4, 6, 17])
def test_sizes_that_do_not_divide_are_refused(vq, px):
    with pytest.raises(BadInput, match=f'px={px} .*multiple of 4'): vq.grid(px)


def test_codes_in_chunks_are_the_same_and_never_too_many(vq, make, monkeypatch):
    seen = []
    def distances(part, book): seen.append(len(part) * len(book)); return torch.cdist(part, book)
    vectors, book = torch.randn(2, 700, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.cdist(vectors, book).argmin(1)
    for room in (1, 700, 20_000, 2**24):
        seen.clear()
        assert torch.equal(nearest_codes(vectors, book, distances, room), whole) and max(seen) <= max(room, 700) and sum(seen) == 700 * 700
    assert nearest_codes(vectors[:0], book).shape == (0,)
    many = [make['noise'](i) for i in range(3)]
    monkeypatch.setattr(vq, '_distances', distances); seen.clear()
    vq.encode(torch.stack([vq.preprocess(i) for i in many]))
    assert seen == [3 * 16 * 16]


def test_the_shipped_tokenizer_gives_the_codes_of_diffusers_own_quantizer():
    tokenizer = load_image_tokenizer()
    x = torch.stack([tokenizer.preprocess(p['image']) for p in load_captions('openclipart', 'train', 64, limit=32)])
    with torch.inference_mode():
        h = tokenizer.model.encode(x).latents
        own = tokenizer.model.quantize(h)[2][2]
        for room in (2**24, 2**18, 2**14): assert torch.equal(nearest_codes(h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]), tokenizer._book(), room=room), own)
    assert torch.equal(tokenizer.encode(x).flatten(), own)
    assert tokenizer.fingerprint == '343b7891799b027541160be9a31575573de368b18ef12f08b46df3af148dbe6f'                 # the stores of all records name it


# The VQ models of transformers

VQ = dict(embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1)
PARTS = {'chameleon': ('Chameleon', dict(VQ, num_embeddings=16, resolution=16)), 'emu3': ('Emu3', dict(VQ, codebook_size=16, attn_resolutions=[1], hidden_size=32)),
         'janus': ('Janus', dict(VQ, num_embeddings=16, num_patches=8, projection_dim=8, image_token_embed_dim=16))}
TEXT = dict(vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)


def spread(part, model):
    "Random weights whose codes differ: the codebook lies where the encoder's outputs are"
    torch.manual_seed(0)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2) if p.ndim > 1 else None
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        h = model.encoder(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)).flatten(0, 1) if part == 'emu3' else model.encoder(x)
        h = model.quant_conv(h.unsqueeze(2))[:, :, 0] if part == 'emu3' else model.quant_conv(h)
        vectors = h.permute(0, 2, 3, 1).reshape(-1, 4)
        model.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:16]])
    return model.eval()


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Tiny random VQ models of transformers, each in a folder of its own"
    folder = tmp_path_factory.mktemp('parts')
    for part, (name, sizes) in PARTS.items():
        spread(part, getattr(transformers, f'{name}VQVAE')(getattr(transformers, f'{name}VQVAEConfig')(**sizes))).save_pretrained(folder/part)
    return folder


@pytest.fixture(scope='module')
def wholes(parts, tmp_path_factory):
    "The same VQ models inside whole multimodal models, in several files, of which those without VQ tensors are taken away"
    folder = tmp_path_factory.mktemp('wholes')
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16)
    more = {'chameleon': TEXT | {'vocabulary_map': {'<image>': 5}}, 'emu3': {'text_config': TEXT, 'vocabulary_map': {'<image>': 5}},
            'janus': {'text_config': TEXT | {'model_type': 'llama'}, 'vision_config': vision}}
    for part, (name, sizes) in PARTS.items():
        model = getattr(transformers, f'{name}ForConditionalGeneration')(getattr(transformers, f'{name}Config')(vq_config=sizes, **more[part]))
        model.model.vqmodel.load_state_dict(load_file(parts/part/'model.safetensors'))
        model.save_pretrained(folder/part, max_shard_size='20KB')
        index = json.loads((folder/part/'model.safetensors.index.json').read_text())['weight_map']
        gone = set(index.values()) - {file for key, file in index.items() if 'vqmodel' in key}
        for file in gone: (folder/part/file).unlink()
        assert gone
    return folder


def pictures(make): return [make['noise'](i) for i in range(6)]


@pytest.mark.parametrize('part', PARTS)
def test_the_contract_of_transformers_models(parts, make, part):
    tokenizer = load_image_tokenizer(str(parts/part))
    codes = check_tokenizer(tokenizer, pictures(make))
    assert len(codes.unique()) > 5 and tokenizer.vocab_size == 16 and tokenizer.grid(16) == (8, 8) and tokenizer.can_decode == (part != 'chameleon')
    assert check_tokenizer(tokenizer, [make['noise'](i, 24) for i in range(2)]).shape == (2, 12, 12)   # another size


@pytest.mark.parametrize('part', ['chameleon', 'emu3'])
def test_codes_are_those_of_transformers(parts, make, part):
    tokenizer = load_image_tokenizer(str(parts/part))
    x = torch.stack([tokenizer.preprocess(i) for i in pictures(make)])
    with torch.inference_mode(): theirs = tokenizer.model.encode(x, **({'image_sizes': torch.tensor([[16, 16]] * 6)} if part == 'emu3' else {})).image_tokens
    assert torch.equal(tokenizer.encode(x).flatten(), torch.stack(theirs).flatten() if part == 'emu3' else theirs)


def test_codes_of_janus_are_those_of_the_model_as_it_was_trained(parts, make):
    tokenizer = load_image_tokenizer(str(parts/'janus'))
    x = torch.stack([tokenizer.preprocess(i) for i in pictures(make)])
    with torch.inference_mode(): z = tokenizer.model.quant_conv(tokenizer.model.encoder(x)).permute(0, 2, 3, 1).reshape(-1, 4)
    book, codes = tokenizer.model.quantize.embedding.weight, tokenizer.encode(x).flatten()
    angle = torch.nn.functional.cosine_similarity(z[:, None], book[None], dim=-1)       # of vectors of length 1, the nearest is the one of the least angle
    assert (angle.gather(1, codes[:, None])[:, 0] >= angle.max(1).values - 1e-6).all()
    with torch.inference_mode(): assert (tokenizer.model.encode(x).image_tokens != codes).any()


@pytest.mark.parametrize('part', ['emu3', 'janus'])
def test_pictures_are_those_of_transformers(parts, make, part):
    tokenizer = load_image_tokenizer(str(parts/part))
    codes = tokenizer.encode(torch.stack([tokenizer.preprocess(i) for i in pictures(make)]))
    with torch.inference_mode(): theirs = tokenizer.model.decode(codes if part == 'emu3' else codes.flatten(1))
    theirs = ((theirs + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert (tokenizer.decode(codes).float() - theirs).abs().max() < .51 and theirs.std() > 5


@pytest.mark.parametrize('part', PARTS)
def test_of_a_whole_model_only_the_vq_part_is_read(parts, wholes, make, part):
    alone, whole = load_image_tokenizer(str(parts/part)), load_image_tokenizer(str(wholes/part))
    x = torch.stack([alone.preprocess(i) for i in pictures(make)])
    assert whole.fingerprint == alone.fingerprint and torch.equal(whole.encode(x), alone.encode(x))
    assert sum(p.numel() for p in whole.model.parameters()) == sum(p.numel() for p in alone.model.parameters())


def test_what_only_encodes_says_so(parts, pairs_folder, tmp_path):
    tokenizer = load_image_tokenizer(str(parts/'chameleon'))
    assert len(tokenise(pairs_folder, tokenizer, tmp_path/'out')) == 10
    with pytest.raises(BadInput, match="'chameleon' only encodes"): tokenizer.decode(torch.zeros(1, 8, 8, dtype=torch.long))


@pytest.mark.parametrize('part, file, scale, processor', [
    ('chameleon', None, (.0078, 1, 1), 'ChameleonImageProcessorPil'), ('emu3', None, (1 / 255, .5, .5), None), ('janus', None, (1 / 255, .5, .5), None),
    ('emu3', 'preprocessor_config.json', (.004, [.1, .2, .3], [.4, .5, .6]), 'Emu3ImageProcessor'), ('janus', 'processor_config.json', (1 / 255, [.4, .5, .6], [.5, .5, .7]), 'JanusImageProcessorPil')])
def test_pixels_are_scaled_as_the_models_own_processor_does(parts, make, tmp_path, part, file, scale, processor):
    folder = shutil.copytree(parts/part, tmp_path/part)
    numbers = dict(rescale_factor=scale[0], image_mean=scale[1], image_std=scale[2])
    if file: (folder/file).write_text(json.dumps(numbers if file.startswith('pre') else {'image_processor': numbers}))
    tokenizer, image = load_image_tokenizer(str(folder)), make['noise'](3)
    x = tokenizer.preprocess(image)
    expected = (np.asarray(image) * scale[0] - np.array(scale[1])) / np.array(scale[2])
    assert np.abs(x.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    if processor:
        own = getattr(transformers, processor)(**(numbers if file else {}))
        assert np.abs(own(image, do_resize=False, do_center_crop=False, do_pad=False, return_tensors='np')['pixel_values'][0] - x.numpy()).max() < 1e-5
    if tokenizer.can_decode: assert (tokenizer._bytes(x).permute(1, 2, 0) - torch.tensor(np.array(image))).abs().max() < 1e-3
    assert (tokenizer.fingerprint == load_image_tokenizer(str(parts/part)).fingerprint) == (file is None)   # other pixels make other codes


def vq_without_codebook(folder): save_file({k: v for k, v in load_file(folder/'model.safetensors').items() if 'embedding' not in k}, folder/'model.safetensors')
def vq_of_another_size(folder): (folder/'config.json').write_text((folder/'config.json').read_text().replace('"base_channels": 32', '"base_channels": 64'))
def vq_cut(folder): (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:-9])
def vq_gone(folder): (folder/'model.safetensors').unlink()
def vq_bad_scale(folder): (folder/'preprocessor_config.json').write_text('{"rescale_factor": 1, "image_mean": "x", "image_std": 1}')


@pytest.mark.parametrize('spoil', [vq_without_codebook, vq_of_another_size, vq_cut, vq_gone, vq_bad_scale], ids=lambda f: f.__name__)
@pytest.mark.parametrize('part', PARTS)
def test_spoilt_folders_of_transformers_models(parts, tmp_path, part, spoil):
    folder = shutil.copytree(parts/part, tmp_path/'spoilt')
    spoil(folder)
    with pytest.raises(BadInput, match='image_tokenizer=.*spoilt.* could not be loaded as .*VQVAE'): load_image_tokenizer(str(folder))


@pytest.mark.parametrize('config, kind', [({'model_type': 'llama'}, 'llama'), ({'_class_name': 'AutoencoderKL'}, 'AutoencoderKL'), ({'architectures': ['X']}, 'X'), ({}, 'None')])
def test_unknown_kinds_are_refused_by_name(tmp_path, config, kind):
    (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f'{kind}.*known are VQModel, chameleon, chameleon_vqgan, emu3, emu3_vqgan, janus, janus_vqgan'): load_image_tokenizer(str(tmp_path))


@pytest.mark.parametrize('part, whole', [('emu3', True), ('janus', False)])
def test_from_the_hub_only_what_is_needed_is_fetched(parts, wholes, tmp_path, monkeypatch, part, whole):
    remote, fetched = (wholes if whole else parts)/part, set()
    def snapshot_download(repo, allow_patterns):
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, p) for p in allow_patterns): shutil.copy(file, tmp_path); fetched.add(file.name)
        return str(tmp_path)
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    assert load_image_tokenizer(f'owner/{part}').fingerprint == load_image_tokenizer(str(parts/part)).fingerprint
    weights = {p.name for p in remote.glob('*.safetensors')}
    assert fetched == weights | {'config.json'} | ({'model.safetensors.index.json'} if whole else set())


# Loading

def test_the_bundled_tokenizer_keeps_the_contract(make):
    tokenizer = load_image_tokenizer()
    check_tokenizer(tokenizer, [make['noise'](i, 64) for i in range(2)])
    assert tokenizer.name == 'bundled' and tokenizer.vocab_size <= 2**16


@pytest.mark.parametrize('name, says', [
    ('bundeld', "Did you mean 'bundled'"), ('./no/such', 'nor a folder'), ('/no/such', 'nor a folder'), ('a/b/c', 'nor a folder'), ('a/b:../c', 'nor a folder'), ('a:b', 'nor a folder'), ('owner/model', 'is not on this machine')])
def test_unknown_names(name, says):
    with pytest.raises(BadInput, match=f'image_tokenizer={name!r}.*{says}'): load_image_tokenizer(name)


def without_config(folder): (folder/'config.json').unlink()
def config_cut(folder): (folder/'config.json').write_text('{')
def weights_cut(folder): (folder/WEIGHTS).write_bytes((folder/WEIGHTS).read_bytes()[:-10])
def weights_zero(folder): (folder/WEIGHTS).write_bytes(bytes(100))
def weights_gone(folder): (folder/WEIGHTS).unlink()
def pickled(folder): torch.save(load_file(folder/WEIGHTS), folder/'diffusion_pytorch_model.bin'); (folder/WEIGHTS).unlink()
def other_size(folder): (folder/'config.json').write_text((folder/'config.json').read_text().replace('"num_vq_embeddings": 16', '"num_vq_embeddings": 8'))


@pytest.mark.parametrize('spoil', [without_config, config_cut, weights_cut, weights_zero, weights_gone, pickled, other_size], ids=lambda f: f.__name__)
def test_folders_that_cannot_be_loaded(vq_folder, tmp_path, spoil):
    folder = shutil.copytree(vq_folder, tmp_path/'spoilt')
    spoil(folder)
    with pytest.raises(BadInput, match='image_tokenizer=.*spoilt'): load_image_tokenizer(str(folder))


def test_weights_that_lack_the_codebook_are_refused(vq_folder, tmp_path):
    folder = shutil.copytree(vq_folder, tmp_path/'spoilt')
    save_file({k: v for k, v in load_file(folder/WEIGHTS).items() if k != 'quantize.embedding.weight'}, folder/WEIGHTS)
    with pytest.raises(BadInput): load_image_tokenizer(str(folder))


def test_a_pickle_is_never_opened(vq_folder, tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path/'sprung'), 'w'))
    folder = shutil.copytree(vq_folder, tmp_path/'trap')
    torch.save({'x': Trap()}, folder/'diffusion_pytorch_model.bin')
    (folder/WEIGHTS).unlink()
    with pytest.raises(BadInput): load_image_tokenizer(str(folder))
    assert not (tmp_path/'sprung').exists()


def test_the_fingerprint_is_of_weights_and_config_alone(vq_folder, make, tmp_path):
    same = shutil.copytree(vq_folder, tmp_path/'another name')
    (same/'README.md').write_text('x')
    shutil.copy(same/WEIGHTS, same/WEIGHTS.replace('.', '.fp16.'))                     # a variant that is never loaded
    assert fingerprint_weights(same) == fingerprint_weights(vq_folder) != fingerprint_weights(make['vq'](tmp_path/'seed', seed=1))
    other_size(same)
    assert fingerprint_weights(same) != fingerprint_weights(vq_folder)


# The store

def test_a_store_gives_what_encoding_gives(store, vq, pairs_folder):
    pairs = list(load_captions(pairs_folder, 'all', 16))
    assert len(store) == len(pairs) == 10 and store.codes.dtype == np.uint16 and store.grid == (4, 4) and store.vocab_size == 16
    for i in (7, 0, 9, 3, 3):
        direct = vq.encode(vq.preprocess(pairs[i]['image'])[None]).flatten()
        assert store.codes[i].tolist() == direct.tolist() and store.captions[i] == pairs[i]['caption']
    assert len(np.unique(store.codes, axis=0)) > 5 and store.folder.joinpath('codes.bin').stat().st_size == 10 * 16 * 2
    assert set(contents(store.folder)) == set(FILES)  # in particular, progress.json is gone


def test_a_finished_store_is_opened_not_made(store, fresh, pairs_folder):
    fresh.encode = lambda x: pytest.fail('encoded again')
    before = contents(store.folder)
    assert tokenise(pairs_folder, fresh, store.folder).fingerprint == store.fingerprint and contents(store.folder) == before


def test_codes_above_255_survive(vq_folder, pairs_folder, tmp_path):
    tokenizer = load_image_tokenizer(str(vq_folder))
    tokenizer.vocab_size, tokenizer.encode = 2**16, lambda x: torch.arange(16).view(1, 4, 4).expand(len(x), 4, 4) + 65_520
    assert tokenise(pairs_folder, tokenizer, tmp_path/'high').codes[5].tolist() == list(range(65_520, 65_536))
    tokenizer.vocab_size += 1
    with pytest.raises(BadInput, match='65,537 codes'): tokenise(pairs_folder, tokenizer, tmp_path/'higher')


def test_bad_pictures_leave_no_hole(vq, make, tmp_path):
    folder = make['pairs'](tmp_path/'some bad', 11)
    (folder/'002.png').write_bytes(b'broken')
    (folder/'005.txt').write_text(' ')
    (folder/'010.png').write_bytes(b'')
    store = tokenise(folder, vq, tmp_path/'out')
    assert [json.loads(line)['row'] for line in (tmp_path/'out/captions.jsonl').open()] == [0, 1, 3, 4, 6, 7, 8, 9]
    assert len(store) == len(store.captions) == 8 and store.meta['report'] == {'kept': 8, 'empty caption': 1, 'undecodable: not an image': 2}
    assert store.codes[2].tolist() == vq.encode(vq.preprocess(make['noise'](3))[None]).flatten().tolist()


@pytest.mark.parametrize('name', ['codes.bin', 'captions.jsonl'])
@pytest.mark.parametrize('where', [0, 77, -1])
@pytest.mark.fault('a bit of a token store flips', 'the store is refused; the file and the remedy are named')
def test_one_flipped_bit_is_found_and_named(store, name, where):
    content = bytearray((store.folder/name).read_bytes())
    content[where] ^= 1
    (store.folder/name).write_bytes(content)
    with pytest.raises(BadInput, match=f'{name}.*checksum.*tokenise again'): TokenStore(store.folder)
    TokenStore(store.folder, verify=False) if name == 'codes.bin' else None


@pytest.mark.parametrize('name', ['codes.bin', 'captions.jsonl'])
@pytest.mark.fault('a file of a token store is gone', 'the store is refused; the file is named')
def test_a_file_that_is_gone_is_named(store, name):
    (store.folder/name).unlink()
    with pytest.raises(BadInput, match=name): TokenStore(store.folder)


def test_a_store_without_meta_is_not_finished(store):
    (store.folder/'meta.json').unlink()
    with pytest.raises(BadInput, match='no meta.json'): TokenStore(store.folder)


@pytest.mark.parametrize('content', [
    b'', b'{"grid": [4, 4', b'{}', b'null', b'\xff\xfe\0'])
def test_damaged_meta(store, content):
    (store.folder/'meta.json').write_bytes(content)
    with pytest.raises(BadInput, match='damaged'): TokenStore(store.folder)


@pytest.mark.parametrize('change', [{'grid': [2, 8]}, {'vocab_size': 8}])
def test_a_changed_meta_is_found(store, change):
    (store.folder/'meta.json').write_text(json.dumps(store.meta | change))
    with pytest.raises(BadInput, match='damaged'): TokenStore(store.folder)


def test_captions_are_utf8_in_every_locale(store, monkeypatch):
    def in_latin(self, mode='r', buffering=-1, encoding=None, errors=None, newline=None):
        return open(self, mode, buffering, encoding or (None if 'b' in mode else 'latin-1'), errors, newline)
    with monkeypatch.context() as patch:
        patch.setattr('pathlib.Path.open', in_latin)
        assert TokenStore(store.folder).captions == store.captions


def test_codes_beyond_the_declared_vocabulary_leave_no_store(fresh, pairs_folder, tmp_path):
    fresh.vocab_size = 3
    with pytest.raises(BadInput, match='declares 3 codes but gives code'): tokenise(pairs_folder, fresh, tmp_path/'out')
    assert not (tmp_path/'out/meta.json').exists()
    with pytest.raises(BadInput, match='no finished token store'): TokenStore(tmp_path/'out')
    fresh.vocab_size = 16
    assert len(tokenise(pairs_folder, fresh, tmp_path/'out')) == 10  # nothing of the bad pass is left in it


def test_an_empty_split_is_refused(vq, pairs_folder, tmp_path):
    captions = load_captions(pairs_folder, 'validation', 16, validation_fraction=0.0)
    with pytest.raises(BadInput, match='no usable pair in the validation split'): tokenize_captions(captions, vq, tmp_path/'out', progress=False)
    assert not (tmp_path/'out/meta.json').exists()


def test_every_difference_has_a_folder_of_its_own(vq, make, pairs_folder, tmp_path):
    another = load_image_tokenizer(str(make['vq'](tmp_path/'tiny', seed=1)))  # the same name, other weights
    longer = make['pairs'](tmp_path/'pairs', 11)
    load = lambda folder=pairs_folder, split='all', px=16, **options: load_captions(folder, split, px, **options)
    wanted = [(load(), vq), (load(px=32), vq), (load(), another), (load(limit=5), vq), (load(limit=6), vq), (load(split='train'), vq), (load(longer), vq)]
    folders = [store_folder(captions, tokenizer, captions.spec['limit']) for captions, tokenizer in wanted]
    assert len(set(folders)) == len(folders) and another.name == vq.name
    assert folders[0] == store_folder(load(), vq) and folders[0].parent == work_path('stores')
    store = tokenize_captions(load(limit=5), vq, progress=False)
    assert store.folder == folders[3] and len(store) == 5 and len(tokenize_captions(load(limit=6), vq, progress=False)) == 6


def test_usage_and_psnr_by_hand(store):
    counts = np.unique(np.asarray(store.codes), return_counts=True)[1] / store.codes.size
    assert usage(store) == pytest.approx({'used': len(counts), 'share': len(counts) / 16, 'entropy': -(counts * np.log(counts)).sum(), 'perplexity': np.exp(-(counts * np.log(counts)).sum())})
    a = torch.randint(0, 200, (3, 8, 8, 3), dtype=torch.uint8)
    b = torch.stack([a[0], a[1] + 1, a[2] + 10])
    assert psnr(a, b).tolist() == pytest.approx([60, 48.1308, 28.1308], abs=1e-3)


# Interruptions

@pytest.fixture(scope='module')
def uneven(make, tmp_path_factory):
    "Fourteen pairs, with bad rows at the end of a batch, at its beginning and at the end of all"
    folder = make['pairs'](tmp_path_factory.mktemp('uneven')/'pairs', 14)
    for name in ('004.png', '013.png'): (folder/name).write_bytes(b'broken')
    (folder/'000.txt').write_text('')
    return folder


def stop_at_write(number, monkeypatch, make_store):
    "Make a store; every write ends in an fsync, and after this one nothing more happens. True if there were so many"
    real, count = os.fsync, iter(range(1, 99))
    def fsync(file):
        real(file)
        if next(count) == number: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        try: make_store()
        except KeyboardInterrupt: return True
    return False


@pytest.mark.parametrize('limit, writes', [(None, 10), (7, 7)])
@pytest.mark.fault('a tokenising pass stops at any write, with torn ends of its files', 'it goes on to the same bytes')
def test_a_pass_stopped_at_any_write_goes_on_to_the_same_bytes(uneven, vq, tmp_path, monkeypatch, limit, writes):
    whole = tokenise(uneven, vq, tmp_path/'whole', limit=limit)
    for stop in range(1, 99):
        out = tmp_path/f'stopped-{stop}'
        if not stop_at_write(stop, monkeypatch, lambda out=out: tokenise(uneven, vq, out, limit=limit)): break
        assert not (out/'meta.json').exists()
        for name in FILES[:2]:
            with (out/name).open('ab') as file: file.write(b'torn')                    # what a write that is cut in two may leave
        store = tokenise(uneven, vq, out, limit=limit)
        expected = contents(whole.folder)
        if stop == 10: assert (store.meta | {'report': 0}) == (whole.meta | {'report': 0}); expected['meta.json'] = contents(out)['meta.json']  # see the next test
        assert contents(out) == expected, f'stopped at write {stop}'
    assert stop == writes + 1  # three a batch, and meta.json


def test_no_row_is_counted_twice(uneven, vq, tmp_path, monkeypatch):
    assert stop_at_write(10, monkeypatch, lambda: tokenise(uneven, vq, tmp_path/'out'))
    report = tokenise(uneven, vq, tmp_path/'out').meta['report']
    assert report == {'empty caption': 1, 'kept': 11, 'undecodable: not an image': 2}


def test_a_resumed_pass_does_not_encode_again(uneven, vq_folder, tmp_path):
    tokenizer, seen = load_image_tokenizer(str(vq_folder)), []
    real = tokenizer.encode
    def encode(x):
        if len(seen) == 2: seen.append('stop'); raise RuntimeError('out of memory')
        seen.append(len(x)); return real(x)
    tokenizer.encode = encode
    with pytest.raises(RuntimeError): tokenise(uneven, tokenizer, tmp_path/'out')
    assert json.loads((tmp_path/'out/progress.json').read_text())['kept'] == 8
    assert len(tokenise(uneven, tokenizer, tmp_path/'out')) == 11 and seen == [4, 4, 'stop', 4]  # the last three are made up to a batch


KILLED = """
import sys, time
from t2ianalysis.data import load_captions
from t2ianalysis.tokenizers import load_image_tokenizer, tokenize_captions
pairs, weights, out = sys.argv[1:]
tokenizer = load_image_tokenizer(weights)
real = tokenizer.encode
tokenizer.encode = lambda x: (time.sleep(0.05), real(x))[1]
tokenize_captions(load_captions(pairs, 'all', 16), tokenizer, out, batch=4, progress=False)
"""


@pytest.mark.fault('kill -9 during tokenising', 'the pass goes on where it stopped, to the same bytes')
def test_a_killed_process_goes_on_to_the_same_bytes(vq_folder, vq, make, tmp_path):
    folder, out = make['pairs'](tmp_path/'pairs', 60), tmp_path/'out'
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', KILLED, str(folder), str(vq_folder), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not ((out/'codes.bin').exists() and (out/'codes.bin').stat().st_size >= 20 * 32): time.sleep(0.01)
    finally: process.kill()
    assert process.wait() == -signal.SIGKILL and not (out/'meta.json').exists()
    done = json.loads((out/'progress.json').read_text())['kept']
    assert 16 <= done < 60 and done % 4 == 0
    assert contents(tokenise(folder, vq, out).folder) == contents(tokenise(folder, vq, tmp_path/'whole').folder)


def test_what_a_kill_in_the_midst_of_a_write_leaves_is_cleared(vq, pairs_folder, tmp_path):
    out = stopped(pairs_folder, vq, tmp_path/'out')
    (out/f'.{os.getpid() + 1}-139914102725504.tmp').write_text('{"row": 4')
    assert contents(tokenise(pairs_folder, vq, out).folder) == contents(tokenise(pairs_folder, vq, tmp_path/'whole').folder)


def stopped(folder, tokenizer, out, batches=2):
    "A pass that stopped after some batches"
    class Stopped(VQTokenizer):
        def encode(self, x):
            self.left = getattr(self, 'left', batches) - 1
            if self.left < 0: raise KeyboardInterrupt
            return super().encode(x)
    with pytest.raises(KeyboardInterrupt): tokenise(folder, Stopped(tokenizer.model, tokenizer.name, tokenizer.fingerprint), out)
    return out


def test_codes_lost_in_an_interruption_are_not_zeros(vq, pairs_folder, tmp_path):
    out = stopped(pairs_folder, vq, tmp_path/'out')
    (out/'codes.bin').unlink()
    try: store = tokenise(pairs_folder, vq, out)
    except BadInput: return
    assert store.codes[0].tolist() == vq.encode(vq.preprocess(next(iter(load_captions(pairs_folder, 'all', 16)))['image'])[None]).flatten().tolist()


def test_a_damaged_progress_file_is_no_riddle(vq, pairs_folder, tmp_path):
    out = stopped(pairs_folder, vq, tmp_path/'out')
    (out/'progress.json').write_text('{')
    try: assert contents(tokenise(pairs_folder, vq, out).folder) == contents(tokenise(pairs_folder, vq, tmp_path/'whole').folder)
    except BadInput: pass


@pytest.mark.parametrize('finished', [True, False])
def test_a_named_folder_is_not_taken_for_other_data(vq, make, pairs_folder, tmp_path, finished):
    out = tokenise(pairs_folder, vq, tmp_path/'out').folder if finished else stopped(pairs_folder, vq, tmp_path/'out')
    other = make['pairs'](tmp_path/'other', 12)
    for path in other.glob('*.txt'): path.write_text('another caption')
    with pytest.raises(BadInput): tokenise(other, vq, out)


@pytest.mark.fault('two passes over the same data at once', 'one makes the store, the other waits and opens it')
def test_two_at_once_make_one_store(vq, pairs_folder, tmp_path):
    whole, both, stores = tokenise(pairs_folder, vq, tmp_path/'whole').fingerprint, threading.Barrier(2), []
    class Meeting(VQTokenizer):
        def encode(self, x):
            with contextlib.suppress(threading.BrokenBarrierError): both.wait(1)  # if one waits for its turn, the other is not held up again
            return super().encode(x)
    def run(): stores.append(tokenise(pairs_folder, Meeting(vq.model, vq.name, vq.fingerprint), tmp_path/'out').fingerprint)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert stores == [whole, whole] and TokenStore(tmp_path/'out').fingerprint == whole
