"What a Hydra promises beyond its lesson: two processes, kill -9, PEFT alone"
import contextlib, gc, json, os, shutil, signal, subprocess, sys, threading, time, tracemalloc
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, TextStreamer

from hydramoe.models.base import load_base, tiny_base
from hydramoe.domains.cluster import lesson_texts, prompt_text
from hydramoe.foundations.core import HydraError, digest, rng
from hydramoe.foundations.files import file_sha256, read_json, write_json
from hydramoe.hydra.model import BundleError, Chat, Draw, Hydra, check, drawing, seal_bundle
from hydramoe.hydra.route import uniform
from hydramoe.experts.stack import LoraSpec, gated, one_hot

NAMES = ['law', 'sea', 'sum']

def by_hand(seed=0, names=NAMES):
    "Three experts of noise on the tiny base"
    base = tiny_base()
    model = gated(base, slots=len(names), spec=LoraSpec(rank=4))
    for e, name in enumerate(names): model.stack.init_expert(e, seed=seed, name=name)
    model.stack.theta += torch.from_numpy(rng(seed, 'noise').normal(0, .1, model.stack.theta.shape)).float()
    return Hydra(base, model, uniform(names))

def files(root): return {str(p.relative_to(root)): file_sha256(p) for p in sorted(Path(root).rglob('*')) if p.is_file()}

def ids(hydra, text): return hydra.base.tokenizer(text, return_tensors='pt').input_ids

@pytest.fixture(scope='module')
def bundle(tmp_path_factory): return by_hand().save(tmp_path_factory.mktemp('bundle')/'h')

def test_same_logits_after_a_round_trip(bundle):
    a, b = by_hand(), Hydra.load(bundle)
    x, g = ids(a, 'A Hydra has nine heads'), torch.tensor([[.2, .5, .3]])
    with torch.no_grad(): assert torch.equal(a.model(x, gates=g).logits, b.model(x, gates=g).logits)
    assert a.generate(['ahoy', 'the law of the sea'], max_new_tokens=10) == b.generate(['ahoy', 'the law of the sea'], max_new_tokens=10)

@pytest.mark.parametrize('quant', ['bf16', 'nf4'])
def test_other_precisions_keep_the_fingerprint(bundle, quant):
    h = Hydra.load(bundle, quant=quant)
    assert h.base.quant == quant and len(h.ask('ahoy', max_new_tokens=4)) >= 0

def test_expert_loads_in_peft_alone(bundle):
    from peft import PeftModel
    hydra = Hydra.load(bundle)
    x = ids(hydra, 'A Hydra has nine heads')
    for e, name in enumerate(NAMES):
        alone = PeftModel.from_pretrained(tiny_base().model, bundle/'experts'/name).eval()
        with torch.no_grad():
            ours, theirs = hydra.model(x, gates=one_hot([e], 3)).logits, alone(x).logits
            assert (ours-hydra.model(x).logits).abs().max() > .1
        assert torch.allclose(ours, theirs, atol=1e-4)

MAKE = """
import sys
sys.path.insert(0, {tests!r})
from test_hydra import by_hand
by_hand().save(sys.argv[1])
"""

def test_two_processes_write_the_same_bytes(tmp_path, bundle):
    code = MAKE.format(tests=str(Path(__file__).parent))
    both = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/seed)], env=os.environ | dict(PYTHONHASHSEED=seed)) for seed in ('1', '2')]
    assert [p.wait() for p in both] == [0, 0]
    assert files(tmp_path/'1') == files(tmp_path/'2') == files(bundle)

def test_a_mixed_batch_is_its_rows(bundle):
    h = Hydra.load(bundle)
    prompts, experts = ['ahoy', 'what is the law of the sea?', 'sum up'], ['sea', 'base', {'law': .3, 'sum': .7}]
    assert h.generate(prompts, expert=experts, max_new_tokens=8) == [h.ask(p, expert=e, max_new_tokens=8) for p, e in zip(prompts, experts)]
    with torch.no_grad(): assert torch.equal(h.model(ids(h, 'ahoy'), gates=h.gates(['ahoy'], 'base')).logits, tiny_base().model(ids(h, 'ahoy')).logits)

def test_beams_and_several_answers_keep_the_gate(bundle):
    h = Hydra.load(bundle)
    out = h.generate(['ahoy', 'sum up'], expert=['sea', 'sum'], max_new_tokens=6, num_beams=2)
    assert out == [h.ask('ahoy', expert='sea', max_new_tokens=6, num_beams=2), h.ask('sum up', expert='sum', max_new_tokens=6, num_beams=2)]

# --- values and letters from strangers ---------------------------------------------------------------------------------

@pytest.mark.parametrize('wish', [dict(do_sample=True), dict(eos_token_id=2), dict(pad_token_id=0), dict(return_dict_in_generate=True), dict(output_scores=True), dict(input_ids=torch.ones(1, 2)), dict(gates=None), dict(max_length=5), dict(generation_config=3),
    dict(never_heard_of=1), dict(temperature=float('nan')), dict(temperature=-1), dict(temperature=float('inf')), dict(temperature=1e-40), dict(temperature='1'), dict(max_new_tokens=0), dict(max_new_tokens=2.5), dict(max_new_tokens=True), dict(seed='x'),
    dict(expert=dict(law='x')), dict(expert=dict(law=float('nan'))), dict(expert=dict(law=1e300)), dict(expert=3), dict(expert=[]), dict(expert=('law',)), dict(top_p=2.), dict(top_k=-1), dict(num_beams=0), dict(num_return_sequences=3),
    dict(streamer=print, num_beams=2), dict(streamer=3), dict(early_stopping='x'), dict(past_key_values=3), dict(stop_strings=['x']), dict(repetition_penalty=0)], ids=str)
def test_what_generate_cannot_do_is_refused(bundle, wish):
    with pytest.raises(HydraError, match=next(iter(wish)) if 'expert' not in wish else None): Hydra.load(bundle).ask('ahoy', **{**dict(max_new_tokens=3), **wish})

@pytest.mark.parametrize('wish', [dict(temperature=1), dict(temperature=np.float32(1), top_p=1), dict(max_new_tokens=np.int64(3)), dict(num_beams=2, num_return_sequences=2), dict(temperature=1., num_return_sequences=2), dict(repetition_penalty=2), dict(temperature=1e-3), dict(temperature=1e300), dict(top_k=None)], ids=str)
def test_numbers_of_any_kind_are_taken(bundle, wish): Hydra.load(bundle).ask('ahoy', **{**dict(max_new_tokens=3), **wish})

def test_prompts_that_are_none(bundle):
    h = Hydra.load(bundle)
    for bad in ([], (), 'ahoy', None, [3], [[]], ['caf\udce9'], [[dict(role='user', content='caf\udce9')]]):
        with pytest.raises(HydraError): h.generate(bad, max_new_tokens=2)
    with pytest.raises(HydraError): Chat(h, margin=float('nan'))
    with pytest.raises(HydraError): Chat(h, system='caf\udce9')

def resealed(bundle, tmp_path, change=lambda man: None, file=None, text=None):
    "A copy whose manifest was changed, with every digest right"
    d = Path(shutil.copytree(bundle, tmp_path/'copy', dirs_exist_ok=True))
    man = read_json(bundle/'hydra.json')
    change(man)
    if file:
        (d/file).write_text(text)
        man['files'][file] = file_sha256(d/file)
    man.pop('seal')
    write_json(d/'hydra.json', dict(man, seal=digest(man)))
    return d

@pytest.mark.parametrize('id', ['tiny:x', 'tiny:', 'tiny:-1', 'tiny:'+'9'*40, 'tiny:١', 'hub:'+'x'*5000, 'path:/'+'x'*900, 'path:'+'x/'*300, 'path:a\0b', 'hub:a/b c', 'hub:~nobody-at-all/x', 'pypi:x', '', 'zip:x', 'hub:', 'path:a\nb'], ids=lambda i: ascii(i[:20]))
def test_a_base_that_cannot_be_named(bundle, tmp_path, id):
    with pytest.raises(HydraError): Hydra.load(resealed(bundle, tmp_path, lambda man: man['base'].update(id=id)))

def test_a_stranger_names_an_expert_base_or_a_precision(bundle, tmp_path):
    for change in (lambda man: man['experts'][0].update(name='base'), lambda man: man['base'].update(quant='int3')):
        with pytest.raises(HydraError): check(resealed(bundle, tmp_path, change))

