"""A Hydra as transformers knows models: equal to Hydra, to its rows, to PEFT, in every way to generate,
on other architectures"""
import json, os, threading
import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
import hydramoe.hydra.auto as auto
from hydramoe.hydra.auto import HydraConfig, HydraForCausalLM, prompts_of, unrender
from hydramoe.models.template import byte_tokenizer, render
from hydramoe.models.base import tiny_base
from hydramoe.models.packaged import gemma_chat
from hydramoe.models.load import load_base
from hydramoe.domains.embed import embed
from hydramoe.domains.discover import Domains
from hydramoe.foundations.core import HydraError, derive_seed, rng
from hydramoe.foundations.files import read_json, write_json
from hydramoe.hydra.bundle import BundleError
from hydramoe.hydra import Hydra
from hydramoe.hydra.route import similarity_router
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.gates import one_hot
from hydramoe.experts.model import gated, hidden, using
from hydramoe.experts.packing import packed_attention, packed_plan

from helpers import files_in, printed
from hydras import NAMES, TEXTS, scripted
from strategies import utf8
from templates import LAYOUTS, TALKS, laid_out, last_label

ASKS = ['which court applies this law?', 'how deep is the sea under a ship?', 'what is the sum of the numbers?']

def user(content): return dict(role='user', content=content)

def hydra_on(base, rank=4, noise=.1):
    "Three experts of noise, and a router that reads words"
    model = gated(base, 3, LoraSpec(rank, 2*rank))
    for e,n in enumerate(NAMES): model.stack.init_expert(e, e, n)
    model.stack.theta += torch.from_numpy(rng(0, 'noise').normal(0, noise, model.stack.theta.shape)).float()
    domains = Domains(embed(TEXTS, 'words'), NAMES, 'words')
    return Hydra(base, model, similarity_router(domains, .01))

def tokenized(tokenizer, talks, side, **kw):
    "Rendered talks as a padded batch"
    texts = [render(tokenizer, talk) for talk in talks]
    return tokenizer(texts, return_tensors='pt', padding=True, padding_side=side, add_special_tokens=False, **kw)

def inputs(hydra, prompts, **kw):
    talks = [p if isinstance(p, list) else [user(p)] for p in prompts]
    return tokenized(hydra.base.tokenizer, talks, 'left', **kw)

def answers_in(hydra, out, x):
    new = out[:,x['input_ids'].shape[1]:]
    return [t.strip() for t in hydra.base.tokenizer.batch_decode(new, skip_special_tokens=True)]

@pytest.fixture(scope='module')
def hydra(): return hydra_on(tiny_base())
@pytest.fixture(scope='module')
def bundle(hydra, tmp_path_factory): return hydra.save(tmp_path_factory.mktemp('auto')/'h')
@pytest.fixture(scope='module')
def model(bundle): return AutoModelForCausalLM.from_pretrained(bundle)

# ---- where transformers learns of us
QUIET = os.environ | dict(HYDRAMOE_QUIET='1')

HYDRAMOE_LAST = 'from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline; import hydramoe'
HYDRAMOE_FIRST = ('import hydramoe; from transformers import GenerationMixin, '
                  'AutoModelForCausalLM, AutoTokenizer, pipeline')

@pytest.mark.parametrize('first', [HYDRAMOE_LAST, HYDRAMOE_FIRST])
def test_a_fresh_process_knows_bundles(bundle, hydra, first):
    code = f"""{first}
b={str(bundle)!r}
m,t=AutoModelForCausalLM.from_pretrained(b),AutoTokenizer.from_pretrained(b)
p=pipeline('text-generation', model=b, max_new_tokens=6, do_sample=False)
answer=p([dict(role='user', content={ASKS[1]!r})])[0]['generated_text'][-1]['content'].strip()
print(repr(answer), type(m).__name__, len(t))"""
    assert printed(code, QUIET).strip()==f"{hydra.ask(ASKS[1], max_new_tokens=6)!r} HydraForCausalLM 259"

