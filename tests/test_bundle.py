"""What a bundle must survive, and what it must refuse, found by search; and a bundle of each format that must open
for ever.

`python tests/test_bundle.py` writes the golden bundle of each format that has none yet, tests/data/bundle-FORMAT, and
what it answers."""
import contextlib, json, re, shutil, struct, warnings
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from hydramoe.models.template import render
from hydramoe.models.base import tiny_base
from hydramoe.models.load import base_key, load_base
from hydramoe.foundations.arrays import load_arrays, save_arrays
from hydramoe.domains.embed import embed, fit_tfidf
from hydramoe.domains.discover import Domains
from hydramoe.foundations.core import HydraError, digest, rng
from hydramoe.foundations.files import file_sha256, read_json, write_json
from hydramoe import Hydra
from hydramoe.hydra.bundle import BundleError, check_bundle, check_adapter
from hydramoe.hydra.card import model_card, unlearnt
from hydramoe.hydra.saving import uri_id
from hydramoe.hydra.model import explain_bundle, wants_base
from hydramoe.hydra.build import UnlearntWarning

from hydramoe.hydra.adopt import adapters_base
from hydramoe.hydra.route import similarity_router, uniform_router
from hydramoe.hydra.kinds import ridge_router
from hydramoe.hydra.cascade import fit_on_hidden
from hydramoe.hydra.trained_gate import GateSpec, trained_gate
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated
from helpers import exchange, files_in, put, set_fields, sign, spots
from hydras import NAMES, TEXTS, reseal, save_base
from rows import row

DATA = Path(__file__).parent/'data'
PAIR, PAIR_TEXTS = NAMES[:2], TEXTS[:2]
QUESTIONS = ['Which court?', 'A ship and a law', 'hm'] # of which the likeliest tokens lead clearly

def reads_words():
    "A router of two experts that reads words"
    return similarity_router(Domains(embed(PAIR_TEXTS, 'words'), PAIR, 'words'), .5)

def noise(name, size, shape):
    "Normal numbers, drawn by name"
    return torch.from_numpy(rng(0, name).normal(0, size, shape)).float()

def golden():
    """Two experts of rank 1 on three kinds of layers of the tiny base, large enough to be heard; a router that reads
    words"""
    base = tiny_base()
    model = gated(base, 2, LoraSpec(1, 2, 'q_proj,o_proj,down_proj'))
    for e,n in enumerate(PAIR): model.stack.init_expert(e, e, n)
    model.stack.theta += noise('golden', .3, model.stack.theta.shape)
    return Hydra(base, model, reads_words())

def golden_shared():
    "The same with a shared expert of rank 2, on which the two are residuals with a scale of their own"
    base = tiny_base()
    model = gated(base, 2, LoraSpec(2, 4, 'q_proj,o_proj,down_proj'), shared=True)
    for e,n in enumerate(PAIR): model.stack.init_expert(e, e, n, rank=1, alpha=1)
    model.stack.init_expert(model.stack.shared, 9)
    model.stack.theta += noise('golden shared', .5, model.stack.theta.shape)
    return Hydra(base, model, reads_words())

def golden_gated():
    "The first with a trained gate of noise, one choice for all layers of a block"
    hydra = golden()
    gate = trained_gate(hydra.model.stack, GateSpec(place='block'))
    gate.phi += noise('golden gate', .3, len(gate.phi))
    return hydra.correct_by(gate)

GOLDEN = {1: golden, 2: golden_shared, 3: golden_gated} # format → the Hydra that tests/data/bundle-FORMAT holds

def greedy(h, prompt, expert=None, n=6):
    "Token ids of the greedy answer, the gates, and by how much the likeliest token led at its tightest"
    tok = h.base.tokenizer
    text = render(tok, [dict(role='user', content=prompt)])
    x = tok(text, return_tensors='pt', add_special_tokens=False)
    g = h.gates([prompt], expert)
    if wants_base(h.model.stack, g): g = None
    out = h.model.generate(
        **x, gates=g, max_new_tokens=n, do_sample=False, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id, return_dict_in_generate=True, output_logits=True)
    gates = None if g is None else [round(w, 6) for w in g[0].tolist()]
    tokens = out.sequences[0,x['input_ids'].shape[1]:].tolist()
    top = torch.stack(out.logits)[:,0].topk(2).values
    margin = (top[:,0]-top[:,1]).min().item()
    return dict(prompt=prompt, expert=expert, gates=gates, tokens=tokens), margin

if __name__=='__main__':
    for n,make in GOLDEN.items():
        h, to = make(), DATA/f'bundle-{n}'
        if to.exists(): continue
        h = Hydra.load(h.save(to))
        experts = [None, 'law', 'sea', 'base']+['shared']*h.shared
        both = [greedy(h, p, e) for p in QUESTIONS for e in experts]
        margins = [m for _,m in both]
        if min(margins)<.015:
            shutil.rmtree(to)
            raise SystemExit(margins)
        write_json(DATA/f'bundle-{n}.json', [g for g,_ in both])
    raise SystemExit

# ---- golden
@pytest.mark.parametrize('at', sorted(DATA.glob('bundle-*/')), ids=lambda p: p.name)
def test_a_bundle_of_each_format_opens_and_answers_as_ever(at):
    h, said = Hydra.load(at), read_json(DATA/f'{at.name}.json')
    for want in said:
        got, margin = greedy(h, want['prompt'], want['expert'])
        assert margin>.01
        assert got['tokens']==want['tokens']
        assert got['gates']==(want['gates'] and pytest.approx(want['gates'], abs=1e-5))
    assert len({str(w['tokens']) for w in said})>3
    assert sum(f.stat().st_size for f in at.rglob('*'))<60_000

def without_card(bundle):
    "The files of a bundle but for its card"
    return {f: b for f,b in files_in(bundle).items() if f!='README.md'}