@pytest.mark.parametrize('depth', [150, 500, 950, 990, 3000, 100_000])
def test_deep_json_in_any_file(bundle, tmp_path, depth):
    text = '{"a":'*depth + '1' + '}'*depth
    for f in [f for f in read_json(bundle/'hydra.json')['files'] if f.endswith('.json')]:
        with pytest.raises(BundleError): check(resealed(bundle, tmp_path, file=f, text=text))
    d = resealed(bundle, tmp_path)
    (d/'hydra.json').write_text(text)
    with pytest.raises(BundleError): Hydra.load(d)

def test_an_expert_cannot_be_called_base(bundle, tmp_path):
    from hydramoe.domains.cluster import Domains, name_domains
    from hydramoe.hydra.model import adopt
    with pytest.raises(HydraError, match="'base' is taken"): adopt(dict(base=bundle/'experts'/'sea'))
    with pytest.raises(HydraError, match="'BASE' is taken"): Domains(np.eye(2), ['BASE', 'x'])
    texts = ['base base', 'base', 'height height', 'height']
    assert 'base' not in name_domains(texts, np.array([0, 0, 1, 1]))

# --- conversations ---------------------------------------------------------------------------------------------------

class Fickle:
    "A router by the first word of the user"
    kind, names, params = 'fickle', NAMES, {}
    def __call__(self, prompts): return np.array([[float(prompt_text(dict(prompt=p)).startswith(n)) for n in NAMES] for p in prompts])

def fickle(base=None):
    h = by_hand() if base is None else Hydra(base, by_hand_on(base), uniform(NAMES))
    h.router = Fickle()
    return h

def by_hand_on(base):
    model = gated(base, 3, LoraSpec(rank=4))
    for e, name in enumerate(NAMES): model.stack.init_expert(e, seed=0, name=name)
    model.stack.theta += torch.from_numpy(rng(0, 'noise').normal(0, .1, model.stack.theta.shape)).float()
    return model

SAID = ['law of the sea?', 'and who says so?', 'sea or land?', 'sea again?', 'nothing of it', 'sum it up']

def test_a_conversation_equals_asking_with_all_of_it():
    "Turn by turn the answer is that of a fresh Hydra which reads everything under the present expert"
    h, fresh = fickle(), by_hand()
    chat = Chat(h, 'Be brief.')
    for t in SAID:
        answer = chat(t, max_new_tokens=9)
        assert answer == fresh.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], max_new_tokens=9), t
    assert [t['experts'] for t in chat.turns] == [{'law': 1}, 'base', {'sea': 1}, {'sea': 1}, 'base', {'sum': 1}]
    assert [t['took_over'] for t in chat.turns] == [False, True, True, False, True, True]
    assert [t['again']>0 for t in chat.turns] == [False, True, True, False, True, True]
    assert [t['read']==t['tokens'] for t in chat.turns] == [True, True, True, False, True, True]

def test_a_stale_cache_would_be_seen():
    "What the test above would find: going on from the cache of another expert gives other answers"
    h = fickle()
    chat = Chat(h)
    chat(SAID[0], max_new_tokens=9)
    chat.gates = h.gates([SAID[2]]) # a lie about who filled the cache
    stale = chat(SAID[2], max_new_tokens=9)
    assert stale != h.ask(chat.messages[:-1], expert='sea', max_new_tokens=9)

@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([[1, 0, 0], [.6, .4, 0], [.4, .6, 0], [.3, .3, .4], [0, 0, 0], [0, .1, .2]]), min_size=1, max_size=6), st.sampled_from([0., .1, .25, 1.]))
def test_hysteresis(weights, margin):
    "Who leads changes exactly when another leads by more than the margin, and without a change no weight moves"
    class Told:
        def gates(self, prompts): return torch.tensor([weights[int(prompts[0][-1]["content"])]]).float()
    chat, full = Chat(Told(), margin=margin), lambda g: [*g, 1-sum(g)]
    chat.gates = held = chat.route('0')
    for i in range(1, len(weights)):
        w, lead = full(torch.tensor(weights[i]).float().tolist()), int(np.argmax(full(held[0].tolist())))
        chat.gates = new = chat.route(str(i))
        gain = max(w)-w[lead]
        if gain > margin+1e-6: assert torch.equal(new, torch.tensor([weights[i]]).float())
        elif gain < margin-1e-6: assert torch.equal(new, held)
        held = new

def test_an_interrupted_turn_leaves_no_cache_and_the_conversation_as_it_was():
    h = fickle()
    chat = Chat(h)
    chat(SAID[0], max_new_tokens=4)
    before = list(chat.messages)
    class Stop:
        def put(self, x): raise KeyboardInterrupt
        def end(self): pass
    with pytest.raises(KeyboardInterrupt): chat(SAID[2], streamer=Stop(), max_new_tokens=4)
    assert chat.messages == before and chat.cache is None and len(chat.turns) == 1
    assert chat(SAID[2], max_new_tokens=9) == h.ask(before+[dict(role='user', content=SAID[2])], expert='sea', max_new_tokens=9)

def test_beams_in_a_conversation():
    h = fickle()
    chat = Chat(h)
    for kw in (dict(), dict(num_beams=2), dict(), dict()):
        answer = chat('law and order', max_new_tokens=5, **kw)
        assert answer == h.ask(chat.messages[:-1], expert='law', max_new_tokens=5, **kw)
    assert chat.turns[3]['read'] < chat.turns[3]['tokens'] == len(chat.ids)

def windowed(tmp_path, layers):
    from transformers import AutoConfig, AutoModelForCausalLM
    cfg = AutoConfig.for_model('gemma3_text', vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8, pad_token_id=0, eos_token_id=2, bos_token_id=1)
    with torch.random.fork_rng(): torch.manual_seed(0); AutoModelForCausalLM.from_config(cfg).save_pretrained(tmp_path)
    tiny_base().tokenizer.save_pretrained(tmp_path)
    return load_base(str(tmp_path), 'fp32', 'cpu')

def test_a_sliding_window_in_a_conversation(tmp_path):
    "Gemma forgets what is far away; its cache is cut all the same"
    h = fickle(windowed(tmp_path, 2))
    chat = Chat(h)
    for t in ['sea'*9, 'sea again?', 'law now']: assert chat(t, max_new_tokens=12) == h.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=12)
    assert chat.turns[1]['read'] < chat.turns[1]['tokens']

# --- threads and long runs -------------------------------------------------------------------------------------------

# --- a conversation under a fork

def noisy(base, fork):
    "Three experts of noise that part at a fork, on a trunk of noise"
    model = gated(base, 3, LoraSpec(rank=4, fork=fork))
    for e, name in enumerate(NAMES): model.stack.init_expert(e, seed=0, name=name)
    for t in (model.stack.theta, model.stack.trunk): t += torch.from_numpy(rng(0, 'noise').normal(0, .1, t.shape)).float()
    return model

def forked(base=None, fork=.5, router=None):
    base = base or tiny_base(layers=4)
    h = Hydra(base, noisy(base, fork), uniform(NAMES))
    h.router = router or Fickle()
    return h

@contextlib.contextmanager
def counted(h):
    "Tokens that each block reads meanwhile"
    ran, layers = [0]*4, h.model.base.model.layers
    def count(i): return lambda block, args, kw: ran.__setitem__(i, ran[i]+(args[0] if args else kw['hidden_states']).shape[1])
    hooks = [b.register_forward_pre_hook(count(i), with_kwargs=True) for i, b in enumerate(layers)]
    try: yield ran
    finally:
        for k in hooks: k.remove()

def contents(cache): return [t for l in cache.layers for t in (l.keys, l.values)]

def read_whole(h, ids, gates):
    "What one pass over all of it leaves in a cache"
    cache = DynamicCache()
    with torch.no_grad(): h.model(input_ids=torch.tensor([ids]), gates=gates if gates.any() else None, past_key_values=cache, use_cache=True)
    return contents(cache)

