"The command line: the same functions, and one sentence for a mistake."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from t2ianalysis import cli
from t2ianalysis.sweeps import run_notebook


def t2i(*arguments, monkeypatch):
    "Run `t2i` in this process; its exit status."
    monkeypatch.setattr(sys, 'argv', ['t2i', *arguments])
    with pytest.raises(SystemExit) as e: cli.main()
    return e.value.code


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
def test_a_mistake_is_one_sentence_and_status_2(arguments, words, monkeypatch, capsys):
    assert t2i(*arguments, monkeypatch=monkeypatch) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith('t2i: ') and 'Traceback' not in err and err.count('\n') == 1


def test_data_and_tokenize(tmp_path, monkeypatch, capsys):
    folder = tmp_path/'pairs'; folder.mkdir()
    for i in range(6):
        Image.new('RGB', (70, 64), (40 * i, 90, 200)).save(folder/f'{i}.png'); (folder/f'{i}.txt').write_text(f'a square of blue number {i}')
    (folder/'6.png').write_bytes(b'no image'); (folder/'6.txt').write_text('a broken file')
    assert t2i('data', str(folder), '--split', 'all', '--sheet', str(tmp_path/'sheet.png'), monkeypatch=monkeypatch) == 0
    assert '6 pairs kept; 1 undecodable images' in capsys.readouterr().out and Image.open(tmp_path/'sheet.png').width > 100
    assert t2i('tokenize', str(folder), '--split', 'all', monkeypatch=monkeypatch) == 0
    assert '6 pairs of 8x8 codes' in capsys.readouterr().out


def test_help_needs_no_torch():
    code = "import sys; from typer.testing import CliRunner; from t2ianalysis.cli import app; r = CliRunner().invoke(app, ['finding', '--help']); assert r.exit_code == 0 and 'torch' not in sys.modules; print(r.output)"
    assert '--preset' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_a_finding_end_to_end(tmp_path_factory):
    "The first finding at preset smoke as a user runs it: figures, verdicts, the executed notebook; the second time nothing is trained."
    work = tmp_path_factory.mktemp('finding')
    command = [str(Path(sys.executable).parent/'t2i'), 'finding', 'loss_breakdown', '--preset', 'smoke', '-p', 'seeds=2']
    first, second = (subprocess.run(command, env=dict(os.environ, T2I_WORK=str(work)), capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert '4 of 4 runs to train' in first.stdout and 'to train' not in second.stdout
    assert 'Image loss does not differ' in first.stdout
    for kind in ('svg', 'png', 'csv'): assert (work/'figures'/'smoke'/f'loss_breakdown.{kind}').stat().st_size > 100
    nb = nbformat.read(work/'runs'/'smoke'/'loss_breakdown.ipynb', as_version=4)
    assert sum('image/png' in o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])) >= 4
    records = [json.loads((p/'config.json').read_text())['config'] for p in (work/'runs').glob('bundled-*')]
    assert sorted((r['init'], r['seed']) for r in records) == [('pretrained', 0), ('pretrained', 1), ('random', 0), ('random', 1)]


def test_a_mistake_inside_a_finding_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    assert t2i('finding', 'loss_breakdown', '--preset', 'labtop', monkeypatch=monkeypatch) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("t2i: preset='labtop' is unknown") and not any('Traceback' in line for line in err) and not list((tmp_path/'runs').iterdir())


def test_a_failing_notebook_is_kept_with_its_error(tmp_path):
    cells = [nbformat.v4.new_code_cell('n = 1', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('print("before"); 1 / (n - 1)')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'divide.ipynb')
    with pytest.raises(RuntimeError, match='ZeroDivisionError.*divide.failed.ipynb'): run_notebook(str(tmp_path/'divide.ipynb'), {}, out=tmp_path/'out'/'divide.ipynb', progress=False)
    assert 'ZeroDivisionError' in (tmp_path/'out'/'divide.failed.ipynb').read_text() and not (tmp_path/'out'/'divide.ipynb').exists()