@pytest.mark.parametrize('version', GOLDEN)
def test_each_format_has_its_golden_bundle(version):
    assert read_json(DATA/f'bundle-{version}'/'hydra.json')['format']==version

@pytest.mark.parametrize('version', GOLDEN)
def test_what_is_written_today_is_the_golden_bundle(version, tmp_path):
    "To the byte, but for what the card says; without a shared expert in format 1, as ever"
    GOLDEN[version]().save(tmp_path/'now')
    a, b = (without_card(d) for d in (tmp_path/'now', DATA/f'bundle-{version}'))
    assert a.keys()==b.keys()
    assert [f for f in a if a[f]!=b[f]]==[]

# ---- search
BYTES = {version: without_card(DATA/f'bundle-{version}') for version in GOLDEN}
WHOLE = {version: Hydra.load(DATA/f'bundle-{version}') for version in GOLDEN}
FILES = [(version, f) for version in GOLDEN for f in sorted(BYTES[version])]
TENSORS, TEXT = ([(v, f) for v,f in FILES if f.endswith(end)] for end in ('.safetensors', '.json'))
MOST = settings.default.max_examples # 100, or more under HYPOTHESIS_PROFILE=search
def fuzz(n):
    "Settings of a test that is asked for n examples"
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max(n, MOST) if MOST>100 else n, deadline=None, suppress_health_check=slow)

@pytest.fixture
def at(tmp_path):
    "A bundle that may be changed; `reset` before each example"
    return tmp_path/'b'

def reset(at, version=1):
    shutil.rmtree(at, ignore_errors=True)
    for f,b in BYTES[version].items():
        (at/f).parent.mkdir(parents=True, exist_ok=True)
        (at/f).write_bytes(b)
    return at

def reseal_if_possible(at):
    "What a forger can do who may not even get that far"
    with contextlib.suppress(HydraError): reseal(at)

def refused_or_same(at):
    "The only two ends: an error of ours that names a file of the bundle, or the very same Hydra"
    try: h = Hydra.load(at)
    except HydraError as e:
        assert str(e)
        return str(e)
    if h.trained_gate: whole = WHOLE[3]
    else: whole = WHOLE[2 if h.shared else 1]
    stack, other = h.model.stack, whole.model.stack
    assert h.names==PAIR
    assert torch.equal(stack.theta, other.theta)
    assert torch.equal(stack.scale, other.scale)
    if h.trained_gate:
        assert h.trained_gate.spec==whole.trained_gate.spec
        assert torch.equal(h.trained_gate.phi, whole.trained_gate.phi)

@fuzz(100)
@given(st.data())
def test_no_byte_can_be_changed(at, data):
    """Flipped, cut, inserted, doubled: refused, and the file is named. Only hydra.json may be laid out otherwise, if it
    says the same"""
    version, file = data.draw(st.sampled_from(FILES))
    b = BYTES[version][file]
    i = data.draw(st.integers(0, len(b)-1))
    def replaced(v): return b[:i]+bytes([v])+b[i+1:]
    def inserted(v): return b[:i]+v+b[i:]
    new = data.draw(st.one_of(
        st.integers(0, 255).map(replaced), st.binary(min_size=1, max_size=9).map(inserted), st.just(b[:i]),
        st.just(b[:i]+b[i+1:]), st.just(b+b), st.binary(max_size=40)))
    reset(at, version)
    (at/file).write_bytes(new)
    said = refused_or_same(at)
    if new!=b and file!='hydra.json':
        assert said
        assert file in said
    if said is None and new!=b: assert json.loads(new)==json.loads(b)

MOVES = ['gone', 'folder', 'link', 'link out', 'empty', 'renamed', 'doubled', 'pickle beside']

@fuzz(40)
@given(st.sampled_from(FILES), st.sampled_from(MOVES))
def test_no_file_can_be_moved(at, file, how):
    version, file = file
    p = reset(at, version)/file
    other, pickle = p.with_name('x'+p.name), p.with_suffix('.bin')
    if how in ('gone', 'folder', 'link', 'link out'): p.unlink()
    if how=='folder': p.mkdir()
    if how=='link':
        (at.parent/'copy').write_bytes(BYTES[version][file])
        p.symlink_to(at.parent/'copy')
    if how=='link out': p.symlink_to('../'*len(p.parts)+'etc/hostname')
    if how=='empty': p.write_bytes(b'')
    if how=='renamed': p.rename(other)
    if how=='doubled': shutil.copy(p, other)
    if how=='pickle beside': pickle.write_bytes(b'\x80\x04.')
    said = refused_or_same(at)
    assert said
    assert p.name in said or pickle.name in said or other.name in said

ODD_VALUES = [
    10**30, 10**400, -1e308, float('inf'), float('nan'), 1e-320, '', 'x', '..', 'shared', '../../etc', '/etc/passwd',
    'law', 'sea', '\ud800', 'a\0b', 'tiny:0', 'tiny:x', 'tiny:', 'path:/etc', 'hub:a/b', 'pypi:os', 'similarity',
    'q_proj', 'auto_map', 'minilm']
odd_leaf = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(ODD_VALUES) | st.text(max_size=5)
odd_key = st.sampled_from(['r', 'name', 'auto_map', 'format', 'x', ''])
def odd_nested(x): return st.lists(x, max_size=3) | st.dictionaries(odd_key, x, max_size=3)
odd = st.recursive(odd_leaf, odd_nested, max_leaves=5)

@fuzz(150)
@given(st.data())
def test_no_forged_json_does_harm(at, data):
    "Any value anywhere in any JSON file, with every digest made to fit"
    version, file = data.draw(st.sampled_from(TEXT))
    whole = json.loads(BYTES[version][file])
    where = data.draw(st.sampled_from(list(spots(whole))))
    forged = put(whole, where, data.draw(odd | st.just(...) if where else odd))
    reset(at, version)
    (at/file).write_text(json.dumps(forged), errors='surrogatepass')
    man = read_json(at/'hydra.json')
    if isinstance(man, dict) and isinstance(man.get('files'), dict):
        if file!='hydra.json': man['files'][file] = file_sha256(at/file)
        try: seal = digest({k:v for k,v in man.items() if k!='seal'})
        except HydraError: seal = 'of no number'
        (at/'hydra.json').write_text(json.dumps(man | dict(seal=seal)), errors='surrogatepass')
    refused_or_same(at)

