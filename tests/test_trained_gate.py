"""Trained gates: begin as the router in every stack, are the same alone and in a batch, in bundles that lie, in
transformers"""
import pytest, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
from hydramoe.foundations.core import HydraError
from hydramoe.models.base import tiny_base
from hydramoe.experts.gate_plan import FEW
from hydramoe.experts.model import gated
from hydramoe.experts.stack import LoraSpec
from hydramoe.hydra import Hydra
from hydramoe.hydra.bundle import BundleError, check_bundle
from hydramoe.hydra.change import add_expert, remove_expert
from hydramoe.hydra.trained_gate import TRAINED_KINDS, SCORES, WEIGHTS, GateSpec, TrainedGate, trained_gate
from hydras import NAMES, by_hand, noisy, reseal
from stacks import batch, fill, rand

def stack_of(kind):
    "The tiny base with experts of noise: plain, beside a shared one, above a fork, and too many to compute all"
    if kind=='many':
        m = gated(tiny_base(), FEW+5, LoraSpec(4))
        fill(m.stack)
        return m
    return noisy(tiny_base(layers=4), fork=.5 if kind=='forked' else 0, shared=kind=='shared')

def router_rows(rows, E, seed=0): return torch.softmax(2*torch.randn(rows, E, generator=rand(seed)), -1)

def logits(m, x, gates):
    with torch.no_grad(): return m(**x, gates=gates).logits

@pytest.mark.parametrize('weigh', [w for w in WEIGHTS if w!='softmax_k'])
@pytest.mark.parametrize('place', ['group', 'block', 'model'])
@pytest.mark.parametrize('kind', ['plain', 'shared', 'forked', 'many'])
def test_a_correcting_gate_begins_as_the_router(kind, place, weigh):
    m, x = stack_of(kind), batch(pads=(0,0,0))
    weights = router_rows(3, m.stack.slots)
    for score in SCORES:
        gate = trained_gate(m.stack, GateSpec(place=place, weigh=weigh, score=score))
        torch.testing.assert_close(logits(m, x, gate.on(weights)), logits(m, x, weights), atol=2e-4, rtol=1e-4)

@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('kind', ['plain', 'shared', 'forked', 'many'])
def test_of_the_best_k_it_begins_as_the_router_that_keeps_k(kind, k):
    m, x = stack_of(kind), batch(pads=(0,0,0))
    weights = router_rows(3, m.stack.slots)
    kept = torch.zeros_like(weights).scatter(1, weights.topk(k).indices, weights.topk(k).values)
    kept /= kept.sum(1, keepdim=True)
    gate = trained_gate(m.stack, GateSpec(top_k=k))
    torch.testing.assert_close(logits(m, x, gate.on(weights)), logits(m, x, kept), atol=2e-4, rtol=1e-4)

@pytest.mark.parametrize('kind', ['plain', 'shared', 'many'])
@pytest.mark.parametrize('name', [n for n in TRAINED_KINDS if n!='smear'])
def test_a_row_is_the_same_alone_and_in_a_batch(name, kind):
    m, x = stack_of(kind), batch(pads=(0,0,0))
    weights = router_rows(3, m.stack.slots)
    weights[1] = 0.
    gate = trained_gate(m.stack, TRAINED_KINDS[name])
    gate.phi.normal_(std=.3, generator=rand(1))
    together = logits(m, x, gate.on(weights))
    for r in range(3):
        alone = {k: v[r:r+1] for k, v in x.items()}
        torch.testing.assert_close(together[r:r+1], logits(m, alone, gate.on(weights[r:r+1])), atol=2e-4, rtol=1e-4)

def test_many_experts_are_computed_as_few_are():
    m, x = stack_of('many'), batch(pads=(0,0,0))
    weights = router_rows(3, m.stack.slots)
    gate = trained_gate(m.stack, GateSpec(top_k=2, start=.3))
    by_choice = logits(m, x, gate.on(weights))
    import hydramoe.experts.gate_plan as plans, hydramoe.hydra.trained_gate as gates
    before = plans.FEW
    try:
        plans.FEW = gates.FEW = 1000
        torch.testing.assert_close(logits(m, x, gate.on(weights)), by_choice, atol=2e-4, rtol=1e-4)
    finally: plans.FEW = gates.FEW = before

