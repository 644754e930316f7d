"""Tiny random models of every shape the graph room must know, exported by both torch exporters.

``export(name, exporter, folder)`` writes one; ``exported(name, exporter)`` writes it once per test process and
remembers where. ``ZOO[name]()`` builds the torch module with its example inputs and the figures that tests expect.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Exporter = Literal["dynamo", "legacy"]
OPSET: Mapping[Exporter, int] = {"dynamo": 21, "legacy": 19}
BATCH, TOKENS, VOCABULARY, HIDDEN, LAYERS, HEADS = 2, 9, 67, 32, 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A torch module with inputs to trace it, and how many layers it has.

    Attributes:
        module: In eval mode, returns a tensor or a tuple of tensors.
        inputs: Example inputs by name, in the order of ``forward``.
        dynamic: Names of the dynamic axes by input.
        weights: Projection kind (``query``, ``down``, …) to the torch weights of every layer, ``[out, in]``:
            the independent oracle of which GEMM is which.
        layers: Repeated blocks.
    """

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    layers: int = LAYERS


class _Tensors(nn.Module):
    """Calls a transformers model with keyword inputs and returns plain tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...], **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.fixed = model, names, outputs, fixed

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        return tuple(result[name] for name in self.outputs)


def _text(model: nn.Module, outputs: tuple[str, ...], weights: dict[str, list[torch.Tensor]], **fixed: Any) -> Sample:
    inputs = {
        "input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS)),
        "attention_mask": torch.tensor([[1] * TOKENS, [1] * (TOKENS - 3) + [0] * 3]),
    }
    dynamic = {name: {0: "batch", 1: "tokens"} for name in inputs}
    module = _Tensors(model.eval(), tuple(inputs), outputs, **fixed)
    return Sample(module=module, inputs=inputs, dynamic=dynamic, weights=weights)


def _encoder_config(kind: str, **more: Any) -> Any:
    import transformers

    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
    return getattr(transformers, kind)(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **more)


def _encoder_weights(layers: Any) -> dict[str, list[torch.Tensor]]:
    return {
        "query": [layer.attention.self.query.weight for layer in layers],
        "key": [layer.attention.self.key.weight for layer in layers],
        "value": [layer.attention.self.value.weight for layer in layers],
        "output": [layer.attention.output.dense.weight for layer in layers],
        "up": [layer.intermediate.dense.weight for layer in layers],
        "down": [layer.output.dense.weight for layer in layers],
    }


def bert(attention: str = "sdpa") -> Sample:
    import transformers

    model = transformers.BertModel(_encoder_config("BertConfig", attn_implementation=attention))
    weights = _encoder_weights(model.encoder.layer) | {"head": [model.pooler.dense.weight]}
    return _text(model, ("last_hidden_state", "pooler_output"), weights)


def bert_classifier() -> Sample:
    import transformers

    model = transformers.BertForSequenceClassification(_encoder_config("BertConfig", num_labels=3))
    heads = [model.bert.pooler.dense.weight, model.classifier.weight]
    return _text(model, ("logits",), _encoder_weights(model.bert.encoder.layer) | {"head": heads})


def bert_masked_lm() -> Sample:
    import transformers

    model = transformers.BertForMaskedLM(_encoder_config("BertConfig"))
    heads = [model.cls.predictions.transform.dense.weight, model.cls.predictions.decoder.weight]
    return _text(model, ("logits",), _encoder_weights(model.bert.encoder.layer) | {"head": heads})


def roberta() -> Sample:
    import transformers

    config = _encoder_config("RobertaConfig", num_labels=3, pad_token_id=1)
    model = transformers.RobertaForSequenceClassification(config)
    heads = [model.classifier.dense.weight, model.classifier.out_proj.weight]
    return _text(model, ("logits",), _encoder_weights(model.roberta.encoder.layer) | {"head": heads})


def distilbert() -> Sample:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64
    )
    model = transformers.DistilBertModel(config)
    layers = model.transformer.layer
    weights = {
        "query": [layer.attention.q_lin.weight for layer in layers],
        "key": [layer.attention.k_lin.weight for layer in layers],
        "value": [layer.attention.v_lin.weight for layer in layers],
        "output": [layer.attention.out_lin.weight for layer in layers],
        "up": [layer.ffn.lin1.weight for layer in layers],
        "down": [layer.ffn.lin2.weight for layer in layers],
    }
    return _text(model, ("last_hidden_state",), weights)


def gpt2() -> Sample:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    layers = model.transformer.h
    weights = {
        "qkv": [layer.attn.c_attn.weight.T for layer in layers],
        "output": [layer.attn.c_proj.weight.T for layer in layers],
        "up": [layer.mlp.c_fc.weight.T for layer in layers],
        "down": [layer.mlp.c_proj.weight.T for layer in layers],
        "head": [model.lm_head.weight],
    }
    return _text(model, ("logits",), weights, use_cache=False)


def _decoder(kind: str, config: str, **more: Any) -> Sample:
    import transformers

    sizes = {"num_key_value_heads": 2, "head_dim": HIDDEN // HEADS, "tie_word_embeddings": False}
    model = getattr(transformers, kind)(_encoder_config(config, **(sizes | more)))
    layers = model.model.layers
    weights = {
        "query": [layer.self_attn.q_proj.weight for layer in layers],
        "key": [layer.self_attn.k_proj.weight for layer in layers],
        "value": [layer.self_attn.v_proj.weight for layer in layers],
        "output": [layer.self_attn.o_proj.weight for layer in layers],
        "gate": [layer.mlp.gate_proj.weight for layer in layers],
        "up": [layer.mlp.up_proj.weight for layer in layers],
        "down": [layer.mlp.down_proj.weight for layer in layers],
        "head": [model.lm_head.weight],
    }
    return _text(model, ("logits",), weights, use_cache=False)


def llama(attention: str = "sdpa") -> Sample:
    return _decoder("LlamaForCausalLM", "LlamaConfig", attn_implementation=attention)


def qwen3() -> Sample:
    """Llama's shape with a norm on query and key, and the head tied to the embedding."""
    return _decoder("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True)


def gpt_neox() -> Sample:
    """Fused QKV split inside each head, partial RoPE, attention and FFN in parallel."""
    import transformers

    model = transformers.GPTNeoXForCausalLM(_encoder_config("GPTNeoXConfig"))
    layers = model.gpt_neox.layers
    weights = {
        "qkv": [layer.attention.query_key_value.weight for layer in layers],
        "output": [layer.attention.dense.weight for layer in layers],
        "up": [layer.mlp.dense_h_to_4h.weight for layer in layers],
        "down": [layer.mlp.dense_4h_to_h.weight for layer in layers],
        "head": [model.get_output_embeddings().weight],
    }
    return _text(model, ("logits",), weights, use_cache=False)


def _t5_config(**more: Any) -> Any:
    import transformers

    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=HEADS, **more
    )


