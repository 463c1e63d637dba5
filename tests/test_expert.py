"Fused training against TRL, against itself alone, and against accidents"
import json, os, shutil, signal, subprocess, sys, warnings
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pytest, torch
from hydramoe.experts import train as expert
from hydramoe.models.base import tiny_base
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import read_json, write_jsonl
from hydramoe.models.encode import Example
from hydramoe.experts.train import TrainSpec, cache_trunk, fit, fit_trl, gradients, plan_steps, start_expert, train_experts, train_seed
from hydramoe.experts.stack import LoraSpec, gated, one_hot
from hydramoe.foundations.store import open_sealed, sealing, stage

NAMES, LORA = ['large', 'middle', 'small'], LoraSpec(rank=4)
SPEC = TrainSpec(lr=3e-3, rows=2., epochs=2, clip=.5)

def examples(name, n):
    g = rng(0, name)
    def one(i):
        s = int(g.integers(4, 40))
        return Example(ids=g.integers(3, 259, s).tolist(), n_prompt=int(g.integers(1, s-1)), id=f'{name}{i}', domain=name)
    return [one(i) for i in range(n)]

ROWS = [examples('large', 30), examples('middle', 11), examples('small', 4)]

def fresh(names=NAMES, quant='fp32', lora=LORA):
    model = gated(tiny_base(quant=quant), slots=len(names), spec=lora)
    for e,n in enumerate(names): model.stack.init_expert(e, 0, n)
    model.stack.trainable()
    return model

def trained(spec=SPEC, rows=ROWS, names=NAMES, **kw):
    model = fresh(names)
    return model, fit(model, rows, spec, names=names, **kw)

def far(a, b, start): return ((a-b).norm()/(a-start).norm()).item() # error relative to the way covered

@pytest.mark.parametrize('spec', [SPEC, replace(SPEC, schedule='constant', clip=100.), replace(SPEC, micro_tokens=60)], ids=['linear', 'constant', 'micro'])
def test_fused_equals_trl_one_by_one(spec, tmp_path):
    "Unequal sizes, and experts that are absent from some steps: the same adapters as TRL + PEFT make of the same batches"
    model = fresh(); start = model.stack.theta.clone()
    for e,n in enumerate(NAMES): model.stack.save_peft(tmp_path/'start'/n, e, 'tiny')
    history = fit(model, ROWS, spec, names=NAMES)
    steps = plan_steps(ROWS, NAMES, spec)
    absent = [sum(not any(f==e for f,_ in s) for s in steps) for e in range(3)]
    assert absent[2] >= 7 and absent[0]==0
    theirs = fresh()
    for e,n in enumerate(NAMES):
        batches = [b for s in steps if (b := [x for f,x in s if f==e])]
        losses = fit_trl(tiny_base(), batches, tmp_path/'start'/n, tmp_path/'trl'/n, spec)
        np.testing.assert_allclose([h['loss'][n] for h in history if n in h['loss']], losses, rtol=2e-4)
        theirs.stack.load_peft(tmp_path/'trl'/n, e, n)
        assert far(model.stack.theta[e], theirs.stack.theta[e], start[e]) < 1e-3
        assert (model.stack.theta[e]-start[e]).abs().max() > 1e-2

def test_alone_equals_together():
    model, history = trained()
    for e,n in enumerate(NAMES):
        alone, _ = trained(replace(SPEC, steps=len(history), rows=1000), [ROWS[e]], [n])
        assert far(alone.stack.theta[0], model.stack.theta[e], fresh([n]).stack.theta[0]) < 1e-3

def test_order_of_experts_does_not_matter():
    model, _ = trained()
    turned, _ = trained(rows=ROWS[::-1], names=NAMES[::-1])
    assert far(turned.stack.theta.flip(0), model.stack.theta, fresh().stack.theta) < 1e-3

def test_micro_batches_do_not_matter():
    one, _ = trained(replace(SPEC, micro_tokens=1))
    many, _ = trained(replace(SPEC, micro_tokens=10**6))
    assert far(one.stack.theta, many.stack.theta, fresh().stack.theta) < 1e-3