SHORT_TEXT = [(v, f) for v,f in TEXT if f!='tensors.json' and (v==1 or 'shared' in f)]
HARD_JSON = ['['*100_000, '{"a":'*5000+'1'+'}'*5000, '{"format": 1, "format": 2}', 'NaN', '1'*5000, '\ufeff{}', '"',
             '{"a": "\\ud800"}']

@pytest.mark.parametrize('version, file', SHORT_TEXT)
@pytest.mark.parametrize('text', HARD_JSON, ids=lambda t: t[:9])
def test_hard_json(at, version, file, text):
    reset(at, version)
    (at/file).write_text(text)
    if file!='hydra.json': reseal_if_possible(at)
    assert refused_or_same(at)

def header(b):
    "What a tensor file says of its body, and the body"
    n = struct.unpack('<Q', b[:8])[0]
    return json.loads(b[8:8+n]), b[8+n:]

def packed(h, body):
    t = json.dumps(h).encode()
    return struct.pack('<Q', len(t))+t+body

LIES = ['dtype', 'shape', 'data_offsets', 'name', 'metadata', 'drop', 'length', 'body', 'any']
DTYPES = ['F64', 'F16', 'BF16', 'I8', 'I64', 'U8', 'BOOL', 'F8_E4M3', 'F8_E5M2', 'C64', 'F4', 'x', None, 3]
SIDES = [-1, 0, 1, 2, 64, 2**40, 2**63, 2**64, 1.5, '1']

@fuzz(100)
@given(st.data())
def test_no_forged_tensor_file_does_harm(at, data):
    """Headers that lie about types, shapes, offsets and names, and bodies of noise, with every digest made to fit: an
    error, or a Hydra of finite numbers"""
    version, file = data.draw(st.sampled_from(TENSORS))
    h, body = header(BYTES[version][file])
    name = data.draw(st.sampled_from(sorted(set(h)-{'__metadata__'})))
    what = data.draw(st.sampled_from(LIES))
    if what=='dtype': h[name]['dtype'] = data.draw(st.sampled_from(DTYPES))
    if what=='shape': h[name]['shape'] = data.draw(st.lists(st.sampled_from(SIDES), max_size=4))
    if what=='data_offsets':
        offsets = [-1, 0, 4, 256, len(body), len(body)+1, 2**63, 'x']
        h[name]['data_offsets'] = data.draw(st.lists(st.sampled_from(offsets), max_size=3))
    if what=='name':
        names = ['../x', name.replace('.lora_A', '.lora_B'), name+'\0', name.upper()]
        h[data.draw(st.text(max_size=8) | st.sampled_from(names))] = h.pop(name)
    if what=='metadata': h['__metadata__'] = data.draw(odd)
    if what=='drop': h.pop(name)
    if what=='any': h = put(h, data.draw(st.sampled_from(list(spots(h)))), data.draw(odd))
    if what=='body':
        i = data.draw(st.integers(0, len(body)-1))
        body = body[:i]+data.draw(st.binary(min_size=1, max_size=8))+body[i+1:]
    b = packed(h, body)
    if what=='length':
        lengths = [0, 1, 8, len(b)-8, len(b)-7, 10**8, 10**9, 2**63, 2**64-1]
        b = struct.pack('<Q', data.draw(st.sampled_from(lengths)))+b[8:]
    reset(at, version)
    (at/file).write_bytes(b)
    if file.startswith('router'):
        about = at/'router'/'router.json'
        said = {k:v for k,v in read_json(about).items() if k!='digest'} | dict(sha256=file_sha256(at/file))
        write_json(about, said | dict(digest=digest(said)))
    reseal_if_possible(at)
    try: loaded = Hydra.load(at)
    except HydraError as e: assert str(e)
    else:
        assert torch.isfinite(loaded.model.stack.theta).all()
        assert loaded.names==PAIR

# ---- by name
def forge_adapter(at, **kw):
    "An expert whose configuration says something else"
    set_fields(at/'experts'/'law'/'adapter_config.json', **kw)
    reseal(at)

MORE_THAN_LORA = [
    (dict(lora_alpha=200), 'lora_alpha=200'), (dict(lora_alpha=2.5), 'lora_alpha=2.5'), (dict(r=2), 'r=2'),
    (dict(use_rslora=True), 'use_rslora'), (dict(use_dora=True), 'use_dora'),
    (dict(alpha_pattern={'q_proj': 9}), 'alpha_pattern'), (dict(rank_pattern={'q_proj': 9}), 'rank_pattern'),
    (dict(modules_to_save=['lm_head']), 'modules_to_save'),
    (dict(megatron_config={}, megatron_core='os'), 'megatron_co'), (dict(fan_in_fan_out=True), 'fan_in_fan_out'),
    (dict(bias='all'), 'bias'), (dict(peft_type='IA3'), 'peft_type')]

@pytest.mark.parametrize('kw, words', MORE_THAN_LORA)
def test_an_adapter_that_says_more_than_plain_lora_is_refused(at, kw, words):
    "PEFT alone would compute something else than we do, or import what it is told to"
    forge_adapter(reset(at), **kw)
    with pytest.raises(HydraError, match=f'law.*{words}'): Hydra.load(at)

