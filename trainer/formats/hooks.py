"""Where a coder reads and writes, in TransformerLens' names."""

import re

from skipcoder.errors import UserError
from skipcoder.trainer.coder.files import SiteFacts


def layer_of(module: str) -> int:
    """Return the layer number in a module's name; raise UserError if it has none."""
    found = re.search(r"\.(\d+)\.", f".{module}.")
    if found is None:
        raise UserError(f"module {module!r} holds no layer number")
    return int(found[1])


def transformer_lens(site: SiteFacts) -> str:
    """Return a site's name: the input of `layers.10.mlp` is `blocks.10.mlp.hook_in`, its output
    `blocks.10.hook_mlp_out`, which is added to the residual stream. Raise UserError for other modules."""
    module, side = site["module"], site["side"]
    if not re.search(r"\.(mlp|post_feedforward_layernorm)$", module):
        raise UserError(f"TransformerLens' name of module {module!r} is not known")
    return f"blocks.{layer_of(module)}.{'mlp.hook_in' if side == 'input' else 'hook_mlp_out'}"
