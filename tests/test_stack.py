"The one operation in all architectures, precisions, plans and threads; PEFT as the judge"
import json, os, shutil, subprocess, sys, threading, warnings
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from hydramoe.models.base import Base, byte_tokenizer, tiny_base
from hydramoe.foundations.core import HydraError
from hydramoe.experts.stack import GatedLinear, LoraSpec, Stack, gated, hidden, in_line, line_plan, logits, make_plan
from hydramoe.experts.stack import one_hot, using
from hydramoe.experts.adapter_files import ADAPTER_FIELDS, adapter_config
from hydramoe.experts.adapters import with_adapters
from hydramoe.foundations.store import sealing

def fill(stack, seed=0):
    for e in range(stack.slots): stack.init_expert(e, e, f'expert{e}')
    with torch.no_grad(): stack.theta.add_(.05*torch.randn(stack.theta.shape, generator=torch.Generator().manual_seed(seed)))
    return stack

def ready(quant='fp32', slots=4, rank=4, **kw):
    m = gated(tiny_base(quant=quant), slots, LoraSpec(rank, 2*rank, **kw))
    fill(m.stack)
    return m

def batch(rows=3, length=12, seed=0, vocab=250, pads=(0,3,5)):
    ids = torch.randint(3, vocab, (rows,length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for r in range(rows): mask[r,:pads[r%len(pads)]] = 0
    return dict(input_ids=ids, attention_mask=mask)

def peft(base_model, dir):
    from peft import PeftModel
    with warnings.catch_warnings(action='ignore'): return PeftModel.from_pretrained(base_model, dir)

# ---- architectures
def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256, eos_token_id=2, bos_token_id=1))
def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, bos_token_id=1))
def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2., eos_token_id=2, bos_token_id=1))
def granite():
    from transformers import GraniteConfig, GraniteForCausalLM
    return GraniteForCausalLM(GraniteConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, logits_scaling=3., eos_token_id=2, bos_token_id=1))
def cohere():
    from transformers import CohereConfig, CohereForCausalLM
    return CohereForCausalLM(CohereConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, logit_scale=.3, eos_token_id=2, bos_token_id=1))

@pytest.mark.parametrize('make', [neox, qwen2, gemma2, granite, cohere])
def test_a_look_at_early_layers_is_what_the_whole_pass_says(make):
    "With experts on the base or not, it is the base that is read, and no deeper than asked"
    from hydramoe.models.hidden import hidden_means
    with torch.random.fork_rng(): torch.manual_seed(0); model = make().eval().requires_grad_(False)
    base, texts = Base(model, byte_tokenizer(), make.__name__, 'fp32', 'cpu', ''), ['a long text about nothing', 'short', 'tea']
    t = base.tokenizer(texts, return_tensors='pt', padding=True, padding_side='right')
    whole, m = model.base_model(**t, output_hidden_states=True).hidden_states, t['attention_mask'][:,:,None]
    for looks in ([0], [1], [0, 1, 2]):
        for l,x in hidden_means(texts, base, looks).items():
            torch.testing.assert_close(torch.from_numpy(x), torch.nn.functional.normalize((whole[l]*m).sum(1)/m.sum(1), dim=-1), atol=1e-5, rtol=1e-4)
    early = hidden_means(texts, base, [1])[1]
    fill(gated(base, 3, LoraSpec(4, 8)).stack)
    assert (hidden_means(texts, base, [1])[1]==early).all()
    deep = []
    model.base_model.get_submodule('layers')[1].register_forward_hook(lambda *_: deep.append(1))
    hidden_means(texts, base, [1]); assert not deep
    hidden_means(texts, base, [2]); assert deep

@pytest.mark.parametrize('make', [neox, qwen2, gemma2, granite, cohere])
def test_other_architectures(make, tmp_path):
    with torch.random.fork_rng(): torch.manual_seed(0); model = make().eval().requires_grad_(False)
    twin = type(model)(model.config).eval(); twin.load_state_dict(model.state_dict())
    x = batch()
    before = model(**x).logits
    m = gated(Base(model, byte_tokenizer(), make.__name__, 'fp32', 'cpu', ''), 3, LoraSpec(4, 8))
    fill(m.stack)
    assert torch.equal(m(**x).logits, before)
    g = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(m, hidden(m, **x, gates=g)), m(**x, gates=g).logits)
    m.stack.save_peft(tmp_path, 1, make.__name__)
    keep = x['attention_mask'].bool()
    torch.testing.assert_close(m(**x, gates=one_hot([1,1,1],3)).logits[keep], peft(twin, tmp_path)(**x).logits[keep], atol=1e-4, rtol=1e-4)
    kw = dict(**x, gates=g, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(m.generate(**kw), m.generate(**kw, use_cache=False))
    assert torch.equal(m.detach()(**x).logits, before)

# ---- plans
STACK = fill(Stack(tiny_base().model, 5, LoraSpec(rank=3, alpha=6)))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1,4), st.integers(1,5), st.booleans(), st.sampled_from([0., .5, .9]), st.sampled_from([None, 'rows', 'dense']), st.booleans())
def test_every_plan_computes_the_formula(seed, B, T, tokens, zeros, kind, keep):
    r = torch.Generator().manual_seed(seed)
    g = torch.randn(B, T if tokens else 1, 5, generator=r)*(torch.rand(B, T if tokens else 1, 5, generator=r)>=zeros)
    plan = make_plan(g, STACK, kind)
    if keep and plan.kind!='none': plan.keep()
    for i in (0,1,2,4,4,6): # q, k, v of one input; gate twice, of two inputs
        (A,Bm),sp = STACK.leaves[i],STACK.spots[i]
        if i in (0,4): x = torch.randn(B,T,sp.inp, generator=r)
        if i==6: x = torch.randn(B,T,sp.inp, generator=r)
        y = torch.randn(B,T,sp.out, generator=r)
        want = y+torch.einsum('bte,bti,eri,eor->bto', (g*STACK.scale).expand(B,T,5), x, A, Bm)
        with torch.set_grad_enabled(not keep): got = y if plan.kind=='none' else plan.add(y.clone(), x, i)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
    assert plan.shared is None

