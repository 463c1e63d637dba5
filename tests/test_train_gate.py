"""Training gates: the gradient of the formula, the same in lanes and passes, killed and resumed, refusals before
anything is trained"""
import os, signal, subprocess, sys, time
from dataclasses import replace
import pytest, torch
from hydramoe.foundations.core import HydraError
from hydramoe.experts.gates import one_hot
from hydramoe.experts.model import gated
from hydramoe.experts.score import token_losses
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.train import TrainSpec, sum_gradients, training_mode, using_threads
from hydramoe.hydra.gate_losses import LOSSES
from hydramoe.hydra.train_gate import GateRows, GateRun, GateTraining, train_gate
from hydramoe.hydra.trained_gate import TRAINED_KINDS, SCORES, GateSpec, trained_gate
from hydramoe.models.base import tiny_base
from hydramoe.models.encode import Example
from helpers import root
from stacks import fill, rand

def rows(n=6, length=30, seed=0):
    ids = torch.randint(3, 250, (n,length), generator=rand(seed)).tolist()
    return [Example(ids=own[:length-i], n_prompt=8, id=f'r{i}', domain='any') for i, own in enumerate(ids)]

def noisy(shared=False, slots=3):
    model = gated(tiny_base(), slots, LoraSpec(4), shared)
    if shared: model.stack.init_expert(model.stack.shared, 9)
    fill(model.stack)
    return model

def known_of(examples, slots=3, seed=1):
    weights = torch.softmax(torch.randn(len(examples), slots, generator=rand(seed)), -1)
    losses = torch.rand(len(examples), slots, generator=rand(seed+1))
    return GateRows(examples, weights, weights.argmax(1), losses)

def gradients(model, gate, known, training, threads=1):
    "Of the gate and of the experts, in one step of all rows"
    run = GateRun(gate, known, training)
    with training_mode(model), using_threads(threads):
        total = sum_gradients(model, [(0, x) for x in known.examples], training.spec, run=run.run)
        return total[1+len(run.names):].clone(), model.stack.grad.clone()

@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('score', SCORES)
def test_the_gradient_is_that_of_differences(score, shared):
    "In the direction of some of the gate's numbers and of some of the experts', by finite differences of the mean loss"
    model, examples = noisy(shared), rows(3)
    known = known_of(examples)
    gate = trained_gate(model.stack, GateSpec(score=score, start=.3))
    of_gate, of_experts = gradients(model, gate, known, GateTraining(TrainSpec(), experts=TrainSpec()))
    def loss():
        nll = [token_losses(model, [x], gate.on(known.weights[i:i+1])) for i, x in enumerate(examples)]
        return torch.cat(nll).double().mean().item()
    for numbers, grad, step in ((gate.phi, of_gate, 3e-2), (model.stack.theta, of_experts, 3e-3)):
        way = grad/grad.norm()
        with torch.no_grad():
            numbers += step*way
            above = loss()
            numbers -= 2*step*way
            below = loss()
            numbers += step*way
        assert (above-below)/(2*step)==pytest.approx(grad.norm().item(), rel=.05)

@pytest.mark.parametrize('micro', [1, 60, 900])
def test_passes_and_lanes_add_up(micro):
    model, examples = noisy(), rows(8, 130)
    known = known_of(examples)
    def of(**how):
        gate = trained_gate(model.stack, GateSpec(start=.2))
        training = GateTraining(TrainSpec(micro_tokens=how['micro']), TrainSpec())
        return gradients(model, gate, known, training, how['threads'])
    for a, b in zip(of(micro=micro, threads=2), of(micro=10_000, threads=1)):
        torch.testing.assert_close(a, b, atol=1e-5*b.abs().max().item()+1e-8, rtol=1e-3)

def test_frozen_experts_get_no_gradient_and_stay():
    model, known = noisy(), known_of(rows())
    before = model.stack.theta.clone()
    _, of_experts = gradients(model, trained_gate(model.stack), known, GateTraining())
    assert not of_experts.any()
    train_gate(model, trained_gate(model.stack), known, GateTraining(TrainSpec(lr=.1, rows=3)))
    assert torch.equal(model.stack.theta, before)

@pytest.mark.parametrize('kind', [k for k in TRAINED_KINDS if k!='phatgoose'])
def test_no_kind_is_without_a_gradient_at_one_expert(kind):
    model, known = noisy(), known_of(rows())
    gate = trained_gate(model.stack, replace(TRAINED_KINDS[kind], top_k=1))
    of_gate, _ = gradients(model, gate, known, GateTraining())
    assert of_gate.abs().max()>1e-6

