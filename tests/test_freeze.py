"Freeze rules: exactly the named parts move, in every family; what is frozen keeps every bit."
import json
from dataclasses import replace

import pytest
import torch
from test_models import CONFIGS, build, families, tying
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from t2ianalysis import training
from t2ianalysis.data import BadInput
from t2ianalysis.models import RULES, decays, freeze, load_lm, parts, trainable_table, trains, widen
from t2ianalysis.sequences import Vocab
from t2ianalysis.training import kept, make_config, make_optimizer, prepare, train

vocab = Vocab(text=50, codes=64)


def weights(*names): return [f'{n}.weight' for n in names]
def both(*names): return [f'{n}.{x}' for n in names for x in ('weight', 'bias')]


# By hand, from the modules of each family: names outside the layers, and inside a layer
LLAMA = dict(prefix='model.layers', embedding=weights('model.embed_tokens', 'lm_head'), norm=weights('model.norm'), position=[],
             layer_norm=weights('input_layernorm', 'post_attention_layernorm'), attention=weights(*(f'self_attn.{x}_proj' for x in 'qkvo')),
             ffn=weights('mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'))
NAMES = {
    'llama': LLAMA,
    'qwen3': LLAMA | dict(layer_norm=LLAMA['layer_norm'] + weights('self_attn.q_norm', 'self_attn.k_norm')),
    'stablelm': LLAMA | dict(norm=both('model.norm'), layer_norm=both('input_layernorm', 'post_attention_layernorm')),
    'gpt_neox': dict(prefix='gpt_neox.layers', embedding=weights('gpt_neox.embed_in', 'lm_head'), norm=both('gpt_neox.final_layer_norm'), position=[],
                     layer_norm=both('input_layernorm', 'post_attention_layernorm'), attention=both('attention.query_key_value', 'attention.dense'),
                     ffn=both('mlp.dense_h_to_4h', 'mlp.dense_4h_to_h')),
    'gpt2': dict(prefix='transformer.h', embedding=weights('transformer.wte', 'lm_head'), norm=both('transformer.ln_f'), position=weights('transformer.wpe'),
                 layer_norm=both('ln_1', 'ln_2'), attention=both('attn.c_attn', 'attn.c_proj'), ffn=both('mlp.c_fc', 'mlp.c_proj')),
    'opt': dict(prefix='model.decoder.layers', embedding=weights('model.decoder.embed_tokens', 'lm_head'), norm=both('model.decoder.final_layer_norm'),
                position=weights('model.decoder.embed_positions'), layer_norm=both('self_attn_layer_norm', 'final_layer_norm'),
                attention=both(*(f'self_attn.{x}' for x in ('q_proj', 'k_proj', 'v_proj', 'out_proj'))), ffn=both('fc1', 'fc2')),
}


