"lm-eval computes what we compute, a widened model has two named numbers, FID goes on where it stopped, and two protocols never meet."
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import LlamaConfig, LlamaForCausalLM

from t2ianalysis import evaluation as ev
from t2ianalysis.data import BadInput, load_captions
from t2ianalysis.forgetting import Question, credits, token_nats
from t2ianalysis.generation import Backbone, Sampling, frechet, image_features, load_painter, rerank
from t2ianalysis.models import load_lm, load_text_tokenizer, widen
from t2ianalysis.sequences import Vocab
from t2ianalysis.training import ensure_runs, make_config

QUESTIONS = [Question('colour', f'the {thing} is', ('red', 'blue', 'as green as grass', 'grey'), i % 4) for i, thing in enumerate(['fish', 'house', 'old door', 'boat', 'tree', 'sea'])]


def random_lm(tokenizer):
    "A random model whose likelihoods are far from even"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128, initializer_range=.2)
    return LlamaForCausalLM(config).eval()


def nats(model, ids, first):
    "Sum of the log-likelihoods from position `first` on, by the definition"
    with torch.no_grad(): p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(p[i - 1, ids[i]]) for i in range(first, len(ids)))


def option_nats(model, tokenizer, question, start):
    ids = lambda text: [tokenizer.eos_token_id] * start + tokenizer(text, add_special_tokens=False)['input_ids']
    return [nats(model, ids(f'{question.context} {o}'), len(ids(question.context))) for o in question.options]


@pytest.mark.parametrize('start', [False, True])
def test_lm_eval_gives_the_likelihoods_of_the_definition(text_tokenizer, start):
    model = random_lm(text_tokenizer)
    rows = [option_nats(model, text_tokenizer, q, start) for q in QUESTIONS]
    right = [float(np.argmax(row) == q.answer) for row, q in zip(rows, QUESTIONS)]
    found = ev.ask(ev.harness(model, text_tokenizer, start, batch=4), 'colours', ev.question_task('colours', QUESTIONS, text_tokenizer))
    assert found['values']['acc'] == pytest.approx([np.mean(right), np.std(right, ddof=1) / len(right)**.5]) and (found['n'], found['version'], found['shots']) == (6, 1., 0)
    if start: assert found['values']['acc_token'][0] == pytest.approx(credits(model, text_tokenizer, QUESTIONS).mean(), abs=1e-9)
    n = [len(text_tokenizer(t, add_special_tokens=False)['input_ids']) for t in ('the old door is', 'the old door is red', 'the old door is as green as grass')]
    score = ev.question_task('colours', QUESTIONS, text_tokenizer)['process_results']
    by_token = score(dict(context='the old door is', options=['red', 'as green as grass'], answer=1), [(-1.05 * (n[1] - n[0]), False), (-1. * (n[2] - n[0]), False)])
    assert by_token == dict(acc=0., acc_token=1.)                              # -1.05 and -1 nats a token: the longer option, which is less likely as a whole
    requests = [SimpleNamespace(args=(q.context, f' {o}')) for q in QUESTIONS for o in q.options]
    np.testing.assert_allclose([ll for ll, _ in ev.harness(model, text_tokenizer, start).loglikelihood(requests)], np.ravel(rows), atol=1e-4)
    assert 0 < found['values']['acc_token'][0] < 1 and ev.ask(ev.harness(model, text_tokenizer, start), 'colours', ev.question_task('colours', QUESTIONS, text_tokenizer), limit=3)['n'] == 3