@pytest.mark.parametrize('seed', range(20))
def test_passes_hold_every_row_once_and_no_more_than_they_may(seed):
    g = rng(seed, 'pack')
    who, n = g.integers(0, 5, int(g.integers(1, 30))).tolist(), int(g.integers(1, 4))
    lengths, most = g.integers(2, 300, len(who)).tolist(), int(g.integers(50, 900))
    passes = expert.pack(who, lengths, most, n)
    tokens = [sum(lengths[i] for i in b) for b in passes]
    assert sorted(sum(passes, []))==list(range(len(who))) and all(t<=most or len(b)==1 for t,b in zip(tokens, passes))
    assert all([who[i] for i in b]==sorted(who[i] for i in b) for b in passes)
    assert expert.pack(who, lengths, most, n)==passes

def test_an_expert_stays_in_one_pass_where_it_fits():
    passes = expert.pack([0,0,1,1,2,2,3,3], [50,50,60,40,30,70,20,80], 200, 2)
    assert [len(b) for b in passes]==[4,4]
    assert all(i^1 in b for b in passes for i in b)

def test_a_base_that_mixes_rows_trains_them_one_by_one(monkeypatch):
    import hydramoe.experts.stack as hs
    whole, _ = trained()
    seen, losses = [], expert.token_losses
    monkeypatch.setattr(hs, '_apart', lambda model: False)
    monkeypatch.setattr(expert, 'token_losses', lambda model, xs, **kw: seen.append(len(xs)) or losses(model, xs, **kw))
    alone, _ = trained()
    assert set(seen)=={1} and far(alone.stack.theta, whole.stack.theta, fresh().stack.theta) < 1e-3

@pytest.mark.parametrize('how', ['plain', 'checkpointing', 'fork', 'nf4'])
def test_lanes_differ_by_rounding_and_never_from_themselves(how, tmp_path, monkeypatch):
    "Passes side by side, each thread with gradients of its own: what one thread makes of them, and the same bits every time"
    lora, spec, used = LoraSpec(rank=4, fork=.5) if how=='fork' else LORA, replace(SPEC, epochs=1, micro_tokens=120), []
    deal = expert.in_lanes
    monkeypatch.setattr(expert, 'LANE', 40)
    monkeypatch.setattr(expert, 'in_lanes', lambda *a: used.append(deal(*a)) or used[-1])
    def run(threads):
        model = fresh(lora=lora, quant='nf4' if how=='nf4' else 'fp32')
        states = cached(model, tmp_path) if how=='fork' else None
        with expert.using_threads(threads): history = fit(model, ROWS, spec, names=NAMES, checkpointing=how=='checkpointing', cached=states)
        return model.stack.theta.clone(), history, max(map(len, used[-len(history):]))
    (one, h1, n1), (two, h2, n2), (again, h3, _), (three, _, n3) = [run(n) for n in (1, 2, 2, 3)]
    assert (n1, n2, n3)==(1, 2, 3) and torch.equal(two, again) and h2==h3
    for x in (two, three): assert far(x, one, fresh(lora=lora).stack.theta) < (5e-2 if how=='nf4' else 1e-3)
    np.testing.assert_allclose([h['loss']['large'] for h in h1], [h['loss']['large'] for h in h2], rtol=2e-2 if how=='nf4' else 2e-4)

def test_a_lane_that_fails_is_heard(monkeypatch):
    def broken(*a, **kw): raise HydraError('out of order')
    monkeypatch.setattr(expert, 'token_losses', broken)
    with expert.using_threads(2):
        with pytest.raises(HydraError, match='out of order'): fit(fresh(), ROWS, SPEC, names=NAMES)
        assert torch.get_num_threads()==2

def test_twice_the_same_bits():
    (a, ha), (b, hb) = trained(), trained()
    assert torch.equal(a.stack.theta, b.stack.theta) and ha==hb

