"""Whether the model at hand is the one that a file states."""

from __future__ import annotations

from mechinterp.circuit_file.provenance import model_record, tokenizer_record
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.verify.claims import Ledger
from mechinterp.models.hook_manager import HookManager


def check_model(document: CircuitFile, model: HookManager, given: bool, ledger: Ledger) -> None:
    """Record a claim for each part of the model and its tokenizer; where it was loaded from, unless it was given."""
    stated, got = document.model, model_record(model)
    for name in ("architecture", "dims", "weights_sha256", "processing", "dtype", "attention", "loader"):
        if name != "weights_sha256" or stated.weights_sha256 is not None:
            ledger.equal(f"model.{name}", getattr(got, name), getattr(stated, name))
    if not given:
        ledger.equal("model.origin", got.origin, stated.origin)
        ledger.equal("model.revision", got.revision, stated.revision)
    tokenizer = document.tokenizer
    if tokenizer is None:
        return
    found = tokenizer_record(model.tokenizer, tokenizer.prepend_bos)
    if found is None and not any(entry.made_from.kind == "task" for entry in document.pairs.values()):
        ledger.notes.append("The model has no tokenizer here; the pairs are token ids, so none is needed.")
        return
    ledger.equal("tokenizer", found and found.vocabulary_sha256, tokenizer.vocabulary_sha256)
    ledger.equal("tokenizer.n_tokens", found and found.n_tokens, tokenizer.n_tokens)
    begins = {entry.made_from.prepend_bos for entry in document.pairs.values() if entry.made_from.kind == "task"}
    if begins:  # the pairs themselves are made again elsewhere; here the file must not contradict itself
        got = tokenizer.prepend_bos if tokenizer.prepend_bos in begins else next(iter(begins))
        ledger.equal("tokenizer.prepend_bos", got, tokenizer.prepend_bos)
