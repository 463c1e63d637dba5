"A merge in the base's weights, and the recipe by which mergekit makes the same"
import json
import pytest, torch, yaml
from hydramoe.foundations.core import HydraError
from hydramoe.models.base import open_checkpoint, tiny_base
from hydramoe.models.load import load_base
from hydramoe.experts.model import GatedCausalLM
from hydramoe.hydra import Hydra
from hydramoe.hydra.dense import plain_weight, write_dense, write_mergekit
from hydramoe.hydra.merge import merged_stack, seed_factors
from hydramoe.hydra.merged import merge_hydra
from hydramoe.hydra.route import uniform_router
from hydras import NAMES, by_hand, noisy, save_base
from stacks import batch, forked_model

WEIGHTS = dict(law=1., sea=.5, sum=-.3)
EXACT = [('linear', {}), ('concat', {}), ('average', dict(share=.4)), ('prune', dict(density=.3)),
         ('ties', dict(density=.4, variant='mergekit'))]

@pytest.fixture
def bundle(tmp_path):
    "A bundle of three experts of noise on a base that lies in a folder"
    base = load_base(str(save_base(tiny_base(), tmp_path/'base')), 'fp32')
    hydra = by_hand(base)
    hydra.save(tmp_path/'bundle')
    hydra.model.detach()
    return tmp_path/'bundle'

def checkpoint(folder): return open_checkpoint(folder, 'fp32', 'cpu')

@pytest.mark.parametrize('method, params', EXACT, ids=[m for m, _ in EXACT])
def test_mergekit_makes_the_same_weights_from_the_recipe(bundle, tmp_path, method, params):
    pytest.importorskip('mergekit')
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    hydra = Hydra.load(bundle)
    merge = merge_hydra(hydra, method, WEIGHTS, scale=1.7, space='full', **params)
    ours = checkpoint(write_dense(hydra, merge, tmp_path/'dense'))
    recipe = yaml.safe_load((write_mergekit(bundle, hydra, merge, tmp_path/'recipe')/'mergekit_config.yml').read_text())
    options = MergeOptions(lora_merge_cache=str(tmp_path/'cache'), copy_tokenizer=False, write_model_card=False,
                           quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path/'theirs'), options)
    theirs = checkpoint(tmp_path/'theirs').state_dict()
    changed = 0
    before = hydra.base.model.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs[name], atol=2e-6), name
        changed += not torch.equal(weight, before[name])
    assert changed==len(hydra.model.stack.layers)

@pytest.mark.parametrize('method, params, hint', [
    ('ties', {}, '--variant mergekit'), ('ties', dict(variant='peft'), '--variant mergekit'),
    ('dare', {}, '--to dense'), ('knots', {}, 'core space'), ('iso_c', {}, 'core space')])
def test_what_no_recipe_says_is_refused_and_nothing_is_written(bundle, tmp_path, method, params, hint):
    hydra = Hydra.load(bundle)
    merge = merge_hydra(hydra, method, dict(law=1., sea=.5), **params)
    with pytest.raises(HydraError, match=hint): write_mergekit(bundle, hydra, merge, tmp_path/'recipe')
    assert not (tmp_path/'recipe').exists()

@pytest.mark.parametrize('method', ['linear', 'ties', 'dare_ties', 'tsv_m'])
def test_a_checkpoint_computes_what_the_merged_expert_computes(bundle, tmp_path, method):
    hydra = Hydra.load(bundle)
    merge = merge_hydra(hydra, method, dict(law=1., sea=.5, sum=.2), rank=64, scale=.6) # 64: nothing is lost
    dense = checkpoint(write_dense(hydra, merge, tmp_path/'dense'))
    model = GatedCausalLM(hydra.base.model, merged_stack(merge, hydra.base.model, hydra.model.stack))
    x = batch()
    assert torch.allclose(dense(**x).logits, model(**x, gates=torch.ones(3, 1)).logits, atol=2e-4)
    assert json.loads((tmp_path/'dense'/'receipt.json').read_text())['energy_lost']==0

def test_a_seed_expert_is_added_back(bundle, tmp_path):
    hydra = Hydra.load(bundle)
    seed = bundle/'experts'/'law'
    merge = merge_hydra(hydra, 'ties', dict(sea=1., sum=1.), seed_expert=seed, density=.5, scale=0.)
    dense = checkpoint(write_dense(hydra, merge, tmp_path/'dense'))
    layer = hydra.model.stack.layers[2].name
    A, B = seed_factors(hydra.model.stack, seed)[2]
    expected = hydra.base.model.get_submodule(layer).weight+B@A
    assert torch.allclose(dense.get_submodule(layer).weight, expected, atol=1e-6)

def test_a_forked_merge_has_the_trunk(tmp_path):
    model = forked_model()
    model.stack.names[:] = NAMES
    base = tiny_base(layers=4)
    save_base(base, tmp_path/'base')
    hydra = Hydra(load_base(str(tmp_path/'base'), 'fp32'), model, uniform_router(NAMES))
    x = batch()
    expected = model(**x, gates=torch.full((3, 3), 1/3)).logits
    merge = merge_hydra(hydra, 'linear')
    dense = checkpoint(write_dense(hydra, merge, tmp_path/'dense'))
    assert torch.allclose(dense(**x).logits, expected, atol=2e-4)

def test_an_nf4_base_is_written_with_the_weights_that_its_experts_know(tmp_path):
    save_base(tiny_base(), tmp_path/'base')
    base = load_base(str(tmp_path/'base'), 'nf4')
    original = checkpoint(tmp_path/'base')
    hydra = Hydra(base, noisy(base), uniform_router(NAMES))
    merge = merge_hydra(hydra, 'linear', scale=0.)
    layer = hydra.model.stack.layers[1].name
    known = plain_weight(hydra.base.model.get_submodule(layer)).bfloat16()
    def written(name, **how):
        dense = open_checkpoint(write_dense(hydra, merge, tmp_path/name, **how), 'bf16', 'cpu')
        return dense.get_submodule(layer).weight
    as_known = written('known')
    as_it_was = written('was', original=True)
    assert torch.equal(as_known, known)
    assert torch.equal(as_it_was, original.get_submodule(layer).weight.bfloat16())
    assert not torch.equal(as_known, as_it_was)
    places = [json.loads((tmp_path/f/'receipt.json').read_text())['base']['weights'] for f in ('known', 'was')]
    assert places==['dequantised', 'original']

def test_a_place_that_is_taken_is_left_alone(bundle, tmp_path):
    hydra = Hydra.load(bundle)
    merge = merge_hydra(hydra, 'linear')
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'mine').write_text('x')
    for write in (lambda out: write_dense(hydra, merge, out), lambda out: write_mergekit(bundle, hydra, merge, out)):
        with pytest.raises(HydraError, match='exists'): write(tmp_path/'taken')
    assert [p.name for p in (tmp_path/'taken').iterdir()]==['mine']