def test_a_swap_moves_no_weights():
    plan = make_plan(one_hot([2,2],5), STACK)
    A,Bs,_ = plan.factors(0, torch.float32)
    assert plan.kind=='one' and A.data_ptr()==STACK.leaves[0][0][2].data_ptr()
    assert [b.data_ptr() for b in Bs]==[STACK.leaves[i][1][2].data_ptr() for i in STACK.groups[0].layers]

def test_layers_of_one_input_share_a_product():
    names = [[STACK.spots[i].name.split('.')[-1] for i in g.layers] for g in STACK.groups]
    assert names==2*[['q_proj','k_proj','v_proj'],['o_proj'],['gate_proj','up_proj'],['down_proj']]
    for g,view in zip(STACK.groups, STACK.grouped):
        for j,i in enumerate(g.layers): assert view[:,j].data_ptr()==STACK.leaves[i][0].data_ptr() and torch.equal(view[:,j], STACK.leaves[i][0])

def test_equal_neighbours_are_one_run():
    g = torch.tensor([[.5,.5,0,0,0]]*3+[[0,0,.9,.1,0]]*3)
    plan = make_plan(g, STACK, 'rows')
    assert plan.index.tolist()==[[0,1],[2,3]] and plan.rows==6
    assert len(make_plan(g[1:], STACK, 'rows').index)==5

def test_a_row_reads_only_its_own_experts():
    plan = make_plan(torch.tensor([[0,1.,0,0,0],[0,0,.5,.25,.25],[0,0,0,0,0]]), STACK, 'rows')
    assert plan.index[0].tolist()==[1,1,1] and set(plan.index[2].tolist())<={1,2,3,4} and plan.weight[2].abs().sum()==0

def test_an_expert_that_is_not_used_is_not_read():
    "NaN in a slot that no row names does not matter"
    s = fill(Stack(tiny_base().model, 4, LoraSpec(4)))
    x = torch.randn(2,3,64)
    for g in (one_hot([0,0],4), one_hot([0,1],4), torch.tensor([[.5,.5,0,0],[.5,.5,0,0]]), torch.tensor([[.9,.1,0,0]]).expand(2,3,4), torch.tensor([[.5,.5,0,0],[0,0,0,0]])):
        want = make_plan(g, s).add(torch.zeros(2,3,64), x, 0)
        s.theta[3] = torch.nan
        assert torch.equal(make_plan(g, s).add(torch.zeros(2,3,64), x, 0), want)
        s.theta[3] = 0

# ---- storage
def test_the_stack_stays_fp32_and_its_views_stay_views():
    m = ready()
    m.to(torch.bfloat16)
    assert m.base.dtype==torch.bfloat16 and m.stack.theta.dtype==torch.float32
    m.stack.leaves[0][0][1,0,0] = 9.
    assert (m.stack.theta[1]==9).any()

def test_trainable_twice_keeps_gradients_and_off_forgets_them():
    s = Stack(tiny_base().model, 2, LoraSpec(2)).trainable()
    s.grad += 1
    assert s.trainable().grad.min()==1 and s.trainable(False).grad is None and not s.leaves[0][0].requires_grad

def test_state_of_the_base_is_not_mixed_with_the_stack():
    m = ready()
    assert not [k for k in m.state_dict() if 'theta' in k or 'lora' in k]
    assert not any(p.requires_grad for p in m.stack.trainable() and m.parameters())

# ---- ranks
def test_smaller_rank_equals_peft_and_its_padding_never_moves(tmp_path):
    m = ready(slots=2, rank=6)
    m.stack.init_expert(0, 3, 'small', rank=2, alpha=5)
    x = batch()
    m.stack.trainable()
    with m.stack.bind(make_plan(one_hot([0,0,1],2), m.stack)): hidden(m, **x).square().sum().backward()
    for A,B in m.stack.leaves: assert A.grad[0,2:].abs().sum()==0 and B.grad[0,:,2:].abs().sum()==0
    for _,B in m.stack.leaves: B.data[0,:,:2] = .1
    m.stack.trainable(False)
    c = json.loads((m.stack.save_peft(tmp_path, 0, 'tiny-0')/'adapter_config.json').read_text())
    assert (c['r'], c['lora_alpha'])==(2, 5)
    keep = x['attention_mask'].bool()
    torch.testing.assert_close(m(**x, gates=one_hot([0]*3,2)).logits[keep], peft(tiny_base().model, tmp_path)(**x).logits[keep], atol=1e-4, rtol=1e-4)

def test_widened_expert_can_use_its_whole_rank():
    m = ready(slots=1, rank=6)
    m.stack.init_expert(0, 3, 'small', rank=2)
    x = batch()
    before = m(**x, gates=torch.ones(3,1)).logits
    m.stack.widen(0)
    assert torch.equal(m(**x, gates=torch.ones(3,1)).logits, before)
    m.stack.trainable()
    with m.stack.bind(make_plan(torch.ones(3,1), m.stack)): hidden(m, **x).square().sum().backward()
    assert all((B.grad[0].abs().sum(0)>0).all() for _,B in m.stack.leaves)

# ---- PEFT files
@pytest.fixture()
def adapter(tmp_path): return fill(Stack(tiny_base().model, 2, LoraSpec(4))).save_peft(tmp_path/'a', 1, 'tiny-0')

def refused(adapter, match, **kw):
    s = Stack(tiny_base().model, 2, LoraSpec(**{'rank': 4, **kw}))
    with pytest.raises(HydraError, match=match): s.load_peft(adapter, 0)
    assert s.theta.abs().sum()==0 and s.names==[None,None]

@pytest.mark.parametrize('change, said', [(dict(use_dora=True), 'use_dora'), (dict(bias='all'), 'bias'), (dict(modules_to_save=['lm_head']), 'modules_to_save'),
                                          (dict(target_parameters=['experts.w']), 'target_parameters'), (dict(peft_type='LOHA'), 'peft_type')])
def test_other_arithmetic_is_refused(adapter, change, said):
    p = adapter/'adapter_config.json'
    p.write_text(json.dumps({**json.loads(p.read_text()), **change}))
    refused(adapter, said)

def test_damage_is_named(adapter):
    p = adapter/'adapter_model.safetensors'
    p.write_bytes(p.read_bytes()[:-8])
    refused(adapter, 'adapter_model.safetensors is damaged')

def test_missing_parts_are_named(adapter):
    (adapter/'adapter_model.safetensors').rename(adapter/'adapter_model.bin')
    refused(adapter, 'pickle')
    (adapter/'adapter_config.json').unlink()
    refused(adapter, 'adapter_config.json does not exist')

