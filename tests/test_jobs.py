"Jobs: the same adapters whoever computes them, in whatever order, and whatever happens on the way"
import os, shutil, signal, subprocess, sys, tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
# as `run_jobs` sets it, before anybody imports Ray: the loopback interface alone
os.environ.setdefault('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER', '0')

import psutil, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError
import hydramoe.experts.jobs as experts_jobs
import hydramoe.experts.stages as stages
import hydramoe.experts.train as train
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json, read_jsonl, write_jsonl
from hydramoe.experts.train import using_threads
from hydramoe.experts.jobs import deal_experts, make_jobs, run_jobs
from hydramoe.experts.stages import collect_experts_stage, sort_rows, train_experts_stage
from hydramoe.foundations.store import open_sealed, sealing, stage
from helpers import alive, wait_for
from training import (
    EXPERTS, ROWS, SPEC, Stop, far, flipped, fresh, job_of, letter_row, missing, stop_at, trained, truncated)

JOB = job_of(steps=24)

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp('rows')
    recs = [letter_row(i, 'abcd'[min(i%5, 3)], 'abcd'[i%4]) for i in range(40)]
    with sealing(root/'data', {}) as d: write_jsonl(d/'train.jsonl', recs)
    return root/'data'

def jobs(rows, root, size=2, make=train_experts_stage, **more):
    groups = sort_rows(read_jsonl(rows/'train.jsonl'))
    return make_jobs(make, groups, size, dict(JOB, **more), dict(rows_dir=rows), root=root)

def sealed_files(made): return [open_sealed(m)['files'] for m in made]

@pytest.fixture(scope='module')
def whole(rows, tmp_path_factory): return sealed_files(run_jobs(jobs(rows, tmp_path_factory.mktemp('whole'))))

@pytest.mark.parametrize('threads', [2, 3])
def test_bits_do_not_hang_on_the_callers_threads(threads, rows, tmp_path, whole):
    with using_threads(threads):
        assert sealed_files(run_jobs(jobs(rows, tmp_path)))==whole
        assert torch.get_num_threads()==threads

def test_threads_are_part_of_the_key(rows, tmp_path):
    one, two = (stage(train_experts_stage, dict(JOB, threads=n), dict(rows_dir=rows), root=tmp_path) for n in (1, 2))
    assert one!=two

def test_order_of_jobs_and_names_does_not_matter(rows, tmp_path, whole):
    turned = dict(reversed(sort_rows(read_jsonl(rows/'train.jsonl')).items()))
    turned_jobs = make_jobs(train_experts_stage, turned, 2, JOB, dict(rows_dir=rows), root=tmp_path)[::-1]
    made = run_jobs(turned_jobs)[::-1]
    assert sealed_files(made)==whole
    groups = {n: [r['id'] for r in turned[n]] for n in ('d', 'a')}
    with sealing(tmp_path/'x', {}) as a: train_experts_stage(a, rows_dir=rows, groups=groups, **JOB)
    turned_groups = dict(reversed(groups.items()))
    with sealing(tmp_path/'y', {}) as a: train_experts_stage(a, rows_dir=rows, groups=turned_groups, **JOB)
    assert sealed_files([tmp_path/'x'])==sealed_files([tmp_path/'y'])

SIZES = st.dictionaries(st.text('abcdef', min_size=1, max_size=4), st.integers(1, 500), min_size=1, max_size=40)

