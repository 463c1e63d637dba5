"Training: fused against TRL, against itself alone, and against accidents"
import json, warnings
from dataclasses import replace
import numpy as np, pytest, torch
import hydramoe.experts.train as train
from hydramoe.foundations.core import HydraError, rng
from hydramoe.models.base import tiny_base
from hydramoe.models.encode import Example
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import one_hot
from hydramoe.experts.score import response_losses
from hydramoe.experts.stages import cache_trunk
from hydramoe.experts.train import EarlyStopSpec, fit, fit_trl, gradients, make_passes, plan_steps, using_threads
from training import (
    EXPERTS, LORA, ROWS, SPEC, Stop, examples, far, flipped, fresh, missing, stop_at, trained, truncated)


SPECS = dict(linear=SPEC, constant=replace(SPEC, schedule='constant', clip=100.), micro=replace(SPEC, micro_tokens=60))

@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_fused_equals_trl_one_by_one(spec, tmp_path):
    """Unequal sizes, and experts that are absent from some steps: the same adapters as TRL + PEFT make of the same
    batches"""
    model = fresh()
    start = model.stack.theta.clone()
    for e,n in enumerate(EXPERTS): model.stack.save_peft(tmp_path/'start'/n, e, 'tiny')
    history = fit(model, ROWS, spec, names=EXPERTS)
    steps = plan_steps(ROWS, EXPERTS, spec)
    present = [{e for e,_ in s} for s in steps]
    absent = [sum(e not in experts for experts in present) for e in range(3)]
    assert absent[2] >= 7
    assert absent[0]==0
    theirs = fresh()
    for e,n in enumerate(EXPERTS):
        batches = [b for s in steps if (b := [x for f,x in s if f==e])]
        losses = fit_trl(tiny_base(), batches, tmp_path/'start'/n, tmp_path/'trl'/n, spec)
        np.testing.assert_allclose([h['loss'][n] for h in history if n in h['loss']], losses, rtol=2e-4)
        theirs.stack.load_peft(tmp_path/'trl'/n, e, n)
        assert far(model.stack.theta[e], theirs.stack.theta[e], start[e]) < 1e-3
        assert (model.stack.theta[e]-start[e]).abs().max() > 1e-2

def test_alone_equals_together():
    model, history = trained()
    for e,n in enumerate(EXPERTS):
        alone, _ = trained(replace(SPEC, steps=len(history), rows=1000), [ROWS[e]], [n])
        assert far(alone.stack.theta[0], model.stack.theta[e], fresh([n]).stack.theta[0]) < 1e-3

def test_order_of_experts_does_not_matter():
    model, _ = trained()
    turned, _ = trained(rows=ROWS[::-1], names=EXPERTS[::-1])
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
    passes = make_passes(who, lengths, most, n)
    tokens = [sum(lengths[i] for i in b) for b in passes]
    assert sorted(sum(passes, []))==list(range(len(who)))
    assert all(t<=most or len(b)==1 for t,b in zip(tokens, passes))
    for b in passes:
        experts = [who[i] for i in b]
        assert experts==sorted(experts)
    assert make_passes(who, lengths, most, n)==passes

def test_an_expert_stays_in_one_pass_where_it_fits():
    passes = make_passes([0,0,1,1,2,2,3,3], [50,50,60,40,30,70,20,80], 200, 2)
    assert [len(b) for b in passes]==[4,4]
    assert all(i^1 in b for b in passes for i in b)

def test_a_base_that_mixes_rows_trains_them_one_by_one(monkeypatch):
    import hydramoe.experts.packing as hs
    whole, _ = trained()
    seen, losses = [], train.token_losses
    def seen_losses(model, xs, **kw):
        seen.append(len(xs))
        return losses(model, xs, **kw)
    monkeypatch.setattr(hs, 'keeps_rows_apart', lambda model: False)
    monkeypatch.setattr(train, 'token_losses', seen_losses)
    alone, _ = trained()
    assert set(seen)=={1}
    assert far(alone.stack.theta, whole.stack.theta, fresh().stack.theta) < 1e-3

