"""The shared expert: the single adapter without its residuals, TRL's and PEFT's numbers with them, and what accidents
do to either"""
import json, os, signal, subprocess, sys, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
import hydramoe.experts.jobs as experts_jobs
import hydramoe.experts.model as experts_model
import hydramoe.experts.shared as shared
import hydramoe.experts.train as train
from hydramoe.foundations.core import HydraError, derive_seed, rng
from hydramoe.foundations.files import read_jsonl, write_jsonl
from hydramoe.foundations.store import open_sealed, sealing, stage
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import LoraSpec, Stack
from hydramoe.experts.plan import Plan, slow_add
from hydramoe.experts.gates import make_plan, one_hot, with_trunk
from hydramoe.experts.model import gated
from hydramoe.experts.pool import ExpertPool
from hydramoe.experts.score import token_losses
from hydramoe.experts.train import fit, fit_trl, n_response, plan_steps, training_mode, using_threads
from hydramoe.experts.shared import ResidualSpec, SharedOptimizers, fit_shared, mix_steps, shared_gradients, shared_step
from hydramoe.experts.jobs import make_jobs, run_jobs
from hydramoe.experts.stages import cache_trunk, sort_rows, train_single_stage
from hydramoe.experts.shared_stages import train_residuals_stage, train_shared_stage
from stacks import batch, peft, rand
from training import EXPERTS, LORA, ROWS, SPEC, Stop, examples, far, job_of, letter_row

def in_one_file(rows):
    "(slot, example) of all rows, in an order that knows nothing of experts"
    pairs = [(e, x) for e, own in enumerate(rows) for x in own]
    return [pairs[i] for i in rng(0, 'file').permutation(len(pairs))]

PAIRS = in_one_file(ROWS)
STEP = in_one_file([ROWS[0][:6], ROWS[1][:4], ROWS[2][:2]]) # rows of all three
MIXED = replace(SPEC, rows=4., epochs=1)

def fresh(names=EXPERTS, quant='fp32', lora=LORA, noise=0., layers=2):
    "A model with a shared expert and a residual for each name, which have learnt nothing yet, or are noise"
    model = gated(tiny_base(quant=quant, layers=layers), len(names), lora, shared=True)
    stack = model.stack
    for e, n in enumerate(names): stack.init_expert(e, derive_seed(0, n), n)
    stack.init_expert(stack.shared, 9)
    stack.theta.add_(noise*torch.randn(stack.theta.shape, generator=rand(1)))
    stack.trunk.add_(noise*torch.randn(stack.trunk.shape, generator=rand(2)))
    return model

def trained(spec=MIXED, residual=ResidualSpec(), pairs=PAIRS, model=None, **kw):
    "A model after its training, and the history"
    model = model or fresh()
    return model, fit_shared(model, pairs, spec, residual, **kw)

def single(rows, spec, quant='fp32'):
    "The single adapter that `fit` makes of the same rows"
    model = gated(tiny_base(quant=quant), 1, LORA)
    model.stack.init_expert(0, 9, 'shared')
    return model, fit(model, [rows], spec)

# ---- the single adapter

RUNS = [
    (1, 3, 900, 'fp32', 1), (2, 2, 900, 'fp32', 1), (5, 1.5, 60, 'fp32', 1), (45, 1, 900, 'fp32', 1),
    (45, 1, 1, 'fp32', 1), (45, 1, 120, 'fp32', 2), (45, 1, 120, 'bf16', 1), (20, 1, 120, 'bf16', 2)]

@pytest.mark.parametrize('n, epochs, micro, quant, threads', RUNS)
def test_without_residuals_it_is_the_single_adapter_bit_for_bit(n, epochs, micro, quant, threads, monkeypatch):
    monkeypatch.setattr(train, 'MIN_REPLICA_TOKENS', 40)
    spec = replace(MIXED, epochs=epochs, micro_tokens=micro)
    pairs = PAIRS[:n]
    with using_threads(threads):
        want, history = single([x for _, x in pairs], spec, quant)
        got, mine = trained(spec, pairs=[(0, x) for _, x in pairs], model=fresh([], quant))
    assert mine==history
    assert torch.equal(got.stack.theta, want.stack.theta)
    assert history[-1]['norm']['shared']>0

