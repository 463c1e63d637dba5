"What a Hydra promises beyond its lesson: two processes, kill -9, PEFT alone"
import contextlib, gc, json, os, shutil, signal, subprocess, sys, threading, time, tracemalloc
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from hydramoe.base import load_base, tiny_base
from hydramoe.cluster import lesson_texts, prompt_text
from hydramoe.core import HydraError, digest, file_sha256, read_json, rng, write_json
from hydramoe.hydra import BundleError, Chat, Hydra, check, seal_bundle
from hydramoe.route import uniform
from hydramoe.stack import LoraSpec, gated, one_hot

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
    from hydramoe.cluster import Domains, name_domains
    from hydramoe.hydra import adopt
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
    import hydramoe.hydra
    h, fresh = forked(), forked()
    chat = Chat(h)
    for t, kw in (('law?', {}), ('sea?', dict(num_beams=2)), ('sum?', {}), ('law!', {})):
        assert chat(t, max_new_tokens=5, **kw) == fresh.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=5, **kw)
    with monkeypatch.context() as m:
        m.setattr(hydramoe.hydra, 'read_on', lambda *a: 1/0) # after the refill, before the answer
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
    from hydramoe.auto import HydraForCausalLM
    with pytest.raises(HydraError, match='this Hydra forks'): HydraForCausalLM(h).generate(ids(h, 'nothing'), max_new_tokens=2, expert='base')
    with torch.no_grad(): # a share left to the base is left to the bare blocks above the fork
        x = ids(h, 'ahoy')
        assert (h.model(x, gates=torch.zeros(1, 3)).logits-h.model(x).logits).abs().max() > .1

def seer(h, layer, farthest=None):
    "The same Hydra with a router on what passes a layer; it sends what is far away to the base"
    from hydramoe.cluster import hidden_mean
    from hydramoe.hydra import as_messages, reading
    from hydramoe.route import abstaining, on_hidden, on_whole, ridge
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
    assert not list(tmp_path.glob('.tmp-killed*')) or check(tmp_path/'killed')

BIRDS = [dict(id=f'b{i}', domain='user', source='mine', license='mine', prompt=[dict(role='user', content=f'Which bird {w}?')],
              completion=[dict(role='assistant', content='birds')]) for i,w in enumerate('sings|swims|hunts mice|cannot fly|migrates|talks'.split('|'))]

def sealed(bundle, *parts): return {f: sha for f,sha in check(bundle)['files'].items() if f.startswith(parts)}

def test_one_more_and_one_less(tmp_path, monkeypatch):
    "The others keep every bit; the router is what fitting from scratch on these domains gives; taken out again, nothing is left of it"
    from hydramoe.cluster import Domains, embed, prompt_text
    from hydramoe.hydra import add_expert, remove_expert
    from hydramoe.route import Router, similarity
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
    from hydramoe.cluster import embed, prompt_text
    from hydramoe.hydra import add_expert, remove_expert
    from hydramoe.route import classifier
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
    import hydramoe.expert
    from hydramoe.hydra import add_expert, find_seed, remove_expert
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    cached, make = [], hydramoe.expert.cache_trunk
    monkeypatch.setattr(hydramoe.expert, 'cache_trunk', lambda *a, **kw: cached.append(1) or make(*a, **kw))
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
    from hydramoe.hydra import BuildSpec
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    build(tmp_path/'a', epochs=1, fork=0)
    man = check(tmp_path/'a')
    assert 'fork' not in man and 'fork' not in man['built']['spec'] and BuildSpec(**man['built']['spec']).fork==0
    build(tmp_path/'a', epochs=1) # found whole

TRIED = {'similarity': 3, 'ridge': 4, 'ridge on states': 8, 'uniform': 10} # which candidate is made the best

@pytest.mark.parametrize('which', TRIED)
def test_whichever_router_a_build_keeps_experts_join_and_leave(which, tmp_path, monkeypatch):
    "The one of least perplexity is kept, saved and named on the card; one expert more and out again leaves not a bit"
    from hydramoe import hydra
    from hydramoe.hydra import add_expert, explain_bundle, remove_expert
    from hydramoe.route import Router, reads_base
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
    from hydramoe import hydra
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
