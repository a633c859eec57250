"What the tests share: a place for results of their own, and tiny random models."
import os
import shutil
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # read when the hub's library is imported

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from t2ianalysis.data import load_captions
from t2ianalysis.tokenizers import load_image_tokenizer, tokenize_captions


@pytest.fixture(autouse=True)
def own_place(monkeypatch, tmp_path_factory):
    "Results of a test go to a folder of its own"
    monkeypatch.setenv('T2I_WORK', str(tmp_path_factory.mktemp('work')))


def noise(seed, px=16):
    "A picture that differs for every seed: blocks of colour, so that the codes differ too"
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype='uint8')
    return Image.fromarray(blocks).resize((px, px), Image.Resampling.NEAREST)


def write_vq(folder, norm='group', seed=0):
    "A random VQModel of 16 codes that lie where its encoder's outputs are"
    torch.manual_seed(seed)
    channels = {'group': (8, 8, 16), 'spatial': (32, 32)}[norm]
    model = VQModel(block_out_channels=channels, down_block_types=('DownEncoderBlock2D',) * len(channels), up_block_types=('UpDecoderBlock2D',) * len(channels),
                    layers_per_block=1, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, norm_num_groups=8, norm_type=norm, mid_block_add_attention=False)
    with torch.no_grad():
        vectors = model.encode(torch.randn(4, 3, 16, 16)).latents.permute(0, 2, 3, 1).reshape(-1, 4)
        model.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:16]])
    model.save_pretrained(folder)
    return folder


def write_pairs(folder, n=10):
    "A folder of n pictures with a text beside each"
    folder.mkdir()
    for i in range(n):
        noise(i).save(folder/f'{i:03}.png')
        (folder/f'{i:03}.txt').write_text(f'picture {i}: a red fish, naïve 日本 🐟', encoding='utf-8')
    return folder


@pytest.fixture(scope='session')
def make(): return {'noise': noise, 'vq': write_vq, 'pairs': write_pairs}


@pytest.fixture(scope='session')
def vq_folder(tmp_path_factory): return write_vq(tmp_path_factory.mktemp('vq')/'tiny')


@pytest.fixture(scope='session')
def vq(vq_folder): return load_image_tokenizer(str(vq_folder))


@pytest.fixture(scope='session')
def pairs_folder(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp('pairs')/'pairs')


@pytest.fixture
def store(vq, pairs_folder, tmp_path):
    "Ten pairs of 4 x 4 codes"
    return tokenize_captions(load_captions(pairs_folder, 'all', 16), vq, tmp_path/'store', batch=4, progress=False)


@pytest.fixture(scope='session')
def text_tokenizer():
    "A byte-level BPE of 300 tokens: every text goes there and back"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(['a picture of a red fish', 'two blue fish and a red house'] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|endoftext|>', model_max_length=10**9)


@pytest.fixture
def stopped_at(monkeypatch):
    "Train, but die just before the update of a step: stopped_at(5, config)"
    from t2ianalysis import training
    class Died(Exception): pass
    real = training.lr_at
    def train(step, config):
        def mortal(c, s):
            if s == step: raise Died
            return real(c, s)
        with monkeypatch.context() as m, pytest.raises(Died): m.setattr(training, 'lr_at', mortal); training.train(config)
    return train


@pytest.fixture
def t2i(monkeypatch):
    "Run `t2i` in this process: t2i('train', '--preset', 'smoke') is its exit status"
    from t2ianalysis import cli
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['t2i', *map(str, arguments)])
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code
    return run


@pytest.fixture(scope='module')
def browser():
    "A headless Chromium; its event loop belongs to one file of tests"
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('no chromium on this machine')
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with sync_api.sync_playwright() as p:
        made = p.chromium.launch(executable_path=chromium, args=quiet)
        yield made
        made.close()
