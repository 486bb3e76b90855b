"""Check what is stored as JSON against its type, a TypedDict, when it is read.

A damaged or foreign file is thus named together with the field at fault before its content is used.
"""

from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from skipcoder.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SHOWN = 3


def checked(kind: type[T], data: Any, where: str, remedy: str) -> T:
    """Return `data` itself if it matches the TypedDict `kind`; it may have more keys than the type.

    Raises UserError naming `where` it was read, the first fields at fault and the `remedy`.
    """
    from pydantic import ValidationError

    try:
        _adapter(cast(Hashable, kind)).validate_python(data, strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}" for fault in error.errors()]
        shown = "; ".join(faults[:SHOWN]) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
        raise UserError(f"{where} is damaged or not ours ({shown}); {remedy}") from None
    return cast(T, data)


@cache
def _adapter(kind: Hashable) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(cast(type[Any], kind))