@pytest.mark.parametrize('n', [1, 9])
def test_a_forked_conversation_equals_reading_all_of_it_and_costs_what_it_says(n):
    "Answers and cache are those of an expert that was there from the beginning; no block below the fork reads a token twice, unless the base alone spoke"
    h, fresh = forked(), forked()
    chat = Chat(h, 'Be brief.')
    for t in ['law of the sea?', 'sea or land?', 'sea again?', 'sum it up', 'nothing of it', 'nothing at all', 'law now', 'sum now']:
        with counted(h) as ran: answer = chat(t, max_new_tokens=n)
        turn = chat.turns[-1]
        if n==1: assert ran == [turn['read']-turn['again']*('above' in turn)]*2 + [turn['read']]*2, t
        else: assert answer == fresh.ask(chat.messages[:-1], expert=turn['experts'], max_new_tokens=n), t
        for a, b in zip(contents(chat.cache), read_whole(fresh, chat.ids, chat.gates), strict=True): assert torch.allclose(a, b, atol=1e-5), t
    assert [t.get('above', 0) for t in chat.turns] == [0, 2, 0, 2, 0, 0, 0, 2]
    assert [t['again']>0 for t in chat.turns] == [False, True, False, True, True, False, True, True]
    assert [t['read']==t['tokens'] for t in chat.turns] == [True, True, False, True, True, False, True, True]
    assert chat.explain(1).endswith(f"{chat.turns[1]['again']} of them again from block 2 of 4 on") and 'block' not in chat.explain(2)+chat.explain(4)

def test_the_lower_half_of_a_stale_cache_would_be_seen():
    "What the test above would find: a refill from states of another conversation gives another cache"
    h = forked()
    chat = Chat(h)
    chat('law of the sea?', max_new_tokens=3)
    chat.states = chat.states.flip(1)
    chat('sea or land?', max_new_tokens=3)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(contents(chat.cache), read_whole(h, chat.ids, chat.gates)))

def test_beams_and_interruptions_under_a_fork(monkeypatch):
    import hydramoe.hydra.model
    h, fresh = forked(), forked()
    chat = Chat(h)
    for t, kw in (('law?', {}), ('sea?', dict(num_beams=2)), ('sum?', {}), ('law!', {})):
        assert chat(t, max_new_tokens=5, **kw) == fresh.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=5, **kw)
    with monkeypatch.context() as m:
        m.setattr(hydramoe.hydra.model, 'read_on', lambda *a: 1/0) # after the refill, before the answer
        with pytest.raises(ZeroDivisionError): chat('sea?', max_new_tokens=5)
    assert chat.cache is None and len(chat.turns) == 4
    assert chat('sea?', max_new_tokens=5) == fresh.ask(chat.messages[:-1], expert='sea', max_new_tokens=5)

def test_a_gate_and_an_expert_by_hand_take_turns_under_a_fork(tmp_path):
    made = noisy(tiny_base(), 1)
    folders = {n: made.stack.save_peft(tmp_path/n, e, 'tiny-0') for e, n in enumerate(NAMES)}
    h = Hydra.from_adapters(folders, tiny_base(), dict(kind='arrow', top_k=2), fork=1)
    chat = Chat(h)
    for who in (None, 'law', None, 'sea', None):
        assert chat('and?', expert=who, max_new_tokens=6) == h.ask(chat.messages[:-1], expert=who, max_new_tokens=6)
    assert [t.get('above', 0) for t in chat.turns] == [0, 1, 1, 1, 1]

def test_a_sliding_window_under_a_fork(tmp_path):
    h = forked(windowed(tmp_path, 4))
    chat = Chat(h)
    for t in ['sea'*9, 'sea again?', 'law now', 'sum it']: assert chat(t, max_new_tokens=12) == h.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=12)
    assert [t.get('above', 0) for t in chat.turns] == [0, 0, 2, 2]

def test_the_base_alone_has_no_trunk():
    "By hand or because a router abstains, alone or in a batch; beside it, rows answer as ever"
    h, base = forked(), tiny_base(layers=4)
    bare = Hydra(base, by_hand_on(base), uniform(NAMES))
    want = [bare.ask(p, expert='base', max_new_tokens=8) for p in ('nothing', 'else')]
    assert [h.ask(p, max_new_tokens=8) for p in ('nothing', 'else')] == want
    batch = ['law', 'nothing', 'sea', 'else']
    assert h.generate(batch, max_new_tokens=8) == [h.ask('law', max_new_tokens=8), want[0], h.ask('sea', max_new_tokens=8), want[1]]
    two = h.generate(batch, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert two[2:4] == h.generate(['nothing'], max_new_tokens=4, num_beams=2, num_return_sequences=2)
    from hydramoe.hydra.auto import HydraForCausalLM
    with pytest.raises(HydraError, match='this Hydra forks'): HydraForCausalLM(h).generate(ids(h, 'nothing'), max_new_tokens=2, expert='base')
    with torch.no_grad(): # a share left to the base is left to the bare blocks above the fork
        x = ids(h, 'ahoy')
        assert (h.model(x, gates=torch.zeros(1, 3)).logits-h.model(x).logits).abs().max() > .1

def seer(h, layer, farthest=None):
    "The same Hydra with a router on what passes a layer; it sends what is far away to the base"
    from hydramoe.models.hidden import hidden_mean
    from hydramoe.hydra.model import as_messages, reading
    from hydramoe.hydra.route import abstaining, on_hidden, on_whole, ridge
    with reading(h.model): x = hidden_mean([dict(prompt=as_messages(t)) for t in NAMES], h.base, layer)
    return Hydra(h.base, h.model, abstaining(on_whole(on_hidden(ridge, NAMES, x, NAMES, layer, temperature=.3)), farthest))

@pytest.mark.parametrize('kind', ['llama', 'window'])
def test_routed_on_the_way_is_routed_first(kind, tmp_path, monkeypatch):
    "The same gates to the bit and the same answers, sampled or not, turn by turn too, when the router looks while the trunk reads; and the trunk reads once"
    plain = forked(windowed(tmp_path, 4) if kind=='window' else None)
    for layer in (1, 2):
        h, looked = seer(plain, layer), []
        monkeypatch.setattr(Hydra, '_read_and_route', lambda *x, f=Hydra._read_and_route: looked.append(f(*x)) or looked[-1])
        for t in ('law', 'sea'*9, 'who?'):
            by = {n: w for n, w in zip(NAMES, h.gates([t])[0].tolist()) if w}
            for how in (dict(), dict(temperature=1., seed=3)):
                with counted(h) as ran: one = h.ask(t, max_new_tokens=9, **how)
                with counted(h) as twice: assert h.ask(t, expert=by, max_new_tokens=9, **how) == one
                assert ran[0] == twice[0]+1 and torch.equal(looked[-1][0], h.gates([t]))
        assert len(looked) == 6
        assert h.generate(['law', 'sea'], max_new_tokens=9) == [h.ask(t, max_new_tokens=9) for t in ('law', 'sea')] and len(looked) == 9
        assert h.ask('law', max_new_tokens=5, num_beams=2) == h.ask('law', expert={n: w for n, w in zip(NAMES, h.gates(['law'])[0].tolist())}, max_new_tokens=5, num_beams=2)
        h.generate(['law', 'law of the sea'], max_new_tokens=3)
        chat = Chat(h, 'Be brief.')
        for t in ('law', 'sea'): assert chat(t, max_new_tokens=5) == h.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], max_new_tokens=5)
        assert len(looked) == 9
        monkeypatch.undo()

def test_a_router_that_abstains_on_the_way_asks_the_bare_base():
    h = forked()
    bare, shy = h.ask('who?', expert='base', max_new_tokens=9), seer(h, 1, farthest=1e-9)
    assert not shy.gates(['who?']).any() and shy.ask('who?', max_new_tokens=9) == bare
    assert shy.generate(['who?', 'what?'], max_new_tokens=9)[0] == bare

def test_eight_threads_with_eight_gates_answer_as_one_does():
    h = by_hand()
    mixes = ['law', 'sea', 'sum', 'base', {'law': .5, 'sea': .5}, {'sum': 2.}, {'law': .2, 'sea': .3, 'sum': .5}, {'sea': -1.}]
    jobs = [(e, dict(max_new_tokens=12, **kw)) for e, kw in zip(mixes, [{}, dict(num_beams=2), {}, {}, dict(use_cache=False), {}, dict(num_beams=3), {}])]
    asks = ['ahoy', 'what is the law of the sea?']
    want = [h.generate(asks, expert=e, **kw) for e, kw in jobs]
    assert len({str(w) for w in want}) == 8
    got, gate = [[] for _ in jobs], threading.Barrier(8)
    def work(i):
        gate.wait()
        for _ in range(3): got[i].append(h.generate(asks, expert=jobs[i][0], **jobs[i][1]))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert got == [[w]*3 for w in want]

