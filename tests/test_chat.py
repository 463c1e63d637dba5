"Conversations: what is read, what is read again, and who answers"
import contextlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import DynamicCache

from hydramoe.models.base import tiny_base
from hydramoe.models.load import load_base
from hydramoe.foundations.core import HydraError
from hydramoe.hydra import Hydra
from hydramoe.hydra.chat import Chat
from hydras import NAMES, by_hand, fickle, ids, noisy
from stacks import contents

# --- conversations ---------------------------------------------------------------------------------------------------

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

ROUTES = st.sampled_from([[1, 0, 0], [.6, .4, 0], [.4, .6, 0], [.3, .3, .4], [0, 0, 0], [0, .1, .2]])

@settings(max_examples=15, deadline=None)
@given(st.lists(ROUTES, min_size=1, max_size=6), st.sampled_from([0., .1, .25, 1.]))
def test_hysteresis(weights, margin):
    "Who leads changes exactly when another leads by more than the margin, and without a change no weight moves"
    class Told:
        def gates(self, prompts): return torch.tensor([weights[int(prompts[0][-1]["content"])]]).float()
    def full(gates): return [*gates, 1-sum(gates)] # what is left goes to the base
    chat = Chat(Told(), margin=margin)
    chat.gates = held = chat.route('0')
    for i in range(1, len(weights)):
        w = full(torch.tensor(weights[i]).float().tolist())
        lead = int(np.argmax(full(held[0].tolist())))
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
    assert chat.messages == before
    assert chat.cache is None
    assert len(chat.turns) == 1
    asked = before+[dict(role='user', content=SAID[2])]
    assert chat(SAID[2], max_new_tokens=9) == h.ask(asked, expert='sea', max_new_tokens=9)

def test_beams_in_a_conversation():
    h = fickle()
    chat = Chat(h)
    for kw in (dict(), dict(num_beams=2), dict(), dict()):
        answer = chat('law and order', max_new_tokens=5, **kw)
        assert answer == h.ask(chat.messages[:-1], expert='law', max_new_tokens=5, **kw)
    assert chat.turns[3]['read'] < chat.turns[3]['tokens'] == len(chat.ids)

def windowed(tmp_path, layers):
    from transformers import AutoConfig, AutoModelForCausalLM
    cfg = AutoConfig.for_model(
        'gemma3_text', vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8,
        pad_token_id=0, eos_token_id=2, bos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(cfg).save_pretrained(tmp_path)
    tiny_base().tokenizer.save_pretrained(tmp_path)
    return load_base(str(tmp_path), 'fp32', 'cpu')

def test_a_sliding_window_in_a_conversation(tmp_path):
    "Gemma forgets what is far away; its cache is cut all the same"
    h = fickle(windowed(tmp_path, 2))
    chat = Chat(h)
    for t in ['sea'*9, 'sea again?', 'law now']:
        answer = chat(t, max_new_tokens=12)
        assert answer == h.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=12)
    assert chat.turns[1]['read'] < chat.turns[1]['tokens']

# --- a conversation under a fork

def forked_hydra(base=None):
    "A fickle Hydra that forks in the middle of four blocks"
    return fickle(base or tiny_base(layers=4), fork=.5)

@contextlib.contextmanager
def counted(h):
    "Tokens that each block reads meanwhile"
    ran, layers = [0]*4, h.model.base.model.layers
    def count(i):
        def add(block, args, kw): ran[i] += (args[0] if args else kw['hidden_states']).shape[1]
        return add
    hooks = [b.register_forward_pre_hook(count(i), with_kwargs=True) for i, b in enumerate(layers)]
    try: yield ran
    finally:
        for k in hooks: k.remove()

def read_whole(h, ids, gates):
    "What one pass over all of it leaves in a cache"
    cache = DynamicCache()
    gates = gates if gates.any() else None
    with torch.no_grad():
        h.model(input_ids=torch.tensor([ids]), gates=gates, past_key_values=cache, use_cache=True)
    return contents(cache)