@pytest.mark.parametrize('quant', ['fp32', 'nf4'])
def test_checkpointing_on_and_off_agree(quant):
    out = []
    for on in (False, True):
        model = fresh(quant=quant)
        fit(model, ROWS, SPEC, checkpointing=on)
        out.append(model.stack.theta.clone())
        assert not any(m.training for m in model.base.modules() if hasattr(m, 'gradient_checkpointing'))
    assert torch.isfinite(out[0]).all() and far(*out, fresh(quant=quant).stack.theta) < 1e-4

@pytest.mark.parametrize('poison', ['weights', 'gradient'])
def test_nan_in_one_leaves_the_others_bit_equal(poison, monkeypatch):
    clean, _ = trained()
    model = fresh()
    if poison=='weights': model.stack.theta[1,5] = torch.nan
    else:
        def sick(model, step, spec, cached=None, inner=gradients):
            loss = inner(model, step, spec, cached); model.stack.grad[1,3] = torch.inf; return loss
        monkeypatch.setattr(expert, 'gradients', sick)
    start = model.stack.theta[1].clone()
    with pytest.warns(UserWarning, match="'middle' is not finite"): history = fit(model, ROWS, SPEC)
    assert torch.equal(model.stack.theta[[0,2]], clean.stack.theta[[0,2]])
    assert torch.equal(model.stack.theta[1].nan_to_num(9.), start.nan_to_num(9.))
    assert all(h['skipped']==(['middle'] if 'middle' in h['loss'] else []) for h in history)
    json.dumps(history, allow_nan=False)

def test_one_bad_step_is_skipped_and_forgotten(monkeypatch):
    "A single overflow costs the expert that step, and nothing else"
    def sick(model, step, spec, cached=None, inner=gradients, calls=[]):
        loss = inner(model, step, spec, cached); calls.append(0)
        if len(calls)==3: model.stack.grad[0] = torch.inf
        return loss
    monkeypatch.setattr(expert, 'gradients', sick)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model, history = trained()
    assert len([w for w in said if 'large' in str(w.message)])==1 and history[2]['skipped']==['large']
    assert torch.isfinite(model.stack.theta).all() and history[-1]['skipped']==[]

def test_steps_that_were_skipped_are_counted_in_the_history(tmp_path):
    "One that learnt nothing is on record, and one whose numbers nobody can compute with is not written"
    rows, how = write_rows(tmp_path/'rows'), dict(base='tiny', quant='fp32', lora=dict(rank=4))
    with warnings.catch_warnings(action='ignore'):
        train_seed(tmp_path/'lost', rows_dir=rows, **how, spec=dict(lr=1e30, steps=9))
        lost = read_json(tmp_path/'lost'/'history.json')
        train_experts(tmp_path/'all', rows_dir=rows, start=tmp_path/'lost', **how, spec=dict(lr=1e-4, steps=9))
        with pytest.raises(HydraError, match="expert 'seed'.*lower the learning rate"): train_seed(tmp_path/'gone', rows_dir=rows, **how, spec=dict(lr=3e38, steps=9))
    assert lost['experts']['seed']['steps']-1==lost['experts']['seed']['skipped']==sum('seed' in h['skipped'] for h in lost['history'])
    assert all(e['skipped']==e['steps']>0 for e in read_json(tmp_path/'all'/'history.json')['experts'].values())
    assert not (tmp_path/'gone'/'seed').exists()

class Stop(Exception): pass

def stop_at(monkeypatch, k):
    inner = expert.fit_step
    def step(model, opt, step, i, names, cached=None):
        if i==k: raise Stop
        return inner(model, opt, step, i, names, cached)
    monkeypatch.setattr(expert, 'fit_step', step)

@pytest.mark.parametrize('k', [0, 1, 5, 9, 14])
def test_resume_is_bit_equal(k, tmp_path, monkeypatch):
    whole, history = trained()
    with monkeypatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    again, resumed = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta) and resumed==history