@pytest.mark.slow
def test_five_hundred_swaps_leave_nothing_behind():
    "Tensors and bytes that are alive after 500 more swaps and mixtures are those of before"
    h = by_hand()
    x, rs = ids(h, 'ahoy'), rng(0, 'swaps')
    def swap(n):
        for i in range(n):
            g = torch.from_numpy(rs.random((1, 3))).float() if i%3 == 0 else one_hot([i%3], 3)
            h.model.generate(x, gates=g, max_new_tokens=2, do_sample=False, pad_token_id=0)
    def alive():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(tensors), sum(t.nbytes for t in tensors)
    tracemalloc.start()
    swap(200) # what torch and transformers keep for themselves is full by then
    tensors, first = alive(), tracemalloc.get_traced_memory()[0]
    swap(500)
    after, grown = alive(), tracemalloc.get_traced_memory()[0]-first
    tracemalloc.stop()
    assert after[0] <= tensors[0]+2 and after[1] <= tensors[1]+4096, (tensors, after)
    assert grown < 500*100, f'{grown/500:.0f} bytes a swap'

@pytest.mark.parametrize('quant', ['fp32', 'bf16', 'nf4'])
def test_the_base_is_bit_equal_before_with_and_after(quant):
    base = tiny_base(quant=quant)
    x = base.tokenizer('A Hydra has nine heads', return_tensors='pt').input_ids
    say = lambda m, **kw: m(x, **kw).logits
    with torch.no_grad():
        before, weights = say(base.model), {n: p.clone() for n, p in base.model.named_parameters()}
        model = by_hand_on(base)
        h = Hydra(base, model, uniform(NAMES))
        assert torch.equal(say(model), before) and torch.equal(say(model, gates=torch.zeros(1, 3)), before) and torch.equal(say(base.model), before)
        h.generate(['ahoy', 'sum up'], expert=['sea', {'law': .3, 'sum': .7}], max_new_tokens=5)
        assert not torch.equal(say(model, gates=one_hot([1], 3)), before)
        assert torch.equal(say(model), before) and torch.equal(say(model, gates=h.gates(['ahoy'], 'base')), before)
        free = model.detach()
        assert torch.equal(say(free), before)
        assert all(torch.equal(p, weights[n]) for n, p in free.named_parameters())

# --- where an answer ends -------------------------------------------------------------------------------------------

from test_base import LAYOUTS, TALKS, laid_out, last_label

@contextlib.contextmanager
def scripted(model, says):
    "The model says these ids, one a forward, whatever it is asked; gives how many it has said"
    said = [0]
    def told(module, args, out):
        out.logits[:, -1] = -1e4
        out.logits[:, -1, says[said[0]%len(says)]] = 1e4
        said[0] += 1
    hook = model.register_forward_hook(told)
    try: yield said
    finally: hook.remove()

def rambling(tokenizer, end):
    "An answer, its end, and the next user whom a model invents"
    return tokenizer('Hm.', add_special_tokens=False).input_ids + [end] + tokenizer('and then user?', add_special_tokens=False).input_ids

@pytest.mark.parametrize('name', ['llama3', 'qwen-base', 'gemma-it', 'phi3', 'not-special', 'pythia', 'smollm2-base', 'no-eos'])
def test_an_answer_ends_where_training_ends_it(name, tmp_path):
    "Asked alone, in a batch, sampled, with beams, in a conversation, by the base: it stops, and no mark is in the answer or in the stream"
    b = laid_out(name, tmp_path)
    h, t = Hydra(b, by_hand_on(b), uniform(NAMES)), b.tokenizer
    for end in {last_label(t, TALKS[0]), *b.ends}:
        says = [i for i in rambling(t, end) if b.tokenizer.bos_token is None or i != b.tokenizer.bos_token_id]
        for ask in (lambda **kw: h.ask('?', **kw), lambda **kw: h.ask('?', expert='base', **kw), lambda **kw: h.ask('?', temperature=1., **kw), lambda **kw: h.generate(['?', 'What is the law?'], **kw)[1], lambda **kw: Chat(h)('?', **kw)):
            with scripted(b.model, says) as said: assert ask(max_new_tokens=12) == 'Hm.'
            assert said[0] == 4
        with scripted(b.model, says): assert h.ask('?', max_new_tokens=12, num_beams=2) == 'Hm.'
        seen = []
        class Stream(TextStreamer):
            def on_finalized_text(self, text, stream_end=False): seen.append(text)
        with scripted(b.model, says): h.ask('?', max_new_tokens=12, streamer=Stream(t, skip_prompt=True, skip_special_tokens=True))
        assert ''.join(seen).strip() == 'Hm.'

def test_marks_written_as_text_are_no_part_of_the_answer(tmp_path):
    "ChatML on a vocabulary that has its marks as letters: they are said, then the end of text; the answer has neither"
    b = laid_out('pythia-chatml', tmp_path)
    h, t = Hydra(b, by_hand_on(b), uniform(NAMES)), b.tokenizer
    says = t('Hm.<|im_end|>\n').input_ids + [last_label(t, TALKS[0])] + t('more').input_ids
    with scripted(b.model, says): assert h.ask('?', max_new_tokens=40) == 'Hm.'
    assert h.base.ends == [t.eos_token_id]

def test_smollm2_with_another_end_of_text_stops_after_its_answer():
    "Laid out as Gemma-it and Phi-3 are: the tokenizer ends texts, generation_config lists both ends"
    b = load_base('smollm2', 'fp32', 'cpu')
    ask, tok = 'What is the capital of France?', b.tokenizer
    h = Hydra(b, by_hand_on(b), uniform(NAMES))
    want = h.ask(ask, expert='base', max_new_tokens=40)
    tok.eos_token, b.model.generation_config.eos_token_id = '<|endoftext|>', [0, 2]
    assert tok.eos_token_id == 0 and h.base.ends == [0, 2]
    assert h.ask(ask, expert='base', max_new_tokens=40) == want and len(tok(want).input_ids) < 38

# --- a seed for each call ---------------------------------------------------------------------------------------------

