"Adapters in and out: strict, the same bytes every time, and PEFT as the judge"
import json, os, shutil, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.store import sealing
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import LoraSpec, Stack
from hydramoe.experts.gates import make_plan, one_hot
from hydramoe.experts.model import GatedLinear, gated, hidden
from hydramoe.experts.adapter_files import ADAPTER_FIELDS, adapter_config
from hydramoe.experts.adapters import with_adapters
from stacks import batch, fill, filled, forked_model, peft

# ---- ranks
def test_smaller_rank_equals_peft_and_its_padding_never_moves(tmp_path):
    m = filled(slots=2, rank=6)
    m.stack.init_expert(0, 3, 'small', rank=2, alpha=5)
    x = batch()
    m.stack.trainable()
    with m.stack.bind(make_plan(one_hot([0,0,1],2), m.stack)): hidden(m, **x).square().sum().backward()
    for A,B in m.stack.leaves:
        assert A.grad[0,2:].abs().sum()==0
        assert B.grad[0,:,2:].abs().sum()==0
    for _,B in m.stack.leaves: B.data[0,:,:2] = .1
    m.stack.trainable(False)
    c = json.loads((m.stack.save_peft(tmp_path, 0, 'tiny-0')/'adapter_config.json').read_text())
    assert (c['r'], c['lora_alpha'])==(2, 5)
    keep = x['attention_mask'].bool()
    mine = m(**x, gates=one_hot([0]*3,2)).logits[keep]
    theirs = peft(tiny_base().model, tmp_path)(**x).logits[keep]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

# ---- PEFT files
@pytest.fixture()
def adapter(tmp_path): return fill(Stack(tiny_base().model, 2, LoraSpec(4))).save_peft(tmp_path/'a', 1, 'tiny-0')

def refused(adapter, match, **kw):
    s = Stack(tiny_base().model, 2, LoraSpec(**{'rank': 4, **kw}))
    with pytest.raises(HydraError, match=match): s.load_peft(adapter, 0)
    assert s.theta.abs().sum()==0
    assert s.names==[None,None]

OTHER_ARITHMETIC = [
    (dict(use_dora=True), 'use_dora'), (dict(bias='all'), 'bias'),
    (dict(modules_to_save=['lm_head']), 'modules_to_save'),
    (dict(target_parameters=['experts.w']), 'target_parameters'),
    (dict(peft_type='LOHA'), 'peft_type')]

@pytest.mark.parametrize('change, said', OTHER_ARITHMETIC)
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
    adapted = {some.layers[i].name.split('.')[-1] for i in some.adapted(0)}
    assert adapted=={'q_proj'} # fewer layers are zero in the others
    p = few/'adapter_config.json'
    p.write_text(p.read_text().replace('q_proj', 'v_proj'))
    refused(few, 'lacks')
    wide = fill(Stack(tiny_base(width=128).model, 1, LoraSpec(4))).save_peft(adapter.parent/'wide', 0, 'tiny-0')
    refused(wide, r'has shape \(4, 128\), this base and rank need \(4, 64\)')

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_is_named(adapter, value):
    p = adapter/'adapter_model.safetensors'
    t = load_file(p)
    k = sorted(t)[-1]
    t[k].view(-1)[7] = value
    save_file(t, p)
    refused(adapter, k.replace('.', r'\.')+' holds NaN or infinity')

def test_an_altered_bit_in_a_sealed_adapter_is_named(adapter, tmp_path):
    with sealing(tmp_path/'sealed', {}) as out:
        for f in adapter.iterdir(): (out/f.name).write_bytes(f.read_bytes())
    Stack(tiny_base().model, 1, LoraSpec(4)).load_peft(tmp_path/'sealed', 0)
    p = tmp_path/'sealed'/'adapter_model.safetensors'
    altered = bytearray(p.read_bytes())
    altered[-3] ^= 1
    p.chmod(0o644)
    p.write_bytes(altered)
    refused(tmp_path/'sealed', 'adapter_model.safetensors')

