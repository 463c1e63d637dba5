"What hypothesis draws in several test files."
from hypothesis import strategies as st

utf8 = st.characters(codec='utf-8', exclude_categories=['Cs'])
finite = st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(st.characters(exclude_categories=['Cs']))
scalars = st.none() | st.booleans() | st.integers(-2**70, 2**70) | finite | any_text
cells = st.none() | st.text() | st.integers() | st.floats() # of a table
tables = st.lists(st.fixed_dictionaries({'a': cells, 'b': cells, 'c': cells}), min_size=1, max_size=4)