@pytest.mark.parametrize('n', [1, 9])
def test_a_forked_conversation_equals_reading_all_of_it_and_costs_what_it_says(n):
    """Answers and cache are those of an expert that was there from the beginning; no block below the fork reads a token
    twice, unless the base alone spoke"""
    h, fresh = forked_hydra(), forked_hydra()
    chat = Chat(h, 'Be brief.')
    said = ['law of the sea?', 'sea or land?', 'sea again?', 'sum it up', 'nothing of it', 'nothing at all', 'law now',
            'sum now']
    for t in said:
        with counted(h) as ran: answer = chat(t, max_new_tokens=n)
        turn = chat.turns[-1]
        if n==1:
            below = turn['read']-turn['again']*('above' in turn)
            assert ran == [below]*2 + [turn['read']]*2, t
        else: assert answer == fresh.ask(chat.messages[:-1], expert=turn['experts'], max_new_tokens=n), t
        whole = read_whole(fresh, chat.ids, chat.gates)
        for a, b in zip(contents(chat.cache), whole, strict=True): assert torch.allclose(a, b, atol=1e-5), t
    assert [t.get('above', 0) for t in chat.turns] == [0, 2, 0, 2, 0, 0, 0, 2]
    assert [t['again']>0 for t in chat.turns] == [False, True, False, True, True, False, True, True]
    assert [t['read']==t['tokens'] for t in chat.turns] == [True, True, False, True, True, False, True, True]
    assert chat.explain(1).endswith(f"{chat.turns[1]['again']} of them again from block 2 of 4 on")
    assert 'block' not in chat.explain(2)+chat.explain(4)

def test_the_lower_half_of_a_stale_cache_would_be_seen():
    "What the test above would find: a refill from states of another conversation gives another cache"
    h = forked_hydra()
    chat = Chat(h)
    chat('law of the sea?', max_new_tokens=3)
    chat.states = chat.states.flip(1)
    chat('sea or land?', max_new_tokens=3)
    whole = read_whole(h, chat.ids, chat.gates)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(contents(chat.cache), whole))

def test_beams_and_interruptions_under_a_fork(monkeypatch):
    h, fresh = forked_hydra(), forked_hydra()
    chat = Chat(h)
    for t, kw in (('law?', {}), ('sea?', dict(num_beams=2)), ('sum?', {}), ('law!', {})):
        answer = chat(t, max_new_tokens=5, **kw)
        assert answer == fresh.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=5, **kw)
    read_above_fork = Chat._read_above_fork
    def read_and_fail(*args): return read_above_fork(*args) is 1/0
    with monkeypatch.context() as m:
        m.setattr(Chat, '_read_above_fork', read_and_fail) # after the refill, before the answer
        with pytest.raises(ZeroDivisionError): chat('sea?', max_new_tokens=5)
    assert chat.cache is None
    assert len(chat.turns) == 4
    assert chat('sea?', max_new_tokens=5) == fresh.ask(chat.messages[:-1], expert='sea', max_new_tokens=5)

def test_a_gate_and_an_expert_by_hand_take_turns_under_a_fork(tmp_path):
    made = noisy(tiny_base(), fork=1)
    folders = {n: made.stack.save_peft(tmp_path/n, e, 'tiny-0') for e, n in enumerate(NAMES)}
    h = Hydra.from_adapters(folders, tiny_base(), dict(kind='arrow', top_k=2), fork=1)
    chat = Chat(h)
    for who in (None, 'law', None, 'sea', None):
        assert chat('and?', expert=who, max_new_tokens=6) == h.ask(chat.messages[:-1], expert=who, max_new_tokens=6)
    assert [t.get('above', 0) for t in chat.turns] == [0, 1, 1, 1, 1]

def test_a_sliding_window_under_a_fork(tmp_path):
    h = forked_hydra(windowed(tmp_path, 4))
    chat = Chat(h)
    for t in ['sea'*9, 'sea again?', 'law now', 'sum it']:
        answer = chat(t, max_new_tokens=12)
        assert answer == h.ask(chat.messages[:-1], expert=t[:3], max_new_tokens=12)
    assert [t.get('above', 0) for t in chat.turns] == [0, 0, 2, 2]

