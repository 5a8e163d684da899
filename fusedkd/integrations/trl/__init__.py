"""TRL's distillation losses on the fused kernels: same names, keywords, values and gradients.

>>> from fusedkd.integrations import trl as fused
>>> trainer = DistillationTrainer(...)     # TRL's, as ever
>>> fused.patch(trainer)                   # its class, in this process; fused.unpatch(trainer) gives TRL's losses back
>>> with fused.patch(GKDTrainer): ...      # or for a while

What is replaced in which trainer is the table :data:`~fusedkd.integrations.trl.patching.SEAMS`; the trainers remain
TRL's, with what their losses are divided by. As of TRL 1.16 GKD divides by the token count of all processes without
multiplying by their number, so that under data parallelism loss and gradient are too small by that factor, which
:func:`fusedkd.integrations.check.kd_check` shows, and it leaves the loss's temperature at 1.
"""

from fusedkd.integrations.trl.hidden import chunked_divergence_loss, chunked_jsd_loss
from fusedkd.integrations.trl.lists import topk_self_distillation_loss
from fusedkd.integrations.trl.logits import full_logit_self_distillation_loss, generalized_jsd_loss
from fusedkd.integrations.trl.patching import SEAMS, VERSIONS, patch, unpatch

__all__ = [
    "SEAMS",
    "VERSIONS",
    "chunked_divergence_loss",
    "chunked_jsd_loss",
    "full_logit_self_distillation_loss",
    "generalized_jsd_loss",
    "patch",
    "topk_self_distillation_loss",
    "unpatch",
]
