"""Make tests/data/small_hydra, the Hydra that the lessons ask: four experts of rank 2 on SmolLM2, in some 5 MB.

    .venv/bin/python tests/data/small_hydra.py

Rows of four data sets whose licences allow it are built into a Hydra as `hydramoe build` would. Then the experts are
rounded to bf16, which halves their files, and the bundle is sealed again.
"""
import shutil, tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from hydramoe.foundations.files import read_json
from hydramoe.data.load import load
from hydramoe.hydra.bundle import seal_bundle
from hydramoe.hydra import Hydra

HERE = Path(__file__).parent
SOURCES = ['math', 'mbpp', 'element_sql', 'scenes']
ROWS = 200 # of each
NAMES = {'math': 'math', 'mbpp': 'coding', 'element_sql': 'tables', 'scenes': 'stage'}

def halve(bundle):
    "Round the experts of a bundle to bf16 and seal it again"
    about = {k: v for k, v in read_json(bundle/'hydra.json').items() if k not in ('format', 'files', 'seal')}
    for file in bundle.glob('experts/*/adapter_model.safetensors'):
        save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={'format': 'pt'})
    for seal in ('hydra.json', 'tensors.json'):
        (bundle/seal).unlink()
    seal_bundle(bundle, about)

def main():
    records = [r for name in SOURCES for r in load(name, limit=ROWS)]
    with tempfile.TemporaryDirectory() as tmp:
        bundle = Path(tmp)/'small_hydra'
        Hydra.build(records, bundle, base='smollm2', quant='bf16', k=4, rank=2, shared=0,
                    tokens=120_000, lr=1e-3, threads=2)
        halve(bundle)
        shutil.rmtree(HERE/'small_hydra', ignore_errors=True)
        shutil.copytree(bundle, HERE/'small_hydra')
    hydra = Hydra.load(HERE/'small_hydra')
    for prompt in ('What is 12 times 11?', 'Write a python function that reverses a list.'):
        print(prompt, hydra.ask(prompt, max_new_tokens=60), hydra.explain(prompt), sep='\n')

if __name__ == '__main__':
    main()
