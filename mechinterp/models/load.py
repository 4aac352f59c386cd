"""Opens a model from the package, a directory, a file, the hub or memory, as a TransformerBridge with its identity."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp.base.errors import InputError, ModelNotAvailable, UnsupportedError, clip
from mechinterp.base.plain_files import exists, is_file, is_folder
from mechinterp.models.foreign_hooks import notes_on_hooks
from mechinterp.models.gguf_model import is_gguf_name, load_gguf
from mechinterp.models.packed_weights import packed_in, weights_of
from mechinterp.models.placement import (
    DeviceMap,
    check_placed,
    parse_device,
    parse_device_map,
    place,
    unplaced,
)
from mechinterp.models.refusal import reason, refusing
from mechinterp.models.source import ModelInfo

logger = logging.getLogger(__name__)

MAX_NAME = 300
"""Letters of a hub id with its revision."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Opened:
    """A bridge, where it came from, and its tokenizer, if it has one."""

    bridge: Any
    info: ModelInfo
    tokenizer: Any


def open_model(
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
) -> Opened:
    """The model of a spec, bridged; the arguments are those of `mechinterp.load_model`."""
    placement = Placement(parse_device_map(device_map, max_memory, device), max_memory, parse_device(device))
    dtype = parse_dtype(dtype)
    if share_weights and (not isinstance(spec, nn.Module) or dtype is not None or placement != Placement()):
        raise InputError("`share_weights` is for a module in memory as it is; omit it, or dtype and device.")
    if isinstance(spec, (str, os.PathLike)):
        with refusing(f"Cannot open the model {os.fspath(spec)!r}", kind=InputError):
            return _open_named(os.fspath(spec), revision, dtype, placement, tokenizer, trust_remote_code)
    if revision is not None:
        raise InputError("`revision` belongs to a hub id; a model in memory has none.")
    if isinstance(spec, nn.Module) and hasattr(spec, "hook_dict") and hasattr(spec, "blocks"):
        with refusing("Cannot use this TransformerBridge"):
            return _wrap_bridge(spec, dtype, placement, tokenizer)
    if isinstance(spec, nn.Module) and hasattr(spec, "config"):
        with refusing(f"Cannot use this {type(spec).__name__}"):
            name = getattr(spec.config, "name_or_path", "") or type(spec).__name__
            check_placed(spec, name)
            module = _with_its_weights(spec) if share_weights else _copied(spec, placement, dtype)
            notes = notes_on_hooks(spec, name)
            opened = _bridge(module, name, None, "memory", tokenizer)
            return replace(opened, info=replace(opened.info, notes=notes))
    raise InputError(
        f"Cannot load a model from {type(spec).__name__}; give 'bundled', a directory, a .gguf file, a hub id, "
        "a Hugging Face model or a TransformerBridge."
    )