@given(rows=SIZES, size=st.integers(1, 12), r=st.randoms())
def test_dealing(rows, size, r):
    groups, turned = deal_experts(rows, size), list(rows.items())
    r.shuffle(turned)
    assert sorted(sum(groups, []))==sorted(rows)
    assert max(map(len, groups))<=size
    assert len(groups)==-(-len(rows)//size)
    assert max(map(len, groups))-min(map(len, groups))<=1
    assert deal_experts(dict(turned), size)==groups
    lengths = [sum(rows[n] for n in g) for g in groups]
    assert max(lengths)-min(lengths)<=max(rows.values())

def test_collected_jobs_look_like_one(rows, tmp_path):
    parts = run_jobs(jobs(rows, tmp_path))
    out = stage(collect_experts_stage, {}, {f'p{i}': p for i,p in enumerate(parts)}, root=tmp_path)
    one = stage(train_experts_stage, JOB, dict(rows_dir=rows), root=tmp_path)
    a, b = read_json(out/'history.json'), read_json(one/'history.json')
    assert sorted(a['experts'])==sorted(b['experts'])
    assert a.keys()==b.keys()
    assert a['history'][0].keys()==b['history'][0].keys()
    assert {p.name for p in out.iterdir()}=={p.name for p in one.iterdir()}
    for p in parts:
        for f,sha in open_sealed(p)['files'].items(): assert f=='history.json' or open_sealed(out)['files'][f]==sha

def mortal_experts(out, mark, sig, at, **kw):
    "`train_experts_stage` in a process that gets a signal before its step `at`, the first time"
    inner = train.fit_step
    def step(model, opt, step, k, names, cached=None):
        if k==at and 'a' in names and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), sig)
        return inner(model, opt, step, k, names, cached)
    train.fit_step = step
    try: return train_experts_stage(out, **kw)
    finally: train.fit_step = inner

def doomed(out, **kw):
    "A job whose process always dies"
    os.kill(os.getpid(), signal.SIGKILL)

def mortal(rows, root, sig=signal.SIGKILL, at=13):
    return jobs(rows, root, make=mortal_experts, mark=str(root/'mark'), sig=int(sig), at=at)

KILLS = [(signal.SIGKILL, 13), pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
         pytest.param(signal.SIGTERM, 13, marks=pytest.mark.slow)]

@pytest.mark.parametrize('sig,at', KILLS)
def test_a_killed_local_worker_changes_nothing(sig, at, rows, tmp_path, whole):
    with pytest.warns(UserWarning, match='worker was killed'):
        made = run_jobs(mortal(rows, tmp_path, sig, at), 'local', workers=2)
    assert (tmp_path/'mark').exists()
    assert sealed_files(made)==whole

@pytest.mark.slow
def test_a_job_that_always_dies_is_given_up(rows, tmp_path):
    with pytest.warns(UserWarning), pytest.raises(HydraError, match='killed 2 times'):
        run_jobs(jobs(rows, tmp_path, 4, doomed), 'local', retries=1)

PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_jobs import JOB, jobs, run_jobs
if __name__=='__main__':
    made = jobs(Path(sys.argv[2]), Path(sys.argv[3]), spec=dict(JOB['spec'], epochs=300))
    run_jobs(made, 'local', workers=2)
"""

def parent_of(process):
    "The id of the parent of a process, which is a folder of /proc"
    return (process/'stat').read_text().rsplit(')', 1)[1].split()[1]

@pytest.mark.slow
def test_workers_end_with_their_parent(rows, tmp_path):
    "Killed with -9, the parent leaves nobody behind; the workers have kept their step"
    script = tmp_path/'parent.py'
    script.write_text(PARENT)
    root = tmp_path/'out'
    command = [sys.executable, str(script), str(Path(__file__).parent), str(rows), str(root)]
    p = subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1'))
    wait_for(lambda: len({s.parent for s in root.glob('.work-*/step-*')})==2, 300)
    processes = (x for x in Path('/proc').iterdir() if x.name.isdigit())
    workers = [int(x.name) for x in processes if (x/'stat').exists() and parent_of(x)==str(p.pid)]
    p.kill()
    p.wait()
    assert len(workers)>=2
    wait_for(lambda: not any(map(alive, workers)), 300)
    assert not list(root.glob('train_experts_stage-*'))

@pytest.mark.slow
def test_errors_of_a_job_come_back(rows, tmp_path):
    sick = [partial(j, ) for j in jobs(rows, tmp_path, lora=dict(rank=0))]
    with pytest.raises(HydraError, match='rank=0'): run_jobs(sick, 'local')
    ray = pytest.importorskip('ray')
    with pytest.raises(HydraError, match='rank=0'): run_jobs(sick, 'ray', workers=1)
    assert not ray.is_initialized()

ONE_JOB = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_jobs import jobs, run_jobs, train
what, rows, root = sys.argv[2:]
inner = train.fit_step
def step(model, opt, s, k, names, cached=None):
    if k==int(os.environ.get('AT', -1)): exec(what)
    return inner(model, opt, s, k, names, cached)
train.fit_step = step
run_jobs(jobs(Path(rows), Path(root))[:1])
"""