@pytest.mark.parametrize('micro, close', [(1, 1e-6), (900, 1e-4)])
def test_residuals_that_do_not_learn_leave_the_single_adapter(micro, close):
    "Row by row to a millionth; packed, rows are added up in another order, which AdamW makes more of"
    spec = replace(MIXED, epochs=2, micro_tokens=micro)
    want, history = single([x for _, x in PAIRS], spec)
    got, _ = trained(spec, ResidualSpec(rate=0.))
    assert len(history)>=20
    start = fresh().stack.theta
    assert torch.equal(got.stack.theta[:3], start[:3])
    assert far(got.stack.theta[3], want.stack.theta[0], start[3])<close

# ---- TRL and PEFT

def on_shared(folder):
    "A base in whose weights PEFT has put the shared expert"
    base = tiny_base()
    base.model = peft(base.model, folder).merge_and_unload().requires_grad_(False)
    return base

@pytest.fixture
def adapters(tmp_path):
    "A model of noise, and its parts as PEFT's adapters: shared and one for each residual"
    model = fresh(noise=.02)
    for e, n in enumerate([*EXPERTS, 'shared']): model.stack.save_peft(tmp_path/n, e, 'tiny')
    return model, tmp_path

def pefts_gradients(base_model, folder, examples):
    "Gradients of an adapter, by factor and layer, of the mean loss of some rows' response tokens"
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(base_model, folder, is_trainable=True)
    losses = []
    for x in examples:
        logits = theirs(torch.tensor([x.ids])).logits[0,x.n_prompt-1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(x.ids[x.n_prompt:]), reduction='none'))
    torch.cat(losses).mean().backward()
    params = dict(theirs.named_parameters())
    return lambda name, k: params[f'base_model.model.{name}.lora_{k}.default.weight'].grad

def test_gradients_equal_pefts(adapters):
    "A residual's: that of its own rows' mean loss, on a base into which the shared expert is merged"
    model, folder = adapters
    with training_mode(model):
        shared_gradients(model, STEP, MIXED)
        for e, n in enumerate(EXPERTS):
            own = [x for f, x in STEP if f==e]
            theirs = pefts_gradients(on_shared(folder/'shared').model, folder/n, own)
            for s, pair in zip(model.stack.layers, model.stack.leaves):
                for k, leaf in zip('AB', pair):
                    want = theirs(s.name, k)
                    assert want.norm()>0
                    assert (leaf.grad[e]-want).norm()<1e-4*want.norm()

def test_residuals_apart_equal_trl(adapters):
    "On a frozen shared expert: what TRL makes of the same batches on a base that has it in its weights"
    model, folder = adapters
    model.stack.shared_is_frozen = True
    start = model.stack.theta.clone()
    history = fit(model, ROWS, SPEC, names=EXPERTS)
    assert torch.equal(model.stack.theta[3], start[3])
    steps = plan_steps(ROWS, EXPERTS, SPEC)
    theirs = fresh()
    for e, n in enumerate(EXPERTS):
        own = [[x for f, x in step if f==e] for step in steps]
        losses = fit_trl(on_shared(folder/'shared'), [b for b in own if b], folder/n, folder/'trl'/n, SPEC)
        np.testing.assert_allclose([h['loss'][n] for h in history if n in h['loss']], losses, rtol=2e-4)
        theirs.stack.load_peft(folder/'trl'/n, e, n)
        assert far(model.stack.theta[e], theirs.stack.theta[e], start[e])<1e-3
        assert (model.stack.theta[e]-start[e]).abs().max()>1e-2

# ---- rows and gradients that are no numbers

@pytest.fixture
def failing(monkeypatch):
    "Makes the base fail on rows of some ids"
    def on(ids):
        def losses(model, xs, **kw):
            parts = token_losses(model, xs, **kw).split([n_response(x) for x in xs])
            return torch.cat([part*torch.nan if x.id in ids else part for part, x in zip(parts, xs)])
        monkeypatch.setattr(shared, 'token_losses', losses)
    return on

def step_of(model, step, **spec):
    "Losses and gradients of a step"
    with training_mode(model):
        losses = shared_gradients(model, step, replace(MIXED, **spec))
        return losses, model.stack.grad.clone()

@pytest.mark.parametrize('micro', [1, 100, 10**6])
@pytest.mark.parametrize('bad', ['one', 'a residual'])
def test_a_row_without_a_loss_is_as_if_it_were_not_there(micro, bad, failing):
    model = fresh(noise=.02)
    step = STEP
    ids = {step[3][1].id} if bad=='one' else {x.id for e, x in step if e==1}
    others = [pair for pair in step if pair[1].id not in ids]
    assert ids
    assert {e for e, _ in others}>={0, 2}
    want_losses, want = step_of(model, others, micro_tokens=micro)
    failing(ids)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        losses, got = step_of(model, step, micro_tokens=micro)
    assert {str(w.message).split("'")[1] for w in said}==ids
    torch.testing.assert_close(losses, want_losses, equal_nan=True, rtol=1e-5, atol=0)
    assert (got-want).norm(dim=1).le(2e-6*want.norm(dim=1)).all()
    assert bool(got[1].any())==(bad=='one')

