"""What a shared Hydra is compared with: the wrong residual, strengths, the settings that reach training, the sentence,
the cost."""
from itertools import product

import numpy as np
import pytest

from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json, read_jsonl
from hydramoe.foundations.statistics import Difference
from hydramoe.foundations.store import stage
from hydramoe.models.base import tiny_base
from hydramoe.data.unified_card import toy_unify_stage
from hydramoe.experts.adapters import find_adapters, find_shared, with_adapters
from hydramoe.experts.score import Losses
from hydramoe.experts.stages import train_single_stage
from hydramoe.proof import residuals
from hydramoe.proof.compare import Setup, adapter_names, group_ids, lora_of, spec_of, train_adapters
from hydramoe.proof.cost import adapter_params, stage_work, system_cost
from hydramoe.proof.residuals import (
    RESIDUAL_FACTORS, best_strengths, exchanged, gain_text, shared_ranks, train_apart, train_shared)

SETTING = dict(split='4+2', lr=6e-3, rows=2., rate=.5, dropout=0., soft=0., b_rate=2., decay=.1, clock='run')


@pytest.mark.parametrize('n', range(2, 13))
def test_every_expert_gets_another_one_and_each_is_given_once(n):
    for seed in range(20):
        others = exchanged(n, seed)
        assert sorted(others)==list(range(n))
        assert not (others==np.arange(n)).any()

def test_the_exchange_depends_on_its_seed_alone():
    assert (exchanged(9, 1)==exchanged(9, 1)).all()
    assert len({tuple(exchanged(9, seed)) for seed in range(10)})>5

def test_one_expert_has_no_other():
    with pytest.raises(HydraError, match='at least 2'): exchanged(1, 0)

@pytest.mark.parametrize('split', ['8', '8+', '8+0', '0+8', '8+-2', '8+2+2', 'a+b', ''])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(HydraError, match='as in 8[+]2'): shared_ranks(split)


def losses_of(nll, strengths):
    "A loss matrix with one token a record"
    n = nll.shape[1]
    return Losses(nll.astype(np.float32), np.arange(n+1), [str(i) for i in range(n)], ['d']*n, strengths)

def test_no_other_choice_of_strengths_loses_less():
    draw = np.random.default_rng(0)
    nll, route = draw.random((3, 12)), draw.integers(0, 3, 12)
    names = ['0', '0.5', '2']
    best = best_strengths(losses_of(nll, names), route, 3)
    def lost(strengths): return sum(nll[names.index(f'{strengths[e]:g}'), i] for i, e in enumerate(route))
    assert lost(best)==pytest.approx(min(lost(choice) for choice in product((0, .5, 2), repeat=3)))

def test_a_strength_depends_on_the_prompts_of_its_own_residual():
    draw = np.random.default_rng(1)
    nll, route = draw.random((3, 12)), np.arange(12)%3
    changed = nll.copy()
    changed[:,route!=1] = draw.random((3, 8))
    names = ['0', '0.5', '2']
    assert best_strengths(losses_of(nll, names), route, 3)[1]==best_strengths(losses_of(changed, names), route, 3)[1]

def test_a_residual_that_no_prompt_goes_to_keeps_its_strength():
    assert best_strengths(losses_of(np.ones((2, 3)), ['0', '2']), np.zeros(3, int), 2)[1]==1


AHEAD, BEHIND = Difference(-2., -3., -1., .001), Difference(2., 1., 3., .001)
NOT = (Difference(-2., -5., 1., .2), Difference(0., -1., 1., 1.), BEHIND)

@pytest.mark.parametrize('over_one,over_lot', list(product([AHEAD, *NOT], repeat=2)))
def test_specialisation_is_said_of_a_lead_on_both_and_of_nothing_else(over_one, over_lot):
    said = gain_text(over_one, over_lot)
    assert ('is specialisation' in said)==(over_one is AHEAD and over_lot is AHEAD)
    assert ('one of optimisation' in said)==(over_one is AHEAD and over_lot is not AHEAD)
    assert ('is ahead of' in said)==(over_one is AHEAD or over_lot is AHEAD)


@pytest.mark.parametrize('factor', RESIDUAL_FACTORS)
def test_what_a_search_found_reaches_the_training(factor, monkeypatch):
    asked = []
    monkeypatch.setattr(residuals, 'train_adapters', lambda *args, **what: asked.append((args, what)))
    found = dict(SETTING, **{factor: 'found'})
    train_shared(Setup('.', 'tiny', 'fp32', 200), found, 'all-linear', None, 'seed', groups={})
    (_, _, lora, _, start), what = asked[0]
    assert what['residual']=={**{name: SETTING[name] for name in RESIDUAL_FACTORS}, factor: 'found', 'rank': 2}
    assert (lora.rank, start)==(4, 'seed')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A toy's shared Hydra, trained together, and trained apart on the other half of the rows"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HYDRAMOE_CACHE', str(tmp_path_factory.mktemp('cache')))
        asked = dict(tokens_per_domain=400, router=2, dev=2, test=2, max_length=200, seed=0, cards='')
        setup = Setup(stage(toy_unify_stage, asked), 'tiny', 'fp32', 200)
        records = read_jsonl(setup.rows_dir/'experts.jsonl')
        domain = {r['id']: r['domain'] for r in records}
        half = list(domain)[::2]
        spec = spec_of(SETTING, 3, 0)
        first = train_adapters(setup, train_single_stage, lora_of(dict(s=2.), 4, 'all-linear'), spec, ids=half)
        together = train_shared(setup, SETTING, 'all-linear', spec, first, groups=group_ids(list(domain), domain))
        others = group_ids([i for i in domain if i not in half], domain)
        apart = train_apart(setup, SETTING, 'all-linear', spec, first, groups=others)
        yield first, together, apart, len(records)

def test_an_answer_costs_the_adapter_that_both_parts_are_when_joined(trained, tmp_path):
    _, together, _, _ = trained
    adapters = {p.name: p for p in find_adapters(together)}
    base = tiny_base()
    bare = system_cost(base, together, 0), system_cost(base, together, 1)
    model = with_adapters(base, adapters, shared=find_shared(together))
    joined = model.stack.save_joined(tmp_path/'joined', 0, base.id)
    assert bare[1].active==adapter_params(joined)
    assert bare[0].active==adapter_params(find_shared(together))

def test_two_steps_cost_what_both_of_them_cost(trained):
    first, together, apart, n = trained
    cost = system_cost(tiny_base(), apart, 1, before=first)
    works = stage_work(first), stage_work(apart)
    assert cost.rows==n==stage_work(together)['rows']
    assert cost.tokens==sum(w['tokens'] for w in works)==stage_work(together)['tokens']
    assert cost.most_steps==max(w['most_steps'] for w in works)

def test_a_shared_expert_has_a_step_wherever_any_residual_has(trained):
    _, together, _, _ = trained
    made = read_json(together/'history.json')
    assert stage_work(together)['most_steps']==len(made['history'])>max(a['steps'] for a in made['experts'].values())

def test_residuals_apart_leave_the_shared_expert_as_it_was(trained):
    first, _, apart, _ = trained
    def factors(folder): return (folder/'adapter_model.safetensors').read_bytes()
    assert factors(find_shared(apart))==factors(find_adapters(first)[0])
    assert adapter_names(apart)
