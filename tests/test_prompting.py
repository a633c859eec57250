"What a model writes behind a prompt keeps the grammar of a page, fills holes exactly, and depends on the prompt and the seed alone."
import itertools
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import regex
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from t2ianalysis import prompting
from t2ianalysis.data import BadInput
from t2ianalysis.generation import Sampling, load_painter, sample_images
from t2ianalysis.masking import draw_spans, mask, rng_of, unmask
from t2ianalysis.models import widen
from t2ianalysis.pages import page_html, page_ids
from t2ianalysis.prompting import (
    CAUSAL_CAPTIONS,
    CODES,
    MASKED_CAPTIONS,
    UNCONDITIONAL,
    Grammar,
    Prompt,
    best_images,
    caption_loglikelihood,
    captions,
    clip_scorer,
    complete,
    draw_images,
    fill,
    image_prompt,
    infill,
    infill_prompt,
    loglikelihood,
    read_prompt,
)
from t2ianalysis.sequences import Vocab, collate
from t2ianalysis.training import make_config, token_losses

# Tokens that a model of random weights makes pages of: markup in pieces of every kind, some of which hold more than their place allows
WORDS = ['a', ' cat', ' dog', 'The', 'Photo: A photo taken of', '"', '">', '"></p>', '<img', '<img src="', ' src="', '" src="', ' alt="', ' title="', '" title="', '<p>', '</p>', '<', 'im', 'g', 's', 'rc="', ' ', '=', ' src', '>',
         'src="', '<a title="', '</a>', ' src=""', ' src="a', '<end>', '<mask:0>', '<doc>', '</', 'doc>', "'", 'IMG', 'é']
K, GRID, CONTEXT = 8, (2, 3), 96


@pytest.fixture(scope='module')
def tokenizer():
    words = ['<|endoftext|>', *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='é'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('|'.join(map(re.escape, sorted(WORDS, key=len, reverse=True)))), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|endoftext|>')


@pytest.fixture(scope='module')
def vocab(tokenizer): return Vocab(len(tokenizer) + 3, K, masks=4)  # rows that no token has


@pytest.fixture(scope='module')
def grammar(vocab, tokenizer): return Grammar(vocab, tokenizer, GRID)


def lm(vocab, seed=0, family='llama', width=32, spread=.5):
    "A language model of random weights, each token of which is likely somewhere."
    common = dict(vocab_size=vocab.text, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CONTEXT, initializer_range=spread)
    config = {'llama': lambda: LlamaConfig(**common, intermediate_size=2 * width, tie_word_embeddings=True), 'gpt_neox': lambda: GPTNeoXConfig(**common, intermediate_size=2 * width),
              'gpt2': lambda: GPT2Config(vocab_size=vocab.text, n_embd=width, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=spread)}[family]()
    torch.manual_seed(seed)
    return widen(AutoModelForCausalLM.from_config(config), vocab).eval()


@pytest.fixture(scope='module')
def model(vocab): return lm(vocab)


ATTRIBUTE = r' (?!src[ =>])[a-z][a-z0-9_:-]*(?:="[^"<>]*")?'
IMAGE = regex.compile(rf'<img(?:{ATTRIBUTE})* src="\d+(?: \d+){{{GRID[0] * GRID[1] - 1}}}"(?:{ATTRIBUTE})*>')


def faults(html, whole=False):
    "What is wrong with a page, or with the beginning of one, and how many images it has; by a regular expression, not by the grammar's letters."
    html = re.sub('</?doc>', '', html)
    images = re.findall(r'<img\b[^>]*(?:>|$)', html)
    found = [image for image in images if not IMAGE.fullmatch(image, partial=not whole and html.endswith(image))]
    found += re.findall(r'<(?:mask|end|/?doc).?', html) + re.findall(r'\d+', re.sub(r'<img\b[^>]*(?:>|$)', '', html))
    return found, len(images)


def codes_of(ids, vocab): return [sum(1 for _ in run) for code, run in itertools.groupby(ids, lambda i: vocab.image <= i < vocab.mask) if code]


# The grammar

STARTS = ['<img', '<img src="', '<p>', 'a', '<img alt="The cat" src="1 2 3', '<img alt="a', '<p>a</p><img src="1 2 3 4 5 6', '<img src="0 0 0 0 0 0" title="', '<doc><p>', '<img s', '<a title="']


def test_whatever_the_model_the_grammar_holds(vocab, tokenizer, grammar):
    "330 texts of three models: each run of codes is a whole src of an <img>, and nothing is written that no page has."
    rows, images, closed, kinds = 0, 0, 0, set()
    for seed in range(3):
        model, rng = lm(vocab, seed), rng_of('starts', seed)
        prompts = [STARTS[i] + (' cat' if rng.random() < .5 and not STARTS[i][-1].isdigit() and STARTS[i][-2:] not in ('="', ' s') else '') for i in rng.integers(len(STARTS), size=110)]
        out = prompting._written(model, [read_prompt(grammar, p) for p in prompts], Sampling(temperature=1.5, seed=seed), batch=55)
        for row in out:
            ids = [*row.prompt.ids, *row.new]
            found, n = faults(page_html(vocab, tokenizer, ids))
            assert not found and set(codes_of(ids, vocab)) <= {6}, (page_html(vocab, tokenizer, ids), found)
            assert len(ids) == CONTEXT or row.over == vocab.special('</doc>') and row.place.state == ''
            assert not {i for i in row.new if i >= vocab.mask or vocab.text <= i < vocab.image or i == 0 or len(tokenizer) <= i < vocab.text}
            rows, images, closed = rows + 1, images + n, closed + (row.over is not None)
            kinds |= set(row.new)
    assert rows == 330 and images > 300 and closed > 25
    assert set(range(vocab.image, vocab.mask)) <= kinds and len(kinds & set(range(vocab.text))) > 25


def test_tokens_that_break_a_page_are_refused_however_likely(vocab, grammar):
    class Eager(torch.nn.Module):
        "Wants a sentinel, padding, the text tokenizer's own end, or a code where there is none."
        config, device = LlamaConfig(max_position_embeddings=CONTEXT), torch.device('cpu')
        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=1):
            logits = torch.randn(*input_ids.shape, vocab.size, generator=torch.Generator().manual_seed(int(input_ids.sum()) + input_ids.shape[1]))
            logits[..., [0, *range(vocab.text - 3, vocab.image), *range(vocab.mask, vocab.size)]] += 50
            logits[..., vocab.image:vocab.mask] += 25
            return type('Out', (), dict(logits=logits[:, -1:]))
    out = complete(Eager(), grammar, ['<p>', '<img'] * 5, cache=False)
    assert not any(faults(p + text)[0] for p, text in zip(['<p>', '<img'] * 5, out))