def test_other_targets_and_ranks_are_refused(adapter):
    refused(adapter, 'rank 4 does not fit', rank=2)
    refused(adapter, 'has no layer', targets='q_proj,v_proj')
    few = fill(Stack(tiny_base().model, 1, LoraSpec(4, targets='q_proj'))).save_peft(adapter.parent/'few', 0, 'tiny-0')
    some = Stack(tiny_base().model, 1, LoraSpec(4))
    some.load_peft(few, 0)
    assert {some.spots[i].name.split('.')[-1] for i in some.adapted(0)}=={'q_proj'} # fewer layers are zero in the others
    p = few/'adapter_config.json'
    p.write_text(p.read_text().replace('q_proj', 'v_proj'))
    refused(few, 'lacks')
    wide = fill(Stack(tiny_base(width=128).model, 1, LoraSpec(4))).save_peft(adapter.parent/'wide', 0, 'tiny-0')
    refused(wide, r'has shape \(4, 128\), this base and rank need \(4, 64\)')

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_is_named(adapter, value):
    p = adapter/'adapter_model.safetensors'
    t = load_file(p); k = sorted(t)[-1]; t[k].view(-1)[7] = value; save_file(t, p)
    refused(adapter, k.replace('.', r'\.')+' holds NaN or infinity')

def test_an_altered_bit_in_a_sealed_adapter_is_named(adapter, tmp_path):
    with sealing(tmp_path/'sealed', {}) as out:
        for f in adapter.iterdir(): (out/f.name).write_bytes(f.read_bytes())
    Stack(tiny_base().model, 1, LoraSpec(4)).load_peft(tmp_path/'sealed', 0)
    p = tmp_path/'sealed'/'adapter_model.safetensors'
    b = bytearray(p.read_bytes()); b[-3] ^= 1; p.chmod(0o644); p.write_bytes(b)
    refused(tmp_path/'sealed', 'adapter_model.safetensors')

def test_rank_stabilised_scale_and_bf16_files(adapter):
    p = adapter/'adapter_config.json'
    p.write_text(json.dumps({**json.loads(p.read_text()), 'use_rslora': True, 'lora_alpha': 6}))
    t = load_file(adapter/'adapter_model.safetensors'); save_file({k: v.bfloat16() for k,v in t.items()}, adapter/'adapter_model.safetensors')
    s = Stack(tiny_base().model, 1, LoraSpec(4))
    s.load_peft(adapter, 0, 'x')
    assert s.scale[0]==3 and s.names==['x'] and s.theta.dtype==torch.float32

def test_an_adapter_that_peft_trained_loads(tmp_path):
    from peft import LoraConfig, get_peft_model
    m = get_peft_model(tiny_base().model, LoraConfig(r=4, lora_alpha=12, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False))
    x = batch()
    want = m(**x).logits
    m.save_pretrained(tmp_path)
    g = gated(tiny_base(), 2, LoraSpec(8))
    g.stack.load_peft(tmp_path, 1)
    keep = x['attention_mask'].bool()
    torch.testing.assert_close(g(**x, gates=one_hot([1]*3,2)).logits[keep], want[keep], atol=1e-4, rtol=1e-4)

# ---- what an adapter's configuration says
IDS = batch(2, pads=(0,))['input_ids']

def by_peft(dir, convert=False, **kw):
    "An adapter that PEFT made, with noise on all its numbers, and the logits that it had where it was made"
    from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng(), warnings.catch_warnings(action='ignore'):
        torch.manual_seed(0)
        m = get_peft_model(tiny_base().model, LoraConfig(**{'task_type': 'CAUSAL_LM', 'r': 4, 'lora_alpha': 6, 'target_modules': ['q_proj','up_proj'], **kw})).eval()
        if convert:
            was, m.peft_config['default'].init_lora_weights = m.peft_config['default'].init_lora_weights, True
            m.save_pretrained(dir/'before')
            m.peft_config['default'].init_lora_weights = was
        with torch.no_grad():
            for n,p in m.named_parameters():
                if 'lora_' in n: p.add_(.2*torch.randn(p.shape))
            want = m(input_ids=IDS).logits
        m.save_pretrained(dir/'a', **({'path_initial_model_for_weight_conversion': str(dir/'before')} if convert else {}))
    return dir/'a', want

@pytest.fixture(scope='module')
def made_once(tmp_path_factory): return by_peft(tmp_path_factory.mktemp('made'))[0]

@pytest.fixture()
def plain(made_once, tmp_path): return Path(shutil.copytree(made_once, tmp_path/'a'))

def ours(dir):
    m = with_adapters(tiny_base(), {'x': dir})
    with torch.no_grad(): return m(input_ids=IDS, gates=one_hot([0,0],1)).logits

def said(dir, base=None):
    "What is said of an adapter that is refused; the base is as it was"
    base = base or tiny_base()
    with pytest.raises(HydraError) as e: with_adapters(base, {'x': dir})
    assert str(dir) in str(e.value) and not any(isinstance(m, GatedLinear) for m in base.model.modules())
    return str(e.value)

def change(dir, *without, **fields):
    p = dir/'adapter_config.json'
    p.write_text(json.dumps({k: v for k,v in {**json.loads(p.read_text()), **fields}.items() if k not in without}))
    return dir

def retensor(dir, f):
    p = dir/'adapter_model.safetensors'
    t = load_file(p); t = f(t) or t; save_file(t, p)
    return dir

ACCEPTED = [*(dict(init_lora_weights=i) for i in (False, 'gaussian', 'orthogonal', 'mica', 'eva')), dict(use_rslora=True, rank_pattern={'up_proj': 7}, alpha_pattern={r'layers\.\d+\.mlp\.up_proj': 1.5}),
            dict(rank_pattern={'^model.layers.0.self_attn.q_proj': 2, 'up_.*': 7}), dict(target_modules='ALL-LINEAR', exclude_modules=['q_proj']), dict(target_modules=r'.*\.[12]\..*(q|k)_proj', exclude_modules=r'.*k_proj'),
            dict(layers_to_transform=1), dict(layers_to_transform=[0], layers_pattern=['h', '(?:layers|blocks)']), dict(task_type=None), dict(ensure_weight_tying=True, lora_dropout=.3, revision='main')]