def test_steps_without_any_loss_are_passed_over(failing):
    "All rows of a residual are bad, then all rows of a step: what has no loss is not stepped, and the history says so"
    spec = replace(MIXED, schedule='constant')
    steps = mix_steps(PAIRS, 'shared', spec)
    failing({x.id for x in ROWS[1]} | {x.id for _, x in steps[2]})
    with pytest.warns(UserWarning, match='is not a number'): model, history = trained(spec)
    assert torch.equal(model.stack.theta[1], fresh().stack.theta[1])
    bad_step = history[2]
    assert not any(bad_step['loss'].values())
    assert bad_step['tokens']>0
    assert history[3]['loss']['shared']>0
    for h in history:
        assert h['loss'].get('middle') is None
        assert ('middle' in h['skipped'])==('middle' in h['loss'])
    assert set(bad_step['skipped'])==set(bad_step['loss'])
    assert torch.isfinite(model.stack.theta).all()
    json.dumps(history, allow_nan=False)

@pytest.mark.parametrize('which', [1, 3], ids=['residual', 'shared'])
@pytest.mark.parametrize('b_rate', [1., 4.])
def test_a_gradient_that_is_not_finite_skips_its_own_part(which, b_rate, monkeypatch):
    names = [*EXPERTS, 'shared']
    def after():
        model = fresh(noise=.02)
        opt = SharedOptimizers(model.stack, [4]*4, MIXED, ResidualSpec(b_rate=b_rate, decay=.1))
        with training_mode(model): entry = shared_step(model, opt, STEP, 0, names)
        return model.stack.theta.clone(), entry
    clean, entry = after()
    def sick(model, *a, **kw):
        losses = shared_gradients(model, *a, **kw)
        model.stack.grad[which,3] = torch.inf
        return losses
    monkeypatch.setattr(shared, 'shared_gradients', sick)
    with pytest.warns(UserWarning, match=f"'{names[which]}' is not finite"): got, sick_entry = after()
    others = [e for e in range(4) if e!=which]
    assert torch.equal(got[others], clean[others])
    assert torch.equal(got[which], fresh(noise=.02).stack.theta[which])
    assert not torch.equal(clean[which], got[which])
    assert sick_entry['skipped']==[names[which]]
    assert entry['skipped']==[]
    assert sick_entry['loss']==entry['loss']

def test_a_residual_whose_numbers_are_lost_takes_no_other_with_it():
    "Its rows are left out; the others train as if it and its rows were not there"
    steps = mix_steps(PAIRS, 'shared', MIXED)
    names = [*EXPERTS, 'shared']
    def run(poisoned):
        model = fresh()
        if poisoned: model.stack.theta[1,5] = torch.nan
        opt = SharedOptimizers(model.stack, [len(steps)]*4, MIXED, ResidualSpec())
        with training_mode(model), warnings.catch_warnings(action='ignore'):
            for k, step in enumerate(steps):
                step = step if poisoned else [pair for pair in step if pair[0]!=1]
                if step: shared_step(model, opt, step, k, names)
        return model.stack.theta.clone()
    got = run(True)
    want = run(False)
    for e in (0, 2, 3): assert far(got[e], want[e], fresh().stack.theta[e])<1e-4
    assert torch.equal(got[1].nan_to_num(9.)[6:], fresh().stack.theta[1,6:])

