"The one operation in all architectures, precisions, plans and threads; PEFT as the judge"
import threading
import pytest, torch
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.core import HydraError
from hydramoe.models.template import byte_tokenizer
from hydramoe.models.base import Base, tiny_base
from hydramoe.experts.stack import LoraSpec, Stack
from hydramoe.experts.plan import BasePlan, OnePlan, slow_add
from hydramoe.experts.gates import make_plan, one_hot
from hydramoe.experts.model import GatedLinear, gated, hidden, logits, using
from hydramoe.experts.packing import packed_attention, packed_plan
from hydramoe.experts.trunk import extend_cache, rebuild_cache, run_above, run_trunk
from stacks import batch, contents, fill, filled, forked_model, peft

# ---- architectures
SIZES = dict(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             eos_token_id=2, bos_token_id=1)
GROUPED = dict(SIZES, num_key_value_heads=2)

def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, max_position_embeddings=256))
def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED))
def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    return Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=16, final_logit_softcapping=2.))
def granite():
    from transformers import GraniteConfig, GraniteForCausalLM
    return GraniteForCausalLM(GraniteConfig(**GROUPED, logits_scaling=3.))
def cohere():
    from transformers import CohereConfig, CohereForCausalLM
    return CohereForCausalLM(CohereConfig(**GROUPED, logit_scale=.3))

def seeded(make):
    "A model that is the same in each run"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

@pytest.mark.parametrize('make', [neox, qwen2, gemma2, granite, cohere])
def test_a_look_at_early_layers_is_what_the_whole_pass_says(make):
    "With experts on the base or not, it is the base that is read, and no deeper than asked"
    from hydramoe.models.hidden import pooled_states
    model = seeded(make)
    base = Base(model, byte_tokenizer(), make.__name__, 'fp32', 'cpu', '')
    texts = ['a long text about nothing', 'short', 'tea']
    t = base.tokenizer(texts, return_tensors='pt', padding=True, padding_side='right')
    whole, m = model.base_model(**t, output_hidden_states=True).hidden_states, t['attention_mask'][:,:,None]
    for looks in ([0], [1], [0, 1, 2]):
        for l,x in pooled_states(texts, base, looks).items():
            mean = (whole[l]*m).sum(1)/m.sum(1)
            want = torch.nn.functional.normalize(mean, dim=-1)
            torch.testing.assert_close(torch.from_numpy(x), want, atol=1e-5, rtol=1e-4)
    early = pooled_states(texts, base, [1])[1]
    fill(gated(base, 3, LoraSpec(4, 8)).stack)
    assert (pooled_states(texts, base, [1])[1]==early).all()
    deep = []
    model.base_model.get_submodule('layers')[1].register_forward_hook(lambda *_: deep.append(1))
    pooled_states(texts, base, [1])
    assert not deep
    pooled_states(texts, base, [2])
    assert deep

