"""A Hydra with a shared expert: the base, the shared expert and the residuals apart, in every way of asking;
as one adapter in PEFT"""
import shutil

import pytest, torch

from hydramoe.models.base import tiny_base
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json
from hydramoe.hydra import Hydra
from hydramoe.hydra.auto import HydraForCausalLM
from hydramoe.hydra.bundle import BundleError, check_bundle
from hydramoe.hydra.chat import Chat
from hydramoe.hydra.model import explain_bundle, wants_base
from hydramoe.hydra.route import plot_route, uniform_router
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated
from hydramoe.proof.evaluate import route_texts
from hydramoe.use.export_command import export_expert
from helpers import files_in, here
from hydras import NAMES, by_hand, fickle, ids, reseal
from stacks import peft

FORKS = [0, 1]
PROMPTS = ['law of the sea?', 'ahoy', 'sum it up, please', 'who?', 'sea']
MIX = ['law', 'base', {'law': .3, 'sum': .7}, 'shared', {'sea': 0.}]
SHORT = dict(max_new_tokens=6)

def one_by_one(hydra, experts=MIX, **how):
    "Each prompt alone, with its expert"
    return [hydra.ask(p, expert=e, **how) for p, e in zip(PROMPTS, experts)]

@pytest.fixture(scope='module', params=FORKS)
def fork(request): return request.param

@pytest.fixture(scope='module')
def hydra(fork): return by_hand(fork=fork, shared=True)

@pytest.fixture(scope='module')
def bundle(hydra, tmp_path_factory): return hydra.save(tmp_path_factory.mktemp('shared')/'b')

@pytest.fixture(scope='module')
def joined(bundle, tmp_path_factory):
    "Each expert as one adapter"
    folder = tmp_path_factory.mktemp('joined')
    return {name: export_expert(bundle, name, folder/name) for name in [*NAMES, 'shared']}

# ---- who answers

def test_base_shared_and_residual_are_three(hydra, bundle, joined):
    "The bare base, the shared expert alone and shared ⊕ residual: each equal to a Hydra that holds nothing else"
    x = ids(hydra, 'A Hydra has nine heads')
    plain = tiny_base().model
    with torch.no_grad():
        bare = plain(x).logits
        assert torch.equal(hydra.model(x).logits, bare)
        for name, folder in joined.items():
            theirs = peft(tiny_base().model, folder)(x).logits
            ours = hydra.model(x, gates=hydra.gates(['any'], name)).logits
            assert torch.allclose(ours, theirs, atol=1e-4)
            assert (ours-bare).abs().max()>.1
        alone = hydra.model(x, gates=hydra.gates(['any'], 'shared')).logits
        assert (hydra.model(x, gates=hydra.gates(['any'], 'sea')).logits-alone).abs().max()>.1
    assert hydra.ask('ahoy', expert='base', **SHORT)==by_hand().ask('ahoy', expert='base', **SHORT)

@pytest.mark.parametrize('how', [{}, dict(num_beams=2), dict(use_cache=False)], ids=str)
def test_a_mixed_batch_is_its_rows(hydra, how):
    together = hydra.generate(PROMPTS, expert=MIX, **SHORT, **how)
    assert together==one_by_one(hydra, **SHORT, **how)

def test_several_answers_stay_with_their_prompt(hydra):
    how = dict(num_beams=2, num_return_sequences=2, max_new_tokens=4)
    together = hydra.generate(PROMPTS[:3], expert=MIX[:3], **how)
    for i, (p, e) in enumerate(zip(PROMPTS, MIX[:3])):
        assert together[2*i:2*i+2]==hydra.generate([p], expert=e, **how)

def test_weights_of_zero_are_the_shared_expert(hydra):
    "By hand or because a router abstains"
    h = fickle(fork=hydra.model.stack.fork, shared=True)
    want = hydra.ask('who?', expert='shared', **SHORT)
    assert want!=hydra.ask('who?', expert='base', **SHORT)
    assert h.ask('who?', **SHORT)==want
    for nothing in ({}, dict(sea=0)): assert hydra.ask('who?', expert=nothing, **SHORT)==want
    assert h.generate(['law', 'who?'], **SHORT)[1]==want

def test_a_row_of_the_bare_base_is_no_number(hydra):
    "So that whoever forgets to look gets an error, and never the shared expert"
    gates = hydra.gates(['any']*3, ['base', 'shared', 'sea'])
    assert gates.isnan().any(1).tolist()==[True, False, False]
    assert wants_base(hydra.model.stack, gates)
    with pytest.raises(HydraError, match='NaN'): hydra.model(ids(hydra, 'any'), gates=gates[:1])
    for choice in ('base', 'shared', dict(sea=.5), dict(law=.25, sum=1.)):
        assert hydra.by_name(hydra.gates(['any'], choice))==choice