def test_rows_of_the_shared_expert_alone_touch_no_residual():
    "Numbers that are lost, in whichever slot, lose only the rows of that residual"
    for lost in range(3):
        model = fresh(noise=.02)
        model.stack.theta[lost] = torch.nan
        step = [(3 if i%2 else e, x) for i, (e, x) in enumerate(STEP)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            losses, _ = step_of(model, step)
        left_out = {str(w.message).split("'")[1] for w in said}
        assert left_out=={x.id for e, x in step if e==lost}
        assert losses[3].isfinite()

# ---- the same run, interrupted, turned round, in other precisions

def stop_at(monkeypatch, k):
    "Let training stop before its step k"
    def step(model, opt, step, i, names, cached=None):
        if i==k: raise Stop
        return shared_step(model, opt, step, i, names, cached)
    monkeypatch.setattr(shared, 'shared_step', step)

def of_rank(rank):
    "A model that has learnt nothing, with residuals of this rank"
    model = fresh()
    for e, name in enumerate(EXPERTS): model.stack.init_expert(e, e, name, rank)
    return model

@pytest.mark.parametrize('k,rank', [(0, LORA.rank), (3, LORA.rank), (7, LORA.rank), (3, 1), (7, 1)])
def test_resume_is_bit_equal(k, rank, tmp_path, monkeypatch):
    how = ResidualSpec(rate=2., b_rate=3., decay=.1, dropout=.2, soft=.1, clock='own')
    whole, history = trained(residual=how, model=of_rank(rank))
    with monkeypatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): trained(residual=how, model=of_rank(rank), work=tmp_path, every=2)
    again, resumed = trained(residual=how, model=of_rank(rank), work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta)
    assert resumed==history

def test_residuals_of_smaller_rank_train_as_if_all_of_their_rows_were_stepped(monkeypatch):
    "AdamW sees only the part of a row that they use; the rest stays zero"
    how = ResidualSpec(rate=2., b_rate=3., decay=.1)
    small, _ = trained(residual=how, model=of_rank(1))
    with monkeypatch.context() as m:
        m.setattr(Stack, 'used_numbers', lambda stack, rank: None)
        padded, _ = trained(residual=how, model=of_rank(1))
    assert torch.equal(small.stack.theta, padded.stack.theta)
    used = small.stack.used_numbers(1)
    for row in small.stack.theta[:3]:
        assert row.count_nonzero()==row[used].count_nonzero()>0

OTHER_RUNS = [dict(residual=ResidualSpec(rate=2.)), dict(spec=replace(MIXED, lr=1e-3)), dict(pairs=PAIRS[1:]),
              dict(pairs=[(0, x) for _, x in PAIRS]), dict(name='common')]

@pytest.mark.parametrize('other', OTHER_RUNS, ids=lambda d: next(iter(d)))
def test_a_checkpoint_of_another_run_is_refused(other, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 5)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    with pytest.raises(HydraError, match='step-000004'): trained(work=tmp_path, **other)

def test_a_checkpoint_on_another_shared_expert_is_refused(tmp_path, monkeypatch):
    "Residuals apart: the same residuals, rows and spec on another frozen shared expert are another run"
    def apart(seed):
        model = fresh()
        model.stack.init_expert(3, seed)
        model.stack.shared_is_frozen = True
        return fit(model, ROWS, SPEC, tmp_path, EXPERTS, every=2)
    with monkeypatch.context() as m:
        def step(model, opt, step, i, names, cached=None, inner=train.fit_step):
            if i==5: raise Stop
            return inner(model, opt, step, i, names, cached)
        m.setattr(train, 'fit_step', step)
        with pytest.raises(Stop): apart(9)
    with pytest.raises(HydraError, match='step-000004'): apart(8)
    assert len(apart(9))==len(plan_steps(ROWS, EXPERTS, SPEC))

def test_order_of_residuals_does_not_matter():
    model, history = trained()
    turned, other = trained(pairs=[(2-e, x) for e, x in PAIRS], model=fresh(EXPERTS[::-1]))
    start = fresh().stack.theta
    for e in range(4):
        of = 3 if e==3 else 2-e
        assert far(turned.stack.theta[of], model.stack.theta[e], start[e])<1e-3
    assert [set(h['loss']) for h in history]==[set(h['loss']) for h in other]

def test_passes_and_threads_make_no_difference_but_rounding(monkeypatch):
    monkeypatch.setattr(train, 'MIN_REPLICA_TOKENS', 40)
    whole, _ = trained(replace(MIXED, micro_tokens=10**6))
    start = fresh().stack.theta
    def run(threads, micro):
        with using_threads(threads): return trained(replace(MIXED, micro_tokens=micro))[0].stack.theta.clone()
    for theta in (run(1, 1), run(1, 60), run(2, 120), run(3, 120)): assert far(theta, whole.stack.theta, start)<1e-3
    assert torch.equal(run(2, 120), run(2, 120))

