"Stages: from records to adapters, from the cached trunk too; killed and run again; another precision"
import json, os, shutil, signal, subprocess, sys, warnings
from dataclasses import asdict, replace
import numpy as np, pytest, torch
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json, read_jsonl, write_jsonl
from hydramoe.foundations.store import open_sealed, sealing, stage
from hydramoe.models.base import tiny_base
from hydramoe.models.encode import encode
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import one_hot
from hydramoe.experts.model import gated
from hydramoe.experts.adapters import with_adapters
from hydramoe.experts.score import response_losses
from hydramoe.experts.train import fit
from hydramoe.experts.stages import by_precision, cache_trunk, start_expert, train_experts_stage, train_single_stage
from training import (
    EXPERTS, LORA, ROWS, SPEC, Stop, far, flipped, job_of, letter_row, missing, stop_at, trained, truncated)

def test_steps_that_were_skipped_are_counted_in_the_history(tmp_path):
    "One that learnt nothing is on record, and one whose numbers nobody can compute with is not written"
    rows, how = write_rows(tmp_path/'rows'), dict(base='tiny', quant='fp32', lora=dict(rank=4))
    with warnings.catch_warnings(action='ignore'):
        train_single_stage(tmp_path/'lost', rows_dir=rows, **how, spec=dict(lr=1e30, steps=9))
        lost = read_json(tmp_path/'lost'/'history.json')
        train_experts_stage(tmp_path/'all', rows_dir=rows, start=tmp_path/'lost', **how, spec=dict(lr=1e-4, steps=9))
        with pytest.raises(HydraError, match="expert 'seed'.*lower the learning rate"):
            train_single_stage(tmp_path/'gone', rows_dir=rows, **how, spec=dict(lr=3e38, steps=9))
    seed = lost['experts']['seed']
    assert seed['steps']-1==seed['skipped']==sum('seed' in h['skipped'] for h in lost['history'])
    experts = read_json(tmp_path/'all'/'history.json')['experts']
    assert all(e['skipped']==e['steps']>0 for e in experts.values())
    assert not (tmp_path/'gone'/'seed').exists()

def write_rows(path, n=40):
    "Records of three domains in a folder"
    path.mkdir(parents=True)
    write_jsonl(path/'train.jsonl', [letter_row(i, 'abc'[i%3], 'abc'[i%3]) for i in range(n)])
    return path

STAGE_JOB = job_of(steps=30)

ONE_STAGE = """
import json, os, signal, sys
from pathlib import Path
from hydramoe.experts import train
from hydramoe.experts.stages import train_experts_stage
from hydramoe.foundations.store import sealing
where, at, rows, root = sys.argv[1:]
inner, calls = getattr(train, where), []
def dying(*args, **kw):
    calls.append(0)
    if len(calls)==int(at): os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kw)
setattr(train, where, dying)
with sealing(Path(root)/'target', {}) as out: train_experts_stage(out, rows_dir=rows, **json.loads(os.environ['JOB']))
"""

def run_one_stage(where, at, rows, root):
    env = dict(os.environ, JOB=json.dumps(STAGE_JOB), OMP_NUM_THREADS='1', HYDRAMOE_QUIET='1')
    command = [sys.executable, '-c', ONE_STAGE, where, str(at), str(rows), str(root)]
    return subprocess.run(command, env=env, capture_output=True, text=True)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp('whole')
    rows = write_rows(root/'rows')
    r = run_one_stage('fit_step', 10**9, rows, root)
    assert r.returncode==0, r.stderr
    return open_sealed(root/'target')['files'], rows

KILLS = [pytest.param('fit_step', 1, marks=pytest.mark.slow), ('fit_step', 27), ('save_file', 2),
         pytest.param('write_json', 2, marks=pytest.mark.slow)]

@pytest.mark.parametrize('where,at', KILLS)
def test_kill_9_and_again(where, at, tmp_path, whole):
    "Killed in a step, or in the middle of writing a checkpoint, and run again: the same sealed files"
    files, rows = whole
    assert run_one_stage(where, at, rows, tmp_path).returncode==-signal.SIGKILL
    assert not (tmp_path/'target').exists()
    r = run_one_stage('fit_step', 10**9, rows, tmp_path)
    assert r.returncode==0, r.stderr
    assert open_sealed(tmp_path/'target')['files']==files
    assert [p.name for p in tmp_path.iterdir()]==['target']

