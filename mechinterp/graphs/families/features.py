"""Some features of a dictionary as nodes: how much of its direction each writes, and for transcoders what it reads.

The rest of the component (its other features, biases, and what the reconstruction misses) stays its own writer, `m3`.
A transcoder's features have inputs of their own, `m3.f17<in>`: the MLP's input, encoded. The reader `m3` is then the
input of the rest, so that an edge into the MLP is the edges into the rest and into every feature together. Features of
an output (an autoencoder of what the MLP or the attention adds) are fed by the inputs of the component.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.graphs.families.family import Moment, NodeFamily, Ports, Recorded, gram
from mechinterp.graphs.families.normed_ports import DirectionGradients, Step, direction_gradients
from mechinterp.graphs.families.write_block import LowRank
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

    def __post_init__(self) -> None:
        if not self.numbers or list(self.numbers) != sorted(set(self.numbers)) or self.numbers[0] < 0:
            raise InputError(f"The features of '{self.basis}' are different whole numbers in order, at least one.")
        if self.site_out.layer is None or self.site_out.kind not in MLP + ATTENTION:
            raise UnsupportedError(why_not(self.basis, self.site_out))
        if self.site_in != self.site_out and not self.of_transcoder:
            raise UnsupportedError(
                f"The basis '{self.basis}' reads '{self.site_in}' and writes to '{self.site_out}': as nodes of a "
                "graph, features read 'mlp_in' and write to 'mlp_out' or 'mlp_raw' of the same layer, or read what "
                "they write."
            )
        if Node.parse(self.writers[0]).layer != self.layer:
            raise InputError(
                f"The name of the basis '{self.basis}' does not say its layer, {self.layer}; give it a label such as "
                f"'{self.part_of}' or 'wide.{self.layer}'."
            )

    @property
    def of_transcoder(self) -> bool:
        """Whether the features have inputs of their own."""
        reads = self.site_in == Site("mlp_in", self.layer)
        return reads and self.site_out.kind in ("mlp_out", "mlp_raw")

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
        return tuple(f"{self.basis}.f{number}" for number in self.numbers)

    @property
    def ports(self) -> tuple[Ports, ...]:
        """`m5.f17<in>` for a transcoder."""
        if not self.of_transcoder:
            return ()
        feeds = tuple(range(i, i + 1) for i in range(len(self.numbers)))
        site = self.site_in if self.chosen is None else self.chosen
        return (Ports(site, tuple(f"{name}<in>" for name in self.writers), feeds, follows=self.site_in),)

    @property
    def part_of(self) -> str:
        """The MLP, or the attention as one node."""
        return str(Node("attention" if self.of_attention else "mlp", self.layer))

    @property
    def fingerprint(self) -> str:
        """The sha256 of the basis."""
        return self.sha256

    def check(self, model: HookManager) -> None:
        """Return None if the basis is loaded and fits the model. Raises InputError or UnsupportedError otherwise."""
        chosen = self.loaded()
        model.resolve(chosen)
        rows = chosen.writes()
        if rows.device.type != model.device.type:
            raise InputError(
                f"The basis '{self.basis}' is on {rows.device}, the model on {model.device}; use "
                "basis.to(model.device)."
            )
        width = {"mlp_post": len(model.layout.neurons(self.layer).W_out)} if self.site_out.kind == "mlp_post" else {}
        width |= {"z": model.dims.n_heads * model.dims.d_head}
        if rows.shape[1] != (wanted := width.get(self.site_out.kind, model.dims.d_model)):
            raise InputError(
                f"The basis '{self.basis}' writes vectors of {rows.shape[1]} numbers to '{self.site_out}', which has "
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
        """Values times directions; before a post-norm a feature's share of the normed sum, as for heads and neurons."""
        values = now[self.loaded()].movedim(-1, 0)  # pyright: ignore[reportArgumentType]
        directions, post = self._directions(model, values)
        if post.kind == "none":
            return LowRank(values, directions)
        return LowRank(values / post.scale(self._normed(model, now[self.site_out]))[..., 0], directions)

    def directions(self, model: HookManager) -> Float[Tensor, "feature d_model"]:
        """What each adds to the residual stream at a value of 1; before a post-norm, times its scale."""
        wide = torch.empty(0, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
        return self._directions(model, wide)[0]

    def _directions(self, model: HookManager, like: Tensor) -> tuple[Float[Tensor, "feature d_model"], Norm]:
        """What each adds to the stream at a value of 1, and the post-norm by whose scale this is divided."""
        rows, layout, kind = self.loaded().writes().to(like), model.layout, self.site_out.kind
        if kind in ("mlp_out", "attn_out"):
            return rows, Norm("none")
        post = layout.attention[self.layer].post if self.of_attention else layout.mlp_post[self.layer]
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
        """The features of the MLP's input, each from its own residual stream."""
        return self.loaded().encode_each(model.layout.read_mlp(self.layer, seen))

    def pull_back(
        self,
        model: HookManager,
        steps: Sequence[Step],
        chunk: slice,
        out: Float[Tensor, "port token d_model"],
        *,
        frozen: bool,
    ) -> None:
        """As `direction_gradients`, in full."""
        found = self.direction_gradients(model, steps, chunk, out.dtype, frozen=frozen)
        assert found is not None
        out.copy_(found.dense())

    def direction_gradients(
        self, model: HookManager, steps: Sequence[Step], chunk: slice, dtype: torch.dtype, *, frozen: bool
    ) -> DirectionGradients | None:
        """Through the activation function, the encoder's directions and the norm."""
        chosen, norm = self.loaded(), model.layout.mlp_norm[self.layer]
        read = chosen.reads()
        assert norm is not None and read is not None
        gradients = [
            step.gradients[chosen][chunk] * chosen.slopes(step.values[chosen][chunk])  # pyright: ignore[reportArgumentType]
            for step in steps
        ]
        resids = [step.values[self.stream][chunk] for step in steps]
        return direction_gradients(norm, read, resids, gradients, dtype, frozen=frozen)

    def written_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the directions."""
        yield from (gram(row[:, None]) for row in self.directions(model))

    def read_grams(self, model: HookManager) -> Iterator[Float[Tensor, "d_model d_model"]]:
        """Of the encoder's directions, with the norm's weights and centring."""
        if not self.of_transcoder:
            return
        norm, read = model.layout.mlp_norm[self.layer], self.loaded().reads()
        assert norm is not None and read is not None
        rows = norm.project_transposed(read.to(torch.promote_types(model.dtype, torch.float32)))
        yield from (gram(row[:, None]) for row in rows)


def why_not(name: str, site: Site) -> str:
    """Why features that write to a site are not nodes of the graph."""
    if site.kind.startswith("resid") or site.kind in ("embed", "final_norm"):
        return (
            f"The features of '{name}' are of a state of the residual stream ('{site}'), which no node writes by "
            "itself, so they are not parts of a node. Take a transcoder or a dictionary of an MLP's or attention's "
            "output; or score and patch these features with attribution_patching and activation_patching."
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
    whose features are not parts of one MLP or attention, or read it in a way that has no port.
    """
    if not isinstance(basis, NodeBasis):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`features` are bases, as from mi.load_basis; got {type(basis).__name__}.")
    if len(basis.sites_in) != 1 or len(basis.sites_out) != 1:
        several = ", ".join(map(str, basis.sites_out if len(basis.sites_out) > 1 else basis.sites_in))
        raise UnsupportedError(
            f"The basis '{basis.name}' has several sites ({several}); a node of a graph reads one input and writes at "
            "one place. Take one transcoder or dictionary a layer."
        )
    chosen = basis.chosen(range(basis.n_features) if numbers is None else list(numbers))
    parallel = reads_input(basis.sites_out[0], dims)
    made = Features(basis.name, basis.sites_in[0], basis.sites_out[0], chosen.ids, basis.sha256, parallel, chosen)
    if made.of_transcoder and not basis.reads_affinely:
        raise UnsupportedError(
            f"The basis '{basis.name}' does not say what direction each feature reads (it normalises its input, or is "
            "a wrapped object), so its features have no inputs in a graph; take a transcoder without normalisation."
        )
    return made