def expected(family, rule, layers=2):
    "The parameters that a rule trains, from the lists above."
    n = NAMES[family]
    inside = lambda names, of=range(layers): {f'{n["prefix"]}.{i}.{name}' for i in of for name in names}
    embedding, norms = set(n['embedding']), {*n['embedding'], *n['norm'], *n['position']} | inside(n['layer_norm'])
    every = norms | inside(n['attention']) | inside(n['ffn'])
    half = inside(n['layer_norm'] + n['attention'] + n['ffn'], range(layers // 2))
    return {'all': every, 'rows': embedding, 'embeddings': embedding, 'norms': norms, 'half': norms | half, 'ffn': norms | inside(n['ffn'])}[rule]


def moving(model): return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def a_few_steps(model, steps=3, weight_decay=0.5):
    "Training by hand, with large steps and much decay; returns the weights before."
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    optimizer = make_optimizer(model, make_config('smoke', lr=1e-1, weight_decay=weight_decay))
    for _ in range(steps):
        ids = torch.tensor([[3, 7, vocab.special('</doc>'), vocab.image, vocab.image + 5]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    return before, optimizer


@families
@tying
@pytest.mark.parametrize('rule', RULES)
def test_a_rule_trains_exactly_its_parts(family, tied, rule):
    model = widen(build(family, tied), vocab)
    assert freeze(model, rule, vocab) is model and moving(model) == expected(family, rule)
    before, optimizer = a_few_steps(model.train())
    after = dict(model.named_parameters(remove_duplicate=False))
    still = set(after) - expected(family, rule)
    assert still or rule == 'all'
    for name in still: assert torch.equal(after[name], before[name]) and after[name].grad is None, name
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert expected(family, rule) - changed <= {n for n in after if 'k_proj.bias' in n}              # a key's bias adds the same to every score: no gradient
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert held == {id(after[n]) for n in expected(family, rule)} == {id(p) for p in optimizer.state}


@families
@tying
def test_new_rows_leave_the_old_ones_as_they_were(family, tied):
    model = freeze(widen(build(family, tied), vocab), 'rows', vocab).train()
    before, _ = a_few_steps(model)
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in expected(family, 'rows'): continue
        assert torch.equal(p[:vocab.text], before[name][:vocab.text]), name                         # no gradient and no decay
        for new in (vocab.image, vocab.special('</doc>')): assert not torch.equal(p[new], before[name][new]), name
    freeze(model, 'embeddings', vocab)                                                             # another rule forgets the hold
    before, _ = a_few_steps(model)
    assert all(decays(p) == (p.ndim == 2) for p in model.parameters())
    assert not torch.equal(model.get_output_embeddings().weight[:vocab.text], before['lm_head.weight'][:vocab.text])


def test_weight_decay_would_move_the_old_rows():
    "What `decays` is for: a gradient of zero alone does not keep them."
    model = freeze(widen(build('llama', True), vocab), 'rows', vocab).train()
    row = model.lm_head.weight
    before = row.detach().clone()
    optimizer = torch.optim.AdamW([row], lr=1e-1, weight_decay=0.5)
    model(input_ids=torch.tensor([[3, vocab.image]]), labels=torch.tensor([[3, vocab.image]])).loss.backward(); optimizer.step()
    assert not torch.equal(row[:vocab.text], before[:vocab.text]) and not decays(row)


def test_an_output_bias_is_an_embedding():
    model = widen(build('llama'), vocab)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocab.size))
    assert parts(model).part['lm_head.bias'] == 'embedding'
    before, _ = a_few_steps(freeze(model, 'rows', vocab).train())
    assert not model.lm_head.bias[:vocab.text].any() and model.lm_head.bias[vocab.text:].any()


def test_an_odd_number_of_layers_is_rounded_down():
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    model = freeze(widen(AutoModelForCausalLM.from_config(config), vocab), 'half', vocab)
    assert moving(model) == expected('gpt2', 'half', layers=3) and 'transformer.h.1.mlp.c_fc.weight' not in moving(model)


def test_an_opt_with_projections_keeps_them_frozen():
    config = OPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, ffn_dim=64, word_embed_proj_dim=16)
    model = widen(AutoModelForCausalLM.from_config(config), vocab)
    table = parts(model)
    assert set(table.index[table.part == 'other']) == {'model.decoder.project_in.weight', 'model.decoder.project_out.weight'}
    for rule in RULES: assert ('model.decoder.project_in.weight' in moving(freeze(model, rule, vocab))) == (rule == 'all')


@families
@tying
def test_the_table_counts_what_trains(family, tied):
    model = widen(build(family, tied), vocab)
    table = trainable_table(model, vocab)
    for rule in RULES:
        n = sum(p.numel() for p in freeze(model, rule, vocab).parameters() if p.requires_grad)
        assert table.loc[rule, 'parameters'] == (n * (vocab.size - vocab.text) // vocab.size if rule == 'rows' else n)
    assert table.loc['all', 'share'] == 1 and table.share['rows'] < table.share['embeddings'] < table.share['norms'] < table.share['half'] < 1
    absent = '' if family in ('gpt2', 'opt') else 'position'                                        # said, not failed
    assert table.absent.to_dict() == {rule: absent if rule in ('norms', 'half', 'ffn') else '' for rule in RULES}


def test_a_model_on_the_meta_device_is_counted_without_weights():
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50_257 + 7 + 16_384))
    table = trainable_table(model, Vocab(50_257, 16_384))
    d, layers = 768, 12
    embedding, norm, ffn = (50_257 + 7 + 16_384) * d, (2 * layers + 1) * 2 * d, layers * (8 * d * d + 5 * d)
    assert table.parameters.to_dict() == dict(all=124_439_808 + (7 + 16_384) * d, rows=(7 + 16_384) * d, embeddings=embedding, norms=embedding + norm + 1024 * d,
                                              half=embedding + norm + 1024 * d + 6 * (12 * d * d + 9 * d), ffn=embedding + norm + 1024 * d + ffn)


