"Which page a link means: counts by hand, tries by brute force, scores by a plain forward, and a model that has to look behind the link."
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, XGLMConfig, XGLMForCausalLM

from t2ianalysis.data import BadInput
from t2ianalysis.entities import (
    PROMPTS,
    Mention,
    Titles,
    Trie,
    all_mentions,
    best,
    f1,
    generate_titles,
    hits,
    loglikelihoods,
    mention_at,
    mention_prompt,
    mentions_of,
    precision_recall,
    recall,
    score_candidates,
    title_ids,
)
from t2ianalysis.masking import mask, unmask
from t2ianalysis.minimal_html import load_pages, minimal_html
from t2ianalysis.models import load_text_tokenizer
from t2ianalysis.pages import page_html, page_ids, read_corpus
from t2ianalysis.sequences import Kind, Vocab, collate
from t2ianalysis.statistics import bootstrap
from t2ianalysis.training import token_losses

TOKENIZER = load_text_tokenizer('bundled')
V = Vocab(len(TOKENIZER), 16, masks=16)
SMALL = dict(vocab_size=V.size, max_position_embeddings=128)
ids_of = lambda html, vocab=V: page_ids(vocab, TOKENIZER, html).tolist()
linked = lambda page, title, anchor='words': Mention(page, '', 0, 0, anchor, title)


def lm(family='llama', seed=0):
    torch.manual_seed(seed)
    if family == 'llama': return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3, **SMALL))
    if family == 'xglm': return XGLMForCausalLM(XGLMConfig(d_model=32, ffn_dim=64, num_layers=2, attention_heads=2, init_std=.3, **SMALL))
    return GPT2LMHeadModel(GPT2Config(vocab_size=V.size, n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=.3))


families = pytest.mark.parametrize('family', ['llama', 'xglm', 'gpt2'])


# Mentions and candidates

def test_links_are_found_as_minimal_html_writes_them():
    page = minimal_html('<p>See <a title="A &quot;b&quot; &lt;c&gt;" href="x.html"><i>the</i>  one</a>, <a href="y.html">no title</a>, <a title="empty" href="z"><img src="f.png"></a>'
                        ' and <a href="n" title="next chapter">Next</a> <a title=" two\nlines ">it</a></p>')
    assert [(m.anchor, m.title) for m in mentions_of(page)] == [('the one', 'A "b" <c>'), ('it', 'two lines')]
    assert [m.title for m in mentions_of(page, leave_out=())][1] == 'next chapter'
    assert all(m.html[m.start:m.stop].startswith('<a ') and m.html[m.start:m.stop].endswith(f'>{m.inner}</a>') for m in mentions_of(page))


def test_words_that_are_no_link_can_be_asked_about():
    m = mention_at('<img alt="AT&amp;T tower"><p>Ask AT&amp;T.</p>', 'AT&T')
    assert m.html[:m.start].endswith('<p>Ask ') and m.html[m.stop:] == '.</p>' and m.anchor == 'AT&T' and m.title is None


def test_the_alias_table_orders_by_count_and_the_rest_by_rare_words():
    train = [linked('p', t, a) for t, a, n in [('Paths', 'PATH', 3), ('Path tool', 'path', 1), ('Path tool', 'tool', 2), ('The menu', 'menu', 5), ('The tool', 'the tool', 1)] for _ in range(n)]
    titles = Titles(train)
    assert titles.aliases('Path') == ['Paths', 'Path tool'] and titles.aliases('nothing') == []
    assert titles.similar('the Path') == ['Path tool', 'The tool', 'The menu']      # "path" is rarer than "the", and "menu", which is not shared, rarer than "tool"
    assert titles.candidates('path', 3) == ['Paths', 'Path tool', 'The menu'] and titles.candidates('zzz', 2) == ['The menu', 'Path tool']
    assert len(titles.candidates('path', 99)) == len(titles) == 4 and len(set(titles.candidates('the tool', 4))) == 4


def test_candidates_know_nothing_of_the_test_pages():
    corpus = read_corpus('gimp-help-sample')
    train, test = (all_mentions(load_pages(corpus.folder/f'{side}.jsonl')) for side in ('train', 'test'))
    titles, known = Titles(train), {m.title for m in train}
    unseen = [m for m in test if m.title not in known]
    assert unseen and set(titles.counts) == known and not {m.page for m in train} & {m.page for m in test}
    assert all(set(titles.candidates(m.anchor, 20)) <= known for m in test) and not any(m.title in titles for m in unseen)
    said = recall(test, titles, 20)
    assert said['in KB'] == len(test) - len(unseen) and said['right title in the alias table'] <= said['right title among 20 candidates'] <= 1