def test_stages_from_records_to_adapters(tmp_path):
    rows = seal_rows(write_rows(tmp_path/'rows'), tmp_path)
    with_seed = dict(STAGE_JOB, spec=asdict(replace(SPEC, steps=6)))
    seed = stage(train_single_stage, with_seed, dict(rows_dir=rows), root=tmp_path)
    experts = stage(train_experts_stage, with_seed, dict(rows_dir=rows, start=seed), root=tmp_path)
    assert sorted(p.name for p in experts.iterdir())==['a', 'b', 'c', 'history.json', 'seal.json']
    h = read_json(experts/'history.json')
    assert set(h['experts'])=={'a', 'b', 'c'}
    assert all(x['rows'] in (13, 14) for x in h['experts'].values())
    assert all(x['steps']>=6 for x in h['experts'].values())
    assert 'second' not in (experts/'history.json').read_text()
    again = stage(train_experts_stage, with_seed, dict(rows_dir=rows, start=seed), root=tmp_path)
    assert again==experts

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
    assert (b[0,:,4:]!=0).any(), 'the added ranks learn'
    assert (a[0,4:]!=0).all(), 'the added ranks learn'

def test_widened_expert_is_saved_whole(tmp_path):
    model = gated(tiny_base(), slots=1, spec=LORA)
    model.stack.init_expert(0, 0, 'seed')
    model.stack.save_peft(tmp_path/'seed', 0, 'tiny')
    wide = gated(tiny_base(), slots=1, spec=LoraSpec(rank=12, alpha=48))
    start_expert(wide.stack, 0, 'wide', tmp_path/'seed', seed=1)
    fit(wide, ROWS[:1], SPEC, names=['wide'])
    wide.stack.save_peft(tmp_path/'wide', 0, 'tiny')
    again = gated(tiny_base(), slots=1, spec=LoraSpec(rank=12, alpha=48))
    again.stack.load_peft(tmp_path/'wide', 0, 'wide')
    assert torch.equal(again.stack.theta, wide.stack.theta)
    assert read_json(tmp_path/'wide'/'adapter_config.json')['r']==12

SENSELESS = [({'x': ['nowhere']}, 'nowhere'), ({'../x': ['r1']}, "cannot name"),
             ({'x': ['r1'], 'y': []}, 'no rows for expert y')]

@pytest.mark.parametrize('groups,says', SENSELESS)
def test_groups_that_make_no_sense_are_refused(groups, says, tmp_path):
    rows = write_rows(tmp_path/'rows')
    with pytest.raises(HydraError, match=says):
        train_experts_stage(tmp_path/'out', rows_dir=rows, groups=groups, **STAGE_JOB)

@pytest.mark.parametrize('part', ['router', 'dev', 'test'])
def test_rows_of_another_part_are_never_trained_on(tmp_path, part):
    from hydramoe.data.unified_card import open_unified, toy_unify_stage
    d = stage(toy_unify_stage, dict(tokens_per_domain=300, router=1, dev=1, test=1, max_length=200), root=tmp_path)
    how = dict(base='tiny', quant='fp32', lora=LORA, spec=SPEC)
    with pytest.raises(HydraError, match=f"of the part '{part}'"):
        train_single_stage(tmp_path/'x', rows_dir=d, file=f'{part}.jsonl', **how)
    assert not (tmp_path/'x').exists()
    with sealing(tmp_path/'y', {}) as out: train_single_stage(out, rows_dir=d, file='experts.jsonl', **how)
    assert (tmp_path/'y'/'seed'/'adapter_model.safetensors').exists()
    assert len(open_unified(d).experts)

FORKED = LoraSpec(rank=4, fork=.5)

def forked_noise(seed=0, quant='fp32'):
    "A forked stack whose trunk is not nothing: a seed expert, drawn from `seed`"
    model = gated(tiny_base(quant=quant, layers=4), slots=len(EXPERTS), spec=FORKED)
    trunk, draw = model.stack.trunk, torch.Generator().manual_seed(seed)
    trunk.copy_(torch.empty_like(trunk).normal_(std=.05, generator=draw))
    for e,n in enumerate(EXPERTS): model.stack.init_expert(e, 0, n)
    model.stack.trainable()
    return model

