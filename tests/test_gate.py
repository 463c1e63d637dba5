"Gates against full SVD, against PEFT, against themselves in other batches; adapters of others; bundles that lie"
import json, os, shutil, subprocess, sys, threading, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from hydramoe.hydra.auto import HydraForCausalLM
from hydramoe.models.base import tiny_base
from hydramoe.foundations.core import HydraError
from hydramoe.hydra.gate import GATES, arrow, gate_use, lag, load_gate, make_gate, svd_factors, save_gate, spectr
from hydramoe.hydra.bundle import BundleError, check_bundle
from hydramoe.hydra import Hydra
from hydramoe.hydra.chat import Chat
from hydramoe.hydra.change import remove_expert
from hydramoe.hydra.adopt import adopt, summarize_adopted
from hydramoe.hydra.route import uniform_router
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import make_plan, one_hot
from hydramoe.experts.model import gated, hidden
from hydramoe.experts.trunk import run_trunk, run_above
from hydramoe.experts.adapters import with_adapters
from helpers import files_in, here, set_fields
from hydras import reseal, save_base
from stacks import batch, filled, peft, rand

KINDS = list(GATES)

def uneven():
    "Experts of rank 1, 2, 4: on all layers, the attention, the MLP of the first block"
    m = filled(3)
    for i,s in enumerate(m.stack.layers):
        A,B = m.stack.leaves[i]
        for e,on in enumerate([True, 'attn' in s.name, '.0.mlp' in s.name]):
            r = (4 if on else 0, 2*on, 1*on)[e]
            A[e,r:],B[e,:,r:] = 0.,0.
    m.stack.ranks = [4,2,1]
    m.stack.scale = torch.tensor([2.,.7,3.])
    return m

def placed_batch():
    "Padded rows, and where each token stands"
    x = batch(seed=1)
    return dict(x, position_ids=(x['attention_mask'].cumsum(1)-1).clamp(min=0))