def run_one_job(what, rows, root, at=-1):
    env = dict(os.environ, AT=str(at), OMP_NUM_THREADS='1', HYDRAMOE_QUIET='1')
    command = [sys.executable, '-c', ONE_JOB, str(Path(__file__).parent), what, str(rows), str(root)]
    return subprocess.run(command, env=env, capture_output=True, text=True)

ENDS = [13, pytest.param(0, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]

@pytest.mark.parametrize('at', ENDS)
def test_sigterm_keeps_the_step_and_ends(at, rows, tmp_path, whole):
    r = run_one_job('os.kill(os.getpid(), signal.SIGTERM)', rows, tmp_path, at)
    assert r.returncode==128+signal.SIGTERM, r.stderr
    last = max(tmp_path.glob('.work-*/step-*'))
    assert last.name==f'step-{at+1:06d}'
    assert (last/'seal.json').exists()
    assert sealed_files(run_jobs(jobs(rows, tmp_path)))==whole

def test_sigterm_is_given_back():
    was = signal.getsignal(signal.SIGTERM)
    trained(replace(SPEC, epochs=1))
    assert signal.getsignal(signal.SIGTERM)==was

def test_files_may_not_grow(rows, tmp_path, whole):
    "A real limit, met in the middle of writing a checkpoint"
    r = run_one_job('resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))', rows, tmp_path, 5)
    assert r.returncode==1, r.stderr
    assert 'File too large' in r.stderr, r.stderr
    assert 'could not be made' in r.stderr, r.stderr
    assert not list(tmp_path.glob('.work-*/step-*'))
    assert not list(tmp_path.glob('train_experts_stage-*'))
    assert sealed_files(run_jobs(jobs(rows, tmp_path)))==whole

def full_disk(monkeypatch, k):
    inner, calls = train.save_file, []
    def save(*a, **kw):
        calls.append(0)
        if len(calls)==k:
            raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
        return inner(*a, **kw)
    monkeypatch.setattr(train, 'save_file', save)

@pytest.mark.parametrize('k', [1, 2, 5])
def test_disk_full_at_a_checkpoint(k, tmp_path, monkeypatch):
    clean, history = trained()
    with monkeypatch.context() as m:
        full_disk(m, k)
        with pytest.raises(HydraError, match='No space left on device.*untouched'): trained(work=tmp_path, every=2)
    assert sorted(p.name for p in tmp_path.iterdir())==[f'step-{2*i:06d}' for i in range(max(1, k-2), k)]
    again, resumed = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, clean.stack.theta)
    assert resumed==history

@contextmanager
def nobody():
    "Without root's right to write anywhere"
    root = os.geteuid()==0
    if root: os.seteuid(65534)
    try: yield
    finally: root and os.seteuid(0)

def test_read_only_directory(monkeypatch):
    clean, history = trained()
    work = Path(tempfile.mkdtemp())
    try:
        with monkeypatch.context() as m:
            stop_at(m, 5)
            with pytest.raises(Stop): trained(work=work, every=2)
        for p in [work, *work.rglob('*')]: p.chmod(0o555 if p.is_dir() else 0o444)
        with nobody(), pytest.raises(HydraError, match='step-0000.*could not be made.*[Pp]ermission'):
            trained(work=work, every=2)
        for p in [work, *work.rglob('*')]: p.chmod(0o755 if p.is_dir() else 0o644)
        again, resumed = trained(work=work, every=2)
        assert torch.equal(again.stack.theta, clean.stack.theta)
        assert resumed==history
    finally: shutil.rmtree(work)

QUICK = replace(SPEC, epochs=1)