def test_importing_hydramoe_is_light():
    "Neither torch nor transformers, and the names that are offered are there when asked for"
    heavy = """
import sys, hydramoe, hydramoe.use.cli
print([m for m in ('torch', 'transformers', 'hydramoe.hydra.auto', 'hydramoe.hydra.model') if m in sys.modules])"""
    assert printed(heavy, QUIET).strip()=='[]'
    offered = """
import hydramoe
print(hydramoe.HydraForCausalLM.__name__, hydramoe.Hydra.__name__, hydramoe.HydraConfig.model_type)"""
    assert printed(offered, QUIET).strip()=='HydraForCausalLM Hydra hydra_moe'
    registered = """
import sys, hydramoe, transformers.models.auto.configuration_auto as c
print('hydra_moe' in c.CONFIG_MAPPING)
print('torch' in sys.modules and 'hydramoe.experts.stack' in sys.modules)
print(sum('hydramoe' in type(f).__module__ for f in sys.meta_path))"""
    assert printed(registered, QUIET).split()==['True', 'False', '0']
    with pytest.raises(AttributeError, match='no_such'): __import__('hydramoe').no_such

# ---- the configuration
@pytest.mark.parametrize('key', ['auto_map', 'trust_remote_code'])
@pytest.mark.parametrize('where', ['', 'text_config', 'deep'])
def test_a_configuration_that_points_to_code_is_refused_alone(bundle, tmp_path, key, where):
    c = read_json(bundle/'config.json')
    at = c
    if where: at = c['text_config']
    if where=='deep': at = at.setdefault('rope_parameters', {}).setdefault('more', [{}])[0]
    at[key] = {'AutoConfig': 'evil.Config'} if key=='auto_map' else True
    write_json(tmp_path/'config.json', c)
    (tmp_path/'evil.py').write_text("open('/tmp/never', 'w')")
    with pytest.raises((BundleError, ValueError)): AutoConfig.from_pretrained(tmp_path)

def test_a_configuration_comes_back(bundle, model):
    c = AutoConfig.from_pretrained(bundle)
    assert type(c) is HydraConfig
    assert c.experts==NAMES
    assert c.router=='similarity'
    assert c.get_text_config().model_type=='llama'
    def said(config): return {k:v for k,v in config.to_dict().items() if k!='_name_or_path'}
    again = HydraConfig.from_dict(json.loads(c.to_json_string()))
    assert said(again)==said(c)
    assert model.config.to_dict()['text_config']['hidden_size']==64

NO_BASES = [dict(model_type='hydra_moe'), dict(model_type='nothing'), dict(),
            dict(model_type='llama', hidden_size='wide'), dict(model_type=['llama'])]

@pytest.mark.parametrize('text', NO_BASES)
def test_a_base_that_is_none(text):
    with pytest.raises(HydraError, match='text_config'): HydraConfig(text_config=text)

# ---- reading back
turn_text = st.text(utf8, max_size=20)

def in_turn(contents):
    "What the user and the assistant say by turns"
    return [dict(role=('user', 'assistant')[i%2], content=c) for i,c in enumerate(contents)]

@settings(max_examples=60, deadline=None)
@given(st.lists(turn_text, min_size=1, max_size=5), st.none()|turn_text)
def test_unrender_inverts_render_or_says_none(turns, system):
    t = byte_tokenizer()
    talk = in_turn(turns)
    if system is not None: talk = [dict(role='system', content=system), *talk]
    text = render(t, talk)
    got = unrender(t, text)
    holds_marks = '<|im' in ''.join(turns)+(system or '')
    if len(turns)%2 and not holds_marks: assert got==talk
    assert got is None or render(t, got)==text

trimmed_text = turn_text.map(str.strip).filter(lambda s: s and '<' not in s)

@settings(max_examples=40, deadline=None)
@given(st.lists(trimmed_text, min_size=1, max_size=3))
def test_unrender_with_a_template_that_trims_and_has_no_system_turn(turns):
    t = byte_tokenizer()
    t.chat_template = gemma_chat
    talk = in_turn(turns)
    assert unrender(t, render(t, talk))==(talk if len(talk)%2 else None)