def test_eight_threads_draw_what_each_draws_alone():
    "And torch's own generator is as it was, also for whoever draws from it meanwhile"
    h = by_hand()
    jobs = [dict(prompts=['ahoy', 'what is the law of the sea?'][:1+i%2], seed=i, temperature=(.7, 1., 2.)[i%3], max_new_tokens=12, **[{}, dict(top_p=.9), dict(num_return_sequences=2)][i%3]) for i in range(8)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    want = [h.generate(**j) for j in jobs]
    assert len({str(w) for w in want}) == 8
    got, gate, foreign = [[] for _ in jobs], threading.Barrier(9), []
    def work(i):
        gate.wait()
        for _ in range(3): got[i].append(h.generate(**jobs[i]))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    gate.wait()
    while any(t.is_alive() for t in ts): foreign.append(torch.rand(1).item()); time.sleep(.002)
    for t in ts: t.join()
    assert got == [[w]*3 for w in want]
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert foreign == [torch.rand(1).item() for _ in foreign] and torch.equal(torch.get_rng_state(), after)

@pytest.mark.parametrize('how', [dict(top_k=0), dict(top_k=3), dict(top_k=0, top_p=.7), dict(min_p=.3), dict(top_k=0, temperature=2.), dict(top_k=2, temperature=.5)], ids=str)
def test_draws_have_the_distribution_of_the_scores(how):
    "Chi-square of 20,000 rows, after what shapes the distribution; what is ruled out is never drawn"
    from scipy.stats import chisquare
    from transformers import GenerationConfig
    asked = {**how}
    p = drawing(asked.pop('temperature', 1.), 5, 'cpu', GenerationConfig(), asked)['logits_processor']
    assert asked == {} and type(p[-1]) is Draw
    scores = torch.tensor([[1., 0., -1., .5, -3., 2.]]).repeat(20_000, 1)
    want = type(p)(p[:-1])(None, scores[:1].clone())[0].softmax(-1)
    seen = torch.bincount(p(None, scores).argmax(1), minlength=6)
    assert not seen[want == 0].any() and chisquare(seen[want > 0], want[want > 0].double()/want.double().sum()*20_000).pvalue > .001

def test_beams_that_are_drawn_are_refused():
    with pytest.raises(HydraError, match='num_beams=2 with temperature=0.5.*temperature=0'): by_hand().ask('ahoy', temperature=.5, num_beams=2)

# --- refused ---------------------------------------------------------------------------------------------------------

def reseal(d):
    old = read_json(d/'hydra.json')
    (d/'hydra.json').unlink()
    seal_bundle(d, {k: old[k] for k in ('base', 'experts', 'router', 'built')})

def tensors(d, change, expert='law'):
    f = d/'experts'/expert/'adapter_model.safetensors'
    t = load_file(f)
    change(t)
    save_file(t, f, metadata={'format': 'pt'})

def first(t): return sorted(t)[0]
def drop(t): t.pop(first(t))
def nan(t): t[first(t)][0, 0] = float('nan')
def inf(t): t[first(t)][0, 0] = float('inf')
def nudge(t): t[first(t)][0, 0] += 1e-3
def both(t): name = first(t).rsplit('.lora', 1)[0]; [t.pop(k) for k in list(t) if k.startswith(name)]
def wide(t): k = first(t).replace('lora_A', 'lora_B'); t[k] = torch.cat([t[k]]*2)
def elsewhere(t): t['base_model.model.model.layers.9.mlp.up_proj.lora_A.weight'], t['base_model.model.model.layers.9.mlp.up_proj.lora_B.weight'] = torch.zeros(4, 64), torch.zeros(128, 4)

@pytest.fixture
def copy(bundle, tmp_path): return Path(shutil.copytree(bundle, tmp_path/'copy'))

@pytest.mark.parametrize('change', [drop, nan, nudge, wide, elsewhere])
def test_accident_names_file_and_tensor(copy, change):
    tensors(copy, change)
    with pytest.raises(BundleError, match=r'law/adapter_model.safetensors was altered: .*lora_'): check(copy)

@pytest.mark.parametrize('change', [drop, nan, inf, both, wide, elsewhere])
def test_a_resealed_lie_is_refused_by_the_tensors_themselves(copy, change):
    tensors(copy, change)
    reseal(copy)
    with pytest.raises(HydraError, match=r'law.*lora_[AB]'): Hydra.load(copy)

@pytest.mark.parametrize('name', ['adapter_model.bin', 'model.pt', 'x.pkl', 'run.py', 'noext'])
def test_strangers_are_refused_by_name(copy, name):
    (copy/'experts'/'sea'/name).write_bytes(b'x')
    with pytest.raises(BundleError, match=name): check(copy)
    with pytest.raises(BundleError, match=name): reseal(copy); check(copy)

@pytest.mark.parametrize('target', ['/etc/hostname', '../../outside', 'config.json'])
def test_links_are_refused(copy, target):
    (copy/'router'/'more.json').symlink_to(target)
    with pytest.raises(BundleError, match='more.json is a link'): check(copy)

def test_a_linked_folder_is_refused(copy):
    shutil.move(copy/'experts', copy.parent/'moved')
    (copy/'experts').symlink_to(copy.parent/'moved')
    with pytest.raises(BundleError, match='experts is a link'): check(copy)

@pytest.mark.parametrize('format', [0, 2, '1', None, True, 1.0])
def test_unknown_format(copy, format):
    write_json(copy/'hydra.json', read_json(copy/'hydra.json') | dict(format=format))
    with pytest.raises(BundleError, match='format'): check(copy)

@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"format": 1}', '{"format": 1, "files": []', '[' * 2000])
def test_broken_manifests(copy, text):
    (copy/'hydra.json').write_text(text)
    with pytest.raises(HydraError, match='hydra.json'): check(copy)

@pytest.mark.parametrize('cut', [1, 8, 100, -1])
def test_truncated_tensors(copy, cut):
    f = copy/'experts'/'sum'/'adapter_model.safetensors'
    f.write_bytes(f.read_bytes()[:cut])
    with pytest.raises(BundleError, match='sum/adapter_model.safetensors'): check(copy)
    with pytest.raises(BundleError, match='sum/adapter_model.safetensors'): reseal(copy); check(copy)

@pytest.mark.parametrize('key', ['auto_map', 'trust_remote_code'])
@pytest.mark.parametrize('file', ['config.json', 'experts/law/adapter_config.json'])
def test_code_from_elsewhere(copy, key, file):
    write_json(copy/file, read_json(copy/file) | dict(nested=[dict(deep={key: True})]))
    reseal(copy)
    with pytest.raises(BundleError, match=f'{file} holds {key}'): check(copy)

def test_changed_scale(copy):
    f = copy/'experts'/'law'/'adapter_config.json'
    write_json(f, read_json(f) | dict(lora_alpha=1600))
    with pytest.raises(BundleError, match='adapter_config.json was altered'): check(copy)
    reseal(copy)
    with pytest.raises(BundleError, match='lora_alpha=1600'): check(copy)

def test_another_base_of_the_same_shape(bundle, tmp_path):
    with pytest.raises(BundleError, match='another base'): Hydra.load(bundle, base=tiny_base(seed=1))
    other = tiny_base(seed=1)
    other.model.save_pretrained(tmp_path); other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BundleError, match='another base'): Hydra.load(bundle, base=str(tmp_path))

def test_an_expert_that_nobody_lists(copy):
    shutil.copytree(copy/'experts'/'sea', copy/'experts'/'spy')
    reseal(copy)
    with pytest.raises(BundleError, match='experts/spy is extra'): check(copy)

def test_config_names_no_field_that_transformers_cannot_save(bundle):
    cfg = read_json(bundle/'config.json')
    assert cfg['model_type'] == 'hydra_moe' and cfg['text_config']['model_type'] == 'llama'
    assert not {'top_k', 'temperature'} & set(cfg) and 'auto_map' not in json.dumps(cfg)

def spots(x, at=()):
    "The path of every value in a JSON text"
    yield at
    for k in (x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()): yield from spots(x[k], at+(k,))

def put(x, at, v):
    "`x` with another value at a path; `...` takes it away"
    if not at: return v
    x = json.loads(json.dumps(x))
    y = x
    for k in at[:-1]: y = y[k]
    if v is ...: del y[at[-1]]
    else: y[at[-1]] = v
    return x

def rewritten(d, name, text):
    "One JSON file replaced, every digest made to fit"
    write_json(d/name, text)
    man = read_json(d/'hydra.json')
    if not isinstance(man, dict) or not isinstance(man.get('files'), dict): return
    if name != 'hydra.json': man['files'][name] = file_sha256(d/name)
    write_json(d/'hydra.json', man | dict(seal=digest({k: v for k, v in man.items() if k != 'seal'})))

@pytest.mark.parametrize('name', ['hydra.json', 'config.json', 'tensors.json', 'experts/law/adapter_config.json', 'router/router.json'])
def test_any_forged_value_is_refused_or_harmless(copy, bundle, name):
    "No forgery ends in anything but a refusal that says why, or in the same Hydra"
    whole, manifest, want = read_json(copy/name), read_json(copy/'hydra.json'), Hydra.load(bundle).model.stack.theta
    for at in [*spots(whole)][:40]:
        for v in (..., None, True, 'x', [{}]):
            if at == () and v is ...: continue
            rewritten(copy, name, put(whole, at, v))
            try: assert torch.equal(Hydra.load(copy).model.stack.theta, want), (at, v)
            except HydraError as e: assert str(e)
            write_json(copy/'hydra.json', manifest)

# --- building --------------------------------------------------------------------------------------------------------

BUILD = """
import sys
sys.path.insert(0, {tests!r})
from test_hydra import build
build(sys.argv[1])
"""

def rows(answers=2):
    texts, topics = lesson_texts()
    return [dict(id=str(i), prompt=[dict(role='user', content=t)], completion=[dict(role='assistant', content=' '.join([a]*answers))], domain='user', source='mine', license='mine')
            for i, (t, a) in enumerate(zip(texts, topics))]

def build(out, **kw): return Hydra.build(rows(), out, **(dict(base='tiny', quant='fp32', encoder='words', k=3, epochs=6, tokens=20_000) | kw))

def start(out, cache, seed='0'):
    code = BUILD.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, '-c', code, str(out)], env=os.environ | dict(HYDRAMOE_CACHE=str(cache), PYTHONHASHSEED=seed, HYDRAMOE_QUIET='1'))