@pytest.mark.parametrize('make', [neox, qwen2, gemma2, granite, cohere])
def test_other_architectures(make, tmp_path):
    model = seeded(make)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    x = batch()
    before = model(**x).logits
    m = gated(Base(model, byte_tokenizer(), make.__name__, 'fp32', 'cpu', ''), 3, LoraSpec(4, 8))
    fill(m.stack)
    assert torch.equal(m(**x).logits, before)
    g = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(m, hidden(m, **x, gates=g)), m(**x, gates=g).logits)
    m.stack.save_peft(tmp_path, 1, make.__name__)
    keep = x['attention_mask'].bool()
    mine, theirs = m(**x, gates=one_hot([1,1,1],3)).logits[keep], peft(twin, tmp_path)(**x).logits[keep]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    kw = dict(**x, gates=g, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(m.generate(**kw), m.generate(**kw, use_cache=False))
    assert torch.equal(m.detach()(**x).logits, before)

# ---- plans
STACK = fill(Stack(tiny_base().model, 5, LoraSpec(rank=3, alpha=6)))

ZEROS, KINDS = st.sampled_from([0., .5, .9]), st.sampled_from([None, 'rows', 'dense'])

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1,4), st.integers(1,5), st.booleans(), ZEROS, KINDS, st.booleans())
def test_every_plan_computes_the_formula(seed, B, T, tokens, zeros, kind, keep):
    r = torch.Generator().manual_seed(seed)
    shape = B, T if tokens else 1, 5
    g = torch.randn(shape, generator=r)*(torch.rand(shape, generator=r)>=zeros)
    plan = make_plan(g, STACK, kind)
    if keep: plan.keep()
    for i in (0,1,2,4,4,6): # q, k, v of one input; gate twice, of two inputs
        (A,Bm),sp = STACK.leaves[i],STACK.layers[i]
        if i in (0,4): x = torch.randn(B,T,sp.n_in, generator=r)
        if i==6: x = torch.randn(B,T,sp.n_in, generator=r)
        y = torch.randn(B,T,sp.n_out, generator=r)
        want = y+torch.einsum('bte,bti,eri,eor->bto', (g*STACK.scale).expand(B,T,5), x, A, Bm)
        with torch.set_grad_enabled(not keep): got = plan.add(y.clone(), x, i)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(slow_add(STACK, g, y, x, i), want, atol=2e-4, rtol=1e-3)
    assert isinstance(plan, BasePlan) or plan.made is None

def test_a_swap_moves_no_weights():
    plan = make_plan(one_hot([2,2],5), STACK)
    A,Bs,_ = plan.factors(0, torch.float32)
    assert isinstance(plan, OnePlan)
    assert A.data_ptr()==STACK.leaves[0][0][2].data_ptr()
    assert [b.data_ptr() for b in Bs]==[STACK.leaves[i][1][2].data_ptr() for i in STACK.groups[0].layers]

def test_layers_of_one_input_share_a_product():
    names = [[STACK.layers[i].name.split('.')[-1] for i in g.layers] for g in STACK.groups]
    assert names==2*[['q_proj','k_proj','v_proj'],['o_proj'],['gate_proj','up_proj'],['down_proj']]
    for g,view in zip(STACK.groups, STACK.grouped):
        for j,i in enumerate(g.layers):
            A = STACK.leaves[i][0]
            assert view[:,j].data_ptr()==A.data_ptr()
            assert torch.equal(view[:,j], A)

def test_equal_neighbours_are_one_run():
    g = torch.tensor([[.5,.5,0,0,0]]*3+[[0,0,.9,.1,0]]*3)
    plan = make_plan(g, STACK, 'rows')
    assert plan.runs.index.tolist()==[[0,1],[2,3]]
    assert plan.rows==6
    assert len(make_plan(g[1:], STACK, 'rows').runs.index)==5

def test_a_row_reads_only_its_own_experts():
    runs = make_plan(torch.tensor([[0,1.,0,0,0],[0,0,.5,.25,.25],[0,0,0,0,0]]), STACK, 'rows').runs
    assert runs.index[0].tolist()==[1,1,1]
    assert set(runs.index[2].tolist())<={1,2,3,4}
    assert runs.weight[2].abs().sum()==0

def test_an_expert_that_is_not_used_is_not_read():
    "NaN in a slot that no row names does not matter"
    s = fill(Stack(tiny_base().model, 4, LoraSpec(4)))
    x = torch.randn(2,3,64)
    two, mixed = [.5,.5,0,0], torch.tensor([[.9,.1,0,0]]).expand(2,3,4)
    gates = (one_hot([0,0],4), one_hot([0,1],4), torch.tensor([two,two]), mixed, torch.tensor([two,[0,0,0,0]]))
    for g in gates:
        want = make_plan(g, s).add(torch.zeros(2,3,64), x, 0)
        s.theta[3] = torch.nan
        assert torch.equal(make_plan(g, s).add(torch.zeros(2,3,64), x, 0), want)
        s.theta[3] = 0

