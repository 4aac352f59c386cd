"""The types of single fields of a circuit file, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mechinterp.circuit_file.limits import MAX_NAMED, MAX_NODES

Text = Annotated[str, Field(max_length=10_000)]
Label = Annotated[str, Field(min_length=1, max_length=1000)]
GgmlType = Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,20}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Small = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
Index = Annotated[int, Field(strict=True, ge=-1, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Parameter = Flag | Annotated[int, Field(strict=True)] | Number | Text
Version = Annotated[int, Field(strict=True, ge=1, le=10**6)]
Named = Field(max_length=MAX_NAMED)
Neurons = Annotated[tuple[Count, ...], Field(max_length=MAX_NODES)]
SidecarName = Annotated[
    str, Field(pattern=r"^[^-./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.scores\.safetensors$", max_length=200)
]
"""A plain file name beside the circuit file: no folder, no drive, not hidden, not like an option."""