@pytest.mark.parametrize('quant, close', [('fp32', 1e-6), ('bf16', 1e-6), ('nf4', 1e-6)])
@pytest.mark.parametrize('frozen', [False, True])
def test_checkpointing_on_and_off_agree(quant, close, frozen):
    "In all precisions; and all parts that are trained learn something"
    out = []
    for on in (False, True):
        model = fresh(quant=quant)
        model.stack.shared_is_frozen = frozen
        if frozen: fit(model, ROWS, SPEC, checkpointing=on)
        else: fit_shared(model, PAIRS, MIXED, ResidualSpec(soft=.1), checkpointing=on)
        out.append(model.stack.theta.clone())
    start = fresh(quant=quant).stack.theta
    assert torch.isfinite(out[0]).all()
    assert far(*out, start)<close
    assert [(a-b).abs().max()>1e-3 for a, b in zip(out[0], start)]==[True, True, True, not frozen]

def test_the_cached_trunk_trains_the_same(tmp_path):
    "Above a fork: the shared expert and residuals from states that are computed once"
    lora = LoraSpec(rank=4, fork=.5)
    def run(cached):
        model = fresh(lora=lora, noise=.02, layers=4)
        states = cache_trunk(model, [x for _, x in PAIRS], tmp_path, 'tiny fp32') if cached else None
        return trained(model=model, cached=states)[0].stack.theta.clone()
    start = fresh(lora=lora, noise=.02, layers=4).stack.theta
    whole = run(False)
    for e in range(4): assert far(run(True)[e], whole[e], start[e])<1e-3

# ---- what each setting changes, and nothing else

def way(residual, spec=MIXED, pairs=PAIRS):
    "How far each part went"
    model, history = trained(spec, residual, pairs)
    return model.stack.theta-fresh().stack.theta, history

def test_dropout_leaves_rows_to_the_shared_expert():
    all_of_them, history = way(ResidualSpec(dropout=1.))
    want, of_single = single([x for _, x in PAIRS], MIXED)
    assert not all_of_them[:3].any()
    assert history==of_single
    assert torch.equal(all_of_them[3], want.stack.theta[0]-fresh().stack.theta[3])
    plain = mix_steps(PAIRS, 'shared', MIXED)
    some = shared.drop_residuals(mix_steps(PAIRS, 'shared', MIXED), 3, .4, 0)
    assert 0<sum(e==3 for step in some for e, _ in step)<len(PAIRS)
    for ours, theirs in zip(some, plain):
        assert all(a[1] is b[1] for a, b in zip(ours, theirs))
        assert all(a[0] in (b[0], 3) for a, b in zip(ours, theirs))

@pytest.mark.parametrize('soft', [.3, 1.])
def test_soft_trains_each_residual_with_every_row(soft):
    "Rows of one residual only: the others go along; without it they stay"
    only = [(e, x) for e, x in PAIRS if e==1]
    hard, _ = way(ResidualSpec(), pairs=only)
    mixed, history = way(ResidualSpec(soft=soft), pairs=only)
    assert not hard[[0,2]].any()
    assert all(mixed[e].any() for e in range(4))
    assert all(set(h['norm'])=={*EXPERTS, 'shared'} for h in history)

def test_dropped_rows_are_computed_by_the_shared_expert_alone():
    "Beside rows that have a residual: the loss and the shared expert's gradient are those of the slow sum"
    model = fresh(noise=.02)
    step = [(3 if i%2 else e, x) for i, (e, x) in enumerate(STEP)]
    losses, got = step_of(model, step)
    with training_mode(model):
        nll = []
        for e, x in step:
            gates = one_hot([e], 4)[:,:3]
            with model.stack.bind(with_trunk(SlowPlan(model.stack, gates))): nll.append(token_losses(model, [x]))
        model.stack.zero_grad()
        torch.cat(nll).mean().backward()
        want = model.stack.grad.clone()
    torch.testing.assert_close(losses[3], torch.cat(nll).mean().detach())
    assert (got[3]-want[3]).norm()<1e-4*want[3].norm()

@pytest.mark.parametrize('soft', [.3, 1.])
def test_soft_gradients_are_those_of_the_formula(soft):
    "By autograd on the slow sum, of the mean loss of all rows"
    model = fresh(noise=.02)
    step = STEP
    losses, got = step_of(model, step)
    with training_mode(model):
        losses = shared_gradients(model, step, MIXED, soft)
        got = model.stack.grad.clone()
        model.stack.zero_grad()
        nll = []
        for e, x in step:
            gates = (1-soft)*one_hot([e], 3)+soft/3
            with model.stack.bind(with_trunk(SlowPlan(model.stack, gates))): nll.append(token_losses(model, [x]))
        torch.cat(nll).mean().backward()
        want = model.stack.grad.clone()
    assert (got-want).norm(dim=1).le(1e-4*want.norm(dim=1)).all()
    assert (want.norm(dim=1)>0).all()
    torch.testing.assert_close(losses[3], torch.cat(nll).mean().detach())