def corrected(seed=1, **kw):
    "A Hydra of noise with a gate of noise"
    hydra = by_hand(**kw)
    gate = trained_gate(hydra.model.stack, GateSpec(top_k=2))
    gate.phi.normal_(std=.5, generator=rand(seed))
    return hydra.correct_by(gate)

@pytest.mark.parametrize('shared', [False, True])
def test_a_bundle_there_and_back_and_in_transformers(tmp_path, shared):
    hydra = corrected(shared=shared)
    said = ['the court and the law', 'a ship']
    answers = hydra.generate(said, max_new_tokens=8)
    manifest = check_bundle(hydra.save(tmp_path/'h'))
    assert (manifest['format'], manifest['gate']) == (3, 'trained')
    assert Hydra.load(tmp_path/'h').generate(said, max_new_tokens=8)==answers
    beams = dict(max_new_tokens=8, num_beams=2)
    assert Hydra.load(tmp_path/'h').generate(said, **beams)==hydra.generate(said, **beams)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path/'h')
    ids = hydra._tokenize([hydra.fold(said[0])])
    out = auto.generate(**ids, max_new_tokens=8, do_sample=False)
    answer = out[0, ids['input_ids'].shape[1]:]
    assert hydra.base.tokenizer.decode(answer, skip_special_tokens=True).strip()==answers[0].strip()
    assert hydra.correct_by(None).generate(said, max_new_tokens=8)!=answers

def test_a_mixture_of_requests_is_each_of_them():
    hydra = corrected()
    said = ['the law', 'a ship at sea', 'the sum']
    each = [None, 'sea', 'base']
    one_by_one = [hydra.ask(p, max_new_tokens=6, expert=e) for p, e in zip(said, each)]
    weights = hydra.gates(said)
    weights[1:] = hydra.gates(said[1:], each[1:])
    by_name = [hydra.by_name(row[None]) for row in weights]
    assert hydra.generate(said, max_new_tokens=6, expert=by_name)==one_by_one

def altered_tensor(bundle):
    file = bundle/'gates/gate.safetensors'
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name]+1
    save_file(tensors, file)

def other_names(bundle):
    file = bundle/'gates/gate.json'
    file.write_text(file.read_text().replace('"sea"', '"see"'))

def exchanged(file, old, new): file.write_text(file.read_text().replace(old, new))

@pytest.mark.parametrize('harm, says', [
    (altered_tensor, 'gates/gate.safetensors'), (other_names, 'gates/gate.json'),
    (lambda b: (b/'gates/gate.json').unlink(), 'gates/gate.json'),
    (lambda b: exchanged(b/'hydra.json', '"trained"', '"untrained"'), 'hydra.json')])
def test_a_bundle_that_was_harmed_is_refused(tmp_path, harm, says):
    bundle = corrected().save(tmp_path/'h')
    harm(bundle)
    with pytest.raises(HydraError, match=says): check_bundle(bundle)

def test_a_forger_who_seals_again_is_refused(tmp_path):
    bundle = corrected().save(tmp_path/'h')
    other_names(bundle)
    reseal(bundle)
    with pytest.raises(HydraError, match='gate.json was altered'): check_bundle(bundle)
    bundle = corrected().save(tmp_path/'i')
    reseal(bundle, lambda about: about.pop('gate'))
    with pytest.raises(BundleError, match='gates is extra'): check_bundle(bundle)

def test_experts_under_a_trained_gate_stay_as_they_are(tmp_path):
    bundle = corrected().save(tmp_path/'h')
    with pytest.raises(HydraError, match='take the gate off'): add_expert(bundle, [], 'new', tmp_path/'i')
    with pytest.raises(HydraError, match='take the gate off'): remove_expert(bundle, 'sea', tmp_path/'i')
    assert not (tmp_path/'i').exists()

def test_a_gate_for_others_is_refused():
    hydra = by_hand()
    gate = trained_gate(hydra.model.stack)
    others = TrainedGate(NAMES[::-1], gate.spec, gate.leaders, gate.shapes)
    with pytest.raises(HydraError, match='train it for this stack'): hydra.correct_by(others)
    with pytest.raises(HydraError, match='pool=True'): GateSpec(pool=True, score='low_rank')
    with pytest.raises(HydraError, match='weigh'): GateSpec(weigh='hope')