def test_the_two_numbers_of_a_widened_model(text_tokenizer):
    "Over text rows it is the model that it was; over all rows every token also costs what the model expects of other rows."
    model, vocab, q = random_lm(text_tokenizer), Vocab(len(text_tokenizer), 40), QUESTIONS[2]
    before = option_nats(model, text_tokenizer, q, False)
    widen(model, vocab)
    with torch.no_grad(): model.get_output_embeddings().weight[vocab.text:] *= 40
    ask = lambda: [ll for ll, _ in ev.harness(model, text_tokenizer).loglikelihood([SimpleNamespace(args=(q.context, f' {o}')) for o in q.options], disable_tqdm=True)]
    with ev.only_text(model, vocab.text): text = ask()
    joint = ask()                                                              # the hook is gone
    ids = [text_tokenizer(t, add_special_tokens=False)['input_ids'] for t in (q.context, *(f'{q.context} {o}' for o in q.options))]
    mass = [row[1, len(ids[0]) - 1:].sum() for row in token_nats(model, ids[1:], vocab.text)]
    np.testing.assert_allclose(text, before, atol=1e-4)
    np.testing.assert_allclose(joint, np.add(before, mass), atol=1e-4)
    assert max(mass) < -1
    with pytest.raises(ZeroDivisionError), ev.only_text(model, vocab.text): raise ZeroDivisionError
    assert not model._forward_hooks


def test_jeopardy_counts_answers_of_which_every_token_is_the_likeliest(tmp_path):
    model, tokenizer = load_lm('bundled').eval(), load_text_tokenizer('bundled')
    ids = lambda text: tokenizer(text, add_special_tokens=False)['input_ids']
    def likeliest(whole, n):
        with torch.no_grad(): return model(torch.tensor([whole])).logits[0].argmax(-1)[n - 1:-1].tolist() == whole[n:]
    rows = []
    for context in ('one\nAnswer: the same\ntwo\nAnswer: the same\nthree', 'a\nAnswer: red\nb\nAnswer: red\nc', 'Water', 'cat\nAnswer: house\ndog\nAnswer: house\ncow'):
        before = ids(f'{context}\nAnswer:')
        with torch.no_grad(): best = tokenizer.decode(model(torch.tensor([before])).logits[0, -1].argmax().item()).strip()
        rows += [dict(context=context, continuation=c, right=likeliest(ids(f'{context}\nAnswer: {c}'), len(before))) for c in (best, 'the same', 'zebra crossing') if c]
    right = [r['right'] for r in rows]
    assert 0 < sum(right) < len(right)
    (tmp_path/'jeopardy_all.jsonl').write_text('\n'.join(json.dumps(r) for r in rows))
    tasks = ev.find_tasks('eleven', tokenizer, tmp_path/'jeopardy_all.jsonl')
    assert set(tasks) == {row.task for row in ev.ELEVEN} and len(tasks) == 11
    assert ev.ask(ev.harness(model, tokenizer), 'jeopardy', tasks['jeopardy'])['values']['acc'][0] == pytest.approx(np.mean(right))


def test_the_names_are_those_of_lm_eval():
    folder, names = Path(lm_eval.__file__).parent/'tasks', {row.task for row in ev.ELEVEN} - {'jeopardy'}
    files = [f for part in ('arc', 'super_glue', 'hellaswag', 'lambada', 'mmlu/default', 'piqa', 'winogrande', 'wsc273') for f in (folder/part).rglob('*.yaml')]
    given = {line.split(': ')[1].strip(): f for f in files for line in f.read_text().splitlines() if line.startswith(('task: ', 'group: '))}
    assert names <= set(given)
    metric = {row.task: row.metric for row in ev.ELEVEN}
    assert all(f'metric: {metric[name]}\n' in ''.join(f.read_text() for f in given[name].parent.glob('*.yaml')) for name in names)  # some include another file


