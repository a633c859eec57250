"The page of language models: every family does what its line says, what cannot be is refused, and two of them train, reload and draw."
import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from t2ianalysis.compute import Scored
from t2ianalysis.data import BadInput
from t2ianalysis.generation import load_painter, sample_prompts
from t2ianalysis.models import blocks, load_config, load_lm, parts, widen
from t2ianalysis.sequences import collate, document
from t2ianalysis.training import kept, load_run, make_config, prepare, token_losses, train

notebook = nbformat.read(Path(__file__).parent.parent/'nbs'/'guides'/'families.ipynb', as_version=4)
cells = [c for c in notebook.cells if c.cell_type == 'code']
is_table = lambda source: re.match(r'(shown|Markdown)\(', source.splitlines()[-1])


def definitions():
    "What the cells of the page define, without those that draw its tables."
    space, level = {}, logging.get_verbosity()
    for cell in cells:
        if not is_table(cell.source): exec(compile(cell.source, 'families.ipynb', 'exec'), space)
    logging.set_verbosity(level)
    return SimpleNamespace(**space)


page = definitions()
vocab = page.vocab
model_of = lambda name: page.load(page.FAMILIES[name])
families = pytest.mark.parametrize('name', page.FAMILIES)
FINE = dict(widen=True, arms=True, reload=True, generate=True, sample=True, cache=True, loss='in chunks', padding='none')
OTHERWISE = {name: dict(padding='padded') for name in ('OLMo 3', 'Gemma 3', 'Mistral', 'GPT-Neo', 'Falcon', 'Falcon with ALiBi', 'BLOOM', 'gpt-oss')} | {
    name: dict(loss='all logits') for name in ('Phi', 'Granite', 'Cohere')} | {
    name: dict(loss='all logits', padding='padded') for name in ('Gemma 2', 'GPT-J', 'Llama 4 text')} | {
    'Mamba': dict(arms='all only', padding='padded', cache=False), 'Jamba': dict(arms='all only', padding='padded'), 'Qwen3-Next': dict(arms='all only', padding='padded'),
    'RWKV': dict(padding='padded', generate=False, sample=False, cache=False)}


@families
def test_a_family_does_what_its_line_says(name):
    found = page.checks(model_of(name))
    assert found.pop('loss_error') < 1e-5
    assert found == FINE | OTHERWISE.get(name, {})


def test_the_page_shows_these_lines():
    "The tables in the notebook are those of its code as it is."
    lines = [line.split(' | ') for c in cells for o in c.outputs for line in o.get('data', {}).get('text/markdown', '').splitlines()]
    shown = {line[0].removeprefix('| '): line[1:] for line in lines if line[-2:-1] in (['none'], ['padded'])}
    assert set(page.FAMILIES) < set(shown)
    for name in page.FAMILIES:
        row = FINE | OTHERWISE.get(name, {})
        assert shown[name][:-1] == [{True: '✓', False: '✗'}.get(x, x) for x in row.values()], name


@families
def test_losses_and_gradients_are_those_of_the_padded_batch_and_of_each_document_alone(name):
    "With fresh weights too, whose small numbers hide what wide ones show."
    model, lengths = model_of(name), (9, 20, 14, 1)
    ids = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(20)[None] >= torch.tensor(lengths)[:, None], -100)
    plain = lambda model, ids, labels: F.cross_entropy(model(ids, use_cache=False).logits.float().flatten(0, 1), labels.flatten(), reduction='none').view(labels.shape)
    near = lambda a, b: (a - b).abs().max() <= 1e-5 * b.abs().max()
    for std in (1, 0.05):
        with torch.no_grad():
            for p in model.parameters(): p *= std if p.ndim > 1 else 1
        scored = Scored(copy.deepcopy(model), 20)
        assert scored.unpadded is ((FINE | OTHERWISE.get(name, {}))['padding'] == 'none')
        total, losses = scored(ids, labels)
        expected = plain(model, ids, labels)
        assert near(losses, expected.detach()) and near(total.detach(), expected.sum().detach())
        with torch.no_grad(): assert all(near(losses[i, :n], plain(model, ids[i:i + 1, :n], labels[i:i + 1, :n])[0]) for i, n in enumerate(lengths))
        total.backward()
        grads = torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
        most = max(g.abs().max() for g in grads if g is not None)
        for p, g in zip(scored.lm.parameters(), grads): assert (g is None and (p.grad is None or not p.grad.any())) or (p.grad - g).abs().max() <= 1e-4 * most


