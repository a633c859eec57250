"The house: what is generated equals what generates it, and a stranger can install it."
import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest

from t2ianalysis.sweeps import parameters_of

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
names = [str(p.relative_to(root/'nbs')) for p in notebooks]
tool = lambda name: str(Path(sys.executable).parent/name)


def run(*command, cwd, **env):
    return subprocess.run(command, cwd=cwd, env=dict(os.environ, **env), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks cleaned and exported afresh, without the library that is there."
    folder = tmp_path_factory.mktemp('copy')
    shutil.copytree(root/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(root/name, folder)
    run(tool('nbdev_clean'), cwd=folder); run(tool('nbdev_export'), cwd=folder)
    return folder


def test_the_library_is_what_the_notebooks_export(copy):
    made = {p.name for p in (copy/'t2ianalysis').glob('*.py')}
    assert made == {p.name for p in (root/'t2ianalysis').glob('*.py')}
    assert filecmp.cmpfiles(copy/'t2ianalysis', root/'t2ianalysis', made, shallow=False)[1:] == ([], [])


def test_the_notebooks_are_clean(copy):
    assert [n for n in names if (copy/'nbs'/n).read_bytes() != (root/'nbs'/n).read_bytes()] == []


def test_the_readme_is_the_index(tmp_path):
    shutil.copytree(root/'nbs', tmp_path/'nbs'); shutil.copy(root/'Makefile', tmp_path)
    run('make', '-s', 'README.md', f'BIN={Path(sys.executable).parent}', cwd=tmp_path)
    assert (tmp_path/'README.md').read_text() == (root/'README.md').read_text()


@pytest.mark.parametrize('name', names)
def test_a_notebook_is_short_and_speaks_of_no_machine(name):
    path = root/'nbs'/name
    nb = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000 and len(nb.cells) < 60
    assert not re.search(r'(/root/|/home/\w+/|/Users/|/work/|/tmp/\w)', path.read_text().replace('image/', ''))
    assert not [o for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']


@pytest.mark.parametrize('name', [n for n in names if n.startswith(('findings/', 'runs/'))])
def test_a_finding_takes_parameters_preset_first(name):
    assert list(parameters_of(root/'nbs'/name))[0] == 'preset'


@pytest.mark.parametrize('name', [n for n in names if re.match(r'\d\d[a-z]?_', n)])
def test_the_examples_of_a_library_notebook_run(name):
    run(tool('nbdev_test'), '--path', str(root/'nbs'/name), cwd=root)


def test_the_wheel_stands_alone(tmp_path):
    "Built, installed into an empty environment that lends only the dependencies, imported away from the repository."
    tree = tmp_path/'tree'
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'stores', 'build', '*.egg-info', 'figures', 'tests'))
    shutil.copytree(root/'nbs'/'runs', tree/'nbs'/'runs')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(tmp_path/'dist'), cwd=tree)
    wheel, = (tmp_path/'dist').glob('*.whl')
    venv.create(tmp_path/'venv', with_pip=True)
    python = tmp_path/'venv'/'bin'/'python'
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])', cwd=tmp_path).strip())
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', str(wheel), cwd=tmp_path)
    (site/'lent.pth').write_text(sysconfig.get_paths()['purelib'])
    code = ('import t2ianalysis.training as t, t2ianalysis.data as d; from t2ianalysis.sweeps import notebooks; from t2ianalysis.tokenizers import load_image_tokenizer;'
            'print(t.__file__, d.home(), next(iter(d.load_captions(limit=1)))["caption"], load_image_tokenizer(), list(notebooks()))')
    out = run(python, '-c', code, cwd=tmp_path, T2I_WORK=str(tmp_path))
    assert str(site) in out and 'share/t2ianalysis' in out and 'loss_breakdown' in out
    assert 'finding' in run(tmp_path/'venv'/'bin'/'t2i', '--help', cwd=tmp_path)


def test_the_repository_stays_small():
    if not (root/'.git').exists(): pytest.skip('not a git checkout')
    files = run('git', 'ls-files', '-z', cwd=root).split('\0')
    assert sum((root/f).stat().st_size for f in files if f and (root/f).exists()) < 40e6
