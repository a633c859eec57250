"Images drawn code by code: only codes, the same with and without cache and batch; and distances that are what they are called."
import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import AutoModelForCausalLM, ChameleonVQVAE, ChameleonVQVAEConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

import t2ianalysis.generation as generation
from t2ianalysis.data import BadInput
from t2ianalysis.generation import (
    InceptionV3,
    Sampling,
    backbone,
    cached,
    caption_information,
    distances,
    frechet,
    frechet_interval,
    generate_grid,
    image_features,
    image_loglikelihood,
    load_painter,
    pick,
    picture_grid,
    rerank,
    sample_images,
    sample_prompts,
    uniforms,
)
from t2ianalysis.models import widen
from t2ianalysis.sequences import Vocab, document
from t2ianalysis.training import make_config

V, K, GRID = 50, 24, (3, 4)
vocab = Vocab(text=V, codes=K)
_common = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=48, initializer_range=0.3)
CONFIGS = {
    'llama-tied': lambda: LlamaConfig(**_common, num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True),
    'gpt_neox': lambda: GPTNeoXConfig(**_common, intermediate_size=64),
    'gpt2': lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3),  # learned positions, dropout
}
families = pytest.mark.parametrize('family', CONFIGS)
CAPTIONS = [[1, 2, 3, 4, 5, 6, 7], [8], [], [9, 10, 11], [8], [12] * 12]


def lm(family):
    torch.manual_seed(0)
    return widen(AutoModelForCausalLM.from_config(CONFIGS[family]()), vocab).train()


PLAIN = Sampling()


def by_hand(model, caption, numbers, s=PLAIN):
    "One image, from plain full forwards without mask, padding or cache, in numpy."
    def probabilities(caption, codes):
        ids = document(vocab, caption, codes, 48)[0][:-2]
        with torch.no_grad(): logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits[-K:].numpy().astype(float)
    model.eval()
    codes = []
    for u in numbers:
        z = probabilities(caption, codes)
        if s.guidance != 1: z = s.guidance * z + (1 - s.guidance) * probabilities([], codes)
        if s.temperature == 0: codes.append(int(z.argmax())); continue
        p = np.exp((z - z.max()) / s.temperature)
        if s.top_k: p[p < np.sort(p)[-s.top_k]] = 0
        p /= p.sum()
        best = np.argsort(-p)
        keep = best[:int(np.searchsorted(np.cumsum(p[best]), s.top_p)) + 1] if s.top_p < 1 else best  # the smallest set that holds top_p
        p = np.where(np.isin(np.arange(K), keep), p, 0) / p[keep].sum()
        codes.append(int((np.cumsum(p) <= u).sum()))
    model.train()
    return codes


SETTINGS = {'plain': {}, 'cold': dict(temperature=.5), 'greedy': dict(temperature=0), 'top-k': dict(top_k=3), 'top-p': dict(top_p=.6), 'guided': dict(guidance=3.),
            'all': dict(temperature=1.5, top_k=9, top_p=.8, guidance=1.5, seed=4)}


@families
@pytest.mark.parametrize('name', SETTINGS)
def test_drawing_is_what_a_plain_forward_gives_for_each_image_alone(family, name):
    model, s = lm(family), Sampling(**SETTINGS[name])
    codes = sample_images(model, vocab, CAPTIONS, GRID, s)
    assert codes.shape == (6, *GRID) and codes.dtype == torch.long and 0 <= codes.min() and codes.max() < K
    numbers = uniforms(CAPTIONS, 12, s.seed).numpy()
    assert codes.flatten(1).tolist() == [by_hand(model, c, n, s) for c, n in zip(CAPTIONS, numbers)]
    assert model.training                                                      # as it was
    assert torch.equal(codes, sample_images(model, vocab, CAPTIONS, GRID, s, cache=False))
    assert torch.equal(codes, sample_images(model, vocab, CAPTIONS, GRID, s, batch=1))
    assert torch.equal(codes, sample_images(model, vocab, CAPTIONS, GRID, s, batch=4))