# ---- storage
def test_the_stack_stays_fp32_and_its_views_stay_views():
    m = filled()
    m.to(torch.bfloat16)
    assert m.base.dtype==torch.bfloat16
    assert m.stack.theta.dtype==torch.float32
    m.stack.leaves[0][0][1,0,0] = 9.
    assert (m.stack.theta[1]==9).any()

def test_trainable_twice_keeps_gradients_and_off_forgets_them():
    s = Stack(tiny_base().model, 2, LoraSpec(2)).trainable()
    s.grad += 1
    assert s.trainable().grad.min()==1
    assert s.trainable(False).grad is None
    assert not s.leaves[0][0].requires_grad

def test_state_of_the_base_is_not_mixed_with_the_stack():
    m = filled()
    assert not [k for k in m.state_dict() if 'theta' in k or 'lora' in k]
    m.stack.trainable()
    assert not any(p.requires_grad for p in m.parameters())

# ---- ranks
def test_an_expert_of_raised_rank_can_use_its_whole_rank():
    m = filled(slots=1, rank=6)
    m.stack.init_expert(0, 3, 'small', rank=2)
    x = batch()
    before = m(**x, gates=torch.ones(3,1)).logits
    m.stack.raise_rank(0)
    assert torch.equal(m(**x, gates=torch.ones(3,1)).logits, before)
    m.stack.trainable()
    with m.stack.bind(make_plan(torch.ones(3,1), m.stack)): hidden(m, **x).square().sum().backward()
    assert all((B.grad[0].abs().sum(0)>0).all() for _,B in m.stack.leaves)

# ---- generation
def answers(m, x, g, **kw):
    "The new ids alone, greedy if nothing else is asked for"
    how = {'do_sample': False, **kw}
    made = m.generate(**x, gates=g, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **how)
    return made[:,x['input_ids'].shape[1]:]

def test_sampled_sequences_keep_their_prompts_gates():
    m,x = filled(),batch()
    g = torch.rand(3,4, generator=torch.Generator().manual_seed(2))
    once = answers(m, x, g)
    sampled = answers(m, x, g, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, once.repeat_interleave(3, 0))

@pytest.mark.parametrize('shape', [(3,5), (2,4), (3,2,7,4)])
def test_gates_that_do_not_fit(shape):
    with pytest.raises(HydraError, match='gates'): answers(filled(), batch(), torch.ones(shape))

def test_threads_do_not_mix():
    m,x = filled(),batch()
    gs = [one_hot([e]*3,4) for e in range(4)]+[None]
    want = [answers(m, x, g) for g in gs]
    got = [None]*5
    def work(i): got[i] = [answers(m, x, gs[i]) for _ in range(3)]
    ts = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert all(torch.equal(a, want[i]) for i in range(5) for a in got[i])

def test_a_failed_generation_leaves_no_plan():
    m,x = filled(),batch()
    want = m(**x).logits
    with pytest.raises(HydraError): answers(m, x, torch.ones(2,4))
    with pytest.raises(ZeroDivisionError):
        with using(make_plan(one_hot([0]*3,4), m.stack)): 1/0
    assert torch.equal(m(**x).logits, want)

# ---- training
def grad(m, x, experts, thread=False):
    m.stack.zero_grad()
    with m.stack.bind(make_plan(one_hot(experts, m.stack.slots), m.stack)):
        loss = logits(m, hidden(m, **x)).float().log_softmax(-1)[...,7].mul(x['attention_mask']).sum()
        if thread:
            t = threading.Thread(target=loss.backward)
            t.start()
            t.join()
        else: loss.backward()
    return m.stack.grad.clone()

