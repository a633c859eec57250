"open_lm checkpoints: the logits of the original system, every variant, and one sentence for what does not convert."
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from golden_open_lm import DIGEST, golden_checkpoint
from golden_vqgan import digest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, StableLmConfig

from t2ianalysis.data import BadInput
from t2ianalysis.models import freeze, load_config, load_lm, load_text_tokenizer, trainable_table, widen
from t2ianalysis.open_lm import CONFIGS, convert_open_lm, open_checkpoint, position_perplexities, positions_warning, random_checkpoint
from t2ianalysis.sequences import Vocab

GOLDEN = Path(__file__).parent/'golden'
TINY = dict(hidden_dim=48, n_layers=2, n_heads=4, seq_len=64, vocab_size=100, post_embed_norm=False, weight_tying=False, model_norm='default_layer_norm', qk_norm=False)
VARIANTS = ('head_rotary', 'rotary', 'llama_rotary')
IDS = torch.randint(1, 100, (2, 40), generator=torch.Generator().manual_seed(0))


def convert(*arguments, **options): return convert_open_lm(*arguments, **dict(progress=False) | options)


def logits_of(folder, ids, **options):
    with torch.no_grad(): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, **options).logits


def turned(x, positions):
    "open_lm's three rotations of (batch, token, head, width), each written as its source writes it"
    b, t, h, w = x.shape
    speed = 10_000 ** (-torch.arange(0, w, 2) / w)
    if positions == 'llama_rotary':  # neighbours as complex numbers
        return torch.view_as_real(torch.view_as_complex(x.reshape(b, t, h, w // 2, 2)) * torch.polar(torch.ones(1), torch.outer(torch.arange(t), speed))[None, :, None]).flatten(3)
    count = torch.arange(h)[None, None, :, None] if positions == 'head_rotary' else torch.arange(t)[None, :, None, None]  # the slip of the first models: heads are counted, not tokens
    angle = torch.cat([count * speed] * 2, dim=-1)
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()


def reference(checkpoint, values, positions, ids):
    "The logits of open_lm, from its formulas alone"
    s = {k.removeprefix('module.'): t.float() for k, t in torch.load(checkpoint, weights_only=True)['state_dict'].items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], s.get(f'{name}.weight'), s.get(f'{name}.bias'), values.get('norm_eps', 1e-5))
    x = s['tok_embeddings.weight'][ids]
    for i in range(values['n_layers']):
        q, k, v = (p.unflatten(2, (values['n_heads'], -1)) for p in (norm(x, f'layers.{i}.attention_norm') @ s[f'layers.{i}.attention.in_proj.weight'].T).chunk(3, dim=-1))
        scores = torch.einsum('bqhd,bkhd->bhqk', turned(q, positions), turned(k, positions)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        x = x + torch.einsum('bhqk,bkhd->bqhd', scores.softmax(-1), v).flatten(2) @ s[f'layers.{i}.attention.out_proj.weight'].T
        gate, up = (norm(x, f'layers.{i}.ffn_norm') @ s[f'layers.{i}.feed_forward.w12.weight'].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ s[f'layers.{i}.feed_forward.w3.weight'].T
    return norm(x, 'norm') @ s['output.weight'].T


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A random checkpoint; its config beside it does not say how positions are encoded"
    return random_checkpoint(tmp_path_factory.mktemp('open_lm')/'tiny.pt', TINY)


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    "A folder with a text tokenizer of letters"
    folder = tmp_path_factory.mktemp('letters')
    words = {'<end>': 0, ' ': 1} | {chr(97 + i): i + 2 for i in range(26)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(words, [], unk_token='<end>')), eos_token='<end>', bos_token='<end>').save_pretrained(folder)
    return folder


# what comes out

@pytest.fixture(scope='module')
def golden(tmp_path_factory):
    "The checkpoint that the original code was given"
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'): pytest.skip('PyTorch rounds a few of the random weights otherwise on a processor without AVX2')
    file = tmp_path_factory.mktemp('golden')/'open_lm.pt'
    torch.save(golden_checkpoint(), file)
    return file


def test_the_golden_checkpoint_is_that_of_the_original_code(golden): assert digest(torch.load(golden, weights_only=True)['state_dict']) == DIGEST


@pytest.mark.parametrize('positions', ['head_rotary', 'rotary'])
def test_the_logits_are_those_of_open_lm(positions, golden, tmp_path):
    expected = load_file(GOLDEN/f'open_lm_{positions}.expected.safetensors')
    out = convert(golden, tmp_path/'out', config=GOLDEN/f'open_lm_{positions}.json')
    assert (logits_of(out, expected['input_ids']) - expected['logits']).abs().max() < 1e-4
    other = {'head_rotary': 'rotary', 'rotary': 'head_rotary'}[positions]
    wrong = convert(golden, tmp_path/'wrong', config=GOLDEN/f'open_lm_{positions}.json', positions=other)
    assert (logits_of(wrong, expected['input_ids']) - expected['logits']).abs().max() > 1


@pytest.mark.parametrize('positions', VARIANTS)
@pytest.mark.parametrize('norm', ['default_layer_norm', 'gain_only_layer_norm', 'no_wb_layer_norm'])
def test_every_variant_computes_what_open_lm_computes(positions, norm, tmp_path):
    values = TINY | dict(model_norm=norm, norm_eps=1e-3, weight_tying=norm == 'gain_only_layer_norm')
    checkpoint = random_checkpoint(tmp_path/'a.pt', values, seed=3)
    out = convert(checkpoint, tmp_path/'out', positions=positions)
    assert (logits_of(out, IDS) - reference(checkpoint, values, positions, IDS)).abs().max() < 1e-4
    assert load_config(str(out)).tie_word_embeddings == values['weight_tying']


@pytest.mark.parametrize('positions', VARIANTS)
def test_with_and_without_a_cache_the_same(positions, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(convert(tiny, tmp_path/'out', positions=positions)).eval()
    cached, plain = (model.generate(IDS[:, :10], attention_mask=torch.ones(2, 10), max_new_tokens=30, do_sample=False, use_cache=use, pad_token_id=0, eos_token_id=None,
                                    return_dict_in_generate=True, output_logits=True) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences) and cached.sequences.shape == (2, 40)
    assert (torch.stack(cached.logits) - torch.stack(plain.logits)).abs().max() < 1e-4


def test_files_are_bounded_and_hold_the_same(tiny, tmp_path):
    one, many = convert(tiny, tmp_path/'one', positions='rotary'), convert(tiny, tmp_path/'many', positions='rotary', shard_bytes=60_000)
    assert [f.name for f in one.glob('*.safetensors')] == ['model.safetensors'] and not (one/'model.safetensors.index.json').exists()
    files, index = sorted(many.glob('*.safetensors')), json.loads((many/'model.safetensors.index.json').read_text())
    assert len(files) > 3 and max(f.stat().st_size for f in files) < 65_000 and {f.name for f in files} == set(index['weight_map'].values())
    assert index['metadata']['total_size'] == sum(t.nbytes for t in load_file(one/'model.safetensors').values())
    assert torch.equal(logits_of(one, IDS), logits_of(many, IDS))
    assert len({f.stat().st_mode for f in many.iterdir()}) == 1


def test_the_dtype_stays_unless_another_is_asked_for(tmp_path):
    half = random_checkpoint(tmp_path/'half.pt', TINY | dict(positional_embedding_type='llama_rotary'), torch.float16)
    kept, wide = convert(half, tmp_path/'kept'), convert(half, tmp_path/'wide', dtype='fp32')
    assert {t.dtype for t in load_file(kept/'model.safetensors').values()} == {torch.float16} and load_config(str(kept)).dtype == torch.float16
    assert {t.dtype for t in load_file(wide/'model.safetensors').values()} == {torch.float32} and load_config(str(wide)).dtype == torch.float32
    assert torch.equal(logits_of(kept, IDS), logits_of(wide, IDS))


def test_a_bare_or_wrapped_state_dict_is_the_same(tiny, tmp_path):
    state = {k.removeprefix('module.'): t for k, t in torch.load(tiny, weights_only=True)['state_dict'].items()}
    for name, prefix in dict(bare='', compiled='module._orig_mod.').items():
        torch.save({prefix + k: t for k, t in state.items()}, tmp_path/f'{name}.pt')
        found = open_checkpoint(tmp_path/f'{name}.pt')
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_the_config_is_a_file_a_neighbour_or_a_name(tiny, tmp_path):
    named, names = random_checkpoint(tmp_path/'open_lm_11m_v2.pt', CONFIGS['open_lm_11m_v2'], torch.float16), set()
    for config in (None, tmp_path/'open_lm_11m_v2.json', 'open_lm_11m_v2', tmp_path/'name.json'):
        (tmp_path/'name.json').write_text('"open_lm_11m_v2"')
        names.add(load_config(str(convert(named, tmp_path/f'out {config and Path(config).name}', config=config, positions='rotary'))).hidden_size)
    named.with_suffix('.json').unlink()
    assert convert(named, tmp_path/'by its own name', positions='rotary').is_dir() and names == {96}
    early = tmp_path/'early.json'; early.write_text(json.dumps(TINY | dict(rotary_old=True)))
    assert load_config(str(convert(tiny, tmp_path/'early', config=early))).open_lm_positions == 'head_rotary'


def test_memory_stays_far_below_the_size_of_the_checkpoint(tmp_path):
    values = TINY | dict(hidden_dim=384, n_layers=16, n_heads=8, positional_embedding_type='llama_rotary')
    checkpoint = random_checkpoint(tmp_path/'large.pt', values)
    size, seen, done = checkpoint.stat().st_size, [], threading.Event()
    def resident():
        pages = [int(n) * os.sysconf('SC_PAGE_SIZE') for n in Path('/proc/self/statm').read_text().split()]
        return torch.tensor([pages[2], pages[1] - pages[2]])                   # mapped from files, own
    def watch():
        while not done.is_set(): seen.append(resident()); time.sleep(0.001)
    convert(checkpoint, tmp_path/'warm', shard_bytes=8_000_000)
    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start(); convert(checkpoint, tmp_path/'out', shard_bytes=8_000_000); done.set(); watcher.join()
    assert size > 100e6 and (torch.stack(seen) - before).max() < size / 3


# what the library does with it

def test_the_library_trains_widens_and_freezes_it(tiny, tmp_path):
    out, vocab = str(convert(tiny, tmp_path/'out', positions='head_rotary')), Vocab(100, 16)
    for init in ('pretrained', 'open_lm'):
        model = widen(load_lm(out, init=init), vocab)
        table = trainable_table(model, vocab)
        assert table.loc['norms', 'absent'] == 'position' and table.loc['all', 'absent'] == '' and (table.parameters > 0).all()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {n for n, p in freeze(model, 'norms', vocab).named_parameters() if p.requires_grad and 'norm' not in n} == {'model.embed_tokens.weight', 'lm_head.weight'}
    model.save_pretrained(tmp_path/'wide')
    again = load_lm(str(tmp_path/'wide')).eval()
    assert again.config.rope_parameters['partial_rotary_factor'] == 0 and torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    assert again.config.initializer_range == pytest.approx(48 ** -0.5)         # so new rows are drawn as open_lm draws its own
    assert abs(load_lm(out, init='open_lm').model.layers[0].self_attn.q_proj.weight.std() * math.sqrt(48) - 1) < 0.05


def learn_rotary(path, seed=0):
    "A small model that has learnt, with rotary positions, to repeat what stood three letters before; saved as open_lm would"
    values = TINY | dict(vocab_size=28, positional_embedding_type='rotary')
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(StableLmConfig(vocab_size=28, hidden_size=48, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                                            max_position_embeddings=64, partial_rotary_factor=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids = torch.randint(2, 28, (16, 3)).repeat(1, 8)
        optimizer.zero_grad(); model(input_ids=ids, labels=ids, use_cache=False).loss.backward(); optimizer.step()
    s, state = model.state_dict(), {}
    for i in range(2):
        old, new = f'model.layers.{i}.', f'module.layers.{i}.'
        state[new + 'attention.in_proj.weight'] = torch.cat([s[f'{old}self_attn.{x}_proj.weight'] for x in 'qkv'])
        state[new + 'attention.out_proj.weight'] = s[old + 'self_attn.o_proj.weight']
        state[new + 'feed_forward.w12.weight'] = torch.cat([s[f'{old}mlp.{x}_proj.weight'] for x in ('gate', 'up')])
        state[new + 'feed_forward.w3.weight'] = s[old + 'mlp.down_proj.weight']
        for a, b in (('attention_norm', 'input_layernorm'), ('ffn_norm', 'post_attention_layernorm')):
            for kind in ('weight', 'bias'): state[f'{new}{a}.{kind}'] = s[f'{old}{b}.{kind}']
    state |= {'module.tok_embeddings.weight': s['model.embed_tokens.weight'], 'module.norm.weight': s['model.norm.weight'], 'module.norm.bias': s['model.norm.bias'], 'module.output.weight': s['lm_head.weight']}
    torch.save({'epoch': 1, 'name': 'learnt', 'state_dict': state}, path)
    path.with_suffix('.json').write_text(json.dumps(values))
    return path


def test_a_wrong_position_variant_is_warned_of(letters, tmp_path, t2i, capsys):
    checkpoint, text = learn_rotary(tmp_path/'learnt.pt'), tmp_path/'text.txt'
    text.write_text(''.join(word * 8 for word in ('abc', 'fox', 'dog', 'sea', 'red', 'ink')))
    tables = {p: position_perplexities(convert(checkpoint, tmp_path/p, positions=p, tokenizer=str(letters)), text, progress=False) for p in VARIANTS}
    assert {t.perplexity.idxmin() for t in tables.values()} == {'rotary'} and [t.index[t.chosen].tolist() for t in tables.values()] == [[p] for p in VARIANTS]
    for p in VARIANTS: assert tables[p].perplexity.to_dict() == pytest.approx(tables['rotary'].perplexity.to_dict(), rel=1e-4)  # a folder of any variant tells the same
    ids = torch.tensor(load_text_tokenizer(str(tmp_path/'rotary'))(text.read_text()).input_ids)[:128].view(2, 64)                # windows as long as the model takes
    for p in VARIANTS:
        loss = F.cross_entropy(logits_of(tmp_path/p, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert tables['rotary'].perplexity[p] == pytest.approx(loss.exp().item(), rel=1e-3)
    assert positions_warning(tables['rotary']) == '' and "trained with 'rotary'; convert again with --positions rotary" in positions_warning(tables['head_rotary'])

    arguments = ['convert', 'open-lm', str(checkpoint), '--tokenizer', str(letters), '--text', str(text)]
    assert t2i(*arguments, str(tmp_path/'right')) == 0
    said = capsys.readouterr()
    assert 'head_rotary' in said.out and 'warning' not in said.err
    assert t2i(*arguments, str(tmp_path/'wrong'), '--positions', 'head_rotary') == 0
    assert "warning: positions='head_rotary' gives perplexity" in capsys.readouterr().err
    assert len(load_text_tokenizer(str(tmp_path/'wrong'))) == 28


def test_without_a_tokenizer_the_command_says_so(tiny, tmp_path, t2i, capsys):
    assert t2i('convert', 'open-lm', str(tiny), str(tmp_path/'out'), '--positions', 'rotary') == 0
    assert 'no text tokenizer' in capsys.readouterr().out


# what is refused, in one sentence, with nothing left behind

REFUSED = dict(
    unsaid=({}, None, 'positional_embedding_type'), qk_norm=(dict(qk_norm=True), 'rotary', 'qk_norm'), moe=(dict(moe_freq=2), 'rotary', 'moe_freq'), embed=(dict(post_embed_norm=True), 'rotary', 'post_embed_norm'),
    gelu=(dict(ffn_type='gelu'), 'rotary', "ffn_type='gelu'"), rms=(dict(model_norm='rms_norm'), 'rotary', "model_norm='rms_norm'"), typo=({}, 'rotari', "Did you mean 'rotary'?"),
    heads=(dict(n_heads=5), 'rotary', 'n_heads=5'), zero=(dict(n_heads=0), 'rotary', 'n_heads=0'), flag=(dict(weight_tying='false'), 'rotary', "weight_tying='false'"), eps=(dict(norm_eps='1e-5'), 'rotary', "norm_eps='1e-5'"), text=(dict(n_layers='two'), 'rotary', "n_layers='two'"), shape=(dict(vocab_size=101), 'rotary', 'tok_embeddings.weight has shape (100, 48)'),
    layers=(dict(n_layers=3), 'rotary', 'layers.2.attention.in_proj.weight'), fewer=(dict(n_layers=1), 'rotary', 'do not fit: layers.1.'), gain=(dict(model_norm='gain_only_layer_norm'), 'rotary', 'attention_norm.bias'),
    tied=(dict(weight_tying=True), 'rotary', 'weight_tying'),
)


@pytest.mark.parametrize('case', REFUSED)
def test_a_config_that_does_not_fit_is_refused(case, tiny, tmp_path, t2i, capsys):
    changes, positions, words = REFUSED[case]
    config = tmp_path/'config.json'; config.write_text(json.dumps(TINY | changes))
    arguments = ['convert', 'open-lm', str(tiny), str(tmp_path/'out'), '--config', str(config)] + (['--positions', positions] if positions else [])
    assert t2i(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('t2i: ') and err.count('\n') == 1
    assert [f.name for f in tmp_path.iterdir()] == ['config.json']


@pytest.mark.parametrize('name', ['hidden_dim', 'n_layers', 'n_heads', 'seq_len', 'vocab_size'])
def test_a_config_that_lacks_a_field_is_refused(name, tiny, tmp_path):
    config = tmp_path/'config.json'; config.write_text(json.dumps({k: v for k, v in TINY.items() if k != name}))
    with pytest.raises(BadInput, match=f'lacks {name}'): convert(tiny, tmp_path/'out', config=config, positions='rotary')


def test_keys_show_what_a_config_left_out(tiny, tmp_path):
    state = torch.load(tiny, weights_only=True)['state_dict']
    config = tmp_path/'config.json'; config.write_text(json.dumps({k: v for k, v in TINY.items() if k not in ('qk_norm', 'model_norm')}))
    assert convert(tiny, tmp_path/'read off', config=config, positions='rotary').is_dir()
    for extra, words in (('layers.0.attention.q_norm.weight', 'qk_norm'), ('layers.0.feed_forward.experts.mlp.w1', 'mixture of experts'), ('post_embed_norm.weight', 'post_embed_norm')):
        torch.save({'state_dict': state | {f'module.{extra}': torch.ones(2)}}, tmp_path/'a.pt')
        with pytest.raises(BadInput, match=words): convert(tmp_path/'a.pt', tmp_path/'out', config=config, positions='rotary')
    torch.save({'state_dict': {k: t for k, t in state.items() if not k.endswith('.bias')}}, tmp_path/'a.pt')
    with pytest.raises(BadInput, match='gain_only_layer_norm'): convert(tmp_path/'a.pt', tmp_path/'out', config=config, positions='rotary')  # it may be an rms_norm


class Runs:
    "Pickled as a call"
    def __reduce__(self): return (print, ('this ran',))


def test_a_file_that_is_no_open_lm_checkpoint_is_refused(tiny, tmp_path, capsys):
    config, bad = tiny.with_suffix('.json'), tmp_path/'bad.pt'
    def refused(words):
        with pytest.raises(BadInput, match=words) as e: convert(bad, tmp_path/'out', config=config, positions='rotary')
        assert '\n' not in str(e.value) and [f.name for f in tmp_path.iterdir()] == ['bad.pt']
    with pytest.raises(BadInput, match='is no file'): convert(tmp_path/'absent.pt', tmp_path/'out')
    whole = tiny.read_bytes()
    bad.write_bytes(whole[:len(whole) // 2]); refused('truncated')
    bad.write_bytes(b''); refused('truncated')
    torch.save({'state_dict': Runs()}, bad); refused('would run code')
    torch.save({'state_dict': {'a': 1}}, bad); refused('no state dict of tensors')
    torch.save(torch.ones(3), bad); refused('no state dict of tensors')
    torch.save(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)).state_dict(), bad)
    refused(r'do not fit: transformer.wte.weight, .* missing: tok_embeddings.weight')
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint['state_dict']['module.layers.1.feed_forward.w3.weight'][3, 5] = math.nan
    torch.save(checkpoint, bad); refused('layers.1.feed_forward.w3.weight holds numbers that are not finite')
    assert 'this ran' not in capsys.readouterr().out


def test_a_number_too_large_for_the_dtype_is_refused(tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint['state_dict']['module.output.weight'][0, 0] = 1e6
    torch.save(checkpoint, tmp_path/'large.pt')
    with pytest.raises(BadInput, match='not finite as torch.float16'): convert(tmp_path/'large.pt', tmp_path/'out', config=tiny.with_suffix('.json'), positions='rotary', dtype='fp16')
    assert convert(tmp_path/'large.pt', tmp_path/'out', config=tiny.with_suffix('.json'), positions='rotary', dtype='bf16').is_dir()


def test_a_place_that_cannot_be_used_is_refused(tiny, letters, tmp_path):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'kept').write_text('mine'); (tmp_path/'file').write_text('mine'); (tmp_path/'empty').mkdir()
    for out in ('full', 'file'):
        with pytest.raises(BadInput, match='not empty'): convert(tiny, tmp_path/out, positions='rotary')
    with pytest.raises(BadInput, match='cannot be written'): convert(tiny, tmp_path/'file'/'out', positions='rotary')
    assert (tmp_path/'full'/'kept').read_text() == 'mine' and (convert(tiny, tmp_path/'empty', positions='rotary')/'config.json').exists()
    with FileLock(tmp_path/'.out.lock'), pytest.raises(BadInput, match='by another process'): convert(tiny, tmp_path/'out', positions='rotary')
    (tmp_path/'.out.partial').mkdir(); (tmp_path/'.out.partial'/'model.safetensors').write_text('of a killed conversion')
    assert convert(tiny, tmp_path/'out', positions='rotary').is_dir() and not (tmp_path/'.out.partial').exists()
    with pytest.raises(BadInput, match='could not be loaded'): convert(tiny, tmp_path/'new', positions='rotary', tokenizer=str(tmp_path/'full'))
    small = random_checkpoint(tmp_path/'small.pt', TINY | dict(vocab_size=20))
    with pytest.raises(BadInput, match='28 tokens, but the model only 20 rows'): convert(small, tmp_path/'new', positions='rotary', tokenizer=str(letters))
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('options, words', [(['--text', 'x.txt'], 'tokenizer'), (['--text', 'x.txt', '--tokenizer', 'y'], "text='x.txt' cannot be read"), (['--dtype', 'fp8'], "dtype='fp8'"),
                                            (['--config', 'open_lm_1c'], "Did you mean 'open_lm_1b'?")])
def test_a_wrong_option_is_one_sentence(options, words, tiny, tmp_path, t2i, capsys):
    assert t2i('convert', 'open-lm', str(tiny), str(tmp_path/'out'), '--positions', 'rotary', *options) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and not (tmp_path/'out').exists()


def test_help_needs_no_torch():
    code = "import sys; from typer.testing import CliRunner; from t2ianalysis.cli import app; r = CliRunner().invoke(app, ['convert', 'open-lm', '--help']); assert r.exit_code == 0 and 'torch' not in sys.modules; print(r.output)"
    assert '--positions' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
