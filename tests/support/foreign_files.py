"""What the tests of other tools' files share: random circuits of any shape, and how a refusal reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.base.errors import FormatError
from mechinterp.circuit_file.formats.eap_ig_json import from_eap_ig_json, to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import from_eap_ig_pt, to_eap_ig_pt
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.graphs.circuit import Circuit, on_paths
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores
from mechinterp.models.layout import Dims

EAP_IG = {"eap-ig-json": (to_eap_ig_json, from_eap_ig_json), "eap-ig-pt": (to_eap_ig_pt, from_eap_ig_pt)}
LOSS = Made("eap", "logit_diff", "corrupt", 1, "loss")


def dims_of(layers: int = 3, heads: int = 2, kv_heads: int | None = None, **more: Any) -> Dims:
    return Dims(
        layers,
        heads,
        kv_heads or heads,
        16,
        8,
        50,
        50,
        32,
        **{"has_mlp": True, "parallel": False, "causal": True, **more},
    )


def random_circuit(graph: Graph, seed: int = 0, share: float = 0.4, dtype: torch.dtype = torch.float32) -> Circuit:
    """Random edges on paths, with random scores; never empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.possible.shape, generator=generator) < share) & graph.possible
    mask[-1, 0] = True
    table = torch.randn(graph.possible.shape, generator=generator, dtype=dtype) * graph.possible
    return Circuit(
        graph, on_paths(graph, mask), int(mask.sum()), {}, Scores(graph, table, 1, "eap", "logit_diff", "corrupt")
    )


def unscored(circuit: Circuit) -> Circuit:
    return Circuit(circuit.graph, circuit.kept, circuit.n_selected)


def one_line(call: Any, *arguments: Any) -> str:
    """The message with which a file is refused."""
    with pytest.raises(FormatError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message