@pytest.mark.parametrize('kw', ACCEPTED, ids=str)
def test_what_is_accepted_is_what_it_is_in_peft(tmp_path, kw):
    d,want = by_peft(tmp_path, **kw)
    got,there = ours(d),peft(tiny_base().model, d).eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there, want, atol=1e-3, rtol=1e-3)
    assert (got-tiny_base().model(input_ids=IDS).logits).abs().max()>.5

@pytest.mark.parametrize('how', ['pissa', 'pissa_niter_2', 'olora'])
def test_an_initialisation_that_changed_the_base_is_refused_and_its_conversion_is_right(tmp_path, how):
    d,want = by_peft(tmp_path/'raw', init_lora_weights=how)
    assert "changed the base's own weights" in (why := said(d)) and f"init_lora_weights='{how}'" in why
    torch.testing.assert_close(ours(by_peft(tmp_path/'converted', True, init_lora_weights=how)[0]), want, atol=2e-3, rtol=1e-3)

def test_every_field_of_peft_is_decided_and_its_defaults_pass(tmp_path):
    from dataclasses import fields
    from peft import LoraConfig
    assert {f.name for f in fields(LoraConfig)}<=ADAPTER_FIELDS.keys()
    d,_ = by_peft(tmp_path)
    assert adapter_config(d)['r']==4 and set(json.loads((d/'adapter_config.json').read_text()))<=ADAPTER_FIELDS.keys()
    ours(change(d, new_switch=False, new_list=[], new_object={}, new_thing=None))

@pytest.mark.parametrize('field, value', [('init_lora_weights', 'corda'), ('init_lora_weights', 'loftq'), ('init_lora_weights', 'lora_ga'), ('init_lora_weights', 'tomorrows'), ('init_lora_weights', 3),
    ('use_dora', True), ('kasa_config', {}), ('arrow_config', {'top_k': 2}), ('lora_bias', True), ('layer_replication', [[0,2]]), ('megatron_config', {'a': 1}), ('new_trick', True), ('new_trick', 0), ('new_trick', 'on'), ('new_trick', {'a': 1}),
    ('task_type', 'SEQ_CLS'), ('bias', 'lora_only'), ('bias', True), ('use_rslora', 'yes'), ('use_rslora', 1), ('r', 0), ('r', -4), ('r', 4.), ('r', '4'), ('r', True), ('r', [4]), ('r', 10**400), ('r', 10**9),
    ('lora_alpha', 0), ('lora_alpha', -1), ('lora_alpha', 1e308), ('lora_alpha', 10**400), ('lora_alpha', float('nan')), ('lora_alpha', float('inf')), ('lora_alpha', 1e-60), ('lora_alpha', '8'), ('lora_alpha', True), ('lora_alpha', [8]),
    ('rank_pattern', {'q_proj': 0}), ('rank_pattern', {'q_proj': '4'}), ('rank_pattern', {'(': 4}), ('rank_pattern', ['q_proj']), ('alpha_pattern', {'q_proj': 1e308}), ('alpha_pattern', {'q_proj': None}), ('alpha_pattern', 3),
    ('target_modules', []), ('target_modules', ''), ('target_modules', 3), ('target_modules', [3]), ('target_modules', '('), ('target_modules', {'q_proj': 1}), ('exclude_modules', '('), ('exclude_modules', [1]), ('exclude_modules', 1),
    ('layers_to_transform', 'all'), ('layers_to_transform', [True]), ('layers_to_transform', 1.5), ('layers_pattern', '('), ('layers_pattern', 'layers'), ('base_model_name_or_path', 3), ('base_model_name_or_path', ['x'])], ids=lambda x: str(x)[:20])
def test_a_value_that_is_not_accepted_is_refused_by_name(plain, field, value):
    why = said(change(plain, **{field: value}))
    assert field in why or value==10**9 and 'rank 1000000000' in why # a rank that the tensors do not have: no room is made for it

def test_an_expression_names_its_blocks_itself(tmp_path):
    assert 'layers_to_transform' in said(change(by_peft(tmp_path, target_modules='.*q_proj')[0], layers_to_transform=[0]))

@pytest.mark.parametrize('field', ['peft_type', 'r', 'lora_alpha', 'target_modules'])
@pytest.mark.parametrize('null', [True, False])
def test_what_must_be_said_is_asked_for(plain, field, null):
    assert f'lacks {field}' in said(change(plain, **{field: None}) if null else change(plain, field))

@pytest.mark.parametrize('text', [b'[]', b'3', b'"x"', b'null', b'{', b'\xff\xfe{\x00', b'['*900+b']'*900, b'{"r": '+b'['*900+b']'*900+b'}', b'['*10**5, b'{"peft_type": "LORA", "lora_alpha": 1, "target_modules": ["q_proj"], "r": '+b'['*900+b']'*900+b'}', b'{"r": '+b'1'*5000+b'}'], ids=lambda t: t[:9])
def test_hard_configurations(plain, text):
    (plain/'adapter_config.json').write_bytes(text)
    assert 'adapter_config.json' in said(plain)

# ---- what an adapter's tensors are for
PRE = 'base_model.model.'
@pytest.mark.parametrize('made, rename, words', [
    (dict(target_modules=['q_proj','lm_head']), None, ['adapts lm_head', 'leave']), (dict(target_modules=['q_proj','embed_tokens']), None, ['embedding', 'leave']),
    ({}, lambda k: k.removeprefix(PRE), ["begin with ''", f"'{PRE}'"]), ({}, lambda k: k.removeprefix('base_model.'), ["begin with 'model.'", f"'{PRE}'"]), ({}, lambda k: k.replace(PRE+'model.', PRE), ["begin with 'base_model.'", f"'{PRE}'"]),
    ({}, lambda k: k.replace(PRE+'model.', 'transformer.'), ["begin with 'transformer.'", f"'{PRE}model.'"]), ({}, lambda k: k.replace(PRE, PRE*2), [f"begin with '{PRE*2}'", f"'{PRE}'"]),
    ({}, lambda k: k.replace('.weight', '.default.weight'), ['name of an adapter stands in its key']), ({}, lambda k: k.replace('layers.1', 'layers.7'), ['has no model.layers.7', 'another']),
    ({}, lambda k: k.replace('self_attn.q_proj', 'attention.query'), ['has no model.layers.0.attention.query', 'another'])], ids=lambda x: '')
