"""What is stored as JSON has a type, a TypedDict; it is checked when it is read.

A damaged or foreign file is then named together with the field at fault, before anything is made of it.
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
    """`data` itself if it is of the TypedDict `kind`; other keys may stand beside those of the type.

    Raises UserError that names `where` it was read, the first fields at fault and the `remedy`.
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