def test_what_cannot_be_asked_is_refused_in_a_sentence(text_tokenizer, tmp_path, monkeypatch):
    (tmp_path/'code.yaml').write_text('task: mine\nprocess_docs: !function os.system')
    (tmp_path/'list.yaml').write_text('- 1')
    for tasks, words in (([str(tmp_path/'code.yaml')], 'without !function'), ([str(tmp_path/'list.yaml')], 'no field `task`'), ([{}], 'no field `task`'), (['nowhere.yaml'], 'cannot be read'),
                         (['jeopardy'], 'jeopardy_all.jsonl'), ([], 'tasks is empty')):
        with pytest.raises(BadInput, match=words): ev.find_tasks(tasks, text_tokenizer)
    def offline(names): raise ConnectionError('no route to the hub')
    monkeypatch.setitem(ev._MANAGERS, True, SimpleNamespace(all_tasks=['arc_easy'], load=offline))
    scorer = SimpleNamespace(shown=False)
    with pytest.raises(BadInput, match="'arc_esy' is unknown to lm-eval.*Did you mean 'arc_easy'"): ev.ask(scorer, 'arc_esy', 'arc_esy')
    with pytest.raises(BadInput, match="'arc_easy' could not be loaded .ConnectionError: no route to the hub"): ev.ask(scorer, 'arc_easy', 'arc_easy')
    for change, words in ((dict(limit=0), 'limit=0'), (dict(shots=-1), 'shots=-1'), (dict(steps=[3]), "step 3 of 'bundled' has no weights; there are 0"), (dict(vocabularies=['all']), 'vocabularies'),
                          (dict(name='../x'), 'no plain name')):
        with pytest.raises(BadInput, match=words): ev.evaluate_text('bundled', **change)
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(BadInput, match='pip install lm-eval'): ev.lm_eval()