def test_mistakes_are_one_sentence():
    model = build('llama')
    for call in (lambda: freeze(widen(model, vocab), 'halff', vocab), lambda: trains(parts(model), 'halff'), lambda: trainable_table(model, vocab, ('halff',))):
        with pytest.raises(BadInput, match="trainable='halff' is unknown; give one of all, rows, .* Did you mean 'half'"): call()
    with pytest.raises(BadInput, match='widen the model first'): freeze(build('llama'), 'rows', vocab)
    with pytest.raises(BadInput, match="Did you mean 'embeddings'"): make_config('smoke', trainable='embedings')


def test_a_model_without_attention_is_trained_whole_or_refused():
    from transformers import MambaConfig
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(BadInput, match='no attention modules.*trainable=.all'): freeze(mamba, 'norms', vocab)
    assert moving(freeze(mamba, 'all', vocab)) == {n for n, _ in mamba.named_parameters(remove_duplicate=False)}


# Through the loop

@pytest.fixture(scope='module')
def sources(tmp_path_factory, make, text_tokenizer):
    "Sixty pairs, a few of them for validation, and a tied Llama with the rows of the text tokenizer."
    root = tmp_path_factory.mktemp('sources')
    lm = CONFIGS['llama'](tie_word_embeddings=True)
    lm.vocab_size = len(text_tokenizer)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(lm).save_pretrained(root/'lm'); text_tokenizer.save_pretrained(root/'lm')
    make['pairs'](root/'pairs', 60)
    return root


@pytest.fixture
def config(sources, vq_folder):
    return make_config('smoke', lm=str(sources/'lm'), image_tokenizer=str(vq_folder), data=str(sources/'pairs'), px=16, pairs=8, layout='image', length=60, steps=6, batch=2,
                       eval_every=3, eval_pairs=1, checkpoint_every=2, weight_decay=0.5, lr=1e-2)


@pytest.mark.parametrize('rule', RULES)
def test_training_moves_what_the_rule_names(config, rule):
    config = replace(config, trainable=rule)
    material = prepare(config, progress=False)
    before = dict(widen(load_lm(config.lm), material.train.vocab, ('rows', 'pretrained', 0)).named_parameters())
    after = dict(load_lm(str(kept(train(config))[6])).named_parameters())
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == expected('llama', rule) - {'lm_head.weight'}                                    # tied
    old = slice(0, material.train.vocab.text)
    assert torch.equal(after['model.embed_tokens.weight'][old], before['model.embed_tokens.weight'][old]) == (rule == 'rows')


@pytest.mark.parametrize('rule', ['rows', 'half'])
def test_a_resumed_run_keeps_its_rule(config, rule, monkeypatch):
    config = replace(config, trainable=rule)
    folder = train(config)
    whole, weights_of = (folder/'metrics.jsonl').read_text(), lambda: (kept(folder)[6]/'model.safetensors').read_bytes()
    final = weights_of()
    class Died(Exception): pass
    real = training.lr_at
    def mortal(c, step):
        if step == 5: raise Died
        return real(c, step)
    for name in ('done.json', 'metrics.jsonl'): (folder/name).unlink()
    with monkeypatch.context() as m, pytest.raises(Died): m.setattr(training, 'lr_at', mortal); train(config)
    state = torch.load(folder/'checkpoints'/'00000004'/'optimizer.pt', weights_only=True)
    assert len(state['state']) == len(expected('llama', rule) - {'lm_head.weight'})
    assert train(config) == folder and (folder/'metrics.jsonl').read_text() == whole and weights_of() == final


def test_arms_with_other_rules_are_other_runs_with_the_same_batches(config):
    folders = {rule: train(replace(config, trainable=rule)) for rule in ('all', 'norms')}
    assert len(set(folders.values())) == 2
    first = [[x['image'] for x in map(json.loads, (f/'metrics.jsonl').read_text().splitlines())] for f in folders.values()]
    assert first[0][:2] == first[1][:2] and first[0][2:] != first[1][2:]                            # the same start and first batch, then apart