def _copied(module: nn.Module, placement: Placement, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the module. By the `to` of its class: accelerate gives a module one of its own, which a copy keeps and
    which moves, and returns, the original."""
    copied = copy.deepcopy(module)
    if placement != Placement():  # as the caller wants it, not as it was placed before
        copied = unplaced(copied)
    return placement.of(type(module).to(copied, dtype=dtype))


def _with_its_weights(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters are the same memory."""
    shared = {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in module.parameters()}
    return copy.deepcopy(module, dict(shared))


@dataclass(frozen=True)
class Placement:
    """Where a model is asked to be: on a device, or shared out by a device map; where it is if neither is given."""

    device_map: str | dict[str, str] | None = None
    max_memory: Mapping[Any, Any] | None = None
    device: torch.device | None = None

    def of(self, module: nn.Module) -> nn.Module:
        """The module there. By the `to` of its class: see `_copied`."""
        if self.device_map is not None:
            return place(module, self.device_map, self.max_memory)
        return type(module).to(module, device=self.device)

    @property
    def loading(self) -> dict[str, Any]:
        """What `from_pretrained` needs to load the weights to where they belong."""
        given = {"device_map": self.device_map, "max_memory": self.max_memory}
        return {name: value for name, value in given.items() if value is not None}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype named `float32`, `bfloat16`, ...; None stays None. Raises InputError for anything else."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"Unknown dtype {clip(dtype, 60)!r}. Known: {', '.join(DTYPES)}.")
        return getattr(torch, dtype)
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise InputError(f"A model cannot have dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    return dtype


def open_encoder(
    spec: Any,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, ModelInfo, Any]:
    """(the module, its identity, its tokenizer) of an encoder with a head, as `open_model` finds them; not bridged.

    A module in memory is used as it is and not changed.
    """
    dtype, device = parse_dtype(dtype), parse_device(device)
    if isinstance(spec, (str, os.PathLike)):
        where, label, revision, origin = _named(os.fspath(spec), revision)
        if origin == "file":
            raise InputError(f"An encoder cannot be opened from a GGUF file ({clip(where, 200)}); give a directory.")
        module, tokenizer = _from_pretrained(
            where, origin, revision, dtype, tokenizer, trust_remote_code, _auto_class(where, origin, revision)
        )
        commit = getattr(module.config, "_commit_hash", None) if origin == "hub" else None
        found = ModelInfo(label, commit or revision, type(module).__name__, origin, "raw", {})
        module = module.to(device=device)
    elif isinstance(spec, nn.Module) and hasattr(spec, "config"):
        if dtype is not None or device is not None or revision is not None:
            raise InputError(
                "A module in memory is used as it is; omit revision, dtype and device, and move it yourself."
            )
        module = spec
        name = str(getattr(spec.config, "name_or_path", "")) or type(spec).__name__
        found = ModelInfo(name, None, type(spec).__name__, "memory", "raw", {}, notes_on_hooks(spec, name))
    else:
        raise InputError(f"Cannot load an encoder from {type(spec).__name__}; give a directory, a hub id or a module.")
    weights = dict(module.named_parameters())
    _check_finite(weights, found.name)
    return module, replace(found, weights=weights), tokenizer


def _auto_class(where: str, origin: str, revision: str | None) -> str:
    """The name of the transformers class that loads the checkpoint's own head."""
    from transformers import AutoConfig

    keywords: dict[str, Any] = {"local_files_only": origin != "hub"} | ({"revision": revision} if revision else {})
    with refusing(f"Cannot load the model {where!r} from {origin}", kind=InputError):
        config: Any = AutoConfig.from_pretrained(where, **keywords)
    named = (getattr(config, "architectures", None) or [""])[0]
    return "AutoModelForSequenceClassification" if named.endswith("SequenceClassification") else "AutoModelForMaskedLM"


def _named(spec: str, revision: str | None) -> tuple[str, str, str | None, str]:
    """(where to load from, label, revision, origin) of a name, directory or hub id."""
    name, at, tail = spec.partition("@")
    path = BUNDLED if spec == "bundled" else Path(spec)
    if spec == "bundled":
        origin = "bundled"
    elif is_folder(path):
        origin = "directory"
    elif is_gguf_name(spec) and is_file(path):
        origin = "file"
    elif is_gguf_name(spec) and "@" not in spec:
        raise ModelNotAvailable(f"There is no GGUF file {clip(spec, 200)!r}.")
    elif exists(path) or len(spec) > MAX_NAME or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(
            f"There is no model directory {clip(spec, 200)!r}; give a folder made by save_pretrained, or a .gguf file."
        )
    else:
        origin = "hub"
    if origin != "hub" and revision is not None:
        raise InputError(f"`revision` belongs to a hub id; {spec!r} is a {origin} model.")
    if origin == "hub" and at:
        if revision is not None and revision != tail:
            raise InputError(f"Two revisions are given: {tail!r} in the id and `revision={revision!r}`; give one.")
        revision = tail
    where = name if origin == "hub" else str(path)
    return where, {"bundled": "bundled", "hub": name}.get(origin, str(path)), revision, origin


def _open_named(
    spec: str,
    revision: str | None,
    dtype: torch.dtype | None,
    placement: Placement,
    tokenizer: Any,
    trust_remote_code: bool,
) -> Opened:
    where, label, revision, origin = _named(spec, revision)
    if origin == "file":
        module, report, tokenizer, file = load_gguf(Path(where), dtype or torch.float32, tokenizer)
        _check_report(where, module, report)
        opened = _bridge(placement.of(module), label, None, origin, tokenizer)
        return replace(opened, info=replace(opened.info, file=file))
    given = placement.loading
    module, tokenizer = _from_pretrained(where, origin, revision, dtype, tokenizer, trust_remote_code, **given)
    commit = getattr(module.config, "_commit_hash", None) if origin == "hub" else None
    module = module if given else placement.of(module)
    return _bridge(module, label, commit or revision, origin, tokenizer)


def _from_pretrained(
    where: str,
    origin: str,
    revision: str | None,
    dtype: torch.dtype | None,
    tokenizer: Any,
    trust_remote_code: bool,
    auto_class: str = "AutoModelForCausalLM",
    **placement: Any,
) -> tuple[nn.Module, Any]:
    import transformers
    from transformers import AutoTokenizer

    keywords = {
        "local_files_only": origin != "hub",
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    if revision is None:
        del keywords["revision"]
    try:
        with _without_bars():
            loaded: Any = getattr(transformers, auto_class).from_pretrained(
                where,
                dtype=dtype or torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed in the report and refused below
                **keywords,
                **placement,
            )
    except Exception as error:  # damaged files make Hugging Face raise anything
        kind = ModelNotAvailable if origin == "hub" and _out_of_reach(error) else InputError
        raise kind(f"Cannot load the model {where!r} from {origin}: {reason(error)}.") from error
    module, report = loaded
    _check_report(where, module, report)
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **keywords)
        except Exception as error:  # a damaged tokenizer raises anything; the model works without it
            logger.warning("No tokenizer in %s (%s); prompts must be given as token ids.", where, type(error).__name__)
    return module, tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' bars of weights that are put in place; a download from the hub still shows its own."""
    from transformers.utils.logging import set_tqdm_hook

    def hidden(factory: Any, args: Any, how: Any) -> Any:
        return factory(*args, **{**how, "disable": True})

    before = set_tqdm_hook(hidden)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _check_report(where: str, module: nn.Module, report: Mapping[str, Any]) -> None:
    """Raises InputError if weights are missing or have other shapes, by what transformers reports."""
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise InputError(
            f"The checkpoint {where!r} has weights whose shapes differ from its config.json ({_some(mismatched)})."
        )
    if report["unexpected_keys"]:
        unused = sorted(report["unexpected_keys"])
        logger.warning("%s holds weights that %s does not use: %s.", where, type(module).__name__, _some(unused))
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"The checkpoint {where!r} lacks weights that the model needs ({_some(missing)}); they would be random. "
            "Give a complete checkpoint."
        )


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether an error says that files are not cached and the hub cannot be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bridge(module: nn.Module, name: str, revision: str | None, origin: str, tokenizer: Any) -> Opened:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    check_placed(module, name)
    weights = weights_of(module)
    architecture = type(module).__name__
    _check_finite(weights, name)
    module.eval().requires_grad_(False)
    config: Any = module.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{architecture} has an encoder and a decoder; only decoder stacks are supported.")
    force_eager_attention(module)
    if getattr(module, "dtype", None) == torch.float64 and hasattr(module, "set_experts_implementation"):
        experts: Any = module
        experts.set_experts_implementation("eager")  # the grouped product of experts does not support float64
    _give_zero_biases(module, architecture)
    prompts = _short_prompts(config.get_text_config())
    expected = _logits(module, architecture, prompts)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"TransformerLens has no bridge for {architecture}, so it cannot be opened; use a model of another family."
        )
    unembedding: Any = getattr(module, "get_output_embeddings", lambda: None)
    if (how := packed_in([unembedding()])) is not None:
        raise UnsupportedError(
            f"The unembedding of {architecture} is quantised ({how}), and every analysis reads it as plain numbers. "
            "Leave it out of the quantisation (bitsandbytes: llm_int8_skip_modules=['lm_head'])."
        )
    with refusing(f"TransformerLens cannot bridge {architecture}", config):
        bridge = build_bridge_from_module(module, architecture, hf_config=config, model_name=name)
    force_eager_attention(module)
    _check_bridged(_logits(bridge, architecture, prompts), expected, architecture)
    return Opened(bridge, ModelInfo(name, revision, architecture, origin, "raw", weights), tokenizer)


