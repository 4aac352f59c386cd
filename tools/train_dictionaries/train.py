"""Train the bundled dictionaries: `python -m tools.train_dictionaries.train [--out DIRECTORY] [--only m1 a0 ...]`.

One basis each for every MLP (a transcoder), every attention output and the residual stream before layers 1 to 3 and at
the end (autoencoders). Batch-top-k (Bussmann et al. 2024): in training the `k * batch` largest activations of a batch
are kept; for use, one threshold for all features (a JumpReLU), so that features do not compete. Everything is seeded;
one core takes about ten minutes.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.features.load import BUNDLED
from mechinterp.features.store import save_basis
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.sites import Site
from tools.train_bundled.corpus import documents
from tools.train_bundled.tokenizer import build_tokenizer

log = logging.getLogger("tools.train_dictionaries.train")
EMPTY = -1


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is trained."""

    features: int = 512
    k: int = 16
    documents: int = 6000
    steps: int = 1600
    batch: int = 1024
    learning_rate: float = 2e-3
    dead_after: int = 150
    """Steps without firing after which a feature is dead, and helps to explain the error (auxiliary loss)."""
    auxiliary: float = 1 / 8
    seed: int = 0


def sites_of(n_layers: int) -> dict[str, tuple[str, str]]:
    """(what is read, what is reconstructed) of every dictionary, by its name."""
    found = {f"m{layer}": (f"mlp_in.{layer}", f"mlp_out.{layer}") for layer in range(n_layers)}
    found |= {f"a{layer}": (f"attn_out.{layer}", f"attn_out.{layer}") for layer in range(n_layers)}
    streams = [f"resid_pre.{layer}" for layer in range(1, n_layers)] + ["resid_final"]
    return found | {site: (site, site) for site in streams}