def test_an_image_depends_on_seed_caption_and_its_number_and_on_nothing_else():
    model = lm('llama-tied')
    codes = sample_images(model, vocab, CAPTIONS, GRID)
    again = sample_images(model, vocab, CAPTIONS[::-1] + [[20, 21]], GRID)
    assert torch.equal(codes[0], again[5]) and torch.equal(codes[1], again[1]) and torch.equal(codes[4], again[4])  # [8] is the first and second of its caption in both
    assert not torch.equal(codes[1], codes[4])
    assert not torch.equal(codes, sample_images(model, vocab, CAPTIONS, GRID, Sampling(seed=1)))
    state = torch.get_rng_state()
    sample_images(model, vocab, CAPTIONS, GRID)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(uniforms([np.array([8], np.int32)], 5, 0), uniforms([[8]], 5, 0))  # as a token store gives them


class Toy(nn.Module):
    "A model by table: an image code is likely if it equals the first caption token; the text rows are likelier than any code."
    config, device = PreTrainedConfig(), torch.device('cpu')                   # no limit of positions
    def __init__(self, strength=8.): super().__init__(); self.strength = strength
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        logits = torch.zeros(*input_ids.shape, vocab.size)
        logits[..., :V] = 50.
        for row, ids in zip(logits, input_ids):
            words = ids[ids < V]
            row[:, vocab.image] += 4.                                          # code 0 is likely whatever the caption says
            if len(words): row[:, vocab.image + int(words[0])] += self.strength
        return CausalLMOutput(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)


def test_only_image_codes_are_drawn_even_where_words_are_likelier():
    codes = sample_images(Toy(), vocab, [[5]] * 20, (8, 8), cache=False)
    assert codes.shape == (20, 8, 8) and (codes == 5).float().mean() > .9


def test_swapped_captions_are_seen_in_the_images():
    model = Toy()
    right, wrong = (sample_images(model, vocab, c, GRID, Sampling(temperature=0), cache=False) for c in ([[3], [7]], [[7], [3]]))
    assert (right[0] == 3).all() and (right[1] == 7).all() and torch.equal(right, wrong.flip(0))


def test_guidance_leads_from_no_caption_over_the_caption_to_more_of_it():
    model, numbers = lm('gpt_neox'), uniforms([[5, 6]], 12, 0)[0].numpy()
    at = lambda w: sample_images(model, vocab, [[5, 6]], GRID, Sampling(guidance=w)).flatten().tolist()
    assert at(1) == by_hand(model, [5, 6], numbers) != by_hand(model, [], numbers) == at(0)
    share = [(sample_images(Toy(1.), vocab, [[5]] * 50, GRID, Sampling(guidance=w), cache=False) == 5).float().mean() for w in (0, 1, 3, 6)]
    assert share == sorted(share) and share[0] < .05 and share[-1] > .5


def test_the_shapes_of_the_distribution():
    z, u = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)) * 2, torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(pick(z, u, Sampling(top_k=1)), z.argmax(-1)) and torch.equal(pick(z, u, Sampling(temperature=0)), z.argmax(-1))
    assert torch.equal(pick(z, u, Sampling(top_k=24)), pick(z, u, Sampling()))
    p = z.softmax(-1)
    for top_p in (.05, .3, .9):
        drawn = pick(z, u, Sampling(top_p=top_p))
        likelier = torch.stack([row[row > row[c]].sum() for row, c in zip(p, drawn)])
        assert (likelier < top_p).all()                                        # a code whose likelier ones already hold top_p is out
    assert (pick(z, torch.full((500,), 1 - 1e-16, dtype=torch.float64), Sampling()) < 24).all()
    assert (pick(torch.tensor([[-torch.inf, 0., -torch.inf]]).expand(2, -1), torch.tensor([0., .999999], dtype=torch.float64), Sampling()) == 1).all()


def test_without_captions_the_images_differ_by_number():
    model = lm('gpt2')
    a = sample_images(model, vocab, [[]] * 5, GRID, layout='image')
    assert len({tuple(x.flatten().tolist()) for x in a}) == 5
    assert torch.equal(a, sample_images(model, vocab, CAPTIONS[:5], GRID, layout='image'))