def test_a_tensor_that_has_no_place_gets_the_true_reason(tmp_path, plain, made, rename, words):
    d = by_peft(tmp_path/'other', **made)[0] if made else plain
    if rename: retensor(d, lambda t: {rename(k): v for k,v in t.items()})
    why = said(d)
    assert all(w in why for w in words) and ('another' in words) is ('another one' in why)

@pytest.mark.parametrize('key, words', [('model.layers.0.self_attn.q_proj.lora_magnitude_vector', 'DoRA'), ('model.layers.0.self_attn.q_proj.base_layer.weight', 'the base itself'), ('model.layers.0.self_attn.q_proj.lora_B.bias', 'bias'),
    ('lm_head.modules_to_save.weight', 'modules_to_save'), ('lm_head.weight', 'lm_head whole'), ('model.norm.weight', 'model.norm whole'), ('model.norm.lora_A.weight', 'adapt linear layers'), ('model.layers.0.self_attn.o_proj.lora_A.weight', 'does not name'), ('x', 'neither')])
def test_an_extra_tensor_gets_the_true_reason(plain, key, words):
    assert words in (why := said(retensor(plain, lambda t: t.update({PRE+key: torch.zeros(4)})))) and key in why

def test_a_missing_half_and_another_shape(plain, made_once):
    half = PRE+'model.layers.0.mlp.up_proj.lora_B.weight'
    retensor(plain, lambda t: {k: v for k,v in t.items() if k!=half})
    assert f'lacks {half}' in (why := said(plain)) and 'is there, and is nothing without it' in why
    assert 'reads 128 numbers' in (why := said(made_once, tiny_base(width=128))) and 'another base' in why and '(4, 64)' in why and '(4, 128)' in why

