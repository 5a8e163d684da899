"""fusedkd: the losses of knowledge distillation, computed in one pass over the logits, on GPUs and CPUs.

>>> loss = fusedkd.kd_loss(student_logits, teacher_logits, labels, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
>>> loss = fusedkd.linear_kd_loss(student_hidden, student_weight, fusedkd.TeacherHead(teacher_hidden, teacher_weight))
>>> loss = fusedkd.cosine_hidden_loss(student_hidden, teacher_hidden, mask=attention_mask)
"""

from fusedkd import layer_maps, nn
from fusedkd.backends import dispatch  # noqa: F401  registers the operators
from fusedkd.divergences import (
    DKD,
    JSD,
    LK,
    NLA,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AMiD,
    Divergence,
    ForwardKL,
    Jeffreys,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)
from fusedkd.losses.attention import attention_kl_loss, attention_mse_loss
from fusedkd.losses.attention_maps import attention_kl_from_maps, attention_mse_from_maps
from fusedkd.losses.contrastive import contrastive_hidden_loss
from fusedkd.losses.gumbel import gumbel_rows
from fusedkd.losses.hidden import cosine_hidden_loss, hidden_loss
from fusedkd.losses.kd import kd_loss
from fusedkd.losses.layers import layer_attention_loss, pairwise_layer_mse
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.options import KDOptions, KDTerms, KDTermsAndStatistics
from fusedkd.teachers import TeacherHead, TeacherLogits, TeacherSamples, TeacherTopK

__version__ = "0.1.0"
__all__ = [
    "DKD",
    "JSD",
    "LK",
    "NLA",
    "TAID",
    "AMiD",
    "AdaptiveKL",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "KDOptions",
    "KDTerms",
    "KDTermsAndStatistics",
    "LogitMSE",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TeacherHead",
    "TeacherLogits",
    "TeacherSamples",
    "TeacherTopK",
    "ToDi",
    "TotalVariation",
    "attention_kl_from_maps",
    "attention_kl_loss",
    "attention_mse_from_maps",
    "attention_mse_loss",
    "contrastive_hidden_loss",
    "cosine_hidden_loss",
    "gumbel_rows",
    "hidden_loss",
    "kd_loss",
    "layer_attention_loss",
    "layer_maps",
    "linear_kd_loss",
    "nn",
    "pairwise_layer_mse",
]