def test_a_task_of_ones_own_with_examples_before_each_question(tmp_path, text_tokenizer, monkeypatch):
    docs = [dict(q=f'number {i}:', a=str(i)) for i in range(6)]
    (tmp_path/'docs.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    (tmp_path/'task.yaml').write_text(f"""task: numbers\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path/'docs.jsonl'}}}}}\ntest_split: test\nfewshot_split: test
output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['0', '1', '2', '3', '4', '5']\ndoc_to_target: a\nmetric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]""")
    seen, scorer = [], ev.harness(random_lm(text_tokenizer), text_tokenizer)
    plain = scorer.loglikelihood
    monkeypatch.setattr(scorer, 'loglikelihood', lambda requests, **k: seen.append([r.args[0] for r in requests]) or plain(requests, **k))
    task = ev.find_tasks([str(tmp_path/'task.yaml')], text_tokenizer)
    found = [ev.ask(scorer, 'numbers', task['numbers'], shots, seed=seed) for shots, seed in ((0, 0), (2, 0), (2, 0), (2, 1))]
    assert [f['shots'] for f in found] == [0, 2, 2, 2] and seen[1] == seen[2] != seen[3]
    assert seen[0][0] == 'number 0:' and all(text.count('number') == 3 for text in seen[1])


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('evaluation')


@pytest.fixture(scope='module')
def trained(work, vq_folder):
    "A run of eight steps that has kept its weights at 2 and 8, 16 px and 16 codes"
    tokenizer = load_text_tokenizer('bundled')
    random_lm(tokenizer).save_pretrained(work/'lm'); tokenizer.save_pretrained(work/'lm')
    config = make_config('smoke', lm=str(work/'lm'), image_tokenizer=str(vq_folder), px=16, pairs=24, length=128, steps=8, batch=4, keep=2, eval_every=8, eval_pairs=2, lr=1e-2)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('T2I_WORK', str(work)); m.setenv('T2I_CACHE', str(work/'cache'))
        return ensure_runs([config], progress=False).run_id[0]


def test_masks_are_no_codes(trained, work, eye, coco, monkeypatch):
    "A masked run has 17 rows more; asked without training it has the rows that training begins with."
    from t2ianalysis.minimal_html import minimal_page, save_corpus
    from t2ianalysis.models import load_config
    monkeypatch.setenv('T2I_WORK', str(work)); monkeypatch.setenv('T2I_CACHE', str(work/'cache'))
    plain = ev.subject(trained)
    changes = dict(layout='causally-masked', steps=2, eval_every=2, keep=1)
    masked = ensure_runs([make_config(**dataclasses.asdict(plain.config) | changes)], progress=False).run_id[0]
    s = ev.subject(masked)
    assert s.vocab == load_painter(masked).vocab == Vocab(plain.vocab.text, 16, 16) and plain.vocab == Vocab(plain.vocab.text, 16)
    assert s.load(0).get_input_embeddings().weight.shape[0] == s.vocab.size == load_config(str(s.weights[2])).vocab_size
    save_corpus(work/'corpus', [minimal_page('<p>one', 'a.html')] * 4, [minimal_page('<p>two', 'b.html')], load_painter(masked).image, 16, 0)
    pages = ensure_runs([make_config(**dataclasses.asdict(plain.config) | changes | dict(data=str(work/'corpus')))], progress=False).run_id[0]
    assert ev.subject(pages).vocab == s.vocab
    with pytest.raises(BadInput, match='trained on pages'): ev.evaluate_fid(pages, coco, eye, count=16)


@pytest.fixture
def run(trained, work, monkeypatch):
    "The run, without what another test has evaluated"
    monkeypatch.setenv('T2I_WORK', str(work)); monkeypatch.setenv('T2I_CACHE', str(work/'cache'))
    for file in work.glob('*/*/evaluations/*'): file.unlink()
    return trained


def few(monkeypatch, n=6):
    "Short tasks"
    for name, make in list(ev.OWN.items()): monkeypatch.setitem(ev.OWN, name, lambda make=make: make()[:n])


def test_a_run_is_asked_at_every_step_and_nothing_twice(run, work, monkeypatch):
    few(monkeypatch)
    asked, ask = [], ev.ask
    def count(scorer, name, *rest):
        asked.append(name)
        if len(asked) == 5: raise KeyboardInterrupt
        return ask(scorer, name, *rest)
    monkeypatch.setattr(ev, 'ask', count)
    with pytest.raises(KeyboardInterrupt): ev.evaluate_text(run, progress=False)
    assert len(ev.load_evaluations([run])) == 4 * 2                             # two metrics each
    frame = ev.evaluate_text(run, progress=False)
    assert len(asked) == 5 + 12 - 4                                             # 3 steps, 2 tasks, 2 vocabularies; four were there
    assert len(frame) == 24 and not frame.duplicated(['step', 'task', 'rows', 'metric']).any()
    assert ev.evaluate_text(run, progress=False).equals(frame) and len(asked) == 13
    start = frame[(frame.step == 0) & (frame.rows == 'text')].value.tolist()
    assert start == pytest.approx(ev.evaluate_text(str(work/'lm'), progress=False).value.tolist())
    few(monkeypatch, 5)                                                         # other questions under the same name are other questions
    assert set(ev.evaluate_text(run, steps=[8], tasks='facts', progress=False).query("step == 8 and task == 'facts'").n) == {5, 6}
    with pytest.raises(BadInput, match='another protocol: start_token .False and True.; give another name'): ev.evaluate_text(run, start=True, progress=False)
    path = work/'runs'/run/'evaluations'/'text.json'
    path.write_text(path.read_text()[:50])
    with pytest.raises(BadInput, match='cannot be read.*remove it'): ev.evaluate_text(run, progress=False)


def test_other_weights_are_asked_again(run, work, monkeypatch):
    few(monkeypatch)
    ask = dict(tasks='facts', steps=[8], vocabularies=('text',), progress=False)
    ev.evaluate_text(run, **ask)
    weights = work/'runs'/run/'weights'/'00000008'/'model.safetensors'
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b'\x00\x00\x00\x3f')
        record = lambda: json.loads((work/'runs'/run/'evaluations'/'text.json').read_text())['results']
        old = record(); ev.evaluate_text(run, **ask)
        assert len(record()) == 1 and record()[0]['weights'] != old[0]['weights']
    finally: weights.write_bytes(before)


def test_curves_over_training(run, work, monkeypatch):
    few(monkeypatch, 9)
    frame = ev.evaluate_text(run, tasks='facts', progress=False)
    curves = ev.over_training(frame)
    assert curves.step.tolist() == [0, 2, 8] * 2 and curves.tokens.is_monotonic_increasing is False and curves.tokens[0] == 0 < curves.tokens[1] < curves.tokens[2]
    low, high = curves.low[0], curves.high[0]
    assert low <= curves['mean'][0] <= high and (low, high) == pytest.approx(wilson(curves['mean'][0], 9))
    fig = ev.text_figure(frame, chance={'facts': .25})
    lines = fig.axes[0].lines
    assert [line.get_ydata().tolist() for line in lines[:2]] == [curves['mean'][:3].tolist(), curves['mean'][3:].tolist()] and fig.axes[0].get_title(loc='left') == 'facts'
    with pytest.raises(BadInput, match="metric='f1' is in none.*acc, acc_token"): ev.over_training(frame, 'f1')
    with pytest.raises(BadInput, match='is no run'): ev.over_training(ev.evaluate_text(str(work/'lm'), tasks='facts', progress=False))
    other = frame.assign(settings=[s | dict(limit=3) for s in frame.settings])
    for draw in (ev.text_figure, ev.eleven_average, ev.over_training):
        with pytest.raises(BadInput, match='two protocols cannot stand in one table or figure: limit .None and 3.'): draw(pd.concat([frame, other]))


def wilson(p, n, z=1.959963984540054):
    middle, half = (p + z*z / (2*n)) / (1 + z*z / n), z * (p * (1 - p) / n + z*z / (4*n*n))**.5 / (1 + z*z / n)
    return middle - half, middle + half


class Means(torch.nn.Module):
    "Mean colours of quadrants: a backbone of twelve numbers"
    def forward(self, images): return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def eye(): return Backbone('means', Means(), 12, 16, 'none')


def write_coco(folder, make, n=20):
    "COCO's layout of val2014"
    for name in ('annotations', 'val2014'): (folder/'coco-2014'/name).mkdir(parents=True)
    images = [dict(id=i, file_name=f'COCO_val2014_{i:012}.jpg', license=1) for i in range(n)]
    for i, image in enumerate(images): make['noise'](i, 24).save(folder/'coco-2014'/'val2014'/image['file_name'])
    captions = [dict(id=5 * i + k, image_id=i, caption=f'caption {k} of picture {i}') for i in range(n) for k in range(5)]
    (folder/'coco-2014'/'annotations'/'captions_val2014.json').write_text(json.dumps(dict(images=images, annotations=captions, licenses=[dict(id=1, name='CC0')])))


@pytest.fixture
def coco(tmp_path, make, monkeypatch):
    write_coco(tmp_path, make)
    monkeypatch.setenv('T2I_DATA', str(tmp_path))
    return load_captions('coco-2014-val', 'all', 16)


def test_a_tally_is_torchmetrics_and_goes_on_from_its_file(eye, make, tmp_path):
    images = np.stack([np.asarray(make['noise'](i)) for i in range(50)])
    a, b = ev.Tally(eye, tmp_path/'a'), ev.Tally(eye, tmp_path/'b')
    a.add(images[:20], 20, True); b.add(images[20:33], 13)
    b = ev.Tally(eye, tmp_path/'b')
    assert (b.n, b.next, b.done) == (13, 13, False)
    b.add(images[33:], 30, True)
    metric = FrechetInceptionDistance(feature=eye).set_dtype(torch.float64)
    for x, real in ((images[:20], True), (images[20:], False)): metric.update(torch.from_numpy(x).permute(0, 3, 1, 2), real=real)
    assert ev.tally_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-5) == pytest.approx(frechet(image_features(eye, images[:20]), image_features(eye, images[20:])), rel=1e-4)
    (tmp_path/'b').write_bytes((tmp_path/'b').read_bytes()[:200])
    assert ev.Tally(eye, tmp_path/'b').n == 0
    assert ev.Tally(Backbone('other', Means(), 6, 16, 'none'), tmp_path/'a').n == 0


def test_the_reference_goes_on_where_it_stopped(run, coco, eye, monkeypatch, tmp_path):
    monkeypatch.setattr(ev, 'SHARD', 4)
    monkeypatch.setenv('T2I_CACHE', str(tmp_path/'whole'))
    whole, pairs, starts = ev.real_tally(coco, eye, False), coco.pairs, []
    def broken(start=0, kept=0):
        starts.append(start)
        for pair in pairs(start, kept):
            if len(starts) == 1 and pair['row'] == 10: raise OSError('disk')
            yield pair
    monkeypatch.setenv('T2I_CACHE', str(tmp_path/'again')); monkeypatch.setattr(coco, 'pairs', broken)
    with pytest.raises(OSError): ev.real_tally(coco, eye, False)
    again = ev.real_tally(coco, eye, False)
    assert starts == [0, 8] and again.n == whole.n == 20
    torch.testing.assert_close(again.state['cov'], whole.state['cov'], rtol=1e-12, atol=0)
    assert ev.real_tally(coco, eye, False).n == 20 and starts == [0, 8]         # from the cache
    assert len(list((tmp_path/'again'/'fid').iterdir())) == 1


def test_fid_of_a_run(run, coco, eye, monkeypatch, work):
    monkeypatch.setattr(ev, 'SHARD', 6)
    drawn, draw = [], ev.draw_images
    def count(painter, prompts, sampling, *rest):
        drawn.append((tuple(prompts), sampling.seed))
        if len(drawn) == 3: raise KeyboardInterrupt
        return draw(painter, prompts, sampling, *rest)
    monkeypatch.setattr(ev, 'draw_images', count)
    ask = dict(captions=coco, eye=eye, count=16, progress=False)
    with pytest.raises(KeyboardInterrupt): ev.evaluate_fid(run, **ask)
    frame = ev.evaluate_fid(run, **ask)
    assert [len(p) for p, _ in drawn] == [6, 6, 4, 4] and len({s for _, s in drawn}) == 3 and drawn[2] == drawn[3]
    assert ev.evaluate_fid(run, **ask).value.tolist() == frame.value.tolist() and len(drawn) == 4
    row = frame.iloc[0]
    assert (row.metric, row.step, row.n, row.real, row.task) == ('frechet_means', 8, 16, 20, 'coco-2014-val')
    prompts = ev.draw_captions(coco, 16)
    assert sum((list(p) for p, _ in drawn[:2] + drawn[3:]), []) == prompts and len(set(prompts)) == 16
    painter = load_painter(run)
    images = np.concatenate([draw(painter, list(p), Sampling(seed=s)) for p, s in drawn[:2] + drawn[3:]])
    real = np.stack([np.asarray(pair['image']) for pair in coco.pairs()])
    assert row.value == pytest.approx(frechet(image_features(eye, real), image_features(eye, images)), rel=1e-4)
    settings = row.settings
    assert (settings['px'], settings['crop'], settings['resize'], settings['sampling_temperature'], settings['captions']) == (16, 'RGB on white, centre crop, bicubic', 'none', 1., 'coco-2014-val')


def test_every_field_of_the_protocol_gives_another_id(coco, eye, pairs_folder):
    ask = dict(captions=coco, reference=coco, eye=eye, count=16, seed=0, sampling=Sampling(), candidates=1)
    named = lambda **change: ev.protocol_id(ev.fid_protocol(**(ask | change)))
    weighted = Backbone('means', torch.nn.Linear(2, 2), 12, 16, 'none')
    other, ids = load_captions(pairs_folder, 'all', 16), [named()]
    ids += [named(captions=other), named(reference=other), named(reference=load_captions('coco-2014-val', 'all', 24)), named(count=17), named(seed=1), named(candidates=2), named(eye=weighted)]
    ids += [named(eye=Backbone('means', Means(), 12, 16, 'bicubic')), named(sampling=Sampling(.85)), named(sampling=Sampling(seed=1)), named(sampling=Sampling(guidance=2.))]
    weighted.network.weight.data += 1
    ids += [named(eye=weighted)]
    assert len(set(ids)) == len(ids) == 13 and named() == ids[0]


def test_distances_of_two_protocols_are_not_put_in_one_table(run, coco, eye):
    ask = dict(captions=coco, eye=eye, count=16, progress=False)
    a, b = ev.evaluate_fid(run, **ask), ev.evaluate_fid(run, sampling=Sampling(.85), name='cold', **ask)
    both = ev.load_evaluations([run])
    with pytest.raises(BadInput, match='sampling_temperature .0.85 and 1.0.'): ev.fid_table(both)
    with pytest.raises(BadInput, match="vary='temperature' is no field"): ev.fid_table(both, vary=['temperature'])
    table = ev.fid_table(both, vary=['sampling_temperature'])
    assert sorted(table.frechet_means) == sorted([a.value[0], b.value[0]]) and set(table.sampling_temperature) == {1., .85}
    assert '16 images instead of 30,000' in ev.fid_table(a).attrs['protocol'] and 'centre crop' in ev.fid_table(a).attrs['protocol']
    with pytest.raises(BadInput, match='another protocol: count .16 and 17.'): ev.evaluate_fid(run, **ask | dict(count=17))
    text = a.assign(settings=[dict(kind='text')])
    with pytest.raises(BadInput, match='two protocols'): ev.fid_table(pd.concat([a, text]))
    with pytest.raises(BadInput, match='rows of one distance'): ev.fid_table(text)


def test_what_has_no_fid_is_refused(run, coco, eye, work):
    ask = dict(run=run, captions=coco, eye=eye, count=16, progress=False)
    few_real = load_captions('coco-2014-val', 'all', 16, limit=12)
    for change, words in ((dict(count=12), 'count=12 is too few for the 12 features.*13 or more'), (dict(captions=load_captions('coco-2014-val', 'all', 24)), 'open the source with px=16'), (dict(count=21), '20 captions but 21'),
                          (dict(reference=few_real), '12 real images are too few'), (dict(step=5), 'no weights of step 5'), (dict(candidates=0), 'candidates=0'), (dict(run='no-such'), "'no-such'")):
        with pytest.raises(BadInput, match=words): ev.evaluate_fid(**ask | change)
    inception = ev.evaluate_fid(**ask | dict(eye=Backbone('inception', Means(), 12, 16, 'none'), name='named'))
    assert set(inception.metric) == {'fid'}                                     # the name is kept for Inception's features


def test_of_several_candidates_the_best_is_taken(run):
    painter, prompts = load_painter(run), ['a red fish', 'a blue house']
    best = ev.draw_images(painter, prompts, Sampling(), candidates=3)
    codes = torch.stack([rerank(painter.model, painter.vocab, ids, c, length=painter.config.length)[0][0] for ids, c in zip(painter.read(prompts), ev.sample_prompts(painter, [p for p in prompts for _ in range(3)]).view(2, 3, 4, 4))])
    assert np.array_equal(best, painter.decode(codes)) and best.shape == (2, 16, 16, 3)


def test_the_commands(run, coco, t2i, monkeypatch, capsys):
    few(monkeypatch)
    assert t2i('evaluate', 'text', run, '--step', '8', '-t', 'facts', '--name', 'quick') == 0
    out = capsys.readouterr().out
    assert out.count('facts') == 4 and 'joint' in out and 'acc_token' in out and out.rstrip().endswith('evaluations/quick.json')
    for arguments, words in ((['text', 'bundeld'], "Did you mean 'bundled'"), (['text', run, '--step', '3'], 'there are 0, 2, 8'), (['fid', run], 'give its path; or use'), (['fid', 'bundled', '--backbone', 'efficientnet-lite0'], 'draws no images'),
                             (['fid', run, '--backbone', 'efficientnet-lite0', '--captions', 'coco-2014-val', '--count', '100'], '1,280 features'), (['fid', run, '--inception', 'x.pth'], 'x.pth is not there')):
        assert t2i('evaluate', *arguments) == 2
        err = capsys.readouterr().err
        assert words in err and 'Traceback' not in err