def forged(at, tensors=lambda t: None, **said):
    """A bundle whose expert law says this, in its configuration and in the manifest, and holds these tensors; every
    digest made to fit"""
    f, man = reset(at)/'experts'/'law', read_json(at/'hydra.json')
    config = read_json(f/'adapter_config.json') | said
    (f/'adapter_config.json').write_text(json.dumps(config))
    t = load_file(f/'adapter_model.safetensors')
    save_file(tensors(t) or t, f/'adapter_model.safetensors', metadata={'format': 'pt'})
    also = {m: said[c] for m,c in (('rank', 'r'), ('alpha', 'lora_alpha')) if c in said}
    law = dict(man['experts'][0], **also)
    reseal(at, lambda about: about.update(experts=[law, *man['experts'][1:]]))
    return at

NO_SCALES = [dict(lora_alpha=1e308), dict(lora_alpha=10**400), dict(lora_alpha=0), dict(lora_alpha=-2),
             dict(lora_alpha=1e-60), dict(r=0), dict(r=-1), dict(r=10**9)]

@pytest.mark.parametrize('said', NO_SCALES, ids=lambda x: str(x)[:24])
def test_a_scale_that_nobody_can_compute_with_is_refused_by_check(at, said):
    def tensors(t):
        "Of rank 0 where that is said"
        if said.get('r')==0: return {k: v[:0] if '_A' in k else v[:,:0] for k,v in t.items()}
    with pytest.raises(BundleError, match='law'): check_bundle(forged(at, tensors, **said))

