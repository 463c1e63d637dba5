"""Numbers that are typed in prose, and where they come from.

For each page, its phrases with a number. A {} is filled from what stands beside the phrase, which is read from its
source when the test runs; where a text stands beside it, the number follows from no file, and the text says from what.
Every phrase must stand in its page exactly once, and outside of phrases and WITH_DIGITS a page holds no number. So a
number that is changed, here, there or in its source, fails; one that is new has to be entered, or better: made from
results, in a cell of nbs/index.ipynb or by \\result{} in main.tex.
"""
import ast, json, re, tomllib

from hydramoe.foundations.files import read_json
from hydramoe.data.records import DOMAINS
from hydramoe.use.reproduce import Graph, experiments_at, load_result, params_at
from hydramoe.use.publish import published
from hydramoe.use.tables import SPEEDS
from hydramoe.use.pages import notebooks_page
from helpers import root, text

WORDS = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen '
         'seventeen eighteen nineteen twenty').split()
MORE = ('half halves twice third thirds quarter dozen double triple '
        'thirty forty fifty sixty seventy eighty ninety hundred thousand million billion').split()
# `one` is mostly no number in English, and cannot be made of another number without a trace: what it becomes is found
UNLIKE_ONE = '|'.join([w for w in WORDS if w!='one']+MORE)
NUMBER = re.compile(rf'\d+(?:[.,]\d+)*|\b(?:{UNLIKE_ONE})s?\b', re.I)
MEASURE = re.compile(r'\d+(?:[.,]\d+)*(?: ?[×%](?! \d)| (?:ms|seconds|minutes|hours|MB|GB|tokens a second)\b)')
NOTEBOOKS = '|'.join(p.stem for p in sorted((root/'nbs').rglob('*.ipynb')))
WITH_DIGITS = [ # names; and items of lists
    rf'\b(?:{NOTEBOOKS})\b', r'\b(?:bf16|fp32|nf4)\b', r'\bSHA-256\b', r'\bsha256sum\b', r'\bSHA256SUMS\b',
    r'\bApache-2\.0\b', r'\bSmolLM2(?:-135M)?\b', r'\bGemma 3(?: 270M)?\b', r'(?m)^\d\. ']

EXPERIMENTS = ('e1_domains', 'e2_experts', 'e3_routing')

def word(n): return WORDS[n]
def scale(s): return {n: load_result(root/'results'/f'{n}-{s}.json') for n in EXPERIMENTS}
def tokens(s): return next(r['tokens'] for r in scale(s)['e2_experts'].rows if r['system']=='experts')
def prompts(s): return scale(s)['e3_routing'].extra['test_prompts']
def lrs(results): return word(len(results['e2_experts'].params['lrs'].split()))
def about(x, known):
    "A rounded number, in words"
    return next((w for v,w in known.items() if abs(x-v)<=.15*v), f'{x:g}')
def measured(name): return read_json(root/'benchmarks'/'results'/f'{name}.json')
def pin(name): return re.search(rf'(?m)^{name}==(.+)$', text('constraints.txt'))[1]
project = tomllib.loads(text('pyproject.toml'))['project']
def with_limit(limit, name, dependencies):
    "What stands behind a limit, such as `>=`, of a package"
    return next(re.search(f'{limit}([^,]+)', d)[1] for d in dependencies if re.match(rf'{name}\b', d))
def floor(name): return with_limit('>=', name, project['dependencies'])
def below(name): return with_limit('<', name, [*project['dependencies'], *project['optional-dependencies']['dev']])

def readme():
    demo = {n: params_at(Graph(), n, 'demo') for n in experiments_at(Graph(), 'demo')}
    bits = dict(nf4=4)[demo['e2_search']['quant']]
    files = list((root/'nbs'/'experiments'/'params').glob('*-demo.yaml'))
    return {
        'zero is the base': 'the formula above it',
        '## {} commands': [word(len(re.findall(r'(?m)^make ', text('README.md')))).capitalize()],
        'Python {} or newer': [project['requires-python'].removeprefix('>=')],
        'runs {} notebooks on real instruction data of {} domains, on SmolLM2-135M in {} bits':
            [word(len(demo)), word(len(DOMAINS)), bits],
        'copy the {} files of `demo`': [word(len(files))],
    }

