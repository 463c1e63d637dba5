"Bases: what is frozen, which layers experts may touch, and gradients in four bits"
import pytest, torch
from hydramoe.models.base import compute_dtype, differentiable_nf4, target_layers, tiny_base
from hydramoe.models.load import load_base
from hydramoe.foundations.core import HydraError
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

def test_no_global_random_numbers_are_used():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    tiny_base()
    tiny_base(quant='nf4')
    assert torch.equal(torch.rand(3), want)

def test_fused_projections_are_targets():
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    m = GPTNeoXForCausalLM(config)
    kinds = {n.split('.')[-1] for n in target_layers(m)}
    assert kinds=={'query_key_value', 'dense', 'dense_h_to_4h', 'dense_4h_to_h'}
    assert len(target_layers(m, 'query_key_value,dense'))==2

def test_gpt2_keeps_its_matrices_elsewhere():
    sizes = dict(vocab_size=259, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    m = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    for targets in ('all-linear', 'c_attn'):
        with pytest.raises(HydraError, match='GPT2LMHeadModel .* Conv1D'): target_layers(m, targets)

@pytest.mark.parametrize('tokens', [1, 2, 40])
def test_nf4_gradient_after_an_evaluation(tokens):
    from bitsandbytes.functional import dequantize_4bit
    lin = tiny_base(quant='nf4').model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0)).to(compute_dtype('nf4'))
    with torch.no_grad(): lin(x)
    x.requires_grad_()
    got, = torch.autograd.grad(lin(x).float().square().sum(), x)
    W = dequantize_4bit(lin.weight.data, lin.weight.quant_state).float()
    want, = torch.autograd.grad((x.float()@W.T).square().sum(), x)
    assert (got.float()-want.float()).norm() < .02*want.float().norm()

def test_repacked_layers_are_unpacked():
    "A base that someone else loaded and evaluated"
    b = tiny_base(quant='nf4')
    lins = list(target_layers(b.model).values())
    before = [l.weight.data.clone() for l in lins]
    for l in lins: l.support_avx512bf16_for_cpu = True
    with torch.no_grad(): b.model(torch.arange(9)[None])
    differentiable_nf4(b.model)
    assert all(torch.equal(l.weight.data.view(-1), w.view(-1)) for l,w in zip(lins, before))
    x = torch.randn(1, 4, 64).to(b.model.dtype).requires_grad_()
    assert torch.autograd.grad(lins[0](x).sum(), x)[0].abs().sum()>0

@pytest.mark.slow
def test_smollm2_in_every_precision():
    "bf16 is near fp32; NF4 moves single logits a lot, the loss little"
    text = 'The capital of France is the city of Paris, which is known for its museums and food.'
    loss = {}
    first = None
    for q in ('fp32', 'bf16', 'nf4'):
        b = load_base('smollm2', q, 'cpu')
        ids = b.tokenizer(text, return_tensors='pt').input_ids
        with torch.no_grad(): loss[q] = b.model(ids, labels=ids).loss.item()
        first = first or b.fingerprint
        assert b.fingerprint==first
    assert abs(loss['bf16']-loss['fp32']) < .02*loss['fp32']
    assert abs(loss['nf4']-loss['fp32']) < .1*loss['fp32']
