"""How activations become bytes: one small class per codec, chosen by `store.codec`. `CODECS` is the table."""

from skipcoder.pipeline.store.codecs.base import Codec as Codec
from skipcoder.pipeline.store.codecs.base import Coded as Coded
from skipcoder.pipeline.store.codecs.base import Spec as Spec
from skipcoder.pipeline.store.codecs.bf16 import Bf16, Bf16Words
from skipcoder.pipeline.store.codecs.scaled import Fp8, Int8
from skipcoder.registry import Registry

REVISION = 1
"""Part of a store's identity: raise it when the same activations would be coded differently."""

CODECS: Registry[type[Codec]] = Registry("store.codec", {"bf16": Bf16, "int8": Int8, "fp8": Fp8})


def codec_of(name: str, version: int) -> type[Codec]:
    """The codec of a store with this format version; UserError for an unknown name."""
    return Bf16Words if name == "bf16" and version == 2 else CODECS[name]