def results_page(): return {
    'tried at {} learning rates here': [lrs(published())],
    'Some {} thousand tokens a pass': [about(tokens('study'), {100_000: 'hundred'})],
    'with {} as many tokens and {} as many test prompts':
        [about(tokens('pilot')/tokens('study'), {.5: 'half'}), about(prompts('pilot')/prompts('study'), {.5: 'half'})],
    'with its {} test prompts': [str(prompts('demo'))],
    '`hydramoe reproduce study-0`, `study-1` and so on': 'names of runs',
    'that seed 0 searched': 'the name of a run',
    'all experts, 100 % the *oracle*': 'the unit of the table',
    'more than 100 % is possible': 'the unit of the table',
    'Measured on {} or {} CPU cores':
        [word(n) for n in sorted({measured(f)['conditions']['threads'] for f,*_ in SPEEDS})],
    'meant to be three times as fast as TRL in bf16 and twice as fast in fp32':
        'the goals, set before anything was measured',
}

def speeds(): return {
    'each two of': 'the key: top2',
    'above a fork at {} depth': [{.5: 'half'}[measured('fork')['conditions']['fork']]],
    'in prefills of {} tokens': re.findall(r'one prompt of (\d+) tokens', measured('route')['conditions']['work']),
}

def paper():
    results = published()
    return {
        'the best two, or all': 'the method: top_k of 1, 2 and E',
        '{} domains, from sources': [word(len(DOMAINS)).capitalize()],
        'agree with the {} domains': [word(len(DOMAINS))],
        'a base of 135M parameters': 'SmolLM2-135M, the base of all published runs',
        'happens at 7B': 'what was not done',
        'one adapter.} November 2026': 'a date',
        'In a pilot of November 2026': 'a date',
        '{} learning rates tried on both sides': [lrs(results)],
        'commit \\texttt{3754fcf}': 'a commit of this repository',
        'domain discovery. 2023.': 'a year of publication',
        'language models. 2022.': 'a year of publication',
        'language models. 2021.': 'a year of publication',
        'LLMs. 2023.': 'a year of publication',
        'merging models. 2023.': 'a year of publication',
        'free lunch. 2024.': 'a year of publication',
        'KnOTS. 2025.': 'a year of publication',
        'in model merging. 2025.': 'a year of publication',
        'subspaces. 2025.': 'a year of publication',
        'multi-task learning. 2024.': 'a year of publication',
        'mixture-of-experts layer. 2017.': 'a year of publication',
        'efficient sparsity. 2022.': 'a year of publication',
        'adaptive routing. 2023.': 'a year of publication',
        'zero-shot generalization. 2024.': 'a year of publication',
        'adapter experts. 2024.': 'a year of publication',
        'library of LoRAs. 2024.': 'a year of publication',
        'open language models. 2024.': 'a year of publication',
        'show no specialisation.} November 2026': 'a date',
        'uniform mix of residuals.} November 2026': 'a date',
        'win nothing more.} November 2026': 'a date',
        'in one run is not behind.} November 2026': 'a date',
    }

def contributing(): return {
    '`24a` to `24f` are the crafted sets': 'names of notebooks',
    '(`45`) and losses are scored (`47`)': 'names of notebooks',
    'A bundle (`63`) comes before the Hydra (`64`)': 'names of notebooks',
    'crafted sets (`24`) before': 'names of notebooks',
    'through nbdev {} (`settings.ini`)': [pin('nbdev')],
    'whose gradient is zero': 'how AdamW works',
    'the next cell or two show it': 'advice',
    'contains="keeps 0 of 4"': 'an example',
    'About half of the cells': 'advice',
    'Lines have 120 columns': 'held by test_lines_fit_a_screen',
    'deeper than two loops': 'advice',
    'median under 9 lines, none over 40': 'held by test_functions_are_as_short_as_promised',
    'More than seven parameters': 'advice',
    'A name that two modules need': 'advice',
    'thirteen words in a row': 'held by the tests of cards',
    'holds the three together': 'the section, and the places of the version',
    'nbdev is {}, because 3 no longer': [pin('nbdev')],
    '`fastcore<{}`, `execnb<{}` and `ghapi<{}`': [below(n) for n in ('fastcore', 'execnb', 'ghapi')],
    'run in {} processes (`make test WORKERS=1` for one)':
        [word(int(re.search(r'(?m)^WORKERS \?= (\d+)$', text('Makefile'))[1]))],
    'torch {}, transformers {}': [floor('torch'), floor('transformers')],
}

def rooms(): return {
    'what is half-written': 'no number',
    'in two files that hold no code': 'JSON and safetensors',
    'nothing twice': 'no number',
    'turn {} domains of real text': [word(len(DOMAINS))],
    'spent three ways: on one adapter, on one expert for each': 'the three ways follow',
}

