"""The activations: one file each, with everything about it. `ACTIVATIONS` is the table."""

from skipcoder.trainer.coder.activations.base import ACTIVATIONS as ACTIVATIONS
from skipcoder.trainer.coder.activations.base import Activation as Activation
from skipcoder.trainer.coder.activations.batchtopk import BatchTopK
from skipcoder.trainer.coder.activations.groupmax import GroupMax
from skipcoder.trainer.coder.activations.jumprelu import JumpReLU
from skipcoder.trainer.coder.activations.topk import TopK

for _one in (TopK(), GroupMax(), BatchTopK(), JumpReLU()):
    ACTIVATIONS[_one.name] = _one
