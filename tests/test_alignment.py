"Bags that are matched: the loss, the retrieval and the test of neighbours see what is planted and nothing else."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats

from t2ianalysis import alignment
from t2ianalysis.alignment import (
    ALIGNMENTS,
    Aligned,
    Bags,
    align,
    alignment_folder,
    associated_words,
    backward_in_parts,
    bag,
    code_patches,
    codes_held,
    contrastive_loss,
    ensure_alignments,
    evaluate_pairs,
    make_alignment,
    meaning,
    nearest_tokens,
    pair_numbers,
    prepare_pairs,
    recall_hits,
    rescale,
    words_said,
)
from t2ianalysis.data import BadInput
from t2ianalysis.models import initializer_range, load_config, load_lm
from t2ianalysis.training import make_config

WORDS = np.array(['fish', 'house', 'tree', 'bird', 'car', 'sun', 'hat', 'door', 'boat', 'rose', 'moon', 'star', 'king', 'leaf', 'ship', 'bell', 'drum', 'lamp', 'coat', 'frog'])


def planted_pairs(n, seed=0, codes=64, size=12):
    "Pairs in which each code comes with a token of its own"
    rng = np.random.default_rng(seed)
    bags = [rng.choice(codes, size, replace=False) for _ in range(n)]
    return bags, [b.copy() for b in bags]


def trained(images, texts, arm='aligned', steps=60):
    "A small model after some steps over whole data"
    torch.manual_seed(0)
    model = Bags(torch.randn(64, 48), 64, make_alignment('smoke', arm=arm))
    optimizer = torch.optim.Adam(model.parameters(), lr=.02)
    for _ in range(steps):
        backward_in_parts(model, images, texts, 1)
        optimizer.step(); optimizer.zero_grad()
    return model


def held_codes(rng, n=200, share=.15): return rng.random((n, len(WORDS))) < share
def told(held): return [' '.join(WORDS[row]) for row in held]


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "One small alignment with the bundled language model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('T2I_WORK', str(tmp_path_factory.mktemp('aligned')))
        settings = make_alignment('smoke', steps=4, parts=2)
        material = prepare_pairs(make_config('smoke'), settings, progress=False)
        yield settings, material, align(settings, material)


def test_the_loss_is_that_of_clip():
    torch.manual_seed(0)
    a, b, scale = F.normalize(torch.randn(9, 5), dim=1), F.normalize(torch.randn(9, 5), dim=1), 3.7
    rows = [-math.log(math.exp(scale * a[i] @ b[i]) / sum(math.exp(scale * a[i] @ b[j]) for j in range(9))) for i in range(9)]
    columns = [-math.log(math.exp(scale * a[i] @ b[i]) / sum(math.exp(scale * a[j] @ b[i]) for j in range(9))) for i in range(9)]
    assert contrastive_loss(a, b, torch.tensor(math.log(scale))).item() == pytest.approx((sum(rows) + sum(columns)) / 18, abs=1e-5)
    assert torch.equal(contrastive_loss(a, b, torch.tensor(7.)), contrastive_loss(a, b, torch.tensor(math.log(100.))))
    assert Bags(torch.randn(4, 3), 2, make_alignment('smoke')).log_scale.exp().item() == pytest.approx(1 / .07)


def test_a_bag_is_the_mean_of_its_rows():
    table = torch.randn(7, 4)
    bags = [np.array([0, 0, 6]), np.array([3]), np.array([], int), np.array([1, 2], np.uint16)]
    plain = [table[b.astype(int)].mean(0) if len(b) else torch.zeros(4) for b in bags]
    assert torch.allclose(bag(table, bags), torch.stack(plain), atol=1e-6)


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    images, texts = planted_pairs(12)
    for arm in alignment.ARMS:
        models = [Bags(torch.linspace(-1, 1, 64 * 48).sin().view(64, 48), 64, make_alignment('smoke', arm=arm)) for _ in range(2)]
        whole = contrastive_loss(*models[0](images, texts), models[0].log_scale)
        whole.backward()
        parted = backward_in_parts(models[1], images, texts, 5)                                      # parts of 3, 3, 3 and 3
        assert parted.item() == pytest.approx(whole.item(), abs=1e-5)
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True): assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), (arm, name)