def makefile():
    seconds = sum(load_result(f).run['seconds'] for f in (root/'results').glob('*-demo.json'))
    return {
        'some 2.5 GB on disk': 'du of a fresh .venv',
        'some {} minutes on two cores': [5*round(seconds/300)],
        'under 20 minutes': 'the budget of the suite',
    }

def notebook_measures(): return { # measures alone: a number with a unit
    'we measured 32 ms a layer against 3.5 ms for the plain formula': 'measured once, not kept',
    'We compared: 79 % of 300 of its questions': 'compared once with a set that is not among the assets',
    'Does a 95 % interval hold': 'the interval',
    "each system's own 95 % interval": 'the interval',
    ', 4 % at 0.9, 74 % at 0.99': 'counted: 0.9 and 0.99 to the power of 30',
    'cost Arrow 0.2 % of the layer, SpectR 1.8 %': 'counted: multiplications',
    '225 MB in half precision': 'counted: 1,024 × 10 × 11,008 × 2 bytes',
    'a pilot saw the mixture look 1.3 % better': 'a pilot that is not in results/, and the paper says so',
    'under which 98 % of the development prompts': 'the setting of choose_margin',
    'The dotted line at 100 %': 'the unit of the plot',
    "agree with the default's for 97 %": 'the setting in the cell below',
}

def without_code(page): return re.sub(r'(?ms)^```.*?^```$|^(?: {4}|\|).*?$', '', page) # nor tables

def is_markdown_call(node):
    "Whether a node of a syntax tree calls `Markdown`"
    return isinstance(node, ast.Call) and getattr(node.func, 'id', '')=='Markdown'

def words_around(argument):
    "The words of a text or an f-string; {} for what code puts there"
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    for part in parts: yield f'{part.value}' if isinstance(part, ast.Constant) else '{}'

def typed(nb):
    "What somebody typed in a page: its prose, and the words around what code puts into f-strings"
    for c in json.loads(text('nbs', nb))['cells']:
        source = ''.join(c['source'])
        if c['cell_type']=='markdown': yield without_code(source)
        else:
            for call in filter(is_markdown_call, ast.walk(ast.parse(source))):
                for argument in call.args: yield from words_around(argument)
        yield '\n'

def prose_of_notebooks():
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if p.stem in ('index', 'results'): continue
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        yield from (''.join(c['source'])+'\n' for c in cells if c['cell_type']=='markdown')

def tex(page):
    body = page.split(r'\begin{document}')[1]
    equation, formula = r'\\begin\{equation\}.*?\\end\{equation\}', r'\$[^$]*\$'
    command = r'\\(?:result|input|label|ref|begin\{thebibliography\})\{\w+(?:/\w+)?\}'
    return re.sub('|'.join([equation, formula, command]), '', body, flags=re.S)

PAGES = dict( # name → its text, and its phrases
    README=lambda: (''.join(typed('index.ipynb')), readme()),
    results=lambda: (''.join(typed('results.ipynb')), results_page()),
    notebooks_page=lambda: (notebooks_page(), rooms()),
    speeds=lambda: (re.sub(r'\{.*?\}', '', '\n'.join(s[2] for s in SPEEDS)), speeds()),
    paper=lambda: (tex(text('papers', 'hydra', 'main.tex')), paper()),
    CONTRIBUTING=lambda: (without_code(text('CONTRIBUTING.md')), contributing()),
    Makefile=lambda: ('\n'.join(re.findall(r'(?m)^(?:[a-z-]+:.*## |.*echo ").*$', text('Makefile'))), makefile()),
    notebooks=lambda: (''.join(prose_of_notebooks()), notebook_measures(), MEASURE))

def unsupported(
    page, # its text
    phrases, # of `readme` and its like
    number=NUMBER # what must stand in a phrase
):
    "Phrases that do not stand once in the page, and numbers that no phrase holds"
    wrong = []
    for phrase,source in phrases.items():
        whole = phrase if isinstance(source, str) else phrase.format(*source)
        times = page.count(whole)
        if times!=1: wrong.append(f'{whole!r} stands {times} times')
        page = page.replace(whole, '')
    for name in WITH_DIGITS: page = re.sub(name, '', page)
    def around(m): return page[max(0, m.start()-40):m.end()+40]
    return wrong+[f'{m[0]!r} in {around(m)!r}' for m in number.finditer(page)]
