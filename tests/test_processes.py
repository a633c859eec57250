"Two processes train what one trains, by copies of the model (DDP) or with a sharded one (FSDP2); all of them in one launch."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from t2ianalysis import training
from t2ianalysis.data import BadInput
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.open_lm import CONFIGS, stablelm_config

LAUNCH = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0']
CASES = {                                  # model and changes of the config; what does not change the numbers has no run of one process of its own
    'tied': ('tied', dict(accumulation=2)),
    'untied': ('untied', dict(accumulation=4)),
    'half': ('untied', dict(trainable='half')),
    'norms': ('tied', dict(trainable='norms')),
    'rows': ('tied', dict(trainable='rows')),
    'mixture': ('tied', dict(prose_share=0.3, caption_dropout=0.3, accumulation=2)),
    'bf16': ('untied', dict(precision='bf16')),
    'checkpointing': ('untied', dict(checkpointing=True)),
    'compile': ('untied', dict(compile=True)),
}
ALONE = {name: 'untied' if name in ('checkpointing', 'compile') else name for name in CASES}  # the run of one process that a case is compared with
BOTH = [(name, kind) for name in CASES for kind in ('copied', 'sharded') if kind not in {'rows': ('sharded',), 'norms': ('copied',), 'checkpointing': ('copied',), 'compile': ('copied',)}.get(name, ())]
WAYS = ('one, two', 'one, two sharded', 'two sharded, one', 'two, two sharded')  # which stop, and which go on


def run(work, changes, stop=None):
    "Train with a record that is not rounded; the last process is told to stop in step `stop`."
    def told(config, step):
        if step == stop and os.environ.get('RANK', '0') == str(int(os.environ.get('WORLD_SIZE', 1)) - 1): os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(config, step)
    lr_at = training.lr_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'round', lambda x, digits: x, raising=False)
        patch.setattr(training, 'lr_at', told)
        patch.setenv('T2I_WORK', str(work))
        try: training.train(training.make_config('smoke', **changes))
        except (SystemExit, BadInput) as e: (Path(work)/f'ended-{os.environ.get("RANK", "0")}.txt').write_text(f'{type(e).__name__}: {e}')


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "A function that gives the folder of results of a case, where all share the token stores."
    root = tmp_path_factory.mktemp('processes')
    (root/'stores').mkdir()
    def place(*names):
        folder = root/' '.join(names)
        if not folder.exists(): folder.mkdir(); (folder/'stores').symlink_to(root/'stores')
        return folder
    return place


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    "A function that gives the changes of a case's config: on a language model of two small random layers."
    folder, tokenizer = tmp_path_factory.mktemp('lm'), load_text_tokenizer('bundled')
    for tied in (True, False):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                     tie_word_embeddings=tied)).save_pretrained(folder/('tied' if tied else 'untied'))
        tokenizer.save_pretrained(folder/('tied' if tied else 'untied'))
    shared = dict(pairs=48, steps=20, batch=8, eval_every=10, eval_pairs=9, checkpoint_every=100)
    return lambda case, **changes: shared | dict(lm=str(folder/CASES[case][0])) | CASES[case][1] | changes


def launch(*command, **env):
    return subprocess.run([*LAUNCH, *map(str, command)], capture_output=True, text=True, timeout=500, env=dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', **env))


@pytest.fixture(scope='module')
def trained(places, config, tmp_path_factory):
    "All runs: those of one process here, all those of two in one launch."
    for name in CASES:
        if ALONE[name] == name: run(places(name, 'one'), config(name))
    for way in WAYS[:2]: run(places(way), config('tied'), stop=7)
    jobs = [(places(name, kind), config(name, shard=kind == 'sharded'), None) for name, kind in BOTH]
    jobs += [(places('one, two'), config('tied'), None), (places('one, two sharded'), config('tied', shard=True), None)]
    jobs += [(places('two sharded, one'), config('tied', shard=True), 7)]
    jobs += [(places('two, two sharded'), config('tied'), 7), (places('two, two sharded'), config('tied', shard=True), None)]
    jobs += [(places('refused'), config('tied', batch=2), None)]
    file = tmp_path_factory.mktemp('jobs')/'jobs.json'
    file.write_text(json.dumps(jobs, default=str))
    done = launch(__file__, file)
    assert done.returncode == 0, done.stderr[:5000]
    run(places('two sharded, one'), config('tied'))
    return places


def only(place, pattern):
    found = list((place/'runs').glob(f'*/{pattern}'))
    assert len(found) == 1, found
    return found[0]


def metrics(place): return [json.loads(line) for line in only(place, 'metrics.jsonl').open()]
def weights(place, step=20): return load_file(only(place, f'weights/{step:08}/model.safetensors'))
def environment(place): return json.loads(only(place, 'environment.json').read_text())


def difference(one, two):
    "The largest difference of any loss; steps, tokens and counts must be the same."
    kinds = [k for k in training.KINDS if k in one[0] | one[-2]]
    assert [{k: line.get(k) for k in ('step', 'split', 'tokens', *(f'n_{k}' for k in kinds))} for line in one] == \
           [{k: line.get(k) for k in ('step', 'split', 'tokens', *(f'n_{k}' for k in kinds))} for line in two]
    return max(abs(a[k] - b[k]) for a, b in zip(one, two, strict=True) for k in kinds if k in a)


@pytest.mark.parametrize('name, kind', BOTH)
def test_two_processes_log_what_one_process_logs(name, kind, trained):
    one, two = metrics(trained(ALONE[name], 'one')), metrics(trained(name, kind))
    assert len(one) == 20 + 3 and one[0]['total'] - one[-1]['total'] > 0.01    # it learns, so that equality says something
    assert {k: v for k, v in environment(trained(name, kind)).items() if k in ('processes', 'sharded')} == dict(processes=2, sharded=kind == 'sharded')
    assert difference(one, two) < (0.01 if name == 'bf16' else 1e-6)
    norms = [(a['grad_norm'], b['grad_norm']) for a, b in zip(one, two, strict=True) if 'grad_norm' in a]
    assert max(abs(a / b - 1) for a, b in norms) < (0.05 if name == 'bf16' else 1e-4)  # AdamW forgives a wrong scale, the norm does not
    if name == 'bf16': assert difference(metrics(trained('untied', 'one')), two) > 1e-5
    if name == 'mixture': assert all(any(k in line for line in two[1:]) for k in ('text', 'prose'))


@pytest.mark.parametrize('name', [name for name, kind in BOTH if kind == 'sharded' and name != 'bf16'])
def test_weights_of_a_sharded_run_are_those_of_one_process(name, trained):
    one, two = weights(trained(ALONE[name], 'one')), weights(trained(name, 'sharded'))
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) < 1e-5
    lm, info = AutoModelForCausalLM.from_pretrained(only(trained(name, 'sharded'), 'weights/00000020'), output_loading_info=True)
    assert not any(info.values()) and torch.equal(lm.get_input_embeddings().weight, two['model.embed_tokens.weight'])
    assert (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight) == (CASES[name][0] == 'tied')