def one_bit(file, at):
    "Flip one bit, so far into a file"
    b = bytearray(file.read_bytes())
    b[int(at*len(b))] ^= 1 << int(at*8)
    file.write_bytes(bytes(b))

KEPT = st.sampled_from(['state.safetensors', 'history.json', 'seal.json'])
HARM = st.sampled_from([missing, truncated, flipped, 'bit'])

@settings(max_examples=12, deadline=None)
@given(k=st.integers(3, 7), file=KEPT, harm=HARM, at=st.floats(0, 1, exclude_max=True))
def test_any_harm_to_any_file_at_any_step(k, file, harm, at):
    "Refused by name; the checkpoint before it is used, or the start; the same bits in the end"
    clean, history = trained(QUICK)
    with tempfile.TemporaryDirectory() as work, pytest.MonkeyPatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): trained(QUICK, work=work, every=1)
        m.undo()
        last = Path(work)/f'step-{k:06d}'
        if harm=='bit': one_bit(last/file, at)
        else: harm(last/file)
        says = f'checkpoint refused.*step-{k:06d}(/| has no ){file}'.replace('.', '[.]').replace('[.]*', '.*')
        with pytest.warns(UserWarning, match=says): again, resumed = trained(QUICK, work=work, every=1)
    assert torch.equal(again.stack.theta, clean.stack.theta)
    assert resumed==history

@pytest.fixture
def tests_importable(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), *sys.path]))

@pytest.mark.slow
def test_two_ray_nodes_and_a_killed_worker(rows, tmp_path, whole, tests_importable):
    ray = pytest.importorskip('ray')
    from ray.cluster_utils import Cluster
    head = dict(num_cpus=1, node_ip_address='127.0.0.1', include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, node_ip_address='127.0.0.1')
        ray.init(cluster.address, _node_ip_address='127.0.0.1', log_to_driver=False)
        assert len([n for n in ray.nodes() if n['Alive']])==2
        assert sealed_files(run_jobs(jobs(rows, tmp_path/'calm'), 'ray'))==whole
        assert sealed_files(run_jobs(mortal(rows, tmp_path), 'ray'))==whole
        assert (tmp_path/'mark').exists()
        assert ray.is_initialized(), 'a cluster that we did not start stays up'
    finally:
        ray.shutdown()
        cluster.shutdown()

@pytest.mark.slow
def test_ray_shares_a_gpu_and_gives_up(rows, tmp_path, whole, tests_importable):
    ray = pytest.importorskip('ray')
    here = dict(_node_ip_address='127.0.0.1', include_dashboard=False, log_to_driver=False)
    ray.init('local', num_cpus=2, num_gpus=1, **here) # the GPU is Ray's word only
    try:
        assert sealed_files(run_jobs(jobs(rows, tmp_path), 'ray', gpus=.5))==whole
        with pytest.raises(HydraError, match='killed 1 times'):
            run_jobs(jobs(rows, tmp_path, 4, doomed), 'ray', retries=0)
    finally: ray.shutdown()

@pytest.mark.slow
def test_ray_of_our_own_listens_to_this_machine_only(rows, tmp_path, whole):
    pytest.importorskip('ray')
    assert sealed_files(run_jobs(jobs(rows, tmp_path), 'ray', workers=2))==whole
    ray = experts_jobs._import_ray(None)
    experts_jobs._start_ray(ray, 2, None)
    try:
        connections = [c for p in psutil.Process().children(recursive=True) for c in p.net_connections('inet')]
        open_to = [c.laddr.ip for c in connections if c.status=='LISTEN']
        assert len(open_to)>3
        assert set(open_to)<={'127.0.0.1', '::1', '::ffff:127.0.0.1'}
    finally: ray.shutdown()

@pytest.mark.slow
def test_a_ray_that_would_listen_to_the_network_is_refused():
    pytest.importorskip('ray')
    code = "import ray; from hydramoe.experts.jobs import run_jobs; run_jobs([print], 'ray')"
    env = {k: v for k,v in os.environ.items() if k!='RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'}
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert r.returncode==1, r.stderr
    assert 'would listen to the network' in r.stderr, r.stderr

