"Clusters that listen to the loss, gradients of domains, and cores."
import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import read_json, write_jsonl
from hydramoe.foundations.store import sealing
from hydramoe.models.base import tiny_base
from hydramoe.models.encode import Example
from hydramoe.experts.cores import CoreSpec, fit_cores, place, pull_back
from hydramoe.experts.gradients import (
    domain_gradients, gradient_cosines, gradient_parts, gradient_products, group_cosines, lot_gap)
from hydramoe.experts.listen import (
    ListenSpec, can_follow, deal_halves, reassign, reassign_stage, record_table, run_round)
from hydramoe.experts.model import gated
from hydramoe.experts.score import Losses, save_losses
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.train import TrainSpec

# ---- records to residuals

def least_by_program(losses, floor):
    "The least total loss, by a linear program: shares of records, as large as the floor for each residual"
    n, k = losses.shape
    most = np.where(np.isfinite(losses), 1., 0.).ravel()
    each = np.kron(np.eye(n), np.ones(k))
    sizes = np.kron(np.ones(n), np.eye(k))
    cost = np.where(np.isfinite(losses), losses, 0.).ravel()
    found = linprog(cost, -sizes, np.full(k, -floor), each, np.ones(n), list(zip(np.zeros(n*k), most)))
    return found.fun if found.success else None

@pytest.mark.parametrize('seed', range(12))
def test_reassign_is_the_best_there_is(seed):
    draw = rng(seed, 'reassign')
    n, k = int(draw.integers(6, 30)), int(draw.integers(2, 5))
    losses = draw.random((n, k))+np.arange(k)*draw.random() # some residuals are worse for all
    if seed%2: losses[draw.random((n, k))<.2] = np.inf
    losses[:,0] = np.where(np.isfinite(losses).any(1), losses[:,0], 1.)
    floor = int(draw.integers(0, n//k+1))
    best = least_by_program(losses, floor)
    if best is None:
        with pytest.raises(HydraError, match='may not have as many'): reassign(losses, floor)
        return
    labels = reassign(losses, floor)
    assert np.bincount(labels, minlength=k).min()>=floor
    assert losses[np.arange(n),labels].sum()==pytest.approx(best)

def test_reassign_hears_differences_only():
    draw = rng(0, 'differences')
    losses = draw.random((40, 4))+[0, .5, .6, .9]
    shift = 10*draw.random((40, 1)) # a long record loses more everywhere
    np.testing.assert_array_equal(reassign(losses, 8), reassign(losses+shift, 8))
    np.testing.assert_array_equal(reassign(losses, 0), losses.argmin(1))

@pytest.mark.parametrize('losses,floor,says', [
    (np.full((4, 2), np.nan), 0, 'not a number'), (np.full((4, 2), np.inf), 0, 'none at all'),
    (np.zeros((4, 2)), 3, 'at most 2'), (np.zeros((4, 2)), -1, 'floor')])
def test_what_reassign_refuses(losses, floor, says):
    with pytest.raises(HydraError, match=says): reassign(losses, floor)

def test_halves_are_two_parts_of_each_group():
    groups = dict(a=[f'a{i}' for i in range(7)], b=['b0', 'b1'])
    halves = deal_halves(groups, seed=3)
    for name, ids in groups.items():
        first, second = (half[name] for half in halves)
        assert sorted(first+second)==sorted(ids)
        assert abs(len(first)-len(second))<=1
        assert len(second)
    assert deal_halves(groups, 3)==halves!=deal_halves(groups, 4)
    with pytest.raises(HydraError, match="'c' has 1"): deal_halves(dict(c=['c0']), 0)

def scored(folder, ids, sums, columns):
    "A sealed score of records, each with two tokens"
    nll = np.repeat(np.asarray(sums, np.float32)/2, 2, axis=1)
    folder.mkdir()
    save_losses(Losses(nll, np.arange(0, 2*len(ids)+1, 2), list(ids), ['d']*len(ids), list(columns)), folder)
    return folder

def test_a_table_puts_scores_together(tmp_path):
    parts = [scored(tmp_path/'a', ['x', 'y'], [[1, 2], [3, 4]], ['a', 'b']),
             scored(tmp_path/'b', ['z'], [[5], [6]], ['a', 'b'])]
    ids, table = record_table(['a', 'b'], parts)
    assert ids==['x', 'y', 'z']
    assert table.tolist()==[[1, 3], [2, 4], [5, 6]]
    near = dict(x=['c', 'a'], y=['b', 'c'], z=['a', 'b'])
    _, few = record_table(['a', 'b', 'c'], parts, near)
    assert few.tolist()==[[3, np.inf, 1], [np.inf, 2, 4], [5, 6, np.inf]]

def test_a_round_moves_whom_it_says(tmp_path):
    groups = dict(a=['x', 'y'], b=['z', 'w'])
    part = scored(tmp_path/'a', ['w', 'x', 'y', 'z'], [[1, 1, 9, 1], [2, 2, 2, 2]], ['a', 'b'])
    (tmp_path/'out').mkdir()
    reassign_stage(tmp_path/'out', groups=groups, floor=1, part=part)
    found = read_json(tmp_path/'out'/'groups.json')
    assert found['groups']==dict(a=['w', 'x', 'z'], b=['y'])
    assert found['moved']==.75
    assert found['before']==pytest.approx((2+1+9+2)/4)
    assert found['after']==pytest.approx((1+1+2+1)/4)

def toy_record(i):
    "Record i: its kind is the parity, and its answer the kind's letter"
    asked, said = dict(role='user', content=f'{i%2}: {i}'), dict(role='assistant', content='mw'[i%2]*5)
    return dict(id=f'r{i}', domain='d', source='toy', license='CC0-1.0', prompt=[asked], completion=[said])

@pytest.mark.slow
def test_a_round_goes_on_from_what_is_sealed(tmp_path):
    import shutil
    records = [toy_record(i) for i in range(16)]
    with sealing(tmp_path/'rows', {}) as d: write_jsonl(d/'train.jsonl', records)
    groups = dict(a=[f'r{i}' for i in range(8)], b=[f'r{i}' for i in range(8, 16)])
    how = dict(base='tiny', quant='fp32', lora=dict(rank=2), spec=dict(lr=3e-3))
    def run(): return run_round(groups, how, dict(rows_dir=tmp_path/'rows'), ListenSpec(), root=tmp_path/'stages')
    made = run()
    text = (made/'groups.json').read_bytes()
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path/'stages').glob('train_shared_stage-*/history.json')}
    assert len(trained)==2
    for p in [made, *(tmp_path/'stages').glob('score_adapters_stage-*')]: shutil.rmtree(p)
    assert run()==made
    assert (made/'groups.json').read_bytes()==text
    assert trained=={p: p.stat().st_mtime_ns for p in trained}