def test_a_part_is_all_that_is_computed_at_once():
    images, texts = planted_pairs(12)
    model, sizes = Bags(torch.randn(64, 48), 64, make_alignment('smoke')), []
    model.register_forward_pre_hook(lambda _, bags: sizes.append(len(bags[0])))
    backward_in_parts(model, images, texts, 4)
    assert sizes == [3] * 8                                                                           # four parts, two passes


def test_pairs_that_belong_together_are_found_and_shuffled_ones_are_not():
    images, texts = planted_pairs(200)
    unseen = planted_pairs(100, seed=1)
    right = evaluate_pairs(trained(images, texts), *unseen)
    assert right['to_text_1'] == right['to_image_1'] == 1 and right['loss'] < .5
    wrong = trained(images, [texts[i] for i in np.random.default_rng(0).permutation(200)])
    found = evaluate_pairs(wrong, *unseen)
    low, high = stats.binom.interval(.9999, 100, .1)                                                  # recall@10 among 100
    for way in ('to_text_10', 'to_image_10'): assert low <= 100 * found[way] <= high
    assert found['loss'] > math.log(100) - .2


def test_a_leaked_caption_is_seen():
    "Where each image holds a code that no other holds, training pairs are told apart and held-out ones are not"
    rng = np.random.default_rng(0)
    images, texts = [np.array([i]) for i in range(64)], [rng.integers(0, 64, 6) for _ in range(64)]
    model = trained(images, texts, steps=80)
    assert evaluate_pairs(model, images, texts)['to_text_1'] > .9
    assert evaluate_pairs(model, images, [texts[i] for i in np.roll(np.arange(64), 1)])['to_text_10'] < .5


def test_ties_do_not_raise_recall():
    assert recall_hits(torch.full((50, 50), .3)).mean(0).tolist() == pytest.approx([1/50, 5/50, 10/50])
    three = torch.eye(6); three[0, 1] = three[0, 2] = 1 + 1e-9                                       # two captions equal to the right one, up to rounding
    assert recall_hits(three, (1, 2, 3))[0].tolist() == pytest.approx([1/3, 2/3, 1])
    worst = -torch.eye(6)
    assert recall_hits(worst, (1, 5, 6)).mean(0).tolist() == [0, 0, 1]


def test_text_rows_stay_as_they_are():
    images, texts = planted_pairs(40)
    torch.manual_seed(0)
    before = torch.randn(64, 48)
    for arm in ('aligned', 'shuffled', 'heads'): assert torch.equal(trained(images, texts, arm, 3).text, before)
    assert not torch.equal(trained(images, texts, 'both', 3).text, before)
    assert 'text' not in dict(trained(images, texts, steps=1).named_parameters())


def test_an_epoch_holds_no_pair_twice():
    numbers = [n.tolist() for n in pair_numbers(10, make_alignment('smoke', batch=4, steps=5))]
    assert all(len(set(n)) == 4 for n in numbers)
    assert len({*numbers[0], *numbers[1]}) == len({*numbers[2], *numbers[3]}) == 8
    assert numbers != [n.tolist() for n in pair_numbers(10, make_alignment('smoke', batch=4, steps=5, seed=1))]


def test_the_record_is_whole_and_loaded_the_second_time(done, monkeypatch):
    settings, material, first = done
    assert sorted(p.name for p in first.folder.iterdir()) == ['config.json', 'environment.json', 'metrics.jsonl', 'rows.safetensors', 'whole.json']
    assert [p for p in first.folder.parent.iterdir() if p.name.startswith('.')] == []
    assert list(first.log['step']) == [0, 1, 2, 3, 4] and first.log['loss'].notna().sum() == 4
    assert first.log['held_out_loss'].notna().tolist() == [True, False, True, False, True]
    monkeypatch.setenv('T2I_WORK', str(first.folder.parents[1]))
    monkeypatch.setattr(alignment, '_fit', lambda *_: pytest.fail('trained again'))
    again = align(settings, material)
    assert again.folder == first.folder and torch.equal(again.rows, first.rows)
    assert alignment_folder(replace(settings, seed=1), material) != first.folder


