"What is forgotten: the measures agree with plain references, planted knowledge is found, guessing is at chance."
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from t2ianalysis import forgetting as fg
from t2ianalysis.analysis import FAILS, HOLDS, UNSURE
from t2ianalysis.data import BadInput
from t2ianalysis.models import load_lm, widen
from t2ianalysis.sequences import Vocab

TEXTS = ['a picture of a red fish', 'two', 'two blue fish and a red house, naïve 日本 🐟', 'a house and a house']
CONFIGS = {
    'llama': LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=256),
    'gpt2': GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=256),
    'gpt_neox': GPTNeoXConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=256),
    'opt': OPTConfig(vocab_size=300, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, max_position_embeddings=256)}
QUESTIONS = [fg.Question('colour', f'the {thing} is', ('red', 'blue', 'as green as grass', 'grey'), i % 4) for i, thing in enumerate(['fish', 'house', 'old door', 'boat', 'tree', 'sea'])]


def make(family):
    "A random model whose likelihoods are far from even"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).float().eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3 if p.ndim > 1 else 1)
    return model


@pytest.fixture(scope='module')
def lm(): return make('llama')


@pytest.fixture(scope='module', params=list(CONFIGS))
def any_lm(request): return make(request.param)


def plain_nats(model, ids):
    "One sequence alone, by the definition"
    with torch.no_grad(): p = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return [-float(p[i, t]) for i, t in enumerate(ids[1:])]


class Oracle(nn.Module):
    "Knows some sequences by heart and nothing else: the next token of a known beginning is nearly sure, everything else is equally likely."
    config, device = SimpleNamespace(max_position_embeddings=10_000), torch.device('cpu')

    def __init__(self, known, rows=300):
        super().__init__()
        self.next, self.rows = {tuple(ids[:i]): ids[i] for ids in known for i in range(1, len(ids))}, rows

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        start = past_key_values.ids if past_key_values else input_ids[:, :0]
        ids, logits = torch.cat([start, input_ids], 1), torch.zeros(*input_ids.shape, self.rows)
        for b, row in enumerate(ids.tolist()):
            for i in range(input_ids.shape[1]):
                if (after := self.next.get(tuple(row[:start.shape[1] + i + 1]))) is not None: logits[b, i, after] = 30.
        return SimpleNamespace(logits=logits, past_key_values=Ids(ids))


class Ids:
    "A cache that only remembers"
    def __init__(self, ids): self.ids = ids
    def batch_repeat_interleave(self, k): self.ids = self.ids.repeat_interleave(k, 0)


# Bits per byte

def test_bits_per_byte_is_what_it_says(any_lm, text_tokenizer):
    eos = text_tokenizer.eos_token_id
    bits = [sum(plain_nats(any_lm, [eos, *text_tokenizer(t)['input_ids']])) / math.log(2) for t in TEXTS]
    assert fg.bits_per_byte(any_lm, text_tokenizer, TEXTS) == pytest.approx(sum(bits) / sum(len(t.encode()) for t in TEXTS), rel=1e-4)
    np.testing.assert_allclose(fg.paragraph_bits(any_lm, text_tokenizer, TEXTS).bits, bits, rtol=1e-4)


def test_neither_batch_nor_padding_matter(lm):
    sequences = [[1, 2, 3], list(range(2, 60)), [7, 8], [9, 9, 9, 9, 9]]
    for tokens in (1, 12, 10_000):
        for mine, ids in zip(fg.token_nats(lm, sequences, tokens=tokens), sequences, strict=True): np.testing.assert_allclose(mine[0], plain_nats(lm, ids), rtol=1e-4, atol=1e-4)


def test_a_paragraph_is_cut_with_its_bytes(lm, text_tokenizer):
    table = fg.paragraph_bits(lm, text_tokenizer, ['a red fish ' * 100, 'two'], limit=12)
    ids = text_tokenizer('a red fish ' * 100)['input_ids'][:12]
    assert table.bytes.tolist() == [len(text_tokenizer.decode(ids)), 3]
    assert len(fg.paragraph_bits(lm, text_tokenizer, ['a red fish ' * 100])) == 1   # longer than the model's 256 positions