# Prompts

PAGE = '<html><body><p>Kings ruled from <a title="Memphis, Egypt">Memphis</a>, by the Nile.</p></body></html>'


@pytest.mark.parametrize('prompt', PROMPTS)
def test_prompt_and_title_are_what_masking_makes_of_the_page(prompt):
    whole, m = ids_of(f'<doc>{PAGE}</doc>'), mentions_of(PAGE)[0]
    start = len(ids_of('<doc><html><body><p>Kings ruled from <a title="'))
    target = title_ids(V, TOKENIZER, m.title, prompt)
    made = mention_prompt(V, TOKENIZER, m, 128, len(target), prompt) + target
    span = start, start + len(ids_of('Memphis, Egypt'))
    if prompt == 'causal': assert made == whole[:len(made)] and page_html(V, TOKENIZER, made).endswith('<a title="Memphis, Egypt">')
    elif prompt == 'masked': assert made == mask(V, whole, [span]).tolist() and unmask(V, made).tolist() == whole
    else: assert made == mask(V, ids_of(f'<doc>{PAGE[:PAGE.index(", by")]}'), [span]).tolist()


@pytest.mark.parametrize('prompt', PROMPTS)
def test_the_markup_holds_no_answer(prompt):
    page = '<p>Of <a href="SECRET.html" title="SECRET">it</a> we say <a href="SECRET.html" title="SECRET">more</a> here and <a href="SECRET.html" title="SECRET"><b>there</b></a>.</p>'
    html = page_html(V, TOKENIZER, mention_prompt(V, TOKENIZER, mentions_of(page)[1], 128, 9, prompt))
    assert 'SECRET' not in html and html.startswith('<doc><p>Of it we say <a title="') and ('here and <b>there</b>.</p></doc>' in html) == (prompt == 'masked')


def test_a_long_page_is_cut_around_the_link_and_never_inside_an_image():
    image = '<img alt="x" src="' + ' '.join(['7'] * 9) + '">'
    page = ''.join(f'<p>word{i} {image}</p>' for i in range(12)) + 'near <a href="q" title="T">this</a> too' + ''.join(f'<p>word{i} {image}</p>' for i in range(12))
    m = mentions_of(page)[0]
    whole = mention_prompt(V, TOKENIZER, m, 10**6, 4)
    for length, prompt in itertools.product(range(24, 800, 7), PROMPTS):
        ids = mention_prompt(V, TOKENIZER, m, length, 4, prompt)
        kinds = V.kinds(torch.tensor(ids))
        runs = [len(list(g)) for image, g in itertools.groupby((kinds == Kind.IMAGE).tolist()) if image]
        assert length - 4 - 20 < len(ids) <= length - 4 or len(ids) >= len(whole) - 5 or prompt != 'masked'
        assert len(ids) <= length - 4 and set(runs) <= {9} and page_html(V, TOKENIZER, ids).count('<a title="') == 1
    assert page_html(V, TOKENIZER, mention_prompt(V, TOKENIZER, m, 40, 4)).count('near ') == 1


def test_what_lies_far_away_changes_nothing():
    near = '<p>So near <a title="T">this</a> too</p>'
    a, b = (mention_prompt(V, TOKENIZER, mentions_of(far + near + far)[0], 60, 4) for far in ('<p>one two three</p>' * 300, '<p>four</p>' * 400 + '<p>one two three</p>' * 300 + '<p>four</p>' * 400))
    assert len(a) == 56
    assert a[8:40] == mention_prompt(V, TOKENIZER, mentions_of('<p>one two three</p>' * 20 + near + '<p>one two three</p>' * 20)[0], 60, 4)[8:40] and len(b) == 56


# Scores