def test_rank_stabilised_scale_and_bf16_files(adapter):
    p = adapter/'adapter_config.json'
    p.write_text(json.dumps({**json.loads(p.read_text()), 'use_rslora': True, 'lora_alpha': 6}))
    tensors = load_file(adapter/'adapter_model.safetensors')
    save_file({k: v.bfloat16() for k,v in tensors.items()}, adapter/'adapter_model.safetensors')
    s = Stack(tiny_base().model, 1, LoraSpec(4))
    s.load_peft(adapter, 0, 'x')
    assert s.scale[0]==3
    assert s.names==['x']
    assert s.theta.dtype==torch.float32

def test_an_adapter_that_peft_trained_loads(tmp_path):
    from peft import LoraConfig, get_peft_model
    how = dict(target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False)
    m = get_peft_model(tiny_base().model, LoraConfig(r=4, lora_alpha=12, **how))
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
        usual = dict(task_type='CAUSAL_LM', r=4, lora_alpha=6, target_modules=['q_proj','up_proj'])
        m = get_peft_model(tiny_base().model, LoraConfig(**(usual | kw))).eval()
        if convert:
            config = m.peft_config['default']
            was = config.init_lora_weights
            config.init_lora_weights = True
            m.save_pretrained(dir/'before')
            config.init_lora_weights = was
        with torch.no_grad():
            for n,p in m.named_parameters():
                if 'lora_' in n: p.add_(.2*torch.randn(p.shape))
            want = m(input_ids=IDS).logits
        before = dict(path_initial_model_for_weight_conversion=str(dir/'before')) if convert else {}
        m.save_pretrained(dir/'a', **before)
    return dir/'a', want

@pytest.fixture(scope='module')
def made_once(tmp_path_factory): return by_peft(tmp_path_factory.mktemp('made'))[0]

@pytest.fixture()
def plain(made_once, tmp_path): return Path(shutil.copytree(made_once, tmp_path/'a'))

def ours(dir):
    m = with_adapters(tiny_base(), {'x': dir})
    with torch.no_grad(): return m(input_ids=IDS, gates=one_hot([0,0],1)).logits

def refusal(dir, base=None):
    "What is said of an adapter that is refused; the base is as it was"
    base = base or tiny_base()
    with pytest.raises(HydraError) as e: with_adapters(base, {'x': dir})
    assert str(dir) in str(e.value)
    assert not any(isinstance(m, GatedLinear) for m in base.model.modules())
    return str(e.value)

def change(dir, *without, **fields):
    p = dir/'adapter_config.json'
    changed = {**json.loads(p.read_text()), **fields}
    p.write_text(json.dumps({k: v for k,v in changed.items() if k not in without}))
    return dir

def retensor(dir, f):
    p = dir/'adapter_model.safetensors'
    t = load_file(p)
    t = f(t) or t
    save_file(t, p)
    return dir

ACCEPTED = [
    *(dict(init_lora_weights=i) for i in (False, 'gaussian', 'orthogonal', 'mica', 'eva')),
    dict(use_rslora=True, rank_pattern={'up_proj': 7}, alpha_pattern={r'layers\.\d+\.mlp\.up_proj': 1.5}),
    dict(rank_pattern={'^model.layers.0.self_attn.q_proj': 2, 'up_.*': 7}),
    dict(target_modules='ALL-LINEAR', exclude_modules=['q_proj']),
    dict(target_modules=r'.*\.[12]\..*(q|k)_proj', exclude_modules=r'.*k_proj'),
    dict(layers_to_transform=1), dict(layers_to_transform=[0], layers_pattern=['h', '(?:layers|blocks)']),
    dict(task_type=None), dict(ensure_weight_tying=True, lora_dropout=.3, revision='main')]

@pytest.mark.parametrize('kw', ACCEPTED, ids=str)
def test_what_is_accepted_is_what_it_is_in_peft(tmp_path, kw):
    d,want = by_peft(tmp_path, **kw)
    got = ours(d)
    there = peft(tiny_base().model, d).eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there, want, atol=1e-3, rtol=1e-3)
    assert (got-tiny_base().model(input_ids=IDS).logits).abs().max()>.5