def t5_encoder() -> Sample:
    import transformers

    model = transformers.T5EncoderModel(_t5_config(feed_forward_proj="gated-gelu"))
    layers = model.encoder.block
    weights = {
        "query": [layer.layer[0].SelfAttention.q.weight for layer in layers],
        "key": [layer.layer[0].SelfAttention.k.weight for layer in layers],
        "value": [layer.layer[0].SelfAttention.v.weight for layer in layers],
        "output": [layer.layer[0].SelfAttention.o.weight for layer in layers],
        "gate": [layer.layer[1].DenseReluDense.wi_0.weight for layer in layers],
        "up": [layer.layer[1].DenseReluDense.wi_1.weight for layer in layers],
        "down": [layer.layer[1].DenseReluDense.wo.weight for layer in layers],
    }
    return _text(model, ("last_hidden_state",), weights)


def vit(attention: str = "sdpa") -> Sample:
    import transformers

    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        num_labels=5,
        attn_implementation=attention,
    )
    model = transformers.ViTForImageClassification(config).eval()
    weights = _vit_weights(model) | {
        "head": [model.classifier.weight],
        "stem": [model.vit.embeddings.patch_embeddings.projection.weight],
    }
    return _image(_Tensors(model, ("pixel_values",), ("logits",)), "pixel_values", 16, weights)


def _vit_weights(model: Any) -> dict[str, list[torch.Tensor]]:
    """Pick ViT's weights by parameter name, because transformers 5 renamed the modules that hold them."""
    found: dict[str, list[torch.Tensor]] = {}
    ends = {
        "query": ("query", "q_proj"),
        "key": ("key", "k_proj"),
        "value": ("value", "v_proj"),
        "output": ("attention.output.dense", "o_proj"),
        "up": ("intermediate.dense", "fc1"),
        "down": ("output.dense", "fc2"),
    }
    for name, weight in model.vit.named_parameters():
        stem = name.removesuffix(".weight")
        kind = next((k for k, v in ends.items() if stem != name and stem.endswith(v)), None)
        if kind and ".layer" in f".{name}":
            found.setdefault(kind, []).append(weight)
    return found


def _image(
    module: nn.Module, name: str, side: int, weights: dict[str, list[torch.Tensor]], layers: int = LAYERS
) -> Sample:
    inputs = {name: torch.randn(BATCH, 3, side, side)}
    return Sample(module=module.eval(), inputs=inputs, dynamic={name: {0: "batch"}}, weights=weights, layers=layers)