def test_with_soft_gates_a_clock_of_its_own_ends_with_the_run():
    "Each residual takes every step then: its rate must not fall below nothing"
    model = fresh()
    rates = []
    class Watched(SharedOptimizers):
        def step(self, present):
            rates.extend(self.rate(e) for e in present)
            return super().step(present)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(shared, 'SharedOptimizers', Watched)
        fit_shared(model, PAIRS, MIXED, ResidualSpec(soft=.1, clock='own'))
    assert min(rates)>0

def one_step(residual, decayed=False):
    "Way of each part in the first step, whose gradients are the same for all settings"
    model = fresh(noise=.02)
    start = model.stack.theta.clone()
    opt = SharedOptimizers(model.stack, [8]*4, replace(MIXED, warmup=0, schedule='constant'), residual)
    with training_mode(model): shared_step(model, opt, STEP, 0, [*EXPERTS, 'shared'])
    return model.stack.theta-start, start, opt

def test_rate_b_rate_and_decay_are_the_residuals_own():
    plain, start, opt = one_step(ResidualSpec())
    is_b = opt._is_b()[0]>0
    half, *_ = one_step(ResidualSpec(rate=.5))
    torch.testing.assert_close(half[:3], plain[:3]/2, rtol=1e-3, atol=1e-7)
    faster, *_ = one_step(ResidualSpec(b_rate=4.))
    torch.testing.assert_close(faster[:3,is_b], 4*plain[:3,is_b], rtol=1e-3, atol=1e-6)
    assert torch.equal(faster[:3,~is_b], plain[:3,~is_b])
    decayed, *_ = one_step(ResidualSpec(decay=.5))
    torch.testing.assert_close(decayed[:3], plain[:3]-.5*MIXED.lr*start[:3], rtol=1e-3, atol=1e-6)
    for other in (half, faster, decayed):
        assert torch.equal(other[3], plain[3])
        assert not torch.equal(other[0], plain[0])

def test_the_clock_changes_the_rate_of_residuals_only():
    def at(clock): return SharedOptimizers(fresh().stack, [2, 4, 6, 12], MIXED, ResidualSpec(clock=clock))
    on_run = at('run')
    own = at('own')
    for opt in (on_run, own): opt.clock = [1, 1, 1, 8]
    assert on_run.rate(3)==own.rate(3)==on_run.rate(0)==on_run.rate(2)
    assert own.rate(0)<own.rate(1)<own.rate(2)
    assert own.rate(0)!=on_run.rate(0)

# ---- `fit` and the shared expert

def test_fit_does_not_train_a_shared_expert():
    with pytest.raises(HydraError, match='fit_shared.*shared_is_frozen'): fit(fresh(), ROWS, SPEC)

def test_a_name_that_is_given_twice_is_refused():
    with pytest.raises(HydraError, match="'middle'"): fit_shared(fresh(), PAIRS, MIXED, name='middle')

# ---- plans

class SlowPlan(Plan):
    "The slow sum, also of what a gate says"
    def __init__(self, stack, gates):
        super().__init__(stack)
        self.gates = gates

    def add(self, y, x, i):
        g = self.gates
        if callable(g):
            index, weight = g(x, self.stack.layers[i].name)
            g = torch.zeros(*index.shape[:-1], self.stack.slots).scatter_add(-1, index, weight)
        return slow_add(self.stack, g, y, x, i)

def slow_plan(gates, stack): return with_trunk(SlowPlan(stack, gates))

STACKS = [fresh(noise=.05, lora=LoraSpec(4, 8, fork=fork), layers=4) for fork in (0, .5)]

def chosen(x, name):
    "A gate: two slots for each token, from its first numbers"
    first = x[...,:3].float().softmax(-1)
    weight, index = first.topk(2)
    return index, weight

def drawn_gates(kind, B, T, seed):
    "Gates of one kind"
    r = rand(seed)
    if kind=='none': return torch.zeros(B, 3)
    if kind=='one-hot': return one_hot(torch.randint(0, 3, (B,), generator=r), 3)
    if kind=='one': return .7*one_hot([1]*B, 3)
    if kind=='soft': return torch.randn(B, 3, generator=r)
    if kind=='sparse': return torch.randn(B, 3, generator=r)*(torch.rand(B, 3, generator=r)>.5)
    if kind=='tokens': return torch.randn(B, T, 3, generator=r)*(torch.rand(B, T, 3, generator=r)>.3)
    if kind=='trained': return torch.randn(B, 3, generator=r).requires_grad_()
    return chosen