def test_codes_come_after_any_token_that_ends_in_src(vocab, tokenizer, grammar):
    for piece in ('<img src="', '<img', ' src="', '" src="', 'src="', 'rc="'):
        before = {'<img src="': '', '<img': '', ' src="': '<img', '" src="': '<img alt="a', 'src="': '<img ', 'rc="': '<img s'}[piece]
        at = tokenizer(before + piece, add_special_tokens=False)['input_ids']
        place = read_prompt(grammar, before + piece).place
        assert (place.state == prompting.SRC) == piece.endswith('src="') or piece == 'rc="', (piece, at)
        may = prompting.allowed(read_prompt(grammar, before + piece), place, 50)
        assert may[vocab.image:vocab.mask].all() == (place.state == prompting.SRC) == ~may[:vocab.text].any()
    for outside in ('a src="', '<p src="', '<a title="<', '<img title=" src="'):  # none of them is the src of an <img>
        try: assert read_prompt(grammar, outside).place.state != prompting.SRC
        except BadInput: pass


def test_no_image_begins_that_does_not_fit(vocab, grammar, model):
    short = complete(model, grammar, ['<p>'] * 60, Sampling(temperature=2.), tokens=7)
    long = complete(model, grammar, ['<p>'] * 60, Sampling(temperature=2.), tokens=30)
    assert not any('<img' in t or re.search(r'src="\d', t) for t in short) and any(re.search(r'src="\d', t) for t in long)


# Holes

def pages(vocab, tokenizer, model, grammar, n=40):
    "Whole pages that a model wrote."
    out = complete(model, grammar, ['<p>'] * n, Sampling(temperature=1.5), tokens=40)
    return [page for text in out if not faults(page := '<p>' + text[:text.rfind('>') + 1], whole=True)[0] and 'src' in page]