def test_a_template_that_adds_a_system_turn_by_itself():
    t = byte_tokenizer()
    kind = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    t.chat_template = "{% if messages[0]['role']!='system' %}"+kind+"{% endif %}"+t.chat_template
    for talk in ([user('hi')], [dict(role='system', content='Be brief.'), user('hi')]):
        assert unrender(t, render(t, talk))==talk

def test_padding_is_not_read(hydra):
    tokenizer = hydra.base.tokenizer
    x = inputs(hydra, ASKS)
    want = [[user(a)] for a in ASKS]
    assert prompts_of(tokenizer, **x)==want
    assert prompts_of(tokenizer, x['input_ids'])==want
    right = tokenized(tokenizer, want, 'right')
    assert prompts_of(tokenizer, right['input_ids'], right['attention_mask'])==want

# ---- generate
WAYS = [dict(), dict(num_beams=3), dict(num_beams=2, length_penalty=.5), dict(repetition_penalty=1.3),
        dict(use_cache=False), dict(cache_implementation='static'), dict(cache_implementation='dynamic')]

@pytest.mark.parametrize('how', WAYS, ids=str)
def test_generate_equals_hydra_and_its_rows(hydra, model, how):
    x = inputs(hydra, ASKS)
    out = model.generate(**x, max_new_tokens=7, do_sample=False, **how)
    assert answers_in(hydra, out, x)==hydra.generate(ASKS, max_new_tokens=7, **how)
    for i,a in enumerate(ASKS):
        one = inputs(hydra, [a])
        alone = model.generate(**one, max_new_tokens=7, do_sample=False, **how)
        assert answers_in(hydra, alone, one)==answers_in(hydra, out[i:i+1], x)
    assert model.gates_for(**x).argmax(1).tolist()==[0,1,2]

SHAPED = [dict(), dict(top_k=5), dict(top_k=0), dict(top_p=.6), dict(min_p=.1), dict(typical_p=.5),
          dict(epsilon_cutoff=.01), dict(eta_cutoff=.01), dict(top_h=.5), dict(repetition_penalty=1.5),
          dict(num_return_sequences=2), dict(top_k=9, top_p=.8, renormalize_logits=True)]
ascii_text = st.characters(codec='ascii', min_codepoint=32, exclude_characters='<|')
ascii_prompt = st.text(ascii_text, min_size=1, max_size=30).filter(str.strip)
ascii_prompts = st.lists(ascii_prompt, min_size=1, max_size=4)

@settings(max_examples=16, deadline=None)
@given(ascii_prompts, st.integers(0, 99), st.sampled_from([.3, 1., 2.]), st.sampled_from(SHAPED))
def test_sampling_draws_what_hydra_draws(hydra, model, prompts, seed, temperature, how):
    x = inputs(hydra, prompts)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, 'generate'))
        out = model.generate(**x, max_new_tokens=5, do_sample=True, temperature=temperature, **how)
    want = hydra.generate(prompts, max_new_tokens=5, temperature=temperature, seed=seed, **how)
    assert answers_in(hydra, out, x)==want

def test_several_answers_keep_the_gates_of_their_prompt(hydra, model):
    x = inputs(hydra, ASKS)
    how = dict(max_new_tokens=6, do_sample=False, num_beams=4, num_return_sequences=2)
    out = model.generate(**x, **how)
    for i,a in enumerate(ASKS):
        one = inputs(hydra, [a])
        alone = model.generate(**one, expert=NAMES[i], **how)
        assert answers_in(hydra, out[2*i:2*i+2], x)==answers_in(hydra, alone, one)