def _give_zero_biases(module: nn.Module, architecture: str) -> None:
    """Adds zero biases to q, k, v of a GPT-NeoX without them, since TransformerLens reads them in every GPT-NeoX."""
    if architecture != "GPTNeoXForCausalLM":
        return
    for name, part in module.named_modules():
        if name.endswith("query_key_value") and isinstance(part, nn.Linear) and part.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
            part.bias = nn.Parameter(part.weight.new_zeros(part.out_features), requires_grad=False)


def _check_finite(weights: Mapping[str, Tensor], name: str) -> None:
    for key, weight in weights.items():
        if not bool(torch.isfinite(weight.float() if weight.dtype.itemsize < 2 else weight).all()):
            raise InputError(f"The weight {key!r} of {name} holds NaN or infinity; the checkpoint is damaged.")


def _short_prompts(config: Any) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and attention mask of one full and one padded prompt."""
    length = min(6, int(getattr(config, "max_position_embeddings", 6)))
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, (length + 1) // 2 :] = 0
    return tokens, mask


def _logits(model: Any, architecture: str, prompts: tuple[Tensor, Tensor]) -> Float[Tensor, "token d_vocab"]:
    """The logits at the real tokens of short prompts."""
    tokens, mask = (part.to(next(model.parameters()).device) for part in prompts)
    config = getattr(model, "config", None)
    with refusing(f"{architecture}: a short test run on token ids fails", config), torch.no_grad():
        found = model(tokens, attention_mask=mask)
    return getattr(found, "logits", found)[mask.bool()]


def _check_bridged(ours: Tensor, expected: Tensor, architecture: str) -> None:
    """Raises UnsupportedError when the bridge computes something else than the model.

    TransformerLens reimplements the attention of some architectures and ignores some rare settings.
    """
    size = float(expected.float().abs().max()) + 1e-6
    worst = float((ours.float() - expected.float()).abs().max()) / size
    if not worst < (1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UnsupportedError(
            f"TransformerLens's bridge of {architecture} computes other logits than the model (off by "
            f"{worst:.2g} of their size), so its activations would be wrong."
        )


def _wrap_bridge(bridge: Any, dtype: torch.dtype | None, placement: Placement, tokenizer: Any) -> Opened:
    device = placement.device
    own = next(bridge.original_model.parameters())
    elsewhere = placement.device_map is not None or (device is not None and device != own.device)
    if elsewhere or (dtype is not None and dtype != own.dtype):
        raise InputError(
            f"The bridge is {own.dtype} on {own.device}; a bridge is used as it is, so move it before loading."
        )
    check_placed(bridge.original_model, str(getattr(bridge.cfg, "model_name", None) or "the bridge"))
    info = ModelInfo(
        name=str(getattr(bridge.cfg, "model_name", None) or "bridge"),
        revision=None,
        architecture=str(bridge.cfg.architecture),
        origin="memory",
        processing="compatibility" if getattr(bridge, "compatibility_mode", False) else "raw",
        weights=weights_of(bridge.original_model),
        notes=notes_on_hooks(bridge, str(getattr(bridge.cfg, "model_name", None) or "bridge")),
    )
    return Opened(bridge, info, tokenizer if tokenizer is not None else getattr(bridge, "tokenizer", None))
