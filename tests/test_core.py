"Canonical text, seeds and numbers beyond what the lesson shows."
import dataclasses, json, math, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hydramoe.foundations import core
from hydramoe.foundations.core import HydraError, canonical, derive_seed, digest, number, one_of, repo_root, rng
from strategies import scalars

keys = st.text(st.characters(exclude_categories=['Cs']), max_size=5)

def nested(inner): return st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)

values = st.recursive(scalars, nested, max_leaves=12)

@given(values)
def test_canonical_text_is_json_and_a_fixed_point(v):
    assert json.loads(canonical(v))==v
    assert canonical(json.loads(canonical(v)))==canonical(v)

@given(st.dictionaries(st.text(st.characters(exclude_categories=['Cs'])), scalars, min_size=2), st.randoms())
def test_order_of_keys_does_not_matter(d, r):
    items = list(d.items())
    r.shuffle(items)
    assert digest(dict(items))==digest(d)

NO_TEXT = [(math.nan, 'value'), ({'a': [1, math.inf]}, 'value.a[1]'), ({'a': {2: 'x'}}, 'value.a'),
           ([object()], 'value[0]'), ({'s': {1}}, 'value.s'), (b'x', 'value'), (np.array([1., np.nan]), 'value[1]'),
           (int, 'value')]

@pytest.mark.parametrize('bad, at', NO_TEXT)
def test_what_has_no_canonical_text_is_named(bad, at):
    with pytest.raises(HydraError) as e: canonical(bad)
    assert str(e.value).startswith(at+' ')

def test_types_that_parameters_are_made_of():
    @dataclasses.dataclass
    class A:
        p:Path
        n:float
    mixed = [A(Path('x'), np.float32(.5)), np.arange(2), (1,), np.bool_(True)]
    assert canonical(mixed)=='[{"n":0.5,"p":"x"},[0,1],[1],true]'

def test_seeds_are_the_same_everywhere():
    code = ('from hydramoe.foundations.core import derive_seed, rng; '
            'print(derive_seed(7, "expert", 3), rng(7, "a").integers(10**9))')
    def say(hash_seed):
        env = {**os.environ, 'PYTHONHASHSEED': hash_seed}
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env).stdout
    outs = {say(hash_seed) for hash_seed in '12'}
    assert outs=={f'{derive_seed(7, "expert", 3)} {rng(7, "a").integers(10**9)}\n'}

@given(st.integers(0, 2**32), st.integers(0, 2**32), st.text(), st.text())
def test_different_streams_have_different_seeds(a, b, m, n):
    assert (derive_seed(a, m)==derive_seed(b, n))==((a, m)==(b, n))
    assert 0<=derive_seed(a, m)<2**63

def test_root_is_found_from_below_and_from_elsewhere(monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[1]
    (tmp_path/'settings.ini').write_text('lib_name = someone_else\n')
    for cwd in (root/'nbs', root/'tests', tmp_path):
        monkeypatch.chdir(cwd)
        assert repo_root()==root
    monkeypatch.setattr(core, '_is_root', lambda p: False)
    with pytest.raises(HydraError, match='no checkout'): repo_root()
    assert core.commit() is None

def test_progress_is_on_stderr_and_can_be_silenced():
    code = 'from hydramoe.foundations.core import progress\nfor _ in progress(range(3), "counting"): pass\nprint("out")'
    usual = {k: v for k,v in os.environ.items() if k not in ('IN_TEST', 'HYDRAMOE_QUIET')}
    def run(**env):
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**usual, **env})
    loud = run()
    quiet = run(HYDRAMOE_QUIET='1')
    assert loud.stdout==quiet.stdout=='out\n'
    assert 'counting' in loud.stderr
    assert quiet.stderr==''
    assert run(IN_TEST='1').stderr==''

def test_core_is_light():
    code = ('import sys, hydramoe.foundations.core, hydramoe.foundations.store, hydramoe.foundations.page; '
            'print([m for m in ("torch", "transformers", "sklearn", "matplotlib", "pandas") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout=='[]\n'

def test_choices():
    assert one_of(2, (1, 2), 'k')==2
    said = r"k='rnak' is not known; choose one of rank, alpha; did you mean 'rank'\?"
    with pytest.raises(HydraError, match=said): one_of('rnak', ['rank', 'alpha'], 'k')

numbers = st.integers(-10, 10) | st.floats(-10, 10) | st.floats()
others = st.booleans() | st.none() | st.text(max_size=3) | st.integers(10**300, 10**400)

@given(numbers | others, st.booleans(), st.integers(-3, 3), st.integers(4, 8))
def test_a_number_is_of_its_kind_finite_and_in_its_range_or_refused_by_its_word(x, whole, low, high):
    good = type(x) in ((int,) if whole else (int, float)) and low<=x<=high
    if good: assert number(x, 'k', whole=whole, least=low, most=high) is x
    else:
        with pytest.raises(HydraError, match='^k='): number(x, 'k', whole=whole, least=low, most=high)
    for kind in (np.int64, np.float32):
        if good and type(x) is int: assert type(number(kind(x), 'k', least=low)) in (int, float)