def test_an_infill_has_exactly_the_hidden_codes(vocab, tokenizer, grammar, model):
    "Any part of an image, with and without text: what is written is what was hidden, in number, and the page is whole."
    rng = rng_of('holes', 0)
    images = torch.from_numpy(rng.integers(0, K, (90, *GRID)))
    spans = [sorted(rng.choice(7, 2, replace=False).tolist()) for _ in images]
    prompts = [infill_prompt(c, a, b, None if i % 2 else 'The cat') for i, (c, (a, b)) in enumerate(zip(images, spans))]
    rows = prompting._written(model, [read_prompt(grammar, p) for p in prompts])
    for row, image, (a, b) in zip(rows, images.flatten(1).tolist(), spans):
        assert len(row.new) == b - a and row.over == vocab.end
        page = unmask(vocab, [*row.prompt.ids, *row.new, vocab.end]).tolist()
        codes = [i - vocab.image for i in page if vocab.image <= i < vocab.mask]
        assert codes[:a] == image[:a] and codes[b:] == image[b:] and len(codes) == 6 and not faults(page_html(vocab, tokenizer, page), whole=True)[0]
    assert infill(model, grammar, prompts) == [page_html(vocab, tokenizer, unmask(vocab, [*r.prompt.ids, *r.new, vocab.end])) for r in rows]


@pytest.mark.parametrize('ends', ['document', 'span'])
def test_any_holes_of_any_page_give_a_page(vocab, tokenizer, grammar, model, ends):
    "Spans as in training, inside of images, tags and values, and over their borders; a hole over two images is refused or filled."
    whole = pages(vocab, tokenizer, model, grammar)
    assert len(whole) > 20
    done, refused = 0, 0
    for i, page in enumerate(whole):
        ids = page_ids(vocab, tokenizer, page)
        rng = rng_of('spans', i)
        masked = mask(vocab, ids, draw_spans(rng, vocab.kinds(torch.from_numpy(ids)).numpy(), int(rng.integers(1, 4)))).tolist()
        second = [n for n, t in enumerate(masked) if t == vocab.mask][1]
        try: out, = infill(model, grammar, [Prompt(grammar, masked[:second + 1])], Sampling(seed=i), ends=ends, tokens=30)
        except BadInput as e:
            assert re.search('came to no place|an image of the prompt has|does not fit|needs|shorten', str(e)), e
            refused += 1; continue
        assert not faults(out, whole=True)[0], (page_html(vocab, tokenizer, masked), out)
        done += 1
    assert done > 2 * refused and done > 15, (done, refused)


def test_holes_that_share_an_image_share_its_codes(grammar, model):
    for seed in range(10):
        page, = infill(model, grammar, ['<img src="1 <mask:0>5 <mask:1>7"><mask:0>'], Sampling(seed=seed))
        assert re.fullmatch(r'<img src="1 (\d )*5 (\d )*7">', page) and len(page.split()) == 7