def prompts(model: mi.HookManager, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of documents of the corpus, `<bos>` first."""
    tokenizer = build_tokenizer() if model.tokenizer is None else model.tokenizer
    rows: list[list[int]] = []
    for document in documents(seed):
        ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list(document.words))]
        rows.append(ids[: model.dims.n_ctx])
        if len(rows) == count:
            break
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def activations(model: mi.HookManager, tokens: Tensor, mask: Tensor, sites: list[str]) -> dict[str, Tensor]:
    """The values of the sites at every real token, one row each."""
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}
    for rows in torch.arange(len(tokens)).split(256):
        run = model.run(tokens[rows], mask[rows], record=sites)
        for site in sites:
            kept[site].append(run.values[site][mask[rows]])
    return {site: torch.cat(values) for site, values in kept.items()}


def train(read: Tensor, written: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], float]:
    """(W_enc, W_dec, b_enc, b_dec; the threshold) of a dictionary that reconstructs `written` from `read`."""
    generator = torch.Generator().manual_seed(recipe.seed)
    n, k, d_in, d_out = recipe.features, recipe.k, read.shape[1], written.shape[1]
    in_mean, out_mean = read.mean(0), written.mean(0)
    in_size = (read - in_mean).norm(dim=1).mean() / d_in**0.5
    out_size = (written - out_mean).norm(dim=1).mean() / d_out**0.5
    x_all, y_all = (read - in_mean) / in_size, (written - out_mean) / out_size
    same = read is written
    draw = torch.randint(len(x_all), (n,), generator=generator)
    W_enc = torch.nn.functional.normalize(x_all[draw] + 0.1 * torch.randn(n, d_in, generator=generator), dim=1).T
    W_dec = W_enc.T if same else torch.nn.functional.normalize(torch.randn(n, d_out, generator=generator), dim=1)
    parts = {"W_enc": W_enc.clone(), "W_dec": W_dec.clone(), "b_enc": torch.zeros(n), "b_dec": torch.zeros(d_out)}
    for part in parts.values():
        part.requires_grad_(True)
    optimizer = torch.optim.Adam(parts.values(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    idle, threshold = torch.zeros(n), 0.0
    for step in range(recipe.steps):
        rows = torch.randint(len(x_all), (recipe.batch,), generator=generator)
        x, y = x_all[rows], y_all[rows]
        pre = (x @ parts["W_enc"] + parts["b_enc"]).relu()
        least = pre.detach().flatten().topk(k * recipe.batch).values[-1]
        features = pre * (pre >= least)
        error = y - features @ parts["W_dec"] - parts["b_dec"]
        loss = error.square().mean()
        idle = torch.where((features > 0).any(0), 0, idle + 1)
        dead = idle > recipe.dead_after
        if bool(dead.any()):
            own = x @ parts["W_enc"][:, dead] + parts["b_enc"][dead]
            best = own.topk(min(32, own.shape[1]), dim=1)
            own = torch.zeros_like(own).scatter(1, best.indices, best.values.relu())
            loss = loss + recipe.auxiliary * (error.detach() - own @ parts["W_dec"][dead]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            parts["W_dec"] /= parts["W_dec"].norm(dim=1, keepdim=True)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, 5 * (1 - (step + 1) / recipe.steps))
        threshold = float(least) if step == 0 else 0.99 * threshold + 0.01 * float(least)
    # Back to the model's units: pre is of the normalised input, so activations are unscaled, directions in real size.
    found = {name: part.detach() for name, part in parts.items()}
    encoder = found["W_enc"] / in_size
    return {
        "W_enc": encoder,
        "b_enc": found["b_enc"] - in_mean @ encoder,
        "W_dec": found["W_dec"] * out_size,
        "b_dec": found["b_dec"] * out_size + out_mean,
    }, threshold


def cross_entropy(model: mi.HookManager, tokens: Tensor, mask: Tensor, edits: list[Any]) -> float:
    """The mean loss in nats of predicting every real token but the first."""
    logits = model.run(tokens, mask, interventions=edits).logits
    assert logits is not None
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return float(losses[mask[:, 1:].flatten()].double().mean())


def card(model: mi.HookManager, basis: mi.Dictionary, recipe: Recipe) -> dict[str, Any]:
    """How good a dictionary is on documents that it was not trained on."""
    tokens, mask = prompts(model, min(512, recipe.documents), recipe.seed + 1)
    read, written = str(basis.sites_in[0]), str(basis.sites_out[0])
    values = activations(model, tokens, mask, [read, written])
    features = basis.encode(values[read])
    error = values[written] - basis.decode(features)[basis.sites_out[0]]
    spread = values[written] - values[written].mean(0)
    plain = cross_entropy(model, tokens, mask, [])
    with_it = cross_entropy(model, tokens, mask, mi.reconstructed(basis))
    mean = values[written].mean(0)
    without = cross_entropy(
        model, tokens, mask, [mi.Intervention(written, lambda value: mean.expand_as(value).clone())]
    )
    return {
        "variance_explained": round(1 - float(error.square().sum() / spread.square().sum()), 4),
        "l0": round(float((features.values > 0).sum(1).double().mean()), 2),
        "dead": int((~(features.values > 0).any(0)).sum()),
        "loss": round(plain, 4),
        "loss_reconstructed": round(with_it, 4),
        "loss_mean_ablated": round(without, 4),
        "loss_recovered": round((without - with_it) / (without - plain), 4),
        "documents": len(tokens),
        "tokens": int(mask.sum()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, save and log every dictionary."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_dictionaries.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--documents", type=int, default=Recipe.documents)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # sums in another order give other weights
    full = Recipe(steps=given.steps, documents=given.documents)
    model = mi.load_model("bundled")
    every = sites_of(model.dims.n_layers)
    wanted = {name: every[name] for name in given.only or every}
    tokens, mask = prompts(model, full.documents, full.seed)
    values = activations(model, tokens, mask, list(dict.fromkeys(site for pair in wanted.values() for site in pair)))
    for name, (read, written) in wanted.items():
        started = time.monotonic()
        if name[0] == "m":
            recipe = replace(full, features=256, k=12)
        else:
            recipe = replace(full, features=256) if name[0] == "a" else full
        parts, threshold = train(values[read], values[written], recipe)
        about = {key: str(value) for key, value in asdict(recipe).items()}
        about["command"] = "python -m tools.train_dictionaries.train"
        basis = mi.transcoder(
            read,
            written,
            **{key: value.half() for key, value in parts.items()},
            activation=mi.JumpRelu(torch.tensor(threshold)),
            source=BasisSource(f"bundled:{name}", "mechinterp", about=about),
        )
        assert basis.name == name, basis.name
        assert basis.sites_in == (Site.parse(read),)
        made = card(model, basis, recipe)
        save_basis(given.out / name, basis, model=model.info, card=made)
        log.info("%-12s %.0f s  %s", name, time.monotonic() - started, made)


if __name__ == "__main__":
    main()