def test_what_a_model_expects_of_images_is_loss(text_tokenizer):
    vocab = Vocab(300, 16)
    model, before = make('llama'), fg.bits_per_byte(make('llama'), text_tokenizer, TEXTS)
    widen(model, vocab)
    with torch.no_grad(): model.lm_head.weight[vocab.image + 3] = 0   # a logit of exactly 0, where the others are what they are
    table = fg.paragraph_bits(model, text_tokenizer, TEXTS, vocab)
    assert table.bits_text.sum() / table.bytes.sum() == pytest.approx(before, rel=1e-4)
    assert (table.bits > table.bits_text).all()
    flat = Oracle([], vocab.size)                                     # all rows equally likely
    table = fg.paragraph_bits(flat, text_tokenizer, TEXTS[:1], vocab)
    n = len(text_tokenizer(TEXTS[0])['input_ids'])
    assert (table.bits[0], table.bits_text[0]) == pytest.approx((n * math.log2(vocab.size), n * math.log2(300)), rel=1e-5)


def test_a_diverged_model_is_refused(text_tokenizer):
    model = make('llama')
    with torch.no_grad(): model.lm_head.weight.fill_(math.nan)
    with pytest.raises(BadInput, match='diverged'): fg.bits_per_byte(model, text_tokenizer, TEXTS)
    with pytest.raises(BadInput, match='diverged'): fg.option_scores(model, text_tokenizer, QUESTIONS)


# Questions

def test_scores_are_mean_log_likelihoods(any_lm, text_tokenizer):
    scores = fg.option_scores(any_lm, text_tokenizer, QUESTIONS)
    for q, row in zip(QUESTIONS, scores, strict=True):
        context, *joint = ([text_tokenizer.eos_token_id, *text_tokenizer(t)['input_ids']] for t in (q.context, *(f'{q.context} {o}' for o in q.options)))
        np.testing.assert_allclose(row, [-np.mean(plain_nats(any_lm, ids)[len(context) - 1:]) for ids in joint], rtol=1e-3, atol=1e-3)
    for tokens in (1, 60): np.testing.assert_allclose(fg.option_scores(any_lm, text_tokenizer, QUESTIONS, tokens), scores, rtol=1e-3, atol=1e-3)


def test_planted_knowledge_is_found(text_tokenizer):
    questions = fg.cloze_questions()
    knows = Oracle(fg._ids(text_tokenizer, [f'{q.context} {q.options[q.answer]}' for q in questions]))
    assert fg.credits(knows, text_tokenizer, questions).tolist() == [1.] * len(questions)
    assert fg.cloze_accuracy(knows, text_tokenizer).low > .95
    swapped = [q._replace(answer=(q.answer + 1) % 4) for q in questions]   # labels that are wrong are seen
    assert fg.credits(knows, text_tokenizer, swapped).sum() == 0