@pytest.mark.parametrize('how', ['pissa', 'pissa_niter_2', 'olora'])
def test_an_initialisation_that_changed_the_base_is_refused_and_its_conversion_is_right(tmp_path, how):
    d,want = by_peft(tmp_path/'raw', init_lora_weights=how)
    why = refusal(d)
    assert "changed the base's own weights" in why
    assert f"init_lora_weights='{how}'" in why
    converted,_ = by_peft(tmp_path/'converted', True, init_lora_weights=how)
    torch.testing.assert_close(ours(converted), want, atol=2e-3, rtol=1e-3)

def test_every_field_of_peft_is_decided_and_its_defaults_pass(tmp_path):
    from dataclasses import fields
    from peft import LoraConfig
    assert {f.name for f in fields(LoraConfig)}<=ADAPTER_FIELDS.keys()
    d,_ = by_peft(tmp_path)
    assert adapter_config(d)['r']==4
    assert set(json.loads((d/'adapter_config.json').read_text()))<=ADAPTER_FIELDS.keys()
    ours(change(d, new_switch=False, new_list=[], new_object={}, new_thing=None))

NOT_ACCEPTED = dict(
    init_lora_weights=['corda', 'loftq', 'lora_ga', 'tomorrows', 3],
    use_dora=[True], kasa_config=[{}], arrow_config=[{'top_k': 2}], lora_bias=[True], layer_replication=[[[0,2]]],
    megatron_config=[{'a': 1}], new_trick=[True, 0, 'on', {'a': 1}],
    task_type=['SEQ_CLS'], bias=['lora_only', True], use_rslora=['yes', 1],
    r=[0, -4, 4., '4', True, [4], 10**400, 10**9],
    lora_alpha=[0, -1, 1e308, 10**400, float('nan'), float('inf'), 1e-60, '8', True, [8]],
    rank_pattern=[{'q_proj': 0}, {'q_proj': '4'}, {'(': 4}, ['q_proj']],
    alpha_pattern=[{'q_proj': 1e308}, {'q_proj': None}, 3],
    target_modules=[[], '', 3, [3], '(', {'q_proj': 1}], exclude_modules=['(', [1], 1],
    layers_to_transform=['all', [True], 1.5], layers_pattern=['(', 'layers'],
    base_model_name_or_path=[3, ['x']])
FIELD_AND_VALUE = [(field, value) for field, values in NOT_ACCEPTED.items() for value in values]

@pytest.mark.parametrize('field, value', FIELD_AND_VALUE, ids=lambda x: str(x)[:20])
def test_a_value_that_is_not_accepted_is_refused_by_name(plain, field, value):
    why = refusal(change(plain, **{field: value}))
    # a rank that the tensors do not have: no room is made for it
    too_large = value==10**9 and 'rank 1000000000' in why
    assert field in why or too_large

def test_an_expression_names_its_blocks_itself(tmp_path):
    d,_ = by_peft(tmp_path, target_modules='.*q_proj')
    assert 'layers_to_transform' in refusal(change(d, layers_to_transform=[0]))

@pytest.mark.parametrize('field', ['peft_type', 'r', 'lora_alpha', 'target_modules'])
@pytest.mark.parametrize('null', [True, False])
def test_what_must_be_said_is_asked_for(plain, field, null):
    assert f'lacks {field}' in refusal(change(plain, **{field: None}) if null else change(plain, field))

NESTED = b'['*900+b']'*900
HARD = [b'[]', b'3', b'"x"', b'null', b'{', b'\xff\xfe{\x00', NESTED, b'{"r": '+NESTED+b'}', b'['*10**5,
        b'{"peft_type": "LORA", "lora_alpha": 1, "target_modules": ["q_proj"], "r": '+NESTED+b'}',
        b'{"r": '+b'1'*5000+b'}']

@pytest.mark.parametrize('text', HARD, ids=lambda t: t[:9])
def test_hard_configurations(plain, text):
    (plain/'adapter_config.json').write_bytes(text)
    assert 'adapter_config.json' in refusal(plain)

