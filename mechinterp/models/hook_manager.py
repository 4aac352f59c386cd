"""HookManager: runs one model, reads and edits its activations, and leaves the model unchanged.

This is the only file that registers hooks; `models/hook_names.py` maps sites to TransformerLens's hook points.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from inspect import currentframe
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.base.errors import InputError, SiteNotReached, UnsupportedError
from mechinterp.base.registry import unknown
from mechinterp.models.block_parts import aliases
from mechinterp.models.exclusive_runs import Block, Turn, use_of
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.generation import Generates
from mechinterp.models.hook_names import HOOK_NAMES, ROUTERS, site_of_tuple
from mechinterp.models.interventions import (
    BoundEdit,
    Carry,
    Edit,
    Intervention,
    Point,
    Run,
    SiteLike,
    SiteName,
    Stopped,
    as_interventions,
    bound,
    fire,
)
from mechinterp.models.layout import Dims, Layout
from mechinterp.models.load import open_model
from mechinterp.models.load_checks import check_model
from mechinterp.models.mlp import run_mlp
from mechinterp.models.modes import Gradients
from mechinterp.models.past import Past, empty_cache, past_of
from mechinterp.models.placement import DeviceMap, called, on_device
from mechinterp.models.plan import Plan, by_example, planned
from mechinterp.models.sites import GLOBAL_SITES, LAYER_SITES, Site
from mechinterp.models.source import ModelInfo
from mechinterp.models.texts import Prompts, ReadsTexts
from mechinterp.models.tokens import check_at, check_past, check_tokens
from mechinterp.models.weight_names import WeightsByName


class HookManager(ReadsTexts, WeightsByName, Generates):
    """Wraps one TransformerBridge: `run` reads and edits activations at sites and leaves the model unchanged.

    Made by `mechinterp.load_model`. The constructor checks every site and every map of the layout on a short prompt:
    a site that does not fire exactly once, or whose value does not reach the logits, is refused with the reason.

    Args:
        bridge: The TransformerBridge to run.
        info: Where the model came from; it is recorded in circuit files.
        tokenizer: The model's tokenizer; None: prompts are given as token ids.
    """

    def __init__(self, bridge: Any, info: ModelInfo, tokenizer: Any = None) -> None:
        self.bridge = bridge
        self.info = info
        self.tokenizer = tokenizer
        self._use = use_of(bridge)
        if self.edited:
            raise InputError("This model is inside an `intervene` block, where it cannot be checked; load it outside.")
        self._points: dict[str, Any] = {**bridge.hook_dict, **aliases(bridge)}
        self._first_names = {id(point): name for name, point in reversed(self._points.items())}
        self._layers_give_tuples = False
        self.layout: Layout
        self.refused: Mapping[Site, str] = {}
        self.branches: Mapping[str, str] = {}
        self.coupled_heads = frozenset[int]()
        self.keeps_past, self.bound_mlps = True, dict[int, str]()
        check_model(self)

    @property
    def dims(self) -> Dims:
        """The sizes of the model: layers, heads, `d_model`, ..."""
        return self.layout.dims

    @property
    def device(self) -> torch.device:
        """The device of the model's weights; of a model on several devices the main one, that of its unembedding."""
        return self.layout.W_U.device

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of all weights: more than one if the layers are on several."""
        return tuple(sorted({str(weight.device) for weight in self.bridge.original_model.parameters()}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.layout.W_U.dtype

    def __repr__(self) -> str:
        sizes = f"{self.dims.n_layers} layers x {self.dims.n_heads} heads, d_model {self.dims.d_model}"
        return f"HookManager({self.info.name}, {sizes}, {self.dtype})"

    @property
    def cfg(self) -> Any:
        """A copy of TransformerLens's configuration (`n_layers`, `act_fn`, ...); changing it has no effect."""
        return copy.deepcopy(self.bridge.cfg)

    def sites(self) -> tuple[Site, ...]:
        """Every site that this model has and that can be used, in a fixed order."""
        every = [Site(kind) for kind in GLOBAL_SITES]
        every += [Site(kind, layer) for layer in range(self.dims.n_layers) for kind in LAYER_SITES]
        return tuple(site for site in every if self.has(site))

    def has(self, site: SiteName) -> bool:
        """Whether the model has the site (a Site, its text or a hook name) and it can be used; of a basis, all its."""
        site = self._plain(site)
        if not isinstance(site, (str, Site)):
            return all(self.has(one) for one in (*site.sites_in, *site.sites_out))
        site = Site.parse(site) if isinstance(site, str) else site
        return self._hook_name(site) in self._points and site not in self.refused

    def _hook_name(self, site: Site) -> str:
        return HOOK_NAMES[site.kind].format(site.layer)

    def resolve(self, site: SiteName) -> str:
        """The hook name of a site.

        Args:
            site: A Site, its text (`z.3`), its kind and layer (`("z", 3)`), or a raw TransformerLens hook name, which
                is returned as it is. Of a feature basis all sites are looked up, and the name of the first that it
                reads is returned.

        Raises InputError for an unknown name or layer, UnsupportedError for a site that the model does not have or
        that cannot be used on it.
        """
        site = self._plain(site)
        if not isinstance(site, (str, Site)):
            if not isinstance(site, FeatureBasis):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"A site is a Site, its name or a feature basis; got {type(site).__name__}.")
            if models := getattr(site, "models", ()):
                raise InputError(
                    f"The basis '{site.name}' reads several models ({', '.join(models)}); run each by itself "
                    "and give the values to its `encode`."
                )
            return self._names_of(site)[0]
        if isinstance(site, str):
            if site in self._points:
                return site
            if site.partition(".")[0] not in LAYER_SITES + GLOBAL_SITES:
                raise unknown("site or hook name", site, [str(s) for s in self.sites()] + list(self._points))
            site = Site.parse(site)
        if site.layer is not None and not 0 <= site.layer < self.dims.n_layers:
            raise InputError(f"Site '{site}' does not exist: the model has layers 0 to {self.dims.n_layers - 1}.")
        if site in self.refused:
            raise UnsupportedError(f"Site '{site}' cannot be used on {self.info.architecture}: {self.refused[site]}.")
        name = self._hook_name(site)
        if name not in self._points:
            raise UnsupportedError(f"{self.info.architecture} has no site '{site}' (hook {name}).")
        return name

    def _plain(self, site: Any) -> SiteLike:
        """The site of a tuple, such as `("z", 3)`; anything else as it is."""
        return site_of_tuple(site, self.dims.n_layers) if isinstance(site, tuple) else site

    def first_name(self, site: Any) -> str:
        """The one name that all names of a site share: the name that TransformerLens knows its hook by."""
        site = self._plain(site)
        name = self.resolve(site)
        return self._first_names[id(self._points[name])] if isinstance(site, (str, Site)) else f"basis {id(site)}"

    def _bound(self, interventions: Iterable[Intervention]) -> list[BoundEdit]:
        """The interventions at plain sites, with edits of the value alone."""
        sites = [(one, self._plain(one.site)) for one in interventions]
        return [bound(one, site, self.resolve(site)) for one, site in sites]

    def select(self, which: Callable[[str], bool]) -> tuple[Site, ...]:
        """The sites that pass a filter, in the order of `sites()`.

        Args:
            which: Called with the text of each site (`z.3`); True keeps it.

        Raises InputError when no site passes.

        >>> import mechinterp as mi
        >>> len(mi.load_model("bundled").select(lambda name: name.startswith("z.")))
        4
        """
        chosen = tuple(site for site in self.sites() if which(str(site)))
        if not chosen:
            raise InputError("The filter matches no site. Sites: " + ", ".join(map(str, self.sites())) + ".")
        return chosen

    def intervene(self, *interventions: Intervention) -> AbstractContextManager[HookManager]:
        """A context manager that adds interventions to every run inside its block.

        Blocks can be nested; the outer block's edits are applied first. Inside the block no other thread can run the
        model, and every HookManager of the same model applies the edits.

        Args:
            *interventions: The edits, in the order in which they are applied.

        Raises InputError or UnsupportedError for a site that `resolve` refuses, BusyError when another thread is
        running the model.
        """
        return Block(self._use, self.info.name, tuple(self._bound(interventions)), self)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | str | Sequence[str] | Prompts,
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        prepend_bos: bool | None = None,
        record: Iterable[SiteName] | Callable[[str], bool] = (),
        interventions: Iterable[Intervention] | Mapping[Any, Edit | Tensor] = (),
        grads: Iterable[SiteName] = (),
        loss: Callable[[Tensor], Tensor] | None = None,
        at: Int[Tensor, "batch n_at"] | None = None,
        start: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
        past: Past | None = None,
        keep_past: bool = False,
        stop: SiteName | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Run:
        """The logits, the recorded values and the gradients of one forward (and one backward if `loss` is given).

        Gradients are tracked only if `loss` is given. Cost: one forward, with `loss` one backward.

        Args:
            tokens: A text, a list of texts (`Run.prompts` then says what they became), or token ids `[batch, pos]`.
            mask: True at real tokens; padding is not attended to. None: every token is real. Texts have their own.
            prepend_bos: For texts: whether each begins with the BOS token; by default as the tokenizer does it.
            record: The sites to record, or a filter over their names; values are detached and include the edits. A
                feature basis among them records its activations; `Run.values[basis]` is `[batch, pos, feature]`.
            interventions: Edits of values and gradients, or a mapping from sites to edits of their values.
            grads: The sites at whose values the gradient is taken; needs `loss`.
            loss: Maps the logits (with `stop`: the value at the stop site) to a tensor, whose sum is differentiated.
            at: Positions at which to compute logits (all by default); the logits are NaN where it is -1, no entry.
            start: (layer, resid): skip the layers before `layer` and run it on the residual stream `resid`.
            past: `Run.past` of an earlier run, or the first part of it; `tokens` are then those that follow, and all
                values are of these tokens only.
            keep_past: Keep the keys and values in `Run.past`; it stays None for a model without a cache, with padding
                on the left, and inside `intervene`.
            stop: End the forward after this site; `Run.logits` is then None.
            device: Where to move the recorded values; by default they stay on the model's device.
            dtype: The dtype of the recorded values; by default the model's.

        Raises InputError for invalid tokens, names or edits, SiteNotReached when a site did not fire exactly once,
        BusyError when another thread is running the model.

        >>> import mechinterp as mi
        >>> model = mi.load_model("bundled")
        >>> model.run("When Mary and John", record=[("pattern", 0)])["pattern", 0].shape
        torch.Size([1, 4, 5, 5])
        >>> run = model.run([[1, 2, 3]], record=["z.0"], interventions={"resid_pre.0": lambda value: 2 * value})
        >>> tuple(run.values["z.0"].shape) == (1, 3, model.dims.n_heads, model.dims.d_head)
        True
        """
        prompts = self._prompts_of(tokens, mask, prepend_bos)
        tokens, mask = (tokens, mask) if prompts is None else (prompts.tokens, prompts.mask)
        given: Any = dict(record=record, grads=grads, loss=loss, at=at, start=start, past=past, keep_past=keep_past)
        given |= dict(stop=stop, device=device, dtype=dtype, prompts=prompts)
        return self._run(tokens, mask, interventions, **given)

    def _run(
        self,
        tokens: Any,
        mask: Any,
        interventions: Iterable[Intervention] | Mapping[Any, Edit | Tensor] = (),
        *,
        only: Sequence[BoundEdit] | None = None,
        record: Iterable[SiteName] | Callable[[str], bool] = (),
        grads: Iterable[SiteName] = (),
        loss: Callable[[Tensor], Tensor] | None = None,
        at: Any = None,
        start: tuple[int, Tensor] | None = None,
        past: Past | None = None,
        keep_past: bool = False,
        stop: SiteName | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prompts: Prompts | None = None,
    ) -> Run:
        """`run` of token ids; with `only`, these edits take the place of all others, those of the blocks, too."""
        tokens, mask = check_tokens(tokens, mask, self.dims, self.device)
        if isinstance(record, str) or isinstance(grads, str):
            raise InputError("`record` and `grads` take a list of sites, as in record=['z.0'].")
        wanted = self.select(record) if callable(record) else tuple(record)
        recorded = {site: self._plain(site) for site in wanted}
        edits = self._bound(as_interventions(interventions)) if only is None else list(only)
        grad_keys = tuple(grads)
        grad_sites = tuple(self._plain(site) for site in grad_keys)
        stop = None if stop is None else self._plain(stop)
        if bool(grad_sites) != (loss is not None):
            raise InputError("Gradients need both `loss` and `grads`; only one of them was given.")
        with Turn(self._use, self.bridge, self.info.name, currentframe(), loss is not None) as turn, turn:
            outer = self._use.edits() if only is None else []
            if past is not None:
                check_past(past, tokens, mask, self.dims, edited=bool(outer))
            if start is not None:
                edits = [self._start(turn, tokens, *start), *edits]
            if at is not None:
                at = check_at(at, tokens)
            edits = [*self._outer_from(outer, start), *edits]
            plan = planned(self.resolve, tuple(recorded.values()), edits, grad_sites, stop)
            points = plan.points
            self._register(turn, points, at, len(tokens))
            keeps = keep_past and self.keeps_past and self.dims.causal and mask is None and not outer
            cache = past.cache() if past is not None else empty_cache() if keeps else None
            logits, stopped = self._forward(tokens, mask, cache)
            self._check_fired(points, stopped)
            if at is not None and logits is not None:
                logits = logits.masked_fill((at < 0)[..., None], torch.nan)
            value = gradients = None
            if loss is not None:
                target = logits if stop is None else points[self.resolve(stop)].end
                value, gradients = self._backward(loss, target, plan, grad_sites)
        values = {key: plan.at(site).value for key, site in recorded.items()}
        moved = {site: v.to(device=device, dtype=dtype) for site, v in values.items() if v is not None}
        kept = past_of(cache, self.dims.n_layers) if keeps else None
        found = {key: gradients[site] for key, site in zip(grad_keys, grad_sites, strict=True)} if gradients else {}
        return Run(
            None if logits is None else logits.detach(), moved, found, value, kept, prompts, same_as=self.first_name
        )

    def cache(
        self,
        tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | str | Sequence[str] | Prompts,
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        record: Iterable[SiteName] | Callable[[str], bool] | None = None,
        **how: Any,
    ) -> Run:
        """A run that records every site: `cache["pattern", 5]`, `cache["z.1"]`, `cache["blocks.5.attn.hook_pattern"]`.

        Args:
            tokens: A text, a list of texts, or token ids `[batch, pos]`.
            mask: True at real tokens; texts have their own.
            record: The sites to record, or a filter over their names; by default every site of the model, which takes
                about as much memory as the activations of a backward pass.
            **how: Anything else that `run` takes, such as `interventions` or `prepend_bos`.

        Cost: one forward. Raises as `run` does.

        >>> import mechinterp as mi
        >>> cache = mi.load_model("bundled").cache("When Mary and John went to the store")
        >>> bool((cache["pattern", 1] == cache["blocks.1.attn.hook_pattern"]).all()), cache.prompts
        (True, 1 text of 9 tokens, BOS '<bos>' before each)
        """
        return self.run(tokens, mask, record=self.sites() if record is None else record, **how)

    def edits_around(self, interventions: Iterable[Intervention] = ()) -> list[BoundEdit]:
        """The edits of the `intervene` blocks of this thread, and then these."""
        return [*self._use.edits(), *self._bound(interventions)]

    @property
    def edited(self) -> bool:
        """Whether the current thread is inside an `intervene` block of this model."""
        return bool(self._use.edits())

    def mlp(self, layer: int, mlp_in: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The output of a layer's MLP for a given input, after the post-norm if it has one; nothing else is run.

        Args:
            layer: The layer of the MLP.
            mlp_in: Its input, after the norm (the site `mlp_in`); any axes before `d_model`.

        Raises InputError inside an `intervene` block, whose edits would not be applied, UnsupportedError for an MLP
        that cannot be run by itself.
        """
        if self.edited:
            raise InputError("An MLP cannot be run by itself inside `intervene`: the edits would not be applied.")
        block = self.bridge.blocks[layer]
        if not self.dims.layer(layer).mlp:
            raise UnsupportedError(f"Layer {layer} has no MLP.")
        if layer in self.bound_mlps:
            raise UnsupportedError(f"The MLP of layer {layer} cannot be run by itself: {self.bound_mlps[layer]}.")
        with Turn(self._use, self.bridge, self.info.name, currentframe()) as turn, turn:
            out = run_mlp(block, self.layout.mlp_maps[layer], mlp_in.reshape(1, -1, mlp_in.shape[-1]).to(self.dtype))
            post = getattr(block, "ln2_post", None) or self.layout.mlp_post[layer]
            return called(post, out).to(self.dtype).reshape(mlp_in.shape)

    def survey(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site], loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[Site, tuple[int, Tensor | None]]]:
        """The logits, and for each site how often it fired and its gradient (None: the loss does not depend on it)."""
        with Turn(self._use, self.bridge, self.info.name, currentframe(), True) as turn, turn:
            points = planned(self.resolve, (), (), sites, None).points
            self._register(turn, points, None, len(tokens))
            first = self.bridge.blocks[0]
            first.register_forward_hook(turn.hook(first, self._note_layer_output))
            logits, _ = self._forward(tokens, None)
            assert logits is not None
            taps = {site: points[self.resolve(site)].tap for site in sites}
            live = [site for site, tap in taps.items() if tap is not None]
            inputs = [tap for tap in taps.values() if tap is not None]
            found = dict(zip(live, torch.autograd.grad(loss(logits), inputs, allow_unused=True), strict=True))
        return logits.detach(), {s: (points[self.resolve(s)].fired, found.get(s)) for s in sites}

    def _start(self, turn: Turn, tokens: Tensor, layer: int, resid: Tensor) -> BoundEdit:
        """Makes the layers before `layer` pass `resid` on without computing anything, until the turn ends."""
        if not 0 <= layer < self.dims.n_layers:
            raise InputError(f"Cannot start at layer {layer}: the model has layers 0 to {self.dims.n_layers - 1}.")
        expected = (*tokens.shape, self.dims.d_model)
        if tuple(resid.shape) != expected or resid.dtype != self.dtype or resid.device != self.device:
            raise InputError(
                f"`start` needs the input of layer {layer} as {self.dtype} {list(expected)} on {self.device}; got "
                f"{resid.dtype} {list(resid.shape)} on {resid.device}."
            )

        def pass_on(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            return (resid,) if self._layers_give_tuples else resid

        for block in list(self.bridge.blocks)[:layer]:
            turn.replace_forward(block, pass_on)
        return BoundEdit(Site("resid_pre", layer), resid)

    def _note_layer_output(self, module: Any, inputs: Any, output: Any) -> None:
        self._layers_give_tuples = isinstance(output, tuple)

    def _register(self, turn: Turn, points: Mapping[str, Point], at: Tensor | None, n_batch: int) -> None:
        def add(name: str, function: Callable[[Tensor], Tensor | None]) -> None:
            if name.endswith(f".mlp.{ROUTERS[0]}.hook_in"):
                function = by_example(function, n_batch)
            self._points[name].add_hook(turn.hook(self._points[name], function), dir="fwd")

        main = self.device
        carries = {name: Carry(points[name], main) for name in self.branches if name in points}
        for name, carry in carries.items():
            add(self.branches[name], carry.at_sum)
        for name, found in points.items():
            add(name, carries[name].at_branch if name in carries else partial(fire, found, main=main))
        if at is not None:
            index = at.clamp(min=0)

            def gather(value: Tensor) -> Tensor:
                where = on_device(index, value.device)[..., None]
                return value.gather(1, where.expand(-1, -1, value.shape[-1]))

            add(HOOK_NAMES["final_norm"], gather)

    def _outer_from(self, outer: list[BoundEdit], start: tuple[int, Tensor] | None) -> list[BoundEdit]:
        """The outer interventions except those in skipped layers, whose effect is already in the `start` value."""
        skipped = tuple(f"blocks.{layer}." for layer in range(start[0])) if start is not None else ()
        if not skipped:
            return outer
        return [i for i in outer if not all(name.startswith(skipped) for name in self._names_of(i.site))]

    def _names_of(self, site: SiteLike) -> list[str]:
        sites = (site,) if isinstance(site, (str, Site)) else (*site.sites_in, *site.sites_out)
        return [self.resolve(one) for one in sites]

    def _forward(self, tokens: Tensor, mask: Tensor | None, cache: Any = None) -> tuple[Tensor | None, bool]:
        keywords: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
        if cache is not None:
            keywords |= {"past_key_values": cache, "use_cache": True}
        try:
            return self.bridge(tokens, return_type="logits", **keywords), False
        except Stopped:
            return None, True

    def _check_fired(self, points: Mapping[str, Point], stopped: bool) -> None:
        for name, point in points.items():
            if point.fired != 1 and not (stopped and point.fired == 0 and point.only_later):
                why = "after the stop site" if stopped and point.fired == 0 else "in the run"
                raise SiteNotReached(
                    f"Site '{point.names[0]}' (hook {name}) fired {point.fired} times {why}; it must fire once."
                )

    def _backward(
        self,
        loss: Callable[[Tensor], Tensor],
        target: Tensor | None,
        plan: Plan,
        sites: Sequence[SiteLike],
    ) -> tuple[Tensor, dict[SiteLike, Tensor]]:
        if target is None:
            raise InputError("There is nothing to differentiate: the run returned no logits.")
        value = loss(target)
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"`loss` must return a tensor; got {type(value).__name__}.")
        if torch.is_inference_mode_enabled():
            raise InputError("No gradient can be taken inside torch.inference_mode(); use torch.no_grad() there.")
        if not value.requires_grad:
            raise InputError("The loss does not depend on any of the sites in `grads`.")
        taps = [tap for site in sites if (tap := plan.at(site).tap) is not None]
        found = torch.autograd.grad(value.sum(), taps, allow_unused=True)
        gradients: dict[SiteLike, Tensor] = {}
        for site, gradient in zip(sites, found, strict=True):
            if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]  # allow_unused gives None
                raise UnsupportedError(f"The loss does not depend on site '{site}': it is not in the computation.")
            gradients[site] = gradient
        return value.detach(), gradients


def load_model(
    spec: Any,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    share_weights: bool = False,
) -> HookManager:
    """The HookManager of a model, after checking its sites and its maps on a short prompt.

    Args:
        spec: `bundled`, a local directory (from `save_pretrained`), a `.gguf` file (its weights are dequantised to
            `dtype`; `pip install 'mechinterp-circuits[gguf]'`), a hub id with an optional `@revision`, or a model in
            memory: a Hugging Face module (it is copied) or a TransformerBridge (it is used as it is, and every run
            leaves it unchanged). A HookManager is returned as it is.
        revision: The branch, tag or commit of a hub id.
        dtype: The dtype to compute in, as a torch dtype or its name; by default float32 for files, and the model's
            own in memory. It is recorded in circuit files.
        device: Where to put the model, such as `cuda`; by default the CPU for files, and where it is in memory.
        device_map: For a model on several devices, in place of `device`: `auto` or `balanced` (accelerate shares the
            layers out evenly), `balanced_low_0`, `sequential`, or the device of each part by the name of its module. A
            module that accelerate has placed already needs none. Values of a run, edits and everything computed from
            them are on the device of the unembedding (`HookManager.device`); weights of other layers are copied
            there when they are read, one at a time.
        max_memory: How much each device may hold, as accelerate takes it, such as `{0: "20GiB", 1: "40GiB"}`.
        tokenizer: A Hugging Face tokenizer; by default the one that is saved with the model, if any.
        trust_remote_code: Whether transformers may run code from the hub repository.
        share_weights: For a Hugging Face module in memory: use its weights instead of copying them, which halves the
            memory. Do not change or train them as long as the model is in use. (TransformerLens copies the parts of
            joint q, k, v matrices, such as GPT-2's, in any case.)

    Raises InputError when the model cannot be found or its files are incomplete, UnsupportedError when a part of its
    architecture cannot be handled exactly.

    >>> import mechinterp as mi
    >>> mi.load_model("bundled").dims.n_layers > 0
    True
    """
    if isinstance(spec, HookManager):
        return spec
    with Gradients(torch.is_grad_enabled()) as as_before, as_before:
        given: dict[str, Any] = dict(revision=revision, dtype=dtype, device=device, tokenizer=tokenizer)
        given |= dict(device_map=device_map, max_memory=max_memory)
        given |= dict(trust_remote_code=trust_remote_code, share_weights=share_weights)
        opened = open_model(spec, **given)
        return HookManager(opened.bridge, opened.info, opened.tokenizer)