def test_build_does_not_depend_on_the_order_of_rows(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    a = build(tmp_path/'a', epochs=1)
    b = Hydra.build(rows()[::-1] + rows()[:5], tmp_path/'b', base='tiny', quant='fp32', encoder='words', k=3, epochs=1, tokens=20_000)
    assert sorted(a.names) == sorted(b.names)

def test_wishes_that_cannot_be_met(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    for kw, words in ((dict(k=0), 'k=0'), (dict(k=99), 'k=99'), (dict(tokens=3), 'tokens=3'), (dict(max_length=1), 'max_length=1'), (dict(targets='no_proj'), 'no_proj'), (dict(rank=0), 'rank=0'), (dict(fork=2), 'can fork at 0 to 1'), (dict(fork=-1), 'fork=-1')):
        with pytest.raises(HydraError, match=words): build(None, **kw)
    assert not list((tmp_path/'stages').glob('seed_expert-*/seal.json'))
    with pytest.raises(HydraError, match='no records'): Hydra.build([], base='tiny')

@pytest.mark.slow
def test_killed_at_any_moment_the_bundle_is_the_same(tmp_path):
    assert start(tmp_path/'whole', tmp_path/'cache', '1').wait() == 0
    want, rounds = files(tmp_path/'whole'), 0
    for wait in (4, 6, 7, 8, 9, 10, 11):
        p = start(tmp_path/'killed', tmp_path/'cache2', '2')
        time.sleep(wait)
        rounds += p.poll() is None
        p.send_signal(signal.SIGKILL); p.wait()
    assert rounds
    assert start(tmp_path/'killed', tmp_path/'cache2', '3').wait() == 0
    assert files(tmp_path/'killed') == want
    assert not list(tmp_path.glob('.writing-killed*')) or check(tmp_path/'killed')

BIRDS = [dict(id=f'b{i}', domain='user', source='mine', license='mine', prompt=[dict(role='user', content=f'Which bird {w}?')],
              completion=[dict(role='assistant', content='birds')]) for i,w in enumerate('sings|swims|hunts mice|cannot fly|migrates|talks'.split('|'))]

def sealed(bundle, *parts): return {f: sha for f,sha in check(bundle)['files'].items() if f.startswith(parts)}

def test_one_more_and_one_less(tmp_path, monkeypatch):
    "The others keep every bit; the router is what fitting from scratch on these domains gives; taken out again, nothing is left of it"
    from hydramoe.domains.cluster import Domains, embed, prompt_text
    from hydramoe.hydra.model import add_expert, remove_expert
    from hydramoe.hydra.route import Router, similarity
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    old = build(tmp_path/'old', epochs=1)
    add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'new')
    before, after = sealed(tmp_path/'old', 'experts/'), sealed(tmp_path/'new', 'experts/')
    assert before.items()<=after.items() and {f.split('/')[1] for f in after.keys()-before}=={'birds'}
    was, now = (Router.load(tmp_path/b/'router') for b in ('old', 'new'))
    domains = {n: was.arrays['centroids'][i] for i,n in enumerate(was.names)} | {'birds': embed([prompt_text(r) for r in BIRDS], 'words').mean(0)}
    scratch = similarity(Domains(np.stack(list(domains.values())), list(domains), 'words'), was.params['temperature'])
    assert now.names==scratch.names and now.params==scratch.params and np.allclose(now.arrays['centroids'], scratch.arrays['centroids'], atol=1e-6)
    assert (now.arrays['centroids'][:-1]==was.arrays['centroids']).all()
    remove_expert(tmp_path/'new', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'old', 'experts/', 'router/')
    gone = old.names[1]
    remove_expert(tmp_path/'new', gone, tmp_path/'less')
    left = [n for n in now.names if n!=gone]
    r = Router.load(tmp_path/'less'/'router')
    assert r.names==left and (r.arrays['centroids']==np.stack([now.arrays['centroids'][now.names.index(n)] for n in left])).all()
    assert sealed(tmp_path/'less', 'experts/').items()<=after.items()
    again = add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'again')
    assert check(tmp_path/'again')['seal']==check(tmp_path/'new')['seal'] and again.names[-1]=='birds'
    fresh = add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'fresh', start='fresh', root=tmp_path/'elsewhere')
    assert not torch.equal(fresh.model.stack.theta[-1], again.model.stack.theta[-1])

def test_a_router_that_cannot_grow_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    from hydramoe.domains.cluster import embed, prompt_text
    from hydramoe.hydra.model import add_expert, remove_expert
    from hydramoe.hydra.route import classifier
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    h = build(tmp_path/'h', epochs=1)
    x = embed([prompt_text(r) for r in rows()], 'words')
    h.router = classifier(h.names, x, [h.names[i%3] for i in range(len(x))], encoder='words')
    h.save(tmp_path/'odd')
    made = set((tmp_path/'cache'/'stages').iterdir())
    for change in (lambda: add_expert(tmp_path/'odd', BIRDS, 'birds', tmp_path/'x'), lambda: remove_expert(tmp_path/'odd', h.names[0], tmp_path/'x')):
        with pytest.raises(HydraError, match='a classifier router is fitted on all prompts'): change()
    assert set((tmp_path/'cache'/'stages').iterdir())==made and not (tmp_path/'x').exists()

def test_a_forked_build(tmp_path, monkeypatch):
    "The trunk is the seed expert below the fork, computed once for the experts; whoever joins later stands on it too"
    import hydramoe.experts.train
    from hydramoe.hydra.model import add_expert, find_seed, remove_expert
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    cached, make = [], hydramoe.experts.train.cache_trunk
    monkeypatch.setattr(hydramoe.experts.train, 'cache_trunk', lambda *a, **kw: cached.append(1) or make(*a, **kw))
    plain = build(tmp_path/'plain', epochs=1)
    assert not cached
    h = build(tmp_path/'h', epochs=1, fork=.5)
    man = check(tmp_path/'h')
    assert len(cached)==1 and man['fork']==h.model.stack.fork==1 and man['built']['spec']['fork']==.5
    seed = load_file(find_seed(man['built'])/'seed'/'adapter_model.safetensors')
    for n in h.names:
        own = load_file(tmp_path/'h'/'experts'/n/'adapter_model.safetensors')
        assert {k for k in seed if not torch.equal(seed[k], own[k])}=={k for k in seed if '.layers.1.' in k} and own.keys()==seed.keys()
    more = add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'more')
    assert len(cached)==2 and torch.equal(more.model.stack.trunk, h.model.stack.trunk) and check(tmp_path/'more')['fork']==1
    assert sealed(tmp_path/'h', 'experts/').items()<=sealed(tmp_path/'more', 'experts/').items()
    remove_expert(tmp_path/'more', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'h', 'experts/', 'router/')
    sibling = add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'sibling', start=tmp_path/'h'/'experts'/h.names[0], root=tmp_path/'elsewhere')
    assert torch.equal(sibling.model.stack.trunk, h.model.stack.trunk)
    for start, words in (('fresh', 'does not stand on the trunk'), (tmp_path/'plain'/'experts'/plain.names[0], f'{plain.names[0]} is of another seed expert.*layers.0'), (tmp_path/'none', 'none.adapter_config.json does not exist')):
        with pytest.raises(HydraError, match=words): add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'x', start=start)
    assert len(cached)==3
    with pytest.raises(BundleError, match='holds another Hydra'): build(tmp_path/'plain', epochs=1, fork=.5)

def test_a_build_without_a_fork_is_recorded_as_ever(tmp_path, monkeypatch):
    from hydramoe.hydra.model import BuildSpec
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    build(tmp_path/'a', epochs=1, fork=0)
    man = check(tmp_path/'a')
    assert 'fork' not in man and 'fork' not in man['built']['spec'] and BuildSpec(**man['built']['spec']).fork==0
    build(tmp_path/'a', epochs=1) # found whole

TRIED = {'similarity': 3, 'ridge': 4, 'ridge on states': 8, 'uniform': 10} # which candidate is made the best

@pytest.mark.parametrize('which', TRIED)
def test_whichever_router_a_build_keeps_experts_join_and_leave(which, tmp_path, monkeypatch):
    "The one of least perplexity is kept, saved and named on the card; one expert more and out again leaves not a bit"
    from hydramoe.hydra import model as hydra
    from hydramoe.hydra.model import add_expert, explain_bundle, remove_expert
    from hydramoe.hydra.route import Router, reads_base
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    seen, best, kind = [], TRIED[which], which.split()[0]
    def told(model, examples, gates):
        seen.append(gates)
        return 1. if len(seen)-1==best else 2.
    monkeypatch.setattr(hydra, '_ppl', told)
    old = build(tmp_path/'old', epochs=1, dev=.5)
    assert len(seen)==12==2+sum(map(len, hydra.TEMPERATURES.values())) and seen[-1] is None and old.router.kind==kind==Router.load(tmp_path/'old'/'router').kind and reads_base(old.router)==('states' in which)
    card, tried = (tmp_path/'old'/'README.md').read_text(), [s['system'] for s in check(tmp_path/'old')['built']['scores']]
    assert len(tried)==12 and all(f'| {n} |' in card for n in tried) and f'The {tried[1+best]} was chosen by them' in card
    assert (seen[best]==seen[10]).all()==(kind=='uniform')
    add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'new')
    new = Hydra.load(tmp_path/'new')
    assert explain_bundle(tmp_path/'new', 'Which bird?')[0]==new.explain('Which bird?')
    assert new.router.kind==kind and new.router.names==[*old.names, 'birds']
    if kind!='uniform': assert new.gates([prompt(r) for r in BIRDS])[:,-1].mean()>.5
    remove_expert(tmp_path/'new', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'old', 'experts/', 'router/')
    assert 'was chosen by them' not in (tmp_path/'back'/'README.md').read_text()