# By hand: parameters of the parts. d = 32, FFN 64, 50 rows; heads of 16: 32 x 32 for queries and output, 32 x 16 for keys and values of one head
ATTENTION, FFN, ROWS, NORM = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * 3 * 32 * 64, 50 * 32, 32
PARTS = {  # embedding, position, norm, attention, ffn, other
    'Llama': (2 * ROWS, 0, 5 * NORM, ATTENTION, FFN, 0),
    'Llama tied (SmolLM2)': (ROWS, 0, 5 * NORM, ATTENTION, FFN, 0),
    'GPT-2': (ROWS, 64 * 32, 5 * 2 * NORM, 2 * (4 * 32 * 32 + 4 * 32), 2 * (2 * 32 * 128 + 128 + 32), 0),
    'OPT with a narrow embedding (350m)': (50 * 16, 66 * 32, 4 * 2 * NORM, 2 * (4 * 32 * 32 + 4 * 32), 2 * (2 * 32 * 64 + 64 + 32), 2 * 16 * 32),
    'OLMo': (2 * ROWS, 0, 0, ATTENTION, FFN, 0),                                            # norms without parameters
    'OLMo 2': (2 * ROWS, 0, 5 * NORM + 2 * (32 + 16), ATTENTION, FFN, 0),                   # norms of queries and keys
    'Gemma 2': (ROWS, 0, 9 * NORM, ATTENTION, FFN, 0),                                      # four norms a layer
    'Gemma 3': (ROWS, 0, 9 * NORM + 2 * 2 * 16, ATTENTION, FFN, 0),
    'Phi': (2 * ROWS + 50, 0, 3 * 2 * NORM, ATTENTION + 2 * (2 * 32 + 2 * 16), 2 * (2 * 32 * 64 + 64 + 32), 0),  # the output layer has a bias
    'Cohere': (ROWS, 0, 3 * NORM, ATTENTION, FFN, 0),
    'Falcon': (ROWS, 0, 3 * 2 * NORM, ATTENTION, 2 * 2 * 32 * 128, 0),
    'Mixtral': (2 * ROWS, 0, 5 * NORM, ATTENTION, 4 * FFN + 2 * 4 * 32, 0),                  # four experts and a router
    'Qwen 2 MoE': (2 * ROWS, 0, 5 * NORM, ATTENTION + 2 * (32 + 2 * 16), 2 * (5 * 3 * 32 * 16 + 4 * 32 + 32), 0),  # and a shared expert with its gate
}


@pytest.mark.parametrize('name', PARTS)
def test_parts_by_hand(name):
    assert tuple(list(page.anatomy(model_of(name)).values())[3:]) == PARTS[name]


@pytest.mark.parametrize('name, reads', [('Llama', 'relative'), ('GPT-2', 'absolute'), ('OPT', 'absolute'), ('StableLM without positions (open_lm head_rotary)', 'not read'),
                                         ('StableLM (open_lm rotary)', 'relative'), ('BLOOM', 'not read'), ('GPT-J', 'relative')])
def test_positions_are_measured(name, reads): assert page.positions(model_of(name)) == reads