def test_a_checkpoint_of_another_trunk_is_refused(tmp_path, monkeypatch):
    "The same experts, rows and spec above another seed expert are another run"
    with monkeypatch.context() as m:
        stop_at(m, 5)
        with pytest.raises(Stop): fit(forked_noise(), ROWS, SPEC, tmp_path, EXPERTS, every=2)
    other = forked_noise(1)
    assert torch.equal(other.stack.theta, forked_noise().stack.theta)
    with pytest.raises(HydraError, match='step-000004.*trunk'): fit(other, ROWS, SPEC, tmp_path, EXPERTS)
    assert len(fit(forked_noise(), ROWS, SPEC, tmp_path, EXPERTS, every=2))==len(trained()[1])

def cached(model, root, quant='fp32', rows=ROWS, **kw):
    return cache_trunk(model, sum(rows, []), root, f'tiny {quant}', **kw)

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_from_the_cached_trunk_equals_training_without(quant, checkpointing, tmp_path):
    whole, part = forked_noise(quant=quant), forked_noise(quant=quant)
    start = whole.stack.theta.clone()
    a = fit(whole, ROWS, SPEC, checkpointing=checkpointing)
    b = fit(part, ROWS, SPEC, checkpointing=checkpointing, cached=cached(part, tmp_path, quant))
    close = 1e-3 if quant=='fp32' else .1 # bf16 rounds where a sum is cut
    assert [h.keys() for h in a]==[h.keys() for h in b]
    assert [h['tokens'] for h in a]==[h['tokens'] for h in b]
    for e in range(3): assert far(part.stack.theta[e], whole.stack.theta[e], start[e])<close
    assert torch.equal(part.stack.trunk, forked_noise(quant=quant).stack.trunk)
    assert (part.stack.theta-start).abs().max()>1e-2

def test_with_the_same_batches_the_cached_trunk_gives_the_same_bits(tmp_path):
    "A row alone is a batch whose shape is the same when states are cached and when they are not"
    alone = replace(SPEC, micro_tokens=1)
    whole, part = forked_noise(), forked_noise()
    assert fit(whole, ROWS, alone)==fit(part, ROWS, alone, cached=cached(part, tmp_path, max_tokens=1))
    assert torch.equal(whole.stack.theta, part.stack.theta)

def test_the_trunk_is_not_computed_again(tmp_path, monkeypatch):
    "Once for all epochs and experts: then the blocks below the fork are never run, but to ask whether rows keep apart"
    import hydramoe.experts.packing as hs
    model = forked_noise()
    states = cached(model, tmp_path)
    monkeypatch.setattr(hs, 'keeps_rows_apart', lambda model: True)
    for block in model.base.model.layers[:model.stack.fork]: monkeypatch.setattr(block, 'forward', None)
    monkeypatch.setattr(model.base.model.embed_tokens, 'forward', None)
    assert len(fit(model, ROWS, SPEC, cached=states))==len(fit(forked_noise(), ROWS, SPEC))
    assert cached(forked_noise(), tmp_path, rows=ROWS[::-1]).path==states.path
    assert len(list(tmp_path.glob('trunk-*')))==1

@pytest.mark.parametrize('k', [1, 5, 14])
def test_resume_from_the_cached_trunk_is_bit_equal(k, tmp_path, monkeypatch):
    whole = forked_noise()
    history = fit(whole, ROWS, SPEC, tmp_path/'whole', EXPERTS, every=2, cached=cached(whole, tmp_path/'whole'))
    with monkeypatch.context() as m:
        stop_at(m, k)
        broken = forked_noise()
        with pytest.raises(Stop):
            fit(broken, ROWS, SPEC, tmp_path/'cut', EXPERTS, every=2, cached=cached(broken, tmp_path/'cut'))
    again = forked_noise()
    states = cached(again, tmp_path/'cut')
    assert fit(again, ROWS, SPEC, tmp_path/'cut', EXPERTS, every=2, cached=states)==history
    assert torch.equal(again.stack.theta, whole.stack.theta)
    if k>2:
        with pytest.raises(HydraError, match='step-0000'): fit(forked_noise(), ROWS, SPEC, tmp_path/'cut', EXPERTS)

OTHERS = [dict(model=dict(seed=1)), dict(quant='another base'), dict(rows=[ROWS[0][1:], *ROWS[1:]]),
          dict(model=dict(quant='bf16'))]

