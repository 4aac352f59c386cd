"""Some features of a dictionary as nodes: how much of its direction each writes, and for transcoders what it reads.

The rest of the component (its other features, biases, and what the reconstruction misses) stays its own writer, `m3`.
A transcoder's features have inputs of their own, `m3.f17<in>`: the MLP's input, encoded, or the stream before the MLP's
norm. The reader `m3` is then the input of the rest, so that an edge into the MLP is the edges into the rest and into
every feature together: what the rest lacks are the features of what the reader `m3` sees of the stream. Features of
an output (an autoencoder of what the MLP or the attention adds) are fed by the inputs of the component.

A feature of a cross-layer transcoder writes in its own layer and in later ones, and is a part of each of these MLPs:
`Features` in the first, `LaterWrites` in the others. As the rest of a later MLP is its output less what the features
write, it depends on what these read: so the reader `m3` is also an input of the later rests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.graphs.families.family import Moment, NodeFamily, NodeSite, Ports, Recorded, gram
from mechinterp.graphs.families.normed_ports import DirectionGradients, Step, direction_gradients
from mechinterp.graphs.families.write_block import LowRank
from mechinterp.graphs.token_windows import Window
from mechinterp.models.feature_basis import ChosenFeatures, NodeBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Node, Site

MLP, ATTENTION = ("mlp_out", "mlp_raw", "mlp_post"), ("attn_out", "attn_raw", "z")
"""Sites whose features write what an MLP, or the attention of a layer, adds to the residual stream."""


@dataclass(frozen=True)
class Features(NodeFamily):
    """Features of one basis: `m5.f17`. Made by `features_of`.

    It is the same family with or without the basis itself (`chosen`), without which it can be read, drawn and compared,
    but not run.
    """

    basis: str
    """The name of the basis, as in `m5.f17`."""
    site_in: Site
    site_out: Site
    numbers: tuple[int, ...]
    sha256: str
    """Of the basis: sites, settings and numbers."""
    parallel: bool
    """Whether attention and MLP of a layer both read the layer's input."""
    chosen: ChosenFeatures | None = field(default=None, compare=False, repr=False)
    later: tuple[Site, ...] = ()
    """The sites of later layers to which features of a cross-layer transcoder write, too."""

    def __post_init__(self) -> None:
        if not self.numbers or list(self.numbers) != sorted(set(self.numbers)) or self.numbers[0] < 0:
            raise InputError(f"The features of '{self.basis}' are different whole numbers in order, at least one.")
        if self.site_out.layer is None or self.site_out.kind not in MLP + ATTENTION:
            raise UnsupportedError(why_not(self.basis, self.site_out))
        if self.site_in != self.site_out and not self.of_transcoder:
            raise UnsupportedError(
                f"The basis '{self.basis}' reads '{self.site_in}' and writes to '{self.site_out}': as nodes of a "
                f"graph, features read {self._inputs} and write to 'mlp_out' or 'mlp_raw' of the same layer, or "
                "read what they write."
            )
        if self.later:
            self._check_later()
        if Node.parse(self.writers[0]).layer != self.layer:
            raise InputError(
                f"The name of the basis '{self.basis}' does not say its layer, {self.layer}; give it a label such as "
                f"'{self.part_of}' or 'wide.{self.layer}'."
            )

    def _check_later(self) -> None:
        layers = [site.layer or 0 for site in (self.site_out, *self.later)]
        kinds = {site.kind for site in (self.site_out, *self.later)}
        if not self.of_transcoder or len(kinds) > 1 or layers != sorted(set(layers)):
            written = ", ".join(map(str, (self.site_out, *self.later)))
            raise UnsupportedError(
                f"The basis '{self.basis}' reads '{self.site_in}' and writes to several sites ({written}): as nodes of "
                f"a graph, features of a cross-layer transcoder read {self._inputs} and write to 'mlp_out' (or "
                "'mlp_raw') of the same layer, then of later ones."
            )

    @property
    def of_transcoder(self) -> bool:
        """Whether the features have inputs of their own."""
        reads = self.site_in == Site("mlp_in", self.layer) or self.of_stream
        return reads and self.site_out.kind in ("mlp_out", "mlp_raw")

    @property
    def of_stream(self) -> bool:
        """Whether they read the residual stream before the MLP's norm."""
        return self.site_in == Site("resid_mid", self.layer) and not self.parallel

    @property
    def _inputs(self) -> str:
        """What features with inputs of their own may read here."""
        return "'mlp_in' (here attention and MLP read the same stream)" if self.parallel else "'mlp_in' or 'resid_mid'"

    @property
    def of_attention(self) -> bool:
        """Whether they are parts of what the attention adds."""
        return self.site_out.kind in ATTENTION

    @property
    def layer(self) -> int:
        """The layer that they write in."""
        assert self.site_out.layer is not None
        return self.site_out.layer

    @property
    def written(self) -> Moment:
        """The first state of the stream with what the MLP (or the attention) adds."""
        return (self.layer, 1) if self.of_attention and not self.parallel else (self.layer + 1, 0)

    @property
    def reads(self) -> Moment | None:
        """What the MLP reads, for features of a transcoder."""
        return (self.layer, 0 if self.parallel else 1) if self.of_transcoder else None

    @property
    def writers(self) -> tuple[str, ...]:
        """`m5.f17`, in order."""
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"{self.basis}.f{number}" for number in self.numbers)

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`m5.f17<in>` for a transcoder."""
        if not self.of_transcoder:
            return ()
        feeds = tuple(range(i, i + 1) for i in range(len(self.numbers)))
        site = self.site_in if self.chosen is None else self.chosen
        names = tuple(f"{name}<in>" for name in self.writers)
        return (Ports(site, names, feeds, follows=Site("mlp_in", self.layer), of_stream=self.of_stream),)

    @property
    def part_of(self) -> str:
        """The MLP, or the attention as one node."""
        return self._whole

    @cached_property
    def _whole(self) -> str:
        return str(Node("attention" if self.of_attention else "mlp", self.layer))

    @property
    def rows(self) -> tuple[NodeFamily, ...]:
        """What they write in their own layer, and in each later one."""
        own = replace(self, later=()) if self.later else self
        return (own, *(LaterWrites(self, number) for number in range(1, len(self.later) + 1)))

    @property
    def fingerprint(self) -> str:
        """The sha256 of the basis."""
        return self.sha256

    def check(self, model: HookManager) -> None:
        """Return None if the basis is loaded and fits the model. Raises InputError or UnsupportedError otherwise."""
        chosen = self.loaded()
        model.resolve(chosen)
        rows = chosen.writes()
        if rows.device != model.device:
            raise InputError(
                f"The basis '{self.basis}' is on {rows.device}, the model on {model.device}; use "
                "basis.to(model.device)."
            )
        width = {"mlp_post": len(model.layout.neurons(self.layer).W_out)} if self.site_out.kind == "mlp_post" else {}
        width |= {"z": model.dims.n_heads * model.dims.d_head}
        if rows.shape[-1] != (wanted := width.get(self.site_out.kind, model.dims.d_model)):
            raise InputError(
                f"The basis '{self.basis}' writes vectors of {rows.shape[-1]} numbers to '{self.site_out}', which has "
                f"{wanted}; it is of another model."
            )

    def loaded(self) -> ChosenFeatures:
        """The features themselves. Raises InputError if the basis is not loaded."""
        if self.chosen is None:
            raise InputError(
                f"The graph has features of the basis '{self.basis}' (sha256 {self.sha256[:12]}...), which is not "
                "loaded: read the circuit with its bases, mi.load_circuit(path, bases=True)."
            )
        return self.chosen

    @property
    def sites(self) -> tuple[Site, ...]:
        """The features; for those before a post-norm also what its scale is of."""
        chosen: tuple[Site, ...] = () if self.chosen is None else (self.chosen,)  # pyright: ignore[reportAssignmentType]
        return (*chosen, self.site_out) if self.site_out.kind not in ("mlp_out", "attn_out") else chosen

    @property
    def output(self) -> Site:
        """What the MLP, or the attention, adds."""
        return Site("attn_out" if self.of_attention else "mlp_out", self.layer)

    @property
    def low_rank(self) -> bool:
        """Each writes one direction."""
        return True

    def writes(self, model: HookManager, now: Recorded) -> LowRank:
        """Values times directions; before a post-norm a feature's share of the normed sum, as for heads and neurons.

        Raises UnsupportedError for features that write in several layers: there is a family for each (`rows`).
        """
        if self.later:
            raise UnsupportedError(
                f"The features of '{self.basis}' write in several layers (a cross-layer transcoder), which this "
                "computation does not take; use the exact engine or eap, eap-ig and the like, or a transcoder a layer."
            )
        return self.written_at(model, now, 0)

    def written_at(self, model: HookManager, now: Recorded, number: int) -> LowRank:
        """What they write at the first output site (0), or at a later one."""
        values = now[self.loaded()].movedim(-1, 0)  # pyright: ignore[reportArgumentType]
        site = (self.site_out, *self.later)[number]
        directions, post = self._directions(model, values, site, number)
        if post.kind == "none":
            return LowRank(values, directions)
        return LowRank(values / post.scale(self._normed(model, now[site]))[..., 0], directions)

    def directions(self, model: HookManager) -> Float[Tensor, "feature d_model"]:
        """What each adds to the residual stream at a value of 1; before a post-norm, times its scale. Of features that
        write in several layers the sum; before post-norms, which have a scale each, what they add in the first."""
        wide = torch.empty(0, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
        sites = (self.site_out, *self.later) if self.site_out.kind == "mlp_out" else (self.site_out,)
        found = [self._directions(model, wide, site, number)[0] for number, site in enumerate(sites)]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def _directions(
        self, model: HookManager, like: Tensor, site: Site, number: int
    ) -> tuple[Float[Tensor, "feature d_model"], Norm]:
        """What each adds to the stream at a value of 1, and the post-norm by whose scale this is divided."""
        rows, layout, kind = self.loaded().writes().to(like), model.layout, site.kind
        if rows.ndim == 3:
            rows = rows[:, number]
        if kind in ("mlp_out", "attn_out"):
            return rows, Norm("none")
        assert site.layer is not None
        post = layout.attention[site.layer].post if self.of_attention else layout.mlp_post[site.layer]
        if kind == "mlp_post":
            rows = rows @ layout.neurons(self.layer).W_out.to(like)
        elif kind == "z":
            W_O = layout.attention[self.layer].W_O.to(like)
            rows = einsum(rows.unflatten(1, W_O.shape[:2]), W_O, "feature head d_head, head d_head d -> feature d")
        return post.project(rows), post

    def _normed(self, model: HookManager, value: Tensor) -> Tensor:
        """What the post-norm is given, from the site of the features."""
        if self.site_out.kind == "z":
            return model.layout.attention_total(self.layer, value)
        if self.site_out.kind != "mlp_post":
            return value
        maps = model.layout.neurons(self.layer)
        total = value @ maps.W_out.to(value)
        return total if maps.b_out is None else total + maps.b_out.to(value)

    def read(self, model: HookManager, ports: Ports, seen: Float[Tensor, "port rows pos d_model"]) -> Tensor:
        """The features of the MLP's input, or of the stream itself, each from its own residual stream."""
        return self.loaded().encode_each(seen if self.of_stream else model.layout.read_mlp(self.layer, seen))

    def _norm(self, model: HookManager) -> Norm:
        """The norm through which they read the stream."""
        norm = Norm("none") if self.of_stream else model.layout.mlp_norm[self.layer]
        assert norm is not None
        return norm

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        window: Window,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """As `direction_gradients`, in full."""
        found = self.direction_gradients(model, steps, window, out.dtype, frozen=frozen)
        assert found is not None
        out.copy_(found.dense())

    def direction_gradients(
        self, model: HookManager, steps: Sequence[Step], window: Window, dtype: torch.dtype, *, frozen: bool
    ) -> DirectionGradients | None:
        """Through the activation function, the encoder's directions and the norm, if there is one."""
        chosen, norm = self.loaded(), self._norm(model)
        read = chosen.reads()
        assert read is not None
        gradients = [
            step.gradients[chosen][window] * chosen.slopes(step.values[chosen][window])  # pyright: ignore[reportArgumentType]
            for step in steps
        ]
        resids = [step.values[self.stream][window] for step in steps]
        return direction_gradients(norm, read, resids, gradients, dtype, frozen=frozen)

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the directions."""
        if self.later:
            yield from super().written_grams(model)
        yield from (gram(row[:, None]) for row in self.directions(model))

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the encoder's directions, with the norm's weights and centring."""
        if not self.of_transcoder:
            return
        norm, read = self._norm(model), self.loaded().reads()
        assert read is not None
        rows = norm.project_transposed(read.to(torch.promote_types(model.dtype, torch.float32)))
        yield from (gram(row[:, None]) for row in rows)


