"""BERT encoders (post-norm, padding mask) with a classification or a masked-language-model head, as a tape.

It does not use TransformerLens: the module itself is read, and every run is compared with the module's own outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.decomposition.operations import Add, Attention, Function, Linear, Normalize, Operation
from mechinterp.engines.decomposition.subject import TOLERANCE, Pass, head_totals
from mechinterp.engines.decomposition.tape import HEAD, Tape
from mechinterp.models.activation import activation_function
from mechinterp.models.attention import AttentionScores, softmax_where
from mechinterp.models.interventions import Run, SiteLike
from mechinterp.models.layout import Dims
from mechinterp.models.load import open_encoder
from mechinterp.models.modes import EvalMode, Gradients
from mechinterp.models.norm import measure_norm
from mechinterp.models.refusal import refusing
from mechinterp.models.sites import Site
from mechinterp.models.source import ModelInfo
from mechinterp.models.tokens import check_tokens
from mechinterp.tasks.pairs import Pairs

HEADS = ("BertForSequenceClassification", "BertForMaskedLM")
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")
"""`resid_pre.0` is the embedding after its norm; `resid_mid` and `resid_post` are after the norms of the sums."""


@dataclass(frozen=True)
class EncoderLayout:
    """The unembedding (to classes or tokens), and the size of the MLPs."""

    W_U: Float[Tensor, "d_model n_logits"]
    b_U: Float[Tensor, " n_logits"] | None
    n_neurons: int

    def neurons(self, layer: int) -> Any:
        """An object with the `W_out` of an MLP; all layers have the same size."""
        return _Neurons(self.W_U.new_empty(self.n_neurons, 0))


@dataclass(frozen=True)
class _Neurons:
    W_out: Tensor


class Encoder:
    """A BERT with a head, for contextual decomposition. Made by `mechinterp.load_encoder`; the module is not changed.

    Logits are classes (read at the first token, through the pooler) or tokens (read at the answer positions, or at
    `position=`). Token types are all 0.

    Args:
        module: The Hugging Face module.
        info: Where it came from.
        tokenizer: Its tokenizer; None: prompts are given as token ids.
    """

    def __init__(self, module: nn.Module, info: ModelInfo, tokenizer: Any = None) -> None:
        if info.architecture not in HEADS:
            raise UnsupportedError(f"{info.architecture} is not supported; encoders are {' and '.join(HEADS)}.")
        self.module: Any = module
        self.info, self.tokenizer = info, tokenizer
        config: Any = module.config
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise UnsupportedError(f"{info.architecture} is configured as a decoder; only encoders are supported.")
        self.classifies = info.architecture == "BertForSequenceClassification"
        body: Any = module
        out = body.classifier if self.classifies else body.cls.predictions.decoder
        self.layout = EncoderLayout(out.weight.detach().T, out.bias.detach(), int(config.intermediate_size))
        self.dims = Dims(
            n_layers=int(config.num_hidden_layers),
            n_heads=int(config.num_attention_heads),
            n_kv_heads=int(config.num_attention_heads),
            d_model=int(config.hidden_size),
            d_head=int(config.hidden_size) // int(config.num_attention_heads),
            d_vocab=int(config.vocab_size),
            d_vocab_out=int(out.weight.shape[0]),
            n_ctx=int(config.max_position_embeddings),
            has_mlp=True,
            parallel=False,
            causal=False,
        )
        self._layers = _layer_operations(module)
        self._head = _head_operations(module, self.classifies)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layout.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.layout.W_U.dtype

    def __repr__(self) -> str:
        return f"Encoder({self.info.name}, {self.dims.n_layers} layers x {self.dims.n_heads} heads, {self.dtype})"

    def has(self, site: Site) -> bool:
        """Whether the encoder has the site."""
        inside = site.layer is not None and 0 <= site.layer < self.dims.n_layers
        return (inside and site.kind in (*SITES, "resid_post")) or site.kind == "resid_final"

    def resolve(self, site: Site | str) -> str:
        """The tape's name of a site. Raises InputError for a site that does not exist."""
        site = Site.parse(site) if isinstance(site, str) else site
        if site.layer is not None and not 0 <= site.layer < self.dims.n_layers:
            raise InputError(f"Site '{site}' does not exist: the model has layers 0 to {self.dims.n_layers - 1}.")
        if not self.has(site):
            raise UnsupportedError(f"{self.info.architecture} has no site '{site}'; it has {', '.join(SITES)}.")
        return self.name(site)

    def name(self, site: Site) -> str:
        """The tape's name of a site: the stream after a layer has the name of that before the next."""
        if site.kind == "pattern" or not self.has(site):
            raise InputError(f"Contextual decomposition of an encoder does not split the site '{site}'.")
        if site.kind == "resid_post":
            last = site.layer is None or site.layer + 1 == self.dims.n_layers
            return "resid_final" if last else f"resid_pre.{(site.layer or 0) + 1}"
        return str(site)

    def read_at(self, pairs: Pairs) -> Int[Tensor, "batch n_at"]:
        """Where logits are read: at the first token for classes, at the answer positions for tokens."""
        return torch.zeros_like(pairs.answer_pos[:, :1]) if self.classifies else pairs.answer_pos

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        record: Iterable[Site] = (),
        stop: Site | None = None,
    ) -> Run:
        """The values at sites (`stop` has no effect): one forward, compared with the module's own outputs."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        totals, _ = self._totals(tokens.to(self.device), mask.to(self.device))
        found: dict[SiteLike, Tensor] = {}
        for site in record:
            found[site] = totals[str(site) if site.kind == "pattern" else self.resolve(site)]
        return Run(None, found, {}, None, None)

    def run_pass(
        self,
        pairs: Pairs,
        at: Int[Tensor, "batch n_at"],
        columns: Int[Tensor, " n_columns"] | None,
        *,
        scores: bool,
        values: Mapping[Site, Tensor] | None = None,
    ) -> Pass:
        """The totals of a batch's clean prompts."""
        totals, worst = self._totals(pairs.clean, pairs.mask)
        head = self._head if columns is None else [*self._head[:-1], _columns_of(self._head[-1], columns)]
        tape = self._tape(head)
        head_totals(tape, totals, at)
        seen = self._visible(pairs.mask)
        visible = {name: seen for name in tape.visible}
        return Pass(tape, totals, visible, worst)

    def _tape(self, head: list[Operation]) -> Tape:
        patterns = {f"z.{layer}": f"pattern.{layer}" for layer in range(self.dims.n_layers)}
        return Tape((*self._layers, *head), patterns)

    def _visible(self, mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch 1 query key"]:
        return mask[:, None, None].expand(-1, 1, mask.shape[1], -1)

    def _totals(self, tokens: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], float]:
        """Every value up to the final stream by the tape, and how far it is from the module's own."""
        module: Any = self.module
        check_tokens(tokens, mask, self.dims, self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        with Gradients(False) as off, off, EvalMode(module) as evaluating, evaluating:
            own = module(tokens, attention_mask=mask.long(), output_hidden_states=True)
        streams = [hidden.to(wide) for hidden in own.hidden_states]
        totals: dict[str, Tensor] = {"resid_pre.0": streams[0]}
        with Gradients(False) as off, off:
            for op in self._layers:
                given = [totals[name] for name in op.inputs]
                if isinstance(op, Attention):
                    assert op.scores is not None
                    pattern = softmax_where(op.scores(*given[:2]), self._visible(mask))
                    totals[f"pattern.{op.output.partition('.')[2]}"] = pattern
                    given = [pattern, given[2]]
                totals[op.output] = op.apply(given)
        worst = 0.0
        names = [*(f"resid_pre.{layer}" for layer in range(self.dims.n_layers)), "resid_final"]
        for name, stream in zip(names, streams, strict=True):
            gap = torch.where(mask[..., None], totals[name] - stream, 0).abs().max()
            worst = max(worst, float(gap / torch.where(mask[..., None], stream, 0).abs().max()))
        worst = max(worst, self._head_gap(totals, own.logits.to(wide), mask))
        if not worst < (TOLERANCE if self.dtype in (torch.float32, torch.float64) else 5e-2):
            raise UnsupportedError(
                f"{self.info.architecture}: its layers do not compute what the weights give (off by {worst:.2g} of the "
                "size): contextual decomposition has no rule for what this encoder does."
            )
        return totals, worst

    def _head_gap(self, totals: dict[str, Tensor], logits: Tensor, mask: Tensor) -> float:
        everywhere = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
        at = everywhere[:, :1] if self.classifies else everywhere
        copy = dict(totals)
        with Gradients(False) as off, off:
            head_totals(self._tape(self._head), copy, at)
        logits = logits[:, None] if self.classifies else logits
        real = mask[:, : at.shape[1], None]
        gap = torch.where(real, copy["logits"] - logits, 0).abs().max()
        return float(gap / (torch.where(real, logits, 0).abs().max() + 1e-30))


def _dense(module: Any, name: str, output: str, kind: str = "linear") -> Linear:
    weight, bias = module.weight.detach(), module.bias
    return Linear((name,), output, weight.T, None if bias is None else bias.detach(), (weight.shape[0],), kind)


def _norm(module: Any, name: str, output: str) -> Normalize:
    weight = module.weight
    return Normalize((name,), output, measure_norm(output, module, weight, weight.shape[0]))


def _layer_operations(module: Any) -> list[Operation]:
    config = module.config
    n_heads, d_model = int(config.num_attention_heads), int(config.hidden_size)
    shape = (n_heads, d_model // n_heads)
    scores = AttentionScores(shape[1] ** -0.5)
    act = activation_function(str(config.hidden_act))
    out: list[Operation] = []
    for i, layer in enumerate(module.bert.encoder.layer):
        resid, middle = f"resid_pre.{i}", f"resid_mid.{i}"
        after = f"resid_pre.{i + 1}" if i + 1 < int(config.num_hidden_layers) else "resid_final"
        own = layer.attention.self
        for name, part in (("q", own.query), ("k", own.key), ("v", own.value)):
            weight, bias = part.weight.detach(), part.bias.detach()
            out.append(Linear((resid,), f"{name}.{i}", weight.T, bias, shape))
        out.append(Attention((f"q.{i}", f"k.{i}", f"v.{i}"), f"z.{i}", scores))
        dense = layer.attention.output.dense
        weight, bias = dense.weight.detach().T, dense.bias.detach()
        out.append(Linear((f"z.{i}",), f"attn_out.{i}", weight, bias, (d_model,), "attention_out", 2))
        out.append(Add((resid, f"attn_out.{i}"), f"attn_sum.{i}", "attention_sum"))
        out.append(_norm(layer.attention.output.LayerNorm, f"attn_sum.{i}", middle))
        out.append(_dense(layer.intermediate.dense, middle, f"mlp_pre.{i}", "mlp_in"))
        out.append(Function((f"mlp_pre.{i}",), f"mlp_post.{i}", act))
        out.append(_dense(layer.output.dense, f"mlp_post.{i}", f"mlp_out.{i}", "mlp_out"))
        out.append(Add((middle, f"mlp_out.{i}"), f"mlp_sum.{i}", "mlp_sum"))
        out.append(_norm(layer.output.LayerNorm, f"mlp_sum.{i}", after))
    return out


def _head_operations(module: Any, classifies: bool) -> list[Operation]:
    if classifies:
        return [
            _dense(module.bert.pooler.dense, "resid_final", "head_pre"),
            Function(("head_pre",), "head_post", torch.tanh),
            _dense(module.classifier, "head_post", "logits"),
        ]
    transform = module.cls.predictions.transform
    return [
        _dense(transform.dense, "resid_final", "head_pre"),
        Function(("head_pre",), "head_post", activation_function(str(module.config.hidden_act))),
        _norm(transform.LayerNorm, "head_post", "final_norm"),
        _dense(module.cls.predictions.decoder, "final_norm", "logits"),
    ]


def _columns_of(op: Operation, columns: Int[Tensor, " n_columns"]) -> Linear:
    """The last product, for some of its columns."""
    assert isinstance(op, Linear) and op.output in HEAD
    bias = None if op.bias is None else op.bias[columns]
    return Linear(op.inputs, op.output, op.weight[:, columns], bias, (len(columns),), op.kind)


def load_encoder(
    spec: Any,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """A BERT with a classification or masked-language-model head, for `contextual_decomposition`.

    Args:
        spec: A local directory (from `save_pretrained`), a hub id with an optional `@revision`, or a module in memory,
            which is used as it is and not changed.
        revision: The branch, tag or commit of a hub id.
        dtype: The dtype to compute in; by default float32. Not for a module in memory.
        device: Where to put the model; by default the CPU. Not for a module in memory.
        tokenizer: A Hugging Face tokenizer; by default the one that is saved with the model, if any.
        trust_remote_code: Whether transformers may run code from the hub repository.

    Raises InputError when the model cannot be found, UnsupportedError for another architecture.
    """
    with Gradients(torch.is_grad_enabled()) as as_before, as_before:
        module, info, tokenizer = open_encoder(
            spec,
            revision=revision,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        with refusing(f"{info.architecture} cannot be read as a BERT with a head", module.config):
            return Encoder(module, info, tokenizer)