@pytest.mark.parametrize('change, words', [
    (dict(temperature=-1), 'temperature=-1'), (dict(temperature=float('nan')), 'temperature'), (dict(temperature='1'), "temperature='1'"), (dict(top_k=0), 'top_k=0'), (dict(top_k=2.5), 'top_k=2.5'),
    (dict(top_k=True), 'top_k=True'), (dict(top_p=0), 'top_p=0'), (dict(top_p=1.01), 'top_p=1.01'), (dict(guidance=-.5), 'guidance=-0.5'), (dict(seed='x'), "seed='x'")])
def test_settings_that_mean_nothing_are_refused_by_name(change, words):
    with pytest.raises(BadInput, match=words): Sampling(**change)


@pytest.mark.parametrize('change, words', [
    (dict(grid=(4,)), 'no rectangle'), (dict(grid=[[1, 2], [3]]), 'no rectangle'), (dict(grid=(0, 4)), 'no rectangle'), (dict(grid=(2., 4)), 'no rectangle'), (dict(grid=12), 'no rectangle'),
    (dict(captions=[[1] * 31]), 'shorten the prompt by 1 tokens'), (dict(grid=(8, 8)), 'too short for an image of 64'), (dict(length=20, captions=[[1] * 4]), 'context of 20'),
    (dict(layout='txt'), "layout='txt'"), (dict(captions=[]), 'captions is empty'), (dict(sampling=Sampling(top_k=25)), 'more than the 24'),
    (dict(layout='image', sampling=Sampling(guidance=2.)), 'guidance')])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(change, words):
    with pytest.raises(BadInput, match=words): sample_images(**dict(model=lm('gpt2'), vocab=vocab, captions=[[1]], grid=GRID) | change)


def test_the_longest_prompt_that_fits_is_drawn():
    assert sample_images(lm('gpt2'), vocab, [[1] * 30], GRID).shape == (1, 3, 4)


@families
def test_likelihood_is_that_of_a_plain_forward(family):
    model = lm(family).eval()
    codes = torch.randint(K, (6, *GRID), generator=torch.Generator().manual_seed(3))
    got = image_loglikelihood(model, vocab, CAPTIONS, codes, batch=4)
    for caption, image, value in zip(CAPTIONS, codes.flatten(1).tolist(), got):
        ids = torch.tensor([document(vocab, caption, image, 48)[0]])
        with torch.no_grad(): scores = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
        start = 4 + len(caption)
        assert float(value) == pytest.approx(sum(float(scores[start + i - 1, vocab.image + c]) for i, c in enumerate(image)), abs=1e-3)
    with pytest.raises(BadInput, match='shorten the prompt'): image_loglikelihood(model, vocab, [[1] * 31] * 6, codes)
    with pytest.raises(BadInput, match='5 captions for 6'): image_loglikelihood(model, vocab, CAPTIONS[:5], codes)


def test_reranking_finds_the_image_of_the_caption():
    "Code 0 is likely under every caption: likelihood alone prefers the empty image, information does not."
    model, images = Toy(3.), torch.stack([torch.full(GRID, c) for c in (0, 9, 5, 2)])
    assert image_loglikelihood(model, vocab, [[5]] * 4, images).argmax() == 0
    ranked, nats = rerank(model, vocab, [5], images)
    assert (ranked[0] == 5).all() and nats[0] > 0 >= nats[1] and nats.tolist() == sorted(nats.tolist(), reverse=True)
    own, swapped = (caption_information(model, vocab, c, images[1:3]) for c in ([[9], [5]], [[5], [9]]))
    assert (own > 0).all() and (swapped <= 0).all()


