"Published MoVQGAN and VQGAN checkpoints: what they become computes what the original code computed, and nothing in them is run."
import fnmatch
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from golden_vqgan import CONFIGS, DIGESTS, MODELS, digest, golden_checkpoint, golden_images
from safetensors.torch import load_file

from t2ianalysis.data import BadInput
from t2ianalysis.tokenizers import check_tokenizer, load_image_tokenizer
from t2ianalysis.vqgan import convert_vqgan, read_vqgan, rename_vqgan, vqgan_sizes, vqmodel_of

EXPECTED = load_file(Path(__file__).with_name('golden_vqgan.safetensors'))
KINDS = ['movqgan', 'vqgan']


@pytest.fixture(scope='module')
def states(): return {kind: golden_checkpoint(**sizes) for kind, sizes in MODELS.items()}


def averages(state): return {f'ema_{k.split(".", 1)[0]}.{k.split(".", 1)[1].replace(".", "")}': v.flip(0) for k, v in state.items()}


@pytest.fixture(scope='module')
def checkpoints(states, tmp_path_factory):
    "As published: SBER's bare state dict (here with moving averages), taming's under state_dict with its losses"
    folder = tmp_path_factory.mktemp('checkpoints')
    torch.save(states['movqgan'] | averages(states['movqgan']) | {'ema_encoder.decay': torch.tensor(.9999), 'ema_encoder.num_updates': torch.tensor(-1)}, folder/'movqgan.ckpt')
    torch.save({'epoch': 4, 'global_step': 9, 'state_dict': states['vqgan'] | {'loss.logvar': torch.zeros(()), 'loss.discriminator.main.0.weight': torch.zeros(2, 3)}}, folder/'vqgan.ckpt')
    for kind, config in CONFIGS.items(): (folder/f'{kind}.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='module')
def converted(checkpoints):
    for kind in KINDS: convert_vqgan(checkpoints/f'{kind}.ckpt', checkpoints/'out'/kind, kind)
    return checkpoints/'out'


# What the original code computed

@pytest.mark.parametrize('kind', KINDS)
def test_the_golden_checkpoints_are_those_of_the_original_code(states, kind): assert digest(states[kind]) == DIGESTS[kind]


@pytest.mark.parametrize('kind', KINDS)
def test_codes_and_images_are_those_of_the_original_code(converted, kind):
    tokenizer, images = load_image_tokenizer(str(converted/kind)), golden_images(kind)
    expected = EXPECTED[f'{kind}.codes'].long()
    codes = tokenizer.encode(images)
    assert torch.equal(codes, expected) and len(expected.unique()) > 3
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), expected)
    assert torch.equal(tokenizer.encode(images[[0, 1, 1, 0, 1]]), expected[[0, 1, 1, 0, 1]])
    with torch.inference_mode(): pictures = tokenizer._pixels(expected)
    target = EXPECTED[f'{kind}.reconstruction']
    assert (pictures[:len(target), :, ::2, ::2] - target).abs().max() < 1e-4 and target.std() > .1
    assert torch.equal(tokenizer.decode(expected), ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))


@pytest.mark.parametrize('kind', KINDS)
def test_diffusers_loads_the_folder_by_itself(converted, states, kind):
    assert sorted(p.name for p in (converted/kind).iterdir()) == ['config.json', 'diffusion_pytorch_model.safetensors']
    model, info = VQModel.from_pretrained(converted/kind, output_loading_info=True)
    assert not any(info.values()) and model.config.norm_type == ('spatial' if kind == 'movqgan' else 'group')
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for v in states[kind].values())
    with torch.inference_mode():
        own = model.eval().quantize(model.encode(golden_images(kind)).latents)[2][2]
    assert torch.equal(own.view(2, 8, 8), EXPECTED[f'{kind}.codes'].long())