def by_autograd(stack, g, x, ys, i0, loss):
    "Gradient of the experts and of x, of the plain formula in a group of layers"
    x = x.clone().requires_grad_()
    leaves = [[t.detach().clone().requires_grad_() for t in stack.leaves[i]] for i in i0]
    outs = [y+torch.einsum('be,bti,eri,eor->bto', g*stack.scale, x, A, B) for y,(A,B) in zip(ys, leaves)]
    loss(outs).backward()
    return x.grad,[t.grad for pair in leaves for t in pair]

@pytest.mark.parametrize('experts', [[2]*6, [0,0,1,1,3,3], [0,1,1,1,3,3], [0,1,0,1,2,0]])
@pytest.mark.parametrize('rank', [8, 3])
def test_hand_made_gradients_equal_autograd(experts, rank):
    "One run, equal runs, unequal runs (a grouped product), runs that come back"
    s = fill(Stack(tiny_base().model, 4, LoraSpec(rank, 2*rank))).trainable()
    r = torch.Generator().manual_seed(0)
    g,i0 = one_hot(experts, 4)*torch.linspace(.5, 2, 4),s.groups[0].layers
    x,ys = torch.randn(6,5,64, generator=r),[torch.randn(6,5,s.layers[i].n_out, generator=r) for i in i0]
    def loss(outs): return sum((o**2).sin().sum() for o in outs)
    want = by_autograd(s, g, x, ys, i0, loss)
    plan,mine = make_plan(g, s),x.clone().requires_grad_()
    assert plan.trains
    assert (plan.runs.ends is not None)==(rank==8 and experts[:4]==[0,1,1,1])
    loss([plan.add(y.clone(), mine, i) for y,i in zip(ys, i0)]).backward()
    torch.testing.assert_close(mine.grad, want[0], atol=1e-3, rtol=1e-3)
    grads = [t.grad for i in i0 for t in s.leaves[i]]
    for got,w in zip(grads, want[1]): torch.testing.assert_close(got, w, atol=2e-3, rtol=1e-3)

def test_uneven_runs_train_as_their_rows_do():
    m,x = gated(tiny_base(), 4, LoraSpec(8)),batch(rows=6)
    fill(m.stack).trainable()
    whole = grad(m, x, [0,0,0,1,3,3])
    apart = sum(grad(m, {k: v[i:i+1] for k,v in x.items()}, [e]) for i,e in enumerate([0,0,0,1,3,3]))
    torch.testing.assert_close(whole, apart, atol=1e-4*whole.abs().max().item(), rtol=1e-3)
    assert whole[2].abs().sum()==0

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
def test_checkpointing_agrees_also_on_another_thread(quant):
    m,x = filled(quant=quant),batch()
    m.stack.trainable()
    want = grad(m, x, [1,1,3])
    assert torch.equal(grad(m.checkpointing(), x, [1,1,3], thread=True), want)
    assert want[1].abs().sum()>0
    assert want[0].abs().sum()==0

def test_gradient_equals_peft(tmp_path):
    from peft import PeftModel
    m,x = filled(),batch()
    m.stack.save_peft(tmp_path, 2, 'tiny-0')
    p = PeftModel.from_pretrained(tiny_base().model, tmp_path, is_trainable=True)
    p(**x).logits.log_softmax(-1)[...,7].mul(x['attention_mask']).sum().backward()
    m.stack.trainable()
    grad(m, x, [2,2,2])
    params = dict(p.named_parameters())
    for s,(A,B) in zip(m.stack.layers, m.stack.leaves):
        for k,mine in (('A',A), ('B',B)):
            theirs = params[f'base_model.model.{s.name}.lora_{k}.default.weight'].grad
            torch.testing.assert_close(mine.grad[2], theirs, atol=1e-4*theirs.abs().max().item()+1e-6, rtol=1e-3)