def gaussians(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    mix = [rng.normal(size=(d, d)) / np.sqrt(d) for _ in range(2)]
    return rng.normal(size=(n, d)) @ mix[0], rng.normal(.3, 1, size=(m, d)) @ mix[1]


@pytest.mark.parametrize('n, m, d', [(60, 50, 6), (20, 30, 48), (30, 90, 48)], ids=['more images', 'fewer images', 'both'])
def test_frechet_equals_torchmetrics_and_the_definition(n, m, d):
    a, b = gaussians(n, m, d)
    ca, cb = np.cov(a.T), np.cov(b.T)
    defined = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * np.real(linalg.sqrtm(ca @ cb + 1e-12 * np.eye(d))))
    library = FrechetInceptionDistance(feature=type('', (nn.Module,), dict(num_features=d, forward=lambda self, x: x))())
    for x, is_real in ((a, True), (b, False)): library.update(torch.from_numpy(x), real=is_real)
    assert frechet(a, b) == pytest.approx(float(library.compute()), rel=1e-3) == pytest.approx(defined, rel=1e-2)
    assert distances(a, b)['frechet'] == pytest.approx(frechet(a, b), rel=1e-3)
    assert frechet(a, b) == pytest.approx(frechet(b, a)) and frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(100_000, 3)), rng.normal(size=(100_000, 3)) * [1, 2, 4] + [2, 0, 0]
    assert frechet(a, b) == pytest.approx(4 + 0 + 1 + 9, rel=.02)


@pytest.mark.filterwarnings('ignore:Metric `Kernel')
def test_kernel_distance_is_torchmetrics_over_all_images():
    a, b = gaussians(40, 40, 8)
    metric = KernelInceptionDistance(feature=type('', (nn.Module,), dict(forward=lambda self, x: x))(), subsets=1, subset_size=40)
    for x, is_real in ((a, True), (b, False)): metric.update(torch.from_numpy(x), real=is_real)
    assert distances(a, b)['kernel'] == pytest.approx(float(metric.compute()[0]), abs=1e-9)
    state = torch.get_rng_state()
    assert distances(a, b[:30]) == distances(a, b[:30]) and torch.equal(state, torch.get_rng_state())
    kernel = lambda x, y: (x @ y.T / 8 + 1) ** 3
    off = lambda k: (k.sum() - np.trace(k)) / (40 * 39)
    assert distances(a, b)['kernel'] == pytest.approx(off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean(), abs=1e-9)


def test_the_interval_holds_the_distance_as_often_as_it_says():
    truth, hits = 4 * .6**2, 0
    for i in range(60):
        rng = np.random.default_rng(i)
        value, low, high = frechet_interval(rng.normal(size=(300, 4)), rng.normal(.6, 1, size=(300, 4)), 60, seed=i)
        assert low < value < high
        hits += low < truth < high
    assert 48 <= hits, hits                                                    # 57 are expected; 48 or fewer in 60 would be a 1-in-1,000 accident
    assert frechet_interval(*gaussians(20, 20, 3), 50) == frechet_interval(*gaussians(20, 20, 3), 50)
    value, low, high = frechet_interval(*gaussians(20, 30, 48), 50)            # where every bootstrap distance is larger than the distance itself
    assert low < value < high
    wide, narrow = (np.diff(frechet_interval(*gaussians(n, n, 3), 50)[1:])[0] for n in (40, 4000))
    assert narrow < wide / 4


@pytest.mark.parametrize('a, b, words', [((1, 4), (9, 4), 'real features'), ((9, 4), (9,), 'fake features'), ((9, 4), (9, 5), 'one backbone')])
def test_features_that_cannot_be_compared_are_refused(a, b, words):
    for function in (frechet, distances):
        with pytest.raises(BadInput, match=words): function(np.ones(a), np.ones(b))
    with pytest.raises(BadInput, match='finite'): frechet(np.ones((5, 2)), np.full((5, 2), np.nan))
    with pytest.raises(BadInput, match='draws'): frechet_interval(np.ones((5, 2)), np.ones((5, 2)), 1)


def test_the_backbone_sees_what_is_in_the_images(make):
    eye = backbone()
    assert (eye.name, eye.num_features, eye.px) == ('efficientnet-lite0', 1280, 224) and not any(p.requires_grad for p in eye.parameters())
    same = np.stack([np.array(Image.new('RGB', (32, 32), colour)) for colour in ('red', 'red', 'white')])
    f = image_features(eye, same)
    assert f.shape == (3, 1280) and np.allclose(f[0], f[1], atol=1e-4) and np.abs(f[0] - f[2]).max() > .1
    assert np.allclose(f, image_features(eye, same, batch=1), atol=1e-4)
    with pytest.raises(BadInput, match='uint8'): image_features(eye, same.astype('float32'))