def prompt(r): return r['prompt'][0]['content']

def test_a_tie_goes_to_the_simplest_and_few_rows_choose_nothing(tmp_path, monkeypatch):
    from hydramoe.hydra import model as hydra
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(hydra, '_ppl', lambda *_: 2.)
    tied = build(tmp_path/'tied', epochs=1, dev=.5).router
    assert (tied.kind, tied.params['temperature'])==('similarity', .02)
    monkeypatch.setattr(hydra, '_ppl', lambda model, examples, gates, n=iter(range(99)): float(-next(n)))
    few = build(tmp_path/'few', epochs=1).router
    assert (few.kind, few.params['temperature'])==('similarity', .05) and 'chosen by them' not in (tmp_path/'few'/'README.md').read_text()

def test_what_was_measured_is_what_is_kept(tmp_path, monkeypatch):
    "Nothing pretended: the router in the bundle is the first of least perplexity"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    h = build(tmp_path/'h', epochs=3, dev=.5, lr=5e-3)
    scores = {s['system']: s['ppl'] for s in h.about['built']['scores'] if s['system']!='base'}
    best = min(scores, key=scores.get)
    assert best.startswith(h.router.kind) and (h.router.kind=='uniform' or best.endswith(f" {h.router.params['temperature']}"))

@pytest.mark.slow
def test_groups_and_workers(tmp_path, monkeypatch):
    "Three experts in groups of two by a small memory: the same bundle here and in two processes"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    memory = 2*20*17_000/1e9
    a = build(tmp_path/'a', epochs=1, memory=memory, root=tmp_path/'one')
    b = build(tmp_path/'b', epochs=1, memory=memory, root=tmp_path/'two', run=dict(executor='local', workers=2))
    assert len(list((tmp_path/'two').glob('domain_experts-*/seal.json')))==2 and len(list((tmp_path/'two').glob('collect-*/seal.json')))==1
    assert files(tmp_path/'a')==files(tmp_path/'b') and a.names==b.names

# --- rows in the light of the base, and on which side of the split -------------------------------------------------------

REFUSES = "{% if messages[0]['role']=='system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{% if (m['role']=='user')!=(loop.index0%2==0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"

def strict_base(to, change=lambda t: t, refuses=REFUSES):
    "The tiny base in a folder, with a template that refuses system turns and roles that do not alternate"
    b = tiny_base()
    b.model.save_pretrained(to)
    b.tokenizer.chat_template = refuses + b.tokenizer.chat_template
    change(b.tokenizer)
    b.tokenizer.save_pretrained(to)
    return str(to)

def lines(file, rows):
    file.write_text('\n'.join(map(json.dumps, rows))+'\n')
    return file

GOOD = [dict(prompt=f'What is {i} plus {i}?', completion=str(2*i)) for i in range(40)]
TOOL = dict(prompt=[dict(role='user', content='2+2?'), dict(role='assistant', content='add(2, 2)'), dict(role='tool', content='4')], completion='It is 4.')
QUICK = dict(quant='fp32', encoder='words', k=2, epochs=1, rank=2)

def test_rows_that_a_template_refuses_are_folded_or_named_and_the_rest_is_trained_on(tmp_path):
    "Case 3: one row with a system turn is repaired and counted, one with a tool's answer is a reject with file, line and the template's words, a long one and those beyond the budget are named"
    from hydramoe.hydra.model import BuildSpec, gather, left_out
    base, f = strict_base(tmp_path/'base'), lines(tmp_path/'mine.jsonl', [*GOOD, dict(system='Be brief.', prompt='Who wrote Faust?', completion='Goethe.'), TOOL, dict(prompt='long', completion='x'*400)])
    h = Hydra.build(f, tmp_path/'h', tmp_path/'stages', base=base, tokens=900, **QUICK)
    assert 'dealt by conversation, whole, and rows with one prompt count as one: 4 rows of 4 conversations' in (tmp_path/'h'/'README.md').read_text()
    c = h.about['built']['counts']
    assert (c['rows'], c['refused'], c['folded'], c['too_long']) == (43, 1, 1, 1) and c['beyond_tokens'] > 0
    assert c['rows'] == c['train']+c['dev']+c['refused']+c['too_long']+c['beyond_tokens']+c['twice']
    lost = {r['line']: r for r in left_out(gather(f)[0], BuildSpec(base=base, tokens=900, **QUICK), tmp_path/'stages')}
    assert len(lost) == c['rows']-c['train']-c['dev'] and all(r['file'] == str(f) and json.loads(r['raw'])['prompt'] for r in lost.values())
    assert 'Conversation roles must alternate' in lost[42]['reason'] and lost[43]['reason'] == 'longer than max_length=300: answer has 402 tokens'
    assert {r['reason'] for n, r in lost.items() if n < 42} == {'beyond tokens=900'}