@pytest.mark.parametrize('kind', [torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_tensors_of_types_that_are_no_experts_are_refused_by_check(at, kind):
    def cast(t): return {k: v.round().to(kind) for k,v in t.items()}
    with pytest.raises(BundleError, match='law.*float32, float16, bfloat16'): check_bundle(forged(at, cast))

INFINITE = [('A', 3.4e38, {}), ('B', 3.4e38, {}), ('B', 1e38, dict(lora_alpha=50))]

@pytest.mark.parametrize('half, number, said', INFINITE)
def test_numbers_that_are_infinite_where_they_are_computed_with_are_refused_by_check(at, half, number, said):
    def large(t):
        first = next(v for k,v in t.items() if f'lora_{half}' in k)
        first.view(-1)[0] = number
    with pytest.raises(BundleError, match=f'law.*lora_{half}.*bfloat16'): check_bundle(forged(at, large, **said))

DEEP = '['*900+']'*900
PLAIN_FIELDS = '"peft_type": "LORA", "lora_alpha": 2, "target_modules": ["q_proj"], "r": 1'
HARD_CONFIGS = ['[]', '3', '{"r": '+DEEP+'}', '{'+PLAIN_FIELDS+', "eva_config": {"a": '+DEEP+'}}', '{}']

@pytest.mark.parametrize('text', HARD_CONFIGS, ids=lambda t: t[:9])
def test_an_adapter_of_hard_json_is_an_error_of_ours(at, text):
    f = reset(at)/'experts'/'law'/'adapter_config.json'
    f.write_text(text)
    with pytest.raises(BundleError, match='law'): check_adapter(f.parent, 1, 2)

# ---- the shared expert
def resign(at, **fields):
    "Another manifest, with a seal that fits; a field that is ... is left out"
    man = read_json(at/'hydra.json') | fields
    write_json(at/'hydra.json', sign({k: v for k,v in man.items() if v is not ...}))

MANIFESTS = [
    (dict(format=1), 'format 1 has no shared expert'), (dict(shared=...), 'shared is missing'),
    (dict(format=4), 'format 4, and this hydramoe reads 1 to 3'),
    (dict(format=3), 'format 3 has a trained gate, and gate is missing'),
    (dict(format='2'), "format '2'"), (dict(format=True), 'format True'),
    (dict(format=1, shared=...), 'shared/adapter_config.json is extra'),
    (dict(shared=None), 'shared is'), (dict(shared=[]), 'shared is'), (dict(shared={}), 'shared lacks'),
    (dict(shared=dict(rank=2)), 'shared lacks alpha'),
    (dict(shared=dict(rank='2', alpha=4)), 'shared: rank='), (dict(shared=dict(rank=True, alpha=4)), 'shared: rank='),
    (dict(shared=dict(rank=3, alpha=4)), 'shared/adapter_config.json has r=2'),
    (dict(shared=dict(rank=2, alpha=5)), 'lora_alpha=4 where hydra.json says 2, 5')]

@pytest.mark.parametrize('fields, words', MANIFESTS)
def test_a_manifest_and_its_shared_expert_agree(at, fields, words):
    reset(at, 2)
    resign(at, **fields)
    with pytest.raises(BundleError, match=words): check_bundle(at)

def test_a_plain_bundle_tells_of_no_shared_expert(at):
    resign(reset(at), shared=dict(rank=1, alpha=2))
    with pytest.raises(BundleError, match='format 1 has no shared expert'): check_bundle(at)
    resign(at, format=2)
    with pytest.raises(BundleError, match='shared/adapter_config.json'): check_bundle(at)

@pytest.mark.parametrize('file', ['adapter_config.json', 'adapter_model.safetensors'])
def test_half_a_shared_expert_is_refused(at, file):
    (reset(at, 2)/'shared'/file).unlink()
    with pytest.raises(BundleError, match=f'shared/{file} is missing'): check_bundle(at)
    reseal(at)
    with pytest.raises(BundleError, match=f'shared/{file}'): check_bundle(at)

@pytest.mark.parametrize('extra', ['notes.json', 'adapter/adapter_config.json', 'more.safetensors'])
def test_nothing_lies_beside_a_shared_expert(at, extra):
    file = reset(at, 2)/'shared'/extra
    file.parent.mkdir(exist_ok=True)
    if file.suffix=='.safetensors': save_file(dict(x=torch.ones(1)), file)
    else: file.write_text('{}')
    reseal(at)
    with pytest.raises(BundleError, match=f'shared/{extra} is extra'): check_bundle(at)

FORGERIES = [
    (lambda t: torch.full_like(t, torch.nan), 'holds NaN'), (lambda t: t*torch.inf, 'infinity|NaN'),
    (lambda t: torch.cat([t, t]), 'not of rank 2'), (lambda t: t[:1], 'not of rank 2'),
    (lambda t: t.double(), 'float32, float16, bfloat16')]

@pytest.mark.parametrize('change, words', FORGERIES)
def test_a_forged_shared_expert_is_refused_by_the_name_of_its_tensor(at, change, words):
    f = reset(at, 2)/'shared'/'adapter_model.safetensors'
    tensors = load_file(f)
    name = sorted(tensors)[0] # an A, (rank, in)
    tensors[name] = change(tensors[name])
    save_file(tensors, f, metadata={'format': 'pt'})
    reseal(at)
    said = f'shared/adapter_model.safetensors: {re.escape(name)}.*({words})'
    with pytest.raises(BundleError, match=said): check_bundle(at)

def test_a_shared_expert_of_another_base_is_refused(at):
    "Which files alone cannot tell: it takes the base"
    f = reset(at, 2)/'shared'/'adapter_model.safetensors'
    tensors = load_file(f)
    name = next(n for n in sorted(tensors) if 'lora_A' in n)
    tensors[name] = torch.cat([tensors[name]]*2, 1)
    save_file(tensors, f, metadata={'format': 'pt'})
    reseal(at)
    assert check_bundle(at)
    with pytest.raises(HydraError, match='shape'): Hydra.load(at)

def test_no_expert_is_called_shared_beside_a_shared_one(at):
    man = read_json(reset(at, 2)/'hydra.json')
    resign(at, experts=[dict(man['experts'][0], name='Shared'), man['experts'][1]])
    with pytest.raises(BundleError, match="'Shared' is taken"): check_bundle(at)

# ---- experts that learnt nothing
def law_or_sea(i):
    t = PAIR[i%2]
    return row(f'tell me of {t} number {i} {t}', f'{t} {i}', id=str(i), domain='', source='toy', license='CC0')

LAW_OR_SEA = [law_or_sea(i) for i in range(30)]
TINY_BUILD = dict(base='tiny', quant='fp32', encoder='words', k=2, rank=2)

@pytest.mark.parametrize('fork', [0, 1])
def test_a_build_that_learnt_nothing_says_so(tmp_path, monkeypatch, capfd, fork):
    "In the bundle, in the card, as a warning, and by the exit code of the command, also for one that is added"
    from hydramoe.use.cli import main
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    file = tmp_path/'rows.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in LAW_OR_SEA))
    build = ['build', str(file), '--base', 'tiny', '--quant', 'fp32', '--encoder', 'words', '--k', '2', '--rank', '2',
             '--fork', str(fork), '--lr', '1e30', '--out', str(tmp_path/'b'), '--json', '--quiet']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        assert main(build)==3
        out, err = capfd.readouterr()
        man = check_bundle(tmp_path/'b')
        names = [e['name'] for e in man['experts']]
        everyone = {'the seed expert', 'the shared expert', *names}
        seed = man['built']['seed']
        assert all(e['skipped']==e['steps']>0 for e in man['experts'])
        assert seed['skipped']==seed['steps']-1
        assert json.loads(out)['unlearnt'].keys()==everyone
        assert err.count('hydramoe:')==1
        assert all(n in err for n in names)
        assert '--lr' in err
        card = (tmp_path/'b'/'README.md').read_text()
        for n,e in zip(names, man['experts']):
            assert f'`{n}` learnt nothing: all {e["steps"]} steps were skipped.' in card
        assert 'The seed expert learnt from 1 of' in card
        assert unlearnt(Hydra.load(tmp_path/'b').about).keys()==everyone
        assert main(['add', str(tmp_path/'b'), str(file), '--name', 'more', '--quiet'])==3
        err = capfd.readouterr().err
        assert err.count('hydramoe:')==1
        assert 'more learnt nothing' in err
        assert names[0] not in err.split('hydramoe:')[1]
        assert main(['remove', str(tmp_path/'b-with-more'), 'more', '--quiet'])==0
    with pytest.warns(UnlearntWarning, match=f'{names[0]}.* learnt nothing: all .*lower learning rate'):
        Hydra.build(LAW_OR_SEA, **TINY_BUILD, fork=fork, lr=1e30, root=tmp_path/'cache'/'stages')

def test_a_build_that_learns_says_nothing_of_steps(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UnlearntWarning)
        h = Hydra.build(LAW_OR_SEA, tmp_path/'b', **TINY_BUILD, root=tmp_path/'s')
    assert unlearnt(h.about)=={}
    assert 'skipped' not in (tmp_path/'b'/'hydra.json').read_text()+(tmp_path/'b'/'README.md').read_text()
    assert 'seed' not in h.about['built']
    man = check_bundle(tmp_path/'b')
    first = man['experts'][0]
    odd_counts = [dict(skipped='x'), dict(skipped=3, steps=None), dict(skipped=-1), dict(skipped=True),
                  dict(skipped=10**9)]
    for odd in odd_counts:
        assert 'skipped' not in model_card(dict(man, experts=[first | odd]))

# ---- the fork
@pytest.fixture(scope='module')
def split(tmp_path_factory):
    "Three experts that part at block 1 of 2, kept as a bundle"
    base, names = tiny_base(), [*PAIR, 'sky']
    model = gated(base, 3, LoraSpec(4, 8, fork=1))
    for e,n in enumerate(names): model.stack.init_expert(e, e, n)
    for t in (model.stack.theta, model.stack.trunk): t += noise('split', .1, t.shape)
    h = Hydra(base, model, uniform_router(names))
    return h, h.save(tmp_path_factory.mktemp('split')/'b')

def test_a_forked_bundle_opens_forked(split):
    h, at = split
    again = Hydra.load(at)
    assert read_json(at/'hydra.json')['fork']==again.model.stack.fork==1
    assert again.save(at)
    assert torch.equal(again.model.stack.theta, h.model.stack.theta)
    assert torch.equal(again.model.stack.trunk, h.model.stack.trunk)
    how = dict(expert=['sea', {'law': .3, 'sky': .7}, 'base'], max_new_tokens=8)
    assert again.generate(QUESTIONS, **how)==h.generate(QUESTIONS, **how)

def test_each_expert_of_a_forked_bundle_is_whole_in_peft_alone_and_for_a_reader_that_knows_no_fork(split):
    from peft import PeftModel
    h, at = split
    x = h.base.tokenizer('A Hydra has nine heads', return_tensors='pt').input_ids
    flat = Hydra.from_adapters({n: at/'experts'/n for n in h.names}, tiny_base(), h.router)
    assert flat.model.stack.fork==0
    with torch.no_grad():
        plain = h.model(x).logits
        for e,n in enumerate(h.names):
            only = torch.eye(3)[e:e+1]
            ours = h.model(x, gates=only).logits
            theirs = PeftModel.from_pretrained(tiny_base().model, at/'experts'/n).eval()(x).logits
            assert torch.allclose(theirs, ours, atol=1e-4)
            assert torch.allclose(flat.model(x, gates=only).logits, ours, atol=1e-4)
            assert (ours-plain).abs().max()>.1

@pytest.mark.parametrize('block', [0, 1])
def test_another_trunk_is_refused_by_name(split, tmp_path, block):
    h, at = split
    d = Path(shutil.copytree(at, tmp_path/'d'))
    f = d/'experts'/'sky'/'adapter_model.safetensors'
    t = load_file(f)
    k = next(k for k in sorted(t) if f'.layers.{block}.' in k)
    t[k][0,0] += 1
    save_file(t, f, metadata={'format': 'pt'})
    reseal(d)
    if block: assert Hydra.load(d).model.stack.fork==1
    else:
        words = f'sky is of another seed expert.*block 1.*{re.escape(k)}'
        with pytest.raises(BundleError, match=words): check_bundle(d)
        adapters = {n: d/'experts'/n for n in h.names}
        with pytest.raises(HydraError, match='sky.* is of another seed expert'):
            Hydra.from_adapters(adapters, tiny_base(), h.router, fork=1)

NO_FORKS = [(v, 'not the number of a block') for v in (0, -1, 1.0, .5, True, None, '1', [1])]
NO_FORKS += [(2, 'experts.*is of another seed expert'), (10**9, 'another seed expert')]

@pytest.mark.parametrize('fork, words', NO_FORKS)
def test_a_fork_that_is_none(split, tmp_path, fork, words):
    d = Path(shutil.copytree(split[1], tmp_path/'d'))
    resign(d, fork=fork)
    with pytest.raises(BundleError, match=words): check_bundle(d)

def test_one_expert_under_a_fork_that_the_base_does_not_have(tmp_path):
    "With nobody to differ from, it is the base that says no"
    base = tiny_base()
    model = gated(base, 1, LoraSpec(2, fork=1))
    model.stack.init_expert(0, 0, 'law')
    d = Hydra(base, model, uniform_router(['law'])).save(tmp_path/'d')
    assert Hydra.load(d).model.stack.fork==1
    resign(d, fork=2)
    base = tiny_base()
    with pytest.raises(HydraError, match='fork=2: a model of 2 blocks can fork at 0 to 1'): Hydra.load(d, base)
    flat = Hydra.from_adapters({'law': d/'experts'/'law'}, base, uniform_router(['law']))
    assert flat.names==['law'] # the base is as it was

# ---- what a base is

def on(base, router=None):
    "A Hydra of two experts on a base"
    model = gated(base, 2, LoraSpec(1, 2, 'q_proj,o_proj'))
    for e,n in enumerate(PAIR): model.stack.init_expert(e, e, n)
    return Hydra(base, model, router or uniform_router(PAIR))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The tiny base in a folder, and a Hydra that was built on it"
    d = tmp_path_factory.mktemp('base')
    save_base(tiny_base(), d/'base')
    return d, on(load_base(d/'base', device='cpu')).save(d/'b')

@pytest.fixture
def moved(folder, tmp_path):
    "A copy of both, where the base may be changed; the bundle still names its place, which is asked for anew"
    shutil.copytree(folder[0]/'base', tmp_path/'base')
    return tmp_path/'base', Path(shutil.copytree(folder[1], tmp_path/'b'))

def swapped(d):
    t = read_json(d/'tokenizer.json')
    v = t['model']['vocab']
    v['a'], v['b'] = v['b'], v['a']
    write_json(d/'tokenizer.json', t)

def normalised(d): set_fields(d/'tokenizer.json', normalizer=dict(type='Lowercase'))

def template(d):
    f = d/'chat_template.jinja'
    f.write_text(f.read_text().replace("m['role']", "m['role']|upper"))

def template_in_config(d):
    (d/'chat_template.jinja').unlink()
    set_fields(d/'tokenizer_config.json', chat_template=tiny_base().tokenizer.chat_template+' ')
def config(**kw): return lambda d: set_fields(d/'config.json', **kw)

OTHER_BASE = {
    'rms_norm_eps is 0.01': config(rms_norm_eps=.01),
    'rope_parameters.rope_theta is 500': config(rope_parameters=dict(rope_theta=500., rope_type='default')),
    'rope_parameters.factor is 2': config(rope_parameters=dict(rope_theta=10000., rope_type='linear', factor=2.)),
    'hidden_act is gelu': config(hidden_act='gelu'),
    'max_position_embeddings is 32': config(max_position_embeddings=32),
    'vocab': swapped, 'normalizer': normalised, 'chat template': template, 'chat template: ': template_in_config,
    'special tokens': lambda d: set_fields(d/'tokenizer_config.json', eos_token='<|endoftext|>'),
    'ends at token': lambda d: set_fields(d/'generation_config.json', eos_token_id=[0, 2])}

@pytest.mark.parametrize('words', OTHER_BASE)
def test_a_base_with_the_same_weights_is_another_if_it_reads_or_computes_otherwise(moved, words):
    base, at = moved
    assert Hydra.load(at, base, device='cpu').names==PAIR
    key = base_key(base)
    OTHER_BASE[words](base)
    with pytest.raises(BundleError, match=f'another base: .*{re.escape(words)}'):
        Hydra.load(at, base, device='cpu')
    assert base_key(base)!=key # nor is a stage answered that was made before

def test_a_base_that_is_handed_over_is_looked_at_too(folder):
    b = load_base(folder[0]/'base', device='cpu')
    b.tokenizer.chat_template += ' '
    with pytest.raises(BundleError, match='chat template'): Hydra.load(folder[1], b)

def resaved(d):
    save_base(load_base(d, 'bf16', 'cpu'), d)

HARMLESS = {
    'idle': config(
        transformers_version='4.1', _name_or_path='elsewhere', torch_dtype='bfloat16', use_cache=False,
        architectures=['X'], pad_token_id=2, attention_dropout=.1, something_new=3),
    'saved again': resaved,
    'readme': lambda d: (d/'README.md').write_text('hi'),
    'padding': lambda d: set_fields(d/'tokenizer_config.json', pad_token='<|im_end|>'),
    'no generation config': lambda d: (d/'generation_config.json').unlink()}

@pytest.mark.parametrize('harmless', HARMLESS.values(), ids=HARMLESS)
def test_what_decides_nothing_makes_no_other_base(moved, harmless):
    harmless(moved[0])
    assert Hydra.load(moved[1], moved[0], 'fp32', 'cpu').names==PAIR

def test_weights_exchanged_in_place_with_equal_size_and_date_are_seen(moved):
    base, at = moved
    f = base/'model.safetensors'
    Hydra.load(at, base, device='cpu')
    s, key = f.stat(), base_key(base)
    b = bytearray(f.read_bytes())
    b[-1000:] = bytes(1000)
    exchange(f, b)
    assert (f.stat().st_size, f.stat().st_mtime_ns)==(s.st_size, s.st_mtime_ns)
    with pytest.raises(BundleError, match='experts are noise on another base'):
        Hydra.load(at, base, device='cpu')
    assert base_key(base)!=key

def test_transformers_open_no_other_base_either(moved):
    from transformers import AutoTokenizer, AutoModelForCausalLM
    base, at = moved
    assert AutoTokenizer.from_pretrained(at, base=base)('x')['input_ids']
    template(base)
    set_fields(base/'config.json', rms_norm_eps=.1)
    with pytest.raises(BundleError, match='chat template'): AutoTokenizer.from_pretrained(at, base=base)
    with pytest.raises(BundleError, match='rms_norm_eps is 0.1'):
        AutoModelForCausalLM.from_pretrained(at, base=base, device_map='cpu')

def test_a_bundle_from_before_identities_opens(moved):
    base, at = moved
    reseal(at, lambda about: about['base'].pop('identity'))
    assert Hydra.load(at, base, device='cpu').names==PAIR
    set_fields(base/'config.json', rms_norm_eps=.01) # its config.json has always told
    with pytest.raises(BundleError, match='rms_norm_eps'): Hydra.load(at, base, device='cpu')

@pytest.mark.parametrize('identity', [1, [], 'x', dict(tokenizer=3), dict(ends='x'), dict(template=None)])
def test_an_identity_of_another_shape(moved, identity):
    base, at = moved
    reseal(at, lambda about: about['base'].update(identity=identity))
    with pytest.raises(BundleError, match='identity'): check_bundle(at)

# ---- places come from the user
def test_a_folder_that_a_bundle_names_is_opened_only_where_the_user_opened_one(moved, monkeypatch, tmp_path):
    base, at = moved
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    with pytest.raises(BundleError, match="opens no folder: give its place yourself"): Hydra.load(at)
    assert Hydra.load(at, base, device='cpu').save(tmp_path/'mine') # now this folder is known here
    assert Hydra.load(tmp_path/'mine', device='cpu').names==PAIR
    base.rename(tmp_path/'gone')
    with pytest.raises(BundleError, match='is not on this machine'): Hydra.load(tmp_path/'mine')

NO_IDS = ['tiny:x', 'tiny:', 'tiny:'+'1'*5000, 'path:', 'hub:/etc', 'hub:../etc', 'hub:~root/x', 'hub:a', 'pypi:os',
          'etc', 'x'*5000]

@pytest.mark.parametrize('id', NO_IDS)
def test_how_a_base_may_be_named(at, id):
    reset(at)
    reseal(at, lambda about: about['base'].update(id=id))
    with pytest.raises(BundleError, match='names no base'): Hydra.load(at)

def test_a_hub_id_is_never_a_folder_here(tmp_path, monkeypatch):
    import hydramoe.models.load as hb
    here = tmp_path/'some'/'model'
    here.mkdir(parents=True)
    (here/'config.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    def hub(*a): raise HydraError(f'asked for {a}')
    monkeypatch.setattr(hb, 'hub', hub)
    with pytest.raises(HydraError, match="asked for \\('some/model', 'aaa"):
        hb.base_dir(uri_id('hub:some/model@'+'a'*40))
    assert hb.base_dir('some/model')==Path('some/model') # what the user names may be one

PLAIN_LORA = dict(peft_type='LORA', task_type='CAUSAL_LM', r=1, lora_alpha=1, target_modules=['q_proj'])

def adapter_of(folder, base):
    "The configuration of an adapter that says this of its base"
    write_json(folder/'adapter_config.json', dict(PLAIN_LORA, base_model_name_or_path=base))

SAID = [('tiny-0', 'tiny'), ('HuggingFaceTB/SmolLM2-135M-Instruct', 'smollm2'), ('a/b', 'hub:a/b'), (None, None),
        ('', None)]

@pytest.mark.parametrize('said, want', SAID)
def test_what_an_adapter_may_say_of_its_base(tmp_path, said, want):
    adapter_of(tmp_path, said)
    assert adapters_base(dict(x=tmp_path))==want
    if want=='hub:a/b':
        set_fields(tmp_path/'adapter_config.json', revision='v2')
        assert adapters_base(dict(x=tmp_path))=='hub:a/b@v2'

@pytest.mark.parametrize('said', ['/etc', './x', '../x/y', '~/models', 'C:\\models', '/', 'a/b/c'])
def test_a_place_that_an_adapter_names_is_asked_for(tmp_path, said):
    adapter_of(tmp_path, said)
    with pytest.raises(HydraError, match='base= .--base'): adapters_base(dict(x=tmp_path))

# ---- the router's encoder
def router_says(at, arrays=None, **params):
    "A bundle whose router says something else, with every digest made to fit"
    a, meta = load_arrays(at/'router', 'router')
    params = dict(meta['params'], **params)
    save_arrays(at/'router', 'router', a | (arrays or {}), dict(meta, params=params))
    reseal_if_possible(at)

ROUTERS = [
    (dict(encoder='/etc'), 'names a folder.*--encoder'), (dict(encoder='some-folder'), 'names a folder'),
    (dict(encoder=None), 'encoder=None'), (dict(encoder=['words']), 'encoder='), (dict(encoder=3), 'encoder=3'),
    (dict(encoder='minilm'), 'vectors of 384 numbers'),
    (dict(encoder='sha256:'+'0'*64), 'give its place, encoder= .--encoder'),
    (dict(encoder='sha256:0'), 'names a folder'),
    (dict(temperature=True), 'temperature=True'), (dict(temperature=10**400), 'temperature='),
    (dict(temperature=1e-320), 'temperature='), (dict(top_k=True), 'top_k=True'),
    (dict(color='red'), "'color' is not known"), (dict(whole='yes'), 'whole='), (dict(farthest='far'), "farthest"),
    (dict(layer=-1), 'layer=-1'), (dict(k=3), "'k' is not known")]

@pytest.mark.parametrize('params, words', ROUTERS)
def test_a_saved_router_says_only_what_is_on_the_list(at, monkeypatch, params, words):
    monkeypatch.setattr('hydramoe.foundations.fetch.download', lambda *a: pytest.fail('nothing is fetched'))
    router_says(reset(at), **params)
    with pytest.raises(HydraError, match=words): Hydra.load(at)

UNIFORM = dict(kind='uniform', names=PAIR, params={}, base=1)
NO_ROUTERS = [
    dict(kind='similarity', names=None, params={}), dict(kind='similarity', names='law', params={}),
    dict(kind=None, names=PAIR, params={}), dict(kind={}, names=PAIR, params={}),
    dict(kind='similarity', names=PAIR, params=[]), dict(kind='similarity', names=[1, 2], params={}),
    dict(names=PAIR, params={}), {},
    dict(kind='cascade', names=PAIR, params=dict(margin=1, first=3, second={})),
    dict(kind='cascade', names=PAIR, params=dict(margin=1, first=UNIFORM, second={}))]

@pytest.mark.parametrize('meta', NO_ROUTERS)
def test_a_router_of_another_shape_is_no_traceback(at, meta):
    a, _ = load_arrays(reset(at)/'router', 'router')
    save_arrays(at/'router', 'router', a, meta)
    reseal_if_possible(at)
    with pytest.raises(HydraError): Hydra.load(at)

def test_a_router_that_reads_a_layer_which_the_base_does_not_have(tmp_path):
    import numpy as np
    base = tiny_base()
    x = rng(0, 'states').normal(size=(6, 64))
    router = fit_on_hidden(ridge_router, PAIR, x, PAIR*3, layer=1)
    at = on(base, router).save(tmp_path/'b')
    assert Hydra.load(at).ask('hi', max_new_tokens=1) is not None
    router_says(at, layer=3)
    with pytest.raises(HydraError, match='reads layer 3'): Hydra.load(at)
    router_says(at, layer=1, arrays=dict(spread=np.zeros(64)))
    with pytest.raises(HydraError, match='spread'): Hydra.load(at)

def test_an_encoder_in_a_folder_is_named_by_what_is_in_it_and_its_place_is_given(tmp_path):
    texts = [*PAIR_TEXTS, 'a judge in a court', 'the sea and its waves']
    enc = tmp_path/'enc'
    fit_tfidf(texts, enc)
    router = similarity_router(Domains(embed(PAIR_TEXTS, enc), PAIR, str(enc)), .5)
    at = on(tiny_base(), router).save(tmp_path/'b')
    said = read_json(at/'router'/'router.json')['meta']['params']['encoder']
    assert said.startswith('sha256:')
    assert str(tmp_path) not in ''.join(p.read_text() for p in at.rglob('*.json'))
    with pytest.raises(BundleError, match='give its place, encoder='): Hydra.load(at)
    h = Hydra.load(at, encoder=enc)
    want = h.gates(PAIR_TEXTS)
    copy = Path(shutil.copytree(enc, tmp_path/'copy'))
    assert torch.equal(want, Hydra.load(at, encoder=copy).gates(PAIR_TEXTS))
    assert explain_bundle(at, PAIR_TEXTS[0], encoder=copy)[0]['experts'][0]['name']=='law'
    shutil.rmtree(enc)
    fit_tfidf(texts[::-1]+['and more'], enc) # exchanged
    with pytest.raises(HydraError, match='is not the one that this router was made with'): Hydra.load(at, encoder=enc)
    with pytest.raises(HydraError, match='its files were exchanged'): # also of one that is open already
        h.gates(PAIR_TEXTS)
    with pytest.raises(HydraError, match='is not the one'): Hydra.load(at, encoder='words')