@pytest.mark.parametrize('kind', [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_types_that_are_no_adapters(plain, kind):
    "Also where the numbers would be the same"
    d = retensor(plain, lambda t: {k: v.round().to(kind) if kind!=torch.bool else v>0 for k,v in t.items()})
    assert 'float32, float16, bfloat16' in said(d)

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_types_of_sixteen_bits(plain, kind):
    d = retensor(plain, lambda t: {k: v.to(kind) for k,v in t.items()})
    torch.testing.assert_close(ours(d), peft(tiny_base().model, d).eval()(input_ids=IDS).logits, atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('half, number, alpha', [('A', 3.4e38, 6), ('B', 3.4e38, 6), ('B', 1e38, 40), ('B', 10., 3e38)])
def test_finite_is_what_is_so_after_the_cast_and_the_scale(plain, half, number, alpha):
    key = PRE+f'model.layers.0.mlp.up_proj.lora_{half}.weight'
    d = change(retensor(plain, lambda t: t[key].view(-1)[3:4].fill_(number) and None), lora_alpha=alpha)
    assert key in (why := said(d)) and 'bfloat16' in why

def test_scales_too_far_apart(plain):
    assert 'too far' in said(change(plain, lora_alpha=1e-37, alpha_pattern={'layers.0.mlp.up_proj': 1e30}))

def test_no_adapters_and_a_base_that_carries_some():
    base = tiny_base()
    with pytest.raises(HydraError, match='no adapters'): with_adapters(base, {})
    gated(base, 1)
    with pytest.raises(HydraError, match='carries a stack already'): with_adapters(base, {'x': '/nowhere'})

SAVE = """
import sys, hashlib
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import Stack, LoraSpec
b = tiny_base()
s = Stack(b.model, 2, LoraSpec(4)); s.init_expert(1, 5, 'x'); d = s.save_peft(sys.argv[1], 1, 'tiny-0')
print(b.fingerprint, *[hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(d.iterdir())])
"""
def test_the_same_bytes_under_two_hash_seeds(tmp_path):
    said = [subprocess.run([sys.executable, '-W', 'ignore', '-c', SAVE, str(tmp_path/h)], env={**os.environ, 'PYTHONHASHSEED': h}, capture_output=True, text=True, check=True).stdout for h in ('1','2')]
    assert said[0]==said[1] and len(said[0].split())==3

# ---- generation
def answers(m, x, g, **kw): return m.generate(**x, gates=g, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **{'do_sample': False, **kw})[:,x['input_ids'].shape[1]:]

def test_sampled_sequences_keep_their_prompts_gates():
    m,x = ready(),batch()
    g = torch.rand(3,4, generator=torch.Generator().manual_seed(2))
    once = answers(m, x, g)
    assert torch.equal(answers(m, x, g, do_sample=True, top_k=1, num_return_sequences=3), once.repeat_interleave(3, 0))

@pytest.mark.parametrize('shape', [(3,5), (2,4), (3,2,7,4)])
def test_gates_that_do_not_fit(shape):
    with pytest.raises(HydraError, match='gates'): answers(ready(), batch(), torch.ones(shape))

def test_threads_do_not_mix():
    m,x = ready(),batch()
    gs = [one_hot([e]*3,4) for e in range(4)]+[None]
    want = [answers(m, x, g) for g in gs]
    got = [None]*5
    def work(i): got[i] = [answers(m, x, gs[i]) for _ in range(3)]
    ts = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert all(torch.equal(a, want[i]) for i in range(5) for a in got[i])

def test_a_failed_generation_leaves_no_plan():
    m,x = ready(),batch()
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
            t = threading.Thread(target=loss.backward); t.start(); t.join()
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
    s,r = fill(Stack(tiny_base().model, 4, LoraSpec(rank, 2*rank))).trainable(),torch.Generator().manual_seed(0)
    g,i0 = one_hot(experts, 4)*torch.linspace(.5, 2, 4),s.groups[0].layers
    x,ys = torch.randn(6,5,64, generator=r),[torch.randn(6,5,s.spots[i].out, generator=r) for i in i0]
    loss = lambda outs: sum((o**2).sin().sum() for o in outs)
    want = by_autograd(s, g, x, ys, i0, loss)
    plan,mine = make_plan(g, s),x.clone().requires_grad_()
    assert plan.trains and (plan.ends is not None)==(rank==8 and experts[:4]==[0,1,1,1])
    loss([plan.add(y.clone(), mine, i) for y,i in zip(ys, i0)]).backward()
    torch.testing.assert_close(mine.grad, want[0], atol=1e-3, rtol=1e-3)
    for got,w in zip([t.grad for i in i0 for t in s.leaves[i]], want[1]): torch.testing.assert_close(got, w, atol=2e-3, rtol=1e-3)

def test_uneven_runs_train_as_their_rows_do():
    m,x = gated(tiny_base(), 4, LoraSpec(8)),batch(rows=6)
    fill(m.stack).trainable()
    whole = grad(m, x, [0,0,0,1,3,3])
    apart = sum(grad(m, {k: v[i:i+1] for k,v in x.items()}, [e]) for i,e in enumerate([0,0,0,1,3,3]))
    torch.testing.assert_close(whole, apart, atol=1e-4*whole.abs().max().item(), rtol=1e-3)
    assert whole[2].abs().sum()==0

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
def test_checkpointing_agrees_also_on_another_thread(quant):
    m,x = ready(quant),batch()
    m.stack.trainable()
    want = grad(m, x, [1,1,3])
    assert torch.equal(grad(m.checkpointing(), x, [1,1,3], thread=True), want)
    assert want[1].abs().sum()>0 and want[0].abs().sum()==0

def test_gradient_equals_peft(tmp_path):
    from peft import PeftModel
    m,x = ready(),batch()
    m.stack.save_peft(tmp_path, 2, 'tiny-0')
    p = PeftModel.from_pretrained(tiny_base().model, tmp_path, is_trainable=True)
    p(**x).logits.log_softmax(-1)[...,7].mul(x['attention_mask']).sum().backward()
    m.stack.trainable()
    grad(m, x, [2,2,2])
    params = dict(p.named_parameters())
    for s,(A,B) in zip(m.stack.spots, m.stack.leaves):
        for k,mine in (('A',A), ('B',B)):
            theirs = params[f'base_model.model.{s.name}.lora_{k}.default.weight'].grad
            torch.testing.assert_close(mine.grad[2], theirs, atol=1e-4*theirs.abs().max().item()+1e-6, rtol=1e-3)

@pytest.mark.parametrize('tokens', [1, 12])
def test_nf4_gradient_equals_that_on_the_dequantised_weights(tokens):
    "Also for a batch of one token, and after the evaluation that would repack the weights"
    from bitsandbytes.functional import dequantize_4bit
    m,x = ready('nf4'),{k: v[:1,:tokens] for k,v in batch(pads=(0,)).items()}
    twin = tiny_base(quant=('bf16' if m.base.dtype==torch.bfloat16 else 'fp32'))
    for s in m.stack.spots:
        w = m.base.get_submodule(s.name).base_layer.weight
        twin.model.get_submodule(s.name).weight.data = dequantize_4bit(w.data, w.quant_state).to(m.base.dtype)
    t = gated(twin, 4, LoraSpec(4, 8)); fill(t.stack)
    with torch.no_grad(): m(**x); m(**x, gates=one_hot([1],4))
    a,b = grad(m_train(m), x, [1]),grad(m_train(t), x, [1])
    assert (a-b).norm() < .02*b.norm() and b.norm()>0

def m_train(m):
    m.stack.trainable()
    return m

def test_nf4_batch_equals_its_rows_within_tolerance():
    m,x = ready('nf4'),batch(pads=(0,))
    g = torch.rand(3,4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        all_ = m(**x, gates=g).logits.float()
        for i in range(3):
            one = m(**{k: v[i:i+1] for k,v in x.items()}, gates=g[i:i+1]).logits.float()[0]
            assert (one-all_[i]).norm() < .03*all_[i].norm()

def test_one_stack_at_a_time_and_a_bound_stack_is_released():
    m = ready()
    with pytest.raises(ZeroDivisionError):
        with m.stack.bind(make_plan(one_hot([0],4), m.stack)): 1/0
    assert m.stack.bound is None
    assert not any(isinstance(x, GatedLinear) for x in m.detach().modules())

# ---- the real model
@pytest.mark.slow
def test_smollm2_same_tokens_as_peft(tmp_path):
    from hydramoe.models.base import load_base
    m = gated(load_base('smollm2', 'fp32', 'cpu'), 3, LoraSpec(8))
    for e in range(3): m.stack.init_expert(e, e)
    with torch.no_grad(): m.stack.theta.add_(.003*torch.randn(m.stack.theta.shape, generator=torch.Generator().manual_seed(0)))
    m.stack.save_peft(tmp_path, 1, 'smollm2')
    x = load_base('smollm2', 'fp32', 'cpu').tokenizer(['The sea is', 'Once upon a time there was'], return_tensors='pt', padding=True, padding_side='left')
    kw = dict(max_new_tokens=16, do_sample=False, eos_token_id=None)
    p = peft(load_base('smollm2', 'fp32', 'cpu').model, tmp_path)
    assert torch.equal(m.generate(**x, gates=one_hot([1,1],3), **kw), p.generate(**x, **kw))
    mixed = m.generate(**x, gates=torch.tensor([[.5,.5,0],[0,.2,.8]]), **kw)
    for i in range(2):
        row = {k: v[i:i+1] for k,v in x.items()}
        assert torch.equal(m.generate(**row, gates=torch.tensor([[.5,.5,0],[0,.2,.8]])[i:i+1], **kw), mixed[i:i+1])

def test_one_plan_for_a_generation(monkeypatch):
    import hydramoe.experts.stack as hs
    m,x,made = ready(),batch(),[]
    monkeypatch.setattr(hs, 'make_plan', lambda *a, **k: made.append(make_plan(*a, **k)) or made[-1])
    answers(m, x, torch.full((3,4), .25), num_beams=2)
    assert len(made)==1 and len(made[0].kept)==len(m.stack.groups)

# ---- the fork
def forked(fork=.5, slots=3, layers=4, make=None, **kw):
    b = tiny_base(layers=layers, **kw) if make is None else Base(make().eval().requires_grad_(False), byte_tokenizer(), make.__name__, 'fp32', 'cpu', '')
    m = gated(b, slots, LoraSpec(4, 8, fork=fork))
    fill(m.stack)
    m.stack.trunk.add_(.05*torch.randn(m.stack.trunk.shape, generator=torch.Generator().manual_seed(9)))
    return m

@pytest.mark.parametrize('fork, at', [(0, 0), (.5, 2), (.3, 1), (3, 3)])
def test_a_fork_is_a_share_or_a_block(fork, at):
    s = Stack(tiny_base(layers=4).model, 2, LoraSpec(2, fork=fork))
    assert s.fork==at and s.below==7*at and s.own==range(7*at, 28)
    assert {len(A) for A,_ in s.leaves[:s.below]}<={1} and {len(A) for A,_ in s.leaves[s.below:]}=={2}

@pytest.mark.parametrize('fork', [4, 9, -1, 2.5])
def test_forks_that_cannot_be(fork):
    with pytest.raises(HydraError, match='fork='): Stack(tiny_base(layers=4).model, 2, LoraSpec(2, fork=fork))

def test_below_the_fork_all_rows_compute_the_same():
    from hydramoe.experts.stack import at_fork
    m,x = forked(),{k: v[:1].expand(3,-1) for k,v in batch(pads=(0,)).items()}
    seen = []
    for b in m.base.model.layers: b.register_forward_hook(lambda _,i,o: seen.append(o[0] if isinstance(o, tuple) else o))
    for g in (one_hot([0,1,2],3), torch.tensor([[1.,0,0],[0,0,0],[.2,.3,.5]]), torch.zeros(3,3)):
        seen.clear()
        m(**x, gates=g)
        assert all(torch.equal(h[0], h[1]) and torch.equal(h[0], h[2]) for h in seen[:2])
        assert g.sum()==0 or not torch.equal(seen[2][0], seen[2][1])
        torch.testing.assert_close(at_fork(m, **x), seen[1] if len(seen)>1 else None)
    base = tiny_base(layers=4).model(**x).logits
    assert torch.equal(m(**x).logits, base) and not torch.equal(m(**x, gates=torch.zeros(3,3)).logits, base)

@pytest.mark.parametrize('make', [None, neox, qwen2, gemma2, granite, cohere])
def test_trunk_and_branches_make_the_whole(make):
    from hydramoe.experts.stack import at_fork, from_fork
    m,x = forked(make=make),batch()
    for g in (one_hot([0,1,2],3), torch.rand(3,3, generator=torch.Generator().manual_seed(0)), torch.zeros(3,3)):
        torch.testing.assert_close(from_fork(m, at_fork(m, **x), x['attention_mask'], g), hidden(m, **x, gates=g))

@pytest.mark.parametrize('configured', [False, True], ids=['a plain cache', "a cache of the model's own layers"])
@pytest.mark.parametrize('make', [None, neox, qwen2, gemma2, granite, cohere])
def test_a_cache_is_read_on_and_changes_hands(make, configured):
    "Piece by piece by expert 0, then filled again for expert 2: what a single pass of expert 2 leaves; and the states are those of the trunk"
    from transformers import DynamicCache
    from hydramoe.experts.stack import at_fork, read_on, refill
    m,x = forked(make=make),batch(pads=(0,0,0))['input_ids']
    def new(): return DynamicCache(config=m.config) if configured else DynamicCache()
    def kv(cache): return [t for l in cache.layers for t in (l.keys, l.values)]
    with torch.no_grad():
        mine,whole = new(),new()
        h = torch.cat([read_on(m, part, mine, one_hot([0]*3,3)) for part in (x[:,:3], x[:,3:4], x[:,4:])], 1)
        torch.testing.assert_close(h, at_fork(m, x), atol=1e-4, rtol=1e-4)
        read_on(m, x, whole, one_hot([2]*3,3))
        assert (kv(mine)[-1]-kv(whole)[-1]).abs().max()>1e-3
        refill(m, h, mine, one_hot([2]*3,3))
    for a,b in zip(kv(mine), kv(whole), strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_an_expert_of_a_forked_stack_loads_in_peft_and_again(tmp_path):
    m,x = forked(),batch()
    for e in range(3): m.stack.save_peft(tmp_path/str(e), e, 'tiny-0')
    keep = x['attention_mask'].bool()
    want = m(**x, gates=one_hot([1]*3,3)).logits[keep]
    torch.testing.assert_close(peft(tiny_base(layers=4).model, tmp_path/'1')(**x).logits[keep], want, atol=1e-4, rtol=1e-4)
    for fork in (0, .5):
        again = gated(tiny_base(layers=4), 2, LoraSpec(6, fork=fork))
        for e in (0,1): again.stack.load_peft(tmp_path/str(e), e)
        torch.testing.assert_close(again(**x, gates=one_hot([1]*3,2)).logits[keep], want, atol=1e-4, rtol=1e-4)
        assert again.stack.save_peft(tmp_path/'again', 1, 'tiny-0') and (tmp_path/'again'/'adapter_model.safetensors').read_bytes()==(tmp_path/'1'/'adapter_model.safetensors').read_bytes()

def test_an_expert_of_another_seed_expert_is_refused(tmp_path):
    m = forked()
    m.stack.save_peft(tmp_path/'a', 0, 'tiny-0')
    m.stack.trunk[0,5] += 1
    m.stack.save_peft(tmp_path/'b', 1, 'tiny-0')
    s = Stack(tiny_base(layers=4).model, 2, LoraSpec(4, 8, fork=.5))
    s.load_peft(tmp_path/'a', 0)
    with pytest.raises(HydraError, match='another seed expert'): s.load_peft(tmp_path/'b', 1)
    assert s.names==['a', None] and s.theta[1].abs().sum()==0
    base = tiny_base(layers=4)
    with pytest.raises(HydraError, match='/b/.* is of another seed expert'): with_adapters(base, dict(a=tmp_path/'a', b=tmp_path/'b'), .5)
    assert with_adapters(base, dict(a=tmp_path/'a', b=tmp_path/'b')).stack.below==0
    m.stack.init_expert(2, 0, 'odd', alpha=3)
    with pytest.raises(HydraError, match='has scale'): m.stack.save_peft(tmp_path/'c', 2)

@pytest.mark.parametrize('checkpoint', [False, True])
def test_training_above_a_fork_equals_training_from_the_cached_trunk(checkpoint):
    from hydramoe.experts.stack import at_fork, from_fork
    m,x = forked(),batch()
    m.stack.trainable()
    m.checkpointing(checkpoint)
    with torch.no_grad(): h = at_fork(m, **x)
    def gradient(run):
        m.stack.zero_grad()
        with m.stack.bind(make_plan(one_hot([0,2,2],3), m.stack)): run().square().sum().backward()
        return m.stack.grad.clone()
    whole,cached = gradient(lambda: hidden(m, **x)),gradient(lambda: from_fork(m, h, x['attention_mask']))
    torch.testing.assert_close(cached, whole, atol=1e-5*whole.abs().max().item(), rtol=1e-4)
    assert whole[1].abs().sum()==0 and whole[0].abs().sum()>0 and m.stack.leaves[0][0].grad is None

def test_a_forked_generation_equals_its_rows():
    m,x = forked(),batch()
    g = torch.tensor([[.5,.5,0],[0,0,1.],[0,0,0]])
    together = answers(m, x, g)
    assert torch.equal(answers(m, x, g, use_cache=False), together)
    for i in range(3): assert torch.equal(answers(m, {k: v[i:i+1] for k,v in x.items()}, g[i:i+1]), together[i:i+1])

# ---- more experts than fit
@pytest.fixture(scope='module')
def library(tmp_path_factory):
    m,d = ready(slots=6),tmp_path_factory.mktemp('library')
    return m,{m.stack.names[e]: m.stack.save_peft(d/m.stack.names[e], e, 'tiny-0') for e in range(6)}

@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0,5), min_size=1, max_size=2, unique=True), min_size=2, max_size=2), min_size=1, max_size=6), st.integers(4,6), st.integers(0,7))
def test_outputs_do_not_depend_on_the_shelf(library, requests, slots, rows_in_ram):
    from hydramoe.experts.pool import ExpertPool
    m,folders = library
    few = gated(tiny_base(), slots, LoraSpec(4, 8))
    shelf,x = ExpertPool(few.stack, folders, rows_in_ram*few.stack.theta[0].nbytes),batch(rows=2, length=6, pads=(0,))
    for request in requests:
        mixes = [{f'expert{e}': 1/(1+j) for j,e in enumerate(row)} for row in request]
        want = torch.zeros(2, 6)
        for row,mix in zip(want, mixes):
            for n,w in mix.items(): row[int(n[-1])] = w
        with torch.no_grad(), shelf.gates(mixes) as g: torch.testing.assert_close(few(**x, gates=g).logits, m(**x, gates=want).logits)
        assert len(shelf.ram)<=rows_in_ram and not +shelf.held