KINDS = ['none', 'one-hot', 'one', 'soft', 'sparse', 'tokens', 'trained', 'gate']

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(STACKS), st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 5),
       st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 'rows', 'dense']))
def test_every_plan_computes_the_formula(model, kind, B, T, seed, keep, forced):
    "The whole model, layer by layer, with and without kept factors; a trained gate has the slow sum's gradient"
    ids = torch.randint(3, 250, (B, T), generator=rand(seed))
    gates = drawn_gates(kind, B, T, seed)
    plan = make_plan(gates, model.stack, forced)
    needs = kind=='trained'
    if keep and not needs: plan.keep()
    def run(plan):
        with torch.set_grad_enabled(needs), experts_model.using(plan): out = model.base(input_ids=ids).logits
        return out, torch.autograd.grad(out.square().sum(), gates, retain_graph=True)[0] if needs else None
    for _ in range(2): got, gradient = run(plan) # the second time with what was kept
    want, wanted = run(slow_plan(gates, model.stack))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    if needs: assert (gradient-wanted).norm()<=1e-3*wanted.norm()

@pytest.mark.parametrize('model', STACKS, ids=['whole', 'forked'])
@pytest.mark.parametrize('kind', ['none', 'one-hot', 'one', 'soft', 'tokens', 'gate', 'base'])
@pytest.mark.parametrize('beams', [1, 3])
def test_a_generation_says_what_the_slow_sum_says(model, kind, beams, monkeypatch):
    "Plans are kept for a generation, and repeated for beams"
    x = batch(rows=3, length=6, pads=(0,2,3))
    if kind=='tokens' and beams>1: pytest.skip('gates by token are for one sequence a row')
    gates = None if kind=='base' else drawn_gates(kind, 3, 6, 0)
    how = dict(**x, gates=gates, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0)
    got = model.generate(**how)
    monkeypatch.setattr(experts_model, 'make_plan', slow_plan)
    assert torch.equal(model.generate(**how), got)
    if kind=='base':
        plain = {k: v for k, v in how.items() if k!='gates'}
        assert torch.equal(got, tiny_base(layers=4).model.generate(**plain))

# ---- the pool

def test_experts_take_turns_beside_a_shared_one(tmp_path):
    """Only the slots take turns; the shared expert stays, and what a row gets does not depend on what was in the slots
    before"""
    names = [f'expert{e}' for e in range(4)]
    whole = fresh(names, noise=.05)
    folders = {n: whole.stack.save_peft(tmp_path/n, e, 'tiny-0') for e, n in enumerate(names)}
    few = fresh(['a', 'b'])
    few.stack.theta[2] = whole.stack.theta[4]
    pool = ExpertPool(few.stack, folders)
    x = batch(rows=2, length=6, pads=(0,))
    def weights(mix): return sum(w*one_hot([int(n[-1])], 4)[0] for n, w in mix.items())
    for a, b in ((0, 1), (2, 1), (3, 3), (0, 2)):
        mixes = [{names[a]: .5, names[b]: .25} if a!=b else {names[a]: .75}, {names[b]: 1.}]
        want = torch.stack([weights(mix) for mix in mixes])
        with torch.no_grad(), pool.gates(mixes) as gates:
            torch.testing.assert_close(few(**x, gates=gates).logits, whole(**x, gates=want).logits)
    with torch.no_grad(), pool.gates([{}, {}]) as gates:
        torch.testing.assert_close(few(**x, gates=gates).logits, whole(**x, gates=torch.zeros(2, 4)).logits)
    assert torch.equal(few.stack.theta[2], whole.stack.theta[4])

# ---- stages: killed, and in jobs

JOB = job_of(rows=3., epochs=1) # 14 steps, a checkpoint after ten

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('shared')
    rows = [letter_row(i, 'abc'[i%3], 'abc'[i%3]) for i in range(40)]
    with sealing(root/'rows', {}) as d: write_jsonl(d/'train.jsonl', rows)
    return root/'rows'