@pytest.mark.parametrize('name, alike', [('Llama', True), ('Gemma 2', False), ('Granite', False), ('Cohere', False), ('Phi', False), ('GPT-J', False)])
def test_the_loss_is_more_than_hidden_states_times_the_output_matrix(name, alike):
    "Capped or scaled logits and biases: a loss that forgets them is seen by the check of losses."
    model = model_of(name)
    widen(model, vocab)
    batch = collate(vocab, [document(vocab, [3, 9, 20], list(range(9)), 60)[0]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=batch.inputs, use_cache=False).last_hidden_state
        bare = F.cross_entropy(F.linear(hidden, model.get_output_embeddings().weight).flatten(0, 1), batch.labels.flatten())
        assert (abs(bare - token_losses(model, batch).mean()).item() < 1e-4) is alike


# What cannot be

SAYS = {'BERT: an encoder': 'not causal', 'XLNet: sees what comes after': 'not causal', 'T5: encoder and decoder': r'\(t5\) is an encoder-decoder',
        'BART: encoder and decoder': r'\(bart\) is an encoder-decoder', 'Gemma 3 with its image encoder': r'\(gemma3\) is a language model with parts for other media',
        'Mamba, rule `norms`': 'no attention modules', 'Jamba, rule `half`': 'no list of 2 equal layers', 'Qwen3-Next, rule `ffn`': 'mixes tokens by other means',
        "Mixtral, `init='open_lm'`": "init='open_lm' is for layers of one attention and one dense"}


@pytest.mark.parametrize('name', page.REFUSED)
def test_what_cannot_be_is_one_sentence(name):
    sentence = page.refusal(page.REFUSED[name])
    assert re.search(SAYS[name], sentence) and 'tmp' not in sentence and sentence.endswith('.') and '\n' not in sentence


@pytest.mark.parametrize('init', ['pretrained', 'random'])
def test_more_than_a_language_model_is_refused_before_anything_is_done(tmp_path, init):
    "Its config has no vocabulary of its own: whoever asked for it would fail later, and less clearly."
    page.both.save_pretrained(tmp_path)
    for call in (lambda: load_lm(str(tmp_path), init), lambda: load_config(str(tmp_path))):
        with pytest.raises(BadInput, match='parts for other media'): call()


def test_a_layer_that_mixes_tokens_by_attention_and_otherwise_has_no_parts():
    model = model_of('Llama')
    assert len(parts(model))
    blocks(model)[1].mixer = torch.nn.Conv1d(32, 32, 4)
    with pytest.raises(BadInput, match='other means'): parts(model)


DENSE = [n for n in page.FAMILIES if n not in ('DeepSeek V3', 'Llama 4 text', 'Qwen 2 MoE', 'Mixtral', 'OLMoE', 'gpt-oss', 'Mamba', 'Jamba', 'Qwen3-Next', 'RWKV')]


@families
def test_open_lm_draws_dense_layers_and_refuses_others(name):
    if name in DENSE:
        model = page.load(page.FAMILIES[name], 'open_lm')
        assert all(m.weight.std() < 0.25 for b in blocks(model) for m in b.modules() if isinstance(m, torch.nn.Linear))  # below the config's own 0.3: drawn anew
    else:
        with pytest.raises(BadInput, match="open_lm|equal layers"): page.load(page.FAMILIES[name], 'open_lm')


# Through a run

@pytest.fixture(scope='module')
def pairs(tmp_path_factory, make): return str(make['pairs'](tmp_path_factory.mktemp('pairs')/'pairs', 60))


@pytest.mark.parametrize('name, tied', [('GPT-NeoX (Pythia)', False), ('Gemma 2', True)])
def test_a_run(name, tied, pairs, vq_folder, text_tokenizer, tmp_path):
    "With twenty rows that the text tokenizer does not use, as Pythia has: trained, reloaded, drawn from."
    config = copy.deepcopy(page.FAMILIES[name])
    config.vocab_size, config.initializer_range = len(text_tokenizer) + 20, 0.02
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/'lm'); text_tokenizer.save_pretrained(tmp_path/'lm')
    settings = make_config('smoke', lm=str(tmp_path/'lm'), image_tokenizer=str(vq_folder), data=pairs, px=16, pairs=40, length=60, steps=8, batch=4, eval_every=8, eval_pairs=4, lr=1e-2)
    material = prepare(settings, progress=False)
    assert material.train.vocab.text == config.vocab_size
    folder = train(settings, material)
    total = load_run(folder).query("split == 'validation' and kind == 'total'").set_index('step').loss
    assert total[8] < total[0] - 0.3
    model = load_lm(str(kept(folder)[8]))
    assert page.is_tied(model) is tied and model.config.vocab_size == material.train.vocab.size == len(model.get_input_embeddings().weight)
    codes = sample_prompts(load_painter(folder), ['a red fish', 'two', ''])
    assert codes.shape == (3, 4, 4) and 0 <= codes.min() and codes.max() < 16
    frozen = load_lm(str(kept(train(replace(settings, trainable='rows', steps=2, eval_every=2), material))[2]))
    assert torch.equal(frozen.get_output_embeddings().weight[:config.vocab_size], load_lm(str(tmp_path/'lm')).get_output_embeddings().weight)