def test_a_model_that_knows_a_page_fills_its_holes(vocab, tokenizer, grammar):
    "A page learned by heart with and without masks; its holes are filled with what was cut out, greedily."
    page = '<p>The cat</p><img alt="The cat" src="1 7 2 5 0 3" title="a dog"></p>'
    ids, model = page_ids(vocab, tokenizer, page), lm(vocab, 1, width=48, spread=.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    first = ids.tolist().index(vocab.image + 1)
    alt, image, both = [[first - 3, first - 1]], [[first + 1, first + 4]], [[1, 3], [first + 2, first + 6]]
    torch.manual_seed(0)
    model.train()
    batch = collate(vocab, [mask(vocab, ids, x) for x in (alt, image, both)] + [ids])
    for _ in range(90):
        optimizer.zero_grad()
        (token_losses(model, batch).sum() / batch.tokens).backward()
        optimizer.step()
    model.eval()
    for spans in (alt, image):
        masked = page_html(vocab, tokenizer, mask(vocab, ids, spans))
        prompt = masked[:masked.rindex('<mask:0>') + 8]
        assert infill(model, grammar, [prompt], Sampling(temperature=0)) == [page], prompt
        wrong = infill(lm(vocab, 5), grammar, [prompt], Sampling(temperature=0), tokens=20)
        assert wrong != [page]
    hidden = draw_images(model, grammar, ['<p>The cat</p><img'], Sampling(temperature=0))
    assert hidden[1].flatten().tolist() == [1, 7, 2, 5, 0, 3] and hidden[0] == [page[:page.index('" title')]]
    best = captions(model, grammar, torch.tensor([[1, 7, 2], [5, 0, 3]]), ['<p>The cat</p><img alt="<mask:0>" src="{image}" title="a dog"></p><mask:0>'], tokens=5)
    assert best[0].text == 'The cat' and best[0].score > -.5


def test_the_size_hint_is_the_room_that_is_left(vocab, tokenizer, grammar, model):
    for hint in (1, 5, 40):
        prompt = prompting._placed(model, read_prompt(grammar, '<a title="<mask:0>">a</a>'), Sampling(seed=hint), hint, None)
        closed = vocab.special('</doc>') in prompt.ids
        assert prompt.ids[-1] == vocab.mask and (len(prompt.ids) == CONTEXT - hint or closed and len(prompt.ids) < CONTEXT - hint)
        page, = infill(model, grammar, ['<a title="<mask:0>">a</a>'], Sampling(seed=hint), size_hint=hint)
        assert re.match('<a title="[^"<>]*">a</a>', page) and not faults(page)[0]
        assert page.endswith(page_html(vocab, tokenizer, prompt.ids[6:-1])[-20:])
    assert len(infill(model, grammar, ['<a title="<mask:0>">a</a>'], Sampling(seed=3), size_hint=5, length=30)[0]) < 200


# Caches, batches, seeds

@pytest.mark.parametrize('family', ['llama', 'gpt_neox', 'gpt2'])
def test_the_cache_changes_nothing(vocab, tokenizer, grammar, family):
    model = lm(vocab, family=family, spread=.3)
    prompts = ['<img', '<p>', '<img alt="The cat" src="1 2', '<img src="1 <mask:0>3"><mask:0>', '<img alt="<mask:0>" src="1 2 3 4 5 6"><mask:0>']
    assert complete(model, grammar, prompts, tokens=25) == complete(model, grammar, prompts, tokens=25, cache=False)
    codes = torch.arange(6).view(GRID)
    found = [captions(model, grammar, codes, beams=3, tokens=5, cache=cache) for cache in (True, False)]
    assert [(c.text, c.prompt) for c in found[0]] == [(c.text, c.prompt) for c in found[1]] and np.allclose([c.score for c in found[0]], [c.score for c in found[1]], atol=1e-4)


def test_a_text_depends_on_prompt_number_and_seed_and_not_on_the_batch(grammar, model):
    prompts = ['<p>', '<img', '<p>', '<img alt="The cat"', '<p>a cat', '<p>']
    whole = complete(model, grammar, prompts)
    assert whole == complete(model, grammar, prompts, batch=1) == complete(model, grammar, prompts, batch=4)
    assert complete(model, grammar, prompts[1:4]) == [whole[1], whole[0], whole[3]] and complete(model, grammar, ['<p>'] * 3) == [whole[0], whole[2], whole[5]]
    assert len(set(whole)) == 6 and whole != complete(model, grammar, prompts, Sampling(seed=1))
    assert [w[:9] for w in complete(model, grammar, prompts, tokens=30)] == [w[:9] for w in whole]
    one = draw_images(model, grammar, [image_prompt('cat')] * 5)[1]
    assert torch.equal(one[:2], draw_images(model, grammar, [image_prompt('cat')] * 2, batch=1)[1]) and len(one.unique(dim=0)) > 3


def test_a_text_ends_where_it_is_told(vocab, grammar, model):
    free = complete(model, grammar, ['<p>'] * 30, Sampling(temperature=1.5))
    for stop in ('cat', '>', ('">', ' dog')):
        out = complete(model, grammar, ['<p>'] * 30, Sampling(temperature=1.5), stop)
        marks = (stop,) if isinstance(stop, str) else stop
        text = lambda html: re.sub(r'\d+(?: \d+)*', '\0', html)
        for short, long in zip(out, free):
            assert long.startswith(short) and not any(m in part for m in marks for part in text(short).split('\0'))
            assert short == long or any(long[len(short):].startswith(m) for m in marks)
        assert sum(a != b for a, b in zip(out, free)) > 10
    assert complete(model, grammar, ['<p>'] * 5, tokens=3) == [t for t in complete(model, grammar, ['<p>'] * 5, tokens=3)]


# Images and captions

def test_images_of_all_prompts(vocab, tokenizer, grammar, model):
    prompts = [UNCONDITIONAL, CODES, image_prompt('a cat'), '<p>a</p><img src="1 2 3'] * 3
    html, codes = draw_images(model, grammar, prompts, tokens=8)
    assert codes.shape == (12, *GRID) and (codes >= 0).all() and (codes < K).all() and codes[3].flatten().tolist()[:3] == [1, 2, 3]
    for h, p, c in zip(html, prompts, codes): assert h.startswith(p) and h.endswith(f' src="{fill("{image}", c)}') and not faults(h + '">', whole=True)[0]
    assert html[2].startswith('<img alt="a cat"')


def test_the_best_images_are_those_of_the_best_score(grammar, model):
    codes = draw_images(model, grammar, [image_prompt('cat')] * 12)[1]
    scores = caption_loglikelihood(model, grammar, 'cat', codes)
    best, top = best_images(model, grammar, 'cat', 12, 4)
    order = np.argsort(-scores.numpy(), kind='stable')[:4]
    assert torch.equal(best, codes[order]) and torch.allclose(top, scores[order])
    assert torch.equal(best_images(model, grammar, 'cat', 12, 1, scorer=lambda text, codes: -scores)[0][0], codes[scores.argmin()])


@pytest.mark.filterwarnings('ignore')
def test_clip_puts_images_in_order(tmp_path, text_tokenizer, grammar, model):
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(text_config=small | dict(vocab_size=300, eos_token_id=0, max_position_embeddings=8), vision_config=small | dict(image_size=16, patch_size=8), projection_dim=8)).eval()
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer.backend_tokenizer, eos_token='<|endoftext|>', pad_token='<|endoftext|>', model_max_length=8)
    processor = CLIPProcessor(CLIPImageProcessor(size={'shortest_edge': 16}, crop_size={'height': 16, 'width': 16}), text_tokenizer)
    clip.save_pretrained(tmp_path/'clip'); processor.save_pretrained(tmp_path/'clip')
    colours = np.random.default_rng(0).integers(0, 256, (K, 3), dtype=np.uint8)
    decode = lambda codes: colours[codes.numpy()].repeat(8, 1).repeat(8, 2)      # (N, 16, 24, 3)
    scorer, codes = clip_scorer(str(tmp_path/'clip'), decode), torch.randint(0, K, (6, *GRID))
    got = scorer('a red fish of many words, more than the text model can read', codes)
    with torch.no_grad():
        text = text_tokenizer('a red fish of many words, more than the text model can read', return_tensors='pt', truncation=True)
        pixels = torch.cat([processor.image_processor(Image.fromarray(i), return_tensors='pt')['pixel_values'] for i in decode(codes)])
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (clip.text_projection(clip.text_model(**{k: text[k] for k in ('input_ids', 'attention_mask')}).pooler_output), clip.visual_projection(clip.vision_model(pixels).pooler_output)))
    assert torch.allclose(got, (clip.logit_scale.exp() * a @ b.T)[0].double(), atol=1e-4) and got.unique().numel() == 6
    best, scores = best_images(model, grammar, 'cat', 6, 6, scorer=scorer)
    assert torch.allclose(scores, scorer('cat', best)) and (scores.diff() <= 0).all()
    (tmp_path/'lm').mkdir(); model.save_pretrained(tmp_path/'lm'); text_tokenizer.save_pretrained(tmp_path/'lm')
    with pytest.raises(BadInput, match='is a LlamaModel, which does not compare images with texts'): clip_scorer(str(tmp_path/'lm'), decode)