@pytest.mark.parametrize('how', ['plain', 'checkpointing', 'fork', 'nf4'])
def test_replicas_differ_by_rounding_and_never_from_themselves(how, tmp_path, monkeypatch):
    """Passes side by side, each thread with gradients of its own: what one thread makes of them, and the same bits
    every time"""
    lora = LoraSpec(rank=4, fork=.5) if how=='fork' else LORA
    spec = replace(SPEC, epochs=1, micro_tokens=120)
    used, deal = [], train.deal_passes
    def dealt(*a):
        used.append(deal(*a))
        return used[-1]
    monkeypatch.setattr(train, 'MIN_REPLICA_TOKENS', 40)
    monkeypatch.setattr(train, 'deal_passes', dealt)
    def run(threads):
        model = fresh(lora=lora, quant='nf4' if how=='nf4' else 'fp32')
        states = cache_trunk(model, sum(ROWS, []), tmp_path, 'tiny fp32') if how=='fork' else None
        saves = how=='checkpointing'
        with using_threads(threads):
            history = fit(model, ROWS, spec, names=EXPERTS, checkpointing=saves, cached=states)
        return model.stack.theta.clone(), history, max(map(len, used[-len(history):]))
    (one, h1, n1), (two, h2, n2), (again, h3, _), (three, _, n3) = [run(n) for n in (1, 2, 2, 3)]
    assert (n1, n2, n3)==(1, 2, 3)
    assert torch.equal(two, again)
    assert h2==h3
    for x in (two, three): assert far(x, one, fresh(lora=lora).stack.theta) < (5e-2 if how=='nf4' else 1e-3)
    of_one, of_two = ([h['loss']['large'] for h in history] for history in (h1, h2))
    np.testing.assert_allclose(of_one, of_two, rtol=2e-2 if how=='nf4' else 2e-4)

def test_a_replica_that_fails_is_heard(monkeypatch):
    def broken(*a, **kw): raise HydraError('out of order')
    monkeypatch.setattr(train, 'token_losses', broken)
    with using_threads(2):
        with pytest.raises(HydraError, match='out of order'): fit(fresh(), ROWS, SPEC, names=EXPERTS)
        assert torch.get_num_threads()==2

def test_twice_the_same_bits():
    (a, ha), (b, hb) = trained(), trained()
    assert torch.equal(a.stack.theta, b.stack.theta)
    assert ha==hb

@pytest.mark.parametrize('quant', ['fp32', 'nf4'])
def test_checkpointing_on_and_off_agree(quant):
    out = []
    for on in (False, True):
        model = fresh(quant=quant)
        fit(model, ROWS, SPEC, checkpointing=on)
        out.append(model.stack.theta.clone())
        assert not any(m.training for m in model.base.modules() if hasattr(m, 'gradient_checkpointing'))
    assert torch.isfinite(out[0]).all()
    assert far(*out, fresh(quant=quant).stack.theta) < 1e-4

@pytest.mark.parametrize('poison', ['weights', 'gradient'])
def test_nan_in_one_leaves_the_others_bit_equal(poison, monkeypatch):
    clean, _ = trained()
    model = fresh()
    if poison=='weights': model.stack.theta[1,5] = torch.nan
    else:
        def sick(model, step, spec, cached=None, inner=gradients):
            loss = inner(model, step, spec, cached)
            model.stack.grad[1,3] = torch.inf
            return loss
        monkeypatch.setattr(train, 'gradients', sick)
    start = model.stack.theta[1].clone()
    with pytest.warns(UserWarning, match="'middle' is not finite"): history = fit(model, ROWS, SPEC)
    assert torch.equal(model.stack.theta[[0,2]], clean.stack.theta[[0,2]])
    assert torch.equal(model.stack.theta[1].nan_to_num(9.), start.nan_to_num(9.))
    assert all(h['skipped']==(['middle'] if 'middle' in h['loss'] else []) for h in history)
    json.dumps(history, allow_nan=False)

def test_one_bad_step_is_skipped_and_forgotten(monkeypatch):
    "A single overflow costs the expert that step, and nothing else"
    def sick(model, step, spec, cached=None, inner=gradients, calls=[]):
        loss = inner(model, step, spec, cached)
        calls.append(0)
        if len(calls)==3: model.stack.grad[0] = torch.inf
        return loss
    monkeypatch.setattr(train, 'gradients', sick)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model, history = trained()
    assert len([w for w in said if 'large' in str(w.message)])==1
    assert history[2]['skipped']==['large']
    assert torch.isfinite(model.stack.theta).all()
    assert history[-1]['skipped']==[]

@pytest.mark.parametrize('k', [0, 1, 5, 9, 14])
def test_resume_is_bit_equal(k, tmp_path, monkeypatch):
    whole, history = trained()
    with monkeypatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    again, resumed = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta)
    assert resumed==history

