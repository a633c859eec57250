"The command line: the same functions, help at once, one sentence for a mistake, and JSON for programs."
import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from t2ianalysis import cli, recipes, training
from t2ianalysis.data import home, work_path
from t2ianalysis.models import RULES
from t2ianalysis.sweeps import run_notebook

tool = str(Path(sys.executable).parent/'t2i')


@pytest.mark.parametrize('arguments, words', [
    (['train', '--preset', 'labtop'], "preset='labtop' is unknown"), (['train', '--preset', 'smoke', '-p', 'stepz=3'], "Did you mean 'steps'?"),
    (['train', '--preset', 'smoke', '-p', 'steps=-3'], 'steps=-3 must be above zero'), (['train', '--preset', 'smoke', '-p', 'batch=0'], 'batch=0 must be above zero'),
    (['train', '--preset', 'smoke', '-p', 'lr=0'], 'lr=0.0 must be above zero'), (['train', '--preset', 'smoke', '-p', 'steps'], 'not of the form name=value'),
    (['train', '--preset', 'smoke', '-p', 'lm=./nowhere'], "lm='./nowhere' is no folder"), (['train', '--preset', 'smoke', '-p', 'data=./nowhere'], 'nowhere'),
    (['finding', 'los_breakdown'], "Did you mean 'loss_breakdown'?"), (['finding', 'loss_breakdown', '-p', 'sedes=3'], "Did you mean 'seeds'?"),
    (['report', '--preset', 'labtop'], "preset='labtop' is unknown"), (['report', '--preset', 'smoke'], 'no finding has a record'), (['generate', 'no-such-run', 'a fish'], 'no-such-run'),
    (['generate', 'no-such-run', 'a fish', '--top-k', '0'], 'top_k=0'),
    (['data', './nowhere'], 'nowhere'), (['tokenize', '--image-tokenizer', './nowhere'], 'nowhere'), (['tokenize', '--px', '60'], '60'), (['data', '--split', 'test'], 'split'),
])
def test_a_mistake_is_one_sentence_and_status_2(arguments, words, t2i, capsys):
    assert t2i(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('t2i: ') and 'Traceback' not in err and err.count('\n') == 1


@pytest.mark.parametrize('arguments, words', [
    (['trian'], "command 'trian' of t2i is unknown. Did you mean 'train'?"), (['convert', 'movqan'], "command 'movqan' of t2i convert is unknown. Did you mean 'movqgan'?"),
    (['train', '--prest', 'smoke'], "option --prest of t2i train is unknown. Did you mean '--preset'?"), (['--verzion'], "Did you mean '--version'?"),
    (['train', 'smoke'], "argument 'smoke' is one too many for t2i train. Did you mean --preset smoke?"), (['train', 'steps=3'], 'Did you mean -p steps=3?'),
    (['train', '-p'], 'option -p lacks its value'), (['data', '--px', 'abc'], "px='abc' is not a whole number"), (['plan', '--mfu', 'half'], "mfu='half' is not a number"),
    (['generate'], 't2i generate lacks RUN (id or folder of a run'), (['generate', 'run'], 't2i generate lacks PROMPT'), (['evaluate', 'text', 'run', '--step', 'x'], "step='x' is not a whole number"),
    (['data', '--split', 'valid'], "split='valid' is unknown; give one of train, validation, all. Did you mean 'validation'?"), (['benchmark', '--preset', 'paper'], 'give one of smoke, laptop, gpu.'),
])
def test_a_mistake_on_the_command_line_too_and_at_once(arguments, words, t2i, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 't2ianalysis.data', None)                   # nothing heavy is asked
    assert t2i(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith('t2i: ') and err.count('\n') == 1 and not out


@pytest.mark.parametrize('arguments, words', [
    (['loss_breakdown', '-p', 'preset=labtop'], "Did you mean 'laptop'?"), (['loss_breakdown', '-p', 'steps=-3'], 'steps=-3 must be above zero'), (['loss_breakdown', '-p', 'lr=fast'], "lr='fast' is of type str"),
    (['token_alignment', '-p', 'batch=2.5'], 'batch=2.5 is of type float'), (['train', '-p', 'init=[pretrained,rnd]'], 'init='), (['loss_breakdown', '-p', 'length=9'], 'length=9 is unknown to loss_breakdown'),
])
def test_a_finding_refuses_before_a_kernel_starts(arguments, words, t2i, monkeypatch, capsys):
    monkeypatch.setattr('papermill.execute_notebook', lambda *a, **kw: pytest.fail('a kernel was started'))
    assert t2i('finding', *arguments) == 2
    assert words in capsys.readouterr().err and not work_path('runs').exists()


# Help

def commands(group=None, path=()):
    "Every command with its path, groups too"
    group = group or typer.main.get_command(cli.app)
    yield path, group
    for name, command in getattr(group, 'commands', {}).items():
        if hasattr(command, 'commands'): yield from commands(command, (*path, name))
        else: yield (*path, name), command


@pytest.mark.parametrize('path, command', commands(), ids=lambda x: ' '.join(x) or 't2i' if isinstance(x, tuple) else '')
def test_help_reads_well_on_80_columns(path, command):
    text = CliRunner().invoke(cli.app, [*path, '--help']).stdout
    assert max(map(len, text.splitlines())) <= 80
    if hasattr(command, 'commands'): assert all(f'  {name}' in text for name in command.commands) and '...\n' not in text.partition('Start here')[0].replace('[ARGS]...', '')
    else:
        assert 'Examples:\n    t2i ' in text or 'Examples:\n    torchrun' in text
        assert re.search(r'^  --json: \w', text, re.M) and re.search('^  Writes ', text, re.M)
        ours = [p for p in command.params if p.param_type_name == 'option' and p.name != 'help']
        assert not [p.name for p in ours if not p.help or any(o.startswith('--no-') for o in p.secondary_opts)]
    for line in re.findall(r'^    (t2i .*)', text.partition('Examples:')[2], re.M):       # an example is a command that there is, with options that there are
        words = line.split()[1:]
        found = next(c for p, c in sorted(commands(), key=lambda x: -len(x[0])) if tuple(words[:len(p)]) == p)
        assert {w for w in words if re.match('-[-a-z]', w)} <= {o for p in found.params for o in p.opts}


def test_commands_stand_in_the_order_of_use():
    listed = re.findall(r'^  ([a-z]+)  ', CliRunner().invoke(cli.app, ['--help']).stdout, re.M)
    order = [name for names in cli.SECTIONS.values() for name in names]
    assert listed == [name for name in order if name in listed] and {'data', 'tokenize', 'plan', 'train', 'finding', 'generate', 'evaluate', 'convert', 'benchmark', 'report'} <= set(listed)


def test_what_is_read_from_source_is_what_is_there(monkeypatch):
    "Names and defaults are taken from files so that nothing is imported: here they are compared with the modules."
    assert {name: ast.literal_eval(default) for name, (default, _) in cli._fields().items()} == {f.name: f.default for f in dataclasses.fields(training.Config)}
    assert all(comment for name, (_, comment) in cli._fields().items() if name not in ('beta1', 'beta2'))
    assert cli._keys('training', 'PRESETS') == list(training.PRESETS) and cli._keys('recipes', 'RECIPES') == list(recipes.RECIPES) and cli._keys('models', 'RULES') == list(RULES)
    for name in ('train', 'finding', 'plan', 'report'):
        preset, = (p for path, c in commands() if path == (name,) for p in c.params if p.name == 'preset')
        assert list(preset.type_descriptor.choices) == list(training.PRESETS)
    for variables in ({}, dict(T2I_WORK='/elsewhere'), dict(T2I_HOME='/there')):
        with monkeypatch.context() as m:
            for name in ('T2I_WORK', 'T2I_HOME'): m.delenv(name, raising=False)
            for name, value in variables.items(): m.setenv(name, value)
            assert cli._places() == (home(), work_path())


def test_fields_are_listed(t2i, capsys):
    assert t2i('train', '--fields') == 0
    out = capsys.readouterr().out
    assert all(re.search(rf'^{f.name} ', out, re.M) for f in dataclasses.fields(training.Config)) and max(map(len, out.splitlines())) <= 80
    assert t2i('finding', 'token_histogram', '--fields', '--json') == 0
    assert json.loads(capsys.readouterr().out)['fields']['null_codes'] == dict(default=16_384, comment='its codes')


LIGHT = """
import contextlib, io, os, sys
from t2ianalysis import cli
def t2i(*arguments, **variables):
    os.environ.update(variables)
    sys.argv = ['t2i', *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try: cli.main()
        except SystemExit: pass
    return out.getvalue()
import typer
def paths(group, path=()):
    yield path
    for name, c in getattr(group, 'commands', {}).items(): yield from paths(c, (*path, name))
for path in paths(typer.main.get_command(cli.app)): assert 'Usage: ' in t2i(*path, '--help')
assert 'Usage: ' in t2i() and 't2i 0' in t2i('--version') and 'weight_decay' in t2i('train', '--fields') and 'Did you mean' in t2i('trian') and 'labtop' in t2i('train', '--preset', 'labtop')
assert 'loss_breakdown' in t2i(_T2I_COMPLETE='complete_bash', COMP_WORDS='t2i\\nfinding\\n', COMP_CWORD='2')
print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'pandas', 'numpy', 'datasets', 'papermill', 'diffusers', 'PIL', 'pyarrow', 'matplotlib'}))
print(sorted(m for m in sys.modules if m.startswith('t2ianalysis')))
"""


def test_help_completion_and_slips_import_nothing_heavy():
    heavy, ours = map(ast.literal_eval, subprocess.run([sys.executable, '-c', LIGHT], capture_output=True, text=True, check=True).stdout.splitlines())
    assert heavy == [] and ours == ['t2ianalysis', 't2ianalysis.cli']


# Completion

@pytest.mark.skipif(not shutil.which('bash'), reason='no bash here')
def test_bash_completes(tmp_path):
    "The script that --show-completion gives, in a real bash, with words cut at = as readline cuts them."
    (tmp_path/'runs'/'bundled-random-s0-abc'/'weights').mkdir(parents=True)
    env = dict(os.environ, T2I_WORK=str(tmp_path), PATH=f'{Path(tool).parent}:{os.environ["PATH"]}', _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION='1')
    ask = lambda *words: f"COMP_WORDS=(t2i {' '.join(words)}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _t2i_completion t2i; echo \"${{COMPREPLY[*]}}\""
    asked = [ask('tr'), ask('finding', 'token_'), ask('plan', "''"), ask('generate', "''"), ask('train', '-p', 'preci'), ask('train', '-p', 'lr', '=', '0.1', '-p', 'init', '=', 'p'),
             ask('finding', 'loss_breakdown', '-p', 'random_init', '=')]
    out = subprocess.run(['bash', '--norc', '-c', 'eval "$(t2i --show-completion bash)"\n' + '\n'.join(asked)], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ['train', 'token_alignment token_histogram', ' '.join(training.PRESETS), 'bundled-random-s0-abc', 'precision= precision=fp32 precision=bf16', 'pretrained', 'random open_lm']
    assert 'complete' in subprocess.run([tool, '--show-completion', 'zsh'], env=env, capture_output=True, text=True).stdout


# Streams, and how a command ends

def test_streams_that_close_or_know_few_characters():
    shell = lambda line, **env: subprocess.run(['bash', '-c', f'set -o pipefail; {line}'], env=dict(os.environ, T2I=tool, PYTHONUNBUFFERED='', **env), capture_output=True, text=True)
    done = shell('"$T2I" train --fields | true')
    assert done.stderr == '' and done.returncode in (0, 1)
    assert (shell('"$T2I" train --fields >&-').returncode, shell('"$T2I" train --fields 2>&- | head -1').stderr) == (0, '')
    full = shell('"$T2I" train --fields > /dev/full')
    assert full.returncode == 2 and full.stderr.startswith('t2i: no space left') and full.stderr.count('\n') == 1
    code = "from t2ianalysis import cli; cli._streams(); print('naïve 日本')"
    done = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONIOENCODING='ascii'), capture_output=True, text=True)
    assert done.stdout == 'na\\xefve \\u65e5\\u672c\n'


def test_ctrl_c_is_one_sentence_and_130(t2i, monkeypatch, capsys):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(cli, '_list_fields', stop)
    assert t2i('train', '--fields') == 130
    assert capsys.readouterr().err == 't2i: stopped; the same command goes on from what is whole.\n'


def test_a_notebook_that_fails_is_a_sentence_and_status_1(t2i, monkeypatch, capsys):
    def fail(*_, **__): raise RuntimeError('ValueError: no (the notebook with the error marked: x.failed.ipynb)')
    monkeypatch.setattr('t2ianalysis.sweeps.run_notebook', fail)
    assert t2i('finding', 'context', '--json') == 1
    assert capsys.readouterr() == ('', 't2i: ValueError: no (the notebook with the error marked: x.failed.ipynb)\n')


def test_our_own_fault_asks_for_a_report(monkeypatch):
    monkeypatch.setattr(cli, '_list_fields', lambda *_: 1 / 0)
    monkeypatch.setattr(sys, 'argv', ['t2i', 'train', '--fields'])
    with pytest.raises(ZeroDivisionError) as e: cli.main()
    assert 'please report' in e.value.__notes__[0]


def test_version(t2i, capsys):
    assert t2i('--version') == 0
    assert re.match(r't2i \d+\.\d+\.\d+ \(Python 3', capsys.readouterr().out)


# JSON

def keys_told(*path):
    "The keys that a command's help promises"
    told = re.sub(r'\([^()]*\)', '', ' '.join(dict(commands())[path].epilog.rpartition('--json: ')[2].split())).rstrip('.').split(';')[0]
    return {word.strip() for word in re.split(', | and ', told)}


def test_an_answer_with_a_status_is_told_and_kept():
    toy = cli.typer_app()
    toy.callback()(lambda: None)
    @cli.command(toy, 'check', 'check', keys='broken')
    def check():
        "Check something."
        print('two are broken')
        return dict(broken=[1, float('nan')]), 1
    told, plain = (CliRunner().invoke(toy, ['check', *more]) for more in (['--json'], []))
    assert (told.exit_code, json.loads(told.stdout), told.stderr) == (1, dict(broken=[1, None]), 'two are broken\n')
    assert (plain.exit_code, plain.stdout, plain.stderr) == (1, 'two are broken\n', '') and check()[1] == 1


def test_json_is_one_object_with_the_keys_that_the_help_names(pairs_folder, vq_folder, tmp_path, t2i, capsys):
    def ask(*arguments, status=0):
        assert t2i(*arguments, '--json') == status
        out, err = capsys.readouterr()
        return (json.loads(out) if out else None), err
    made, words = ask('data', str(pairs_folder), '--split', 'all', '--px', '16')
    assert set(made) == keys_told('data') and made['kept'] == made['rows']['kept'] == 10 and 'naïve 日本' in made['first'][0]['caption'] and '10 pairs kept' in words
    assert 'cc12m' in ask('data', '--list')[0]['recipes']
    made, words = ask('tokenize', str(pairs_folder), '--split', 'all', '--px', '16', '--image-tokenizer', str(vq_folder))
    assert set(made) == keys_told('tokenize') and made['grid'] == [4, 4] and made['pairs'] == 10 and Path(made['folder']).is_dir() and '10 pairs' in words
    (tmp_path/'site').mkdir()
    for name in ('one', 'two'): (tmp_path/'site'/f'{name}.html').write_text(f'<p>This is page {name}.')
    made, words = ask('pages', str(tmp_path/'site'), str(tmp_path/'corpus'), '--px', '16', '--image-tokenizer', str(vq_folder), '--test', '.3', '--seed', '3')
    assert set(made) == keys_told('pages') and made['documents'] == 2 and 'Unique images' in words
    made, _ = ask('plan', 'smoke')
    assert set(made) >= keys_told('plan') - {'memory', 'disk'} and {'memory', 'disk'} <= set(made)
    assert ask('plan', 'smoke', '-p', 'stepz=3', status=2) == (None, "t2i: parameter stepz=3 is unknown. Did you mean 'steps'? The parameters are: " + ', '.join(f.name for f in dataclasses.fields(training.Config)) + '.\n')
    small = dict(px=16, image_tokenizer=vq_folder, steps=1, batch=1, pairs=2, eval_pairs=1)
    run, words = ask('train', '--preset', 'smoke', *(x for k, v in small.items() for x in ('-p', f'{k}={v}')))
    assert set(run) == keys_told('train') and run['step'] == 1 and 'runs to train' in words
    frame = training.load_run(run['folder']).query('split == "validation" and step == 1')
    assert run['losses'] == dict(zip(frame.kind, frame.loss)) and len(str(run['losses']['total'])) > 6
    made, _ = ask('generate', run['run_id'], 'a fish', '-n', '1', '--px', '32', '--out', str(tmp_path/'fish.png'))
    assert set(made) == keys_told('generate') and made['sampling']['top_k'] is None and Image.open(made['out']).width >= 32


def test_data_and_tokenize(tmp_path, t2i, capsys):
    folder = tmp_path/'pairs'; folder.mkdir()
    for i in range(6):
        Image.new('RGB', (70, 64), (40 * i, 90, 200)).save(folder/f'{i}.png'); (folder/f'{i}.txt').write_text(f'a square of blue number {i}')
    (folder/'6.png').write_bytes(b'no image'); (folder/'6.txt').write_text('a broken file')
    assert t2i('data', str(folder), '--split', 'all', '--sheet', str(tmp_path/'sheet.png')) == 0
    assert '6 pairs kept; 1 undecodable images' in capsys.readouterr().out and Image.open(tmp_path/'sheet.png').width > 100
    assert t2i('tokenize', str(folder), '--split', 'all') == 0
    assert '6 pairs of 8x8 codes' in capsys.readouterr().out


def test_a_finding_end_to_end(tmp_path_factory, t2i, monkeypatch, capsys):
    "The first finding at preset smoke as a user runs it: figures, verdicts, the executed notebook; the second time nothing is trained, and a program is told."
    work = tmp_path_factory.mktemp('finding')
    command = [tool, 'finding', 'loss_breakdown', '--preset', 'smoke', '-p', 'seeds=2']
    first, second = (subprocess.run([*command, *more], env=dict(os.environ, T2I_WORK=str(work)), capture_output=True, text=True) for more in ([], ['--json']))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert '4 of 4 runs to train' in first.stdout and 'to train' not in second.stdout + second.stderr
    made = json.loads(second.stdout)
    assert set(made) == keys_told('finding') and made['preset'] == 'smoke' and len(made['verdicts']) > 3 and made['verdicts'][0]['claim'] in second.stderr
    monkeypatch.setenv('T2I_WORK', str(work))
    assert t2i('report', '--preset', 'smoke', '--json') == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == keys_told('report') and [v['claim'] for v in told['verdicts']] == [v['claim'] for v in made['verdicts']] and sum(told['counts'].values()) == len(told['verdicts'])
    assert 'Image loss does not differ' in first.stdout
    for kind in ('svg', 'png', 'csv'): assert (work/'figures'/'smoke'/f'loss_breakdown.{kind}').stat().st_size > 100
    nb = nbformat.read(work/'runs'/'smoke'/'loss_breakdown.ipynb', as_version=4)
    assert sum('image/png' in o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])) >= 4
    records = [json.loads((p/'config.json').read_text())['config'] for p in (work/'runs').glob('bundled-*')]
    assert sorted((r['init'], r['seed']) for r in records) == [('pretrained', 0), ('pretrained', 1), ('random', 0), ('random', 1)]


def test_a_mistake_inside_a_finding_leaves_nothing(tmp_path, t2i, monkeypatch, capsys):
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    assert t2i('finding', 'loss_breakdown', '--preset', 'smoke', '-p', 'random_init=randon') == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("t2i: init='randon' is unknown") and not any('Traceback' in line for line in err) and not list((tmp_path/'runs').iterdir())


def test_a_failing_notebook_is_kept_with_its_error(tmp_path):
    cells = [nbformat.v4.new_code_cell('n = 1', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('print("before"); 1 / (n - 1)')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'divide.ipynb')
    with pytest.raises(RuntimeError, match='ZeroDivisionError.*divide.failed.ipynb'): run_notebook(str(tmp_path/'divide.ipynb'), {}, out=tmp_path/'out'/'divide.ipynb', progress=False)
    assert 'ZeroDivisionError' in (tmp_path/'out'/'divide.failed.ipynb').read_text() and not (tmp_path/'out'/'divide.ipynb').exists()