KILLED = """
import json, os, signal, sys
from pathlib import Path
from hydramoe.experts import shared, train
from hydramoe.experts.shared_stages import train_shared_stage
from hydramoe.foundations.store import sealing
where, at, rows, root = sys.argv[1:]
module = shared if where=='shared_step' else train
inner, calls = getattr(module, where), []
def dying(*args, **kw):
    calls.append(0)
    if len(calls)==int(at): os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kw)
setattr(module, where, dying)
with sealing(Path(root)/'target', {}) as out: train_shared_stage(out, rows_dir=rows, **json.loads(os.environ['JOB']))
"""

def run_stage(where, at, rows, root):
    "`train_shared_stage` in a process of its own, killed at the given call"
    env = dict(os.environ, JOB=json.dumps(JOB), OMP_NUM_THREADS='1', HYDRAMOE_QUIET='1')
    call = [sys.executable, '-c', KILLED, where, str(at), str(rows), str(root)]
    return subprocess.run(call, env=env, capture_output=True, text=True)

DEATHS = [('shared_step', 12), pytest.param('save_file', 1, marks=pytest.mark.slow),
          pytest.param('shared_step', 1, marks=pytest.mark.slow)]

@pytest.mark.parametrize('where, at', DEATHS)
def test_kill_9_and_again(where, at, data, tmp_path):
    "Killed in a step, or in the middle of writing a checkpoint, and run again: the same bytes"
    with sealing(tmp_path/'whole', {}) as out: train_shared_stage(out, rows_dir=data, **JOB)
    root = tmp_path/'killed'
    assert run_stage(where, at, data, root).returncode==-signal.SIGKILL
    assert not (root/'target').exists()
    done = run_stage('shared_step', 10**9, data, root)
    assert done.returncode==0, done.stderr
    files = open_sealed(root/'target')['files']
    assert files==open_sealed(tmp_path/'whole')['files']
    assert 'shared/adapter/adapter_model.safetensors' in files

def test_residuals_apart_are_the_same_bytes_whoever_computes_them(data, tmp_path):
    common = stage(train_single_stage, JOB, dict(rows_dir=data), root=tmp_path)
    def made(root, *how, **kw):
        groups = sort_rows(read_jsonl(data/'train.jsonl'))
        jobs = make_jobs(train_residuals_stage, groups, 2, JOB, dict(rows_dir=data, shared=common), root=tmp_path/root)
        return [open_sealed(d)['files'] for d in run_jobs(jobs, *how, **kw)]
    here = made('here')
    assert made('two', 'local', workers=2)==here
    assert len(here)==2
    assert all('shared/adapter/adapter_model.safetensors' in files for files in here)

# ---- two processes that share the base

def _sharded(rank, world, folder, bad, spec):
    "One of two processes that share a base; in a process of its own"
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    model = experts_jobs.shard(fresh())
    inner = shared.token_losses
    def losses(model, xs, **kw):
        parts = inner(model, xs, **kw).split([n_response(x) for x in xs])
        return torch.cat([part*torch.nan if x.id==bad else part for part, x in zip(parts, xs)])
    if bad: shared.token_losses = losses
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        history = fit_shared(model, PAIRS, spec, ResidualSpec(dropout=.2))
    warned = [str(w.message) for w in said]
    torch.save(dict(theta=model.stack.theta, history=history, said=warned), Path(folder)/f'{rank}.pt')
    dist.destroy_process_group()

BAD = [(None, 60), ('middle3', 60), ('middle3', 1)]

@pytest.mark.slow
@pytest.mark.parametrize('bad, micro', BAD, ids=['sound', 'a bad row', 'a pass of one bad row'])
def test_a_sharded_base_trains_the_same(bad, micro, tmp_path, monkeypatch, failing):
    spec = replace(MIXED, micro_tokens=micro)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    if bad: failing({bad})
    with warnings.catch_warnings(action='ignore'): alone, history = trained(spec, ResidualSpec(dropout=.2))
    torch.multiprocessing.spawn(_sharded, (2, str(tmp_path), bad, spec), nprocs=2)
    a, b = (torch.load(tmp_path/f'{r}.pt') for r in (0, 1))
    assert torch.equal(a['theta'], b['theta'])
    assert a['history']==b['history']
    assert far(a['theta'], alone.stack.theta, fresh().stack.theta)<1e-3
    def known(entry): return {name: x for name, x in entry['loss'].items() if x is not None}
    for mine, theirs in zip(a['history'], history):
        assert known(mine)==pytest.approx(known(theirs), rel=1e-4)
        assert mine['skipped']==theirs['skipped']
    if bad: assert any(bad in text for text in a['said']+b['said'])