def test_a_model_that_cannot_tell_is_at_chance(text_tokenizer):
    for measure, n in ((fg.cloze_accuracy, len(fg.cloze_questions())), (fg.in_context_accuracy, 150)):
        got = measure(Oracle([]), text_tokenizer)
        assert got.mean == pytest.approx(.25) and got.n == n
        centre, z = (.25 + 1.959964**2 / (2 * n)) / (1 + 1.959964**2 / n), 1.959964   # Wilson's formula
        half = z * math.sqrt(.25 * .75 / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        assert (got.low, got.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_the_order_of_the_options_does_not_matter(lm, text_tokenizer):
    turned = [q._replace(options=q.options[::-1], answer=3 - q.answer) for q in QUESTIONS]
    assert fg.credits(lm, text_tokenizer, turned).tolist() == fg.credits(lm, text_tokenizer, QUESTIONS).tolist()
    totals = sum(fg.credits(lm, text_tokenizer, [q._replace(answer=a) for q in QUESTIONS]) for a in range(4))
    assert totals.tolist() == pytest.approx([1.] * len(QUESTIONS))


def test_facts_are_many_and_fair():
    questions = fg.cloze_questions()
    assert len(questions) == len({q.context for q in questions}) > 100
    answers = {q.context: q.options[q.answer] for q in questions}
    assert answers['The capital of France is'] == 'Paris' and answers['The number of legs on a spider is'] == 'eight' and answers['A young sheep is called a'] == 'lamb'
    assert max(np.bincount([q.answer for q in questions])) < .4 * len(questions)   # the right one has no place of its own


def test_in_context_questions_have_the_answer_that_their_context_asks_for():
    def solve(task, context):
        words, lines = context.split(), [line.split(' =>') for line in context.splitlines()]
        seen, query = {key: value.strip() for key, value in lines[:-1]}, lines[-1][0]
        pairs = dict(fg._OPPOSITES)
        return {'last word': lambda: query.split()[-1], 'alternation': lambda: words[1], 'upper case': lambda: query.upper(), 'antonym': lambda: pairs[query], 'recall': lambda: seen[query]}[task]()
    questions = fg.in_context_questions(25, seed=3)
    assert [solve(q.task, q.context) for q in questions] == [q.options[q.answer] for q in questions]
    assert {len(set(q.options)) for q in questions} == {4} and len(questions) == 25 * len(fg.TASKS)
    assert all(q.context.count('=>') == fg.SHOTS + 1 for q in questions if q.task != 'alternation')


# Completions

def test_greedy_is_what_generate_gives(any_lm, text_tokenizer):
    eos = text_tokenizer.eos_token_id
    for text, mine in zip(TEXTS, fg.complete(any_lm, text_tokenizer, TEXTS, 8), strict=True):   # prompts of several lengths in one batch
        ids = torch.tensor([[eos, *text_tokenizer(text)['input_ids']]])
        y = any_lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=eos)[0, ids.shape[1]:].tolist()
        want = text_tokenizer.decode(y[:y.index(eos)]) + ' ⟨end⟩' if eos in y else text_tokenizer.decode(y)
        assert mine == want


def test_a_sample_is_named_by_its_seed_and_prompt(lm, text_tokenizer):
    state = torch.random.get_rng_state()
    a, b = (fg.complete(lm, text_tokenizer, TEXTS, 8, seed, 1.) for seed in (0, 1))
    assert a == fg.complete(lm, text_tokenizer, TEXTS, 8, 0, 1.) != b
    assert fg.complete(lm, text_tokenizer, TEXTS[1:3], 8, 0, 1.) == a[1:3]
    assert torch.equal(state, torch.random.get_rng_state())


def test_noise_samples_from_the_softmax():
    scores, n = torch.tensor([[2., 1., 0.]]), 4000
    sampler = fg._Noise(2., [torch.Generator().manual_seed(0)])
    drawn = np.bincount([int(sampler(None, scores).argmax()) for _ in range(n)], minlength=3) / n
    np.testing.assert_allclose(drawn, F.softmax(scores[0] / 2, 0), atol=.03)


def test_image_tokens_are_shown_and_the_document_ends(text_tokenizer):
    vocab, start = Vocab(300, 16), text_tokenizer.eos_token_id
    answer = [vocab.special('</text>'), vocab.special('<image>'), vocab.image, vocab.image + 9, *text_tokenizer(' red')['input_ids'], vocab.special('</doc>'), 5, 5, 5]
    model = widen(make('llama'), vocab)
    wanted = [start, *text_tokenizer('two')['input_ids'], *answer]
    plan = dict(zip(range(len(wanted) - 1), wanted[1:], strict=True))
    forward = model.forward
    def planned(input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        out, at = forward(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs), int(position_ids[0, -1])
        out.logits = torch.zeros(*out.logits.shape); out.logits[:, -1, plan[at]] = 9.
        return out
    model.forward = planned
    assert fg.complete(model, text_tokenizer, ['two'], 10, vocab=vocab) == [' ⟨/text⟩ ⟨image⟩ ⟨image code × 2⟩ red ⟨end⟩']


def test_what_cannot_be_completed_is_refused(lm, text_tokenizer):
    for words, args in {'prompts is empty': ([],), "prompt ' ' is empty": (['a', ' '],), 'has 256 positions': (['fish ' * 300],), '300 more are asked for': (['fish'], 300),
                        'n_tokens=0': (['a'], 0), 'temperature=-1': (['a'], 4, 0, -1)}.items():
        with pytest.raises(BadInput, match=words): fg.complete(lm, text_tokenizer, *args)
    for words, texts in {'paragraph 0 is missing': [], 'paragraph 1 is empty': ['a', '  ']}.items():
        with pytest.raises(BadInput, match=words): fg.bits_per_byte(lm, text_tokenizer, texts)
    with pytest.raises(BadInput, match='no questions'): fg.credits(lm, text_tokenizer, [])
    with pytest.raises(BadInput, match='empty option'): fg.credits(lm, text_tokenizer, [fg.Question('x', 'the fish is', ('red', ''), 0)])
    with pytest.raises(BadInput, match='256 positions'): fg.credits(lm, text_tokenizer, [fg.Question('x', 'fish ' * 300, ('red', 'blue'), 0)])
    with pytest.raises(BadInput, match='n=0'): fg.in_context_questions(0)


def test_a_model_stays_in_its_mode(lm, text_tokenizer):
    lm.train()
    try:
        fg.measure(lm, text_tokenizer, TEXTS, 1, fg.PROMPTS[:1], 2)
        assert lm.training
    finally: lm.eval()


# What is kept

@pytest.fixture
def weights(tmp_path, text_tokenizer):
    for name, scale in (('one', 1.), ('two', 1.1)):
        model = make('llama')
        with torch.no_grad(): model.lm_head.weight.mul_(scale)
        model.save_pretrained(tmp_path/name)
    return tmp_path


def test_a_measurement_is_kept_by_weights_and_questions(weights, text_tokenizer, monkeypatch):
    ask = lambda name='one', texts=TEXTS, **what: fg.measured(str(weights/name), text_tokenizer, texts, weights/'kept', **({'n_tasks': 1, 'prompts': fg.PROMPTS[:2], 'n_tokens': 3} | what))
    first = ask()
    assert first == json.loads(json.dumps(fg.measure(load_lm(str(weights/'one')), text_tokenizer, TEXTS, 1, fg.PROMPTS[:2], 3)))
    other = [ask('two'), ask(texts=TEXTS[:2]), ask(seed=1), ask(prompts=())]
    assert all(first != o for o in other) and len(list((weights/'kept').iterdir())) == 5
    def forbidden(*_): raise AssertionError('the model was loaded again')
    monkeypatch.setattr(fg, 'load_lm', forbidden)
    assert ask() == first


@pytest.mark.fault('a stored measurement of forgetting is damaged', 'it is made again')
def test_a_damaged_measurement_is_made_again(weights, text_tokenizer):
    ask = lambda: fg.measured(str(weights/'one'), text_tokenizer, TEXTS, weights/'kept', n_tasks=1, prompts=())
    first, (file,) = ask(), (weights/'kept').iterdir()
    for damage in ('', file.read_text()[:-20], file.read_text().replace('"bits": [', '"bits": [9')):
        file.write_text(damage)
        assert ask() == first


def test_weights_that_cannot_be_measured_are_refused(weights, text_tokenizer):
    with pytest.raises(BadInput, match="Did you mean 'bundled'"): fg.measured('bundle', text_tokenizer, TEXTS, weights)
    with pytest.raises(BadInput, match='300 rows but the vocabulary has 323'): fg.measured(str(weights/'one'), text_tokenizer, TEXTS, weights, Vocab(300, 16))


# Intervals and verdicts

def test_the_interval_of_bits_per_byte_covers():
    rng = np.random.default_rng(0)
    def covered():
        size = rng.integers(20, 300, 60)
        i = fg.ratio(size * 1.5 + rng.normal(0, .4, 60) * size, size)
        return i.low < 1.5 < i.high
    assert sum(covered() for _ in range(60)) >= 50
    assert math.isnan(fg.ratio([3.], [2]).low)


def test_a_mean_over_seeds_is_taken_before_the_interval_over_items():
    a, b = (dict(bits=bits, bits_text=bits, bytes=[10, 10, 10], cloze=cloze) for bits, cloze in (([10., 20, 30], [1, 0, 0, 0]), ([30., 20, 10], [0, 1, 0, 0])))
    table = fg.summarise([a, b])
    assert table['bits_per_byte'].mean == 2 and table['bits_per_byte'].low == table['bits_per_byte'].high == 2
    assert table['cloze'].mean == .25 and table['cloze'].n == 4 and 'in_context' not in table


def test_only_what_was_known_can_be_gone():
    knows, guesses, half = np.ones(120), np.resize([1, 0, 0, 0], 120), np.resize([1, 0], 120)
    verdict = lambda before, after: fg.at_chance('gone', '', before, after).verdict
    assert [verdict(*p) for p in ((knows, guesses), (knows, half), (knows, 1 - knows), (guesses, guesses), (half[:20], guesses[:20]))] == [HOLDS, FAILS, HOLDS, UNSURE, UNSURE]
    assert 'cannot be asked' in fg.at_chance('gone', '', guesses, guesses).ours
    with pytest.raises(BadInput, match='same ones'): fg.at_chance('gone', '', knows, guesses[:50])
    questions = [fg.Question(t, '', (), 0) for t in 'ab' for _ in range(20)]
    assert fg.solved([1] * 20 + [1, 0, 0, 0] * 5, questions).tolist() == [True] * 20 + [False] * 20


def test_above_judges_its_margin():
    assert [fg.above('', '', v, .5).verdict for v in ([.8, .9, .85], [.1, .1, .2], [.4, .9, .6], [.9])] == [HOLDS, FAILS, UNSURE, UNSURE]