def test_the_same_alignment_gives_the_same_rows(done, monkeypatch, tmp_path):
    settings, material, first = done
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    assert torch.allclose(align(settings, material).rows, first.rows, atol=1e-6)
    assert torch.allclose(align(replace(settings, parts=1), material).rows, first.rows, atol=1e-4)


def test_the_shuffled_arm_trains_on_other_pairs(done, monkeypatch, tmp_path):
    settings, material, first = done
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    shuffled = align(replace(settings, arm='shuffled'), material)
    assert shuffled.log['loss'][1] != first.log['loss'][1] and shuffled.log['held_out_loss'][0] == first.log['held_out_loss'][0]   # the held-out pairs stay


def test_a_failure_leaves_nothing(done, monkeypatch, tmp_path):
    settings, material, _ = done
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    monkeypatch.setattr(alignment, 'save_file', lambda *_: (_ for _ in ()).throw(OSError('No space left')))
    with pytest.raises(OSError): align(settings, material)
    assert list((tmp_path/'runs').iterdir()) == []


def test_rows_have_the_length_of_new_rows(done):
    settings, material, first = done
    config = load_config('bundled')
    rows = load_file(first.path)['rows']
    assert rows.dtype == torch.float32 and rows.shape == (material.train.store.vocab_size, config.hidden_size)
    drawn = torch.randn(2000, config.hidden_size) * initializer_range(config)
    assert rows.norm(dim=1).mean().item() == pytest.approx(drawn.norm(dim=1).mean().item(), rel=.02)
    long = torch.randn(20, 8) * torch.arange(1, 21)[:, None]
    assert torch.allclose(F.cosine_similarity(rescale(long, .1), long), torch.ones(20))
    assert torch.allclose(rescale(long, .1).norm(dim=1) / long.norm(dim=1), (rescale(long, .1).norm(dim=1) / long.norm(dim=1))[:1].expand(20))


@pytest.mark.fault('the record of an alignment is damaged', 'it is refused by name')
def test_a_damaged_record_is_refused(done, monkeypatch, tmp_path):
    settings, material, _ = done
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    run = align(settings, material)
    (run.folder/'metrics.jsonl').write_text('{}\n')
    with pytest.raises(BadInput, match='damaged'): align(settings, material)
    (run.folder/'whole.json').unlink()
    with pytest.raises(BadInput, match='damaged'): Aligned(run.folder)


@pytest.mark.parametrize('change, words', [
    (dict(batch=65), 'batch=65 .* 64 training pairs'), (dict(lm='bundeld'), "'bundled'"), (dict(arm='alined'), "'aligned'"), (dict(parts=3), 'parts=3'), (dict(batch=1), 'batch=1'),
    (dict(steps=0), 'steps=0'), (dict(lr=-1.), 'lr=-1.0'), (dict(stepz=3), "'steps'"), (dict(steps='many'), "steps='many'")])
def test_what_cannot_be_aligned_is_refused_by_name(change, words, done, monkeypatch):
    monkeypatch.setattr('t2ianalysis.alignment.prepare', lambda config, progress: done[1] if config.lm == 'bundled' else load_lm(config.lm))
    with pytest.raises(BadInput, match=words): ensure_alignments(make_config('smoke'), [make_alignment('smoke', **change)], progress=False)


def test_other_captions_than_the_model_s_are_refused(done, tmp_path):
    other = load_lm('bundled', 'random')
    other.save_pretrained(tmp_path/'other')
    with pytest.raises(BadInput, match='not tokenised for'): alignment_folder(replace(done[0], lm=str(tmp_path/'other')), done[1])


def test_presets_are_settings_that_can_be(): assert [make_alignment(name) for name in ALIGNMENTS] == list(ALIGNMENTS.values())


def test_the_nearest_token_is_by_direction(text_tokenizer):
    text = torch.randn(320, 16)                                                                       # more rows than the tokenizer has tokens
    rows = torch.cat([text[[5, 280]] * 40, text[310:311]])
    found = nearest_tokens(rows, text, text_tokenizer, 3)
    assert found[:2, 0].tolist() == text_tokenizer.convert_ids_to_tokens([5, 280]) and found.shape == (3, 3)


