"""A GGUF file opened as a Hugging Face model with its tokenizer, dequantised, and compared with what the file states.

transformers rebuilds the configuration from the file's settings and leaves out, without a word, what it does not know:
scaled rotary angles of Llama 3.1, say, or biases of a family that has none. The logits are then another model's. So
every setting of the architecture must be found again in the configuration, and the model must have exactly as many
weights as the file, which is seen on a model without memory before any weight is allocated.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from mechinterp.base.errors import FormatError, InputError, MechInterpError, UnsupportedError, clip
from mechinterp.base.plain_files import file_sha256
from mechinterp.models.gguf_header import GgufHeader, layers_in, read_header
from mechinterp.models.refusal import reason
from mechinterp.models.source import ModelFile

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
MAX_SIZES: Mapping[str, int] = {"context_length": 2**26, "expert_count": 4096}

# Settings under the architecture's name -> the attributes of the configuration that may hold them.
IN_CONFIG: Mapping[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "use_parallel_residual": ("use_parallel_residual",),
}
HARMLESS = frozenset(
    ("context_length", "feed_forward_length", "vocab_size", "tensor_data_layout", "expert_feed_forward_length")
)
"""Settings that are seen in the shapes of the weights, or change no number."""


def is_gguf_name(name: str) -> bool:
    """Whether a name is that of a GGUF file, by its end."""
    return name.lower().endswith(SUFFIX)


def load_gguf(path: Path, dtype: torch.dtype, tokenizer: Any) -> tuple[nn.Module, Mapping[str, Any], Any, ModelFile]:
    """(module, transformers' report of the loading, tokenizer, the file's record) of a GGUF file.

    Cost: the file is read three times; memory for all weights in `dtype`. Raises InputError if the `gguf` package is
    missing, FormatError if the file is damaged, UnsupportedError if transformers would make another model of it.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shown = clip(str(path), 200)
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{shown}: a GGUF file needs the package gguf: pip install 'mechinterp-circuits[gguf]'.")
    header = read_header(path)
    _check_bounds(header, shown)
    # Other files beside it (adapters, a tokenizer's settings) would be read, too; in an empty folder there are none.
    with TemporaryDirectory() as empty, _one_line(shown, header):
        where: dict[str, Any] = {"gguf_file": str(path.resolve()), "local_files_only": True}
        config: Any = AutoConfig.from_pretrained(empty, **where)
        _check_settings(header, config, shown)
        with torch.device("meta"):
            planned: nn.Module = AutoModelForCausalLM.from_config(config)
        _check_weights(header, planned, shown)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
        if hasattr(transformers, "GgufConfig"):  # newer releases could keep the weights quantised
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off in another way
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                empty, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options, **where
            )
        module, report = loaded
        if tokenizer is None:
            tokenizer = _tokenizer(AutoTokenizer, empty, where, shown)
    _check_dequantised(module, shown)
    return module, report, tokenizer, ModelFile(file_sha256(path), header.types)


@contextlib.contextmanager
def _one_line(shown: str, header: GgufHeader) -> Iterator[None]:
    """Turns what transformers raises about a file, which can be anything, into one line."""
    try:
        yield
    except MechInterpError:
        raise
    except Exception as error:
        family = clip(header.architecture, 60)
        raise InputError(f"Cannot load the GGUF file {shown} (architecture {family!r}): {reason(error)}.") from error


def _tokenizer(auto: Any, folder: str, where: Mapping[str, Any], shown: str) -> Any:
    try:
        return auto.from_pretrained(folder, **where)
    except Exception as error:  # a damaged tokenizer raises anything; the model works without it
        logger.warning("No tokenizer in %s (%s); prompts must be given as token ids.", shown, type(error).__name__)
        return None


def _check_bounds(header: GgufHeader, shown: str) -> None:
    """Return None if the sizes that transformers loops over are those of the tensors, or small."""
    own = _own_settings(header)
    n_layers, layers = own.get("block_count"), layers_in(header)
    if len(layers) != n_layers or layers != set(range(len(layers))):
        raise FormatError(
            f"{shown} says that it has {clip(repr(n_layers), 40)} layers; it has tensors of {len(layers)} layers."
        )
    for name, value in own.items():
        most = MAX_SIZES.get(name, 2**31)
        if isinstance(value, int) and abs(value) > most:
            raise FormatError(f"{shown} says that its {clip(name, 60)} is {value}; at most {most} can be read.")


def _own_settings(header: GgufHeader) -> dict[str, Any]:
    """The settings of the file's architecture, without its name in front."""
    prefix = f"{header.architecture}."
    return {name.removeprefix(prefix): value for name, value in header.settings.items() if name.startswith(prefix)}


def _check_settings(header: GgufHeader, config: Any, shown: str) -> None:
    """Return None if the configuration holds every setting of the architecture. Raises UnsupportedError otherwise."""
    for name, value in _own_settings(header).items():
        if name in HARMLESS or (name, value) in (("rope.scaling.type", "none"), ("attention.causal", True)):
            continue
        got = [given for each in _candidates(name, config) if (given := each) is not None]
        if not any(_same(value, each) for each in got):
            found = f"has {clip(repr(got[0]), 40)} there" if got else "does not read it"
            raise UnsupportedError(
                f"{shown} has the setting {header.architecture}.{clip(name, 60)} = {clip(repr(value), 40)}, and "
                f"transformers {found}, so the model would compute something else; use a checkpoint in safetensors."
            )


def _candidates(name: str, config: Any) -> list[Any]:
    """What the configuration says about a setting, in each place that may hold it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name in ("attention.key_length", "attention.value_length"):
        return [head_dim]
    rope: Any = getattr(config, "rope_parameters", None) or {}
    per_kind = [each for each in rope.values() if isinstance(each, dict)]
    ropes = [*(per_kind or [rope]), vars(config)]
    if name == "rope.freq_base":
        return [each.get("rope_theta") for each in ropes]
    if name == "rope.dimension_count":
        shares = [each.get("partial_rotary_factor") for each in ropes]
        return [round(head_dim * next((share for share in shares if share is not None), 1))]
    return [getattr(config, attribute, None) for attribute in IN_CONFIG.get(name, ())]


def _same(value: Any, got: Any) -> bool:
    if isinstance(value, float) and isinstance(got, (int, float)):
        return math.isclose(value, got, rel_tol=1e-6)  # GGUF keeps float32
    return value == got or (isinstance(value, tuple) and all(each == got for each in value))


def _check_weights(header: GgufHeader, planned: nn.Module, shown: str) -> None:
    """Return None if the model has as many weights as the file. Raises UnsupportedError otherwise."""
    n_model = sum(weight.numel() for weight in planned.parameters())
    if n_model == header.n_weights:
        return
    special = next((tensor.name for tensor in header.tensors if tensor.name.startswith("rope_f")), None)
    why = f" (the tensor {special!r} scales rotary angles, which is not read)" if special else ""
    raise UnsupportedError(
        f"{shown} holds {header.n_weights:,} weights, and the {type(planned).__name__} that transformers makes of its "
        f"settings has {n_model:,}{why}; the model would not be the file's. Use a checkpoint in safetensors."
    )


def _check_dequantised(module: nn.Module, shown: str) -> None:
    """Raises UnsupportedError unless all weights are plain numbers; then forgets that they were quantised once."""
    packed = {str(weight.dtype) for weight in module.parameters() if not weight.is_floating_point()}
    if packed:
        raise UnsupportedError(f"{shown}: transformers kept weights quantised, as {', '.join(sorted(packed))}.")
    config: Any = module.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in module.__dict__:
            delattr(module, name)
