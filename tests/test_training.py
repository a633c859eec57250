"The loop: same config, same numbers; stopped in any way, it goes on to the same record."
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis import training
from t2ianalysis.data import BadInput, data_path
from t2ianalysis.models import load_lm, load_text_tokenizer
from t2ianalysis.sequences import Kind
from t2ianalysis.training import (
    Diverged,
    batches_at,
    captions_of,
    documents_at,
    ensure_runs,
    is_done,
    kept,
    load_run,
    load_runs,
    make_config,
    prepare,
    run_id,
    token_losses,
    train,
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A language model of 150,000 random parameters with the bundled text tokenizer, and a place for stores that the module shares."
    folder = tmp_path_factory.mktemp('tiny')
    tokenizer = load_text_tokenizer('bundled')
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder/'lm')
    tokenizer.save_pretrained(folder/'lm')
    return folder


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    "An empty folder for runs; the stores are shared."
    (tiny/'stores').mkdir(exist_ok=True)
    (tmp_path/'stores').symlink_to(tiny/'stores')
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    return tmp_path


@pytest.fixture
def config(tiny):
    return make_config('smoke', lm=str(tiny/'lm'), pairs=48, steps=12, batch=4, eval_every=4, eval_pairs=8, checkpoint_every=3)


@pytest.mark.parametrize('field, value, found, sides', [('captions', 'each', 40, 36), ('dedup', 0, 10, 10)])  # a caption that is not on the side of the first is left out
def test_captions_and_dedup_decide_the_data(field, value, found, sides, config, make, vq_folder, tmp_path):
    "Twenty pictures, of which ten are copies, with two captions each; counted through the config on both sides of the split."
    (tmp_path/'pairs').mkdir()
    rows = [{'file_name': f'{i}.png', 'caption': [f'picture {i}', f'{i} again']} for i in range(20)]
    for i, row in enumerate(rows): make['noise'](i % 10).save(tmp_path/'pairs'/row['file_name'])
    (tmp_path/'pairs'/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    plain = replace(config, data=str(tmp_path/'pairs'), image_tokenizer=str(vq_folder), px=16, pairs=0, eval_pairs=40)
    changed = make_config(**plain.__dict__ | {field: value})
    sizes = lambda c: [len(s.store) for s in (prepare(c).train, prepare(c).valid)]
    assert sum(sizes(plain)) == len(list(captions_of(plain, 'all'))) == 20 and 0 not in sizes(plain)
    assert len(list(captions_of(changed, 'all'))) == found and sum(sizes(changed)) == sides
    assert run_id(plain, prepare(plain).fingerprint) != run_id(changed, prepare(changed).fingerprint)


def metrics(folder): return (folder/'metrics.jsonl').read_text()


def command(config, work):
    "The same run in a process of its own."
    code = 'import json, sys; from t2ianalysis.training import Config, train; train(Config(**json.loads(sys.argv[1])))'
    return subprocess.Popen([sys.executable, '-c', code, json.dumps(config.__dict__)], env=dict(os.environ, T2I_WORK=str(work)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f'{path} never came'
        time.sleep(0.002)


@pytest.mark.fault('kill -9 of a job of one process, then SIGTERM', 'after the kill it goes on from the last checkpoint; SIGTERM makes one of the step where it stops; the record and the weights are those of the run without')
def test_kill_9_and_sigterm_leave_the_same_record(work, config, tmp_path_factory, monkeypatch):
    config = replace(config, steps=240, eval_every=80, checkpoint_every=10)
    whole = train(config)
    elsewhere = tmp_path_factory.mktemp('killed')
    (elsewhere/'stores').symlink_to((work/'stores').resolve())
    folder = elsewhere/'runs'/whole.name
    process = command(config, elsewhere)
    wait_for(folder/'checkpoints'/'00000020', process)
    process.kill(); process.wait()
    assert not (folder/'done.json').exists()
    with pytest.raises(BadInput, match='no finished run'): load_run(folder)
    process = command(config, elsewhere)
    wait_for(folder/'checkpoints'/'00000060', process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 1 and 'stopped at step' in out and 'Traceback' not in out
    stopped = max(int(p.name) for p in (folder/'checkpoints').iterdir())
    assert f'stopped at step {stopped}' in out                                   # SIGTERM checkpoints where it stops
    monkeypatch.setenv('T2I_WORK', str(elsewhere))
    assert train(config) == folder and metrics(folder) == metrics(whole)
    for name in ('model.safetensors', 'config.json'): assert (kept(folder)[240]/name).read_bytes() == (kept(whole)[240]/name).read_bytes()


def test_same_config_same_numbers_and_never_twice(work, config, monkeypatch):
    folder = train(config)
    first = metrics(folder)
    monkeypatch.setattr(training, '_train', lambda *a: pytest.fail('trained twice'))
    assert train(config) == folder
    monkeypatch.undo(); monkeypatch.setenv('T2I_WORK', str(work))
    (folder/'done.json').unlink(); (folder/'metrics.jsonl').unlink()
    assert metrics(train(config)) == first


def test_a_changed_config_or_other_data_is_another_run(config):
    facts = dict(train='a', validation='b', lm='c')
    ids = {run_id(config, facts), run_id(replace(config, lr=1e-4), facts), run_id(config, facts | dict(train='z')), run_id(config, facts | dict(lm='z'))}
    assert len(ids) == 4


def test_accumulation_does_not_change_the_losses(work, config):
    def losses(accumulation):
        lines = map(json.loads, metrics(train(replace(config, accumulation=accumulation))).splitlines())
        return [(x['total'], x['text'], x['image'], x['n_total']) for x in lines]
    for a, b in zip(losses(1), losses(4)): assert a == pytest.approx(b, abs=2e-6)


def test_loss_by_kind_is_the_plain_cross_entropy(work, config):
    material = prepare(config, progress=False)
    model = training.widen(load_lm(config.lm), material.train.vocab).eval()
    batch = material.train.batch([0, 1, 2])
    with torch.no_grad(): got = training.means(training.sums_by_kind(token_losses(model, batch), batch.label_kind))
    vocab, sums = material.train.vocab, {Kind.TEXT: [], Kind.IMAGE: [], Kind.SPECIAL: []}
    for number in (0, 1, 2):                                                     # one sequence at a time, without padding
        ids = torch.tensor([material.train[number]])
        with torch.no_grad(): logp = model(ids).logits[0].log_softmax(-1)
        for t in range(1, ids.shape[1]): sums[int(vocab.kinds(ids[0, t:t+1]))].append(-logp[t-1, ids[0, t]].item())
    for name, kind in dict(text=Kind.TEXT, image=Kind.IMAGE, special=Kind.SPECIAL).items():
        assert got[name] == pytest.approx(sum(sums[kind]) / len(sums[kind]), abs=1e-4) and got[f'n_{name}'] == len(sums[kind])
    assert got['n_image'] == 3 * 64 and got['n_special'] == 3 * 5                  # <doc> is given; </doc> <text> </text> <image> </image> are predicted


def test_training_learns_the_pairs(work, config):
    frame = load_run(train(replace(config, pairs=4, steps=60, eval_every=60, lr=1e-2)))
    loss = frame[frame.split == 'train'].pivot_table(index='step', columns='kind', values='loss')
    assert loss.image.iloc[-1] < 0.6 * loss.image.iloc[0] and loss.text.iloc[-1] < 0.6 * loss.text.iloc[0]


def test_arms_share_the_batches_and_nothing_else(work, config):
    material = prepare(config, progress=False)
    a, b = (training.start(replace(config, init=init), material, work/init, training.fresh_accelerator(config))[0] for init in ('pretrained', 'random'))
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if p.ndim == 2: assert abs(torch.corrcoef(torch.stack([p.flatten(), q.flatten()]))[0, 1]) < 0.05, name
    frame = ensure_runs([replace(config, init=init) for init in ('pretrained', 'random')], progress=False)
    tokens = frame[(frame.split == 'train') & (frame.kind == 'text')].pivot_table(index='step', columns='init', values='count')
    assert (tokens.pretrained == tokens.random).all() and tokens.pretrained.nunique() > 1


@pytest.mark.fault('a loss or gradient that is not a number', 'the run stops before the update and names the step; the last good checkpoint is kept')
def test_nan_stops_and_keeps_the_last_good_checkpoint(work, config, monkeypatch):
    calls, real = [], training.Scored.forward
    def broken(model, *args):
        calls.append(len(args) == 3)                                                 # a step of the loop, not a trial or an evaluation
        return tuple(x * (float('nan') if sum(calls) == 8 else 1) for x in real(model, *args))
    monkeypatch.setattr(training.Scored, 'forward', broken)
    with pytest.raises(Diverged, match='not a number at step 8 of .* try a lower lr'): train(config)
    folder, = (work/'runs').glob('*-s0-*')
    assert not (folder/'done.json').exists() and training.find_checkpoint(folder)[0].name == '00000006'
    assert all(torch.isfinite(p).all() for p in load_lm(str(training.find_checkpoint(folder)[0])).parameters())


@pytest.mark.fault('death before the first checkpoint', 'the run begins again, to the same record')
def test_a_death_before_the_first_checkpoint_leaves_no_trace(work, config, stopped_at):
    stopped_at(2, config)
    folder, = (work/'runs').glob('*-s0-*')
    assert len(metrics(folder).splitlines()) == 3
    again = metrics(train(config))
    (folder/'done.json').unlink(); (folder/'metrics.jsonl').unlink()
    assert again == metrics(train(config))


@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.pt', 'state.json'])
@pytest.mark.fault('a file of a checkpoint is damaged', 'it is said and set aside; the run goes on from the one before')
def test_a_damaged_checkpoint_is_set_aside(work, config, stopped_at, capsys, name):
    stopped_at(8, config)
    folder, = (work/'runs').glob('*-s0-*')
    file = folder/'checkpoints'/'00000006'/name
    raw = bytearray(file.read_bytes()); raw[len(raw) // 2] ^= 255; file.write_bytes(raw)
    assert training.find_checkpoint(folder)[0].name == '00000003' and 'damaged' in capsys.readouterr().out
    damaged = metrics(train(config))
    (folder/'done.json').unlink(); (folder/'metrics.jsonl').unlink()
    assert damaged == metrics(train(config))


@pytest.mark.fault('no room for a checkpoint', 'one sentence; the last good checkpoint is kept, and with room again the run goes on')
def test_a_full_disk_keeps_the_last_checkpoint(work, config, stopped_at):
    stopped_at(5, config)
    folder, = (work/'runs').glob('*-s0-*')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))              # no file may grow beyond 200 kB: the weights do not fit
    try:
        with pytest.raises(BadInput, match='no space left for the checkpoint of step 6 .* start the same again'): train(config)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (folder/'checkpoints').iterdir()] == ['00000003']
    assert is_done(train(config))


@pytest.mark.fault('a finished record is damaged, or `done.json` is gone', 'it is refused by name, never read')
def test_records_are_whole_or_refused(work, config):
    folder = train(config)
    frame = load_runs()
    assert set(frame.columns) >= {'run_id', 'preset', 'lm', 'init', 'seed', 'step', 'tokens', 'split', 'kind', 'loss', 'count'}
    assert sorted(frame[frame.split == 'validation'].step.unique()) == [0, 4, 8, 12] and sorted(frame[frame.split == 'train'].step.unique()) == list(range(1, 13))
    assert json.loads((folder/'environment.json').read_text())['torch'] == torch.__version__
    (folder/'metrics.jsonl').write_text(metrics(folder).replace('"total": ', '"total": 1', 1))
    with pytest.raises(BadInput, match='damaged'): load_run(folder)
    with pytest.raises(BadInput, match='damaged'): train(config)
    (folder/'done.json').unlink()
    with pytest.raises(BadInput, match='no finished run'): load_runs()


@pytest.mark.parametrize('changes, words', [
    (dict(preset='labtop'), "preset='labtop' is unknown; .* Did you mean 'laptop'"), (dict(stepz=3), "stepz=3 is unknown. Did you mean 'steps'"),
    (dict(steps=0), 'steps=0 must be above zero'), (dict(batch=-4), 'batch=-4 must be above zero'), (dict(lr=0.0), 'lr=0.0 must be above zero'),
    (dict(lr=-1e-3), 'lr=-0.001 must be above zero'), (dict(lr=float('nan')), 'lr=nan must be above zero'), (dict(steps='many'), 'steps=.many. is of type str'),
    (dict(init='pretrain'), "Did you mean 'pretrained'"), (dict(batch=6, accumulation=4), 'make it a multiple'), (dict(precision='fp8'), 'give one of fp32, bf16'),
])
def test_bad_values_are_one_sentence(changes, words):
    with pytest.raises(BadInput, match=words) as e: make_config(**changes)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('changes, words', [
    (dict(lm='nowhere'), "lm='nowhere' is no folder"), (dict(lm='./nowhere'), "lm='./nowhere' is no folder"), (dict(data='nowhere'), 'nowhere'),
    (dict(image_tokenizer='nowhere'), "image_tokenizer='nowhere'"), (dict(px=60), '8'), (dict(length=3000), 'length=3000 is more than the 2,048 positions'), (dict(length=50), 'length=50 is too short for an image of 64 codes; give at least 70'),
])
def test_bad_names_fail_before_anything_is_trained(work, config, changes, words):
    with pytest.raises(BadInput, match=words) as e: ensure_runs([replace(config, **changes)], progress=False)
    assert '\n' not in str(e.value) and not (work/'runs').exists()


@pytest.mark.fault('two commands for the same run, started together', 'it is trained once')
def test_two_processes_train_a_run_once(work, config):
    config = replace(config, seed=5)
    both = [command(config, work) for _ in range(2)]
    assert [p.wait(timeout=180) for p in both] == [0, 0]
    folder, = (work/'runs').glob('*-s5-*')
    assert is_done(folder) and len((folder/'metrics.jsonl').read_text().splitlines()) == 12 + 4


def test_the_bundled_model_is_pretrained(work):
    "Its caption loss at step 0 lies clearly below its random twin's."
    frame = ensure_runs([make_config('smoke', init=init, steps=1, eval_pairs=64) for init in ('pretrained', 'random')], progress=False)
    text = frame[(frame.split == 'validation') & (frame.step == 0) & (frame.kind == 'text')].set_index('init').loss
    assert text.pretrained < text.random - 1.0
    assert Path(data_path('language_model', 'model.safetensors')).stat().st_size < 16e6


def test_plain_text_is_mixed_in_at_its_share_and_moves_no_pair(work, config):
    config = replace(config, prose_share=0.25, batch=16)
    material, plain = prepare(config, progress=False), prepare(replace(config, prose_share=0.0), progress=False)
    number, _, prose = (np.concatenate(x) for x in zip(*(documents_at(config, material, step) for step in range(60))))
    pairs, again = (np.concatenate([documents_at(c, m, step)[0] for step in range(60)]) for c, m in ((replace(config, prose_share=0.0), plain), (config, material)))
    assert 0.2 < prose.mean() < 0.3 and (number == again).all() and (number == pairs)[~prose].all()
    frame = load_run(train(config))
    assert {'prose', 'text', 'image'} <= set(frame[frame.split == 'train'].kind) and 'prose' not in set(frame[frame.split == 'validation'].kind)
    first = frame[(frame.split == 'train') & (frame.step == 1)].set_index('kind')['count']
    number, _, prose = documents_at(config, material, 0)
    assert first['prose'] == sum(len(material.prose[n]) - 1 for n in number[prose]) and first['image'] == 64 * (~prose).sum()


def test_captions_are_dropped_at_their_share(work, config):
    config = replace(config, caption_dropout=0.25, batch=16)
    material = prepare(config, progress=False)
    captioned, vocab = np.concatenate([documents_at(config, material, step)[1] for step in range(60)]), material.train.vocab
    documents = [row[:n].tolist() for step in range(60) for b in batches_at(config, material, step)[1] for row, n in zip(b.ids, (b.kind != Kind.PAD).sum(1))]
    bare = [ids for ids in documents if ids[:3] == [vocab.special('<doc>'), vocab.special('<text>'), vocab.special('</text>')]]
    assert 0.2 < len(bare) / len(documents) < 0.3 and all(len(ids) == 64 + 6 for ids in bare) and len(bare) == (~captioned).sum()


def test_weights_are_kept_where_the_config_says(work, config):
    folder = train(replace(config, keep=0))
    assert not (folder/'weights').exists()
    with pytest.raises(BadInput, match='has kept no weights'): kept(folder)
    before = metrics(folder)
    assert train(replace(config, keep=2)) == folder and list(kept(folder)) == [3, 12] and metrics(folder) == before
    a, b = (load_lm(str(path)) for path in kept(folder.name).values())
    assert not torch.equal(a.get_input_embeddings().weight, b.get_input_embeddings().weight)


def test_given_rows_are_where_training_starts(work, config, tmp_path):
    size = load_lm(config.lm).config.hidden_size
    rows = torch.randn(1024, size, generator=torch.Generator().manual_seed(0)) * 0.1
    save_file({'rows': rows}, tmp_path/'rows.safetensors')
    given = replace(config, rows=str(tmp_path/'rows.safetensors'), lr=1e-12, keep=1, weight_decay=0.0)
    folder = train(given)
    assert torch.allclose(load_lm(str(kept(folder)[12])).get_input_embeddings().weight[-1024:], rows, atol=1e-6)
    assert folder != train(replace(given, rows='random'))
    (tmp_path/'elsewhere').mkdir()
    save_file({'rows': rows}, tmp_path/'elsewhere'/'same.safetensors')
    assert train(replace(given, rows=str(tmp_path/'elsewhere'/'same.safetensors'))) == folder           # the content names the run, not the path
    save_file({'rows': rows[:5]}, tmp_path/'short.safetensors')
    with pytest.raises(BadInput, match='align the same model'): train(replace(given, rows=str(tmp_path/'short.safetensors')))
    with pytest.raises(BadInput, match="rows='nowhere' is neither"): train(replace(given, rows='nowhere'))
