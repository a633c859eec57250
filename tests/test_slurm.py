"A sweep on a real Slurm, which is started here on loopback with a configuration of its own and ended after the test."
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pandas as pd
import pytest

from t2ianalysis import jobs
from t2ianalysis.data import BadInput

DAEMONS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scancel')
missing = [name for name in DAEMONS if not shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin')]
pytestmark = [pytest.mark.skipif(bool(missing), reason=f'Slurm is not installed here ({", ".join(missing)}): apt-get install slurmctld slurmd slurm-client munge'),
              pytest.mark.skipif(os.geteuid() != 0, reason='Slurm\'s daemons are started by root only')]

CONF = '''ClusterName=test
SlurmctldHost=localhost
AuthInfo=socket={d}/munge/socket
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES
'''


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "munged, slurmctld and slurmd in the foreground, so that ending them is all there is to clean up."
    d = tmp_path_factory.mktemp('slurm')
    for name in ('munge', 'state', 'spool'): (d/name).mkdir(mode=0o755)
    (d/'slurm.conf').write_text(CONF.format(d=d))
    (d/'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n')
    (d/'key').write_bytes(os.urandom(1024)); (d/'key').chmod(0o400)
    commands = [['munged', '-F', '--force', f'--key-file={d}/key', f'--socket={d}/munge/socket', f'--pid-file={d}/munge/pid', f'--log-file={d}/munge/log', f'--seed-file={d}/munge/seed'],
                ['slurmctld', '-D'], ['slurmd', '-D', '-N', 'localhost']]
    with pytest.MonkeyPatch.context() as m, contextlib.ExitStack() as stack:
        m.setenv('SLURM_CONF', str(d/'slurm.conf')); m.setenv('PATH', f'{os.environ["PATH"]}:/usr/sbin')
        for command in commands:
            process = subprocess.Popen(command, stdout=stack.enter_context(open(d/f'{command[0]}.log', 'w')), stderr=subprocess.STDOUT)
            stack.callback(process.wait); stack.callback(process.kill)
            if command[0] == 'munged': wait_for(lambda: (d/'munge'/'socket').exists(), d)
        stack.callback(subprocess.run, ['scancel', '--me'], timeout=60)          # before the daemons end
        wait_for(lambda: 'idle' in subprocess.run(['sinfo', '--noheader'], capture_output=True, text=True, timeout=60).stdout, d)
        yield d


def wait_for(what, d, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, '\n'.join(f'{f.name}: {f.read_text()[-2000:]}' for f in d.glob('*.log'))
        time.sleep(.1)


def sweep(file, *, options=None, cancel=False):
    "(status, what `--json` says) of `t2i sweep train FILE --slurm`"
    with contextlib.redirect_stdout(io.StringIO()) as out: status = jobs.sweep_command('train', str(file), None, True, dict(time=10) | (options or {}), cancel, False, False, True)
    return status, out.getvalue() if cancel else json.loads(out.getvalue())


def test_a_sweep_on_slurm(slurm, tmp_path, monkeypatch, capfd):
    "Two settings, of which one fails. Ctrl-C ends the command and not the jobs; the same command finds them again."
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    (tmp_path/'s.yaml').write_text('fixed: {preset: smoke, keep: 0}\ngrid: {lr: [5e-4, 1e+9]}')
    folder = tmp_path/'runs'/'smoke'/'sweeps'/'train-s'
    def ctrl_c():
        while not list(folder.glob('jobs/train-*.json')): time.sleep(.05)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=ctrl_c, daemon=True).start()
    status, answer = sweep(tmp_path/'s.yaml')
    assert status == 130 and set(answer['counts']) <= {'waiting', 'training'} and 'The jobs go on in Slurm' in capfd.readouterr().err
    numbers = json.loads((folder/'jobs'/'slurm.json').read_text())
    status, answer = sweep(tmp_path/'s.yaml')
    said, table = capfd.readouterr().err, pd.read_csv(folder/'summary.csv')
    assert status == 1 and answer['counts'] == dict(done=1, failed=1) and json.loads((folder/'jobs'/'slurm.json').read_text()) == numbers, said
    assert len(set(numbers.values())) == 2 and len({n.split('_')[0] for n in numbers.values()}) == 1  # one array
    assert list(table.state) == ['done', 'failed'] and table.total[0] > 1 and 'try a lower lr' in table.error[1]
    assert 'Diverged' in (folder.parent/table.notebook[1]).read_text() and table.notebook[1].endswith('.failed.ipynb') and (folder/'index.html').exists()
    (tmp_path/'log.txt').write_text(said)


def test_jobs_are_cancelled_and_what_slurm_refuses_is_said(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv('T2I_WORK', str(tmp_path))
    (tmp_path/'s.yaml').write_text('fixed: {preset: smoke, keep: 0}\ngrid: {lr: [1e-3, 2e-3]}')
    for options, words in ((dict(partition='nowhere'), 'Slurm refused the jobs .*partition'), (dict(partitoin='main'), "Did you mean 'partition'")):
        with pytest.raises(BadInput, match=words): sweep(tmp_path/'s.yaml', options=options)
    settings = jobs.plan_sweep('train', *jobs.read_sweep(tmp_path/'s.yaml'))
    place = jobs.sweep_folder(settings, 's.yaml')/'jobs'
    jobs.Slurm(place, dict(additional_parameters=dict(hold=True))).start(settings)  # wait in the queue
    assert sweep(tmp_path/'s.yaml', cancel=True) == (0, '2 jobs cancelled\n')
    wait_for(lambda: not jobs._queue(), slurm)
    assert jobs.Slurm(place).jobs == {}
    (tmp_path/'squeue').write_text('#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1'); (tmp_path/'squeue').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    with pytest.raises(BadInput, match='Slurm does not answer .*Unable to contact'): jobs._queue()
