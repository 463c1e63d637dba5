"Gates that draw: as often as their probabilities say, the same in a generation and in training; what a reward moves"
import pytest, torch
from hydramoe.foundations.core import HydraError
from hydramoe.data.check import CHECKS
from hydramoe.experts.gate_plan import FEW
from hydramoe.experts.gates import make_plan
from hydramoe.experts.model import gated
from hydramoe.experts.stack import LoraSpec
from hydramoe.hydra.reward import (
    DrawingGate, GrpoRun, GrpoSpec, advantages, policy_loss, replay, reward_of, roll_out)
from hydramoe.hydra.trained_gate import Batch, GateSpec, trained_gate
from hydramoe.models.base import tiny_base
from stacks import fill, rand

def letter_task(letter, i): return dict(prompt=[dict(role='user', content=f'{letter*6} {i}')], letter=letter)
TASKS = [letter_task(letter, i) for i in range(2) for letter in 'abc']
def begins(task, answer): return float(answer.strip().startswith(task['letter']))

def noisy(slots=3):
    "The tiny base with experts of noise, and its tokenizer"
    base = tiny_base()
    model = gated(base, slots, LoraSpec(4))
    fill(model.stack)
    return model, base.tokenizer

@pytest.mark.parametrize('k', [1, 2])
def test_draws_follow_the_probabilities(k):
    model, _ = noisy()
    gate = trained_gate(model.stack, GateSpec(top_k=k, corrects=False))
    layer = model.stack.layers[0].name
    wanted = torch.tensor([.6, .3, .1])
    gate.views[layer]['b'].data.copy_(wanted.log())
    work = DrawingGate(gate, Batch(generator=rand(0)))
    work(torch.zeros(1, 20000, 64), layer)
    index = work.drawn[layer][0][0]
    first = torch.bincount(index[:,0], minlength=3)/len(index)
    if k==1: torch.testing.assert_close(first, wanted, atol=.02, rtol=0)
    else: # without replacement: a pair comes as often as its two orders together
        def probability(a, b): return wanted[a]*wanted[b]/(1-wanted[a])+wanted[b]*wanted[a]/(1-wanted[b])
        pairs = index.sort(1).values
        for a, b in ((0,1), (0,2), (1,2)):
            seen = ((pairs[:,0]==a)&(pairs[:,1]==b)).float().mean()
            assert abs(seen-probability(a, b))<.02

SPECS = [GateSpec(top_k=1, start=.2), GateSpec(top_k=2, start=.2, place='block'),
         GateSpec(top_k=1, start=.2, place='model', pool=True)]

@pytest.mark.parametrize('slots', [3, FEW+4])
@pytest.mark.parametrize('spec', SPECS)
def test_training_sees_the_choices_of_the_generation_as_it_did(spec, slots, monkeypatch):
    "Log-probabilities with a cache, token by token, are those of one forward over all of them"
    model, tokenizer = noisy(slots)
    gate = trained_gate(model.stack, spec)
    said = {}
    inner = DrawingGate.draw
    def noting(self, logits):
        index = inner(self, logits)
        log_p = logits.log_softmax(-1)[:,:index.shape[1]].gather(-1, index).sum(-1)
        said.setdefault(len(said.setdefault('order', [])), log_p)
        said['order'].append(0)
        return index
    monkeypatch.setattr(DrawingGate, 'draw', noting)
    weights = torch.softmax(torch.randn(2, slots, generator=rand(3)), -1)
    how = GrpoSpec(answers=2, prompts=2, max_new_tokens=5)
    found = roll_out(model, gate, tokenizer, TASKS[:2], weights, how, begins)
    log_p, _, counted = replay(model, gate, found, how)
    places = len(found.drawn)
    drawn = [said[i] for i in range(len(said['order']))]
    if spec.pool: in_turn = drawn[:places]
    else: in_turn = [torch.cat(drawn[place::places], 1) for place in range(places)]
    then = torch.cat(in_turn, 1)
    torch.testing.assert_close(log_p[counted.bool()], then[counted.bool()], atol=2e-3, rtol=1e-3)

def test_what_went_better_becomes_likelier():
    model, tokenizer = noisy()
    gate = trained_gate(model.stack, GateSpec(top_k=1, place='model', pool=True))
    how = GrpoSpec(answers=8, prompts=1, max_new_tokens=2, lr=.05, inner=2)
    run = GrpoRun(model, gate, tokenizer, how, begins)
    found = roll_out(model, gate, tokenizer, TASKS[:1], torch.full((1,3), 1/3), how, begins)
    whom = next(iter(found.drawn.values())).flatten()
    found.rewards = (whom==whom[0]).float() # as if the first one's expert had always been right
    before, _, _ = replay(model, gate, found, how)
    ratios, _ = run.learn(found)
    after, _, _ = replay(model, gate, found, how)
    assert ratios[0]==1.
    assert (after[whom==whom[0]]>before[whom==whom[0]]).all()
    assert (after[whom!=whom[0]]<before[whom!=whom[0]]).all()

def test_a_group_that_agrees_moves_nothing():
    model, tokenizer = noisy()
    gate = trained_gate(model.stack, GateSpec(top_k=1))
    how = GrpoSpec(answers=2, prompts=1, max_new_tokens=2, kl=0.)
    run = GrpoRun(model, gate, tokenizer, how, begins)
    found = roll_out(model, gate, tokenizer, TASKS[:1], torch.full((1,3), 1/3), how, lambda task, answer: 1.)
    run.learn(found)
    assert not gate.phi.any()

def test_the_gradient_is_that_of_the_clipped_objective():
    log_p = torch.randn(4, 6, generator=rand(0)).requires_grad_()
    before = log_p.detach()+.3*torch.randn(4, 6, generator=rand(1))
    advantage, counted = torch.tensor([1.,-1.,.5,-2.]), (torch.rand(4, 6, generator=rand(2))>.3).float()
    policy_loss(log_p, before, advantage, counted, .2).backward()
    for r in range(4):
        for d in range(6):
            ratio = (log_p[r,d]-before[r,d]).exp().item()
            clipped = (ratio>1.2 and advantage[r]>0) or (ratio<.8 and advantage[r]<0)
            want = 0. if clipped or not counted[r,d] else -advantage[r].item()*ratio/counted[r].sum().item()/4
            assert log_p.grad[r,d].item()==pytest.approx(want, abs=1e-6)

def test_advantages_of_each_prompt_sum_to_nothing():
    rewards = torch.rand(12, generator=rand(0))
    assert advantages(rewards, 4).view(3, 4).sum(1).abs().max()<1e-4

def test_a_program_runs_only_if_the_task_says_so():
    task = dict(prompt=[], check=dict(kind='program', tests='assert f()==1', entry='f'))
    with pytest.raises(HydraError, match='allow_code'): reward_of(task, 'def f(): return 1')
    assert set(CHECKS)=={'number', 'math', 'choice', 'rows', 'call', 'no_call', 'program'}

def test_make_plan_takes_a_gate_that_draws():
    model, _ = noisy()
    work = DrawingGate(trained_gate(model.stack, GateSpec(top_k=1, corrects=False)), Batch(generator=rand(0)))
    with torch.no_grad(): assert model(torch.arange(3, 9)[None], gates=work).logits.isfinite().all()
    make_plan(work, model.stack)
