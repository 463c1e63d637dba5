"The expert pool: which experts are in a slot never shows in an output"
import threading
import pytest, torch
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.core import HydraError
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import LoraSpec, Stack
from hydramoe.experts.model import gated
from hydramoe.experts.pool import ExpertPool
from stacks import batch, filled

@pytest.fixture(scope='module')
def library(tmp_path_factory):
    m,d = filled(slots=6),tmp_path_factory.mktemp('library')
    return m,{m.stack.names[e]: m.stack.save_peft(d/m.stack.names[e], e, 'tiny-0') for e in range(6)}

EXPERTS = st.lists(st.integers(0,5), min_size=1, max_size=2, unique=True) # of one row
REQUESTS = st.lists(st.lists(EXPERTS, min_size=2, max_size=2), min_size=1, max_size=6)

@settings(max_examples=12, deadline=None)
@given(REQUESTS, st.integers(4,6), st.integers(0,7))
def test_outputs_do_not_depend_on_the_pool(library, requests, slots, rows_in_ram):
    m,folders = library
    few = gated(tiny_base(), slots, LoraSpec(4, 8))
    pool,x = ExpertPool(few.stack, folders, rows_in_ram*few.stack.theta[0].nbytes),batch(rows=2, length=6, pads=(0,))
    for request in requests:
        mixes = [{f'expert{e}': 1/(1+j) for j,e in enumerate(row)} for row in request]
        want = torch.zeros(2, 6)
        for row,mix in zip(want, mixes):
            for n,w in mix.items(): row[int(n[-1])] = w
        with torch.no_grad(), pool.gates(mixes) as g:
            torch.testing.assert_close(few(**x, gates=g).logits, m(**x, gates=want).logits)
        assert len(pool.ram)<=rows_in_ram
        assert not +pool.held

def test_the_pool_keeps_what_is_used_and_drops_what_is_not(library):
    s = Stack(tiny_base().model, 2, LoraSpec(4, 8))
    pool = ExpertPool(s, library[1], 0)
    for e in (0,1,0,2):
        with pool.gates([{f'expert{e}': 1.}]): pass
    assert sorted(pool.placed)==['expert0','expert2']
    assert pool.found=={'disk': 3, 'device': 1}
    with pool.gates([{'expert0': 1.}]):
        with pool.gates([{'expert1': 1.}]): assert 'expert0' in pool.placed
        with pool.gates([{'expert3': 1.}]): assert 'expert0' in pool.placed

def test_a_request_waits_for_slots_that_others_hold(library):
    pool,seen = ExpertPool(Stack(tiny_base().model, 1, LoraSpec(4, 8)), library[1]),[]
    def ask(e):
        with pool.gates([{f'expert{e}': 1.}]): seen.append((e, pool.stack.names[0]))
    with pool.gates([{'expert0': 1.}]):
        t = threading.Thread(target=ask, args=(3,))
        t.start()
        t.join(.1)
        assert t.is_alive()
        assert pool.stack.names==['expert0']
    t.join()
    assert seen==[(3,'expert3')]

def test_a_damaged_expert_leaves_the_pool_usable(library, tmp_path):
    (tmp_path/'bad').mkdir()
    pool = ExpertPool(Stack(tiny_base().model, 1, LoraSpec(4, 8)), {**library[1], 'bad': tmp_path/'bad'})
    with pytest.raises(HydraError, match='not a PEFT adapter'):
        with pool.gates([{'bad': 1.}]): pass
    with pool.gates([{'expert0': 1.}]): assert pool.stack.names==['expert0']