@pytest.mark.parametrize('kind', KINDS)
def test_the_contract_at_another_size(converted, make, kind):
    tokenizer = load_image_tokenizer(str(converted/kind))
    assert check_tokenizer(tokenizer, [make['noise'](i, 96) for i in range(2)]).shape[1:] == tokenizer.grid(96) == (96 // tokenizer.downsample,) * 2


def test_moving_averages_are_recognised_and_not_mixed_in(states, checkpoints, tmp_path):
    plain, left = read_vqgan(checkpoints/'movqgan.ckpt')
    assert set(plain) == set(states['movqgan']) and all(torch.equal(plain[k], v) for k, v in states['movqgan'].items()) and left == {'ema_': len(plain) + 2}
    told = convert_vqgan(checkpoints/'movqgan.ckpt', tmp_path/'ema', ema=True)
    weights = load_file(tmp_path/'ema'/'diffusion_pytorch_model.safetensors')
    assert 'moving averages' in told and torch.equal(weights['encoder.conv_in.weight'], states['movqgan']['encoder.conv_in.weight'].flip(0).float())
    for name, value in states['movqgan'].items(): assert torch.equal(weights[rename_vqgan(name, 4)].flatten(), value.flip(0).flatten().float())
    with pytest.raises(BadInput, match='no moving average of encoder.conv_in.weight'): convert_vqgan(checkpoints/'vqgan.ckpt', tmp_path/'no', 'vqgan', ema=True)


def test_every_size_is_read_from_the_tensors():
    state = golden_checkpoint(seed=0, ch=32, ch_mult=(1, 2, 1), blocks=2, attention=1, z=3, codes=11, spatial=False)
    assert vqgan_sizes(state) == dict(in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 1], num_res_blocks=2, attention=[1], z_channels=3, n_embed=11, embed_dim=3, spatial=False)
    config = vqmodel_of(state).config
    assert config.down_block_types == ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D', 'DownEncoderBlock2D'] and config.up_block_types[1] == 'AttnUpDecoderBlock2D'


# Bad input

def other(states, change): return {k: v for k, v in (states['vqgan'] | change).items() if v is not None}


@pytest.mark.parametrize('change, says', [
    ({'decoder.mid.attn_1.q.weight': None}, 'no decoder.mid_block.attentions.0.to_q.weight'), ({'encoder.mid.extra': torch.zeros(2)}, 'encoder.mid.extra is not known'),
    ({'encoder.norm_out.weight': torch.zeros(7)}, r'encoder.norm_out.weight is \(7,\), not \(128,\)'), ({'encoder.conv_in.weight': None}, 'no encoder.conv_in.weight'),
    ({'encoder.conv_out.weight': torch.zeros(128, 128, 3, 3)}, r'encoder.conv_out.weight is \(128, 128, 3, 3\), not \(64,'), ({'model.diffusion_model.x': torch.zeros(1)}, '1 of its 244 keys do not fit'),
    ({'quantize.embedding.weight': None, 'quantize.embed.weight': torch.zeros(2, 2)}, 'a Gumbel VQGAN'), ({'decoder.up.0.block.1.conv1.weight': None}, 'no decoder.up_blocks.4.resnets.1.conv1'),
])
def test_tensors_that_do_not_fit_are_named(states, tmp_path, change, says):
    torch.save({'state_dict': other(states, change)}, tmp_path/'x.ckpt')
    with pytest.raises(BadInput, match=says): convert_vqgan(tmp_path/'x.ckpt', tmp_path/'out', 'vqgan')
    assert [p.name for p in tmp_path.iterdir()] == ['x.ckpt']


@pytest.mark.parametrize('saved', [torch.zeros(3), [1, 2], {'state_dict': {'encoder.x': 3}}, {'state_dict': {'first_stage_model.encoder.x': torch.zeros(1)}}, {}])
def test_files_of_something_else(tmp_path, saved):
    torch.save(saved, tmp_path/'x.ckpt')
    with pytest.raises(BadInput, match=r'x\.ckpt (holds no state dict|is no VQGAN)'): read_vqgan(tmp_path/'x.ckpt')


@pytest.mark.parametrize('keep', [0, 10, 5_000, -20, -5_000])
def test_a_truncated_file_is_said_to_be_one(checkpoints, tmp_path, keep):
    (tmp_path/'x.ckpt').write_bytes((checkpoints/'vqgan.ckpt').read_bytes()[:keep])
    with pytest.raises(BadInput, match='cannot be read as a torch checkpoint'): read_vqgan(tmp_path/'x.ckpt')