@pytest.mark.parametrize('prompt', ['<img alt="The<mask:0>" src="{image}"><mask:0>', '<img src="{image}" title="The'])
def test_beams_find_what_trying_all_finds(vocab, tokenizer, grammar, model, prompt):
    "With beams for all captions of up to three tokens; and with few, no better than that."
    codes, L = torch.tensor([[1, 7, 2], [5, 0, 3]]), 4
    p = read_prompt(grammar, fill(prompt, codes))
    inside = [i for i, s in enumerate(grammar.strings) if s and not set(s) & set('"<>')]
    ends = [vocab.end] if p.masks else [i for i, s in enumerate(grammar.strings) if s in ('"', '">', '"></p>', '" title="')]
    every = [list(c) for n in range(1, L) for c in itertools.product(inside[:6], repeat=n)]
    small = Grammar(vocab, tokenizer, GRID)
    small.strings = [s if i in inside[:6] or i in ends else '' for i, s in enumerate(small.strings)]
    scored = []
    for e in ends:
        sums = loglikelihood(model, vocab, [p.ids] * len(every), [[*c, e] for c in every], batch=64)
        scored += [(float(s) / (len(c) + 1), tokenizer.decode(c)) for s, c in zip(sums, every)]
    scored.sort(reverse=True)
    found = captions(model, small, codes, [prompt], beams=len(scored), tokens=L)
    assert len(found) == len(scored) > 200 and np.allclose([c.score for c in found], [s for s, _ in scored], atol=1e-4)
    assert found[0].text == ' '.join(scored[0][1].split())
    few = captions(model, small, codes, [prompt], beams=2, tokens=L)
    assert len(few) == 2 and few[0].score <= found[0].score + 1e-6