def test_a_classifier_follows_what_is_in_the_vectors_and_nothing_else():
    labels = np.arange(200)%2
    draw = rng(0, 'vectors')
    x = draw.normal(size=(200, 5))
    by_lot = can_follow(x, labels)
    x[:,3] += 4*labels
    assert can_follow(x, labels)['agreement']>.9
    assert by_lot['agreement']<.65
    assert by_lot['chance']==.5
    with pytest.raises(HydraError, match='fewer than folds'): can_follow(x, [0]*197+[1]*3)

# ---- gradients

tokenizer = tiny_base().tokenizer

def example(letter, i):
    prompt = tokenizer.encode(f'{letter} {i}:', add_special_tokens=False)
    answer = tokenizer.encode(letter*(2+i%3), add_special_tokens=False)
    return Example(prompt+answer, len(prompt), f'{letter}{i}', letter)

def filled(slots, seed=0):
    "A tiny model whose slots all hold one adapter"
    model = gated(tiny_base(), slots, LoraSpec(rank=3))
    for e in range(slots): model.stack.init_expert(e, seed=0, name=f'e{e}')
    noise = .02*torch.randn(model.stack.theta.shape[1], generator=torch.Generator().manual_seed(seed))
    model.stack.theta.add_(noise)
    return model

def test_gradients_of_groups_follow_from_those_of_records():
    groups = {letter: [example(letter, i) for i in range(3)] for letter in 'mw'}
    model = filled(2)
    start = model.stack.theta[0].clone()
    of_groups = domain_gradients(model, start, groups)
    records = sum(groups.values(), [])
    each = filled(6)
    of_records = domain_gradients(each, start, {x.id: [x] for x in records})
    for e, own in enumerate(groups.values()): # alone, a group has the gradient that it has among the others
        alone = domain_gradients(filled(1), start, dict(own=own))
        torch.testing.assert_close(of_groups[e], alone[0], atol=1e-5, rtol=1e-4)
    tokens = [len(x.ids)-x.n_prompt for x in records]
    for key, part in gradient_parts(each.stack, of_records).items():
        found = group_cosines(gradient_products(part), tokens, np.array([0, 0, 0, 1, 1, 1]))
        own = gradient_parts(model.stack, of_groups)[key]
        np.testing.assert_allclose(found, gradient_cosines(gradient_products(own)), atol=1e-4)