def test_the_base_alone_has_no_trunk():
    "By hand or because a router abstains, alone or in a batch; beside it, rows answer as ever"
    h, base = forked_hydra(), tiny_base(layers=4)
    bare = by_hand(base)
    want = [bare.ask(p, expert='base', max_new_tokens=8) for p in ('nothing', 'else')]
    assert [h.ask(p, max_new_tokens=8) for p in ('nothing', 'else')] == want
    batch = ['law', 'nothing', 'sea', 'else']
    law, sea = h.ask('law', max_new_tokens=8), h.ask('sea', max_new_tokens=8)
    assert h.generate(batch, max_new_tokens=8) == [law, want[0], sea, want[1]]
    two = h.generate(batch, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert two[2:4] == h.generate(['nothing'], max_new_tokens=4, num_beams=2, num_return_sequences=2)
    from hydramoe.hydra.auto import HydraForCausalLM
    with pytest.raises(HydraError, match='this Hydra forks'):
        HydraForCausalLM(h).generate(ids(h, 'nothing'), max_new_tokens=2, expert='base')
    with torch.no_grad(): # a share left to the base is left to the bare blocks above the fork
        x = ids(h, 'ahoy')
        assert (h.model(x, gates=torch.zeros(1, 3)).logits-h.model(x).logits).abs().max() > .1

def seer(h, layer, farthest=None):
    "The same Hydra with a router on what passes a layer; it sends what is far away to the base"
    from hydramoe.models.hidden import pooled_state
    from hydramoe.hydra.generation import to_messages
    from hydramoe.hydra.model import router_view
    from hydramoe.hydra.kinds import ridge_router
    from hydramoe.hydra.cascade import with_abstention, fit_on_hidden, use_whole_prompt
    with router_view(h.model): x = pooled_state([dict(prompt=to_messages(t)) for t in NAMES], h.base, layer)
    router = use_whole_prompt(fit_on_hidden(ridge_router, NAMES, x, NAMES, layer, temperature=.3))
    return Hydra(h.base, h.model, with_abstention(router, farthest))

@pytest.mark.parametrize('kind', ['llama', 'window'])
def test_routed_on_the_way_is_routed_first(kind, tmp_path, monkeypatch):
    """The same gates to the bit and the same answers, sampled or not, turn by turn too, when the router looks while the
    trunk reads; and the trunk reads once"""
    plain = forked_hydra(windowed(tmp_path, 4) if kind=='window' else None)
    for layer in (1, 2):
        h, looked = seer(plain, layer), []
        route_on_the_way = Hydra._route_on_the_way
        def looking(*args):
            looked.append(route_on_the_way(*args))
            return looked[-1]
        monkeypatch.setattr(Hydra, '_route_on_the_way', looking)
        def weights(t): return dict(zip(NAMES, h.gates([t])[0].tolist()))
        for t in ('law', 'sea'*9, 'who?'):
            by = {n: w for n, w in weights(t).items() if w}
            for how in (dict(), dict(temperature=1., seed=3)):
                with counted(h) as ran: one = h.ask(t, max_new_tokens=9, **how)
                with counted(h) as twice: assert h.ask(t, expert=by, max_new_tokens=9, **how) == one
                assert ran[0] == twice[0]+1
                assert torch.equal(looked[-1][0], h.gates([t]))
        assert len(looked) == 6
        alone = [h.ask(t, max_new_tokens=9) for t in ('law', 'sea')]
        assert h.generate(['law', 'sea'], max_new_tokens=9) == alone
        assert len(looked) == 9
        beams = dict(max_new_tokens=5, num_beams=2)
        assert h.ask('law', **beams) == h.ask('law', expert=weights('law'), **beams)
        h.generate(['law', 'law of the sea'], max_new_tokens=3)
        chat = Chat(h, 'Be brief.')
        for t in ('law', 'sea'):
            answer = chat(t, max_new_tokens=5)
            assert answer == h.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], max_new_tokens=5)
        assert len(looked) == 9
        monkeypatch.undo()

def test_a_router_that_abstains_on_the_way_asks_the_bare_base():
    h = forked_hydra()
    bare, shy = h.ask('who?', expert='base', max_new_tokens=9), seer(h, 1, farthest=1e-9)
    assert not shy.gates(['who?']).any()
    assert shy.ask('who?', max_new_tokens=9) == bare
    assert shy.generate(['who?', 'what?'], max_new_tokens=9)[0] == bare