def test_shared_is_a_name_only_where_there_is_a_shared_expert():
    with pytest.raises(HydraError, match='this Hydra has no shared expert.*law, sea, sum'):
        by_hand().ask('ahoy', expert='shared', **SHORT)
    base = tiny_base()
    model = gated(base, 1, LoraSpec(rank=2))
    model.stack.init_expert(0, 0, 'shared')
    assert Hydra(base, model, uniform_router(['shared'])).gates(['any'], 'shared').tolist()==[[1.]]
    base = tiny_base()
    model = gated(base, 1, LoraSpec(rank=2), shared=True)
    model.stack.init_expert(0, 0, 'Shared')
    with pytest.raises(HydraError, match="'Shared' is taken"): Hydra(base, model, uniform_router(['Shared']))

# ---- on disk

def test_saved_and_loaded_it_is_the_same(hydra, bundle):
    again = Hydra.load(bundle)
    man = check_bundle(bundle)
    assert man['format']==2
    assert man['shared']==dict(rank=4, alpha=16)
    assert again.shared
    a = hydra.model.stack
    b = again.model.stack
    assert torch.equal(a.theta, b.theta)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.trunk, b.trunk)
    assert b.fork==a.fork
    assert again.generate(PROMPTS, expert=MIX, **SHORT)==hydra.generate(PROMPTS, expert=MIX, **SHORT)
    assert again.save(bundle)
    assert files_in(bundle)==files_in(hydra.save(bundle.parent/'again'))

def test_a_shared_expert_of_another_trunk_is_refused(tmp_path):
    a, b = (by_hand(fork=1, shared=True).save(tmp_path/name) for name in 'ab')
    other = by_hand(fork=1, shared=True)
    other.model.stack.trunk += 1
    shutil.rmtree(b/'shared')
    other.model.stack.save_peft(b/'shared', other.model.stack.shared, 'tiny-0')
    reseal(b)
    with pytest.raises(BundleError, match='shared is of another seed expert'): check_bundle(b)
    assert check_bundle(a)

# ---- as one adapter

def test_an_export_says_its_rank_and_is_not_written_over(bundle, joined):
    ranks = {name: read_json(folder/'adapter_config.json')['r'] for name, folder in joined.items()}
    assert ranks==dict(law=8, sea=8, sum=8, shared=4)
    assert files_in(joined['shared'])==files_in(bundle/'shared')
    with pytest.raises(HydraError, match='exists'): export_expert(bundle, 'sea', joined['sea'])
    for name in ('base', 'see', '../sea'):
        with pytest.raises(HydraError, match='choose one of'): export_expert(bundle, name, joined['sea'].parent/'new')
    assert not (joined['sea'].parent/'new').exists()

def test_an_export_without_a_shared_expert_is_a_copy_and_loads_no_base(tmp_path, monkeypatch):
    b = by_hand().save(tmp_path/'b')
    monkeypatch.setattr('hydramoe.hydra.saving.bundle_base', lambda *a: pytest.fail('no base is needed'))
    assert files_in(export_expert(b, 'sea', tmp_path/'sea'))==files_in(b/'experts'/'sea')
    with pytest.raises(HydraError, match="'shared'"): export_expert(b, 'shared', tmp_path/'shared')

def test_ranks_and_scales_of_their_own(tmp_path):
    "A shared expert of rank 3 and scale 2, residuals of rank 1 and 2 and other scales: in PEFT as in ours"
    base = tiny_base()
    stack = gated(base, 2, LoraSpec(rank=3), shared=True).stack
    for e, (rank, alpha) in enumerate([(1, .5), (2, 6), (3, 6)]):
        stack.init_expert(e, e, f'n{e}' if e<2 else None, rank, alpha)
        row = stack.theta[e]
        row[row!=0] += .05
        for _, B in stack.leaves:
            draw = torch.Generator().manual_seed(e)
            B[e,:,:rank] = .1*torch.randn(B[e,:,:rank].shape, generator=draw)
    folders = {f'n{e}': stack.save_peft(tmp_path/f'n{e}', e, 'tiny-0') for e in range(2)}
    shared = stack.save_peft(tmp_path/'s', 2, 'tiny-0')
    h = Hydra.from_adapters(folders, tiny_base(), uniform_router(['n0', 'n1']), shared=shared)
    b = h.save(tmp_path/'b')
    x = ids(h, 'A Hydra has nine heads')
    for name, rank in (('n0', 4), ('n1', 5)):
        out = export_expert(b, name, tmp_path/f'{name}-joined')
        assert read_json(out/'adapter_config.json')['r']==rank
        with torch.no_grad():
            ours = h.model(x, gates=h.gates(['any'], name)).logits
            assert torch.allclose(ours, peft(tiny_base().model, out)(x).logits, atol=1e-4)
            assert (ours-h.model(x, gates=h.gates(['any'], 'shared')).logits).abs().max()>.01

