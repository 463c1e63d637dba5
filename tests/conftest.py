"What holds for all tests: one thread, and hypothesis draws the same examples in every run."
import os, subprocess, sys

import hydramoe # noqa: F401, sets OMP_WAIT_POLICY before torch is imported

os.environ.setdefault('OMP_NUM_THREADS', '1') # what they hold is small, and a second thread that waits for its core costs more than it brings

import pytest # noqa: E402
from hypothesis import settings # noqa: E402

settings.register_profile('same', derandomize=True)
settings.register_profile('search', max_examples=2000, deadline=None) # HYPOTHESIS_PROFILE=search looks for new ones
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))

@pytest.fixture
def in_two_processes(tmp_path):
    "Code that fills the folder sys.argv[1], run under two values of PYTHONHASHSEED: the bytes of its files, by name, twice"
    def run(code):
        outs = []
        for seed in ('1', '2'):
            out = tmp_path/seed; out.mkdir()
            subprocess.run([sys.executable, '-c', code, str(out)], env=os.environ | dict(PYTHONHASHSEED=seed), check=True)
            outs.append({p.name: p.read_bytes() for p in out.iterdir()})
        return outs
    return run