def missing(p): p.unlink()
def truncated(p): p.write_bytes(p.read_bytes()[:-9])
def flipped(p): b = bytearray(p.read_bytes()); b[len(b)//2] ^= 1; p.write_bytes(bytes(b))

@pytest.mark.parametrize('harm', [missing, truncated, flipped])
@pytest.mark.parametrize('file', ['state.safetensors', 'history.json', 'seal.json'])
def test_a_damaged_checkpoint_is_refused_by_name(harm, file, tmp_path, monkeypatch):
    whole, history = trained()
    with monkeypatch.context() as m:
        stop_at(m, 9)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    assert sorted(p.name for p in tmp_path.glob('step-*'))==['step-000006', 'step-000008']
    harm(tmp_path/'step-000008'/file)
    with pytest.warns(UserWarning, match='checkpoint refused.*step-000008'): again, resumed = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta) and resumed==history

def test_all_checkpoints_damaged_begins_again(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 9)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    for p in tmp_path.glob('step-*'): missing(p/'state.safetensors')
    with pytest.warns(UserWarning): again, _ = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, trained()[0].stack.theta)

@pytest.mark.parametrize('other', [dict(spec=replace(SPEC, lr=1e-3)), dict(rows=[r[1:] for r in ROWS]), dict(names=['a', 'b', 'c'])])
def test_a_checkpoint_of_another_run_is_refused(other, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 5)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    with pytest.raises(HydraError, match='step-000004'): trained(work=tmp_path, **other)

def write_rows(path, n=40):
    rows = [dict(id=f'r{i}', domain='abc'[i%3], source='test', license='CC0', prompt=[dict(role='user', content=f'question {i}')],
                 completion=[dict(role='assistant', content='abc'[i%3]*(3+i%7))]) for i in range(n)]
    path.mkdir(parents=True); write_jsonl(path/'train.jsonl', rows)
    return path

JOB = dict(base='tiny', quant='fp32', lora=asdict(LORA), spec=asdict(replace(SPEC, steps=30)))

CHILD = """
import json, os, signal, sys
from pathlib import Path
from hydramoe.experts import train as expert
from hydramoe.foundations.store import sealing
where, at, rows, root = sys.argv[1:]
inner, calls = getattr(expert, where), []
def dying(*args, **kw):
    calls.append(0)
    if len(calls)==int(at): os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kw)
setattr(expert, where, dying)
with sealing(Path(root)/'target', {}) as out: expert.train_experts(out, rows_dir=rows, **json.loads(os.environ['JOB']))
"""

def child(where, at, rows, root):
    env = dict(os.environ, JOB=json.dumps(JOB), OMP_NUM_THREADS='1', HYDRAMOE_QUIET='1')
    return subprocess.run([sys.executable, '-c', CHILD, where, str(at), str(rows), str(root)], env=env, capture_output=True, text=True)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp('whole'); rows = write_rows(root/'rows')
    r = child('fit_step', 10**9, rows, root)
    assert r.returncode==0, r.stderr
    return open_sealed(root/'target')['files'], rows

@pytest.mark.parametrize('where,at', [pytest.param('fit_step', 1, marks=pytest.mark.slow), ('fit_step', 27), ('save_file', 2), pytest.param('write_json', 2, marks=pytest.mark.slow)])
def test_kill_9_and_again(where, at, tmp_path, whole):
    "Killed in a step, or in the middle of writing a checkpoint, and run again: the same sealed files"
    files, rows = whole
    assert child(where, at, rows, tmp_path).returncode==-signal.SIGKILL
    assert not (tmp_path/'target').exists()
    r = child('fit_step', 10**9, rows, tmp_path)
    assert r.returncode==0, r.stderr
    assert open_sealed(tmp_path/'target')['files']==files
    assert [p.name for p in tmp_path.iterdir()]==['target']