@pytest.mark.parametrize('function, zipped', [(os.system, True), (os.system, False), (eval, True), (eval, False), (exec, True), (getattr, True)])
def test_code_in_a_pickle_is_never_run(states, tmp_path, function, zipped):
    class Trap:
        def __reduce__(self): return {os.system: (os.system, (f'touch {tmp_path}/sprung',)), getattr: (getattr, ([], 'append'))}.get(function, (function, (f"open('{tmp_path}/sprung', 'w')",)))
    torch.save({'state_dict': states['vqgan'], 'callbacks': Trap()}, tmp_path/'x.ckpt', _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match='holds code' if zipped else 'cannot be read'): convert_vqgan(tmp_path/'x.ckpt', tmp_path/'out', 'vqgan')
    assert [p.name for p in tmp_path.iterdir()] == ['x.ckpt']


def lightning(monkeypatch, name, base):
    "A class that a file knows as one of Lightning's, for as long as the file is written"
    module = types.ModuleType('pytorch_lightning.some.place')
    made = type(name, (base,), {'__module__': module.__name__, '__qualname__': name})
    setattr(module, name, made)
    for part in ('pytorch_lightning', 'pytorch_lightning.some', module.__name__): monkeypatch.setitem(sys.modules, part, module)
    return made


def test_lightning_objects_beside_the_weights_are_passed_over(states, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        callback = lightning(patch, 'ModelCheckpoint', object)
        full = callback(); full.best = {'score': 1.5}
        torch.save({'state_dict': states['vqgan'], 'callbacks': {callback: {'best': torch.ones(())}}, 'more': [full], 'optimizer_states': [{'state': {0: {'exp_avg': torch.ones(3)}}}]}, tmp_path/'x.ckpt')
    assert 'pytorch_lightning' not in sys.modules
    with pytest.raises(Exception, match='ModelCheckpoint'): torch.load(tmp_path/'x.ckpt', weights_only=True)   # torch alone refuses such a file
    tensors, left = read_vqgan(tmp_path/'x.ckpt')
    assert set(tensors) == set(states['vqgan']) and not left
    with pytest.raises(Exception, match='ModelCheckpoint'): torch.load(tmp_path/'x.ckpt', weights_only=True)   # and still does
    with monkeypatch.context() as patch:
        torch.save({'state_dict': states['vqgan'], 'hyper_parameters': lightning(patch, 'AttributeDict', dict)(lr=1e-4)}, tmp_path/'x.ckpt')
    assert set(read_vqgan(tmp_path/'x.ckpt')[0]) == set(states['vqgan'])


@pytest.mark.parametrize('kind, file, config, says', [
    ('vqgan', 'vqgan.json', {'ddconfig': {'ch': 128}}, 'vqgan.json says ch=128, but the tensors have 32'), ('vqgan', 'vqgan.yaml', {'model': {'params': {'n_embed': 1024}}}, 'says n_embed=1024'),
    ('movqgan', 'movqgan.yml', {'ddconfig': {'ch_mult': [1, 2]}}, r'says ch_mult=\[1, 2\]'), ('movqgan', 'movqgan.json', '{', 'cannot be read')])
def test_a_config_beside_is_compared(checkpoints, tmp_path, kind, file, config, says):
    shutil.copy(checkpoints/f'{kind}.ckpt', tmp_path)
    (tmp_path/file).write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(BadInput, match=says): convert_vqgan(tmp_path/f'{kind}.ckpt', tmp_path/'out', kind)
    assert not (tmp_path/'out').exists()


@pytest.mark.fault('a conversion of a checkpoint fails on its way', 'its folder is whole or not there')
def test_out_is_whole_or_not_there(checkpoints, tmp_path, monkeypatch):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').write_text('mine'); (tmp_path/'file').write_text('mine'); (tmp_path/'empty').mkdir()
    for name in ('full', 'file'):
        with pytest.raises(BadInput, match=f'{name}.* exists and is not an empty folder'): convert_vqgan(checkpoints/'vqgan.ckpt', tmp_path/name, 'vqgan')
    assert (tmp_path/'full'/'x').read_text() == (tmp_path/'file').read_text() == 'mine'
    convert_vqgan(checkpoints/'vqgan.ckpt', tmp_path/'empty', 'vqgan')
    def half(self, folder): Path(folder).mkdir(parents=True); (Path(folder)/'config.json').write_text('{}'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(VQModel, 'save_pretrained', half)
    with pytest.raises(BadInput, match='No space left'): convert_vqgan(checkpoints/'vqgan.ckpt', tmp_path/'new', 'vqgan')
    assert {p.name for p in tmp_path.iterdir()} == {'full', 'file', 'empty'}


# Commands

@pytest.mark.parametrize('kind, says', [('movqgan', r'311 tensors, 3,214,543 parameters, 64 codes, 8 x 8 .*, 313 ema_\* left out'), ('vqgan', r'243 tensors, .*128 codes, 16 x 16 .*, 2 loss\* left out')])
def test_the_commands(checkpoints, tmp_path, t2i, capsys, kind, says):
    assert t2i('convert', kind, checkpoints/f'{kind}.ckpt', tmp_path/'models'/'out') == 0
    assert re.search(says, capsys.readouterr().out) and load_image_tokenizer(str(tmp_path/'models'/'out')).vocab_size == MODELS[kind]['codes']
    swapped = KINDS[1 - KINDS.index(kind)]
    assert t2i('convert', swapped, checkpoints/f'{kind}.ckpt', tmp_path/'no') == 2
    assert f'`t2i convert {kind}`' in capsys.readouterr().err and not (tmp_path/'no').exists()


@pytest.mark.parametrize('arguments, words', [(['movqgan', 'nowhere.ckpt', 'out'], "checkpoint='nowhere.ckpt' is no file"), (['vqgan', 'tests', 'out'], 'is no file')])
def test_mistakes_of_the_commands(arguments, words, t2i, capsys):
    assert t2i('convert', *arguments) == 2
    assert words in capsys.readouterr().err


# Kandinsky's movq: a VQModel in a folder of its repository

@pytest.fixture
def hub(converted, tmp_path, monkeypatch):
    "A hub of one repository in Kandinsky's layout; gives the names of the files that were fetched"
    remote, fetched = tmp_path/'remote', []
    shutil.copytree(converted/'movqgan', remote/'movq')
    config = json.loads((remote/'movq'/'config.json').read_text())
    for new in ('mid_block_add_attention', 'lookup_from_codebook', 'force_upcast'): del config[new]   # as diffusers 0.17 wrote it
    (remote/'movq'/'config.json').write_text(json.dumps(config | {'_diffusers_version': '0.17.0.dev0', 'sample_size': 32}))
    shutil.copy(remote/'movq'/'diffusion_pytorch_model.safetensors', remote/'movq'/'diffusion_pytorch_model.bin')
    (remote/'unet').mkdir(); (remote/'unet'/'diffusion_pytorch_model.safetensors').write_text('large')
    def snapshot_download(repo, allow_patterns):
        if repo != 'kandinsky-community/kandinsky-2-1': raise OSError('offline')
        for file in (f for f in remote.rglob('*') if f.is_file()):
            name = str(file.relative_to(remote))
            if any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                fetched.append(name)
                (tmp_path/'cache'/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(file, tmp_path/'cache'/name)
        return str(tmp_path/'cache')
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    return fetched


def test_kandinskys_movq_by_hub_name_and_by_folder(hub, tmp_path):
    tokenizer = load_image_tokenizer('kandinsky-community/kandinsky-2-1:movq')
    assert sorted(hub) == ['movq/config.json', 'movq/diffusion_pytorch_model.safetensors'] and tokenizer.name == 'kandinsky-2-1:movq'
    assert torch.equal(tokenizer.encode(golden_images('movqgan')), EXPECTED['movqgan.codes'].long())
    assert load_image_tokenizer(str(tmp_path/'remote'/'movq')).fingerprint == tokenizer.fingerprint
    with pytest.raises(BadInput, match='the folder has no config.json'): load_image_tokenizer('kandinsky-community/kandinsky-2-1:nowhere')
    for name in ('owner/other:movq', 'owner/other'):
        with pytest.raises(BadInput, match='the hub did not give it'): load_image_tokenizer(name)