def test_the_shelf_keeps_what_is_used_and_drops_what_is_not(library):
    from hydramoe.experts.pool import ExpertPool
    s = Stack(tiny_base().model, 2, LoraSpec(4, 8))
    shelf = ExpertPool(s, library[1], 0)
    for e in (0,1,0,2):
        with shelf.gates([{f'expert{e}': 1.}]): pass
    assert sorted(shelf.placed)==['expert0','expert2'] and shelf.found=={'disk': 3, 'device': 1}
    with shelf.gates([{'expert0': 1.}]):
        with shelf.gates([{'expert1': 1.}]): assert 'expert0' in shelf.placed
        with shelf.gates([{'expert3': 1.}]): assert 'expert0' in shelf.placed

def test_a_request_waits_for_slots_that_others_hold(library):
    from hydramoe.experts.pool import ExpertPool
    shelf,seen = ExpertPool(Stack(tiny_base().model, 1, LoraSpec(4, 8)), library[1]),[]
    def ask(e):
        with shelf.gates([{f'expert{e}': 1.}]): seen.append((e, shelf.stack.names[0]))
    with shelf.gates([{'expert0': 1.}]):
        t = threading.Thread(target=ask, args=(3,)); t.start(); t.join(.1)
        assert t.is_alive() and shelf.stack.names==['expert0']
    t.join()
    assert seen==[(3,'expert3')]