def by_hand(model, prompt, target):
    "log p of a continuation by one plain forward, in float64."
    with torch.no_grad(): logp = model.eval()(input_ids=torch.tensor([prompt + target]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(target))


@families
def test_scores_with_and_without_the_cache_are_those_of_a_plain_forward(family):
    model, rng = lm(family), np.random.default_rng(0)
    prompt, targets = rng.integers(0, V.size, 30).tolist(), [rng.integers(0, V.size, n).tolist() for n in (3, 1, 12, 7, 1, 5)]
    wanted = [by_hand(model, prompt, t) for t in targets]
    model.train()
    for options in (dict(), dict(cache=False), dict(batch=2), dict(batch=1), dict(cache=False, batch=4)):
        np.testing.assert_allclose(loglikelihoods(model, prompt, targets, **options), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(loglikelihoods(model, prompt, [targets[1]]), wanted[1:2], rtol=1e-4, atol=1e-3)
    assert model.training and max(wanted) - min(wanted) > 1


def test_sum_and_mean_rank_differently_and_ties_go_to_the_first():
    table = pd.DataFrame(dict(mention=[0, 0, 1, 1], candidate=['short', 'long', 'a', 'b'], logp=[-4., -6., -3., -3.], tokens=[2, 6, 3, 3]))
    assert best(table) == ['short', 'a'] and best(table, 'mean') == ['long', 'a']


# InKB micro-F1

@pytest.mark.parametrize('gold, predicted, p, r, f', [
    ('xyzx', 'xyzx', 1, 1, 1), ('xyzx', 'xyyy', 1/2, 1/2, 1/2), ('xyzx', ['x', None, None, None], 1, 1/4, 2/5), ('xyzx', [None] * 4, math.nan, 0, 0),
    ('xyNN', 'xxNx', 1/2, 1/2, 1/2),       # what means no title of the KB is left out, whatever is predicted
    ('xyzx', 'xyNN', 1, 1/2, 2/3),         # a prediction outside the KB is none
])
def test_f1_by_hand(gold, predicted, p, r, f):
    counts = hits([linked(page, t) for page, t in zip('aabb', gold, strict=True)], predicted, {'x', 'y', 'z'})
    np.testing.assert_allclose(list(precision_recall(counts).values()), [p, r, f])
    assert 0 <= f1(counts.sum(0)) <= 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from('xyzN'), st.sampled_from(['x', 'y', 'z', 'N', None])), min_size=1, max_size=30).filter(lambda rows: any(t != 'N' for _, t, _ in rows)))
def test_f1_is_that_of_the_sets(rows):
    counts = hits([linked(page, t) for page, t, _ in rows], [p for *_, p in rows], set('xyz'))
    gold = {(i, t) for i, (_, t, _) in enumerate(rows) if t != 'N'}
    said = {(i, p) for i, (_, t, p) in enumerate(rows) if t != 'N' and p not in (None, 'N')}
    assert f1(counts.sum(0)) == pytest.approx(2 * len(gold & said) / (len(gold) + len(said)))
    assert len(counts) == len({page for page, t, _ in rows if t != 'N'})


def test_the_interval_is_over_pages():
    alike = [linked(str(page), 'x') for page in range(20) for _ in range(50)]
    i = bootstrap(hits(alike, ['x' if int(m.page) % 2 else 'y' for m in alike], {'x', 'y'}), f1)
    assert i.n == 20 and i.low < .35 and i.high > .65                               # a thousand links, but twenty pages


# Limited generation

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=12)


@settings(max_examples=400, deadline=None)
@given(rows=sequences, prefix=st.lists(st.integers(0, 3), max_size=5))
def test_the_trie_allows_what_brute_force_allows(rows, prefix):
    n, trie = len(prefix), Trie(rows)
    assert trie.after(prefix) == sorted({row[n] for row in rows if row[:n] == prefix and len(row) > n})


TITLES = ['Memphis', 'Memphis, Egypt', 'Memphis, Tennessee', 'Elvis', 'The Nile', 'Egypt', 'The King & I', '"Nile"', '2.1. Kings']


@families
@pytest.mark.parametrize('prompt', ['masked', 'causal'])
def test_a_wide_beam_finds_what_scoring_all_finds(family, prompt):
    model, m = lm(family), mentions_of(PAGE)[0]
    found = generate_titles(model, V, TOKENIZER, m, TITLES, beams=99, prompt=prompt)
    table = score_candidates(model, V, TOKENIZER, [m], [TITLES], prompt).sort_values('logp', ascending=False)
    assert list(found.index) == table.candidate.tolist()
    np.testing.assert_allclose(found, table.logp, rtol=1e-4, atol=1e-3)


def test_greedy_goes_step_by_step_and_a_narrow_beam_gives_titles_alone():
    model, m = lm(), mentions_of(PAGE)[0]
    rows = {tuple(title_ids(V, TOKENIZER, t)): t for t in TITLES}
    asked, row, trie = mention_prompt(V, TOKENIZER, m, 128, max(map(len, rows))), [], Trie(rows)
    while tuple(row) not in rows:
        with torch.no_grad(): logits = model.eval()(input_ids=torch.tensor([asked + row])).logits[0, -1]
        row.append(max(trie.after(row), key=lambda token: logits[token]))
    assert generate_titles(model, V, TOKENIZER, m, TITLES, beams=1).index.tolist() == [rows[tuple(row)]]
    generate = model.generate
    model.generate = lambda *a, **k: generate(*a, **k) if k['num_beams'] == 1 or k['length_penalty'] == 0 else pytest.fail('long titles are favoured')
    for beams in (2, 3, 5):
        found = generate_titles(model, V, TOKENIZER, m, TITLES, beams)
        assert 1 <= len(found) <= beams and set(found.index) <= set(TITLES) and found.is_monotonic_decreasing