def _sharded(rank, world, folder):
    "One of two processes that share a base; in a process of its own"
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    model = experts_jobs.shard(fresh())
    blocks = [p for m in model.base.model.layers for p in m.parameters()]
    assert blocks
    assert all(isinstance(p, DTensor) for p in blocks)
    held, whole = sum(p.to_local().numel() for p in blocks), sum(p.numel() for p in blocks)
    assert held<=whole/world+len(blocks), 'each process holds its share of the blocks, and no more'
    assert not any(isinstance(x, DTensor) for x in (model.stack.theta, model.stack.grad))
    history = train.fit(model, ROWS, replace(SPEC, micro_tokens=200), names=EXPERTS, work=Path(folder)/'work', every=5)
    after = [p for m in model.base.model.layers for p in m.parameters()]
    assert all(isinstance(p, DTensor) for p in after), 'and gives back what it gathered'
    torch.save(dict(theta=model.stack.theta, loss=[h['loss'] for h in history]), Path(folder)/f'{rank}.pt')
    dist.destroy_process_group()

@pytest.mark.slow
def test_a_sharded_base_trains_the_same_adapters(tmp_path, tests_importable):
    alone, history = trained(replace(SPEC, micro_tokens=200))
    torch.multiprocessing.spawn(_sharded, (2, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path/f'{r}.pt') for r in (0, 1))
    assert torch.equal(a['theta'], b['theta'])
    assert a['loss']==b['loss']
    start = fresh().stack.theta
    assert far(a['theta'], alone.stack.theta, start)<1e-3
    for x,h in zip(a['loss'], history): assert x==pytest.approx(h['loss'], rel=1e-4)
    assert len(list((tmp_path/'work').glob('step-*')))==2

TRAIN_GROUP = stages.train_group

def _whose_base(out, data, setup):
    "`train_group`, after a look at how the base lies in this process"
    from torch.distributed.tensor import DTensor
    inner = stages.fit
    def fit(model, *a, **kw):
        blocks = [p for m in model.base.model.layers for p in m.parameters()]
        if not all(isinstance(p, DTensor) for p in blocks): raise HydraError('the base is whole')
        held, whole = sum(p.to_local().numel() for p in blocks), sum(p.numel() for p in blocks)
        if held>.6*whole: raise HydraError('the base is whole')
        return inner(model, *a, **kw)
    stages.fit = fit
    TRAIN_GROUP(out, data, setup)

@pytest.mark.slow
def test_experts_on_a_base_shared_by_processes(rows, tmp_path, whole, tests_importable, monkeypatch):
    "`shards=2`: slices of the base in each process, one set of files, the same experts within the rounding of sums"
    from safetensors.torch import load_file
    one = stage(train_experts_stage, JOB, dict(rows_dir=rows), root=tmp_path)
    shared = dict(JOB, shards=2)
    two = stage(train_experts_stage, shared, dict(rows_dir=rows), root=tmp_path)
    assert open_sealed(one)['files'].keys()==open_sealed(two)['files'].keys()
    again = stage(train_experts_stage, shared, dict(rows_dir=rows), root=tmp_path/'again')
    assert open_sealed(again)['files']==open_sealed(two)['files']
    for n in 'abcd':
        a, b = (load_file(d/n/'adapter_model.safetensors') for d in (one, two))
        for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-3, rtol=1e-2)
    monkeypatch.setattr(stages, 'train_group', _whose_base)
    with sealing(tmp_path/'looked', {}) as out: train_experts_stage(out, rows_dir=rows, shards=2, **JOB)
    assert open_sealed(tmp_path/'looked')['files']==open_sealed(two)['files']
    no_trunk = dict(lora=dict(rank=4, fork=.5), cached=True)
    refused = [(dict(lora=dict(rank=0)), 'rank=0'), (dict(quant='nf4'), 'NF4'),
               (no_trunk, 'processes failed.*keeps no trunk')]
    for bad, says in refused:
        with pytest.raises(HydraError, match=says):
            train_experts_stage(tmp_path/'x', rows_dir=rows, **dict(JOB, shards=2, **bad))