def test_stages_from_records_to_adapters(tmp_path):
    rows = write_rows(tmp_path/'rows')
    with_seed = dict(JOB, spec=asdict(replace(SPEC, steps=6)))
    seed = stage(train_seed, with_seed, dict(rows_dir=seal_rows(rows, tmp_path)), root=tmp_path)
    experts = stage(train_experts, with_seed, dict(rows_dir=seal_rows(rows, tmp_path), start=seed), root=tmp_path)
    assert sorted(p.name for p in experts.iterdir())==['a', 'b', 'c', 'history.json', 'seal.json']
    h = read_json(experts/'history.json')
    assert set(h['experts'])=={'a', 'b', 'c'} and all(x['rows'] in (13, 14) and x['steps']>=6 for x in h['experts'].values())
    assert 'second' not in (experts/'history.json').read_text()
    assert stage(train_experts, with_seed, dict(rows_dir=seal_rows(rows, tmp_path), start=seed), root=tmp_path)==experts

def seal_rows(rows, root):
    if not (root/'data').exists():
        with sealing(root/'data', {}) as d: shutil.copy(rows/'train.jsonl', d)
    return root/'data'

def test_experts_branch_from_the_seed(tmp_path):
    model, _ = trained()
    model.stack.save_peft(tmp_path/'seed', 0, 'tiny')
    ids = torch.tensor([ROWS[0][0].ids])
    want = model(input_ids=ids, gates=one_hot(torch.tensor([0]), 3)).logits
    for lora in (LORA, LoraSpec(rank=12, alpha=48)):
        branch = gated(tiny_base(), slots=2, spec=lora)
        for e in range(2): start_expert(branch.stack, e, f'b{e}', tmp_path, seed=1)
        got = branch(input_ids=ids, gates=one_hot(torch.tensor([1]), 2)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    fit(branch, ROWS[:2], SPEC, names=['b0', 'b1'])
    a, b = branch.stack.leaves[0]
    assert (b[0,:,4:]!=0).any() and (a[0,4:]!=0).all(), 'the added ranks learn'

def test_widened_expert_is_saved_whole(tmp_path):
    model = gated(tiny_base(), slots=1, spec=LORA); model.stack.init_expert(0, 0, 'seed'); model.stack.save_peft(tmp_path/'seed', 0, 'tiny')
    wide = gated(tiny_base(), slots=1, spec=LoraSpec(rank=12, alpha=48))
    start_expert(wide.stack, 0, 'wide', tmp_path/'seed', seed=1)
    fit(wide, ROWS[:1], SPEC, names=['wide'])
    wide.stack.save_peft(tmp_path/'wide', 0, 'tiny')
    again = gated(tiny_base(), slots=1, spec=LoraSpec(rank=12, alpha=48)); again.stack.load_peft(tmp_path/'wide', 0, 'wide')
    assert torch.equal(again.stack.theta, wide.stack.theta) and read_json(tmp_path/'wide'/'adapter_config.json')['r']==12

@pytest.mark.parametrize('groups,says', [({'x': ['nowhere']}, 'nowhere'), ({'../x': ['r1']}, "cannot name"), ({'x': ['r1'], 'y': []}, 'no rows for expert y')])
def test_groups_that_make_no_sense_are_refused(groups, says, tmp_path):
    rows = write_rows(tmp_path/'rows')
    with pytest.raises(HydraError, match=says): train_experts(tmp_path/'out', rows_dir=rows, groups=groups, **JOB)

def test_rows_of_one_token_are_refused():
    model = fresh()
    with pytest.raises(HydraError, match="'lonely'"): fit(model, [[Example(ids=[5], n_prompt=0, id='lonely', domain='x')]], SPEC, names=['large'])

def watched(dev, stop, **kw):
    model = fresh()
    return model, fit(model, ROWS, SPEC, names=NAMES, dev=dev, stop=stop, **kw)

DEV = [examples('large-dev', 3), [], examples('small-dev', 3)]

def test_early_stop_is_each_experts_own():
    "A stopped expert is at the best state it was seen in; the others train as ever"
    model, history = watched(DEV, expert.StopSpec(patience=1, every=3))
    plain, whole = trained()
    looks = [{n: x for n,x in h['dev'].items()} for h in history if 'dev' in h]
    assert len(history)==len(whole) and all('middle' not in l for l in looks)
    assert far(model.stack.theta[1], plain.stack.theta[1], fresh().stack.theta[1]) < 1e-3
    for e,n in ((0, 'large'), (2, 'small')):
        curve = [l[n] for l in looks if n in l]
        mean = np.concatenate(expert.response_losses(model, DEV[e], one_hot(torch.tensor([e]*3), 3))).mean()
        assert mean==pytest.approx(min(curve), abs=1e-4)
        ups = [i for i in range(1, len(curve)) if curve[i]>=min(curve[:i])]
        if ups and ups[0]<len(looks)-1: # it stopped, and took no further steps
            assert len(curve)==ups[0]+1 and not any(n in h['loss'] for h in history[3*len(curve):])

def test_patience_without_end_changes_only_the_choice_of_state():
    model, history = watched(DEV, expert.StopSpec(patience=10**6, every=5))
    _, whole = trained()
    assert [h['loss'] for h in history]==[h['loss'] for h in whole]

@pytest.mark.parametrize('k', [4, 9])
def test_resume_of_a_watched_run_is_bit_equal(k, tmp_path, monkeypatch):
    stop = expert.StopSpec(patience=1, every=3)
    whole, history = watched(DEV, stop)
    with monkeypatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): watched(DEV, stop, work=tmp_path, every=2)
    again, resumed = watched(DEV, stop, work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta) and resumed==history
    with pytest.raises(HydraError, match='other rows'): watched([d[:1] for d in DEV], stop, work=tmp_path)