class _FusedBlock(nn.Module):
    """nanoGPT's block: one QKV Linear, hand-written causal attention, tanh GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.register_buffer("mask", torch.tril(torch.ones(TOKENS, TOKENS)).view(1, 1, TOKENS, TOKENS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm_1(x)).split(HIDDEN, dim=2)
        query, key, value = (
            part.view(part.shape[0], TOKENS, HEADS, HIDDEN // HEADS).transpose(1, 2) for part in (query, key, value)
        )
        scores = query @ key.transpose(-2, -1) / (HIDDEN // HEADS) ** 0.5
        scores = scores.masked_fill(self.mask == 0, -1e4)
        context = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(x.shape[0], TOKENS, HIDDEN)
        x = x + self.out(context)
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class _FusedGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, HIDDEN))
        self.blocks = nn.ModuleList(_FusedBlock() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def fused_qkv() -> Sample:
    model = _FusedGpt().eval()
    weights = {
        "qkv": [block.qkv.weight for block in model.blocks],
        "output": [block.out.weight for block in model.blocks],
        "up": [block.up.weight for block in model.blocks],
        "down": [block.down.weight for block in model.blocks],
        "head": [model.head.weight],
    }
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (BATCH, TOKENS))}
    return Sample(module=model, inputs=inputs, dynamic={"input_ids": {0: "batch"}}, weights=weights)


class _TorchDecoder(nn.Module):
    """torch's own encoder and decoder layers: self and cross attention, fused in_proj weights, post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(HIDDEN, HEADS, 64, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, memory)
        return self.head(x)


def cross_attention() -> Sample:
    model = _TorchDecoder().eval()
    weights = {
        "up": [layer.linear1.weight for layer in model.layers],
        "down": [layer.linear2.weight for layer in model.layers],
        "output": [a.out_proj.weight for layer in model.layers for a in (layer.self_attn, layer.multihead_attn)],
        "head": [model.head.weight],
    }
    inputs = {
        "input_ids": torch.randint(0, VOCABULARY, (BATCH, TOKENS)),
        "memory": torch.randn(BATCH, 7, HIDDEN),
    }
    return Sample(module=model, inputs=inputs, dynamic={name: {0: "batch"} for name in inputs}, weights=weights)


class _Residual(nn.Module):
    """A bottleneck with a depthwise convolution; the first of a stage projects its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(inputs, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        depthwise = nn.Conv2d(24, 24, 3, stride=stride, padding=1, groups=24, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.project(self.depthwise(self.expand(x))) + self.shortcut(x))


def cnn() -> Sample:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = [_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 32, 1)]
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    for module in model.modules():  # batch norms that do something, so that folding them wrongly shows
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    weights = {
        "stem": [stem[0].weight],
        "depthwise": [b.depthwise[0].weight for b in blocks],
        "head": [model[-1].weight],
    }
    return _image(model, "image", 16, weights, layers=len(blocks))


ZOO: dict[str, Callable[[], Sample]] = {
    "bert": bert,
    "bert_eager": functools.partial(bert, "eager"),
    "bert_classifier": bert_classifier,
    "bert_masked_lm": bert_masked_lm,
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "llama_eager": functools.partial(llama, "eager"),
    "qwen3": qwen3,
    "t5_encoder": t5_encoder,
    "vit": vit,
    "vit_eager": functools.partial(vit, "eager"),
    "fused_qkv": fused_qkv,
    "cross_attention": cross_attention,
    "cnn": cnn,
}


def build(name: str) -> Sample:
    """Return the model called ``name``, always with the same weights and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample = ZOO[name]()
        with torch.no_grad():
            for parameter in sample.module.parameters():
                if parameter.ndim == 1:  # norms that do something: exporters merge those that all hold ones
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return sample


def export(name: str, exporter: Exporter, folder: Path) -> Path:
    """Export the model called ``name`` to ``folder/<name>-<exporter>.onnx`` with dynamic axes, and return the path."""
    return export_sample(build(name), exporter, folder / f"{name}-{exporter}.onnx")


def export_sample(sample: Sample, exporter: Exporter, path: Path) -> Path:
    """Export ``sample`` to ``path``; warnings of torch and transformers are not the tests' business."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the legacy exporter does not know its fused operator
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _trace(sample, exporter, path)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return path


def _trace(sample: Sample, exporter: Exporter, path: Path) -> None:
    names = list(sample.inputs)
    arguments = tuple(sample.inputs.values())
    if exporter == "legacy":
        torch.onnx.export(
            sample.module,
            arguments,
            path,
            input_names=names,
            dynamic_axes=sample.dynamic,
            opset_version=OPSET["legacy"],
            dynamo=False,
        )
    else:
        shapes = tuple(dict.fromkeys(sample.dynamic[name], torch.export.Dim.DYNAMIC) for name in names)
        if isinstance(sample.module, _Tensors):
            shapes = (shapes,)  # its forward takes *inputs, one argument to torch.export
        torch.onnx.export(
            sample.module,
            arguments,
            path,
            input_names=names,
            dynamic_shapes=shapes,
            opset_version=OPSET["dynamo"],
            dynamo=True,
            verbose=False,
        )


@functools.cache
def exported(name: str, exporter: Exporter) -> Path:
    """Return the exported model, written once per process to a folder that goes with it."""
    return export(name, exporter, _folder())


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