# ---- other ways of asking

TURNS = [('law?', None), ('nothing', None), ('and?', 'base'), ('again', 'base'), ('sea', None), ('so', 'shared'),
         ('sum', None)]

def test_a_conversation_equals_asking_with_all_of_it(fork):
    "Turn by turn, by what is routed, abstained and asked for by hand"
    h = fickle(fork=fork, shared=True)
    fresh = by_hand(fork=fork, shared=True)
    chat = Chat(h)
    for text, expert in TURNS:
        answer = chat(text, expert=expert, **SHORT)
        assert answer==fresh.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], **SHORT), text
    assert [t['experts'] for t in chat.turns]==[{'law': 1}, 'shared', 'base', 'base', {'sea': 1}, 'shared', {'sum': 1}]
    assert [t['again']>0 for t in chat.turns]==[False, True, True, False, True, True, True]
    assert [t.get('above', 0)>0 for t in chat.turns]==[False, fork>0, False, False, False, fork>0, fork>0]

def test_auto_model_answers_as_hydra(hydra):
    model = HydraForCausalLM(hydra)
    x = ids(hydra, 'A Hydra has nine heads')
    for expert in ('sea', 'shared', {'law': .5, 'sum': .5}):
        want = hydra.model.generate(x, gates=hydra.gates(['any'], expert), max_new_tokens=5, do_sample=False)
        ours = model.generate(x, expert=expert, max_new_tokens=5, do_sample=False)
        n = min(ours.shape[1], want.shape[1]) # one may stop at an end of an answer, and the other say so
        assert n>x.shape[1]
        assert torch.equal(ours[:,:n], want[:,:n])
    with pytest.raises(HydraError, match="has a shared expert.*hydra.ask.prompt, expert='base'"):
        model.generate(x, expert='base', max_new_tokens=2)

def test_routes_of_lm_eval(fork):
    "None is the bare base; a router that abstains, and expert='shared', are weights of zero"
    h = fickle(fork=fork, shared=True)
    assert route_texts(h, ['any'], 'base')==[None]
    for rows in (route_texts(h, ['any'], 'shared'), route_texts(h, ['nothing'])):
        assert [row.tolist() for row in rows]==[[0, 0, 0]]
    plain = fickle(fork=fork)
    assert route_texts(plain, ['nothing'])==route_texts(plain, ['any'], 'base')==[None]

def test_explained_with_weight_one(hydra, bundle):
    found = hydra.explain('ahoy')
    assert found['shared']==1
    assert [x['name'] for x in found['experts']]==NAMES
    assert found['text'].splitlines()[-1].split()[:2]==['shared', '100.0%']
    assert [t.get_text() for t in plot_route(found).axes[0].get_yticklabels()]==[*NAMES, 'shared']
    assert explain_bundle(bundle, 'ahoy')[0]==found
    assert 'shared' not in by_hand().explain('ahoy')

def test_a_gate_chooses_residuals(bundle, fork):
    man = check_bundle(bundle)
    adapters = {n: bundle/'experts'/n for n in NAMES}
    arrow = dict(kind='arrow', top_k=2)
    h = Hydra.from_adapters(adapters, tiny_base(), arrow, fork=man.get('fork', 0), shared=bundle/'shared')
    assert h.generate(PROMPTS[:2], **SHORT)==[h.ask(p, **SHORT) for p in PROMPTS[:2]]
    found = h.explain('ahoy')
    assert found['shared']==1
    assert h.plot('ahoy').axes[0].get_yticklabels()[-1].get_text()=='shared'
    assert h.ask('ahoy', expert='base', **SHORT)==by_hand().ask('ahoy', expert='base', **SHORT)

def test_commands_tell_of_it(bundle, tmp_path):
    out = here('check', bundle)
    assert '3 experts and a shared one of rank 4' in out.stdout
    assert here('export', bundle, 'sea', '--out', tmp_path/'x').stdout.split()[-1]=='8'
    said = here('export', bundle, 'sea', '--out', tmp_path/'x')
    assert said.returncode==2
    assert 'exists' in said.stderr
    assert said.stderr.count('\n')==1