def test_a_stream_is_the_answer(hydra, model):
    x = inputs(hydra, ASKS[:1])
    s = TextIteratorStreamer(hydra.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    t = threading.Thread(target=lambda: model.generate(**x, streamer=s, max_new_tokens=8, do_sample=False))
    t.start()
    got = ''.join(s)
    t.join()
    assert got.strip()==hydra.ask(ASKS[0], max_new_tokens=8)

def test_gates_and_experts_by_hand(hydra, model):
    x, kw = inputs(hydra, ASKS), dict(max_new_tokens=6, do_sample=False)
    mix = ['base', 'sea', {'law': .3, 'sum': .7}]
    mixed = model.generate(**x, expert=mix, **kw)
    assert answers_in(hydra, mixed, x)==hydra.generate(ASKS, expert=mix, max_new_tokens=6)
    assert torch.equal(mixed, model.generate(**x, gates=hydra.gates(ASKS, mix), **kw))
    by_place = model.generate(x['input_ids'], attention_mask=x['attention_mask'], **kw)
    assert torch.equal(by_place, model.generate(**x, **kw))
    with torch.no_grad():
        plain = tiny_base().model
        assert torch.equal(model(**x, gates=torch.zeros(3, 3)).logits, plain(**x).logits)
    with pytest.raises(HydraError, match="expert='tax'"): model.generate(**x, expert='tax')
    with pytest.raises(HydraError, match='gates='): model.generate(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(HydraError, match='prompt is empty'): model.generate(torch.tensor([[0, 0]]))

def test_beams_equal_peft_and_the_merged_model(hydra, model, bundle, tmp_path):
    "A one-hot row computes what PEFT's adapter does, and what a plain model with the product folded in does"
    from peft import PeftModel
    x = inputs(hydra, ASKS)
    kw = dict(max_new_tokens=8, do_sample=False, num_beams=3, num_return_sequences=3, eos_token_id=2, pad_token_id=0)
    said = set()
    for e,n in enumerate(NAMES):
        ours = model.generate(**x, expert=n, **kw)
        adapted = PeftModel.from_pretrained(tiny_base().model, bundle/'experts'/n).eval()
        assert torch.equal(ours, adapted.generate(**x, **kw))
        assert torch.equal(ours, adapted.merge_and_unload().generate(**x, **kw))
        said.add(tuple(ours.flatten().tolist()))
    assert len(said)==3

def test_a_forward_is_routed_and_knows_what_it_cannot_see(hydra, model):
    x = inputs(hydra, ASKS)
    with torch.no_grad(): out = model(**x, use_cache=True)
    first = model.generate(**x, max_new_tokens=1, do_sample=False)[:,-1]
    assert torch.equal(out.logits[:,-1].argmax(-1), first)
    with pytest.raises(HydraError, match='pass gates='):
        model(x['input_ids'][:,-1:], past_key_values=out.past_key_values)
    loss = model(**x, labels=x['input_ids']).loss
    assert torch.isfinite(loss)

@pytest.mark.parametrize('name', LAYOUTS)
def test_the_model_stops_where_hydra_does(name, tmp_path):
    "generation_config holds all the ends, the last label among them; from a bundle too"
    b = laid_out(name, tmp_path/'base')
    m = HydraForCausalLM(hydra_on(b))
    assert m.generation_config.eos_token_id==b.ends
    assert {last_label(b.tokenizer, talk) for talk in TALKS}<=set(b.ends)
    if name not in ('llama3', 'pythia', 'not-special'): return
    m.save_pretrained(tmp_path/'bundle')
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'bundle')
    t = AutoTokenizer.from_pretrained(tmp_path/'bundle')
    assert m.generation_config.eos_token_id==b.ends==m.hydra.model.generation_config.eos_token_id
    assert t.chat_template==b.tokenizer.chat_template
    x = inputs(m.hydra, ASKS[:1])
    start = x['input_ids'].shape[1]
    letter = t('H', add_special_tokens=False).input_ids[-1]
    for end in b.ends:
        says = [letter, end, 9, 9]
        with scripted(m.base, says): out = m.generate(**x, max_new_tokens=4, do_sample=False)
        assert out[0, start:].tolist()==[letter, end]
        with scripted(m.base, says): out = m.generate(**x, max_new_tokens=4, do_sample=False)
        assert answers_in(m.hydra, out, x)==['H']

# ---- in and out

def test_saved_is_the_bundle(model, bundle, tmp_path):
    model.save_pretrained(tmp_path/'a', max_shard_size='1GB')
    (tmp_path/'b').mkdir()
    model.save_pretrained(tmp_path/'b')
    assert files_in(tmp_path/'a')==files_in(bundle)==files_in(tmp_path/'b')

REFUSED = [
    (dict(load_in_4bit=True), 'load_in_4bit'), (dict(dtype=torch.float16), 'float16'),
    (dict(subfolder='x'), 'subfolder'), (dict(attn_implementation='flash_attention_2'), 'attn_implementation'),
    (dict(base=tiny_base(seed=1)), 'another base')]

@pytest.mark.parametrize('kw, words', REFUSED)
def test_what_cannot_be_kept_is_refused(bundle, kw, words):
    with pytest.raises(HydraError, match=words): HydraForCausalLM.from_pretrained(bundle, **kw)

PRECISIONS = [(dict(dtype='bfloat16'), 'bf16'), (dict(dtype=torch.bfloat16), 'bf16'), (dict(quant='nf4'), 'nf4'),
              (dict(dtype='auto', device_map='cpu'), 'fp32'), (dict(device_map={'': 'cpu'}), 'fp32')]

@pytest.mark.parametrize('kw, quant', PRECISIONS)
def test_precision_in_transformers_words(bundle, kw, quant):
    m = AutoModelForCausalLM.from_pretrained(bundle, **kw)
    assert m.hydra.base.quant==quant
    assert m.generate(**inputs(m.hydra, ASKS), max_new_tokens=2).shape[0]==3

def test_from_the_hub_the_links_of_its_cache_are_copied(bundle, tmp_path, monkeypatch, model, hydra):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    seen = []
    def hub(id, revision):
        seen.append((id, revision))
        for f,b in files_in(bundle).items():
            blob, link = tmp_path/'blobs'/f.replace('/', '_'), tmp_path/'snap'/f
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(b)
            if not link.is_symlink(): link.symlink_to(blob)
        return tmp_path/'snap'
    monkeypatch.setattr(auto, 'hub', hub)
    for _ in range(2): m = HydraForCausalLM.from_pretrained('me/hydra', revision='a'*40)
    assert seen==[('me/hydra', 'a'*40)]
    assert m.hydra.ask(ASKS[0], max_new_tokens=4)==hydra.ask(ASKS[0], max_new_tokens=4)
    assert len(auto.HydraTokenizer.from_pretrained('me/hydra', revision='a'*40))==259

def test_pipeline_of_texts_and_chats(bundle, hydra):
    p = pipeline('text-generation', model=str(bundle), max_new_tokens=6, do_sample=False, batch_size=3)
    got = p([[user(a)] for a in ASKS])
    said = [g[0]['generated_text'][-1]['content'].strip() for g in got]
    assert said==hydra.generate(ASKS, max_new_tokens=6)
    tokenizer = hydra.base.tokenizer
    ids = tokenizer(ASKS[1], return_tensors='pt').input_ids
    out = hydra.model.generate(ids, gates=hydra.gates([ASKS[1]]), max_new_tokens=6, do_sample=False)
    want = tokenizer.decode(out[0], skip_special_tokens=True)
    assert p(ASKS[1], return_full_text=True)[0]['generated_text']==want

# ---- other architectures
SMALL = dict(
    vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
ARCHITECTURES = dict(
    llama=dict(tie_word_embeddings=False), qwen2=dict(tie_word_embeddings=True), qwen3=dict(head_dim=16),
    mistral=dict(sliding_window=16), gemma=dict(head_dim=16), gemma2=dict(head_dim=16, sliding_window=16),
    gemma3_text=dict(head_dim=16, sliding_window=16),
    gpt_neox=dict(use_parallel_residual=True, num_key_value_heads=None),
    phi3=dict(), olmo2=dict())

def checkpoint(kind, to):
    "A random model of an architecture, saved with the tokenizer of bytes"
    sizes = {k:v for k,v in (SMALL|ARCHITECTURES[kind]).items() if v is not None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float()
        for p in m.parameters():
            if p.dim()>1: p.data.normal_(0, .1)
    m.save_pretrained(to)
    byte_tokenizer().save_pretrained(to)
    return str(to)

@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_architecture(kind, tmp_path):
    "A bundle on it opens; each expert is what PEFT makes of its adapter; every way to generate agrees"
    from peft import PeftModel
    h = hydra_on(load_base(checkpoint(kind, tmp_path/'base'), 'fp32', 'cpu'), noise=.05)
    before = h.base.model.config.to_dict()
    m = AutoModelForCausalLM.from_pretrained(h.save(tmp_path/'bundle'))
    assert m.config.get_text_config().model_type==kind
    assert AutoTokenizer.from_pretrained(tmp_path/'bundle').chat_template
    assert h.base.model.config.to_dict()==before
    x, kw = inputs(h, ASKS), dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    keep = x['attention_mask'].bool()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'base').eval()
    with torch.no_grad():
        unheard = m(**x, gates=torch.zeros(3, 3)).logits
        assert torch.equal(unheard, plain(**x).logits)
    adapted = PeftModel.from_pretrained(plain, tmp_path/'bundle'/'experts'/'sea').eval()
    with torch.no_grad():
        ours = m(**x, gates=one_hot([1]*3, 3)).logits[keep]
        torch.testing.assert_close(ours, adapted(**x).logits[keep], atol=2e-4, rtol=2e-4)
    assert (ours-unheard[keep]).abs().max()>.01
    assert torch.equal(m.generate(**x, expert='sea', num_beams=2, **kw), adapted.generate(**x, num_beams=2, **kw))
    out = m.generate(**x, **kw)
    assert answers_in(h, out, x)==h.generate(ASKS, max_new_tokens=6)
    for how in (dict(cache_implementation='static'), dict(use_cache=False)):
        assert torch.equal(m.generate(**x, **kw, **how), out)

@pytest.mark.parametrize('quant', ['fp32', 'bf16'])
@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_rows_in_a_line_are_what_they_are_alone(kind, quant, tmp_path):
    "Longer than a sliding window, behind rows of other experts"
    m = gated(load_base(checkpoint(kind, tmp_path/'base'), quant, 'cpu'), 3, LoraSpec(4, 8))
    g = torch.Generator().manual_seed(0)
    lengths, who = [40, 25, 3, 60], [2, 2, 0, 1]
    near = 1e-4 if quant=='fp32' else .02
    m.stack.theta.normal_(0, .05, generator=g)
    ids = torch.randint(3, 259, (1, sum(lengths)), generator=g)
    with torch.no_grad(), packed_attention(m), using(packed_plan(who, lengths, m.stack)):
        assert m.supports_packing
        laid = hidden(m, ids, lengths=lengths)[0].split(lengths)
    for row,e,h in zip(ids[0].split(lengths), who, laid):
        alone, other = (hidden(m, row[None], None, one_hot([f], 3))[0] for f in (e, (e+1)%3))
        assert (h-alone).norm() < near*alone.norm() < (other-alone).norm()

@pytest.mark.slow
@pytest.mark.parametrize('name', ['smollm2', 'gemma3'])
def test_real_bases(name, tmp_path):
    "A bundle on a base that comes in packages: found again by name, its experts as in PEFT, its rows as one by one"
    from peft import PeftModel
    h = hydra_on(load_base(name, 'fp32', 'cpu'), noise=.02)
    bundle = h.save(tmp_path/'bundle')
    x, kw = inputs(h, ASKS), dict(max_new_tokens=6, do_sample=False)
    out = answers_in(h, HydraForCausalLM(h).generate(**x, **kw), x)
    said_alone = [h.ask(a, max_new_tokens=6) for a in ASKS]
    assert out==said_alone
    with torch.no_grad(): ours = h.model(**x, gates=one_hot([1]*3, 3)).logits
    adapted = PeftModel.from_pretrained(h.model.detach(), bundle/'experts'/'sea').eval()
    keep = x['attention_mask'].bool()
    with torch.no_grad(): theirs = adapted(**x).logits
    assert (ours[keep]-theirs[keep]).abs().max()<2e-3
    assert torch.equal(ours[:,-1].argmax(-1), theirs[:,-1].argmax(-1))
    del adapted, h
    m = AutoModelForCausalLM.from_pretrained(bundle)
    t = AutoTokenizer.from_pretrained(bundle)
    start = x['input_ids'].shape[1]
    said_again = [t.decode(o[start:], skip_special_tokens=True).strip() for o in m.generate(**x, **kw)]
    assert said_again==out