@pytest.mark.parametrize('part', ['router', 'dev', 'test'])
def test_rows_of_another_part_are_never_trained_on(tmp_path, part):
    from hydramoe.data.unified_card import open_unified, toy_unify_stage
    d = stage(toy_unify_stage, dict(tokens_per_domain=300, router=1, dev=1, test=1, max_length=200), root=tmp_path)
    how = dict(base='tiny', quant='fp32', lora=LORA, spec=SPEC)
    with pytest.raises(HydraError, match=f"of the part '{part}'"): train_seed(tmp_path/'x', rows_dir=d, file=f'{part}.jsonl', **how)
    assert not (tmp_path/'x').exists()
    with sealing(tmp_path/'y', {}) as out: train_seed(out, rows_dir=d, file='experts.jsonl', **how)
    assert (tmp_path/'y'/'seed'/'adapter_model.safetensors').exists() and len(open_unified(d).experts)

# ---- the fork
FORKED = LoraSpec(rank=4, fork=.5)

def forked(seed=0, quant='fp32', layers=4):
    "A forked stack whose trunk is not nothing: a seed expert, drawn from `seed`"
    model = gated(tiny_base(quant=quant, layers=layers), slots=len(NAMES), spec=FORKED)
    model.stack.trunk.copy_(torch.empty_like(model.stack.trunk).normal_(std=.05, generator=torch.Generator().manual_seed(seed)))
    for e,n in enumerate(NAMES): model.stack.init_expert(e, 0, n)
    model.stack.trainable()
    return model

def test_a_checkpoint_of_another_trunk_is_refused(tmp_path, monkeypatch):
    "The same experts, rows and spec above another seed expert are another run"
    with monkeypatch.context() as m:
        stop_at(m, 5)
        with pytest.raises(Stop): fit(forked(), ROWS, SPEC, tmp_path, NAMES, every=2)
    other = forked(1)
    assert torch.equal(other.stack.theta, forked().stack.theta)
    with pytest.raises(HydraError, match='step-000004.*trunk'): fit(other, ROWS, SPEC, tmp_path, NAMES)
    assert len(fit(forked(), ROWS, SPEC, tmp_path, NAMES, every=2))==len(trained()[1])