@pytest.mark.parametrize('harm', [missing, truncated, flipped])
@pytest.mark.parametrize('file', ['state.safetensors', 'history.json', 'seal.json'])
def test_a_damaged_checkpoint_is_refused_by_name(harm, file, tmp_path, monkeypatch):
    whole, history = trained()
    with monkeypatch.context() as m:
        stop_at(m, 9)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    assert sorted(p.name for p in tmp_path.glob('step-*'))==['step-000006', 'step-000008']
    harm(tmp_path/'step-000008'/file)
    with pytest.warns(UserWarning, match='checkpoint refused.*step-000008'):
        again, resumed = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta)
    assert resumed==history

def test_all_checkpoints_damaged_begins_again(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 9)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    for p in tmp_path.glob('step-*'): missing(p/'state.safetensors')
    with pytest.warns(UserWarning): again, _ = trained(work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, trained()[0].stack.theta)

OTHERS = [dict(spec=replace(SPEC, lr=1e-3)), dict(rows=[r[1:] for r in ROWS]), dict(names=['a', 'b', 'c'])]

@pytest.mark.parametrize('other', OTHERS)
def test_a_checkpoint_of_another_run_is_refused(other, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 5)
        with pytest.raises(Stop): trained(work=tmp_path, every=2)
    with pytest.raises(HydraError, match='step-000004'): trained(work=tmp_path, **other)

def test_rows_of_one_token_are_refused():
    model = fresh()
    lonely = Example(ids=[5], n_prompt=0, id='lonely', domain='x')
    with pytest.raises(HydraError, match="'lonely'"): fit(model, [[lonely]], SPEC, names=['large'])

def watched(dev, stop, **kw):
    model = fresh()
    return model, fit(model, ROWS, SPEC, names=EXPERTS, dev=dev, stop=stop, **kw)

DEV = [examples('large-dev', 3), [], examples('small-dev', 3)]

def test_early_stop_is_each_experts_own():
    "A stopped expert is at the best state it was seen in; the others train as ever"
    model, history = watched(DEV, EarlyStopSpec(patience=1, every=3))
    plain, whole = trained()
    looks = [{n: x for n,x in h['dev'].items()} for h in history if 'dev' in h]
    assert len(history)==len(whole)
    assert all('middle' not in l for l in looks)
    assert far(model.stack.theta[1], plain.stack.theta[1], fresh().stack.theta[1]) < 1e-3
    for e,n in ((0, 'large'), (2, 'small')):
        curve = [l[n] for l in looks if n in l]
        mean = np.concatenate(response_losses(model, DEV[e], one_hot(torch.tensor([e]*3), 3))).mean()
        assert mean==pytest.approx(min(curve), abs=1e-4)
        ups = [i for i in range(1, len(curve)) if curve[i]>=min(curve[:i])]
        if ups and ups[0]<len(looks)-1: # it stopped, and took no further steps
            assert len(curve)==ups[0]+1
            assert not any(n in h['loss'] for h in history[3*len(curve):])

def test_patience_without_end_changes_only_the_choice_of_state():
    model, history = watched(DEV, EarlyStopSpec(patience=10**6, every=5))
    _, whole = trained()
    assert [h['loss'] for h in history]==[h['loss'] for h in whole]

@pytest.mark.parametrize('k', [4, 9])
def test_resume_of_a_watched_run_is_bit_equal(k, tmp_path, monkeypatch):
    stop = EarlyStopSpec(patience=1, every=3)
    whole, history = watched(DEV, stop)
    with monkeypatch.context() as m:
        stop_at(m, k)
        with pytest.raises(Stop): watched(DEV, stop, work=tmp_path, every=2)
    again, resumed = watched(DEV, stop, work=tmp_path, every=2)
    assert torch.equal(again.stack.theta, whole.stack.theta)
    assert resumed==history
    with pytest.raises(HydraError, match='other rows'): watched([d[:1] for d in DEV], stop, work=tmp_path)

@pytest.mark.parametrize('epochs', [.4, 1, 1.5, 2.25])
def test_part_of_an_epoch_is_the_beginning_of_a_whole_one(epochs):
    def seen(n, e):
        steps = plan_steps(ROWS, EXPERTS, replace(SPEC, epochs=n))
        return [x.id for s in steps for f,x in s if f==e]
    for e,rows in enumerate(ROWS): assert seen(epochs, e)==seen(3, e)[:round(len(rows)*epochs)]