@pytest.mark.parametrize('tokens', [1, 12])
def test_nf4_gradient_equals_that_on_the_dequantised_weights(tokens):
    "Also for a batch of one token, and after the evaluation that would repack the weights"
    from bitsandbytes.functional import dequantize_4bit
    m,x = filled(quant='nf4'),{k: v[:1,:tokens] for k,v in batch(pads=(0,)).items()}
    twin = tiny_base(quant=('bf16' if m.base.dtype==torch.bfloat16 else 'fp32'))
    for s in m.stack.layers:
        w = m.base.get_submodule(s.name).base_layer.weight
        twin.model.get_submodule(s.name).weight.data = dequantize_4bit(w.data, w.quant_state).to(m.base.dtype)
    t = gated(twin, 4, LoraSpec(4, 8))
    fill(t.stack)
    with torch.no_grad():
        m(**x)
        m(**x, gates=one_hot([1],4))
    a,b = grad(m_train(m), x, [1]),grad(m_train(t), x, [1])
    assert (a-b).norm() < .02*b.norm()
    assert b.norm()>0

def m_train(m):
    m.stack.trainable()
    return m

def test_nf4_batch_equals_its_rows_within_tolerance():
    m,x = filled(quant='nf4'),batch(pads=(0,))
    g = torch.rand(3,4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        all_ = m(**x, gates=g).logits.float()
        for i in range(3):
            one = m(**{k: v[i:i+1] for k,v in x.items()}, gates=g[i:i+1]).logits.float()[0]
            assert (one-all_[i]).norm() < .03*all_[i].norm()

def test_one_stack_at_a_time_and_a_bound_stack_is_released():
    m = filled()
    with pytest.raises(ZeroDivisionError):
        with m.stack.bind(make_plan(one_hot([0],4), m.stack)): 1/0
    assert m.stack.bound is None
    assert not any(isinstance(x, GatedLinear) for x in m.detach().modules())

# ---- the real model
@pytest.mark.slow
def test_smollm2_same_tokens_as_peft(tmp_path):
    from hydramoe.models.load import load_base
    m = gated(load_base('smollm2', 'fp32', 'cpu'), 3, LoraSpec(8))
    for e in range(3): m.stack.init_expert(e, e)
    noise = torch.randn(m.stack.theta.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): m.stack.theta.add_(.003*noise)
    m.stack.save_peft(tmp_path, 1, 'smollm2')
    tokenizer, texts = load_base('smollm2', 'fp32', 'cpu').tokenizer, ['The sea is', 'Once upon a time there was']
    x = tokenizer(texts, return_tensors='pt', padding=True, padding_side='left')
    kw = dict(max_new_tokens=16, do_sample=False, eos_token_id=None)
    p = peft(load_base('smollm2', 'fp32', 'cpu').model, tmp_path)
    assert torch.equal(m.generate(**x, gates=one_hot([1,1],3), **kw), p.generate(**x, **kw))
    g = torch.tensor([[.5,.5,0],[0,.2,.8]])
    mixed = m.generate(**x, gates=g, **kw)
    for i in range(2):
        row = {k: v[i:i+1] for k,v in x.items()}
        assert torch.equal(m.generate(**row, gates=g[i:i+1], **kw), mixed[i:i+1])

def test_one_plan_for_a_generation(monkeypatch):
    import hydramoe.experts.model as hm
    m,x = filled(),batch()
    made = []
    def kept(*a, **k):
        made.append(make_plan(*a, **k))
        return made[-1]
    monkeypatch.setattr(hm, 'make_plan', kept)
    answers(m, x, torch.full((3,4), .25), num_beams=2)
    assert len(made)==1
    assert len(made[0].kept)==len(m.stack.groups)

# ---- the fork

@pytest.mark.parametrize('fork, at', [(0, 0), (.5, 2), (.3, 1), (3, 3)])
def test_a_fork_is_a_share_or_a_block(fork, at):
    s = Stack(tiny_base(layers=4).model, 2, LoraSpec(2, fork=fork))
    assert s.fork==at
    assert s.n_trunk_layers==7*at
    assert s.upper_layers==range(7*at, 28)
    assert {len(A) for A,_ in s.leaves[:s.n_trunk_layers]}<={1}
    assert {len(A) for A,_ in s.leaves[s.n_trunk_layers:]}=={2}

@pytest.mark.parametrize('fork', [4, 9, -1, 2.5])
def test_forks_that_cannot_be(fork):
    with pytest.raises(HydraError, match='fork='): Stack(tiny_base(layers=4).model, 2, LoraSpec(2, fork=fork))

def test_below_the_fork_all_rows_compute_the_same():
    m,x = forked_model(),{k: v[:1].expand(3,-1) for k,v in batch(pads=(0,)).items()}
    seen = []
    def look(block, inputs, out): seen.append(out[0] if isinstance(out, tuple) else out)
    for b in m.base.model.layers: b.register_forward_hook(look)
    for g in (one_hot([0,1,2],3), torch.tensor([[1.,0,0],[0,0,0],[.2,.3,.5]]), torch.zeros(3,3)):
        seen.clear()
        m(**x, gates=g)
        for h in seen[:2]:
            assert torch.equal(h[0], h[1])
            assert torch.equal(h[0], h[2])
        assert g.sum()==0 or not torch.equal(seen[2][0], seen[2][1])
        torch.testing.assert_close(run_trunk(m, **x), seen[1] if len(seen)>1 else None)
    base = tiny_base(layers=4).model(**x).logits
    assert torch.equal(m(**x).logits, base)
    assert not torch.equal(m(**x, gates=torch.zeros(3,3)).logits, base)

@pytest.mark.parametrize('make', [None, neox, qwen2, gemma2, granite, cohere])
def test_trunk_and_branches_make_the_whole(make):
    m,x = forked_model(make=make),batch()
    for g in (one_hot([0,1,2],3), torch.rand(3,3, generator=torch.Generator().manual_seed(0)), torch.zeros(3,3)):
        torch.testing.assert_close(run_above(m, run_trunk(m, **x), x['attention_mask'], g), hidden(m, **x, gates=g))

@pytest.mark.parametrize('configured', [False, True], ids=['a plain cache', "a cache of the model's own layers"])
@pytest.mark.parametrize('make', [None, neox, qwen2, gemma2, granite, cohere])
def test_a_cache_is_read_on_and_changes_hands(make, configured):
    """Piece by piece by expert 0, then filled again for expert 2: what a single pass of expert 2 leaves; and the states
    are those of the trunk"""
    from transformers import DynamicCache
    m,x = forked_model(make=make),batch(pads=(0,0,0))['input_ids']
    def new(): return DynamicCache(config=m.config) if configured else DynamicCache()
    with torch.no_grad():
        mine,whole = new(),new()
        pieces = (x[:,:3], x[:,3:4], x[:,4:])
        h = torch.cat([extend_cache(m, part, mine, one_hot([0]*3,3)) for part in pieces], 1)
        torch.testing.assert_close(h, run_trunk(m, x), atol=1e-4, rtol=1e-4)
        extend_cache(m, x, whole, one_hot([2]*3,3))
        assert (contents(mine)[-1]-contents(whole)[-1]).abs().max()>1e-3
        rebuild_cache(m, h, mine, one_hot([2]*3,3))
    for a,b in zip(contents(mine), contents(whole), strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('checkpoint', [False, True])
def test_training_above_a_fork_equals_training_from_the_cached_trunk(checkpoint):
    m,x = forked_model(),batch()
    m.stack.trainable()
    m.checkpointing(checkpoint)
    with torch.no_grad(): h = run_trunk(m, **x)
    def gradient(run):
        m.stack.zero_grad()
        with m.stack.bind(make_plan(one_hot([0,2,2],3), m.stack)): run().square().sum().backward()
        return m.stack.grad.clone()
    whole,cached = gradient(lambda: hidden(m, **x)),gradient(lambda: run_above(m, h, x['attention_mask']))
    torch.testing.assert_close(cached, whole, atol=1e-5*whole.abs().max().item(), rtol=1e-4)
    assert whole[1].abs().sum()==0
    assert whole[0].abs().sum()>0
    assert m.stack.leaves[0][0].grad is None

def test_a_forked_generation_equals_its_rows():
    m,x = forked_model(),batch()
    g = torch.tensor([[.5,.5,0],[0,0,1.],[0,0,0]])
    together = answers(m, x, g)
    assert torch.equal(answers(m, x, g, use_cache=False), together)
    for i in range(3):
        row = {k: v[i:i+1] for k,v in x.items()}
        assert torch.equal(answers(m, row, g[i:i+1]), together[i:i+1])

@pytest.mark.parametrize('how, rank', [('plain', 8), ('plain', 3), ('checkpointing', 3), ('grouped', 8)])
def test_packed_rows_train_as_they_do_alone(how, rank):
    "Run by run as on a CPU, or in one grouped product as on a GPU"
    m = gated(tiny_base(), 4, LoraSpec(rank))
    lengths,who = [5,12,3,9,7],[3,3,0,1,1]
    fill(m.stack).trainable()
    m.checkpointing(how=='checkpointing')
    ids = torch.randint(3, 250, (1,sum(lengths)), generator=torch.Generator().manual_seed(0))
    def gradient(ids, plan, lengths=None):
        m.stack.zero_grad()
        with m.stack.bind(plan): hidden(m, ids, lengths=lengths).pow(3).sum().backward()
        return m.stack.grad.clone()
    with packed_attention(m):
        plan = packed_plan(who, lengths, m.stack)
        assert m.supports_packing
        assert plan.trains
        assert plan.runs.cuts==[17,20]
        if how=='grouped': plan.runs.cuts = None
        laid = gradient(ids, plan, lengths)
    rows = zip(ids[0].split(lengths), who)
    apart = sum(gradient(row[None], make_plan(one_hot([e], 4), m.stack)) for row,e in rows)
    torch.testing.assert_close(laid, apart, atol=1e-4*apart.abs().max().item(), rtol=1e-3)
    assert not laid[2].any()
    assert laid[0].any()

def test_a_base_that_mixes_rows_is_found_out():
    "A block that looks at its neighbour, outside of attention"
    m = gated(tiny_base(), 2, LoraSpec(4))
    with packed_attention(m): assert m.supports_packing
    was = m.base.config._attn_implementation
    m.base.model.layers[0].register_forward_hook(lambda block, args, out: out+out.roll(1, 1))
    with packed_attention(m): assert not m.supports_packing
    assert m.base.config._attn_implementation==was

def test_a_grouped_product_serves_inference_as_well(monkeypatch):
    "The path of a GPU, on the CPU: uneven runs, kept and not"
    import hydramoe.experts.plan as hp
    m,x = gated(tiny_base(), 4, LoraSpec(8)),batch(rows=6)
    fill(m.stack)
    g = one_hot([0,0,0,1,3,3], 4)*.7
    want,said = m(**x, gates=g).logits,answers(m, x, g)
    monkeypatch.setattr(hp, 'grouped_pays', lambda stack: True)
    assert make_plan(g, m.stack).runs.ends.tolist()==[3,4,6]
    torch.testing.assert_close(m(**x, gates=g).logits, want)
    assert torch.equal(answers(m, x, g), said)

def test_looking_while_training_changes_nothing():
    m,x = gated(tiny_base(), 4, LoraSpec(8)),batch(rows=6)
    fill(m.stack)
    with torch.no_grad():
        for experts in ([0,0,0,1,3,3], [2]*6):
            m.stack.trainable(False)
            want = m(**x, gates=one_hot(experts, 4)).logits
            torch.testing.assert_close(m_train(m)(**x, gates=one_hot(experts, 4)).logits, want)
