"""`Dictionary`: features with an affine encoder, an activation function and a linear decoder.

Sparse autoencoders, transcoders with and without skip, the layers of a cross-layer transcoder, crosscoders and linear
subspaces are all this, with one or several input and output sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.activations import Activation, Identity, Relu, numbers_of, tensors_of
from mechinterp.features.basis import MEMORY, PER_HEAD, Basis, by_site, check_ids, check_sites
from mechinterp.models.feature_basis import BasisSource, Features
from mechinterp.models.sites import Site

NORMALIZATIONS = ("none", "layer_norm", "constant_norm")
"""What is done to a token's vector before encoding, and undone after decoding (SAELens's names): subtract the mean and
divide by the standard deviation, or scale to length sqrt(d)."""


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary(Basis):
    """Features with an affine encoder, an activation function and a linear decoder.

    `activation((x - b_dec) @ W_enc + b_enc)` encodes (several sites: the products are summed; b_dec only with
    `subtract_b_dec`), `features @ W_dec + b_dec (+ x @ W_skip)` decodes. Made by `sae`, `transcoder`, `crosscoder`, ...

    Args:
        sites_in: What is read.
        sites_out: What is written to.
        W_enc: The encoder, `[n_in, d_in, feature]`: one matrix per input site.
        b_enc: Its bias, `[feature]`.
        W_dec: The decoder, `[feature, n_out, d_out]`: the direction of a feature at every output site.
        b_dec: The bias of the reconstruction, `[n_out, d_out]`.
        activation: The activation function.
        subtract_b_dec: Whether `b_dec` is subtracted before encoding.
        W_skip: What a skip transcoder adds of its input, `[d_in, d_out]`: `x @ W_skip`, at the first output site.
        normalize: What is done to a token's vector before encoding and undone after decoding.
        models: For a crosscoder over several models, their names, one per input site.
        label: Its name in addresses; by default that of what it writes to.
        source: Where it comes from.
        prefixes: For a Matryoshka dictionary, the sizes of its nested dictionaries.
        cross_layer: Whether it is a layer of a cross-layer transcoder, which reconstructs a site only together with the
            layers before it (the last one has one output site, like a transcoder).
    """

    stored_as: ClassVar[str] = "dictionary"
    sites_in: tuple[Site, ...]
    sites_out: tuple[Site, ...]
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    subtract_b_dec: bool = False
    W_skip: Tensor | None = None
    normalize: str = "none"
    models: tuple[str, ...] = ()
    label: str = ""
    source: BasisSource = MEMORY
    prefixes: tuple[int, ...] = ()
    cross_layer: bool = False

    def __post_init__(self) -> None:
        check_sites(self.sites_in, self.sites_out)
        for name, dims in (("W_enc", 3), ("b_enc", 1), ("W_dec", 3), ("b_dec", 2)):
            if getattr(self, name).ndim != dims:
                got = list(getattr(self, name).shape)
                raise InputError(f"{name} of a dictionary must have {dims} axes; got shape {got}.")
        n_in, d_in, n_features = self.W_enc.shape
        n_out, d_out = self.W_dec.shape[1:]
        expected = {
            "W_enc": (self.W_enc, (len(self.sites_in), d_in, n_features)),
            "b_enc": (self.b_enc, (n_features,)),
            "W_dec": (self.W_dec, (n_features, len(self.sites_out), d_out)),
            "b_dec": (self.b_dec, (len(self.sites_out), d_out)),
        }
        if self.W_skip is not None:
            expected["W_skip"] = (self.W_skip, (d_in, d_out))
        expected |= {name: (value, (n_features,)) for name, value in tensors_of(self.activation).items() if value.ndim}
        for name, (value, shape) in expected.items():
            if tuple(value.shape) != shape:
                raise InputError(
                    f"{name} of a dictionary of {n_features} features must be {list(shape)}; got {list(value.shape)}."
                )
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise InputError(f"{name} of a dictionary must hold finite floats.")
        if self.normalize not in NORMALIZATIONS:
            raise InputError(f"Unknown normalisation {self.normalize!r}. Known: {', '.join(NORMALIZATIONS)}.")
        if self.W_skip is not None and n_in != 1:
            raise InputError("A skip connection needs one input site; it adds to the first output site.")
        if self.normalize != "none" and not n_in == n_out == 1:
            raise InputError("A normalisation needs one input and one output site.")
        if self.subtract_b_dec and (n_in != n_out or d_in != d_out):
            raise InputError("`b_dec` is subtracted from the input only where input and output have the same shape.")
        if self.models and (len(self.models) != n_in or len(self.models) != n_out):
            raise InputError(f"{len(self.models)} models are named, for {n_in} inputs and {n_out} outputs.")
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < n <= n_features for n in self.prefixes):
            raise InputError(f"Prefixes are growing sizes up to {n_features}; got {list(self.prefixes)}.")

    @property
    def n_features(self) -> int:
        """How many features it has."""
        return self.W_enc.shape[2]

    @property
    def kind(self) -> str:
        """`subspace`, `crosscoder`, `sae`, `cross-layer transcoder` or `transcoder`."""
        if isinstance(self.activation, Identity):
            return "subspace"
        if self.models or len(self.sites_in) > 1:
            return "crosscoder"
        if self.sites_in == self.sites_out:
            return "sae"
        if self.cross_layer or len(self.sites_out) > 1:
            return "cross-layer transcoder"
        return "transcoder" if self.W_skip is None else "skip transcoder"

    @property
    def about(self) -> str:
        """The activation function, and the normalisation if there is one."""
        return self.activation.about + (f", {self.normalize}" if self.normalize != "none" else "")

    @property
    def keys_in(self) -> tuple[Any, ...]:
        """What the values of `encode` are called by: the input sites, or the models of a crosscoder over models."""
        return self.models or self.sites_in

    @property
    def keys_out(self) -> tuple[Any, ...]:
        """What the reconstructions are called by."""
        return self.models or self.sites_out

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as they are stored."""
        own = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        own |= {} if self.W_skip is None else {"W_skip": self.W_skip}
        return own | {f"activation.{name}": value for name, value in tensors_of(self.activation).items()}

    def settings(self) -> dict[str, Any]:
        """Everything else that it computes with, as JSON values."""
        return {
            "activation": {"name": self.activation.name, **numbers_of(self.activation)},
            "subtract_b_dec": self.subtract_b_dec,
            "normalize": self.normalize,
            "models": list(self.models),
            "prefixes": list(self.prefixes),
        } | ({"cross_layer": True} if self.cross_layer else {})

    def encode(self, x: Tensor | Mapping[Any, Tensor], /) -> Features:
        """The features of the value at the input site (several: of the values by site, or by model).

        Raises InputError for values of another width.
        """
        context: dict[str, Any] = {}
        total: Tensor | None = None
        for i, value in enumerate(by_site(self, x, self.keys_in)):
            site = self.sites_in[i]
            if site.kind in PER_HEAD:
                context["heads"] = value.shape[-2]
                value = value.flatten(-2)
            if value.shape[-1] != self.W_enc.shape[1]:
                raise InputError(
                    f"The basis '{self.name}' reads vectors of {self.W_enc.shape[1]} numbers at '{site}'; got "
                    f"{value.shape[-1]}. Is it of another model, or of another site?"
                )
            wide = torch.promote_types(torch.promote_types(value.dtype, self.W_enc.dtype), torch.float32)
            value = value.to(wide)
            if self.normalize != "none":
                value, statistics = _normalized(value, self.normalize)
                context |= statistics
            if self.W_skip is not None:
                context["input"] = value
            given = value - self.b_dec[i].to(value) if self.subtract_b_dec else value
            product = given @ self.W_enc[i].to(value)
            total = product if total is None else total + product
        assert total is not None
        return Features(self.activation(total + self.b_enc.to(total)), context)

    def decode(self, features: Features, /) -> dict[Any, Tensor]:
        """The reconstruction of every output site, by site (or by model)."""
        values, context = features.values, features.context
        if values.shape[-1] != self.n_features:
            raise InputError(f"The basis '{self.name}' has {self.n_features} features; got {values.shape[-1]} values.")
        found: dict[Any, Tensor] = {}
        for i, key in enumerate(self.keys_out):
            out = values @ self.W_dec[:, i].to(values) + self.b_dec[i].to(values)
            if self.W_skip is not None and i == 0:
                out = out + context["input"].to(out) @ self.W_skip.to(out)
            if self.normalize != "none":
                out = out * context["scale"] + context["mean"]
            if self.sites_out[i].kind in PER_HEAD:
                out = out.unflatten(-1, (context["heads"], -1))
            found[key] = out
        return found

    def writes(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The decoder's rows: `[feature, d]`, or `[feature, site, d]` for several output sites."""
        rows = self.W_dec if ids is None else self.W_dec[check_ids(self, ids).to(self.W_dec.device)]
        return rows[:, 0] if rows.shape[1] == 1 else rows

    def reads(self, ids: Sequence[int] | Tensor | None = None, /) -> Tensor:
        """The encoder's columns: `[feature, d]`, or `[feature, site, d]` for several input sites."""
        columns = self.W_enc if ids is None else self.W_enc[:, :, check_ids(self, ids).to(self.W_enc.device)]
        rows = columns.movedim(-1, 0)
        return rows[:, 0] if rows.shape[1] == 1 else rows

    def keep(self, ids: Sequence[int] | Tensor) -> Dictionary:
        """The dictionary of some of its features, whose activations stay the same: a cluster, a prefix.

        Raises InputError where features compete (top-k).
        """
        chosen = check_ids(self, ids).to(self.W_enc.device)
        return replace(
            self,
            W_enc=self.W_enc[:, :, chosen],
            b_enc=self.b_enc[chosen],
            W_dec=self.W_dec[chosen],
            activation=self.activation.keep(chosen),
            prefixes=(),
        )

    @property
    def reads_affinely(self) -> bool:
        """Whether a value is an activation function of `x @ reads + constant`: from one site, not normalised."""
        return self.normalize == "none" and len(self.sites_in) == 1

    def alone(self, ids: Sequence[int] | Tensor) -> Dictionary | None:
        """`keep` of some features; None where they compete (top-k)."""
        return None if self.activation.competes else self.keep(ids)

    def encode_each(self, x: Float[Tensor, "feature *axes d"]) -> Float[Tensor, "*axes feature"]:
        """The value of every feature when each reads an input of its own; for features that do not compete."""
        given = x - self.b_dec[0].to(x) if self.subtract_b_dec else x
        product = einsum(given, self.W_enc[0].to(x), "feature ... d, d feature -> ... feature")
        return self.activation(product + self.b_enc.to(x))

    def prefix(self, n: int) -> Dictionary:
        """The dictionary of the first `n` features: of a Matryoshka dictionary, one of its nested dictionaries."""
        if self.prefixes and n not in self.prefixes:
            raise InputError(f"The nested dictionaries of '{self.name}' have {list(self.prefixes)} features; got {n}.")
        return self.keep(list(range(n)))

    def decoder_norms(self) -> Float[Tensor, "feature n_out"]:
        """The length of each feature's direction at every output site: where, or in which model, a feature is."""
        return self.W_dec.norm(dim=-1)

    def with_unit_decoder(self) -> Dictionary:
        """The same dictionary with directions of length 1: the length goes into the encoder.

        Reconstruction and every effect of an ablation stay; activations are multiplied by the length. Features of
        length 0 stay as they are. Raises InputError for top-k, where the k largest would be others.
        """
        if not isinstance(self.activation, (Relu, Identity)):
            raise InputError(
                f"Folding the decoder's lengths is exact for ReLU and linear features, not for {self.about}."
            )
        lengths = self.W_dec.flatten(1).norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        return replace(
            self, W_enc=self.W_enc * lengths, b_enc=self.b_enc * lengths, W_dec=self.W_dec / lengths[:, None, None]
        )

    def with_input_scale(self, factor: float) -> Dictionary:
        """The dictionary for unscaled activations, if this one was trained on activations multiplied by `factor`.

        Activations of the features stay; the reconstruction is divided by `factor`. Raises InputError with a
        normalisation, which already fixes the scale, and for a factor that is not positive.
        """
        if self.normalize != "none":
            raise InputError(f"A dictionary with the normalisation {self.normalize!r} has no other input scale.")
        if not (factor > 0 and math.isfinite(factor)):
            raise InputError(f"The factor by which activations are multiplied must be positive; got {factor}.")
        return replace(self, W_enc=self.W_enc * factor, W_dec=self.W_dec / factor, b_dec=self.b_dec / factor)


def _normalized(value: Tensor, how: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(the normalised vectors, what undoes it). As in SAELens, 1e-5 is added before dividing, not after decoding."""
    if how == "layer_norm":
        mean = value.mean(-1, keepdim=True)
        scale = (value - mean).std(-1, keepdim=True)
        return (value - mean) / (scale + 1e-5), {"scale": scale, "mean": mean}
    scale = value.norm(dim=-1, keepdim=True) / value.shape[-1] ** 0.5
    return value / scale, {"scale": scale, "mean": torch.zeros_like(scale)}


def site_of(site: str | Site) -> Site:
    """The site, from its text if need be."""
    return Site.parse(site) if isinstance(site, str) else site


def sae(
    site: str | Site,
    W_enc: Float[Tensor, "d feature"],
    W_dec: Float[Tensor, "feature d"],
    *,
    b_enc: Float[Tensor, " feature"] | None = None,
    b_dec: Float[Tensor, " d"] | None = None,
    activation: Activation | None = None,
    subtract_b_dec: bool = False,
    normalize: str = "none",
    prefixes: Sequence[int] = (),
    label: str = "",
    source: BasisSource = MEMORY,
) -> Dictionary:
    """A sparse autoencoder at one site.

    Args:
        site: Where it reads and writes.
        W_enc: The encoder.
        W_dec: The decoder; a row is the direction that a feature writes.
        b_enc: The encoder's bias; by default 0.
        b_dec: The bias of the reconstruction; by default 0.
        activation: The activation function; by default ReLU.
        subtract_b_dec: Whether `b_dec` is subtracted before encoding.
        normalize: `none`, `layer_norm` or `constant_norm`.
        prefixes: For a Matryoshka dictionary, the sizes of its nested dictionaries.
        label: Its name in addresses; by default that of the site.
        source: Where it comes from.

    Raises InputError for shapes that do not fit.

    >>> basis = sae("resid_pre.1", torch.eye(4), torch.eye(4))
    >>> basis.encode(torch.tensor([1.0, -2.0, 0.0, 3.0])).values.tolist(), basis.address(3)
    ([1.0, 0.0, 0.0, 3.0], 'resid_pre.1.f3')
    """
    place = site_of(site)
    made = transcoder(
        place, place, W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, activation=activation, label=label, source=source
    )
    return replace(made, subtract_b_dec=subtract_b_dec, normalize=normalize, prefixes=tuple(prefixes))


def transcoder(
    site_in: str | Site,
    site_out: str | Site,
    W_enc: Float[Tensor, "d_in feature"],
    W_dec: Float[Tensor, "feature d_out"],
    *,
    b_enc: Float[Tensor, " feature"] | None = None,
    b_dec: Float[Tensor, " d_out"] | None = None,
    activation: Activation | None = None,
    W_skip: Float[Tensor, "d_in d_out"] | None = None,
    label: str = "",
    source: BasisSource = MEMORY,
) -> Dictionary:
    """A transcoder: features of one site that reconstruct another one, such as `mlp_in.3` and `mlp_out.3`.

    Args:
        site_in: What is read.
        site_out: What is reconstructed.
        W_enc: The encoder.
        W_dec: The decoder; a row is the direction that a feature writes.
        b_enc: The encoder's bias; by default 0.
        b_dec: The bias of the reconstruction; by default 0.
        activation: The activation function; by default ReLU.
        W_skip: A linear map from input to output beside the features (as in `x @ W_skip`).
        label: Its name in addresses; by default that of the output site.
        source: Where it comes from.

    Raises InputError for shapes that do not fit.
    """
    return Dictionary(
        (site_of(site_in),),
        (site_of(site_out),),
        W_enc[None],
        W_enc.new_zeros(W_enc.shape[1]) if b_enc is None else b_enc,
        W_dec[:, None],
        (W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec)[None],
        Relu() if activation is None else activation,
        W_skip=W_skip,
        label=label,
        source=source,
    )


def cross_layer_transcoder(
    sites_in: Sequence[str | Site],
    sites_out: Sequence[str | Site],
    W_enc: Float[Tensor, "layer d_in feature"],
    W_dec: Sequence[Float[Tensor, "feature _ d_out"]],
    *,
    b_enc: Float[Tensor, "layer feature"] | None = None,
    b_dec: Float[Tensor, "layer d_out"] | None = None,
    activation: Sequence[Activation] | Activation | None = None,
    W_skip: Float[Tensor, "layer d_in d_out"] | None = None,
    source: BasisSource = MEMORY,
) -> tuple[Dictionary, ...]:
    """A cross-layer transcoder as one basis per layer: what layer i reads, layers i, i + 1, ... are written.

    The reconstruction of an output site is the sum over the bases; each layer's `b_dec` and skip connection belong to
    the basis that reads there.

    Args:
        sites_in: What each layer reads.
        sites_out: What each layer's features may write to.
        W_enc: One encoder per layer.
        W_dec: Per layer the directions at its own and all later output sites.
        b_enc: The encoders' biases; by default 0.
        b_dec: The biases of the reconstructions; by default 0.
        activation: The activation function, one for all or one per layer; by default ReLU.
        W_skip: The skip connections, per layer.
        source: Where it comes from.

    Raises InputError for shapes that do not fit.
    """
    n = len(sites_in)
    if not n == len(sites_out) == len(W_enc) == len(W_dec):
        raise InputError(
            f"A cross-layer transcoder needs as many inputs, outputs, encoders and decoders; got {n}, "
            f"{len(sites_out)}, {len(W_enc)} and {len(W_dec)}."
        )
    rules = [activation] * n if activation is None or isinstance(activation, Activation) else list(activation)
    return tuple(
        cross_layer_features(
            sites_in[i],
            sites_out[i:],
            W_enc[i],
            W_dec[i],
            b_enc=None if b_enc is None else b_enc[i],
            b_dec=None if b_dec is None else b_dec[i],
            activation=rules[i],
            W_skip=None if W_skip is None else W_skip[i],
            source=source,
        )
        for i in range(n)
    )


def cross_layer_features(
    site_in: str | Site,
    sites_out: Sequence[str | Site],
    W_enc: Float[Tensor, "d_in feature"],
    W_dec: Float[Tensor, "feature n_out d_out"],
    *,
    b_enc: Float[Tensor, " feature"] | None = None,
    b_dec: Float[Tensor, " d_out"] | None = None,
    activation: Activation | None = None,
    W_skip: Float[Tensor, "d_in d_out"] | None = None,
    source: BasisSource = MEMORY,
) -> Dictionary:
    """One layer of a cross-layer transcoder; the arguments are those of `cross_layer_transcoder`, of this layer.

    Args:
        site_in: What the layer reads.
        sites_out: What its features write to; `b_dec` and the skip connection add to the first.
        W_enc: The encoder.
        W_dec: The directions at every output site.
        b_enc: The encoder's bias; by default 0.
        b_dec: The bias of the reconstruction of the first output site; by default 0.
        activation: The activation function; by default ReLU.
        W_skip: The skip connection.
        source: Where it comes from.
    """
    bias = W_dec.new_zeros(len(sites_out), W_dec.shape[2])
    if b_dec is not None:
        bias[0] = b_dec
    return Dictionary(
        (site_of(site_in),),
        tuple(site_of(site) for site in sites_out),
        W_enc[None],
        W_enc.new_zeros(W_enc.shape[1]) if b_enc is None else b_enc,
        W_dec,
        bias,
        Relu() if activation is None else activation,
        W_skip=W_skip,
        source=source,
        cross_layer=True,
    )


def crosscoder(
    sites: Sequence[str | Site],
    W_enc: Float[Tensor, "n d feature"],
    W_dec: Float[Tensor, "feature n d"],
    *,
    b_enc: Float[Tensor, " feature"] | None = None,
    b_dec: Float[Tensor, "n d"] | None = None,
    activation: Activation | None = None,
    models: Sequence[str] = (),
    label: str = "",
    source: BasisSource = MEMORY,
) -> Dictionary:
    """A crosscoder: one set of features read from several sites together, which reconstructs all of them.

    Over several models (or checkpoints), `models` names them, and `encode` and `decode` go by these names; its
    `decoder_norms` say in which model a feature is. Such a basis is not of one run, and cannot be spliced into one.

    Args:
        sites: The sites; over several models the site in each of them.
        W_enc: An encoder per site; their products are summed.
        W_dec: The direction of a feature at every site.
        b_enc: The encoder's bias; by default 0.
        b_dec: The biases of the reconstructions; by default 0.
        activation: The activation function; by default ReLU.
        models: The names of the models, one per site.
        label: Its name in addresses.
        source: Where it comes from.

    Raises InputError for shapes that do not fit, and one site that is named twice without models.

    Source: Lindsey et al. 2024 (sparse crosscoders); model differences by relative norms.
    """
    places = tuple(site_of(site) for site in sites)
    if not models and len(set(places)) != len(places):
        raise InputError("A site is named twice; for one site in several models, name them (`models=`).")
    if models and len(set(models)) != len(models):
        raise InputError(f"A model is named twice: {', '.join(models)}.")
    return Dictionary(
        places,
        places,
        W_enc,
        W_enc.new_zeros(W_enc.shape[2]) if b_enc is None else b_enc,
        W_dec,
        W_dec.new_zeros(W_dec.shape[1:]) if b_dec is None else b_dec,
        Relu() if activation is None else activation,
        models=tuple(models),
        label=label,
        source=source,
    )


def relative_norms(basis: Dictionary) -> Float[Tensor, " feature"]:
    """Of a crosscoder over two models, the second's share of each feature's length: 0 = only in the first, 1 = second.

    An L1 penalty shrinks the smaller of the two lengths, so values near 0 and 1 may be artefacts of training.
    """
    norms = basis.decoder_norms()
    if norms.shape[1] != 2:
        raise InputError(f"Relative norms compare two outputs; '{basis.name}' has {norms.shape[1]}.")
    return norms[:, 1] / norms.sum(1)