@pytest.mark.parametrize('other', OTHERS, ids=['trunk', 'base', 'rows', 'dtype'])
def test_states_of_something_else_are_not_taken(other, tmp_path):
    other = dict(other)
    mine = cached(forked_noise(), tmp_path)
    theirs = cached(forked_noise(**other.pop('model', {})), tmp_path, **other)
    assert mine.path!=theirs.path

@pytest.mark.parametrize('harm', [missing, truncated, flipped])
@pytest.mark.parametrize('file', ['trunk.bin', 'trunk.json', 'seal.json'])
def test_damaged_states_are_refused_by_name_and_made_again(harm, file, tmp_path):
    states = cached(forked_noise(), tmp_path)
    want, sealed = states(ROWS[0]).clone(), open_sealed(states.path)['files']
    harm(states.path/file)
    with pytest.warns(UserWarning, match=f'trunk states refused.*{states.path.name}'):
        again = cached(forked_noise(), tmp_path)
    assert torch.equal(again(ROWS[0]), want)
    assert open_sealed(again.path)['files']==sealed

def test_experts_above_a_fork_from_records_to_adapters(tmp_path):
    """With and without the cache the same adapters within rounding; whole adapters, which all carry the seed expert's
    trunk"""
    from safetensors.torch import load_file
    rows = seal_rows(write_rows(tmp_path/'rows'), tmp_path)
    plain = dict(base='tiny', quant='fp32', spec=asdict(replace(SPEC, steps=12)))
    seed = stage(train_single_stage, dict(plain, lora=dict(rank=4)), dict(rows_dir=rows), root=tmp_path)
    def grown(cached):
        how = dict(plain, lora=dict(rank=4, fork=.5), cached=cached)
        return stage(train_experts_stage, how, dict(rows_dir=rows, start=seed), root=tmp_path)
    made = [grown(c) for c in (False, True)]
    def of(d, n): return load_file(d/n/'adapter_model.safetensors')
    before = of(seed, 'seed')
    for n in 'abc':
        a, b = (of(m, n) for m in made)
        assert a.keys()==b.keys()==before.keys()
        for k in a:
            if '.layers.0.' in k:
                assert torch.equal(a[k], before[k])
                assert torch.equal(b[k], before[k])
            else: torch.testing.assert_close(a[k], b[k], atol=2e-3, rtol=2e-2)
        assert any(not torch.equal(a[k], before[k]) for k in a if '.layers.1.' in k)
    assert not list(tmp_path.glob('.work-*'))
    with pytest.raises(HydraError, match='no trunk'):
        train_experts_stage(tmp_path/'x', rows_dir=rows, cached=True, **STAGE_JOB)

def test_precision_of_the_base_is_part_of_what_an_adapter_is_worth(tmp_path):
    "Each line equals scoring by hand on that base; the difference is theirs"
    rows = seal_rows(write_rows(tmp_path/'rows'), tmp_path)
    made = stage(train_experts_stage, dict(STAGE_JOB, quant='nf4'), dict(rows_dir=rows), root=tmp_path)
    of = ['abc'[i%3] for i in range(40)]
    table = by_precision(rows, made, 'train', 'nf4', ['fp32', 'bf16'], of=of, root=tmp_path, base='tiny')
    assert [t['scored'] for t in table]==['nf4', 'fp32', 'bf16']
    assert {t['trained'] for t in table}=={'nf4'}
    assert table[0]['percent']==0
    for t in table:
        b = tiny_base(quant=t['scored'])
        model = with_adapters(b, {n: made/n for n in 'abc'})
        xs = [encode(r, b.tokenizer, 300, 300) for r in read_jsonl(rows/'train.jsonl')]
        nll = response_losses(model, xs, one_hot(torch.tensor(['abc'.index(n) for n in of]), 3))
        by_domain = [np.concatenate([l for l,x in zip(nll, xs) if x.domain==d]) for d in 'abc']
        macro = np.mean([losses.mean() for losses in by_domain])
        assert t['ppl']==pytest.approx(np.exp(macro), rel=1e-3)
        assert t['percent']==pytest.approx(100*(t['ppl']/table[0]['ppl']-1), abs=1e-6)
    assert len({t['ppl'] for t in table})==3