def test_the_trap_of_a_renormalised_single_expert():
    """Without the straight-through estimator the softmax of one number has no gradient: that's what the test above is
    about"""
    from hydramoe.hydra.trained_gate import best_k, softmax_weights
    logits = torch.randn(5, 3, generator=rand(0)).requires_grad_()
    weights = softmax_weights(logits, best_k(logits, 1)[1])
    (weights*torch.randn(5, 3, generator=rand(1))).sum().backward()
    assert not logits.grad.any()

def test_every_loss_is_finite_in_training_and_noted():
    model, known = noisy(), known_of(rows())
    training = GateTraining(TrainSpec(rows=3), losses={name: .1 for name in LOSSES}|dict(cross_entropy=1.))
    history = train_gate(model, trained_gate(model.stack, GateSpec(top_k=2)), known, training)
    assert set(history[0]['loss'])==set(LOSSES)
    assert all(abs(v)<100 for h in history for v in h['loss'].values())
    assert history[0]['flips']<=1
    assert history[0]['effective'][0]>=1

def test_a_gate_that_is_not_finite_is_not_stepped():
    model, known = noisy(), known_of(rows())
    known.weights[0] = torch.tensor([torch.nan, .5, .5])
    gate = trained_gate(model.stack)
    history = train_gate(model, gate, known, GateTraining(TrainSpec(rows=6)))
    assert history[0]['skipped']==['gate']
    assert not gate.phi.any()

KILLED = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_train_gate import known_of, noisy, rows
from hydramoe.experts.train import TrainSpec
from hydramoe.hydra.train_gate import GateTraining, train_gate
from hydramoe.hydra.trained_gate import GateSpec, trained_gate
torch.set_num_threads(1)
model, known = noisy(), known_of(rows(12))
gate = trained_gate(model.stack, GateSpec(noise='gumbel', top_k=2))
history = train_gate(model, gate, known, GateTraining(TrainSpec(rows=1, epochs=8), TrainSpec()), work={work!r}, every=3)
torch.save((gate.phi, model.stack.theta, [h['loss'] for h in history]), {out!r})
'''

def test_killed_in_the_middle_it_comes_to_the_same(tmp_path):
    def run(name, kill):
        work, out = tmp_path/name, tmp_path/f'{name}.pt'
        code = KILLED.format(tests=str(root/'tests'), work=str(work), out=str(out))
        p = subprocess.Popen([sys.executable, '-c', code], env=os.environ|dict(HYDRAMOE_QUIET='1', OMP_NUM_THREADS='1'))
        if kill:
            until = time.monotonic()+120
            while not list(work.glob('step-*')) and p.poll() is None and time.monotonic()<until: time.sleep(.02)
            p.send_signal(signal.SIGKILL)
        p.wait(300)
        return out
    whole = torch.load(run('whole', False))
    assert not run('killed', True).exists()
    assert list((tmp_path/'killed').glob('step-*'))
    again = torch.load(run('killed', False))
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    assert whole[2]==again[2]

def test_what_does_not_fit_is_refused_first():
    examples = rows()
    with pytest.raises(HydraError, match='same id'): GateRows([examples[0]]*2)
    with pytest.raises(HydraError, match='`weights` for 6'): GateRows(examples, torch.ones(3,3))
    with pytest.raises(HydraError, match='loss'): GateTraining(losses=dict(joy=1.))
    with pytest.raises(HydraError, match='stop_on'): GateTraining(stop_on=('flood',))
    model = noisy()
    with pytest.raises(HydraError, match='checkpointing off'):
        train_gate(model, trained_gate(model.stack, GateSpec(noise='gumbel')), known_of(examples), checkpointing=True)

def test_checkpointing_changes_nothing():
    model, known = noisy(), known_of(rows())
    def trained(checkpointing):
        gate = trained_gate(model.stack)
        train_gate(model, gate, known, GateTraining(TrainSpec(rows=3)), checkpointing=checkpointing)
        return gate.phi
    torch.testing.assert_close(trained(True), trained(False), atol=1e-6, rtol=1e-4)

def test_own_rows_train_own_vectors_alone():
    "PHATGOOSE: a row's gradient reaches its own expert's vector and no other"
    model, examples = noisy(), rows(4)
    own = torch.tensor([0, 0, 0, 0])
    known = GateRows(examples, domain=own, allowed=one_hot(own, 3).bool())
    gate = trained_gate(model.stack, TRAINED_KINDS['phatgoose'])
    of_gate, _ = gradients(model, gate, known, GateTraining())
    gate.grad.copy_(of_gate)
    for p in gate.views.values():
        assert p['u'].grad[0].any()
        assert not p['u'].grad[1:].any()