@dataclass(frozen=True)
class LaterWrites(NodeFamily):
    """What features of a cross-layer transcoder write in one of the later layers: not nodes, but parts of these."""

    features: Features
    number: int
    """Which of the output sites; the features' own layer has 0."""

    @property
    def site_out(self) -> Site:
        """Where they write."""
        return self.features.later[self.number - 1]

    @property
    def layer(self) -> int:
        """The layer that they write in."""
        assert self.site_out.layer is not None
        return self.site_out.layer

    @property
    def origin(self) -> NodeFamily:
        """What they write in their own layer."""
        return self._own

    @cached_property
    def _own(self) -> Features:
        return replace(self.features, later=())

    @property
    def starts(self) -> int:
        """The features' own layer."""
        return self.features.layer

    @property
    def written(self) -> Moment:
        """The first state of the stream with what the later MLP adds."""
        return (self.layer + 1, 0)

    @property
    def writers(self) -> tuple[str, ...]:
        """`m3.f17>m5`, in order."""
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"{name}>{self.part_of}" for name in self.features.writers)

    @property
    def part_of(self) -> str:
        """The later MLP."""
        return self._whole

    @cached_property
    def _whole(self) -> str:
        return str(Node("mlp", self.layer))

    @property
    def sites(self) -> tuple[NodeSite, ...]:
        """The features, and where they write: only there is their part of the MLP's write known."""
        chosen: tuple[NodeSite, ...] = () if self.features.chosen is None else (self.features.chosen,)
        return (*chosen, self.site_out)

    @property
    def output(self) -> Site:
        """What the later MLP adds."""
        return Site("mlp_out", self.layer)

    @property
    def low_rank(self) -> bool:
        """Each writes one direction."""
        return True

    def writes(self, model: HookManager, now: Recorded) -> LowRank:
        """The features' values times their directions in this layer."""
        return self.features.written_at(model, now, self.number)