# ---- exact
@settings(deadline=None, max_examples=30)
@given(st.integers(1,6), st.integers(6,20), st.integers(6,20), st.integers(0,99), st.integers(0,3))
def test_rotated_is_the_full_svd_and_the_same_expert(r, inp, out, seed, lost):
    g = rand(seed)
    A = torch.randn(2,r,inp, generator=g)
    B = torch.randn(2,out,r, generator=g)
    s = torch.tensor([.3,2.])
    A[:,max(1, r-lost):] = 0.
    A2,B2 = svd_factors(A, B, s)
    D = s[:,None,None]*B@A
    assert (A2.shape, B2.shape)==(A.shape, B.shape)
    torch.testing.assert_close(B2@A2, D, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(B2.mT@B2, torch.eye(r).expand(2,r,r), atol=1e-5, rtol=0)
    U,S,V = torch.linalg.svd(D.double(), full_matrices=False)
    torch.testing.assert_close(A2.norm(dim=-1), S[:,:r].float(), atol=1e-4, rtol=1e-4)
    clear = S[:,0]>1.01*S[:,1] if S.shape[1]>1 else S[:,0]>0
    heaviest = A2[:,0]/A2[:,0].norm(dim=-1, keepdim=True)
    cosines = (heaviest*V[:,0].float()).sum(-1).abs()
    torch.testing.assert_close(cosines[clear], torch.ones(int(clear.sum())), atol=1e-4, rtol=0)
    x = torch.randn(5,inp, generator=g)
    torch.testing.assert_close((x@A2.mT).norm(dim=-1), (x@D.mT).norm(dim=-1), atol=1e-3, rtol=1e-3)

def test_rotated_of_more_rows_than_the_layer_has_inputs():
    A = torch.randn(2,9,6, generator=rand(0))
    B = torch.randn(2,7,9, generator=rand(1))
    A2,B2 = svd_factors(A, B)
    assert (A2.shape, B2.shape)==((2,6,6), (2,7,6))
    torch.testing.assert_close(B2@A2, B@A, atol=1e-4, rtol=1e-4)

def by_svd(stack, name, x, kind, k, T, c):
    "Index and weight of a gate for the rows of x, from full SVDs of ΔW, one token at a time"
    deltas = [stack.delta(name, g) for g in torch.eye(stack.slots)]
    here = [e for e,d in enumerate(deltas) if d.abs().max()>0]
    def by_arrow(v, e): return (v@torch.linalg.svd(deltas[e]).Vh[0]).abs().item()
    def by_spectr(v, e): return (deltas[e]@v).norm().item()
    out = torch.zeros(len(x), stack.slots)
    for n,v in enumerate(x):
        pool = sorted(here, key=lambda e: -by_arrow(v, e))[:c] if kind=='lag' else here
        score = by_arrow if kind=='arrow' else by_spectr
        best = sorted(pool, key=lambda e: -score(v, e))[:k]
        out[n,best] = torch.tensor([score(v, e)/T for e in best]).softmax(0)
    return out
def candidates(kind, n):
    "An argument that a lag gate alone takes"
    return {'candidates': n} if kind=='lag' else {}

def check_by_svd(gate, stack, kind):
    "What a gate chooses in each layer for six rows is what `by_svd` does: the best two, at temperature .8"
    for s in stack.layers:
        x = torch.randn(6, s.n_in, generator=rand(3))
        index,weight = gate(x, s.name)
        told = torch.zeros(6, stack.slots).scatter(-1, index, weight)
        want = by_svd(stack, s.name, x, kind, 2, .8, 2)
        torch.testing.assert_close(told, want, atol=1e-3, rtol=1e-3)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('make', [filled, uneven])
def test_a_gate_is_its_formula_whatever_ranks_and_targets(kind, make):
    m = make()
    gate = make_gate(m.stack, kind, top_k=2, temperature=.8, **candidates(kind, 2))
    check_by_svd(gate, m.stack, kind)

# ---- what experts add to the seed they branched from
def seed_of(folder, stack, noise, seed=7):
    "An expert for the stack's layers, saved alone"
    one = gated(tiny_base(), 1, LoraSpec(stack.spec.rank, 3*stack.spec.rank)).stack
    one.init_expert(0, seed, 'seed')
    for _,b in one.leaves: b.add_(noise*torch.randn(b.shape, generator=rand(seed)))
    one.save_peft(folder, 0)
    return folder,one

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('make', [filled, uneven])
def test_a_gate_since_a_seed_is_the_gate_of_dense_differences(kind, make, tmp_path, monkeypatch):
    m = make()
    folder,one = seed_of(tmp_path/'seed', m.stack, .05)
    theta = m.stack.theta.clone()
    gate = make_gate(m.stack, kind, top_k=2, temperature=.8, since=folder, **candidates(kind, 2))
    assert torch.equal(m.stack.theta, theta)
    whole = m.stack.delta
    def difference(name, g):
        d = whole(name, g)
        takes_part = d.abs().max()>0 # who has no factors here does not
        return d-one.delta(name, torch.ones(1)) if takes_part else d
    monkeypatch.setattr(m.stack, 'delta', difference)
    check_by_svd(gate, m.stack, kind)

@pytest.mark.parametrize('kind', KINDS)
def test_since_a_seed_of_zero_it_is_the_plain_gate(kind, tmp_path):
    m = uneven()
    folder,_ = seed_of(tmp_path/'seed', m.stack, 0)
    plain = make_gate(m.stack, kind, top_k=2)
    since = make_gate(m.stack, kind, top_k=2, since=folder)
    for n,t in plain.layers.items():
        r = t.shape[1]
        torch.testing.assert_close(since.layers[n][:,:r], t, atol=1e-4, rtol=1e-4)
        if kind!='arrow': assert not since.layers[n][:,r:].any()

def branched(tmp_path, own=.02):
    "Experts that are a seed and, each, one direction of its own, orthogonal to the others' and to the seed's"
    m = gated(tiny_base(), 3, LoraSpec(4, 8))
    for e in range(3): m.stack.init_expert(e, 0, f'expert{e}')
    Q = {}
    for i,s in enumerate(m.stack.layers):
        A,B = m.stack.leaves[i]
        Q[s.name] = torch.linalg.qr(torch.randn(s.n_in,6, generator=rand(i))).Q.T
        out = torch.linalg.qr(torch.randn(s.n_out,6, generator=rand(99+i))).Q
        A[:,:3] = Q[s.name][:3]
        A[:,3] = Q[s.name][3:]
        B[:,:,:3] = out[:,:3]
        B[:,:,3] = own*out[:,3:].T
    seed = gated(tiny_base(), 1, LoraSpec(4, 8)).stack
    seed.init_expert(0, 0, 'seed')
    for (a,b),(A,B) in zip(seed.leaves, m.stack.leaves):
        a[0,:3] = A[0,:3]
        b[0,:,:3] = B[0,:,:3]
        a[0,3] = 0.
        b[0,:,3] = 0.
    return m,Q,seed.save_peft(tmp_path/'seed', 0)

@pytest.mark.parametrize('kind', KINDS)
def test_experts_of_one_seed_are_told_apart_by_what_is_their_own(kind, tmp_path):
    m,Q,folder = branched(tmp_path)
    how = dict(top_k=1, **candidates(kind, 3))
    plain = make_gate(m.stack, kind, since=None, **how)
    since = make_gate(m.stack, kind, since=folder, **how)
    # what the seed acts on, and a little of what is one expert's
    x = {n: torch.randn(1,3, generator=rand(5))@q[:3]+.3*q[3:] for n,q in Q.items()}
    def right(gate):
        "The share of rows that go to their expert, for each layer"
        firsts = [gate(v, n)[0][:,0] for n,v in x.items()]
        return [(first==torch.arange(3)).float().mean().item() for first in firsts]
    assert min(right(since))==1
    if kind=='arrow': assert max(right(plain))<1 # all prototypes are the seed's: whoever comes first is chosen

def test_who_is_the_seed_itself_takes_no_part(tmp_path):
    m,_,folder = branched(tmp_path)
    m.stack.load_peft(folder, 1, 'expert1')
    for kind in KINDS:
        gate = make_gate(m.stack, kind, top_k=3, since=folder)
        for n,t in gate.layers.items():
            assert not t[1].any()
            assert gate.width[n]==2
            index,_ = gate(torch.randn(1,t.shape[-1], generator=rand(0)), n)
            if kind!='lag': assert sorted(index[0].tolist())==[0,2][:gate.params['top_k']]

def test_a_fork_and_a_seed_that_does_not_fit(tmp_path):
    m = filled(3, fork=.5)
    m.stack.save_peft(tmp_path/'seed', 0)
    gate = arrow(m.stack, since=tmp_path/'seed')
    assert all('.1.' in n for n in gate.layers)
    assert all(w==2 for w in gate.width.values())
    wide = gated(tiny_base(), 1, LoraSpec(8)).stack
    wide.init_expert(0, 0, 'wide')
    wide.save_peft(tmp_path/'wide', 0)
    with pytest.raises(HydraError, match='rank 8 does not fit'): arrow(filled(3).stack, since=tmp_path/'wide')
    with pytest.raises(HydraError, match='not a PEFT adapter'): arrow(filled(3).stack, since=tmp_path)

@pytest.mark.parametrize('kind', KINDS)
def test_a_bundle_keeps_a_gate_since_a_seed_and_will_not_guess_it_again(theirs, tmp_path, kind):
    a = adopt(theirs, tmp_path/'b', quant='fp32', gate=kind, since=theirs['plain'])
    b = Hydra.load(tmp_path/'b')
    assert b.gate.params==a.gate.params
    assert b.gate.params['since'] in summarize_adopted(a)
    assert check_bundle(tmp_path/'b')['built']['gate']['since']==b.gate.params['since']
    assert b.ask('Who was that?', max_new_tokens=8)==a.ask('Who was that?', max_new_tokens=8)
    with pytest.raises(HydraError, match='what the experts add to their seed expert'):
        remove_expert(tmp_path/'b', 'regex', tmp_path/'less')
    assert not (tmp_path/'less').exists()

@pytest.mark.parametrize('kind', KINDS)
def test_the_plan_is_the_dense_formula_of_the_gates_choice(kind):
    m = uneven()
    gate = make_gate(m.stack, kind, top_k=2)
    for i,s in enumerate(m.stack.layers):
        x = torch.randn(2,5,s.n_in, generator=rand(i))
        told = torch.zeros(2,5,3).scatter(-1, *gate(x, s.name))
        with torch.no_grad():
            base = m.base.get_submodule(s.name).base_layer(x)
            want = make_plan(told, m.stack, 'dense').add(base.clone(), x, i) if told.any() else base
            got = make_plan(gate, m.stack).add(base.clone(), x, i)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

def test_a_layer_that_nobody_adapts_is_the_base():
    m = filled(2)
    A,B = m.stack.leaves[0]
    B[:] = 0.
    for k in KINDS:
        first = m.stack.layers[0]
        x,y = torch.randn(2,3,64),torch.randn(2,3,first.n_out)
        gate = make_gate(m.stack, k)
        assert gate(x, first.name)[0].shape==(2,3,0)
        assert torch.equal(make_plan(gate, m.stack).add(y.clone(), x, 0), y)

# ---- PEFT
@pytest.mark.parametrize('k, T', [(1,1.), (2,.5), (3,2.)])
def test_equal_to_pefts_arrow_where_one_direction_dominates(tmp_path, k, T):
    m = filled(3)
    for _,B in m.stack.leaves: B[:,:,1:] *= .05
    paths = [str(m.stack.save_peft(tmp_path/f'e{e}', e, 'tiny-0')) for e in range(3)]
    with warnings.catch_warnings(action='ignore'):
        config = ArrowConfig(top_k=k, router_temperature=T)
        theirs = create_arrow_model(tiny_base().model, paths, config).eval()
    x = placed_batch()
    gate,keep = arrow(m.stack, k, T),x['attention_mask'].bool()
    with torch.no_grad():
        ours = m(**x, gates=gate).logits
        base = m(**x).logits
        there = theirs(**x).logits
    torch.testing.assert_close(ours[keep], there[keep], atol=2e-3, rtol=1e-3)
    assert (ours-base).abs().max()>.1

def test_pefts_arrow_refuses_unequal_ranks_and_ours_takes_them(tmp_path):
    for n,r in (('a',2), ('b',4)): filled(1, r).stack.save_peft(tmp_path/n, 0, 'tiny-0')
    paths = {n: tmp_path/n for n in 'ab'}
    with pytest.raises(ValueError, match='rank mismatch'), warnings.catch_warnings(action='ignore'):
        create_arrow_model(tiny_base().model, [str(p) for p in paths.values()], ArrowConfig(top_k=1))
    m = with_adapters(tiny_base(), paths)
    assert m.stack.ranks==[2,4]
    assert torch.isfinite(m(**placed_batch(), gates=arrow(m.stack)).logits).all()

# ---- in the model
@pytest.mark.parametrize('kind', KINDS)
def test_rows_do_not_hang_on_their_batch(kind):
    m,x = filled(),placed_batch()
    gate = make_gate(m.stack, kind, top_k=2)
    with torch.no_grad(): together = m(**x, gates=gate).logits
    for r in range(3):
        keep = x['attention_mask'][r].bool()
        with torch.no_grad(): alone = m(input_ids=x['input_ids'][r:r+1,keep], gates=gate).logits[0]
        torch.testing.assert_close(together[r,keep], alone, atol=1e-3, rtol=1e-3)

HOW = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
WAYS = [dict(), dict(num_beams=3), dict(use_cache=False), dict(num_beams=2, num_return_sequences=2),
        dict(cache_implementation='static')]

@pytest.mark.parametrize('kw', WAYS)
def test_generation_with_cache_padding_and_beams_is_one_by_one(kw):
    m,x = filled(),placed_batch()
    x.pop('position_ids')
    gate,n = spectr(m.stack, 2),kw.get('num_return_sequences', 1)
    out = m.generate(**x, gates=gate, **HOW, **kw)[:,12:]
    for r in range(3):
        keep = x['attention_mask'][r].bool()
        alone = m.generate(x['input_ids'][r:r+1,keep], gates=gate, **HOW, **kw)[:,int(keep.sum()):]
        assert torch.equal(out[r*n:r*n+n], alone)
    assert not torch.equal(out, m.generate(**x, **HOW, **kw)[:,12:])

class Largest(TorchDispatchMode):
    "The most numbers that one tensor held"
    most = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.most = max(self.most, t.numel())
        return out

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('slots', [8,32])
def test_no_intermediate_of_all_experts_outputs(kind, slots):
    m = filled(slots=slots, rank=2)
    gate = make_gate(m.stack, kind, top_k=2)
    x = torch.randn(1,200,64, generator=rand(0))
    i = next(i for i,s in enumerate(m.stack.layers) if 'up_proj' in s.name)
    y = torch.zeros(1,200,m.stack.layers[i].n_out)
    with torch.no_grad(), Largest() as seen: make_plan(gate, m.stack).add(y, x, i)
    assert seen.most<=max(200*128, 200*slots*2, slots*2*128)<=200*slots*128/8
    with torch.no_grad(), Largest() as seen:
        torch.einsum('te,teo->to', torch.ones(200,slots), torch.ones(200,slots,128))
    assert seen.most>=200*slots*128

@settings(deadline=None, max_examples=25)
@given(st.integers(1,12), st.integers(1,4), st.integers(0,99))
def test_few_together_and_many_one_by_one_are_one_formula(slots, k, seed):
    m = filled(slots, 2)
    g = rand(seed)
    k = min(k, slots)
    i,x = 2,torch.randn(3,7,64, generator=g)
    index = torch.rand(3,7,slots, generator=g).topk(k).indices
    weight = torch.rand(3,7,k, generator=g)
    m.stack.scale = torch.rand(slots, generator=g)+.5
    told = torch.zeros(3,7,slots).scatter(-1, index, weight)
    layer = m.stack.layers[i]
    y = torch.randn(3,7,layer.n_out, generator=g)
    def said_by(e): return x@m.stack.delta(layer.name, one_hot([e], slots)[0]).mT
    with torch.no_grad():
        got = make_plan(lambda *_: (index, weight), m.stack).add(y.clone(), x, i)
        want = y+sum(told[...,e:e+1]*said_by(e) for e in range(slots))
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)