def cached(model, root, quant='fp32', rows=ROWS, **kw): return cache_trunk(model, sum(rows, []), root, f'tiny {quant}', **kw)

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_from_the_cached_trunk_equals_training_without(quant, checkpointing, tmp_path):
    whole, part = forked(quant=quant), forked(quant=quant)
    start = whole.stack.theta.clone()
    a = fit(whole, ROWS, SPEC, checkpointing=checkpointing)
    b = fit(part, ROWS, SPEC, checkpointing=checkpointing, cached=cached(part, tmp_path, quant))
    close = 1e-3 if quant=='fp32' else .1 # bf16 rounds where a sum is cut
    assert [h.keys() for h in a]==[h.keys() for h in b] and [h['tokens'] for h in a]==[h['tokens'] for h in b]
    for e in range(3): assert far(part.stack.theta[e], whole.stack.theta[e], start[e])<close
    assert torch.equal(part.stack.trunk, forked(quant=quant).stack.trunk) and (part.stack.theta-start).abs().max()>1e-2

def test_with_the_same_batches_the_cached_trunk_gives_the_same_bits(tmp_path):
    "A row alone is a batch whose shape is the same when states are cached and when they are not"
    alone = replace(SPEC, micro_tokens=1)
    whole, part = forked(), forked()
    assert fit(whole, ROWS, alone)==fit(part, ROWS, alone, cached=cached(part, tmp_path, max_tokens=1))
    assert torch.equal(whole.stack.theta, part.stack.theta)

def test_the_trunk_is_not_computed_again(tmp_path, monkeypatch):
    "Once for all epochs and experts: then the blocks below the fork are never run, but to ask whether rows keep apart"
    import hydramoe.experts.stack as hs
    model = forked()
    states = cached(model, tmp_path)
    monkeypatch.setattr(hs, '_apart', lambda model: True)
    for block in model.base.model.layers[:model.stack.fork]: monkeypatch.setattr(block, 'forward', None)
    monkeypatch.setattr(model.base.model.embed_tokens, 'forward', None)
    assert len(fit(model, ROWS, SPEC, cached=states))==len(fit(forked(), ROWS, SPEC))
    assert cached(forked(), tmp_path, rows=ROWS[::-1]).path==states.path and len(list(tmp_path.glob('trunk-*')))==1

@pytest.mark.parametrize('k', [1, 5, 14])
def test_resume_from_the_cached_trunk_is_bit_equal(k, tmp_path, monkeypatch):
    whole = forked()
    history = fit(whole, ROWS, SPEC, tmp_path/'whole', NAMES, every=2, cached=cached(whole, tmp_path/'whole'))
    with monkeypatch.context() as m:
        stop_at(m, k)
        broken = forked()
        with pytest.raises(Stop): fit(broken, ROWS, SPEC, tmp_path/'cut', NAMES, every=2, cached=cached(broken, tmp_path/'cut'))
    again = forked()
    assert fit(again, ROWS, SPEC, tmp_path/'cut', NAMES, every=2, cached=cached(again, tmp_path/'cut'))==history
    assert torch.equal(again.stack.theta, whole.stack.theta)
    if k>2:
        with pytest.raises(HydraError, match='step-0000'): fit(forked(), ROWS, SPEC, tmp_path/'cut', NAMES)

@pytest.mark.parametrize('other', [dict(model=dict(seed=1)), dict(quant='another base'), dict(rows=[ROWS[0][1:], *ROWS[1:]]), dict(model=dict(quant='bf16'))], ids=['trunk', 'base', 'rows', 'dtype'])
def test_states_of_something_else_are_not_taken(other, tmp_path):
    other = dict(other)
    mine, theirs = cached(forked(), tmp_path), cached(forked(**other.pop('model', {})), tmp_path, **other)
    assert mine.path!=theirs.path

