"""The tuned lens: one affine map per layer from its residual stream to one that the final norm can read.

Source: Belrose et al. 2023 (arXiv 2303.08112): the map starts at the identity and is trained to minimise
KL(model || lens). Here at every `resid_pre`; the paper's residual after layer l is our `resid_pre` of layer l + 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import FormatError, InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site
from mechinterp.models.tokens import check_tokens

FORMAT = "mechinterp.tuned_lens.1"
MAX_BYTES = 2**33
"""A larger file is refused before it is read."""


@dataclass(frozen=True, eq=False)
class TunedLens:
    """`resid + resid @ weight[layer] + bias[layer]`; call it as `lens(site, resid)`, or give it to `logit_lens`."""

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    provenance: Mapping[str, str]
    """The model (name, revision, weights_sha256), the training prompts (digest, count) and the training's settings."""

    def __call__(self, site: Site, resid: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The stream that the final norm reads. Raises InputError for a site that has no trained map."""
        if site.kind == "resid_final":
            return resid
        layer = (site.layer or 0) + (site.kind == "resid_post")
        if site.kind not in ("resid_pre", "resid_post") or layer > len(self.weight):
            raise InputError(
                f"The tuned lens has a map for every resid_pre (and resid_final as it is), not for '{site}'."
            )
        if layer == len(self.weight):
            return resid  # after the last layer it is the final residual stream
        weight, bias = (part[layer].to(resid) for part in (self.weight, self.bias))
        return resid + resid @ weight + bias

    def check_model(self, model: HookManager) -> None:
        """Return None when the lens was trained on this model's weights. Raises InputError otherwise."""
        trained_on, here = self.provenance["weights_sha256"], model.info.weights_sha256()
        if trained_on != here:
            raise InputError(
                f"The lens was trained on {self.provenance['model']} (weights {trained_on[:12]}), not on "
                f"{model.info.name} as it is here (weights {here[:12]})."
            )


def train_tuned_lens(
    model: HookManager,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    steps: int = 250,
    learning_rate: float = 1e-2,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = no_progress,
) -> TunedLens:
    """A lens trained on every real token of the prompts: all layers together, Adam, the rate decaying linearly to 0.

    Each step minimises the mean of KL(model || lens) over tokens drawn with the seed, in nats, through the model's own
    final norm, unembedding and soft cap. The same call gives the same lens. During training each layer's stream is
    divided by its root mean square over the prompts, so that one rate suits all layers.

    Args:
        model: The model.
        tokens: The training prompts.
        mask: True at the real tokens; by default everywhere.
        steps: Training steps.
        learning_rate: At the first step, for streams of this scale; it is divided by sqrt(d_model).
        batch_size: Tokens per step.
        seed: Of the tokens that are drawn.
        progress: Called after every step.

    Cost: one forward of the prompts, and per step `n_layers + 1` unembeddings of `batch_size` tokens forward and
    `n_layers` backward. Memory: the residual streams of all prompts, `n_layers * tokens * d_model`.

    Raises InputError for prompts that the model cannot read, and a training that gives NaN (lower the rate).

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> prompts = mi.load_task("ioi").pairs(model, n=16, split="train")
    >>> lens = mi.train_tuned_lens(model, prompts.clean, prompts.mask, steps=5, batch_size=32)
    >>> read = mi.logit_lens(model, prompts, sites=["resid_pre.2", "resid_final"], lens=lens)
    """
    if steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise InputError("`steps` and `batch_size` must be at least 1 and `learning_rate` positive.")
    tokens, _ = check_tokens(tokens, mask, model.dims, model.device)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(model.device).bool()
    layers, final = range(model.dims.n_layers), Site("resid_final")
    wide = torch.promote_types(model.dtype, torch.float32)
    sites = [Site("resid_pre", layer) for layer in layers]
    values: dict[Site, list[Tensor]] = {site: [] for site in [*sites, final]}
    for rows in torch.arange(len(tokens)).split(64):
        run = model.run(tokens[rows], real[rows], record=[*sites, final], stop=final)
        for site, kept in values.items():
            kept.append(run.values[site][real[rows]].to(wide))
    streams = torch.stack([torch.cat(values[site]) for site in sites])
    last = torch.cat(values[final])
    scale = streams.pow(2).mean((1, 2)).sqrt()
    d_model = model.dims.d_model
    weight = torch.zeros(len(sites), d_model, d_model, device=model.device, dtype=wide, requires_grad=True)
    bias = torch.zeros(len(sites), d_model, device=model.device, dtype=wide, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate / d_model**0.5)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = torch.randint(len(last), (batch_size,), generator=generator).to(model.device)
        with Gradients(False) as off, off:
            own = model.layout.unembed(last[drawn]).log_softmax(-1)
        with Gradients(True) as on, on:
            given = streams[:, drawn] / scale[:, None, None]
            moved = given + torch.bmm(given, weight) + bias[:, None]
            # Layer by layer: [layer, token, d_vocab] would not fit for a real vocabulary.
            for layer in layers:
                says = model.layout.unembed(moved[layer] * scale[layer]).log_softmax(-1)
                loss = (own.exp() * (own - says)).sum(-1).mean()
                loss.backward(retain_graph=layer + 1 < len(layers))  # pyright: ignore[reportUnknownMemberType]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate / d_model**0.5 * (1 - step / steps)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        optimizer.zero_grad()
        progress(step + 1, steps)
    trained, shift = weight.detach(), bias.detach() * scale[:, None]
    if not bool(trained.isfinite().all() and shift.isfinite().all()):
        raise InputError(f"The training gave NaN at a learning rate of {learning_rate:g}; lower it.")
    return TunedLens(trained, shift, _provenance(model, tokens, real, steps, learning_rate, batch_size, seed))


def _provenance(model: HookManager, tokens: Tensor, real: Tensor, *settings: int | float) -> dict[str, str]:
    from importlib.metadata import version

    digest = hashlib.sha256()
    for row, keep in zip(tokens.cpu(), real.cpu(), strict=True):
        digest.update(json.dumps(row[keep].tolist()).encode())
    names = ("steps", "learning_rate", "batch_size", "seed")
    return {
        "format": FORMAT,
        "model": model.info.name,
        "revision": model.info.revision or "",
        "weights_sha256": model.info.weights_sha256(),
        "processing": model.info.processing,
        "prompts_sha256": digest.hexdigest(),
        "tokens": str(int(real.sum())),
        "torch": torch.__version__,
        "mechinterp": version("mechinterp-circuits"),
        **{name: repr(value) for name, value in zip(names, settings, strict=True)},
    }


def save_lens(path: str | os.PathLike[str], lens: TunedLens) -> None:
    """Return None after writing the lens to `path` as safetensors, whole or not at all."""
    tensors = {"weight": lens.weight.cpu().contiguous(), "bias": lens.bias.cpu().contiguous()}
    write_whole(path, save(tensors, dict(lens.provenance)))


def load_lens(path: str | os.PathLike[str]) -> TunedLens:
    """The lens in a file that `save_lens` wrote. Raises FormatError, in one line, for any other file."""
    source = Path(path)
    try:
        if source.stat().st_size > MAX_BYTES:
            raise FormatError(f"{str(source)!r} is larger than {MAX_BYTES:,} bytes; a tuned lens is smaller.")
        with safe_open(source, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            opened: Any = file
            about = dict(opened.metadata() or {})
            if set(opened.keys()) != {"weight", "bias"} or about.get("format") != FORMAT:
                raise FormatError(f"{str(source)!r} is not a tuned lens of this package (format {FORMAT}).")
            weight, bias = (opened.get_tensor(name) for name in ("weight", "bias"))
    except OSError as error:
        raise FormatError(f"Cannot read {str(source)!r}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise FormatError(f"{str(source)!r} is not a safetensors file: {str(error).partition(chr(10))[0]}.") from error
    if weight.ndim != 3 or weight.shape[1] != weight.shape[2] or bias.shape != weight.shape[:2]:
        raise FormatError(
            f"{str(source)!r} has maps of shapes {list(weight.shape)} and {list(bias.shape)}, which do not match."
        )
    if not (weight.is_floating_point() and bias.is_floating_point()):
        raise FormatError(f"{str(source)!r} has integer maps; they must be floats.")
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise FormatError(f"{str(source)!r} holds NaN or infinity.")
    if missing := {"model", "weights_sha256"} - set(about):
        raise FormatError(f"{str(source)!r} does not name its model ({', '.join(sorted(missing))} missing).")
    return TunedLens(weight, bias, about)