def test_captions_of_all_prompts_are_ranked(grammar, model):
    found = captions(model, grammar, torch.arange(6).view(GRID), beams=2, tokens=5)
    assert len(found) == 12 and {c.prompt for c in found} == {*MASKED_CAPTIONS, *CAUSAL_CAPTIONS} and not any(re.search('[<>"]', c.text) for c in found)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)


def test_likelihoods_are_those_of_the_whole_text(vocab, model, grammar):
    ids = read_prompt(grammar, '<p>a cat</p><img src="1 2 3 4 5 6').ids
    with torch.no_grad(): logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    each = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    got = loglikelihood(model, vocab, [ids[:n] for n in (1, 4, 9)], [ids[n:] for n in (1, 4, 9)], batch=2)
    assert torch.allclose(got, torch.stack([each[n - 1:].sum() for n in (1, 4, 9)]), atol=1e-4)


# What was there before, under a vocabulary with sentinels

def test_images_of_captions_have_codes_only(vocab):
    model = lm(vocab)
    with torch.no_grad(): model.get_input_embeddings().weight[vocab.mask:] *= 30  # tied: sentinels are likely or very unlikely
    assert sample_images(model, vocab, [[1, 2], []] * 8, (2, 2)).max() < K


def test_a_masked_run_is_loaded(tmp_path, vq_folder, text_tokenizer):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64))
    base.save_pretrained(tmp_path/'lm'); text_tokenizer.save_pretrained(tmp_path/'lm')
    config = make_config('smoke', lm=str(tmp_path/'lm'), image_tokenizer=str(vq_folder), px=16, length=60, layout='causally-masked')
    widen(base, Vocab(300, 16, 16)).save_pretrained(tmp_path/'run'/'weights'/'00000006')
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(config=asdict(config))))
    painter = load_painter(tmp_path/'run')
    codes = draw_images(painter.model, Grammar(painter.vocab, painter.text, painter.grid), [CODES, CODES])[1]
    assert painter.vocab.masks == 16 and painter.decode(codes).shape == (2, 16, 16, 3)


# Bad input