@pytest.mark.parametrize('harm', [missing, truncated, flipped])
@pytest.mark.parametrize('file', ['trunk.bin', 'trunk.json', 'seal.json'])
def test_damaged_states_are_refused_by_name_and_made_again(harm, file, tmp_path):
    states = cached(forked(), tmp_path)
    want, sealed = states(ROWS[0]).clone(), open_sealed(states.path)['files']
    harm(states.path/file)
    with pytest.warns(UserWarning, match=f'trunk states refused.*{states.path.name}'): again = cached(forked(), tmp_path)
    assert torch.equal(again(ROWS[0]), want) and open_sealed(again.path)['files']==sealed

def test_experts_above_a_fork_from_records_to_adapters(tmp_path):
    "With and without the cache the same adapters within rounding; whole adapters, which all carry the seed expert's trunk"
    from safetensors.torch import load_file
    rows = seal_rows(write_rows(tmp_path/'rows'), tmp_path)
    plain = dict(base='tiny', quant='fp32', spec=asdict(replace(SPEC, steps=12)))
    seed = stage(train_seed, dict(plain, lora=dict(rank=4)), dict(rows_dir=rows), root=tmp_path)
    made = [stage(train_experts, dict(plain, lora=dict(rank=4, fork=.5), cached=c), dict(rows_dir=rows, start=seed), root=tmp_path) for c in (False, True)]
    of = lambda d, n: load_file(d/n/'adapter_model.safetensors')
    before = of(seed, 'seed')
    for n in 'abc':
        a, b = (of(m, n) for m in made)
        assert a.keys()==b.keys()==before.keys()
        for k in a:
            if '.layers.0.' in k: assert torch.equal(a[k], before[k]) and torch.equal(b[k], before[k])
            else: torch.testing.assert_close(a[k], b[k], atol=2e-3, rtol=2e-2)
        assert any(not torch.equal(a[k], before[k]) for k in a if '.layers.1.' in k)
    assert not list(tmp_path.glob('.work-*'))
    with pytest.raises(HydraError, match='no trunk'): train_experts(tmp_path/'x', rows_dir=rows, cached=True, **JOB)

@pytest.mark.parametrize('epochs', [.4, 1, 1.5, 2.25])
def test_part_of_an_epoch_is_the_beginning_of_a_whole_one(epochs):
    seen = lambda n, e: [x.id for s in plan_steps(ROWS, NAMES, replace(SPEC, epochs=n)) for f,x in s if f==e]
    for e,rows in enumerate(ROWS): assert seen(epochs, e)==seen(3, e)[:round(len(rows)*epochs)]

def test_precision_of_the_base_is_part_of_what_an_adapter_is_worth(tmp_path):
    "Each line equals scoring by hand on that base; the difference is theirs"
    from hydramoe.experts.score import response_losses
    from hydramoe.experts.adapters import with_adapters
    rows = seal_rows(write_rows(tmp_path/'rows'), tmp_path)
    made = stage(train_experts, dict(JOB, quant='nf4'), dict(rows_dir=rows), root=tmp_path)
    of = ['abc'[i%3] for i in range(40)]
    table = expert.by_precision(rows, made, 'train', 'nf4', ['fp32', 'bf16'], of=of, root=tmp_path, base='tiny')
    assert [t['scored'] for t in table]==['nf4', 'fp32', 'bf16'] and {t['trained'] for t in table}=={'nf4'} and table[0]['percent']==0
    for t in table:
        b = tiny_base(quant=t['scored'])
        model = with_adapters(b, {n: made/n for n in 'abc'})
        xs = [expert.encode(r, b.tokenizer, 300, 300) for r in expert.read_jsonl(rows/'train.jsonl')]
        nll = response_losses(model, xs, one_hot(torch.tensor(['abc'.index(n) for n in of]), 3))
        macro = np.mean([np.concatenate([l for l,x in zip(nll, xs) if x.domain==d]).mean() for d in 'abc'])
        assert t['ppl']==pytest.approx(np.exp(macro), rel=1e-3) and t['percent']==pytest.approx(100*(t['ppl']/table[0]['ppl']-1), abs=1e-6)
    assert len({t['ppl'] for t in table})==3