# ---- what an adapter's tensors are for
PRE = 'base_model.model.'
NO_PLACE = [ # how the adapter is made, how its tensors are renamed, what is said
    (dict(target_modules=['q_proj','lm_head']), None, ['adapts lm_head', 'leave']),
    (dict(target_modules=['q_proj','embed_tokens']), None, ['embedding', 'leave']),
    ({}, lambda k: k.removeprefix(PRE), ["begin with ''", f"'{PRE}'"]),
    ({}, lambda k: k.removeprefix('base_model.'), ["begin with 'model.'", f"'{PRE}'"]),
    ({}, lambda k: k.replace(PRE+'model.', PRE), ["begin with 'base_model.'", f"'{PRE}'"]),
    ({}, lambda k: k.replace(PRE+'model.', 'transformer.'), ["begin with 'transformer.'", f"'{PRE}model.'"]),
    ({}, lambda k: k.replace(PRE, PRE*2), [f"begin with '{PRE*2}'", f"'{PRE}'"]),
    ({}, lambda k: k.replace('.weight', '.default.weight'), ['name of an adapter stands in its key']),
    ({}, lambda k: k.replace('layers.1', 'layers.7'), ['has no model.layers.7', 'another']),
    ({}, lambda k: k.replace('self_attn.q_proj', 'attention.query'),
     ['has no model.layers.0.attention.query', 'another'])]

@pytest.mark.parametrize('made, rename, words', NO_PLACE, ids=lambda x: '')
def test_a_tensor_that_has_no_place_gets_the_true_reason(tmp_path, plain, made, rename, words):
    d = by_peft(tmp_path/'other', **made)[0] if made else plain
    if rename: retensor(d, lambda t: {rename(k): v for k,v in t.items()})
    why = refusal(d)
    assert all(w in why for w in words)
    assert ('another' in words) is ('another one' in why)

Q_PROJ = 'model.layers.0.self_attn.q_proj'
EXTRA = [
    (f'{Q_PROJ}.lora_magnitude_vector', 'DoRA'), (f'{Q_PROJ}.base_layer.weight', 'the base itself'),
    (f'{Q_PROJ}.lora_B.bias', 'bias'), ('lm_head.modules_to_save.weight', 'modules_to_save'),
    ('lm_head.weight', 'lm_head whole'), ('model.norm.weight', 'model.norm whole'),
    ('model.norm.lora_A.weight', 'adapt linear layers'),
    ('model.layers.0.self_attn.o_proj.lora_A.weight', 'does not name'), ('x', 'neither')]

@pytest.mark.parametrize('key, words', EXTRA)
def test_an_extra_tensor_gets_the_true_reason(plain, key, words):
    why = refusal(retensor(plain, lambda t: t.update({PRE+key: torch.zeros(4)})))
    assert words in why
    assert key in why

def test_a_missing_half_and_another_shape(plain, made_once):
    half = PRE+'model.layers.0.mlp.up_proj.lora_B.weight'
    retensor(plain, lambda t: {k: v for k,v in t.items() if k!=half})
    why = refusal(plain)
    assert f'lacks {half}' in why
    assert 'is there, and is nothing without it' in why
    why = refusal(made_once, tiny_base(width=128))
    assert 'reads 128 numbers' in why
    assert 'another base' in why
    assert '(4, 64)' in why
    assert '(4, 128)' in why

NO_TYPES = [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]

@pytest.mark.parametrize('kind', NO_TYPES)
def test_types_that_are_no_adapters(plain, kind):
    "Also where the numbers would be the same"
    d = retensor(plain, lambda t: {k: v.round().to(kind) if kind!=torch.bool else v>0 for k,v in t.items()})
    assert 'float32, float16, bfloat16' in refusal(d)

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_types_of_sixteen_bits(plain, kind):
    d = retensor(plain, lambda t: {k: v.to(kind) for k,v in t.items()})
    theirs = peft(tiny_base().model, d).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours(d), theirs, atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('half, number, alpha', [('A', 3.4e38, 6), ('B', 3.4e38, 6), ('B', 1e38, 40), ('B', 10., 3e38)])
