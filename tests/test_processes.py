"Two processes train what one trains."
import json
import os
import subprocess
import sys

import pytest

from t2ianalysis.data import work_path

TRAIN = """
import json, os, sys, torch
torch.set_num_threads(1)
from t2ianalysis.training import make_config, train
folder = train(make_config('smoke', steps=8, eval_every=4, batch=8, **json.loads(sys.argv[1])))
if os.environ.get('RANK', '0') == '0': print(folder, flush=True)
"""


def trained(work, processes, changes):
    "The metrics of a run on so many processes, joined by gloo, as a list of dicts."
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_port', '0', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0'] if processes > 1 else []
    script = work/'train.py'
    script.write_text(TRAIN)
    done = subprocess.run([sys.executable, '-W', 'ignore', *launch, str(script), json.dumps(changes)], capture_output=True, text=True, timeout=400,
                          env=dict(os.environ, T2I_WORK=str(work), ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in next((work/'runs').glob('*/metrics.jsonl')).open()]


@pytest.mark.parametrize('changes', [dict(accumulation=2), dict(trainable='rows')])
def test_two_processes_log_what_one_process_logs(changes, tmp_path):
    works = [tmp_path/'one', tmp_path/'two']
    for work in works:
        work.mkdir()
        if work_path('stores').is_dir(): os.symlink(work_path('stores'), work/'stores')
    one, two = (trained(work, n, changes) for work, n in zip(works, (1, 2), strict=True))
    assert [(line['step'], line['split'], line['tokens']) for line in one] == [(line['step'], line['split'], line['tokens']) for line in two]
    assert len(one) == 8 + 3 and one[0]['total'] - one[-1]['total'] > 0.01                      # it learns, so that equality says something
    for kind in ('total', 'text', 'image', 'special'):
        assert max(abs(a[kind] - b[kind]) for a, b in zip(one, two, strict=True)) < 2e-6, kind   # records are rounded to 1e-6