def test_a_damaged_expert_leaves_the_shelf_usable(library, tmp_path):
    from hydramoe.experts.pool import ExpertPool
    (tmp_path/'bad').mkdir()
    shelf = ExpertPool(Stack(tiny_base().model, 1, LoraSpec(4, 8)), {**library[1], 'bad': tmp_path/'bad'})
    with pytest.raises(HydraError, match='not a PEFT adapter'):
        with shelf.gates([{'bad': 1.}]): pass
    with shelf.gates([{'expert0': 1.}]): assert shelf.stack.names==['expert0']

@pytest.mark.parametrize('how, rank', [('plain', 8), ('plain', 3), ('checkpointing', 3), ('grouped', 8)])
def test_a_line_trains_as_its_rows_do(how, rank):
    "Run by run as on a CPU, or in one grouped product as on a GPU"
    m,lengths,who = gated(tiny_base(), 4, LoraSpec(rank)),[5,12,3,9,7],[3,3,0,1,1]
    fill(m.stack).trainable()
    m.checkpointing(how=='checkpointing')
    ids = torch.randint(3, 250, (1,sum(lengths)), generator=torch.Generator().manual_seed(0))
    def gradient(ids, plan, line=None):
        m.stack.zero_grad()
        with m.stack.bind(plan): hidden(m, ids, line=line).pow(3).sum().backward()
        return m.stack.grad.clone()
    with in_line(m):
        plan = line_plan(who, lengths, m.stack)
        assert m.lines and plan.trains and plan.cuts==[17,20]
        if how=='grouped': plan.cuts = None
        laid = gradient(ids, plan, lengths)
    apart = sum(gradient(row[None], make_plan(one_hot([e], 4), m.stack)) for row,e in zip(ids[0].split(lengths), who))
    torch.testing.assert_close(laid, apart, atol=1e-4*apart.abs().max().item(), rtol=1e-3)
    assert not laid[2].any() and laid[0].any()

def test_a_base_that_mixes_rows_is_found_out():
    "A block that looks at its neighbour, outside of attention"
    m = gated(tiny_base(), 2, LoraSpec(4))
    with in_line(m): assert m.lines
    was = m.base.config._attn_implementation
    m.base.model.layers[0].register_forward_hook(lambda block, args, out: out+out.roll(1, 1))
    with in_line(m): assert not m.lines
    assert m.base.config._attn_implementation==was

def test_a_grouped_product_serves_inference_as_well(monkeypatch):
    "The path of a GPU, on the CPU: uneven runs, kept and not"
    import hydramoe.experts.stack as hs
    m,x = gated(tiny_base(), 4, LoraSpec(8)),batch(rows=6)
    fill(m.stack)
    g = one_hot([0,0,0,1,3,3], 4)*.7
    want,said = m(**x, gates=g).logits,answers(m, x, g)
    monkeypatch.setattr(hs, '_grouped_pays', lambda stack: True)
    assert make_plan(g, m.stack).ends.tolist()==[3,4,6]
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