def test_inception_is_used_only_if_it_is_there_and_what_it_is_named_after(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="backbone='inceptio' is unknown.*Did you mean 'inception'"): backbone('inceptio')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(BadInput, match='is not there.*weights-inception-2015-12-05-6726825d.pth of torch-fidelity.*give its path'): backbone('inception')
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/'weights-inception-2015-12-05-6726825d.pth').write_bytes(b'something else')
    with pytest.raises(BadInput, match='is not the published file: its SHA-256 begins with'): backbone('inception')


def published_layout():
    "Random weights with the keys and shapes of the published Inception file, the same on every machine"
    state, out = InceptionV3().state_dict(), {}
    for name in sorted(n for n in state if not n.endswith('num_batches_tracked')):
        shape, g = state[name].shape, torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
        w, fan = torch.randn(shape, generator=g), state[name][0].numel() if state[name].ndim > 1 else 1
        out[name] = w * (2 / fan)**.5 if w.ndim == 4 else w.abs() * .2 + .9 if name.endswith(('running_var', 'bn.weight')) else w * .1 if w.ndim == 1 else w * fan**-.5
    return out


def test_inception_computes_what_torch_fidelity_computes(tmp_path, monkeypatch):
    "Expected: FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with the same weights and images"
    torch.save(published_layout(), tmp_path/'weights.pth')
    monkeypatch.setattr(generation, '_INCEPTION', hashlib.sha256((tmp_path/'weights.pth').read_bytes()).hexdigest()[:8])
    eye = backbone('inception', tmp_path/'weights.pth')
    images = torch.randint(0, 256, (3, 3, 299, 299), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(F, 'interpolate', lambda x, **_: (x * 255 - 128) / 256 + .5)  # its scale of [-1, 1): (x - 128) / 128
    found = image_features(eye, images.permute(0, 2, 3, 1))
    assert found.shape == (3, eye.num_features) == (3, 2048) and eye.network.fc.weight.shape == (1008, 2048) and eye.network.Mixed_7a.out == 1280
    np.testing.assert_allclose(found[:, :3], [[6.6435, 2.7346, 3.1953], [6.6573, 2.7630, 3.2568], [6.7624, 2.7017, 3.2277]], atol=2e-3)
    state = published_layout() | {'Mixed_7d.conv.weight': torch.zeros(1)}
    torch.save(state, tmp_path/'weights.pth')
    monkeypatch.setattr(generation, '_INCEPTION', hashlib.sha256((tmp_path/'weights.pth').read_bytes()).hexdigest()[:8])
    with pytest.raises(RuntimeError, match='Mixed_7d'): backbone('inception', tmp_path/'weights.pth')


@pytest.mark.fault('a file of drawn samples or features is damaged', 'it is made again')
def test_the_cache_makes_again_what_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv('T2I_CACHE', str(tmp_path))
    made = []
    make = lambda: (made.append(1), np.arange(4.)[::2])[1]
    for _ in range(2): assert cached(['a', 1], make).tolist() == [0, 2]
    cached(['a', 2], make)
    assert len(made) == 2
    for path in tmp_path.rglob('*.safetensors'): path.write_bytes(path.read_bytes()[:20])
    assert cached(['a', 1], make).tolist() == [0, 2] and len(made) == 3


@pytest.fixture
def run(tmp_path, vq_folder, text_tokenizer):
    "The record of a tiny run, 16 px and 16 codes."
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**_common | dict(vocab_size=300), num_key_value_heads=1, intermediate_size=64))
    base.save_pretrained(tmp_path/'lm'); text_tokenizer.save_pretrained(tmp_path/'lm')
    config = make_config('smoke', lm=str(tmp_path/'lm'), image_tokenizer=str(vq_folder), px=16, length=40)
    widen(base, Vocab(300, 16)).save_pretrained(tmp_path/'run'/'weights'/'00000006')
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(config=asdict(config) | dict(field_of_another_version=1))))
    return tmp_path/'run'