def test_a_system_turn_is_heard_alike_by_everyone(tmp_path):
    "ask, chat, explain, the router and the model of transformers see the folded turn; what the template refuses is one HydraError in its words"
    from hydramoe.hydra.auto import HydraForCausalLM
    base = load_base(strict_base(tmp_path/'base'), 'fp32', 'cpu')
    h, seen = fickle(base), []
    class Told(Fickle):
        def __call__(self, prompts): seen.extend(prompts); return super().__call__(prompts)
    h.router = Told()
    asked, folded = [dict(role='system', content='law'), dict(role='user', content='sea?')], [dict(role='user', content='law\n\nsea?')]
    answer = h.ask(asked, max_new_tokens=6)
    assert answer == h.ask(folded, max_new_tokens=6) == h.ask(folded, expert='law', max_new_tokens=6)
    chat = Chat(h, 'law')
    assert chat('sea?', max_new_tokens=6) == answer and chat('more?', max_new_tokens=6) == h.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], max_new_tokens=6)
    x = base.tokenizer.apply_chat_template(folded, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    assert torch.equal(HydraForCausalLM(h).gates_for(x['input_ids']), h.gates([asked]))
    assert seen and all(p[0]['role'] == 'user' and p[0]['content'].startswith('law\n\n') for p in seen)
    for bad in ([*asked, dict(role='user', content='x')], TOOL['prompt']):
        for f in (h.ask, lambda p: h.generate([p, 'hi'])):
            with pytest.raises(HydraError, match="chat template refuses .*Conversation roles must alternate.*give turns"): f(bad)

def test_if_the_base_refuses_every_row_the_first_are_named_by_line(tmp_path):
    from hydramoe.hydra.model import BuildSpec, dealt, gather
    base, f = strict_base(tmp_path/'base'), lines(tmp_path/'mine.jsonl', [TOOL | dict(completion=str(i)) for i in range(5)])
    with pytest.raises(HydraError, match=r'of 5 rows none is left to train on: 5 are refused.*mine.jsonl line 1: .*must alternate.*mine.jsonl line 2'): Hydra.build(f, root=tmp_path/'stages', base=base, **QUICK)
    strict_base(tmp_path/'base', refuses='') # the way out: another template, and no stale stage in the way
    assert dealt(gather(f)[0], BuildSpec(base=base), tmp_path/'stages')[1]['train'] == 5

@pytest.mark.parametrize('change,works', [(lambda t: [setattr(t, k, None) for k in ('eos_token', 'pad_token')], True), (lambda t: t.add_special_tokens(dict(pad_token='[PAD]')), True),
                                          (lambda t: [setattr(t, 'eos_token', None), setattr(t, 'chat_template', t.chat_template.replace('<|im_end|>', ''))], True), # its config.json says where an answer ends
                                          (lambda t: [t.add_tokens('<|end|>', special_tokens=True), setattr(t, 'chat_template', t.chat_template.replace('im_end', 'end'))], r"writes '<\|end\|>' \(token 259\), and the embedding has 259 rows: enlarge")])
def test_a_pad_is_found_and_a_base_that_cannot_serve_is_refused_before_training(tmp_path, change, works):
    "Case 7"
    from hydramoe.models.hidden import hidden_mean
    base, f = strict_base(tmp_path/'base', change), lines(tmp_path/'mine.jsonl', GOOD)
    if works is True:
        b = load_base(base, 'fp32', 'cpu')
        ask = [dict(prompt=[dict(role='user', content=t)]) for t in ('a', 'a longer prompt')]
        assert b.tokenizer.pad_token_id < 259 and np.allclose(hidden_mean(ask, b, 1), np.concatenate([hidden_mean([p], b, 1) for p in ask]), atol=1e-5)
        h = fickle(b)
        assert h.generate([p['prompt'] for p in ask], max_new_tokens=4) == [h.ask(p['prompt'], max_new_tokens=4) for p in ask]
        return
    with pytest.raises(HydraError, match=works): Hydra.build(f, root=tmp_path/'stages', base=base, **QUICK)
    with pytest.raises(HydraError, match=works): load_base(base, 'fp32', 'cpu')
    assert not list((tmp_path/'stages').glob('*/seal.json'))

def test_a_token_without_an_embedding_costs_its_row_and_not_the_build(tmp_path):
    from hydramoe.hydra.model import BuildSpec, gather, left_out
    base = strict_base(tmp_path/'base', lambda t: t.add_tokens('[NEW]', special_tokens=True))
    f = lines(tmp_path/'mine.jsonl', [*GOOD, dict(prompt='What is [NEW]?', completion='new')])
    lost, = left_out(gather(f)[0], BuildSpec(base=base), tmp_path/'stages')
    h = fickle(load_base(base, 'fp32', 'cpu'))
    assert lost['line'] == 41 and "holds '[NEW]' (token 259), and the embedding of the base has 259 rows" in lost['reason']
    for f in (h.ask, h.explain, Chat(h)):
        with pytest.raises(HydraError, match=r"the prompt holds '\[NEW\]'"): f('[NEW]')

def talk(i, turns): return dict(messages=[dict(role=r, content=f'{r} says {i} and {t}') for t in range(turns) for r in ('user', 'assistant')])

def parts(d): return {p: [json.loads(l) for l in (d/f'{p}.jsonl').read_text().splitlines()] for p in ('train', 'dev')}

@pytest.mark.parametrize('grouped', [True, False])
def test_one_conversation_one_side(tmp_path, grouped):
    "Case 6: 25 conversations of 4 turns; no development row has its conversation in training, also where the records do not say what they share"
    from hydramoe.hydra.model import BuildSpec, dealt, gather
    rows = gather(lines(tmp_path/'talks.jsonl', [talk(i, 4) for i in range(25)]))[0]
    if not grouped: rows = [{k: v for k, v in r.items() if k != 'group'} for r in rows]
    for seed in range(4):
        d, counts = dealt(rows, BuildSpec(base='tiny', seed=seed), tmp_path/'stages')
        p, of = parts(d), lambda r: r['prompt'][0]['content']
        assert not {of(r) for r in p['dev']} & {of(r) for r in p['train']} and 8 <= len(p['dev']) <= 12
        said = {m['content'] for r in p['train'] for m in r['prompt']}
        assert not [r for r in p['dev'] if r['completion'][0]['content'] in said]
        assert (counts['groups'], counts['dev_groups']) == (25, len({of(r) for r in p['dev']}))

def test_rows_without_conversations_are_dealt_as_ever(tmp_path):
    from hydramoe.hydra.model import BuildSpec, _identity, dealt
    rows = [dict(prompt=[dict(role='user', content=f'q{i}')], completion=[dict(role='assistant', content=f'a{i}')], domain='d') for i in range(90)]
    order = sorted(map(_identity, rows), key=lambda i: digest([5, i]))
    p = parts(dealt(rows, BuildSpec(base='tiny', dev=.2, seed=5), tmp_path)[0])
    assert [r['id'] for r in p['dev']] == order[:18] and [r['id'] for r in p['train']] == order[18:]

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=25), st.floats(0, .5), st.integers(0, 3))
def test_groups_are_dealt_whole_and_about_so_many_as_were_asked_for(sizes, dev, seed):
    from hydramoe.hydra.model import _for_dev
    side = {f'{i} {j}': str(i) for i, n in enumerate(sizes) for j in range(n)}
    held, groups, taken = _for_dev(side, dev, seed)
    assert len(held) == sum(n for i, n in enumerate(sizes) if f'{i} 0' in held) and taken == sum(f'{i} 0' in held for i in range(len(sizes))) and groups == len(sizes)
    assert len(held) < len(side) and abs(len(held)-min(200, int(dev*len(side)))) <= max(sizes)

def test_one_group_alone_is_trained_on_and_answers_to_one_prompt_stay_together(tmp_path):
    from hydramoe.hydra.model import BuildSpec, dealt, keep_records
    rows = [dict(prompt=[dict(role='user', content=f'q{i}')], completion=[dict(role='assistant', content=f'a{i}')], domain='d') for i in range(30)]
    one = [dict(r, group='mine') for r in rows]
    assert keep_records(one, tmp_path) != keep_records(rows, tmp_path)
    counts = dealt(one, BuildSpec(base='tiny', dev=.4), tmp_path)[1]
    assert (counts['train'], counts['dev'], counts['groups']) == (30, 0, 1)
    twice = [dict(r, completion=[dict(role='assistant', content=a)]) for r in rows for a in 'xy']
    p = parts(dealt(twice, BuildSpec(base='tiny', dev=.3), tmp_path)[0])
    assert len(p['dev']) == 18 and not {prompt_text(r) for r in p['dev']} & {prompt_text(r) for r in p['train']}

def test_too_few_prompts_for_the_default_k(tmp_path):
    "A hundred answers to three prompts make at most three domains; what cannot be built is refused by a dry run too"
    from hydramoe.use.cli import dry_run
    from hydramoe.hydra.model import BuildSpec, dealt, settled, sorted_rows
    rows = [dict(prompt=[dict(role='user', content=['sea', 'law', ' LAW ', 'sum of it'][i%4])], completion=[dict(role='assistant', content=str(i))], domain='d') for i in range(100)]
    how = dict(base='tiny', quant='fp32', encoder='words', rank=2, dev=0.)
    d, c = dealt(rows, BuildSpec(**how), tmp_path)
    spec = settled(BuildSpec(**how), c['train'], c['prompts'])
    sorted_rows(d, c, spec, tmp_path) # the clusters of a build
    assert spec.k == 3 and dry_run(rows, BuildSpec(**how))[1]['spec']['k'] == 3
    with pytest.raises(HydraError, match='k=4 experts cannot be made from 100 training rows, of whose prompts 3 differ'): dry_run(rows, BuildSpec(k=4, **how))

def test_the_command_names_what_the_base_refuses(tmp_path):
    from test_cli import TINY, here
    base = strict_base(tmp_path/'base')
    lines(tmp_path/'mine.jsonl', [*GOOD, TOOL, dict(nothing=1)])
    for more in (['--dry-run'], []):
        out = here('build', 'mine.jsonl', *TINY, '--base', base, '--k', 1, '--epochs', 1, '--rank', 2, *more, cwd=tmp_path)
        assert out.returncode == 0 and '2 rows were refused or left out' in out.stderr
        lost = {r['line']: r for r in map(json.loads, (tmp_path/'mine-hydra.rejects.jsonl').read_text().splitlines())}
        assert set(lost) == {41, 42} and 'must alternate' in lost[41]['reason'] and lost[41]['file'] == lost[42]['file'] == 'mine.jsonl'
        (tmp_path/'mine-hydra.rejects.jsonl').unlink()
    out = here('build', 'mine-hydra', '--add', 'mine.jsonl', '--name', 'more', cwd=tmp_path)
    assert out.returncode == 0 and (tmp_path/'mine-hydra-with-more.rejects.jsonl').read_text().count('\n') == 2, out.stderr
    lines(tmp_path/'bad.jsonl', [TOOL, dict(nothing=1)])
    out = here('build', 'bad.jsonl', '--base', base, cwd=tmp_path)
    assert out.returncode == 2 and 'bad.jsonl line 1' in out.stderr and (tmp_path/'bad-hydra.rejects.jsonl').read_text().count('\n') == 2