def test_finite_is_what_is_so_after_the_cast_and_the_scale(plain, half, number, alpha):
    key = PRE+f'model.layers.0.mlp.up_proj.lora_{half}.weight'
    def set_one(t): t[key].view(-1)[3:4].fill_(number)
    why = refusal(change(retensor(plain, set_one), lora_alpha=alpha))
    assert key in why
    assert 'bfloat16' in why

def test_scales_too_far_apart(plain):
    assert 'too far' in refusal(change(plain, lora_alpha=1e-37, alpha_pattern={'layers.0.mlp.up_proj': 1e30}))

def test_no_adapters_and_a_base_that_carries_some():
    base = tiny_base()
    with pytest.raises(HydraError, match='no adapters'): with_adapters(base, {})
    gated(base, 1)
    with pytest.raises(HydraError, match='carries a stack already'): with_adapters(base, {'x': '/nowhere'})

SAVE_PEFT = """
import sys, hashlib
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import Stack, LoraSpec
import hydramoe.experts.adapters
b = tiny_base()
s = Stack(b.model, 2, LoraSpec(4)); s.init_expert(1, 5, 'x'); d = s.save_peft(sys.argv[1], 1, 'tiny-0')
print(b.fingerprint, *[hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(d.iterdir())])
"""
def test_the_same_bytes_under_two_hash_seeds(tmp_path):
    def say(seed):
        call = [sys.executable, '-W', 'ignore', '-c', SAVE_PEFT, str(tmp_path/seed)]
        env = {**os.environ, 'PYTHONHASHSEED': seed}
        return subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout
    said = [say(seed) for seed in ('1','2')]
    assert said[0]==said[1]
    assert len(said[0].split())==3

# ---- the fork

def test_an_expert_of_a_forked_stack_loads_in_peft_and_again(tmp_path):
    m = forked_model()
    x = batch()
    for e in range(3): m.stack.save_peft(tmp_path/str(e), e, 'tiny-0')
    keep = x['attention_mask'].bool()
    want = m(**x, gates=one_hot([1]*3,3)).logits[keep]
    theirs = peft(tiny_base(layers=4).model, tmp_path/'1')(**x).logits[keep]
    torch.testing.assert_close(theirs, want, atol=1e-4, rtol=1e-4)
    for fork in (0, .5):
        again = gated(tiny_base(layers=4), 2, LoraSpec(6, fork=fork))
        for e in (0,1): again.stack.load_peft(tmp_path/str(e), e)
        torch.testing.assert_close(again(**x, gates=one_hot([1]*3,2)).logits[keep], want, atol=1e-4, rtol=1e-4)
        assert again.stack.save_peft(tmp_path/'again', 1, 'tiny-0')
        name = 'adapter_model.safetensors'
        assert (tmp_path/'again'/name).read_bytes()==(tmp_path/'1'/name).read_bytes()

def test_an_expert_of_another_seed_expert_is_refused(tmp_path):
    m = forked_model()
    m.stack.save_peft(tmp_path/'a', 0, 'tiny-0')
    m.stack.trunk[0,5] += 1
    m.stack.save_peft(tmp_path/'b', 1, 'tiny-0')
    s = Stack(tiny_base(layers=4).model, 2, LoraSpec(4, 8, fork=.5))
    s.load_peft(tmp_path/'a', 0)
    with pytest.raises(HydraError, match='another seed expert'): s.load_peft(tmp_path/'b', 1)
    assert s.names==['a', None]
    assert s.theta[1].abs().sum()==0
    base = tiny_base(layers=4)
    both = dict(a=tmp_path/'a', b=tmp_path/'b')
    with pytest.raises(HydraError, match='/b/.* is of another seed expert'): with_adapters(base, both, .5)
    assert with_adapters(base, both).stack.n_trunk_layers==0
    m.stack.init_expert(2, 0, 'odd', alpha=3)
    with pytest.raises(HydraError, match='has scale'): m.stack.save_peft(tmp_path/'c', 2)
