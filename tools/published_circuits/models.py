"""The models of the published circuits: what is known of them without their weights."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import LOADER
from mechinterp.circuit_file.schema import DimsRecord, ModelRecord

GPT2_SMALL = ModelRecord(
    name="openai-community/gpt2",
    origin="hub",
    # What `main` resolves to in the documentation of huggingface_hub (`resolve_revision`).
    revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    architecture="GPT2LMHeadModel",
    dims=DimsRecord(
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        d_model=768,
        d_head=64,
        d_vocab=50257,
        d_vocab_out=50257,
        n_ctx=1024,
        has_mlp=True,
        parallel=False,
        causal=True,
    ),
    processing="raw",
    dtype="float32",
    loader=LOADER,
)
# On the hub, but not as a transformers model, so that no name opens it: it has to be given, as a native bridge.
# Sizes: TransformerLens, for its alias attn-only-4l.
ATTN_ONLY_4L = ModelRecord(
    name="NeelNanda/Attn_Only_4L512W_C4_Code",
    origin="memory",
    architecture="TransformerLensNative",
    dims=DimsRecord(
        n_layers=4,
        n_heads=8,
        n_kv_heads=8,
        d_model=512,
        d_head=64,
        d_vocab=48262,
        d_vocab_out=48262,
        n_ctx=1024,
        has_mlp=False,
        parallel=False,
        causal=True,
    ),
    processing="raw",
    dtype="float32",
    loader=LOADER,
)


def compiled(
    name: str, weights_sha256: str, *, n_layers: int, d_model: int, d_head: int, d_vocab: int, d_vocab_out: int
) -> ModelRecord:
    """A model compiled by Tracr from a published program, with the weights in tests/data/known-circuits."""
    return ModelRecord(
        name=name,
        origin="memory",
        weights_sha256=weights_sha256,
        architecture="TransformerLensNative",
        dims=DimsRecord(
            n_layers=n_layers,
            n_heads=1,
            n_kv_heads=1,
            d_model=d_model,
            d_head=d_head,
            d_vocab=d_vocab,
            d_vocab_out=d_vocab_out,
            n_ctx=6,
            has_mlp=True,
            parallel=False,
            causal=False,
        ),
        processing="raw",
        dtype="float32",
        loader=LOADER,
    )


TRACR_REVERSE = compiled(
    "tracr-reverse",
    "ed92d16b56e86f1492ba4b096fca9c8562415bb8d2658bf309610e7c30ab9ec4",
    n_layers=4,
    d_model=41,
    d_head=12,
    d_vocab=5,
    d_vocab_out=3,
)
TRACR_XPROPORTION = compiled(
    "tracr-xproportion",
    "b45fb353ecc7340b4159f36578d6f3a69e7f453ae1145f509fde5216c90854e5",
    n_layers=2,
    d_model=14,
    d_head=7,
    d_vocab=6,
    d_vocab_out=1,
)