def test_a_trained_gate_gets_its_gradient_through_the_whole_model():
    m,x = filled(3),placed_batch()
    def loss(w):
        def both(h, name): return torch.tensor([0,2]).expand(*h.shape[:-1], 2), w.expand(*h.shape[:-1], 2)
        return m(**x, gates=both).logits.double().square().mean()
    w = torch.tensor([.6,.4], requires_grad=True)
    loss(w).backward()
    for j in range(2):
        d = torch.zeros(2)
        d[j] = 1e-2
        with torch.no_grad(): slope = (loss(w+d)-loss(w-d))/2e-2
        assert abs(w.grad[j]-slope)<.02*w.grad.abs().max()

def test_below_a_fork_the_trunk_is_all_there_is():
    m,x = filled(3, fork=.5),placed_batch()
    m.stack.trunk.add_(.05*torch.randn(m.stack.trunk.shape, generator=rand(5)))
    gate,args = arrow(m.stack, 2),(x['input_ids'], x['attention_mask'])
    assert all('.1.' in n for n in gate.layers)
    with torch.no_grad():
        above = run_above(m, run_trunk(m, *args), args[1], gate)
        torch.testing.assert_close(above, hidden(m, *args, gate), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('quant', ['bf16', 'nf4'])
def test_other_precisions(quant):
    m = filled(quant=quant)
    with torch.no_grad(): out = m(**placed_batch(), gates=lag(m.stack, 2, 3)).logits
    assert torch.isfinite(out).all()
    assert out.dtype==m(**placed_batch()).logits.dtype

def test_threads_with_different_gates_never_mix():
    m,x = filled(),placed_batch()
    gates = [make_gate(m.stack, k, top_k=n) for k in KINDS for n in (1,2)]
    with torch.no_grad(): want = [m(**x, gates=g).logits for g in gates]
    bad = []
    def work(j):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(m(**x, gates=gates[j]).logits, want[j]): bad.append(j)
    threads = [threading.Thread(target=work, args=(j,)) for j in range(len(gates))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not bad

def test_use_is_what_the_gate_chose():
    m,x = filled(2),placed_batch()
    for e in range(2):
        def only(h, name): return torch.full((*h.shape[:-1],1), e), torch.ones(*h.shape[:-1],1)
        only.names = m.stack.names
        use = gate_use(m, only, x['input_ids'], x['attention_mask'])
        want = one_hot([e], 2)[0].tolist()
        assert all(u.tolist()==want for u in use.values())

# ---- adapters of others
MADE = dict(
    plain=dict(r=4, lora_alpha=8, target_modules=['q_proj','v_proj']),
    stabilised=dict(r=2, lora_alpha=3, target_modules=['up_proj','o_proj'], use_rslora=True),
    patterned=dict(r=2, lora_alpha=4, target_modules=['q_proj','up_proj','down_proj'], rank_pattern={'up_proj': 5},
                   alpha_pattern={r'layers\.1\.mlp\.up_proj': 1, 'down_proj': 7}),
    regex=dict(r=3, lora_alpha=6, target_modules=r'.*layers\.1\..*(q|k)_proj'),
    some=dict(r=1, lora_alpha=1, target_modules=['gate_proj','k_proj'], layers_to_transform=[1],
              layers_pattern='layers'),
    without=dict(r=2, lora_alpha=2, target_modules=['q_proj','k_proj'],
                 exclude_modules=['model.layers.0.self_attn.q_proj']))

def name_base(folder, base):
    "Let an adapter say what its base is"
    set_fields(folder/'adapter_config.json', base_model_name_or_path=str(base))

def made_by_peft(folder, seed=0, **kw):
    "An adapter that PEFT made, all its numbers random"
    m = get_peft_model(tiny_base().model, LoraConfig(task_type='CAUSAL_LM', **kw))
    g = rand(seed)
    with torch.no_grad():
        for n,p in m.named_parameters():
            if 'lora_' in n: p.copy_(.3*torch.randn(p.shape, generator=g))
    m.save_pretrained(folder)
    name_base(folder, 'tiny-0')
    return folder

@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    d = tmp_path_factory.mktemp('theirs')
    return {n: made_by_peft(d/n, i, **kw) for i,(n,kw) in enumerate(MADE.items())}

def through_peft(folder, ids):
    "What PEFT alone computes with an adapter"
    with torch.no_grad(): return peft(tiny_base().model, folder).eval()(input_ids=ids).logits

def test_each_adapter_is_what_it_is_in_peft_and_after_another_save(theirs, tmp_path):
    m = with_adapters(tiny_base(), theirs)
    ids = placed_batch()['input_ids']
    for e,(n,folder) in enumerate(theirs.items()):
        want = through_peft(folder, ids)
        with torch.no_grad(): ours = m(input_ids=ids, gates=one_hot([e]*3, len(theirs))).logits
        torch.testing.assert_close(ours, want, atol=1e-3, rtol=1e-3)
        m.stack.save_peft(tmp_path/n, e, 'tiny-0')
        again, first = (load_file(d/'adapter_model.safetensors') for d in (tmp_path/n, folder))
        assert again.keys()==first.keys()
        torch.testing.assert_close(through_peft(tmp_path/n, ids), want, atol=1e-3, rtol=1e-3)

OTHER_ARITHMETIC = [
    dict(use_dora=True), dict(bias='all'), dict(modules_to_save=['lm_head']), dict(peft_type='IA3'),
    dict(target_parameters=['x']), dict(fan_in_fan_out=True), dict(alora_invocation_tokens=[1]),
    dict(trainable_token_indices=[1])]

@pytest.mark.parametrize('change', OTHER_ARITHMETIC)
def test_other_arithmetic_is_refused_by_name(theirs, tmp_path, change):
    folder = tmp_path/'odd'
    folder.mkdir()
    for f in theirs['plain'].iterdir():
        if f.is_file(): (folder/f.name).write_bytes(f.read_bytes())
    set_fields(folder/'adapter_config.json', **change)
    base = tiny_base()
    said = f'odd/adapter_config.json: {next(iter(change))}'
    with pytest.raises(HydraError, match=f'{said}.*only LORA|{said}.*plain LoRA'):
        with_adapters(base, dict(a=theirs['plain'], b=folder))
    gated(base, 1)

def test_adapters_of_another_base_or_of_the_head_are_refused_and_the_base_stays_whole(theirs, tmp_path):
    wide = gated(tiny_base(width=128), 1, LoraSpec(2)).stack
    wide.init_expert(0, 0, 'wide')
    base = tiny_base()
    with pytest.raises(HydraError, match=r'wide.*has shape \(2, 128\)'):
        with_adapters(base, dict(a=theirs['plain'], b=wide.save_peft(tmp_path/'wide', 0)))
    deep = gated(tiny_base(layers=3), 1, LoraSpec(2)).stack
    deep.init_expert(0, 0, 'deep')
    with pytest.raises(HydraError, match=r'deep.*layers\.2\..*no linear layer of this base'):
        with_adapters(base, dict(b=deep.save_peft(tmp_path/'deep', 0)))
    with pytest.raises(HydraError, match='lm_head.*no linear layer of this base'):
        with_adapters(base, dict(b=made_by_peft(tmp_path/'head', r=2, target_modules=['lm_head'])))
    assert torch.equal(base.model(**placed_batch()).logits, tiny_base().model(**placed_batch()).logits)
    gated(base, 1)

def test_what_the_configuration_names_must_be_there(theirs, tmp_path):
    folder, plain = tmp_path/'few', theirs['plain']
    folder.mkdir()
    (folder/'adapter_config.json').write_bytes((plain/'adapter_config.json').read_bytes())
    t = load_file(plain/'adapter_model.safetensors')
    gone = sorted(t)[0].rsplit('.lora', 1)[0]
    rest = {k: v for k,v in t.items() if not k.startswith(gone)}
    save_file(rest, folder/'adapter_model.safetensors')
    with pytest.raises(HydraError, match='lacks '+gone.replace('.', r'\.')):
        with_adapters(tiny_base(), dict(b=folder))

# ---- bundles
@pytest.fixture
def bundle(theirs, tmp_path):
    adopt(theirs, tmp_path/'b', quant='fp32', gate='arrow', top_k=2)
    return tmp_path/'b'

@pytest.mark.parametrize('kind', KINDS)
def test_a_bundle_answers_as_what_was_built(theirs, tmp_path, kind):
    a = adopt(theirs, tmp_path/'b', quant='fp32', gate=kind)
    b = Hydra.load(tmp_path/'b')
    prompts = ['Who was that?', 'And now?', 'One two three four']
    assert b.gate.kind==kind
    said = b.generate(prompts, max_new_tokens=8)
    assert said==a.generate(prompts, max_new_tokens=8)
    assert said==[b.ask(p, max_new_tokens=8) for p in prompts]
    assert b.explain('Who?')==a.explain('Who?')
    b.save(tmp_path/'b2')
    assert check_bundle(tmp_path/'b2')['seal']==check_bundle(tmp_path/'b')['seal']

def with_nan(t): t[sorted(t)[2]][0,0] = float('nan')
def with_more(t): t['more'] = torch.zeros(2)
def with_one_less(t): t.pop(sorted(t)[2])
def nudged(t): t[sorted(t)[2]][0,0] += 1e-3

ALTERED = [(with_nan, 'altered'), (with_more, 'extra more'), (with_one_less, 'missing'), (nudged, 'altered')]

@pytest.mark.parametrize('change, said', ALTERED)
def test_altered_gate_tensors_are_named(bundle, change, said):
    f = bundle/'gates'/'gate.safetensors'
    t = load_file(f)
    name = sorted(t)[2]
    change(t)
    save_file(t, f)
    with pytest.raises(BundleError, match=rf"gates/gate\.safetensors was altered.*{said}.*") as e: check_bundle(bundle)
    assert change is with_more or name in str(e.value)

@pytest.mark.parametrize('change', [with_nan, with_more, with_one_less])
def test_a_resealed_lie_is_refused_too(bundle, change):
    f = bundle/'gates'/'gate.safetensors'
    t = load_file(f)
    change(t)
    save_file(t, f)
    reseal(bundle)
    with pytest.raises(HydraError, match='gate'): Hydra.load(bundle)

def other_names(b):
    g = load_gate(b/'gates')
    g.names = g.names[::-1]
    save_gate(g, b/'gates')

def other_kind(b):
    m = Hydra.load(b).model
    save_gate(spectr(m.stack), b/'gates')

def fewer_layers(b):
    g = load_gate(b/'gates')
    g.layers.pop(sorted(g.layers)[0])
    save_gate(g, b/'gates')

def misshapen(b):
    g = load_gate(b/'gates')
    n = sorted(g.layers)[0]
    g.layers[n] = g.layers[n][:,:5]
    save_gate(g, b/'gates')

def a_router_too(b): uniform_router(list(MADE)).save(b/'router')
def no_gate(b): shutil.rmtree(b/'gates')
def a_pickle(b): (b/'gates'/'gate.bin').write_bytes(b'x')

FOREIGN = [
    (other_names, 'chooses among'), (other_kind, 'holds spectr where hydra.json says arrow'),
    (fewer_layers, 'reads 0 inputs where the stack has'), (misshapen, 'reads 5 inputs where the stack has'),
    (a_router_too, 'router is extra'), (no_gate, 'gate.json')]

@pytest.mark.parametrize('change, said', FOREIGN)
def test_gates_that_do_not_belong_are_refused(bundle, change, said):
    change(bundle)
    reseal(bundle)
    with pytest.raises(HydraError, match=said): Hydra.load(bundle)

def test_a_pickle_among_the_gates_is_refused(bundle):
    a_pickle(bundle)
    with pytest.raises(BundleError, match='gate.bin does not belong'): check_bundle(bundle)

TWICE = """
import sys
from pathlib import Path
from hydramoe.hydra.adopt import adopt
adopt({p.name: p for p in sorted(Path(sys.argv[1]).iterdir())}, sys.argv[2], quant='fp32', gate='lag')
"""

@pytest.mark.slow
def test_two_processes_write_the_same_bytes(theirs, tmp_path):
    where = next(iter(theirs.values())).parent
    def start(seed):
        command = [sys.executable, '-c', TWICE, str(where), str(tmp_path/seed)]
        return subprocess.Popen(command, env=os.environ|dict(PYTHONHASHSEED=seed))
    both = [start(s) for s in '12']
    assert [p.wait() for p in both]==[0,0]
    a,b = (files_in(tmp_path/s) for s in '12')
    assert a==b
    assert len(a)==2*len(theirs)+6

# ---- the command

def test_from_adapters_to_an_answer_on_a_base_in_a_folder(theirs, tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    save_base(tiny_base(), tmp_path/'base')
    for f in theirs.values(): name_base(f, tmp_path/'base')
    try:
        adopt_three = ('adopt', theirs['plain'], theirs['regex'], f"odd={theirs['patterned']}", '--out', tmp_path/'b',
                       '--quant', 'fp32', '--gate', 'spectr', '--top-k', 2)
        out = here(*adopt_three)
        assert out.returncode==2
        assert 'opens no folder here: say where the base is, base= (--base)' in out.stderr
        out = here(*adopt_three, '--base', tmp_path/'base')
        assert out.returncode==0, out.stderr
        assert 'plain  rank 4, scale 2, 4 layers' in out.stdout
        assert 'odd    rank 5' in out.stdout
        assert 'spectr gate (top-k 2' in out.stdout
        out = here('ask', tmp_path/'b', 'Who was that?', '--max-new-tokens', 6, '--json')
        assert out.returncode==0, out.stderr
        said = json.loads(out.stdout)
        assert set(said['route'])=={'plain','regex','odd'}
        assert said['answer']==Hydra.load(tmp_path/'b').ask('Who was that?', max_new_tokens=6)
        out = here('explain', tmp_path/'b', 'Who was that?', '--json', '--png', tmp_path/'r.png')
        layers = json.loads(out.stdout)['layers']
        assert out.returncode==0
        assert set(layers)==set(load_gate(tmp_path/'b'/'gates').layers)
        assert (tmp_path/'r.png').stat().st_size>3000
        assert 'spectr gate' in here('check', tmp_path/'b').stdout
        assert here('ask', tmp_path/'b', 'Who?', '--expert', 'odd', '--max-new-tokens', 3).returncode==0
        assert here('adopt', theirs['plain'], '--out', tmp_path/'b').returncode==2
    finally:
        for f in theirs.values(): name_base(f, 'tiny-0')

def test_a_conversation_and_transformers_take_a_gate_too(theirs, tmp_path):
    h = adopt(theirs, tmp_path/'b', quant='fp32', gate='arrow', top_k=2)
    chat = Chat(h)
    said = [chat(t, max_new_tokens=6) for t in ('Who was that?', 'And now?')]
    assert said[1]==h.ask(chat.messages[:-1], max_new_tokens=6)
    assert chat.explain().startswith('arrow gate;')
    assert not chat.turns[1]['took_over']
    assert chat.turns[1]['read']<chat.turns[1]['tokens'] # the cache is kept: the gate is the same
    by_hand = chat('And then?', expert=h.names[0], max_new_tokens=6)
    assert by_hand==h.ask(chat.messages[:-1], expert=h.names[0], max_new_tokens=6)
    assert chat.turns[2]['took_over']
    assert chat.explain(0).startswith('arrow gate;')
    model = HydraForCausalLM.from_pretrained(tmp_path/'b')
    tokenizer = h.base.tokenizer
    talk = [dict(role='user', content='Who?')]
    x = tokenizer.apply_chat_template(talk, return_tensors='pt', return_dict=True, add_generation_prompt=True)
    out = model.generate(**x, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(out[0, x['input_ids'].shape[1]:], skip_special_tokens=True)
    assert answer.strip()==h.ask('Who?', max_new_tokens=6)