def test_a_run_paints_for_prompts_and_reads_them_back(run):
    painter = load_painter(run)
    prompts = ['a red fish', 'a house', 'a red fish']
    codes = sample_prompts(painter, prompts)
    assert codes.shape == (3, 4, 4) and painter.decode(codes).shape == (3, 16, 16, 3) and not torch.equal(codes[0], codes[2])
    file, = (run/'samples').iterdir()
    before = os.stat(file).st_mtime_ns
    painter.model = None                                                       # not needed any more
    assert torch.equal(sample_prompts(painter, prompts), codes) and os.stat(file).st_mtime_ns == before
    file.write_bytes(file.read_bytes()[:30])
    painter = load_painter(run)
    assert torch.equal(sample_prompts(painter, prompts), codes)
    assert not torch.equal(sample_prompts(painter, prompts, Sampling(seed=1)), codes)
    with pytest.raises(BadInput, match='shorten the prompt'): sample_prompts(painter, ['a red fish ' * 20])
    assert sample_prompts(painter, ['a red fish ' * 20], shorten=True).shape == (1, 4, 4)


def test_a_grid_of_images_from_a_run(run):
    picture = generate_grid(run, ['a red fish', 'a house'], 3, Sampling(top_k=4), px=20)
    assert picture.size == (130 + 3 * 24, 2 * 24)
    alone = generate_grid(run, ['a house'], 3, Sampling(top_k=4), px=20)
    assert np.array_equal(np.asarray(picture)[24:, 130:], np.asarray(alone)[:, 130:])
    with pytest.raises(BadInput, match='do not fill'): picture_grid(np.zeros((5, 4, 4, 3), np.uint8), ['a', 'b'])


def encodes_only(run):
    "Makes Chameleon's image tokenizer that of the run."
    ChameleonVQVAE(ChameleonVQVAEConfig(num_embeddings=16, embed_dim=4, latent_channels=4, resolution=16, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1)).save_pretrained(run/'vq')
    record = json.loads((run/'config.json').read_text())
    record['config']['image_tokenizer'] = str(run/'vq')
    (run/'config.json').write_text(json.dumps(record))


@pytest.mark.parametrize('damage, words', [
    (encodes_only, "image tokenizer 'vq', which encodes only, so nothing can be painted"),
    (lambda run: (run/'config.json').write_text('{'), 'no readable config.json'),
    (lambda run: (run/'weights'/'00000006').rename(run/'weights'/'gone'), 'kept no weights'),
    (lambda run: (run/'config.json').write_text((run/'config.json').read_text().replace('"text-image"', '"image"')), 'without captions')])
def test_a_run_that_cannot_paint_says_why(run, damage, words):
    damage(run)
    with pytest.raises(BadInput, match=words): generate_grid(run, ['a'], 1)


def test_arguments_of_a_grid_are_checked(run):
    for change, words in ((dict(n=0), 'n=0'), (dict(prompts=[]), 'prompts is empty'), (dict(run='bundled-s0'), "'bundled-s0' is neither a folder nor a run id")):
        with pytest.raises(BadInput, match=words): generate_grid(**dict(run=run, prompts=['a'], n=1) | change)
    with pytest.raises(BadInput, match='no weights of step 3; it has 6'): load_painter(run, 3)


def test_a_state_space_model_draws_without_a_cache_of_keys_and_values():
    torch.manual_seed(0)
    model = widen(AutoModelForCausalLM.from_config(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=1.)), vocab)
    codes = sample_images(model, vocab, CAPTIONS, GRID, length=48)
    assert codes.flatten(1).tolist() == [by_hand(model, c, n) for c, n in zip(CAPTIONS, uniforms(CAPTIONS, 12, 0).numpy())] and len(codes.unique()) > 12


def test_the_cache_of_keys_and_values_saves_work():
    "Tokens that the model reads for one image of 12 codes after a prompt of 6."
    model = lm('llama-tied')
    for cache, tokens in ((True, 6 + 11), (False, sum(range(6, 18)))):
        read = []
        hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output, read=read: read.append(inputs[0].shape[1]))
        sample_images(model, vocab, [[1, 2]], GRID, cache=cache)
        hook.remove()
        assert sum(read) == tokens