def test_parts_are_all_of_it():
    model = filled(2)
    grad = torch.randn(model.stack.theta.shape)
    for by in ('block', 'kind', 'all'):
        parts = gradient_parts(model.stack, grad, by)
        total = sum(gradient_products(part) for part in parts.values())
        np.testing.assert_allclose(total, gradient_products(grad), rtol=1e-9)

def test_a_gap_is_where_groups_differ():
    draw = rng(0, 'gap')
    labels = np.repeat(np.arange(3), 8)
    noise = draw.normal(size=(24, 60))
    apart = noise+3*np.eye(3, 60)[labels]+1
    found = lot_gap(apart@apart.T, np.ones(24), labels)
    none = lot_gap((noise+1)@(noise+1).T, np.ones(24), labels)
    assert found['gap']>.05
    assert found['p']<.01
    assert abs(none['gap'])<.03

# ---- cores

def test_cores_at_rest_are_the_adapter():
    stack = filled(3).stack
    before = stack.theta.clone()
    place(stack, before[0], torch.zeros(3, len(stack.layers), 3, 3))
    assert torch.equal(stack.theta, before)

def test_the_gradient_of_cores_is_autograds():
    model = filled(3)
    stack = model.stack.trainable()
    stack.grad.copy_(torch.randn(stack.theta.shape, generator=torch.Generator().manual_seed(1)))
    adapter = stack.theta[0].detach().clone()
    deltas = torch.randn(3, len(stack.layers), 3, 3, generator=torch.Generator().manual_seed(2))
    share = torch.tensor([.5, .2, .3])
    of_shared, of_cores = pull_back(stack, adapter, deltas, share)
    from hydramoe.experts.cores import upper_views
    a, d = adapter.clone().requires_grad_(), deltas.clone().requires_grad_()
    means = torch.zeros(3) # the loss of each expert, to first order
    for i, ((A, B), (dA, dB)) in enumerate(zip(upper_views(stack, a[None]), upper_views(stack, stack.grad))):
        means = means+((torch.eye(3)+d[:,i])@A*dA).sum((1, 2))+(B*dB).sum((1, 2))
    by_autograd, = torch.autograd.grad((share*means).sum(), a, retain_graph=True)
    torch.testing.assert_close(of_shared, by_autograd, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_cores, torch.autograd.grad(means.sum(), d)[0], atol=1e-4, rtol=1e-4)

def test_a_domain_without_rows_keeps_its_core():
    model = filled(3)
    pairs = [(e, example('mw'[e], i)) for i in range(4) for e in range(2)]
    history, deltas = fit_cores(model, pairs, TrainSpec(lr=3e-3, rows=2))
    assert deltas[0].any()
    assert deltas[1].any()
    assert not deltas[2].any()
    assert len(history)==4
    assert all('e2' not in h['loss'] for h in history)
    _, stretched = fit_cores(filled(3), pairs, TrainSpec(lr=3e-3, rows=2), CoreSpec('diagonal'))
    assert stretched.any()
    assert not (stretched*(1-torch.eye(3))).any()