def why_not(name: str, site: Site) -> str:
    """Why features that write to a site are not nodes of the graph."""
    if site.kind.startswith("resid") or site.kind in ("embed", "final_norm"):
        return (
            f"The features of '{name}' are of a state of the residual stream ('{site}'), which no node writes by "
            "itself, so they are not parts of a node. Take a transcoder or a dictionary of an MLP's or attention's "
            "output; or find a circuit between such features with mi.feature_circuit, a graph of states in layers; or "
            "score and patch them with attribution_patching and activation_patching."
        )
    return (
        f"The features of '{name}' write to '{site}'; as nodes of a graph they write to {', '.join(MLP + ATTENTION)} "
        "of a layer."
    )


def reads_input(site_out: Site, dims: Dims) -> bool:
    """Whether the part that writes to a site, and what is beside it in its layer, both read the layer's input."""
    layer = site_out.layer
    in_model = site_out.kind in MLP and layer is not None and layer < dims.n_layers
    return dims.mlp_reads_input(layer) if in_model and layer is not None else dims.parallel


def features_of(basis: NodeBasis, numbers: Sequence[int] | None, dims: Dims) -> Features:
    """The features of a basis as a family; by default all of them.

    Raises InputError for numbers that it does not have, and a name without its layer; UnsupportedError for a basis
    whose features are not parts of MLPs or of one attention, or read it in a way that has no port.
    """
    if not isinstance(basis, NodeBasis):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`features` are bases, as from mi.load_basis; got {type(basis).__name__}.")
    if len(basis.sites_in) != 1:
        raise UnsupportedError(
            f"The basis '{basis.name}' reads several sites ({', '.join(map(str, basis.sites_in))}): a crosscoder has "
            "read all of them only when its earlier ones are written, so its features do not cause what is there, and "
            "are not nodes. Take a transcoder a layer or a cross-layer transcoder; or score its features with "
            "attribution_patching."
        )
    chosen = basis.chosen(range(basis.n_features) if numbers is None else list(numbers))
    site, *later = basis.sites_out
    parallel = reads_input(site, dims)
    made = Features(basis.name, basis.sites_in[0], site, chosen.ids, basis.sha256, parallel, chosen, tuple(later))
    if made.of_transcoder and not basis.reads_affinely:
        raise UnsupportedError(
            f"The basis '{basis.name}' does not say what direction each feature reads (it normalises its input, or is "
            "a wrapped object), so its features have no inputs in a graph; take a transcoder without normalisation."
        )
    return made


def check_together(dims: Dims, features: Sequence[Features]) -> None:
    """Return None if the features of several bases can be nodes of one graph. Raises InputError otherwise."""
    by_part: dict[str, list[Features]] = {}
    for one in features:
        last = max(row.layer for row in one.rows)
        if last >= dims.n_layers:
            raise InputError(
                f"The basis '{one.basis}' writes to layer {last}; the model has layers 0 to {dims.n_layers - 1}."
            )
        if one.parallel != (dims.parallel if one.of_attention else dims.mlp_reads_input(one.layer)):
            raise InputError(f"The features of '{one.basis}' are of a model whose layers have another order.")
        for row in one.rows:
            by_part.setdefault(str(row.part_of), []).append(one)
    for part, several in by_part.items():
        if len({one.of_transcoder for one in several}) > 1:
            names = " and ".join(f"'{one.basis}'" for one in several)
            raise InputError(
                f"{names} split {part}, one by what it reads and one by what it writes: the features of the second "
                "would depend on those of the first. Take one of them."
            )