# A model that has to look behind the link

PLACES = {'Memphis, Egypt': 'by the Nile', 'Memphis, Tennessee': 'with Elvis'}
FIRST, LAST = ('We', 'They', 'Kings', 'Birds', 'Some', 'Others'), ('today', 'in May', 'again', 'at last', 'for long', 'by night')
page_of = lambda first, title, last: f'<p>{first} came to <a title="{title}">Memphis</a> {PLACES[title]} {last}</p>'


@pytest.fixture(scope='module')
def trained():
    "A tiny model of masked pages, but for those whose first and last words are held out together, and the pages held out."
    pairs = [(f, e) for f in FIRST for e in LAST]
    held = pairs[::5]
    documents = []
    for first, last in (p for p in pairs if p not in held):
        for title in PLACES:
            ids, start = ids_of(f'<doc>{page_of(first, title, last)}</doc>'), len(ids_of(f'<doc><p>{first} came to <a title="'))
            documents.append(mask(V, ids, [(start, start + len(ids_of(title)))]))
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **SMALL))
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=4e-3), np.random.default_rng(0)
    for _ in range(120):
        batch = collate(V, [documents[i] for i in rng.integers(0, len(documents), 16)])
        (token_losses(model, batch).sum() / batch.tokens).backward()
        optimizer.step(); optimizer.zero_grad()
    return model, [mentions_of(page_of(first, title, last), f'{first} {last}')[0] for first, last in held for title in PLACES]


def test_a_trained_model_ranks_the_right_title_first_where_both_sides_are_seen(trained):
    model, mentions = trained
    titles = Titles([linked('train', t, a) for t, a in [*((t, 'Memphis') for t in PLACES), ('The Nile', 'Nile'), ('Elvis', 'Elvis')]])
    f = {}
    for prompt in PROMPTS:
        table = score_candidates(model, V, TOKENIZER, mentions, [titles.candidates(m.anchor, 4) for m in mentions], prompt)
        f[prompt] = precision_recall(hits(mentions, best(table), titles))['F1']
    assert f['masked'] == 1 and max(f['anchor'], f['causal']) <= .5                # up to the link, pages of either title are equal
    assert [generate_titles(model, V, TOKENIZER, m, titles.counts, beams=4).index[0] for m in mentions] == [m.title for m in mentions]


# Mistakes, one sentence each

def test_mistakes_are_one_sentence():
    model, m, plain = lm(), mentions_of(PAGE)[0], Vocab(V.text, V.codes)
    long = ['word ' * 200]
    for call, words in [
        (lambda: all_mentions([]), 'no page has a link'), (lambda: Titles([]), 'there are no mentions'), (lambda: Titles([linked('p', 'x')]).candidates('x', 0), 'k=0'),
        (lambda: mention_at(PAGE, 'Thebes'), "anchor='Thebes' does not stand"), (lambda: mention_at(PAGE, ' '), 'does not stand'), (lambda: mention_at(PAGE, 'title'), 'does not stand'),
        (lambda: score_candidates(model, V, TOKENIZER, [m], [[]]), "candidates of 'Memphis' are empty"), (lambda: generate_titles(model, V, TOKENIZER, m, []), "candidates of 'Memphis' are empty"),
        (lambda: score_candidates(model, V, TOKENIZER, [m], [long]), 'exceed the context of 128'), (lambda: generate_titles(model, V, TOKENIZER, m, long), 'exceed the context of 128'),
        (lambda: loglikelihoods(model, [1] * 120, [[1] * 9]), 'have 129 tokens and the model 128'), (lambda: loglikelihoods(model, [1], [[]]), 'candidates are empty'),
        (lambda: generate_titles(model, V, TOKENIZER, m, TITLES, beams=0), 'beams=0'), (lambda: title_ids(V, TOKENIZER, 'x', 'masks'), "prompt='masks' is unknown.*'masked'"),
        (lambda: title_ids(plain, TOKENIZER, 'x'), 'needs a mask'), (lambda: hits([m], ['x'], {'x'}), 'no mention means a title'),
    ]:
        with pytest.raises(BadInput, match=words) as e: call()
        assert str(e.value).endswith(('.', '?')) and '\n' not in str(e.value)
    assert title_ids(plain, TOKENIZER, 'x', 'causal')                              # a model without masks can be asked left to right