@pytest.mark.parametrize('prompt, words', [
    ('a<mask:1>', 'the prompt has <mask:1> and no <mask:0>; number its masks from 0 on'),
    ('a<mask:0><mask:2><mask:0>', 'has <mask:2> and no <mask:1>'),
    ('a<mask:0>', 'the prompt has no second <mask:0>'),
    ('a<mask:0>b<mask:1><mask:1>', r'the masks \[0, 1, 1\] of the prompt are not balanced'),
    ('a<mask:0><mask:0><mask:0>', r'the masks \[0, 0, 0\] of the prompt are not balanced'),
    ('a<mask:0>b<mask:1><mask:0>c<mask:0>', 'not balanced'),
    (''.join(f'a<mask:{i}>' for i in range(5)), 'the prompt has <mask:4> but the vocabulary has 4 mask tokens; give fewer'),
    ('a ' * 60, r'the prompt of 120 tokens fills the context of 96; shorten it by 25'),
    ('a ' * 44 + 'a<img src="', 'the image of the prompt needs 7 more tokens and may have 6; shorten the prompt by 1'),
    ('<img src="1 2 3 4 5 6 7', 'an image of the prompt has 7 codes but the grid of 2 x 3 holds 6; leave out 1'),
    ('<img src="1 2 3 4<mask:0>5 6 7"><mask:0>', 'an image of the prompt has 7 codes but the grid of 2 x 3 holds 6; leave out 1'),
    ('<img src="1 2 3">', 'the prompt is no beginning of a page: codes stand in the src of an <img>, every <img> has one, of 6 codes'),
    ('<img alt="a"></p>', 'no beginning of a page'),
    ('<img src="1<mask:0>2"><mask:0>3 4 5 6 7', 'the span of <mask:0> does not fit into the page'),
    ('', 'the prompt is empty'),
    ('a<end>', 'the prompt ends with <end>, so nothing is left to write'),
    ('<p></doc>', 'the prompt ends with </doc>'),
])
def test_a_prompt_that_is_none_says_why(vocab, grammar, model, prompt, words):
    with pytest.raises(BadInput, match=words) as e: complete(model, grammar, [prompt])
    assert '\n' not in str(e.value) and str(e.value).endswith('.')


@pytest.mark.parametrize('call, words', [
    (lambda m, g: complete(m, g, []), 'prompts is empty'),
    (lambda m, g: complete(m, g, ['a'], tokens=0), 'tokens=0 is no number of tokens'),
    (lambda m, g: complete(m, g, ['a'], Sampling(guidance=2)), 'guidance=2 is for models of captioned images'),
    (lambda m, g: complete(m, g, ['<img src="'], tokens=3), 'needs 7 more tokens and may have 3; give more tokens'),
    (lambda m, g: infill(m, g, ['a']), 'a prompt has no mask'),
    (lambda m, g: infill(m, g, ['a<mask:0>'], size_hint=0), 'size_hint=0 is no number of tokens that the context has left; give 1 to 93'),
    (lambda m, g: infill(m, g, ['a<mask:0><mask:0>'], size_hint=5), 'size_hint is for a prompt with one mask and no second <mask:0>'),
    (lambda m, g: infill_prompt(torch.zeros(2, 3), 2, 9), 'codes 2 to 9 are no part of an image of 6'),
    (lambda m, g: draw_images(m, g, ['<p>']), "the prompt '<p>' does not end in an <img> that waits for its codes"),
    (lambda m, g: draw_images(m, g, ['<img src="1 2 3 4 5 6" title="']), 'does not end in an <img>'),
    (lambda m, g: best_images(m, g, 'a', 2, 3), 'top=3 of n=2 images'),
    (lambda m, g: captions(m, g, torch.zeros(2, 3).long(), ['<p>{image}']), 'no beginning of a page|does not end in the value'),
    (lambda m, g: captions(m, g, torch.zeros(2, 3).long(), beams=0), 'beams=0 is no number of beams'),
    (lambda m, g: captions(m, g, torch.zeros(2, 3).long(), tokens=1), 'tokens=1 holds no caption'),
    (lambda m, g: captions(m, g, torch.zeros(2, 3).long(), tokens=99), 'exceed the context of 96'),
    (lambda m, g: captions(m, g, torch.zeros(3, 3).long()), 'has 9 codes but the grid of 2 x 3 holds 6'),
    (lambda m, g: loglikelihood(m, g.vocab, [[1] * 90], [[1] * 7]), 'has 97 tokens but the context 96'),
    (lambda m, g: loglikelihood(m, g.vocab, [[1]], []), '1 prompts for 0 targets'),
    (lambda m, g: clip_scorer('/nowhere/clip', None), "clip='/nowhere/clip' could not be loaded"),
    (lambda m, g: read_prompt(Grammar(Vocab(g.vocab.text, K), g.tokenizer, GRID), 'a<mask:0>'), 'has <mask:0> but the vocabulary has 0 mask tokens'),
    (lambda m, g: Grammar(g.vocab, g.tokenizer, (2, 0)), r'grid=\(2, 0\) is no rectangle'),
    (lambda m, g: Prompt(g, []), 'the prompt is empty'),
])
def test_arguments_are_checked(grammar, model, call, words):
    with pytest.raises(BadInput, match=words) as e: call(model, grammar)
    assert '\n' not in str(e.value)