def test_planted_meaning_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    held = held_codes(rng)
    yes = meaning(WORDS[:, None], held, told(held), deals=199)
    assert yes.share == 1 and yes.p == 1/200 and yes.low > .3 and yes.words == 1 and yes.codes == len(WORDS)
    assert meaning(np.char.add('Ġ', WORDS)[:, None], held, told(held), deals=19).share == 1           # as a vocabulary writes it
    void = meaning(np.array([['ing', 'Ġ,', 'Ġthe']] * len(WORDS)), held, told(held), deals=19)
    assert (void.share, void.p, void.words) == (0, 1, 0)


def test_noise_is_called_noise_as_often_as_it_should():
    "Codes that always come together and have one list of neighbours: one accident must not count twenty times"
    ps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        held = np.repeat(held_codes(rng, 80)[:, :2], 10, axis=1)                                      # two kinds of image, ten codes each
        ps.append(meaning(np.repeat(rng.choice(WORDS, (2, 3), replace=False), 10, axis=0), held, told(held_codes(rng, 80)), deals=49, seed=seed).p)
    assert stats.binomtest(int((np.array(ps) <= .1).sum()), 40, .1, 'greater').pvalue > .001


def test_frequent_codes_with_frequent_words_mean_nothing():
    rng = np.random.default_rng(3)
    often = np.linspace(.05, .9, len(WORDS))
    held, said = (rng.random((300, len(WORDS))) < often for _ in range(2))                            # frequent code i has frequent word i, independently
    t = meaning(WORDS[:, None], held, told(said), deals=199)
    assert t.p > .02 and t.low < 0 < t.high


def test_counting_finds_the_words_of_codes():
    rng = np.random.default_rng(0)
    held = held_codes(rng)
    assert associated_words(held, told(held), 1)[:, 0].tolist() == WORDS.tolist()
    with pytest.raises(BadInput, match='too few for k=50'): associated_words(held, told(held), 50)


def test_neighbours_without_enough_images_are_refused():
    held = held_codes(np.random.default_rng(0), 20)
    with pytest.raises(BadInput, match='least=21'): meaning(WORDS[:, None], held, told(held), least=21)
    with pytest.raises(BadInput, match='20 images and 19 captions'): meaning(WORDS[:, None], held, told(held)[1:])


def test_words_and_codes_are_counted_once_a_pair():
    said = words_said(['Red apple, red!', 'the co2 gas', 'naïve fish'])
    assert {c: said[c].tolist() for c in said} == {'red': [True, False, False], 'apple': [True, False, False], 'gas': [False, True, False], 'fish': [False, False, True]}
    assert codes_held(np.array([[1, 1, 0]], np.uint16), 3).tolist() == [[True, True, False]]


def test_patches_show_where_a_code_lies(store, vq):
    code = int(np.bincount(np.asarray(store.codes).ravel()).argmax())
    p = vq.downsample
    patches = code_patches(store, vq, code, 3)
    assert patches.dtype == np.uint8 and patches.shape[1:] == (3 * p, 3 * p, 3) and 1 <= len(patches) <= 3
    image = int(np.flatnonzero((store.codes == code).any(1))[0])
    y, x = divmod(int(np.flatnonzero(store.codes[image] == code)[0]), store.grid[1])
    whole = vq.decode(torch.from_numpy(store.codes[image].astype(int)).view(1, *store.grid))[0].numpy()
    assert np.abs(patches[0][p:2*p, p:2*p].astype(int) - whole[y*p:(y+1)*p, x*p:(x+1)*p]).max() <= 1
    assert len(code_patches(store, vq, 16, 3)) == 0


def test_the_log_can_be_read(done):
    lines = [json.loads(line) for line in (done[2].folder/'metrics.jsonl').read_text().splitlines()]
    assert lines[0]['temperature'] == pytest.approx(.07) and all(0 <= v <= 1 for line in lines for k, v in line.items() if '_to_' in k)
    assert lines[0]['held_out_loss'] == pytest.approx(math.log(24), abs=1)