@pytest.mark.parametrize('way', WAYS)
def test_a_run_goes_on_in_another_number_of_processes(way, trained):
    stopped = {file.read_text().split(' of ')[0] for file in trained(way).glob('ended-*.txt')}
    assert stopped == {'SystemExit: stopped at step 8'} and len(list(trained(way).glob('ended-*.txt'))) == (1 if way.startswith('one') else 2)
    assert environment(trained(way))['processes'] == (1 if way.endswith('one') else 2) and environment(trained(way))['sharded'] == way.endswith('sharded')
    assert difference(metrics(trained('tied', 'one')), metrics(trained(way))) < 2e-6
    one, other = weights(trained('tied', 'one')), weights(trained(way))
    assert max((one[k] - other[k]).abs().max() for k in one) < 1e-5


def test_a_batch_too_small_for_all_processes_is_refused_by_each(trained):
    said = [(trained('refused')/f'ended-{rank}.txt').read_text() for rank in (0, 1)]
    assert said == ['BadInput: batch=2 is less than a sequence for each of 2 processes and accumulation=2; raise it, or lower the others.'] * 2


def test_a_refusal_ends_all_processes_with_one_sentence():
    with pytest.raises(BadInput, match='shard=True divides the embedding'): training.make_config('smoke', shard=True, trainable='rows')
    done = launch('--no-python', Path(sys.executable).with_name('t2i'), 'train', '--preset', 'smoke', '-p', 'shard=true', '-p', 'trainable=rows')
    said = [line for line in done.stderr.splitlines() if line.startswith('t2i: ')]
    assert done.returncode == 1 and 1 <= len(said) <= 2 and "trainable='rows'" in said[0] and 'exitcode  : 2' in done.stderr


def test_preset_paper_starts_on_two_processes(make, tmp_path):
    "Its sequence length, vocabulary, codes, precision and architecture, at a small width and depth, random weights, sharded: the command that trains it."
    lm = stablelm_config(CONFIGS['open_lm_1b_old'])
    lm.update(dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2))
    lm.save_pretrained(tmp_path/'lm')
    load_text_tokenizer('bundled').save_pretrained(tmp_path/'lm')
    VQModel(block_out_channels=(32,) * 4, down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4, layers_per_block=1, latent_channels=4,
            vq_embed_dim=4, num_vq_embeddings=16_384, norm_type='spatial', mid_block_add_attention=False).save_pretrained(tmp_path/'movqgan')
    (tmp_path/'pairs').mkdir()
    for i in range(40):
        make['noise'](i, 256).save(tmp_path/'pairs'/f'{i}.png')
        (tmp_path/'pairs'/f'{i}.txt').write_text(f'a picture of the {i}th pattern')
    small = dict(lm=tmp_path/'lm', init='random', image_tokenizer=tmp_path/'movqgan', data=tmp_path/'pairs', shard='true', checkpointing='true', steps=2, batch=4, pairs=4, eval_pairs=2)
    done = launch('--no-python', Path(sys.executable).with_name('t2i'), 'train', '--preset', 'paper', *(x for k, v in small.items() for x in ('-p', f'{k}={v}')), T2I_WORK=str(tmp_path/'work'))
    assert done.returncode == 0 and done.stdout.count('validation loss after 2 steps') == 1, done.stderr[:5000]
    lines, saved = metrics(tmp_path/'work'), weights(tmp_path/'work', 2)
    assert [line['n_image'] for line in lines] == [2 * 1024, 4 * 1024, 4 * 1024, 2 * 1024] and environment(tmp_path/'work')['sharded']
    assert 9 < lines[-1]['total'] < 13 and saved['model.embed_tokens.weight'].shape == (50_432 + 16_384 + 7, 32)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for job in json.load(open(sys.argv[1])): run(*job)
